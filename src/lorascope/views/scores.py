"""How far explanations can be executed: mean scores on text they never saw, beside wrong explanations, by kind."""

from typing import Any

from lorascope.explained import LEXICAL, explain_records, explainers_of
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
    """Mean scores by explainer and kind of feature.

    Returns:
        `{"available", "corpus", "explainer", "ranked", "rows": [{"explainer", "kind", "label", "n", "features",
        "explained", "reasons", "classes": {"0", "1", "2", "failed"} or None, "tasks": {"detection": {"own": {"value",
        "low", "high", "n"}, "wrong": {..}, "shuffled": {..} or None, "gain": {..}, "auroc": {..} or None} or None,
        "fuzzing": ..}}], "agreement": [{"explainer", "kind", "label", "with", "what", "n", "equal": {"value", "low",
        "high"}, "kappa": {..} or None}]}`; balanced accuracies (0.5 is chance), intervals that resample directions
        whole; `all` is without controls. A row is of one explainer, the lexical one's come first. `ranked` says whether
        any has an AUROC, and `agreement` is empty where nothing was asked twice.
    """
    labels = explainers_of(study)
    if not labels:
        return missing(study, "explanations and their scores", "lorascope explain STUDY")
    rows = [row for label in labels for row in explainer_rows(study, label)]
    configs = [record["config"] for label in labels for record in explain_records(study, label).values()]
    said: Json = {"corpus": ", ".join(sorted({config["corpus"] for config in configs})), "explainer": ", ".join(labels)}
    said |= {"ranked": any(task and task["auroc"] for row in rows for task in row["tasks"].values())}
    agreement = [line for label in labels for line in agreement_rows(study, label)]
    return dict(ready({"available": True, "rows": rows, "agreement": agreement} | said))


def current_records(study: Study, explainer: str) -> dict[str, Json]:
    """The records of an explainer's kinds that are of what the study has now."""
    return {kind: record for kind, record in explain_records(study, explainer).items() if study.holds(record)}


def explainer_rows(study: Study, explainer: str) -> list[Json]:
    """The rows of one explainer: all kinds, then each."""
    from lorascope.explain import pool_kinds  # here alone: what the stage needs takes longer to load than a page

    found = {kind: record["result"] for kind, record in current_records(study, explainer).items()}
    features = sum(result["features"] for kind, result in found.items() if kind not in CONTROLS)
    found["all"] = pool_kinds(study, explainer) | {"features": features}
    kinds = [*NAMES, *sorted(set(found) - set(NAMES))]
    return [score_row(explainer, kind, found[kind]) for kind in kinds if found.get(kind, {}).get("n")]


def agreement_rows(study: Study, explainer: str) -> list[Json]:
    """How far two passes or two judges agree about each kind; none where there was one pass."""
    lines = []
    for kind, record in current_records(study, explainer).items():
        found, config = record["result"], record["config"]
        second = second_judge(config)
        for what in (*TASKS, "classes"):
            agreement = found.get(f"{what}_agreement")
            if not agreement or not agreement["n"]:
                continue
            lines.append(
                {"explainer": explainer, "kind": kind, "label": NAMES.get(kind, kind)}
                | {"with": second or "its own second pass", "what": what, "n": agreement["n"]}
                | {name: with_bounds(agreement, name) for name in ("equal", "kappa")}
            )
    return lines


def second_judge(config: Json) -> str | None:
    """The judge of a run's second pass, where it is another: by its name, or by its address under the same name."""
    model, url = config.get("second_judge_model"), config.get("second_judge_url")
    if model:
        return f"judge:{model}"
    return f"judge:{config['judge_model']} at {url}" if url else None


def with_bounds(agreement: Json, name: str) -> Json | None:
    """A number of an agreement as `{"value", "low", "high"}`; None where it is not known."""
    if agreement[name] is None:
        return None
    low, high = agreement.get(f"{name}_interval") or (None, None)
    return {"value": agreement[name], "low": low, "high": high}


def score_row(explainer: str, kind: str, found: Json) -> Json:
    """One kind's row; its label says so where only some features were drawn (`--limit`)."""
    n, features = found["n"], found["features"]
    label = NAMES.get(kind, kind) + (f" ({n} of {features}, drawn)" if n < features else "")
    label += "" if explainer == LEXICAL else f", by {explainer}"
    kept = {key: found[key] for key in ("n", "features", "explained", "reasons")} | {"classes": found.get("classes")}
    return (
        {"explainer": explainer, "kind": kind, "label": label}
        | kept
        | {"tasks": {task: task_scores(found, task) for task in TASKS}}
    )


def task_scores(found: Json, task: str) -> Json | None:
    """Own and wrong mean score of one task and their paired difference, the shuffled feature's score and the AUROC of a
    judge's confidences where there are any; None without any score."""
    if not found.get(task):
        return None
    parts: dict[str, Any] = {"own": task, "wrong": f"{task}_wrong", "gain": f"{task}_gain"}
    parts |= {"shuffled": f"{task}_shuffled", "auroc": f"{task}_auroc"}
    return {name: renamed(found.get(key), found.get(f"n_{task}")) for name, key in parts.items()}


def renamed(mean: Json | None, n: int | None) -> Json | None:
    """`{"mean", "low", "high"}` as `{"value", "low", "high", "n"}`."""
    return {"value": mean["mean"], "low": mean["low"], "high": mean["high"], "n": n} if mean else None
