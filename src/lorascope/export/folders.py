"""The adapter and the SAE, which are in other tools' formats already: checked, then copied."""

import shutil
from pathlib import Path
from typing import Any

from lorascope.adapter import Adapter
from lorascope.export.settings import ExportConfig
from lorascope.sae import load_sae
from lorascope.study import Study

Json = dict[str, Any]


def write_peft(study: Study, config: ExportConfig, folder: Path) -> Json:
    """A PEFT folder: `PeftModel.from_pretrained(model, folder)`, vLLM and lm-eval load it.

    Raises:
        MissingStage: there is no adapter.
        BadInput: its files are damaged.
    """
    source = study.require("adapter/adapter_config.json", "lorascope train STUDY").parent
    adapter = Adapter.load(source)
    copy_files(source, folder, ("adapter_config.json", "adapter_model.safetensors"))
    return {"directions": len(adapter.addresses), "base_model": study.model_name, "left_out": []}


def write_saelens(study: Study, config: ExportConfig, folder: Path) -> Json:
    """A SAELens folder: `SAE.load_from_disk(folder)` loads it. It takes raw scalars in the order of
    its `metadata["addresses"]`.

    Raises:
        MissingStage: there is no SAE.
        BadInput: its files are damaged.
    """
    sae, metadata = load_sae(study.path / "sae")
    copy_files(study.path / "sae", folder, ("cfg.json", "sae_weights.safetensors"))
    return {"latents": sae.n_latents, "directions": sae.n_directions, "unit": metadata.get("unit"), "left_out": []}


def copy_files(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy some files of a folder."""
    for name in names:
        shutil.copyfile(source / name, folder / name)
