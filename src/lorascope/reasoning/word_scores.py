"""The reasoning score: how much more a feature fires around reasoning words than in the rest of the thinking.

score = (mean activation near a word - mean in the rest) / standard deviation, over the ordinary tokens of `think`; near
is from `BEFORE` tokens before a word to `AFTER` tokens after it. The idea is that of ReasonScore (arXiv 2503.18878).

The null moves the tokens that count as near along each trace's thinking by one random number of places, end joined to
start: words keep their number and their distances and features their own course, but the two no longer meet. What
it cannot tell from a reasoning feature is one that follows the place in a trace, if the words do too. Joining the ends
costs some exactness where thinking is about as short as the stretches on which a feature stays the same.

Shape legend: T tokens of a corpus, U tokens of the thinking of traces with a word, R such traces, S shifts (the first
is none), F features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorascope.errors import BadInput
from lorascope.features import FeatureSet
from lorascope.progress import progress
from lorascope.reasoning.words import Ints, Mask, WordMarks
from lorascope.stats import FloatArray, false_discovery_rates
from lorascope.store import Store

BEFORE, AFTER = 2, 3
SLICE = 1 << 22
"""Shifted marks that exist at once, 4 bytes each."""
ROUNDING = 1e-6
"""Relative difference below which two sums of activations count as equal."""


@dataclass(frozen=True)
class Ring:
    """The thinking of every trace with a word, each bent to a ring along which its near tokens can be moved."""

    position_U: Ints
    """Place in the corpus."""
    trace_U: Ints
    """Number of the ring, 0 to R - 1."""
    begin_R: Ints
    """First of the U tokens of each ring."""
    length_R: Ints
    near_U: Mask

    def moved(self, offset_SR: Ints, part: slice) -> npt.NDArray[np.float32]:
        """1 where a token of a part of U is near after moving the near tokens by each offset, float32 [S, part]."""
        out = np.empty((len(offset_SR), part.stop - part.start), np.float32)
        for ring in range(self.trace_U[part.start], self.trace_U[part.stop - 1] + 1):
            begin, length = int(self.begin_R[ring]), int(self.length_R[ring])
            low, high = max(part.start, begin), min(part.stop, begin + length)
            twice = np.tile(self.near_U[begin : begin + length], 2)
            stretches = np.lib.stride_tricks.sliding_window_view(twice, high - low)
            first_S = (low - begin - offset_SR[:, ring]) % length
            out[:, low - part.start : high - part.start] = stretches[first_S]
        return out


@dataclass(frozen=True)
class Scores:
    """One row per feature, in the order of the feature set."""

    score_F: FloatArray
    null_mean_F: FloatArray
    null_sd_F: FloatArray
    p_F: FloatArray
    """One-sided: the share of shifts, the true place included, whose score is at least the score."""
    q_F: FloatArray
    """By Benjamini and Hochberg among these features."""
    mean_near_F: FloatArray
    mean_rest_F: FloatArray
    silent: int
    """Features with one and the same activation on all thinking: their score is 0 and their p 1."""


def near_words(store: Store, marks: WordMarks) -> Mask:
    """Tokens of the thinking from `BEFORE` before to `AFTER` after an occurrence in the same trace, bool [T]."""
    near_T = np.zeros(store.n_tokens, bool)
    trace_K = store.token_traces(marks.first_K)
    low_K = np.maximum(marks.first_K - BEFORE, store.offsets[trace_K])
    high_K = np.minimum(marks.last_K + AFTER + 1, store.offsets[trace_K + 1])
    for low, high in zip(low_K.tolist(), high_K.tolist(), strict=True):
        near_T[low:high] = True
    return near_T & marks.thinking_T


def require_thinking(store: Store, thinking_T: Mask) -> None:
    """Raise BadInput unless some trace of the corpus has thinking: without, no choice of words helps."""
    if not thinking_T.any():
        raise BadInput(
            f"No trace of {store.folder.parent.name} has any thinking, in which alone words are looked for; record a "
            "corpus of traces that think, or make a study whose --markup is that of its traces."
        )


def make_ring(store: Store, near_T: Mask, thinking_T: Mask) -> Ring:
    """The rings of a corpus.

    Raises:
        BadInput: there is no thinking, no token of it is near a word, or every one is.
    """
    require_thinking(store, thinking_T)
    count = int(near_T.sum())
    if count in (0, int(thinking_T.sum())):
        which = "No token" if count == 0 else "Every token"
        raise BadInput(
            f"{which} of the thinking of {store.folder.parent.name} is near a reasoning word; give other words with "
            "--words FILE, or record another corpus."
        )
    position_U = np.flatnonzero(thinking_T)
    trace_U = store.token_traces(position_U).astype(np.int64)
    with_word = np.unique(store.token_traces(np.flatnonzero(near_T)))
    kept = np.isin(trace_U, with_word)
    position_U, trace_U = position_U[kept], np.searchsorted(with_word, trace_U[kept])
    length_R = np.bincount(trace_U, minlength=len(with_word))
    begin_R = np.cumsum(length_R) - length_R
    return Ring(position_U, trace_U, begin_R, length_R, near_T[position_U])


def draw_offsets(ring: Ring, shifts: int, rng: np.random.Generator) -> Ints:
    """How far the near tokens of each ring are moved in each shift, int64 [1 + shifts, R]; the first row is 0."""
    offset_SR = rng.integers(0, ring.length_R, (1 + shifts, len(ring.length_R)))
    offset_SR[0] = 0
    return offset_SR


def score_features(
    features: FeatureSet, near_T: Mask, thinking_T: Mask, *, shifts: int, rng: np.random.Generator
) -> Scores:
    """Scores of all features and their null, in one reading of the corpus.

    Memory is that of [shifts, F] sums in float64 and of one chunk, whatever the corpus's length.

    Raises:
        BadInput: there is no thinking, no token of it is near a word, or every one is.
    """
    ring = make_ring(features.store, near_T, thinking_T)
    offset_SR = draw_offsets(ring, shifts, rng)
    sums_SF, total_F, square_F = shifted_sums(features, ring, offset_SR, thinking_T)
    n, near = int(thinking_T.sum()), int(near_T.sum())
    variance_F = square_F / n - (total_F / n) ** 2
    silent_F = variance_F <= ROUNDING**2 * square_F / n
    sd_F = np.sqrt(np.where(silent_F, 1.0, variance_F))
    # sums are of activations, at least 0, so that a share of one of them bounds how it was rounded
    beaten_F = (sums_SF[1:] >= sums_SF[0] * (1 - ROUNDING)).sum(axis=0)
    score_SF = (sums_SF / near - (total_F - sums_SF) / (n - near)) / sd_F
    score_SF[:, silent_F] = 0.0
    p_F = np.where(silent_F, 1.0, (1 + beaten_F) / (1 + shifts))
    null_SF = score_SF[1:]
    return Scores(
        score_SF[0],
        null_SF.mean(axis=0),
        null_SF.std(axis=0),
        p_F,
        false_discovery_rates(p_F),
        sums_SF[0] / near,
        (total_F - sums_SF[0]) / (n - near),
        int(silent_F.sum()),
    )


def shifted_sums(
    features: FeatureSet, ring: Ring, offset_SR: Ints, thinking_T: Mask
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sums of activations near words after each shift [S, F]; sums and sums of squares over all thinking [F]."""
    count = len(features.ids)
    sums_SF, total_F, square_F = np.zeros((len(offset_SR), count)), np.zeros(count), np.zeros(count)
    rows = max(1, SLICE // len(offset_SR))
    what = f"reasoning {features.kind}"
    for start, acts_TF in progress(features.chunks(), features.n_chunks, what, "chunk"):
        inside_TF = acts_TF[thinking_T[start : start + len(acts_TF)]].astype(np.float64)
        total_F += inside_TF.sum(axis=0)
        square_F += np.square(inside_TF).sum(axis=0)
        first, stop = np.searchsorted(ring.position_U, [start, start + len(acts_TF)]).tolist()
        for low in range(first, stop, rows):
            part = slice(low, min(low + rows, stop))
            sums_SF += ring.moved(offset_SR, part) @ acts_TF[ring.position_U[part] - start]
    return sums_SF, total_F, square_F
