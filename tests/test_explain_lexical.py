"""The lexical explainer on planted features: it finds them, and finds nothing in shuffled ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lorascope.explain.candidates import make_candidates
from lorascope.explain.lexical import find_rule
from lorascope.explain.rules import Rule, describe_rule, execute_rule
from lorascope.explain.scoring import (
    Explanation,
    execute_answers,
    pose_detection,
    pose_fuzzing,
    score_answers,
)
from lorascope.explain.windows import Corpus, draw_windows, show_windows
from planted_text import make_words, planted_firings, random_corpus

VOCABULARY, _ = make_words()
TRAIN, HELDOUT = random_corpus(0, 200), random_corpus(1, 200)
CANDIDATES = make_candidates(TRAIN, VOCABULARY)
PLANTED = ["a token", "a token after another", "a number while thinking", "anything after Wait"]


def learn(fires: NDArray[np.bool_], wanted: int = 256) -> Rule:
    at = np.flatnonzero(fires)
    rng = np.random.default_rng(0)
    return find_rule(
        draw_windows(TRAIN, at, np.ones(len(at), np.float32), wanted=wanted, radius=8, rng=rng), CANDIDATES
    )


def heldout_scores(rule: Rule, fires: NDArray[np.bool_], corpus: Corpus = HELDOUT) -> tuple[float, float]:
    at = np.flatnonzero(fires)
    rng = np.random.default_rng(0)
    sample = draw_windows(corpus, at, np.ones(len(at), np.float32), wanted=60, radius=8, rng=rng)
    explanation, answer = Explanation("f", "", rule), execute_answers(VOCABULARY)
    detection, fuzzing = (
        score_answers(quiz, answer(explanation, quiz.windows), rng).value
        for quiz in (pose_detection(corpus, sample), pose_fuzzing(corpus, sample, rng))
    )
    return detection, fuzzing


@pytest.mark.parametrize("name", PLANTED)
def test_planted_features_are_found(name: str) -> None:
    rule = learn(planted_firings(TRAIN)[name])
    detection, fuzzing = heldout_scores(rule, planted_firings(HELDOUT)[name])
    assert detection >= 0.95, describe_rule(rule)
    assert fuzzing >= 0.95, describe_rule(rule)


def test_rules_of_planted_features_read_as_planted() -> None:
    planted = planted_firings(TRAIN)
    assert describe_rule(learn(planted["a token"])) == "fires on ' is'"
    assert describe_rule(learn(planted["a token after another"])) == "fires on ' is' after ' answer'"
    assert describe_rule(learn(planted["a number while thinking"])) == "fires on a number while thinking"
    assert describe_rule(learn(planted["anything after Wait"])) == "fires on any token after 'Wait'"


def test_shuffled_features_score_at_chance() -> None:
    """Firings shifted within the corpus: rules are learned from chance and must not hold on other text."""
    rng = np.random.default_rng(0)
    scores = []
    for name in PLANTED:
        train, heldout = planted_firings(TRAIN)[name], planted_firings(HELDOUT)[name]
        for _ in range(8):
            moved = np.roll(train, rng.integers(200, 9000)) & TRAIN.ordinary_T
            target = np.roll(heldout, rng.integers(200, 9000)) & HELDOUT.ordinary_T
            scores.append(heldout_scores(learn(moved, 128), target))
    detection, fuzzing = np.mean(scores, axis=0)
    assert 0.45 <= detection <= 0.55
    assert 0.45 <= fuzzing <= 0.55


def test_a_union_of_tokens_becomes_a_set() -> None:
    _, words = make_words()
    wanted = [words[" word3"], words[" word8"], words[" word21"]]
    rule = learn(np.isin(TRAIN.tokens_T, wanted) & TRAIN.ordinary_T)
    assert len(rule) == 1
    assert set(rule[0][0].tokens) == {" word3", " word8", " word21"}


def test_candidates_hold_exactly_where_their_conditions_do() -> None:
    """The table that the search counts on agrees with executing each condition as a rule on the whole trace."""
    corpus = random_corpus(5, 2, 50)
    candidates = make_candidates(corpus, VOCABULARY, least=1)
    none = len(candidates.conditions)
    assert int(candidates.table_TK.max()) <= none
    table = np.zeros((corpus.n_tokens, none + 1), dtype=np.bool_)
    table[np.arange(corpus.n_tokens)[:, None], candidates.table_TK] = True
    for first, last in {(int(a), int(b)) for a, b in zip(corpus.first_T, corpus.last_T, strict=True)}:
        windows = show_windows(corpus, np.arange(first, last)[None, :])
        for number in range(0, none, 3):
            rule = ((candidates.conditions[number],),)
            true = execute_rule(rule, windows.ids_WS, windows.segments_WS, VOCABULARY)[0]
            assert np.array_equal(true, table[first:last, number]), candidates.conditions[number]


def test_search_counts_what_the_scorer_will_see() -> None:
    """Conditions that look past the window's left edge do not count: training and scoring see the same."""
    fires = planted_firings(TRAIN)["anything after Wait"]
    rule = learn(fires)
    at = np.flatnonzero(fires)
    sample = draw_windows(TRAIN, at, np.ones(len(at), np.float32), wanted=50, radius=0, rng=np.random.default_rng(0))
    assert rule
    # Windows of one token hold nothing before it: the planted rule cannot be seen, let alone found.
    found = find_rule(sample, CANDIDATES)
    assert all(condition.back == 0 for clause in found for condition in clause)


def test_no_firings_no_rule() -> None:
    at = np.zeros(0, dtype=np.int64)
    sample = draw_windows(TRAIN, at, np.zeros(0, np.float32), wanted=5, radius=2, rng=np.random.default_rng(0))
    assert len(sample.index_WS) == 0
    assert find_rule(sample, CANDIDATES) == ()
