"""A study with statistics and explanations of known scores for several kinds of features; no model, no store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.study import Study, atomic_write_text, write_json
from tiny_store import make_study

FAILED = "fires on 3 tokens of the training corpus, fewer than 8"


def explained_row(feature: str, score: float | None, **changes: Any) -> dict[str, Any]:
    """A row as `explain` writes it: detection as given, fuzzing 0.1 more, wrong explanations at 0.5."""
    if score is None:
        row = {"feature": feature, "explainer": "lexical", "text": None, "rule": None, "scored": None, "reason": FAILED}
    else:
        values = {"detection": score, "detection_wrong": 0.5, "fuzzing": score + 0.1, "fuzzing_wrong": 0.5}
        scored: dict[str, Any] = {name: {"value": value, "n": 80} for name, value in values.items()}
        row = {"feature": feature, "explainer": "lexical", "text": "fires on ' is'", "rule": None, "scored": scored}
        row["reason"] = None
    return row | {"corpus": "heldout", "key": feature} | changes


def add_kind(study: Study, kind: str, rows: Sequence[dict[str, Any]], extra: Sequence[str] = ()) -> None:
    """Statistics of the rows' features (and of `extra` ones, not explained), and the rows themselves."""
    names = list(dict.fromkeys([*(row["feature"] for row in rows), *extra]))
    table = {
        "feature": names,
        "level": [1.0] * len(names),
        "density": [0.01] * len(names),
        "n_firing": [0 if i == 1 else 40 for i in range(len(names))],
        "max": [3.0] * len(names),
        "p99": [2.5] * len(names),
        "mean": [2.0] * len(names),
        "share_prompt": [0.2] * len(names),
        "share_think": [0.5] * len(names),
        "share_answer": [0.3] * len(names),
    }
    path = study.path / "examples" / "heldout" / f"{kind}-stats.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    write_json(study.path / "examples" / "levels.json", {})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write_text(study.path / "explanations" / f"{kind}.jsonl", lines)


def make_compared_study(path: Path, layers: int = 6, seed: int = 0) -> Study:
    """All six kinds; directions 0.15 above random ones, as good as neurons; every tenth feature has no score."""
    study = make_study(path)
    study.update_manifest(layers=layers)
    rng = np.random.default_rng(seed)
    addresses = [f"L{layer}.{type_}" for layer in range(layers) for type_ in ("q", "o", "gate", "down")]

    def rows(names: Sequence[str], mean: float) -> list[dict[str, Any]]:
        # what both polarities share, and what each has of its own
        shared = {name.rstrip("+-"): rng.normal(0, 0.04) for name in names}
        scores = [mean + shared[name.rstrip("+-")] + rng.normal(0, 0.03) for name in names]
        return [
            explained_row(name, None if i % 10 == 9 else float(score))
            for i, (name, score) in enumerate(zip(names, scores, strict=True))
        ]

    def sides(prefix: str, stems: Sequence[str]) -> list[str]:
        return [f"{prefix}{stem}{sign}" for stem in stems for sign in "+-"]

    both = [name + end for name in addresses for end in ("", "#difference")]
    neurons = [f"L{i % layers}.{i}" for i in range(len(addresses))]
    add_kind(study, "direction", rows(sides("", addresses), 0.75))
    add_kind(study, "latent", rows([f"sae.{i}" for i in range(100)], 0.8))
    add_kind(study, "neuron", rows(sides("neuron.", neurons), 0.75))
    add_kind(study, "random", rows(sides("random.", both), 0.6))
    add_kind(study, "untrained", rows(sides("untrained.", addresses), 0.6))
    add_kind(study, "base", rows(sides("base.", addresses), 0.7))
    return study


def row_of(result: dict[str, Any], kind: str) -> dict[str, Any]:
    (row,) = [row for row in result["rows"] if row["kind"] == kind]
    return row


def classed(number: int) -> dict[str, Any]:
    """What a judge's row holds of its class."""
    return {"class": {"class": number, "reason": "one thing", "failure": None}}


def the_test(result: dict[str, Any], second: str, measure: str, first: str = "direction") -> dict[str, Any]:
    (found,) = [t for t in result["tests"] if (t["first"], t["second"], t["measure"]) == (first, second, measure)]
    return found
