"""Training curves: every run whose metrics are in `train/`, as series for a chart."""

import math
from collections.abc import Sequence
from typing import Any

from lorascope.study import Study
from lorascope.views.reading import Json, json_lines, missing, ready

LABELS = {
    "adapter": "rank-1 adapter",
    "full": "full finetune",
    "answers": "control: answers only",
    "shuffled": "control: shuffled traces",
}
SMOOTHING = 24
"""The smoothed loss is an exponential mean that remembers about the n / SMOOTHING last of n steps, 2 to 16."""


def training_curves(study: Study) -> Json:
    """Losses of every training run.

    Returns:
        `{"available", "runs": [{"name", "label", "main", "steps": [..], "loss": [..], "smoothed": [..], "lr": [..],
        "heldout": [[step, loss], ..], "first_heldout", "last_heldout", "best_heldout", "tokens", "seconds"}]}`;
        losses are mean cross-entropies in nats per supervised token. `main` is False for runs that were only
        tried (other learning rates).
    """
    folder = study.path / "train"
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    runs = [run_of(file.stem, json_lines(study, f"train/{file.name}")) for file in files]
    runs = [run for run in runs if run["steps"] or run["heldout"]]
    if not runs:
        return missing(study, "training curves", "lorascope train STUDY")
    order = list(LABELS)
    runs.sort(key=lambda r: (not r["main"], order.index(r["name"]) if r["name"] in order else len(order), r["name"]))
    return {"available": True, "runs": ready(runs)}


def run_of(name: str, rows: Sequence[Json]) -> Json:
    """One run's series from the rows of its metrics file."""
    stepped = [row for row in rows if "loss" in row]
    heldout = [[row["step"], row["heldout_loss"]] for row in rows if row.get("heldout_loss") is not None]
    losses = [float(row["loss"]) for row in stepped]
    held = [loss for _, loss in heldout]
    return {
        "name": name,
        "label": LABELS.get(name, name),
        "main": name in LABELS,
        "steps": [row["step"] for row in stepped],
        "loss": losses,
        "smoothed": smoothed(losses),
        "lr": [row.get("lr") for row in stepped],
        "heldout": heldout,
        "first_heldout": held[0] if held else None,
        "last_heldout": held[-1] if held else None,
        "best_heldout": min(held) if held else None,
        "tokens": total(stepped, "tokens"),
        "seconds": total(stepped, "seconds"),
    }


def total(rows: list[Json], key: str) -> float:
    """Sum of a key over the rows that have it."""
    return sum(row[key] for row in rows if row.get(key) is not None)


def smoothed(values: list[float]) -> list[Any]:
    """Exponential mean, corrected for its start; values that are not finite are passed over."""
    out: list[Any] = []
    mean = weight = 0.0
    keep = math.exp(-1 / min(16.0, max(2.0, len(values) / SMOOTHING)))
    for value in values:
        if math.isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        out.append(mean / weight if weight else None)
    return out
