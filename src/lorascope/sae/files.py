"""The SAE as a SAELens folder: `cfg.json` and `sae_weights.safetensors`, raw scalars in and out.

`SAE.load_from_disk(folder)` of SAELens 6 reads it as a JumpReLU SAE and gives the same codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lorascope.errors import BadInput, MissingStage
from lorascope.sae.model import SAE
from lorascope.study import atomic_write_bytes, read_json, write_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# SAELens reads folders of versions before 6 by other rules; this is the version whose layout is written here.
SAELENS_VERSION = "6.54.0"


def save_sae(folder: Path, sae: SAE, metadata: dict[str, Any]) -> None:
    """Write the SAELens folder of an SAE that takes raw scalars; `metadata` is JSON-ready."""
    config = {
        "architecture": "jumprelu",
        "d_in": sae.n_directions,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None} | metadata,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.tensors().items()}
    atomic_write_bytes(folder / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def load_sae(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE (for raw scalars) and its metadata.

    Raises:
        MissingStage: there is none yet.
        BadInput: the files are damaged or of another architecture.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise MissingStage(f"{folder} holds no SAE; run first: lorascope sae {folder.parent}.")
    config = read_json(folder / CONFIG)
    if config.get("architecture") != "jumprelu" or config.get("apply_b_dec_to_input"):
        raise BadInput(
            f"{folder} holds a {config.get('architecture')} SAE that lorascope did not write; train it anew."
        )
    try:
        t = load_file(folder / WEIGHTS)
        sae = SAE(t["W_enc"], t["W_dec"], t["b_enc"], t["b_dec"], t["threshold"])
    except (SafetensorError, KeyError, OSError) as error:
        raise BadInput(f"{folder / WEIGHTS} is damaged ({error}); run: lorascope sae {folder.parent}.") from error
    return sae, json.loads(json.dumps(config["metadata"]))
