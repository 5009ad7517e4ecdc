"""`lorascope status` and `lorascope doctor`: what a study holds, and whether it and the installation are sound."""

import json
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from lorascope.builtin_model import cache_folder
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.store import Store
from lorascope.study import Study

EXTRAS = {
    "peft": "peft",
    "math": "math_verify",
    "gym": "reasoning_gym",
    "hub": "datasets",
    "web": "starlette",
    "embed": "sentence_transformers",
    "umap": "umap",
    "judge": "openai",
}


@dataclass(frozen=True)
class StatusConfig:
    """Show what a study was made from, which stages were run, and which are stale."""


@dataclass(frozen=True)
class DoctorConfig:
    """Check the installation; with a study, also check every file of it for damage."""


def show_status(study: Study, config: StatusConfig, options: Options) -> dict[str, Any]:
    """What the study was made from and a row per stage (see `Study.status`)."""
    manifest = study.manifest
    about = {key: manifest[key] for key in ("model", "adapter", "system", "markup", "created")}
    return about | {"corpora": manifest["corpora"], "stages": study.status()}


def examine(path: Path | None, config: DoctorConfig, options: Options) -> dict[str, Any]:
    """Facts of the installation and, for a study, the damage found (exit code 1 if there is any)."""
    report = installation()
    if path is not None:
        study = Study.open(path)
        report |= {"study": str(path), "damaged": find_damage(study)}
        report["stale"] = [row["stage"] for row in study.status() if row["state"] != "done"]
    return report


def installation() -> dict[str, Any]:
    """Versions, devices, memory, disk, cache and extras."""
    import torch

    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "python": platform.python_version(),
        "lorascope": metadata.version("lorascope"),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cache": str(cache),
        "free_disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "extras": {extra: util.find_spec(module) is not None for extra, module in EXTRAS.items()},
    }


def find_damage(study: Study) -> list[str]:
    """One sentence per damaged or half-written file."""
    found = []
    for file in sorted(p for p in study.path.rglob("*") if p.is_file()):
        why = damage_of(file)
        if why:
            found.append(f"{file.relative_to(study.path)}: {why}")
    for index in sorted(study.path.glob("scalars/*/[!.]*/index.json")):
        try:
            Store.open(index.parent).verify()
        except (RunFailed, BadInput) as error:
            found.append(f"{index.parent.relative_to(study.path)}: {error}")
    return found


def damage_of(file: Path) -> str | None:
    """What is wrong with one file, judged by its kind; None when nothing is."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".jsonl":
            text = file.read_text(encoding="utf-8")
            # Not splitlines: texts of traces may hold other line separators, which JSON leaves as they are.
            for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
                try:
                    json.loads(line)
                except ValueError:
                    return f"line {number} is not JSON"
        elif file.suffix == ".parquet":
            pq.ParquetFile(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):
                pass
        elif file.suffix == ".tmp":
            return "left over from a write that was cut off; it can be removed"
    except (OSError, ValueError, SafetensorError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
