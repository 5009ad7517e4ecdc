"""Windows of tokens around a place: the only thing an explanation is asked about, and how they are drawn.

Shapes: T = tokens of a corpus, W = windows, S = tokens of a window (2 * radius + 1, padded with id -1 where the
trace ends), n = number of firings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.rules import PADDING

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
QUANTILES = 10
"""Parts of equal size, by activation, from which firings are drawn."""
CAPS = (1, 2, 4)
"""Most firings of one trace that are drawn; the next number, and at last any, only where others run out."""
CONSIDERED = 40
"""Times as many firings as are wanted are looked at, of more those drawn over the quantiles."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of some traces laid end to end, without any scalar.

    `first_T` and `last_T` are the bounds (last exclusive) of the trace that a token is in; `by_key` lists tokens by
    (id, segment), for finding tokens that share both.
    """

    tokens_T: NDArray[np.int32]
    segments_T: NDArray[np.uint8]
    ordinary_T: BoolArray
    first_T: IntArray
    last_T: IntArray
    by_key: IntArray
    sorted_key: IntArray

    @property
    def n_tokens(self) -> int:
        """Number of tokens T."""
        return len(self.tokens_T)


@dataclass(frozen=True)
class Windows:
    """What a scorer shows: ids and segments [W, S]; `marked_WS` is None in detection, the marked tokens in fuzzing."""

    ids_WS: NDArray[np.int32]
    segments_WS: NDArray[np.uint8]
    marked_WS: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.ids_WS)


@dataclass(frozen=True)
class Sample:
    """Drawn windows of one feature: flat token numbers [W, S] (-1 = padding), firing tokens, and what was not possible.

    `fires_T` is where it fires in the whole corpus.

    The first `n_positive` rows are around firing tokens; the feature fires nowhere in the others. `unmatched_token`
    counts negatives that should share a peak's token and could not, `unmatched_segment` those of another segment.
    """

    index_WS: IntArray
    fires_T: BoolArray
    fires_WS: BoolArray
    n_positive: int
    unmatched_token: int
    unmatched_segment: int

    @property
    def truth_W(self) -> BoolArray:
        """Which windows are positives."""
        return np.arange(len(self.index_WS)) < self.n_positive


def make_corpus(
    tokens_T: NDArray[np.int32], segments_T: NDArray[np.uint8], ordinary_T: BoolArray, offsets: IntArray
) -> Corpus:
    """A corpus from flat arrays and the trace offsets [traces + 1]."""
    lengths = np.diff(offsets)
    key_T = tokens_T.astype(np.int64) * 4 + segments_T
    by_key = np.argsort(key_T, kind="stable")
    return Corpus(
        tokens_T,
        segments_T,
        ordinary_T,
        np.repeat(offsets[:-1], lengths),
        np.repeat(offsets[1:], lengths),
        by_key,
        key_T[by_key],
    )


def window_index(corpus: Corpus, centres: IntArray, radius: int) -> IntArray:
    """Flat token numbers [W, 2 * radius + 1] around each centre, -1 outside the centre's trace."""
    index_WS = centres[:, None] + np.arange(-radius, radius + 1)
    inside_WS = (index_WS >= corpus.first_T[centres][:, None]) & (index_WS < corpus.last_T[centres][:, None])
    return np.where(inside_WS, index_WS, -1)


def show_windows(corpus: Corpus, index_WS: IntArray, marked_WS: BoolArray | None = None) -> Windows:
    """The ids and segments of windows, as a scorer may show them."""
    real_WS = index_WS >= 0
    ids_WS = np.where(real_WS, corpus.tokens_T[index_WS], PADDING).astype(np.int32)
    segments_WS = np.where(real_WS, corpus.segments_T[index_WS], 0).astype(np.uint8)
    return Windows(ids_WS, segments_WS, marked_WS)


def spread_over_quantiles(
    values_n: NDArray[np.float32], wanted: int, rng: np.random.Generator, quantiles: int = QUANTILES
) -> IntArray:
    """Numbers of up to `wanted` values, as many from each quantile of their order; sorted from large to small."""
    if len(values_n) <= wanted:
        return np.argsort(-values_n, kind="stable")
    order = np.argsort(-values_n, kind="stable")
    bounds = np.linspace(0, len(order), quantiles + 1).astype(np.int64)
    share = np.linspace(0, wanted, quantiles + 1).astype(np.int64)
    picks = [
        np.sort(rng.choice(np.arange(bounds[q], bounds[q + 1]), share[q + 1] - share[q], replace=False))
        for q in range(quantiles)
    ]
    return order[np.concatenate(picks)]


def spread_apart(
    candidates: IntArray,
    at_n: IntArray,
    trace_n: IntArray,
    *,
    wanted: int,
    apart: int,
    caps: Sequence[int],
    chosen: Sequence[int] = (),
) -> IntArray:
    """`chosen` and further candidates, up to `wanted`, in their order; as many as that whenever there are so many.

    First those are taken that lie more than `apart` tokens from all others of their trace, of one trace no more than
    the first of `caps`, then no more than the second, and so on; what is nearer only where these run out.

    Args:
        candidates: numbers of firings, none of them in `chosen`.
        at_n: flat token number of each firing.
        trace_n: something that tells its trace.
    """
    taken = list(chosen)
    places: dict[int, list[int]] = {}
    for number in taken:
        places.setdefault(int(trace_n[number]), []).append(int(at_n[number]))
    left = list(zip(candidates.tolist(), at_n[candidates].tolist(), trace_n[candidates].tolist(), strict=True))
    for cap in caps:
        passed = []
        for number, at, trace in left:
            if len(taken) == wanted:
                return np.array(taken, dtype=np.int64)
            here = places.setdefault(trace, [])
            if len(here) < cap and all(abs(at - place) > apart for place in here):
                taken.append(number)
                here.append(at)
            else:
                passed.append((number, at, trace))
        left = passed
    return np.array([*taken, *(number for number, _, _ in left)][:wanted], dtype=np.int64)


def choose_peaks(
    corpus: Corpus,
    at_n: IntArray,
    activation_n: NDArray[np.float32],
    *,
    wanted: int,
    radius: int,
    rng: np.random.Generator,
) -> IntArray:
    """Numbers of up to `wanted` firings, about as many from each activation quantile, whose windows do not overlap.

    Windows that overlap or are of one trace are hardly several pieces of evidence. So a trace gives one, two where
    there are too few traces, and so on (`CAPS`); overlapping windows are taken only where all others are used.
    """
    drawn = spread_over_quantiles(activation_n, min(len(at_n), CONSIDERED * wanted), rng)
    # Every quantile has its turn, in an order of its own each time, and within a quantile chance decides.
    mixed = rng.permutation(len(drawn))
    quantile = mixed * QUANTILES // max(1, len(drawn))
    turn = np.empty(len(drawn), dtype=np.int64)
    for q in range(QUANTILES):
        turn[quantile == q] = np.arange((quantile == q).sum())
    order = drawn[mixed[np.argsort(turn, kind="stable")]]
    caps = (*CAPS, len(order))
    return spread_apart(order, at_n, corpus.first_T[at_n], wanted=wanted, apart=2 * radius, caps=caps)


def draw_windows(
    corpus: Corpus,
    at_n: IntArray,
    activation_n: NDArray[np.float32],
    *,
    wanted: int,
    radius: int,
    rng: np.random.Generator,
) -> Sample:
    """Up to `wanted` windows around firings (`choose_peaks`), and as many in which nothing fires.

    Negatives have the segments of the positives' peaks, and every second one also the token of its positive's peak.
    `at_n` are the flat numbers of the firing tokens (all of them ordinary) and `activation_n` their activations.
    """
    peaks = at_n[choose_peaks(corpus, at_n, activation_n, wanted=wanted, radius=radius, rng=rng)]
    fires_T = np.zeros(corpus.n_tokens, dtype=np.bool_)
    fires_T[at_n] = True
    quiet_T = _quiet_tokens(corpus, fires_T, radius)
    negatives, unmatched_token, unmatched_segment = _draw_negatives(corpus, peaks, quiet_T, rng)
    index_WS = window_index(corpus, np.concatenate([peaks, negatives]), radius)
    fires_WS = fires_T[index_WS] & (index_WS >= 0)
    return Sample(index_WS, fires_T, fires_WS, len(peaks), unmatched_token, unmatched_segment)


def _quiet_tokens(corpus: Corpus, fires_T: BoolArray, radius: int) -> BoolArray:
    """Ordinary tokens in whose window nothing fires."""
    place_T = np.arange(corpus.n_tokens)
    before = np.concatenate([[0], np.cumsum(fires_T)])
    low_T = np.maximum(place_T - radius, corpus.first_T)
    high_T = np.minimum(place_T + radius + 1, corpus.last_T)
    quiet_T: BoolArray = (before[high_T] == before[low_T]) & corpus.ordinary_T
    return quiet_T


def _draw_negatives(
    corpus: Corpus, peaks: IntArray, quiet_T: BoolArray, rng: np.random.Generator
) -> tuple[IntArray, int, int]:
    """One quiet token per peak where there are enough, none twice; (tokens, unmatched by token, by segment)."""
    free_T = quiet_T.copy()
    chosen: list[IntArray] = []
    sharing = rng.permutation(len(peaks))[: len(peaks) // 2]
    keys, counts = np.unique(
        corpus.tokens_T[peaks[sharing]].astype(np.int64) * 4 + corpus.segments_T[peaks[sharing]], return_counts=True
    )
    wanted = np.bincount(corpus.segments_T[peaks], minlength=4)
    for key, count in zip(keys, counts, strict=True):
        start, end = np.searchsorted(corpus.sorted_key, [key, key + 1])
        places = corpus.by_key[start:end]
        picked = _pick(places[free_T[places]], int(count), rng)
        free_T[picked] = False
        wanted[key % 4] -= len(picked)
        chosen.append(picked)
    unmatched_token = int(counts.sum()) - sum(len(picked) for picked in chosen)
    missing = 0
    for segment in np.flatnonzero(wanted):
        picked = _pick(np.flatnonzero(free_T & (corpus.segments_T == segment)), int(wanted[segment]), rng)
        free_T[picked] = False
        missing += int(wanted[segment]) - len(picked)
        chosen.append(picked)
    others = _pick(np.flatnonzero(free_T), missing, rng) if missing else np.zeros(0, dtype=np.int64)
    return np.concatenate([*chosen, others]), unmatched_token, len(others)


def _pick(places: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    return places if len(places) <= count else np.sort(rng.choice(places, count, replace=False))
