"""What kinds of features are compared by: the numbers of each feature that one explainer was asked about.

Shape legend: n features, M measures, D draws.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.differences import Clustered, bootstrap_means, cluster_values
from lorascope.errors import RunFailed
from lorascope.explained import LEXICAL, explain_records, plain_reason
from lorascope.features import cluster_of, source_of
from lorascope.stats import FloatArray
from lorascope.study import Study, read_json

Json = dict[str, Any]
METHOD = 2
"""Stands in the result: raise it when what is tested or scored changes, and `compare` runs again on old studies."""
CHANCE = 0.5
TASKS = ("detection", "fuzzing")
WHOSE = {"own": "", "wrong": "_wrong", "shuffled": "_shuffled"}
"""Whose explanation is tried on a feature, or that on whose firings, and how the names of those scores end."""
ASKED_AGAIN = "requests to the judge failed; they are asked again by the next explain"
"""Why a feature with such requests has no score."""
SEGMENTS = ("prompt", "think", "answer")
SHARES = tuple(f"share_{name}" for name in SEGMENTS)
CLASSES = ("0", "1", "2", "none")
SCORES = {
    "score": "detection",
    "wrong": "detection_wrong",
    "shuffled": "detection_shuffled",
    "gain": "detection_gain",
    "auroc": "detection_auroc",
    "fuzzing": "fuzzing",
    "fuzzing_wrong": "fuzzing_wrong",
    "fuzzing_shuffled": "fuzzing_shuffled",
    "fuzzing_gain": "fuzzing_gain",
    "fuzzing_auroc": "fuzzing_auroc",
}
"""A row's mean scores, and where a feature's score is in its explanation's row (a gain: less the wrong one's; AUROCs,
which only judges have, are inside the score)."""
MEASURES = (*SCORES, "score_all", "scored_share", *(f"class_{c}" for c in CLASSES), "density", *SEGMENTS, "reasoning")


@dataclass(frozen=True)
class Learned:
    """From how much of the training corpus a kind's explanations were learned, and what makes it more."""

    ordinary: int
    read: int
    """Tokens, template tokens and sinks with them."""
    cut: bool
    """Whether more is recorded than `explain --max-tokens` let in."""
    record: str
    explain: str

    def as_much_as(self, other: "Learned") -> str:
        """The first command towards as much text as another kind's."""
        return f"{self.explain} --max-tokens {other.read}" if self.cut else self.record


@dataclass(frozen=True)
class Said:
    """What a row says of one feature beside its numbers."""

    explained: bool
    reason: str | None
    """Why it has no score; None: it has one."""
    to_retry: bool
    """Requests about it failed, and the next `explain` sends them again."""
    answers: dict[str, list[int]]
    """By whose explanation (`own`, `wrong`, `shuffled`), how many answers its scores rest on and how many of them were
    not read: [n, n]."""


@dataclass(frozen=True)
class Cell:
    """Features of one kind, or those of them in one group (a layer third, a type)."""

    explainer: str
    kind: str
    group: str | None
    ids: list[str]
    said: list[Said]
    size: int
    """Features of the kind, explained or not."""
    learned: Learned | None
    """None where the kind's training recording is not there."""
    values_nM: FloatArray

    @cached_property
    def clustered(self) -> Clustered:
        """Values by direction."""
        return cluster_values(self.values_nM, [cluster_of(name) for name in self.ids])

    def draws(self, many: int, seed: int) -> FloatArray:
        """Bootstrap draws [D, M]; they depend on the cell alone, so that another kind changes nothing."""
        name = f"{self.explainer} {self.kind} {self.group}".encode()
        return bootstrap_means(self.clustered, np.random.default_rng([seed, *name]), many)


def files_of(corpus: str, kind: str) -> list[str]:
    """What is known of a kind: statistics, explanations, reasoning scores."""
    return [
        f"examples/{corpus}/{kind}-stats.parquet",
        f"explanations/{kind}.jsonl",
        f"reasoning/{corpus}/{kind}.parquet",
    ]


def read_kind(study: Study, corpus: str, kind: str, explained: Iterable[Json]) -> tuple[list[Cell], set[str]]:
    """A kind's features that were explained for a corpus, one cell per explainer, and whose explanations there are.

    Rows are looked at once and not kept.
    """
    stats_file, _, reasoning_file = (study.path / name for name in files_of(corpus, kind))
    stats = {row["feature"]: row for row in table_rows(stats_file, ("feature", "density", "n_firing", *SHARES))}
    # Scores of features that the study no longer has are left out.
    reasoned = table_rows(reasoning_file, ("feature", "score"))
    reasoned = reasoned if study.is_current(f"reasoning:{corpus}:{kind}") else []
    reasoning = {row["feature"]: row["score"] for row in reasoned}
    explainers: set[str] = set()
    by_explainer: dict[str, dict[str, tuple[FloatArray, Said]]] = {}
    for row in explained:
        name = row["feature"]
        explainers.add(row["explainer"])
        if name in stats:
            values = np.array(measure(row, stats[name], reasoning.get(name)))
            by_explainer.setdefault(row["explainer"], {})[name] = values, said_of(row)
    cells = []
    for explainer, found in by_explainer.items():
        values_nM = np.array([values for values, _ in found.values()])
        classes = [MEASURES.index(f"class_{name}") for name in CLASSES]
        if not (values_nM[:, MEASURES.index("class_none")] == 0).any():
            values_nM[:, classes] = np.nan  # nobody was asked for classes
        said = [of_feature for _, of_feature in found.values()]
        cells.append(
            Cell(
                explainer,
                kind,
                None,
                list(found),
                said,
                len(stats),
                learned_from(study, corpus, kind, explainer),
                values_nM,
            )
        )
    return cells, explainers


def learned_from(study: Study, corpus: str, kind: str, explainer: str) -> Learned | None:
    """What an explainer learned a kind's explanations from; about, where it drew whole traces of a longer recording."""
    source = source_of(kind)
    index = study.path / "scalars" / "train" / source / "index.json"
    if not index.is_file():
        return None
    counts = read_json(index)["counts"]
    record = explain_records(study, explainer).get(kind) or {}
    most = (record.get("config") or {}).get("max_tokens") or counts["tokens"]
    read = min(counts["tokens"], most)
    return Learned(
        round(counts["ordinary"] * read / max(1, counts["tokens"])),
        read,
        read < counts["tokens"],
        f"lorascope record {study.path} --source {source}",
        explain_command(study, corpus, kind, explainer),
    )


def explain_command(study: Study, corpus: str, kind: str, explainer: str) -> str:
    """The command by which an explainer explains a kind."""
    judge = "" if explainer == LEXICAL else f" --explainer judge --judge-model {explainer.partition(':')[2]} ..."
    return f"lorascope explain {study.path} --corpus {corpus} --kinds {kind}{judge}"


def table_rows(path: Path, columns: Sequence[str]) -> list[Json]:
    """Some columns of a Parquet file as dicts, none when it does not exist.

    Raises:
        RunFailed: the file is damaged, or has no such columns.
    """
    if not path.is_file():
        return []
    try:
        rows: list[Json] = pq.read_table(path, columns=list(columns)).select(list(columns)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunFailed(f"{path} is damaged ({error}); remove it and run its stage again.") from error
    return rows


def class_of(row: Json) -> str | None:
    """The class that a judge gave, `0`, `1` or `2`: a row's `"class": {"class", "reason", "failure"}`."""
    text = str((row.get("class") or {}).get("class"))
    return text if text in ("0", "1", "2") else None


def is_waiting(row: Json) -> bool:
    """Whether a row has no detection score only because requests failed that are to be sent again."""
    return bool(row.get("retry")) and not (row["scored"] or {}).get("detection")


def said_of(row: Json) -> Said:
    """What a row says beside its numbers."""
    scored = row["scored"] or {}
    if is_waiting(row):
        return Said(row["text"] is not None, ASKED_AGAIN, True, {})
    reason = None if scored.get("detection") else plain_reason(row.get("reason") or "no score")
    return Said(row["text"] is not None, reason, False, count_answers(scored))


def count_answers(scored: Json) -> dict[str, list[int]]:
    """Of one feature's scores, by whose explanation: how many answers they rest on, and how many were not read."""
    parts = {whose: [scored.get(task + ending) or {} for task in TASKS] for whose, ending in WHOSE.items()}
    return {
        whose: [sum(part.get(name) or 0 for part in found) for name in ("n", "unparsed")]
        for whose, found in parts.items()
    }


def measure(row: Json, stat: Json, reasoning: float | None) -> list[float]:
    """A feature's number for each of `MEASURES`, NaN where it has none.

    One whose requests failed, to be sent again, has no score of these yet, good or bad: an outage is not the feature's.
    """
    waiting, scored = is_waiting(row), row["scored"] or {}
    found = {name: (scored.get(name) or {}).get("value", np.nan) for name in SCORES.values()}
    for task in TASKS:
        found[f"{task}_auroc"] = ((scored.get(task) or {}).get("auroc") or {}).get("value", np.nan)
        found[f"{task}_gain"] = found[task] - found[f"{task}_wrong"]
    known = bool(np.isfinite(found["detection"]))
    given = class_of(row) or "none"
    classes = [np.nan if row.get("retry") and given == "none" else float(given == name) for name in CLASSES]
    shares = [stat[name] if stat["n_firing"] else np.nan for name in SHARES]
    return [
        *(found[name] for name in SCORES.values()),
        found["detection"] if known or waiting else CHANCE,
        np.nan if waiting else float(known),
        *classes,
        stat["density"],
        *shares,
        np.nan if reasoning is None else reasoning,
    ]
