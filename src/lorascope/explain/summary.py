"""Headline numbers from rows of explanations: means with intervals, and how many rows have none and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.rows import Row
from lorascope.features import CONTROLS, cluster_of
from lorascope.stats import bootstrap_mean
from lorascope.study import Study, read_rows


def explain_records(study: Study) -> dict[str, dict[str, Any]]:
    """The record of each kind that is explained; one each, since the corpora that it is scored on share its file."""
    stages = study.manifest["stages"]
    return {name.split(":")[2]: stages[name] for name in sorted(stages) if name.startswith("explain:")}


def pool_kinds(study: Study) -> dict[str, Any]:
    """`summarise_rows` over every kind that is explained, whichever run did it; controls stand for themselves.

    Explanations of another adapter's or autoencoder's features than the study has now are left out.
    """
    kinds = [kind for kind, record in explain_records(study).items() if kind not in CONTROLS and study.holds(record)]
    rows = [row for kind in kinds for row in read_rows(study.path / "explanations" / f"{kind}.jsonl")]
    return summarise_rows(rows, np.random.default_rng(study.manifest["seed"]))


def summarise_rows(rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any]:
    """Mean scores with intervals that resample clusters, how many features they are of, and why others have none."""
    out: dict[str, Any] = {"n": len(rows), "explained": sum(row["rule"] is not None for row in rows)}
    reasons: dict[str, int] = {}
    for row in rows:
        if row["reason"]:
            # Reasons carry numbers ("fires on 3 tokens ..."); they are counted without them.
            plain = " ".join("n" if word.isdigit() else word for word in row["reason"].split(", fewer")[0].split())
            reasons[plain] = reasons.get(plain, 0) + 1
    out["reasons"] = reasons
    for task in ("detection", "fuzzing"):
        pairs = [
            (row["scored"][task]["value"], row["scored"][f"{task}_wrong"]["value"], cluster_of(row["feature"]))
            for row in rows
            if row["scored"] and row["scored"].get(task) and row["scored"].get(f"{task}_wrong")
        ]
        own = np.array([p[0] for p in pairs])
        wrong = np.array([p[1] for p in pairs])
        out[f"n_{task}"] = len(pairs)
        out[f"{task}_counts"] = _add_counts(
            [row["scored"][task] for row in rows if row["scored"] and row["scored"][task]]
        )
        for name, values in (("", own), ("_wrong", wrong), ("_gain", own - wrong)):
            out[task + name] = _mean(values, [p[2] for p in pairs], rng)
    return out


def _mean(values: NDArray[np.float64], clusters: Sequence[str], rng: np.random.Generator) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    interval = bootstrap_mean(values, rng=rng, clusters=clusters)
    return {name: round(value, 4) for name, value in interval.as_dict("mean").items()}


def _add_counts(scores: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Windows asked about, answers that could not be read, and windows that could not be drawn as they should."""
    total = {"n": 0, "unparsed": 0}
    for score in scores:
        for name, count in ({"n": score["n"], "unparsed": score["unparsed"]} | score["counts"]).items():
            total[name] = total.get(name, 0) + count
    return total
