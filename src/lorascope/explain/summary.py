"""Headline numbers from rows of explanations: means with intervals, and how many rows have none and why."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.rows import Row
from lorascope.explain.scoring import agreement_of, equal_and_kappa
from lorascope.explained import LEXICAL, WORDS, current_rows, explain_records, plain_reason
from lorascope.features import CONTROLS, cluster_of
from lorascope.stats import bootstrap_mean, percentile_bounds
from lorascope.study import Study, stream_rows

DRAWS = 2_000


def record_name(corpus: str, kind: str, label: str) -> str:
    """The name of a run's record: `explain:CORPUS:KIND`, and for judges `explain:CORPUS:KIND:judge:MODEL`."""
    return f"explain:{corpus}:{kind}" + ("" if label == LEXICAL else f":{label}")


def pool_kinds(study: Study, explainer: str = LEXICAL) -> dict[str, Any]:
    """`summarise_rows` over every kind that one explainer explained, whichever run; controls stand for themselves.

    Explanations of another adapter's or autoencoder's features than the study has now are left out.
    """
    kinds = [kind for kind in explain_records(study, explainer) if kind not in CONTROLS]
    rows = (row for kind in kinds for row in current_rows(study, kind, rows_of(study, kind, explainer)))
    return summarise_rows(rows, np.random.default_rng(study.manifest["seed"]))


def rows_of(study: Study, kind: str, explainer: str = LEXICAL) -> Iterator[Row]:
    """The rows of one explainer about one kind of features."""
    rows = stream_rows(study.path / "explanations" / f"{kind}.jsonl")
    return (row for row in rows if row["explainer"] == explainer)


class Numbers:
    """One number for each of many features, with the feature's cluster; 12 bytes each."""

    def __init__(self) -> None:
        """None yet."""
        self.values, self.clusters = array("d"), array("i")

    def add(self, value: float, cluster: int) -> None:
        """One more feature's."""
        self.values.append(value)
        self.clusters.append(cluster)

    def mean(self, rng: np.random.Generator) -> dict[str, float | None] | None:
        """`{"mean", "low", "high"}`, resampling clusters; None of nothing, and None as bounds of a single cluster."""
        if not self.values:
            return None
        return bootstrap_mean(np.array(self.values), rng=rng, clusters=self.clusters).rounded(4, "mean")


class TaskSummary:
    """What the rows say of detection, or of fuzzing."""

    def __init__(self, task: str) -> None:
        """No row yet."""
        self.task = task
        self.beside_wrong = {name: Numbers() for name in (task, f"{task}_wrong", f"{task}_gain")}
        self.further: dict[str, Numbers] = {}
        self.tables: list[tuple[NDArray[np.int64], int]] = []
        self.failures: Counter[str] = Counter()
        self.counts: Counter[str] = Counter({"n": 0, "unparsed": 0})

    def add(self, scored: dict[str, Any], cluster: int) -> None:
        """The scores of one row: those beside a wrong explanation's, and what not every explainer or row has (the
        shuffled feature's, AUROCs, agreement of two passes, failures)."""
        own, wrong = (scored.get(name) for name in (self.task, f"{self.task}_wrong"))
        if own:
            self.counts.update({"n": own["n"], "unparsed": own["unparsed"]} | own["counts"])
        if own and wrong:
            numbers = (own["value"], wrong["value"], own["value"] - wrong["value"])
            for one, number in zip(self.beside_wrong.values(), numbers, strict=True):
                one.add(number, cluster)
        for ending in ("", "_wrong", "_shuffled"):
            self.failures.update(scored.get("unfinished", {}).get(self.task + ending, {}))
            part = scored.get(self.task + ending)
            if not part:
                continue
            if ending == "_shuffled":
                self.further.setdefault(f"{self.task}_shuffled", Numbers()).add(part["value"], cluster)
            if "auroc" in part:
                name = f"{self.task}{ending}_auroc"
                self.further.setdefault(name, Numbers()).add(part["auroc"]["value"], cluster)
            self.failures.update(part.get("failures", {}))
        if agreement := scored.get("agreement", {}).get(self.task):
            self.tables.append((np.array(agreement["table"]), cluster))


def summarise_rows(rows: Iterable[Row], rng: np.random.Generator) -> dict[str, Any]:
    """Mean scores with intervals that resample clusters, how many features they are of, and why others have none.

    Rows are looked at once and not kept.
    """
    out: dict[str, Any] = {"n": 0, "explained": 0}
    reasons: Counter[str] = Counter()
    classes: ClassCounts | None = None
    tasks = [TaskSummary("detection"), TaskSummary("fuzzing")]
    clusters: dict[str, int] = {}
    for row in rows:
        cluster = clusters.setdefault(cluster_of(row["feature"]), len(clusters))
        out["n"] += 1
        out["explained"] += row.get("text") is not None
        if row["reason"]:
            reasons[plain_reason(row["reason"])] += 1
        if "class" in row:
            classes = classes or ClassCounts()
            classes.add(row, cluster)
        for task in tasks:
            task.add(row["scored"] or {}, cluster)
    out["reasons"] = dict(reasons)
    if classes:
        out |= classes.as_dict(rng)
    for task in tasks:
        out |= {f"n_{task.task}": len(task.beside_wrong[task.task].values), f"{task.task}_counts": dict(task.counts)}
        out |= {name: numbers.mean(rng) for name, numbers in task.beside_wrong.items()}
    for task in tasks:
        out |= {name: numbers.mean(rng) for name, numbers in task.further.items()}
        if task.tables:
            out[f"{task.task}_agreement"] = pool_agreement(task.tables, rng)
        if task.failures:
            out[f"{task.task}_failures"] = dict(task.failures)
    return out


def pool_agreement(tables: Sequence[tuple[NDArray[np.int64], Hashable]], rng: np.random.Generator) -> dict[str, Any]:
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


class ClassCounts:
    """How many features a judge put into each class or failed on, explanations of more words than it was asked for, and
    the agreement of two passes."""

    def __init__(self) -> None:
        """No row yet."""
        self.classes = dict.fromkeys(("0", "1", "2", "failed"), 0)
        self.longer = 0
        self.tables: list[tuple[NDArray[np.int64], int]] = []

    def add(self, row: Row, cluster: int) -> None:
        """One more row."""
        self.longer += len((row["text"] or "").split()) > WORDS
        if not row.get("class"):
            return
        first, second = row["class"]["class"], (row.get("class_again") or {}).get("class")
        self.classes["failed" if first is None else str(first)] += 1
        if first is not None and second is not None:
            table = np.zeros((3, 3), dtype=np.int64)
            table[first, second] = 1
            self.tables.append((table, cluster))

    def as_dict(self, rng: np.random.Generator) -> dict[str, Any]:
        """`{"classes", "longer_than_asked"}`, and `"classes_agreement"` of two passes."""
        counts = {"classes": self.classes, "longer_than_asked": self.longer}
        return counts | ({"classes_agreement": pool_agreement(self.tables, rng)} if self.tables else {})
