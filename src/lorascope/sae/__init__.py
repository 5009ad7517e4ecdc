"""Sparse autoencoder over all directions' scalars: training, SAELens files, quality and patched KL.

Nothing here loads a language model but `patched_kl`, when it runs.
"""

from dataclasses import replace
from typing import Any

from lorascope.config import Options
from lorascope.sae.files import load_sae, save_sae
from lorascope.sae.model import SAE, fold
from lorascope.sae.patched import PatchConfig, patched_kl
from lorascope.sae.training import SAEConfig, train_sae
from lorascope.study import Study

__all__ = ["SAE", "PatchConfig", "SAEConfig", "decompose", "fold", "load_sae", "patched_kl", "save_sae", "train_sae"]


def decompose(study: Study, config: SAEConfig, options: Options) -> dict[str, Any]:
    """The command `lorascope sae`: train and measure the SAE, then its patched KL unless that is left out."""
    # What patched KL is told must not make the trained SAE stale.
    default = SAEConfig()
    result = train_sae(study, replace(config, patched=default.patched, patched_tokens=default.patched_tokens), options)
    if any(row["stage"] == "sae:patched" and row["state"] != "done" for row in study.status()):
        study.forget("sae:patched", "patched_kl", "adapter_off_kl")  # it was measured on what is there no more
    if config.patched:
        result = result | patched_kl(study, PatchConfig(config.heldout, config.patched_tokens), options)
    return result
