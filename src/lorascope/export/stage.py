"""The command `lorascope export`: one folder per format, put in place whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.export.folders import write_peft, write_saelens
from lorascope.export.neuronpedia import write_neuronpedia
from lorascope.export.settings import ExportConfig
from lorascope.export.tables import write_tables
from lorascope.study import Study, whole_folder

Json = dict[str, Any]
Write = Callable[[Study, ExportConfig, Path], Json]
"""Fills an empty folder; returns what is in it, and under `left_out` what is missing and what to run for it."""

FORMATS: dict[str, Write] = {
    "peft": write_peft,
    "saelens": write_saelens,
    "neuronpedia": write_neuronpedia,
    "csv": write_tables,
}
INPUTS: dict[str, tuple[str, ...]] = {
    "peft": ("adapter",),
    "saelens": ("sae/cfg.json", "sae/sae_weights.safetensors"),
    "neuronpedia": ("examples", "explanations", "sae/sae_weights.safetensors", "lens", "tokenizer"),
    "csv": (
        *("examples", "explanations", "categories", "reasoning", "ablation"),
        *("sae/sae_weights.safetensors", "tokenizer"),
    ),
}
"""What each format is made from, beside the recordings of its corpus."""


def export_study(study: Study, config: ExportConfig, options: Options) -> Json:
    """The stage.

    Returns:
        `{"to", "folder", "files", "bytes", "left_out": [{"what", "run"}]}` and the counts of the format.

    Raises:
        BadInput: no such format, or the folder holds something else.
        MissingStage: nothing of what the format holds has been made.
    """
    if config.to not in FORMATS:
        raise BadInput(f"There is no format {config.to!r}; choose from {', '.join(FORMATS)}.")
    if min(config.examples, config.per_quantile, config.window) < 0 or config.examples < 1:
        raise BadInput("--examples must be at least 1, --per-quantile and --window at least 0.")
    own = (study.path / "export" / config.to).resolve()
    folder = own if config.output is None else Path(config.output).resolve()
    ours = study.manifest["stages"].get(stage_name(config), {}).get("outputs", ())
    if folder not in (own, *map(Path, ours)) and occupied(folder):
        raise BadInput(f"{folder} holds something already; name a new folder for --output, or remove it first.")
    recordings = sorted(study.path.glob(f"scalars/{config.corpus}/[!.]*/index.json"))
    inputs = [*INPUTS[config.to], *(path.relative_to(study.path).as_posix() for path in recordings)]
    output = f"export/{config.to}" if folder == own else str(folder)

    def work() -> Json:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as new:
            found = FORMATS[config.to](study, config, new)
            files = [path for path in new.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
        return {"to": config.to, "folder": str(folder), "files": len(files), "bytes": size} | found

    return study.run(stage_name(config), config, options, inputs=inputs, outputs=[output], work=work)


def occupied(folder: Path) -> bool:
    """Whether something stands where a folder is to be written."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def stage_name(config: ExportConfig) -> str:
    """The name of the study's record: one for each format."""
    return f"export:{config.to}"
