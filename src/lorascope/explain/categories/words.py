"""What a feature is about, as a weighted bag of words: from its explanations and from its strongest examples.

A bag has up to three sources that weigh the same: the rule of a lexical explanation, the words of a judge's, the tokens
of the examples. Shapes: F = features, M = entries of all bags, V = distinct words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lorascope.explain.categories.taxonomy import CLASS, SEGMENT, STOP_WORDS, split_words
from lorascope.explain.rows import Row
from lorascope.explain.rules import Condition, Rule, rule_from_json
from lorascope.store import Store

TOP = 20
"""Most strongest examples of a feature whose tokens are taken."""
BEFORE = 0.5
"""What the token before an example's own counts, against 1 of its own."""
WITHIN = 0.25
"""What a word somewhere before, or a segment, counts in a rule, against 1 of the token itself."""
Weighted = list[tuple[str, float]]


@dataclass(frozen=True)
class Bags:
    """The bags of F features as one list of entries, by feature and source; weights sum to 1 per feature.

    Entries of feature f are `starts_F[f]:starts_F[f + 1]`; `source_M` is 0 rule, 1 judge's words, 2 examples.
    """

    words: tuple[str, ...]
    starts_F: NDArray[np.int64]
    word_M: NDArray[np.int64]
    weight_M: NDArray[np.float64]
    source_M: NDArray[np.int64]

    def of(self, number: int) -> slice:
        """The entries of one feature."""
        return slice(int(self.starts_F[number]), int(self.starts_F[number + 1]))

    @property
    def feature_M(self) -> NDArray[np.int64]:
        """The feature of each entry, int64 [M]."""
        return np.repeat(np.arange(len(self.starts_F) - 1), np.diff(self.starts_F))


def make_bags(sources_F: Sequence[tuple[Weighted, Weighted, Weighted]]) -> Bags:
    """Bags from each feature's weighted words by source; an empty source is left out, its share goes to the others."""
    numbers: dict[str, int] = {}
    word: list[int] = []
    weight: list[float] = []
    source: list[int] = []
    starts = [0]
    for sources in sources_F:
        filled = [(number, entries) for number, entries in enumerate(sources) if entries]
        for number, entries in filled:
            total = sum(w for _, w in entries) * len(filled)
            word += [numbers.setdefault(text, len(numbers)) for text, _ in entries]
            weight += [w / total for _, w in entries]
            source += [number] * len(entries)
        starts.append(len(word))
    return Bags(
        tuple(numbers),
        np.array(starts, np.int64),
        np.array(word, np.int64),
        np.array(weight, np.float64),
        np.array(source, np.int64),
    )


def explanation_words(rows: Sequence[Row]) -> tuple[Weighted, Weighted]:
    """Words of the rules, and of the texts without a rule, among the explanations of one feature."""
    of_rules = [entry for row in rows if row.get("rule") for entry in rule_words(rule_from_json(row["rule"]))]
    texts = [str(row["text"]) for row in rows if row.get("text") and not row.get("rule")]
    # with a space before, as a token that starts a word
    of_texts = [(f" {word}", 1.0) for text in texts for word in split_words(text) if word not in STOP_WORDS]
    return of_rules, of_texts


def rule_words(rule: Rule) -> Weighted:
    """The tokens, classes and segments that a rule names; those of a set share its weight.

    The token itself counts 1, the one before it a half and so on, a token somewhere before it and a segment `WITHIN`.
    """
    return [entry for clause in rule for condition in clause for entry in _condition_words(condition)]


def _condition_words(condition: Condition) -> Weighted:
    if condition.kind == "segment":
        return [(SEGMENT + condition.name, WITHIN)]
    weight = 1 / (1 + condition.back) if condition.kind == "at" else WITHIN
    if condition.name:
        return [(CLASS + condition.name, weight)]
    return [(text, weight / len(condition.tokens)) for text in condition.tokens]


def example_words(table: pa.Table, store: Store, texts: Sequence[str]) -> dict[str, Weighted]:
    """The tokens of each feature's strongest examples, and those before them in the same trace, by feature.

    Args:
        table: `examples/CORPUS/KIND-examples.parquet`.
        store: the store of that corpus.
        texts: text of each token id (`vocabulary_texts`).
    """
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in ("where", "rank", "position")}
    kept = np.flatnonzero((columns["where"] == "top") & (columns["rank"] < TOP))
    trace = table.column("trace").to_numpy()[kept]
    position = columns["position"][kept]
    at = store.offsets[trace] + position
    tokens = np.asarray(store.tokens)
    found: dict[str, Weighted] = {}
    features = table.column("feature").take(pa.array(kept)).to_pylist()
    for feature, place, inside in zip(features, at, position, strict=True):
        entries = found.setdefault(feature, [])
        entries.append((texts[tokens[place]], 1.0))
        if inside > 0:
            entries.append((texts[tokens[place - 1]], BEFORE))
    return found


def one_explanation(rows: Sequence[Row]) -> list[Row]:
    """One row with a text, for explainers are not mixed: a judge's where there is one, else the lexical; or []."""
    return sorted((row for row in rows if row.get("text")), key=lambda row: row.get("rule") is not None)[:1]


def feature_text(rows: Sequence[Row], examples: Weighted) -> str:
    """What a judge is told of a feature: one explanation and the tokens on which it is strongest, by frequency.

    Not its id, whose layer and type would suggest an answer, and not two explanations: a judge's where there is one,
    else the rule in words. Empty where there is nothing to tell.
    """
    counts: dict[str, int] = {}
    for text, weight in examples:
        if weight == 1.0:
            counts[text] = counts.get(text, 0) + 1
    tokens = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{text!r} ({count})" for text, count in tokens)
    lines = [f"Explanation: {row['text']}" for row in one_explanation(rows)]
    return "\n".join([*lines, f"Strongest on: {shown}"] if shown else lines)


def sort_rows(rows: Iterable[Row]) -> Mapping[str, list[Row]]:
    """What is said in the rows of an explanations file, text and rule, by feature."""
    sorted_: dict[str, list[Row]] = {}
    for row in rows:
        sorted_.setdefault(row["feature"], []).append({"text": row.get("text"), "rule": row.get("rule")})
    return sorted_
