"""Scores: known answers, unread answers, intervals, and whom a wrong explanation is borrowed from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lorascope.explain.firings import shift_firings
from lorascope.explain.rules import PADDING, Condition, execute_rule
from lorascope.explain.scoring import (
    Explanation,
    Quiz,
    compare_passes,
    execute_answers,
    find_lenders,
    pose_detection,
    pose_fuzzing,
    rank_answers,
    score_answers,
)
from lorascope.explain.summary import pool_agreement
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


def test_perfect_scores_have_an_interval() -> None:
    """Of 40 and 40 right ones: 1 - √2/2 · z²/(40 + z²), and for ranks as many pairs of Wilson's, 40/(40 + z²)."""
    quiz = small_quiz([True] * 40 + [False] * 40)
    rng = np.random.default_rng(0)
    score = score_answers(quiz, [True] * 40 + [False] * 40, rng)
    assert (score.value, round(score.low, 4), score.high) == (1, 0.938, 1)
    worst = score_answers(quiz, [False] * 40 + [True] * 40, rng)
    assert (worst.value, worst.low, round(worst.high, 4)) == (0, 0, 0.062)
    ranks = rank_answers(quiz, [0.9] * 40 + [0.1] * 40, rng)
    assert (ranks.value, round(ranks.low, 4), ranks.high) == (1, 0.9124, 1)
    one_sided = score_answers(quiz, [True] * 80, rng)
    assert 0.45 < one_sided.low < one_sided.value == 0.5 < one_sided.high < 0.55


def test_intervals_near_one_cover_the_truth() -> None:
    """Answers right with probability 0.98, 40 on each side: most samples have a side without a wrong one."""
    rng = np.random.default_rng(0)
    quiz = small_quiz([True] * 40 + [False] * 40)
    covered = 0
    for _ in range(400):
        score = score_answers(quiz, ((rng.random(80) < 0.98) == quiz.truth_W).tolist(), rng, draws=400)
        covered += score.low <= 0.98 <= score.high
    assert covered / 400 >= 0.93


def lenders_of(features: list[str], groups: list[str], texts: list[str], seed: int) -> dict[str, str | None]:
    """`find_lenders` by name."""
    lenders = find_lenders(features, groups, texts, seed).tolist()
    return {feature: None if k < 0 else features[k] for feature, k in zip(features, lenders, strict=True)}


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_wrong_explanations_never_come_from_the_same_direction(n: int) -> None:
    features = [f"L{k}.gate{sign}" for k in range(n) for sign in "+-"]
    groups = [feature[:-1] for feature in features]
    for seed in range(20):
        lenders = lenders_of(features, groups, features, seed)
        assert set(lenders) == set(features)
        assert all(lender is not None and lender[:-1] != feature[:-1] for feature, lender in lenders.items())
        assert Counter(lenders.values()).most_common(1)[0][1] <= 3

        assert lenders == lenders_of(features, groups, features, seed)


def test_a_later_explanation_changes_few_of_the_borrowed_ones() -> None:
    features = [f"sae.{k}" for k in range(200)]
    before = lenders_of(features[:-1], features[:-1], features[:-1], 0)
    after = lenders_of(features, features, features, 0)
    assert sum(before[feature] != after[feature] for feature in before) == 1
    assert lenders_of(features, features, features, 1) != after
    assert sorted(map(str, after.values())) == sorted(features)


def test_the_same_explanation_is_no_control() -> None:
    lenders = lenders_of(["a", "b", "c"], ["a", "b", "c"], ["a digit", "a digit", "a name"], 0)
    assert lenders["a"] == lenders["b"] == "c"
    assert lenders_of(["a", "b"], ["a", "b"], ["a digit", "a digit"], 0) == {"a": None, "b": None}


def test_borrowing_with_one_large_group_or_alone() -> None:
    lenders = lenders_of(["a+", "a-", "b+"], ["a", "a", "b"], ["1", "2", "3"], 0)
    assert lenders["a+"] == lenders["a-"] == "b+"
    assert lenders_of(["a+", "a-"], ["a", "a"], ["1", "2"], 0) == {"a+": None, "a-": None}
    assert lenders_of([], [], [], 0) == {}


def test_confidences_are_yes_above_a_half() -> None:
    quiz = small_quiz([True] * 4 + [False] * 4)
    score = score_answers(quiz, [0.6, 0.5, 1.0, None, 0.5, 0.4, 0.6, 0.0], np.random.default_rng(0))
    assert (score.value, score.unparsed) == ((2 / 4 + 3 / 4) / 2, 1)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    quiz = small_quiz([True] * 3 + [False] * 2)
    rng = np.random.default_rng(0)
    assert rank_answers(quiz, [0.9, 0.8, 0.7, 0.1, 0.2], rng).value == 1
    assert rank_answers(quiz, [0.1, 0.2, 0.0, 0.5, 0.6], rng).value == 0
    assert rank_answers(quiz, [0.5] * 5, rng).value == 0.5
    # Pairs with an answer that was not read are lost: 1 + 1/2 of 6 are left.
    assert rank_answers(quiz, [0.9, 0.5, None, 0.5, None], rng).value == 1.5 / 6
    assert rank_answers(quiz, [None] * 5, rng).value == 0


def test_interval_of_the_auroc_is_the_bootstraps() -> None:
    rng = np.random.default_rng(3)
    truth = np.arange(90) < 40
    answers = np.clip(rng.normal(0.4 + 0.2 * truth, 0.25), 0, 1)
    found = rank_answers(small_quiz(truth.tolist()), answers.tolist(), np.random.default_rng(0), draws=4_000)
    own = []
    for _ in range(2_000):
        p, n = rng.choice(answers[truth], 40), rng.choice(answers[~truth], 50)
        own.append((p[:, None] > n).mean() + 0.5 * (p[:, None] == n).mean())
    assert abs(found.low - np.quantile(own, 0.025)) < 0.012
    assert abs(found.high - np.quantile(own, 0.975)) < 0.012


def test_kappa_of_a_known_table() -> None:
    """The example of Cohen's kappa in textbooks: 20 and 15 alike of 50, kappa 0.4."""
    once = [1.0] * 25 + [0.0] * 25
    twice = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    found = compare_passes([*once, None, 1.0], [*twice, 1.0, None])
    assert found == {"n": 50, "equal": 0.7, "kappa": 0.4, "table": [[15, 10], [5, 20]]}
    assert compare_passes([1.0], [1.0])["kappa"] is None
    assert compare_passes([None], [1.0]) == {"n": 0, "equal": None, "kappa": None, "table": [[0, 0], [0, 0]]}


def test_agreement_has_intervals_over_directions() -> None:
    """Ten directions, both polarities of five agree throughout and of five nowhere: a binomial of 10 by hand."""
    alike, unlike = np.array([[25, 0], [0, 25]]), np.array([[0, 25], [25, 0]])
    tables = [(alike if k % 2 else unlike, f"L{k}.q") for k in range(10) for _ in "+-"]
    found = pool_agreement(tables, np.random.default_rng(0))
    assert (found["n"], found["equal"], found["kappa"]) == (1000, 0.5, 0)
    assert found["equal_interval"] == [0.2, 0.8]
    assert found["kappa_interval"] == [-0.6, 0.6]
    one = pool_agreement([(np.array([[0, 0], [0, 5]]), "a")], np.random.default_rng(0))
    assert (one["equal"], one["equal_interval"], one["kappa"], one["kappa_interval"]) == (1, None, None, None)


def test_shuffled_firings_keep_their_number_and_leave_their_windows() -> None:
    at = np.flatnonzero(planted_firings(CORPUS)["a token"])
    moved, was = shift_firings(CORPUS, at, 8, np.random.default_rng(0))
    assert len(set(moved.tolist())) == len(at)
    assert CORPUS.ordinary_T[moved].all()
    assert sorted(was.tolist()) == list(range(len(at)))
    assert np.array_equal(CORPUS.first_T[moved], CORPUS.first_T[at[was]])
    assert (np.diff(moved) > 0).all()
    ordinary = np.cumsum(CORPUS.ordinary_T)
    for first in np.unique(CORPUS.first_T[at]):
        here = CORPUS.first_T[moved] == first
        size = ordinary[CORPUS.last_T[first] - 1] - (ordinary[first - 1] if first else 0)
        shift = set(((ordinary[moved[here]] - ordinary[at[was[here]]]) % size).tolist())
        assert len(shift) == 1
        assert 17 <= shift.pop() <= size - 17
    again, _ = shift_firings(CORPUS, at, 8, np.random.default_rng(0))
    assert np.array_equal(moved, again)
    alone, _ = shift_firings(CORPUS, at[:1], 500, np.random.default_rng(0))
    assert len(alone) == 1


def test_the_true_rule_is_at_chance_on_shuffled_firings() -> None:
    values = []
    for seed, name in enumerate(planted_firings(CORPUS)):
        at = np.flatnonzero(planted_firings(CORPUS)[name])
        rng = np.random.default_rng(seed)
        moved, _ = shift_firings(CORPUS, at, 8, rng)
        sample = draw_windows(CORPUS, moved, np.ones(len(moved), np.float32), wanted=60, radius=8, rng=rng)
        rules = {
            "a token": (Condition("at", 0, (" is",)),),
            "a token after another": (Condition("at", 0, (" is",)), Condition("at", 1, (" answer",))),
            "a number while thinking": (Condition("at", 0, name="number"), Condition("segment", name="think")),
            "anything after Wait": (Condition("at", 1, ("Wait",)),),
        }
        for quiz in (pose_detection(CORPUS, sample), pose_fuzzing(CORPUS, sample, rng)):
            values.append(rule_score(quiz, *rules[name]))
    assert 0.45 <= np.mean(values) <= 0.55
