"""How far explanations can be executed: mean scores on text they never saw, beside wrong explanations, by kind."""

from typing import Any

from lorascope.explain import explain_records, pool_kinds
from lorascope.features import CONTROLS
from lorascope.study import Study
from lorascope.views.reading import Json, missing, ready

TASKS = ("detection", "fuzzing")
NAMES = {
    "all": "all features",
    "direction": "directions",
    "latent": "latents",
    "neuron": "control: MLP neurons",
    "random": "control: random",
    "untrained": "control: untrained",
    "base": "control: base model",
}


def explanation_scores(study: Study) -> Json:
    """Mean scores by kind of feature.

    Returns:
        `{"available", "corpus", "explainer", "rows": [{"kind", "label", "n", "features", "explained", "reasons",
        "tasks": {"detection": {"own": {"value", "low", "high", "n"}, "wrong": {..}, "gain": {..}} or None, "fuzzing":
        ..}}]}`; balanced accuracies (0.5 is chance), intervals that resample directions whole; `all` is without
        controls.
    """
    records = explain_records(study)
    if not records:
        return missing(study, "explanations and their scores", "lorascope explain STUDY")
    found = {kind: record["result"] for kind, record in records.items()}
    features = sum(result["features"] for kind, result in found.items() if kind not in CONTROLS)
    found["all"] = pool_kinds(study) | {"features": features}
    rows = [score_row(kind, found[kind]) for kind in NAMES if found.get(kind, {}).get("n")]
    configs = [record["config"] for record in records.values()]
    said = {key: ", ".join(sorted({config[key] for config in configs})) for key in ("corpus", "explainer")}
    return dict(ready({"available": True, "rows": rows} | said))


def score_row(kind: str, found: Json) -> Json:
    """One kind's row; its label says so where only some features were drawn (`--limit`)."""
    n, features = found["n"], found["features"]
    label = NAMES[kind] + (f" ({n} of {features}, drawn)" if n < features else "")
    kept = {key: found[key] for key in ("n", "features", "explained", "reasons")}
    return {"kind": kind, "label": label} | kept | {"tasks": {task: task_scores(found, task) for task in TASKS}}


def task_scores(found: Json, task: str) -> Json | None:
    """Own and wrong mean score of one task and their paired difference; None without any score."""
    if not found.get(task):
        return None
    parts: dict[str, Any] = {"own": task, "wrong": f"{task}_wrong", "gain": f"{task}_gain"}
    return {name: renamed(found.get(key), found.get(f"n_{task}")) for name, key in parts.items()}


def renamed(mean: Json | None, n: int | None) -> Json | None:
    """`{"mean", "low", "high"}` as `{"value", "low", "high", "n"}`."""
    return {"value": mean["mean"], "low": mean["low"], "high": mean["high"], "n": n} if mean else None
