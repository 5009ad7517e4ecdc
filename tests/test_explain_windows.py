"""Drawing windows: positives over quantiles, negatives that are quiet and matched, nothing lost in silence."""

from __future__ import annotations

import numpy as np

from lorascope.explain.windows import (
    choose_peaks,
    draw_windows,
    make_corpus,
    show_windows,
    spread_over_quantiles,
    window_index,
)
from planted_text import planted_firings, random_corpus

CORPUS = random_corpus(0, 200)


def test_windows_end_with_their_trace() -> None:
    offsets = np.array([0, 4, 9])
    corpus = make_corpus(np.arange(9, dtype=np.int32), np.full(9, 2, np.uint8), np.ones(9, dtype=np.bool_), offsets)
    index = window_index(corpus, np.array([3, 4, 6]), 2)
    assert index.tolist() == [[1, 2, 3, -1, -1], [-1, -1, 4, 5, 6], [4, 5, 6, 7, 8]]
    shown = show_windows(corpus, index)
    assert shown.ids_WS.tolist() == index.tolist()
    assert shown.segments_WS[0].tolist() == [2, 2, 2, 0, 0]


def test_positives_come_from_every_quantile() -> None:
    values = np.arange(1000, dtype=np.float32)
    picks = spread_over_quantiles(values, 50, np.random.default_rng(0))
    assert np.histogram(values[picks], bins=10, range=(0, 1000))[0].tolist() == [5] * 10
    assert len(set(picks.tolist())) == 50
    assert spread_over_quantiles(values[:3], 50, np.random.default_rng(0)).tolist() == [2, 1, 0]


def peaks_of(fires: list[int], values: np.ndarray, wanted: int, seed: int = 0) -> np.ndarray:
    """Peaks among firings at the same places of every trace, in ten traces of 200 tokens: [traces, places]."""
    n = 10 * 200
    offsets = np.arange(0, n + 1, 200)
    corpus = make_corpus(np.arange(n, dtype=np.int32), np.full(n, 2, np.uint8), np.ones(n, dtype=np.bool_), offsets)
    at = (np.array(fires) + offsets[:-1, None]).ravel()
    rng = np.random.default_rng(seed)
    return at[choose_peaks(corpus, at, values, wanted=wanted, radius=8, rng=rng)]


def test_peaks_are_spread_over_traces_and_apart_as_long_as_there_are_enough() -> None:
    """Each of ten traces has a run of 41 firings, in which there is room for two windows of 17 wherever one is."""
    fires = list(range(50, 91))
    values = np.random.default_rng(0).random(410).astype(np.float32)
    for seed in range(20):
        ten, twenty, sixty = (peaks_of(fires, values, wanted, seed) for wanted in (10, 20, 60))
        assert sorted(ten // 200) == list(range(10))
        assert np.bincount(twenty // 200).tolist() == [2] * 10
        gaps = np.diff(np.sort(twenty))[::2]  # between the two of a trace
        assert (gaps >= 17).all()
        assert len(set(sixty.tolist())) == 60  # there is no room, and still as many as are wanted
    every = peaks_of(fires, values, 1000)
    assert sorted(every.tolist()) == [200 * trace + place for trace in range(10) for place in fires]


def test_peaks_are_as_many_of_every_quantile_where_nothing_is_near() -> None:
    fires = list(range(0, 200, 20))
    values = np.random.default_rng(1).permutation(100).astype(np.float32)
    assert np.array_equal(peaks_of(fires, values, 100) % 20, np.zeros(100))
    of_value = dict(zip((np.array(fires) + 200 * np.arange(10)[:, None]).ravel().tolist(), values, strict=True))
    picked = [of_value[at] for at in peaks_of(fires, values, 100).tolist()]
    assert np.histogram(picked, bins=10, range=(0, 100))[0].tolist() == [10] * 10
    rounds = [of_value[at] // 10 for at in peaks_of(fires, values, 5, seed=3).tolist()]
    assert len(set(rounds)) == 5  # five of five different quantiles


def test_negatives_are_quiet_matched_and_half_share_the_peak() -> None:
    fires = planted_firings(CORPUS)["a token after another"]
    at = np.flatnonzero(fires)
    sample = draw_windows(CORPUS, at, np.ones(len(at), np.float32), wanted=20, radius=8, rng=np.random.default_rng(1))
    assert (sample.n_positive, len(sample.index_WS)) == (20, 40)
    centres = sample.index_WS[:, 8]
    assert fires[centres[:20]].all()
    assert not sample.fires_WS[20:].any()
    assert sample.fires_WS[:20, 8].all()
    assert not fires[sample.index_WS[20:][sample.index_WS[20:] >= 0]].any()
    assert np.array_equal(np.sort(CORPUS.segments_T[centres[:20]]), np.sort(CORPUS.segments_T[centres[20:]]))
    same_token = CORPUS.tokens_T[centres[20:]] == CORPUS.tokens_T[centres[0]]
    assert same_token.sum() >= 10
    assert (sample.unmatched_token, sample.unmatched_segment) == (0, 0)
    assert len(set(centres.tolist())) == 40
    assert CORPUS.ordinary_T[centres].all()


def test_what_cannot_be_matched_is_counted() -> None:
    # It fires on every " is": no quiet token shares its peak. It fires nowhere but in the answer.
    fires = planted_firings(CORPUS)["a token"]
    at = np.flatnonzero(fires)
    sample = draw_windows(CORPUS, at, np.ones(len(at), np.float32), wanted=20, radius=8, rng=np.random.default_rng(1))
    assert sample.unmatched_token == 10
    everywhere = np.flatnonzero(CORPUS.ordinary_T)
    sample = draw_windows(
        CORPUS, everywhere, np.ones(len(everywhere), np.float32), wanted=20, radius=8, rng=np.random.default_rng(1)
    )
    assert (sample.n_positive, len(sample.index_WS)) == (20, 20)
    answers = np.flatnonzero(CORPUS.segments_T == 3)
    sample = draw_windows(
        CORPUS, answers, np.ones(len(answers), np.float32), wanted=20, radius=2, rng=np.random.default_rng(1)
    )
    assert sample.unmatched_segment == 20


def test_the_same_seed_draws_the_same() -> None:
    at = np.flatnonzero(planted_firings(CORPUS)["a number while thinking"])
    ones = np.ones(len(at), np.float32)
    one, two, other = (
        draw_windows(CORPUS, at, ones, wanted=9, radius=3, rng=np.random.default_rng(s)).index_WS for s in (5, 5, 6)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
