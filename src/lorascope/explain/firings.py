"""From a store and a feature set to what explaining needs: a corpus without scalars, and where each feature fires.

Shapes: T = tokens, F = features, M = firings of a run, n = firings of one feature.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.windows import Corpus, make_corpus
from lorascope.features import FeatureSet
from lorascope.store import Store

IntArray = NDArray[np.int64]
FIRING = np.dtype([("at", "<u4"), ("activation", "<f4")])
HELD = 1 << 18
"""Firings in memory at most, so about 15 MB while they are sorted; of more, all go to a file."""


class Firings:
    """Ordinary tokens on which each feature fires, whatever their number in bounded memory.

    They come in runs, each of a part of the corpus and sorted by feature. A single run is in memory; several are in a
    temporary file, 8 bytes a firing, which is gone when this is closed or the process ends, and in memory are 4 bytes
    for each feature and run. Safe to read from several threads.
    """

    def __init__(self, n_features: int, folder: Path) -> None:
        """Nothing fires yet; a file, should one be needed, is made in `folder`."""
        self._n_features, self._folder = n_features, folder
        self._starts_RF: list[NDArray[np.uint32]] = []
        self._bytes_R = [0]
        self._only: NDArray[Any] = np.zeros(0, FIRING)
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def add(self, number_M: NDArray[np.int32], at_M: IntArray, activation_M: NDArray[np.float32]) -> None:
        """One run: features, tokens (later ones than before) and activations, in the order of the tokens."""
        order = np.argsort(number_M, kind="stable")
        run = np.empty(len(order), FIRING)
        run["at"], run["activation"] = at_M[order], activation_M[order]
        if not self._starts_RF:
            self._only = run
        else:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (open until `close`)
                self._file.write(self._only.tobytes())
                self._only = self._only[:0].copy()
            self._file.write(run.tobytes())
        self._bytes_R.append(self._bytes_R[-1] + run.nbytes)
        counts = np.bincount(number_M, minlength=self._n_features)
        self._starts_RF.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32))

    def of(self, number: int) -> tuple[IntArray, NDArray[np.float32]]:
        """Tokens [n] of one feature in the order of the corpus, and its activations [n] there."""
        parts = [self._only[:0]]
        for place, starts_F in zip(self._bytes_R[:-1], self._starts_RF, strict=True):
            first, stop = starts_F[number : number + 2].tolist()
            if self._file is None:
                parts.append(self._only[first:stop])
            elif first < stop:
                parts.append(self._read(place + first * FIRING.itemsize, stop - first))
        found = np.concatenate(parts)
        return found["at"].astype(np.int64), np.ascontiguousarray(found["activation"])

    def _read(self, place: int, count: int) -> NDArray[Any]:
        assert self._file is not None
        with self._lock:
            self._file.seek(place)
            return np.frombuffer(self._file.read(count * FIRING.itemsize), FIRING)

    def close(self) -> None:
        """Remove the file, if there is one."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Reading:
    """A corpus as explaining reads it: `store_T` is each token's number in the store; `left_out` counts traces."""

    corpus: Corpus
    store_T: IntArray
    left_out: dict[str, int]


def trace_contents(store: Store) -> list[bytes]:
    """A hash of the token ids of each trace, for telling whether two corpora share a trace."""
    return [hashlib.blake2b(store.tokens[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(store.offsets)]


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


def collect_firings(
    features: FeatureSet, reading: Reading, levels_F: NDArray[np.float32], folder: Path, held: int = HELD
) -> Firings:
    """Where every feature's activation is above its level, in one pass over the store (ordinary tokens only).

    Args:
        folder: for the temporary file of more than `held` firings.
    """
    firings = Firings(len(features.ids), folder)
    waiting = [(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    count = 0
    for start, acts_TF in features.chunks():
        first, stop = np.searchsorted(reading.store_T, [start, start + len(acts_TF)])
        here = np.arange(first, stop)[reading.corpus.ordinary_T[first:stop]]
        kept_TF = acts_TF[reading.store_T[here] - start]
        row, number = np.nonzero(kept_TF > levels_F)
        if count and count + len(row) > held:
            firings.add(*map(np.concatenate, zip(*waiting, strict=True)))
            waiting, count = [], 0
        waiting.append((number.astype(np.int32), here[row], kept_TF[row, number]))
        count += len(row)
    firings.add(*map(np.concatenate, zip(*waiting, strict=True)))
    return firings


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
