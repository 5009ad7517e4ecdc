"""Drawing windows: positives over quantiles, negatives that are quiet and matched, nothing lost in silence."""

from __future__ import annotations

import numpy as np

from lorascope.explain.windows import draw_windows, make_corpus, show_windows, spread_over_quantiles, window_index
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
    assert np.histogram(values[picks], bins=5, range=(0, 1000))[0].tolist() == [10] * 5
    assert len(set(picks.tolist())) == 50
    assert spread_over_quantiles(values[:3], 50, np.random.default_rng(0)).tolist() == [2, 1, 0]


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
