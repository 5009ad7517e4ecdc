"""How far explanations can be executed: mean scores on text they never saw, beside wrong explanations, by kind."""

from typing import Any

from lorascope.study import Study
from lorascope.views.reading import Json, missing, ready, stage_records

TASKS = ("detection", "fuzzing")
NAMES = {"all": "all features", "direction": "directions", "latent": "latents", "base": "control: base model"}


def explanation_scores(study: Study) -> Json:
    """Mean scores by kind of feature.

    Returns:
        `{"available", "corpus", "explainer", "rows": [{"kind", "label", "n", "explained", "reasons", "tasks":
        {"detection": {"own": {"value", "low", "high", "n"}, "wrong": {..}, "gain": {..}} or None, "fuzzing": ..}}]}`;
        balanced accuracies (0.5 is chance), intervals that resample directions whole.
    """
    records = [record for record in stage_records(study, "explain").values() if record.get("result")]
    if not records:
        return missing(study, "explanations and their scores", "lorascope explain STUDY")
    result, config = records[-1]["result"], records[-1].get("config") or {}
    rows = [score_row(kind, result[kind]) for kind in NAMES if isinstance(result.get(kind), dict)]
    view = {"available": True, "corpus": config.get("corpus"), "explainer": config.get("explainer"), "rows": rows}
    return dict(ready(view))


def score_row(kind: str, found: Json) -> Json:
    """One kind's row."""
    kept = {key: found.get(key) for key in ("n", "explained", "reasons")}
    return {"kind": kind, "label": NAMES[kind]} | kept | {"tasks": {task: task_scores(found, task) for task in TASKS}}


def task_scores(found: Json, task: str) -> Json | None:
    """Own and wrong mean score of one task and their paired difference; None without any score."""
    if not found.get(task):
        return None
    parts: dict[str, Any] = {"own": task, "wrong": f"{task}_wrong", "gain": f"{task}_gain"}
    return {name: renamed(found.get(key), found.get(f"n_{task}")) for name, key in parts.items()}


def renamed(mean: Json | None, n: int | None) -> Json | None:
    """`{"mean", "low", "high"}` as `{"value", "low", "high", "n"}`."""
    return {"value": mean["mean"], "low": mean["low"], "high": mean["high"], "n": n} if mean else None
