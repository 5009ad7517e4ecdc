"""From a store and a feature set to what explaining needs: a corpus without scalars, and where each feature fires.

Shapes: T = tokens, F = features, M = firings of all features, n = firings of one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.windows import Corpus, make_corpus
from lorascope.features import FeatureSet
from lorascope.store import Store

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Firings:
    """Ordinary tokens on which each feature fires, by feature: `at_M[starts[f]:starts[f + 1]]` with activations."""

    starts: IntArray
    at_M: NDArray[np.int64]
    activation_M: NDArray[np.float32]

    def of(self, number: int) -> tuple[IntArray, NDArray[np.float32]]:
        """Tokens [n] of one feature in the order of the corpus, and its activations [n] there."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.at_M[part], self.activation_M[part]


@dataclass(frozen=True)
class Reading:
    """A corpus as explaining reads it: `store_T` is each token's number in the store; `left_out` counts traces."""

    corpus: Corpus
    store_T: IntArray
    left_out: dict[str, int]


def trace_contents(store: Store) -> list[bytes]:
    """The token ids of each trace as bytes, for telling whether two corpora share a trace."""
    bounds = np.asarray(store.offsets)
    tokens = np.asarray(store.tokens)
    return [tokens[a:b].tobytes() for a, b in pairwise(bounds)]


def read_corpus(
    store: Store, *, max_tokens: int, rng: np.random.Generator, seen: Collection[bytes] = frozenset()
) -> Reading:
    """The corpus of a store, without traces whose tokens are in `seen`, and at most about `max_tokens` tokens of it.

    When it is longer, whole traces are drawn at random; both kinds of left-out traces are counted.
    """
    offsets = np.asarray(store.offsets, dtype=np.int64)
    contents = trace_contents(store)
    fresh = np.array([k for k, content in enumerate(contents) if content not in seen], dtype=np.int64)
    kept = rng.permutation(fresh)
    lengths = np.diff(offsets)
    within = np.cumsum(lengths[kept]) <= max_tokens
    within[:1] = True
    kept = np.sort(kept[within])
    places = [np.arange(offsets[k], offsets[k + 1]) for k in kept]
    store_T = np.concatenate([*places, np.zeros(0, dtype=np.int64)])
    corpus = make_corpus(
        np.asarray(store.tokens)[store_T].astype(np.int32),
        np.asarray(store.segments)[store_T].astype(np.uint8),
        np.asarray(store.ordinary)[store_T],
        np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64),
    )
    return Reading(
        corpus, store_T, {"also_in_training": len(contents) - len(fresh), "over_limit": len(fresh) - len(kept)}
    )


def collect_firings(features: FeatureSet, reading: Reading, levels_F: NDArray[np.float32]) -> Firings:
    """Where every feature's activation is above its level, in one pass over the store (ordinary tokens only)."""
    place = np.full(features.store.n_tokens, -1, dtype=np.int64)
    place[reading.store_T] = np.arange(len(reading.store_T))
    place[reading.store_T[~reading.corpus.ordinary_T]] = -1
    found: list[tuple[IntArray, IntArray, NDArray[np.float32]]] = []
    for start, acts_TF in features.chunks():
        here = place[start : start + len(acts_TF)]
        rows = np.flatnonzero(here >= 0)
        kept_TF = acts_TF[rows]
        row, number = np.nonzero(kept_TF > levels_F)
        found.append((number.astype(np.int32), here[rows[row]], kept_TF[row, number]))
    number_M = np.concatenate([n for n, _, _ in found]) if found else np.zeros(0, dtype=np.int32)
    at_M = np.concatenate([a for _, a, _ in found]) if found else np.zeros(0, dtype=np.int64)
    activation_M = np.concatenate([v for _, _, v in found]) if found else np.zeros(0, dtype=np.float32)
    order = np.lexsort((at_M, number_M))
    starts = np.searchsorted(number_M[order], np.arange(len(features.ids) + 1))
    return Firings(starts.astype(np.int64), at_M[order], activation_M[order])


def shift_firings(
    corpus: Corpus, at_n: IntArray, radius: int, rng: np.random.Generator
) -> tuple[IntArray, NDArray[np.int64]]:
    """Firings [n] moved along their traces, and the firing [n] that each was: where a feature without a meaning fires.

    All firings of a trace move by the same number of ordinary tokens, its last ones to its start, so that their number
    and their distances stay. They move by more than a window (two radii) where the trace is long enough.
    """
    ordinary = np.flatnonzero(corpus.ordinary_T)
    rank_n = np.searchsorted(ordinary, at_n)
    bounds = np.searchsorted(ordinary, np.stack([corpus.first_T[at_n], corpus.last_T[at_n]]))
    moved_n = rank_n.copy()
    for first, last in np.unique(bounds, axis=1).T.tolist():
        size = last - first
        least = min(2 * radius + 1, size // 2)
        here = bounds[0] == first
        moved_n[here] = first + (rank_n[here] - first + least + int(rng.integers(size - 2 * least + 1))) % size
    order_n = np.argsort(moved_n, kind="stable")
    return ordinary[moved_n[order_n]], order_n
