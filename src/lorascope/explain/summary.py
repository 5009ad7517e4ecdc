"""Headline numbers from rows of explanations: means with intervals, and how many rows have none and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.prompts import WORDS
from lorascope.explain.rows import Row
from lorascope.explain.scoring import agreement_of, equal_and_kappa
from lorascope.explained import LEXICAL, current_rows
from lorascope.features import CONTROLS, cluster_of
from lorascope.stats import bootstrap_mean, percentile_bounds
from lorascope.study import Study, read_rows

DRAWS = 2_000


def record_name(corpus: str, kind: str, label: str) -> str:
    """The name of a run's record: `explain:CORPUS:KIND`, and for judges `explain:CORPUS:KIND:judge:MODEL`."""
    return f"explain:{corpus}:{kind}" + ("" if label == LEXICAL else f":{label}")


def explain_records(study: Study, explainer: str = LEXICAL) -> dict[str, dict[str, Any]]:
    """The record of each kind that an explainer explained; one each, as all its corpora share a file."""
    stages = study.manifest["stages"]
    parts = {name: name.split(":", 3) for name in sorted(stages) if name.startswith("explain:")}
    return {part[2]: stages[name] for name, part in parts.items() if (part[3:] or [LEXICAL]) == [explainer]}


def explainers_of(study: Study) -> list[str]:
    """Labels of the explainers that have a record, the lexical one first."""
    names = [name.split(":", 3) for name in study.manifest["stages"] if name.startswith("explain:")]
    return sorted(
        {part[3] if len(part) > 3 else LEXICAL for part in names}, key=lambda label: (label != LEXICAL, label)
    )


def pool_kinds(study: Study, explainer: str = LEXICAL) -> dict[str, Any]:
    """`summarise_rows` over every kind that one explainer explained, whichever run; controls stand for themselves.

    Explanations of another adapter's or autoencoder's features than the study has now are left out.
    """
    kinds = [kind for kind in explain_records(study, explainer) if kind not in CONTROLS]
    rows = [row for kind in kinds for row in current_rows(study, kind, rows_of(study, kind, explainer))]
    return summarise_rows(rows, np.random.default_rng(study.manifest["seed"]))


def rows_of(study: Study, kind: str, explainer: str = LEXICAL) -> list[Row]:
    """The rows of one explainer about one kind of features."""
    rows = read_rows(study.path / "explanations" / f"{kind}.jsonl")
    return [row for row in rows if row["explainer"] == explainer]


def summarise_rows(rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any]:
    """Mean scores with intervals that resample clusters, how many features they are of, and why others have none."""
    out: dict[str, Any] = {"n": len(rows), "explained": sum(row.get("text") is not None for row in rows)}
    reasons: dict[str, int] = {}
    for row in rows:
        if row["reason"]:
            # Reasons carry numbers ("fires on 3 tokens ..."); they are counted without them.
            plain = " ".join("n" if word.isdigit() else word for word in row["reason"].split(", fewer")[0].split())
            reasons[plain] = reasons.get(plain, 0) + 1
    out["reasons"] = reasons
    if any("class" in row for row in rows):
        out |= count_classes(rows, rng)
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
    for task in ("detection", "fuzzing"):
        out |= _further_scores(rows, task, rng)
    return out


def _further_scores(rows: Sequence[Row], task: str, rng: np.random.Generator) -> dict[str, Any]:
    """Means that not every explainer or row has: the shuffled feature's, AUROCs, agreement of two passes, failures."""
    scored = [(row["scored"], cluster_of(row["feature"])) for row in rows if row["scored"]]
    found: dict[str, list[tuple[float, str]]] = {}
    tables: list[tuple[NDArray[np.int64], str]] = []
    failures: dict[str, int] = {}
    for scores, cluster in scored:
        for ending in ("", "_wrong", "_shuffled"):
            part = scores.get(task + ending)
            if not part:
                continue
            if ending == "_shuffled":
                found.setdefault(f"{task}_shuffled", []).append((part["value"], cluster))
            if "auroc" in part:
                found.setdefault(f"{task}{ending}_auroc", []).append((part["auroc"]["value"], cluster))
            for reason, count in part.get("failures", {}).items():
                failures[reason] = failures.get(reason, 0) + count
        if agreement := scores.get("agreement", {}).get(task):
            tables.append((np.array(agreement["table"]), cluster))
    out: dict[str, Any] = {
        name: _mean(np.array([value for value, _ in pairs]), [cluster for _, cluster in pairs], rng)
        for name, pairs in found.items()
    }
    if tables:
        out[f"{task}_agreement"] = pool_agreement(tables, rng)
    return out | ({f"{task}_failures": failures} if failures else {})


def pool_agreement(tables: Sequence[tuple[NDArray[np.int64], str]], rng: np.random.Generator) -> dict[str, Any]:
    """`agreement_of` all features' tables together, with `equal_interval` and `kappa_interval`, `[low, high]` or None.

    Args:
        tables: each feature's table and cluster; clusters are resampled whole, for answers about one feature depend
            on each other.
    """
    total = np.sum([table for table, _ in tables], axis=0)
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(cluster for _, cluster in tables))}
    table_CKK = np.zeros((len(numbers), *total.shape), dtype=np.int64)
    for table, cluster in tables:
        table_CKK[numbers[cluster]] += table
    many = len(numbers)
    drawn = [rng.multinomial(many, np.full(many, 1 / many)) @ table_CKK.reshape(many, -1) for _ in range(DRAWS)]
    found = agreement_of(total)
    for name, values_D in zip(
        ("equal", "kappa"), equal_and_kappa(np.reshape(drawn, (DRAWS, *total.shape))), strict=True
    ):
        bounds = percentile_bounds(values_D)
        known = found[name] is not None and np.isfinite(bounds).all()
        found[f"{name}_interval"] = [round(bound, 4) for bound in bounds] if known else None
    return found


def count_classes(rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any]:
    """How many features a judge put into each class or failed on, explanations of more words than it was asked for, and
    the agreement of two passes."""
    classes = dict.fromkeys(("0", "1", "2", "failed"), 0)
    tables: list[tuple[NDArray[np.int64], str]] = []
    for row in rows:
        if not row.get("class"):
            continue
        first, second = row["class"]["class"], (row.get("class_again") or {}).get("class")
        classes["failed" if first is None else str(first)] += 1
        if first is not None and second is not None:
            table = np.zeros((3, 3), dtype=np.int64)
            table[first, second] = 1
            tables.append((table, cluster_of(row["feature"])))
    counts = {"classes": classes, "longer_than_asked": sum(len((row["text"] or "").split()) > WORDS for row in rows)}
    return counts | ({"classes_agreement": pool_agreement(tables, rng)} if tables else {})


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
