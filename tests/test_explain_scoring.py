"""Scores: known answers, unread answers, intervals, and whom a wrong explanation is borrowed from."""

from __future__ import annotations

import numpy as np
import pytest

from lorascope.explain.rules import PADDING, Condition, execute_rule
from lorascope.explain.scoring import (
    Explanation,
    Quiz,
    borrow_explanations,
    execute_answers,
    pose_detection,
    pose_fuzzing,
    score_answers,
)
from lorascope.explain.windows import draw_windows, show_windows
from planted_text import make_words, planted_firings, random_corpus

CORPUS = random_corpus(3, 120)
VOCABULARY, _ = make_words()


def quizzes(name: str) -> tuple[Quiz, Quiz]:
    at = np.flatnonzero(planted_firings(CORPUS)[name])
    rng = np.random.default_rng(0)
    sample = draw_windows(CORPUS, at, np.ones(len(at), np.float32), wanted=30, radius=8, rng=rng)
    return pose_detection(CORPUS, sample), pose_fuzzing(CORPUS, sample, rng)


def rule_score(quiz: Quiz, *conditions: Condition) -> float:
    explanation = Explanation("L0.gate+", "", (conditions,))
    answers = execute_answers(VOCABULARY)(explanation, quiz.windows)
    return score_answers(quiz, answers, np.random.default_rng(0)).value


def test_the_true_rule_scores_one_and_an_absurd_one_a_half() -> None:
    true = (Condition("at", 0, (" is",)), Condition("at", 1, (" answer",)))
    for quiz in quizzes("a token after another"):
        assert rule_score(quiz, *true) == 1
        assert rule_score(quiz, Condition("at", 0, ("no such text",))) == 0.5
    detection, fuzzing = quizzes("a token after another")
    # Every second negative has " is" at its centre: the token alone cannot tell the windows apart.
    assert rule_score(detection, Condition("at", 0, (" is",))) <= 0.75
    assert rule_score(fuzzing, Condition("at", 0, (" is",))) >= 0.9


def test_fuzzing_marks_as_many_others_around_the_centre() -> None:
    _, fuzzing = quizzes("a number while thinking")
    marked, shown = fuzzing.windows.marked_WS, (fuzzing.windows.ids_WS, fuzzing.windows.segments_WS)
    assert marked is not None
    half = int(fuzzing.truth_W.sum())
    assert half == 30
    assert marked[:, 8].all()
    true = (Condition("at", 0, name="number"), Condition("segment", name="think"))
    assert not np.asarray(marked[half:] & execute_rule((true,), *shown, VOCABULARY)[half:]).any()
    assert not (marked & (shown[0] == PADDING)).any()
    assert (marked[half:].sum(axis=1) <= marked[:half].sum(axis=1)).all()
    assert (marked[half:].sum(axis=1) == marked[:half].sum(axis=1)).mean() > 0.8


def test_windows_carry_no_truth() -> None:
    detection, _ = quizzes("a token")
    assert set(vars(detection.windows)) == {"ids_WS", "segments_WS", "marked_WS"}
    assert detection.windows.marked_WS is None


def small_quiz(truth: list[bool]) -> Quiz:
    return Quiz(show_windows(CORPUS, np.zeros((len(truth), 1), dtype=np.int64)), np.array(truth), {})


def test_balanced_accuracy_and_unread_answers() -> None:
    quiz = small_quiz([True] * 2 + [False] * 8)
    rng = np.random.default_rng(0)
    assert score_answers(quiz, [True] * 10, rng).value == 0.5
    assert score_answers(quiz, [True] * 2 + [False] * 8, rng).value == 1
    score = score_answers(quiz, [True, None] + [None] * 4 + [False] * 4, rng)
    assert (score.value, score.unparsed, score.n_positive, score.n_negative) == (0.5, 5, 2, 8)
    assert score.as_dict()["n"] == 10
    with pytest.raises(ValueError, match="answers to 10 windows"):
        score_answers(quiz, [True], rng)


def test_interval_is_the_bootstraps() -> None:
    quiz = small_quiz([True] * 40 + [False] * 60)
    answers = [True] * 30 + [False] * 10 + [False] * 45 + [True] * 15
    score = score_answers(quiz, answers, np.random.default_rng(0), draws=20_000)
    assert score.value == 0.75
    rng = np.random.default_rng(1)
    own = [
        (rng.choice([1] * 30 + [0] * 10, 40).mean() + rng.choice([1] * 45 + [0] * 15, 60).mean()) / 2
        for _ in range(4_000)
    ]
    assert abs(score.low - np.quantile(own, 0.025)) < 0.01
    assert abs(score.high - np.quantile(own, 0.975)) < 0.01


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_wrong_explanations_never_come_from_the_same_direction(n: int) -> None:
    features = [f"L{k}.gate{sign}" for k in range(n) for sign in "+-"]
    groups = [feature[:-1] for feature in features]
    for seed in range(20):
        lenders = borrow_explanations(features, groups, np.random.default_rng(seed))
        assert set(lenders) == set(features)
        assert all(lender is not None and lender[:-1] != feature[:-1] for feature, lender in lenders.items())
        assert len(set(lenders.values())) == len(features)
        assert lenders == borrow_explanations(features, groups, np.random.default_rng(seed))


def test_borrowing_with_one_large_group_or_alone() -> None:
    lenders = borrow_explanations(["a+", "a-", "b+"], ["a", "a", "b"], np.random.default_rng(0))
    assert lenders["a+"] == lenders["a-"] == "b+"
    assert borrow_explanations(["a+", "a-"], ["a", "a"], np.random.default_rng(0)) == {"a+": None, "a-": None}
    assert borrow_explanations([], [], np.random.default_rng(0)) == {}
