"""The tokens around examples with their activations, all examples of a feature in one reading.

Shape legend: T tokens of all windows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.features import FeatureSet
from lorascope.token_text import TokenTable, readable, token_texts
from lorascope.views.one_feature import MARGIN


@dataclass(frozen=True)
class Window:
    """One example: texts and activations of the tokens around it, and its place among them."""

    tokens: list[str]
    values: list[float]
    peak: int


def feature_windows(
    features: FeatureSet, table: TokenTable, column: int, rows: Sequence[Mapping[str, Any]], width: int
) -> list[Window]:
    """A window of `width` tokens on either side for each example (rows with `trace` and `position`)."""
    store = features.store
    spans = []
    for row in rows:
        first, stop = (int(x) for x in store.offsets[row["trace"] : row["trace"] + 2])
        at = first + int(row["position"])
        spans.append((first, max(first, at - width), min(stop, at + width + 1), at))
    if not spans:
        return []
    index_T = np.concatenate([np.arange(start, stop) for _, start, stop, _ in spans])
    values_T = features.encode(store.rows(index_T), np.array([column], np.intp))[:, 0] + np.float32(0)
    windows, done = [], 0
    for first, start, stop, at in spans:
        before = max(first, start - MARGIN)
        texts = token_texts(table, store.tokens[before:stop].tolist())[start - before :]
        values = values_T[done : done + stop - start].tolist()
        done += stop - start
        windows.append(Window(texts, values, at - start))
    return windows


def top_tokens(
    features: FeatureSet, names: Sequence[str], rows: Sequence[Mapping[str, Any]], count: int = 5
) -> list[str]:
    """The commonest tokens of some examples, readable: white space as it would be escaped, in quotes.

    Args:
        names: text of every vocabulary id, as from `vocabulary_texts`.
    """
    store = features.store
    ids = [int(store.tokens[int(store.offsets[row["trace"]]) + int(row["position"])]) for row in rows]
    return [readable(names[i]) for i, _ in Counter(ids).most_common(count)]
