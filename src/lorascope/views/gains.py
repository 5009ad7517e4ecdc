"""Accuracy and recovery, in numbers and in words that never say more than the numbers do."""

from lorascope.study import Study
from lorascope.views.reading import Json, json_file, missing, ready

MODELS = {"base": "base model", "adapter": "adapter", "full": "full finetune"}
OTHERS = {
    "base-3shot": "base, 3-shot",
    "control-answers": "control: answers only",
    "control-shuffled": "control: shuffled traces",
    "adapter-no-attn": "adapter, attention off",
    "adapter-no-mlp": "adapter, MLP off",
}


def recovery_view(study: Study) -> Json:
    """Accuracies, gains and recovery per benchmark, with sentences made from them.

    Returns:
        `{"available", "rows": [{"benchmark", "n", "models": [{"name", "label", "accuracy", "low", "high", "gain":
        {"value", "low", "high"} or None}], "recovery", "recovery_reason", "measured": {..} or None}], "sentences":
        [..], "facts": [{"model", "label", "n", "accuracy", "unparsed", "unfinished", "mean_tokens", "perplexity"}],
        "base_prompt", "settings"}`; the first row is over all benchmarks of the last run, which facts are about, too;
        rows of earlier runs stand last. Accuracies are shares.
    """
    found = json_file(study, "eval/recovery.json")
    if not found:
        return missing(study, "accuracy and recovery", "lorascope evaluate STUDY --on TASK")
    details = json_file(study, "eval/details.json") or {}
    rows = [recovery_row(row) for row in found]
    facts = [row | {"label": label_of(row["model"])} for row in details.get("models", [])]
    view = {
        "available": True,
        "rows": rows,
        "sentences": [*sentences(rows[0]), *earlier(rows)],
        "facts": facts,
        "base_prompt": details.get("base_prompt"),
        "settings": details.get("settings") or {},
    }
    return dict(ready(view))


def label_of(name: str) -> str:
    """A model's name for readers."""
    return MODELS.get(name) or OTHERS.get(name) or name.replace("adapter-no-", "adapter without ")


def recovery_row(row: Json) -> Json:
    """One row of `recovery.json` with all models in one list, in a fixed order."""
    accuracies = {name: row.get(name) for name in MODELS} | (row.get("others") or {})
    order = [*MODELS, *OTHERS]
    names = sorted(accuracies, key=lambda name: (order.index(name) if name in order else len(order), name))
    gains = row.get("gains") or {}
    models = [
        {"name": name, "label": label_of(name), "gain": gains.get(name)} | accuracies[name]
        for name in names
        if accuracies[name]
    ]
    kept = ("benchmark", "n", "recovery", "recovery_reason", "measured")
    return {key: row.get(key) for key in kept} | {"models": models}


def earlier(rows: list[Json]) -> list[str]:
    """Which benchmarks the first row does not cover, since earlier runs measured them."""
    sets = [(row["measured"] or {}).get("set") for row in rows]
    names = [row["benchmark"] for row, own in zip(rows, sets, strict=True) if own != sets[0]]
    return [f"Not among these problems, but measured alike by earlier runs: {joined(names)}."] if names else []


def sentences(row: Json) -> list[str]:
    """What the numbers of one row say, in words; a gain is called one only if its interval lies above 0."""
    models = {model["name"]: model for model in row["models"]}
    shown = [
        f"the {model['label']} {share(model['accuracy'])} ({share(model['low'])} to {share(model['high'])})"
        for name in MODELS
        if (model := models.get(name))
    ]
    said = [f"Share of {row['n']} held-out problems answered correctly: {joined(shown)}."] if shown else []
    for name in ("adapter", "full"):
        gain = models.get(name, {}).get("gain")
        if gain and gain["value"] is not None:
            said.append(gain_sentence(MODELS[name], gain))
    said.append(recovery_sentence(row))
    return said


def gain_sentence(label: str, gain: Json) -> str:
    """Whether a model answers more problems than base."""
    points = f"{signed(gain['value'])} points (95% interval {signed(gain['low'])} to {signed(gain['high'])})"
    if gain["low"] > 0:
        return f"The {label} answers more of them than the base model: {points}."
    if gain["high"] < 0:
        return f"The {label} answers fewer of them than the base model: {points}."
    return f"The {label} differs from the base model by {points}; the interval includes 0, so no change is shown."


def recovery_sentence(row: Json) -> str:
    """The recovery with what it means, or why there is none."""
    value, reason = row["recovery"], row["recovery_reason"]
    if value is None:
        return f"Recovery is not given: {reason or 'it was not computed'}."
    bounds = f"95% interval {share(value['low'])} to {share(value['high'])}"
    text = f"The adapter recovers {share(value['value'])} of the full finetune's gain ({bounds})"
    if value["low"] <= 0:
        text += "; the interval includes 0"
    return f"{text}. {reason[0].upper()}{reason[1:]}." if reason else f"{text}."


def share(value: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * value:.0f}%"


def signed(value: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value:+.0f}".replace("-", "−")


def joined(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
