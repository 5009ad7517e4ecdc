"""How a study was made: versions, seeds, configs, seconds and peak memory of every stage."""

from typing import Any

from lorascope.study import Study
from lorascope.views.reading import Json, ready


def provenance(study: Study) -> Json:
    """The study's making.

    Returns:
        `{"available": True, "study", "created", "model", "adapter_source", "system", "markup", "max_tokens",
        "too_long", "seed", "versions": {..}, "stages": [{"name", "state", "why", "seconds", "peak_rss", "finished",
        "seed", "config": {..}}], "old": [stages whose inputs changed since], "seconds",
        "peak_rss"}`; seconds and bytes.
    """
    manifest = study.manifest
    states = {row["stage"]: row for row in study.status()}
    stages = [stage_row(name, record, states.get(name, {})) for name, record in manifest["stages"].items()]
    versions: dict[str, Any] = manifest.get("versions") or {}
    for record in manifest["stages"].values():
        versions = versions | (record.get("versions") or {})
    kept = {
        key: manifest.get(key) for key in ("created", "model", "system", "markup", "max_tokens", "too_long", "seed")
    }
    made = {
        "available": True,
        "study": study.path.resolve().name,
        "adapter_source": manifest.get("adapter"),
        "versions": versions,
        "stages": stages,
        # A report is always older than what it shows.
        "old": [stage["name"] for stage in stages if stage["state"] == "stale" and stage["name"] != "report"],
        "seconds": sum(stage["seconds"] or 0 for stage in stages),
        "peak_rss": max((stage["peak_rss"] or 0 for stage in stages), default=0),
    }
    return dict(ready(kept | made))


def stage_row(name: str, record: Json, state: Json) -> Json:
    """One stage's record for a table."""
    return {
        "name": name,
        "state": state.get("state", "done"),
        "why": state.get("why", ""),
        "seconds": record.get("seconds"),
        "peak_rss": record.get("peak_rss"),
        "finished": record.get("finished"),
        "seed": (record.get("options") or {}).get("seed"),
        "config": record.get("config") or {},
    }
