"""Detection and fuzzing: does an explanation tell where a feature fires, on text that the explainer never saw?

A scorer shows windows to something that answers, and counts. Whatever answers (a rule executed, a judge asked) is one
function `answer(explanation, windows) -> [True | False | None]`: in detection "does the feature fire somewhere in this
window?", in fuzzing (when tokens are marked) "are the marked tokens those on which it fires?". In place of True and
False a confidence from 0 to 1 may stand, above 0.5 for yes. None is an answer that could not be read; it counts as
wrong. The windows carry no truth.

Shapes: W = windows, S = tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.rules import Rule, Vocabulary, execute_rule
from lorascope.explain.windows import Corpus, Sample, Windows, show_windows, window_index
from lorascope.stats import Interval, percentile_bounds, wilson_bounds
from lorascope.study import digest

BoolArray = NDArray[np.bool_]
DRAWS = 2_000
LEAST_SCORING = 5
"""Fewest windows of each side on which a score is given."""


@dataclass(frozen=True)
class Explanation:
    """What is said of a feature: words, and for the lexical explainer the rule they describe."""

    feature: str
    text: str
    rule: Rule | None = None


Answer = Callable[[Explanation, Windows], Sequence[float | None]]


@dataclass(frozen=True)
class Quiz:
    """Windows with the right answers [W], and what could not be drawn as it should (name -> count)."""

    windows: Windows
    truth_W: BoolArray
    counts: dict[str, int]


@dataclass(frozen=True)
class Score:
    """Balanced accuracy with its interval (positives and negatives resampled apart) and what it rests on."""

    value: float
    low: float
    high: float
    n_positive: int
    n_negative: int
    unparsed: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `n` is the number of windows asked about."""
        return {
            "value": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "n": self.n_positive + self.n_negative,
            "n_positive": self.n_positive,
            "n_negative": self.n_negative,
            "unparsed": self.unparsed,
        }


def pose_detection(corpus: Corpus, sample: Sample) -> Quiz:
    """The sample's windows, unmarked: true where the feature fires on any token of the window."""
    counts = {
        "unmatched_token": sample.unmatched_token,
        "unmatched_segment": sample.unmatched_segment,
        "missing_negatives": 2 * sample.n_positive - len(sample.index_WS),
    }
    return Quiz(show_windows(corpus, sample.index_WS), sample.truth_W, counts)


def pose_fuzzing(corpus: Corpus, sample: Sample, rng: np.random.Generator) -> Quiz:
    """Windows around firings with the firing tokens marked, and windows beside them with as many other tokens marked.

    The negative of a window has at its centre another ordinary token of that window on which the feature does not
    fire; it and further such tokens around it are marked, as many as fire in the positive. So the place in the window
    tells nothing: a marked token has as much text before it in positives as in negatives. Where there are fewer such
    tokens, all are marked; a window without any has no negative, and is counted.
    """
    index_WS = sample.index_WS[: sample.n_positive]
    fires_WS = sample.fires_WS[: sample.n_positive]
    radius = index_WS.shape[1] // 2
    silent_T = corpus.ordinary_T & ~sample.fires_T
    beside_WS = silent_T[index_WS] & (index_WS >= 0)
    usable_W = beside_WS.any(axis=1)
    choice_W = np.where(beside_WS, rng.random(beside_WS.shape), -1).argmax(axis=1)
    centres = np.take_along_axis(index_WS, choice_W[:, None], axis=1)[usable_W, 0]
    other_WS = window_index(corpus, centres, radius)
    order_WS = np.where(silent_T[other_WS] & (other_WS >= 0), rng.random(other_WS.shape), 2.0)
    order_WS[:, radius] = -1
    rank_WS = order_WS.argsort(axis=1).argsort(axis=1)
    marked_WS = (order_WS < 2) & (rank_WS < fires_WS[usable_W].sum(axis=1)[:, None])
    windows = show_windows(corpus, np.concatenate([index_WS, other_WS]), np.concatenate([fires_WS, marked_WS]))
    return Quiz(windows, np.arange(len(windows)) < len(index_WS), {"missing_negatives": int((~usable_W).sum())})


def too_few(quiz: Quiz) -> str | None:
    """Why windows give no score: too few of either side."""
    n_positive = int(quiz.truth_W.sum())
    for side, count in (("around firings", n_positive), ("with other tokens to mark", len(quiz.truth_W) - n_positive)):
        if count < LEAST_SCORING:
            return f"only {count} windows {side}, fewer than {LEAST_SCORING}"
    return None


def score_answers(
    quiz: Quiz, answers: Sequence[float | None], rng: np.random.Generator, *, draws: int = DRAWS, level: float = 0.95
) -> Score:
    """Balanced accuracy of answers, unparsed ones wrong. ValueError unless there is one answer per window."""
    if len(answers) != len(quiz.truth_W):
        raise ValueError(f"{len(answers)} answers to {len(quiz.truth_W)} windows.")
    truth: list[bool] = quiz.truth_W.tolist()
    right = np.array([given is not None and (given > 0.5) == true for given, true in zip(answers, truth, strict=True)])
    sides = [right[quiz.truth_W], right[~quiz.truth_W]]
    value = float(np.mean([side.mean() if len(side) else np.nan for side in sides]))
    low, high = _bounds([side for side in sides if len(side)], value, rng, draws, level)
    unparsed = sum(given is None for given in answers)
    return Score(value, low, high, len(sides[0]), len(sides[1]), unparsed)


def _bounds(
    sides: Sequence[BoolArray], value: float, rng: np.random.Generator, draws: int, level: float
) -> tuple[float, float]:
    """Interval of the mean of the shares of right answers on each side.

    By bootstrap, which would have no width where all answers of a side are right, or all wrong: there the shares'
    Wilson intervals are put together (Newcombe, 1998, Statistics in Medicine 17, 873-890, method 10).
    """
    if all(0 < side.mean() < 1 for side in sides):
        # Resampling n zeros and ones with replacement is a binomial draw: the bootstrap without its loop.
        sampled = [rng.binomial(len(side), side.mean(), draws) / len(side) for side in sides]
        return percentile_bounds(np.mean(sampled, axis=0), level)
    wilson = [wilson_bounds(int(side.sum()), len(side), level) for side in sides]
    shares = [float(side.mean()) for side in sides]
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, wilson, strict=True))) / len(sides)
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, wilson, strict=True))) / len(sides)
    return value - below, value + above


def rank_answers(
    quiz: Quiz, answers: Sequence[float | None], rng: np.random.Generator, *, draws: int = DRAWS, level: float = 0.95
) -> Interval:
    """AUROC of confidences with its bootstrap interval (positives and negatives resampled apart; Wilson's at 0 and 1,
    none where all confidences are alike).

    The share of pairs of a positive and a negative in which the positive has the larger confidence, ties half. An
    answer that could not be read loses against every other one, and two of them lose too.
    """
    confidence_W = np.array([np.nan if given is None else float(given) for given in answers])
    positive, negative = confidence_W[quiz.truth_W], confidence_W[~quiz.truth_W]
    # Comparisons with NaN are false: neither a win nor a tie.
    win_PN = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    if win_PN.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    value = float(win_PN.mean())
    if value in (0.0, 1.0):
        # A bootstrap would have no width; this is of pairs without a common window, all of them in (or out of) order.
        pairs = min(win_PN.shape)
        return Interval(value, *wilson_bounds(value * pairs, pairs, level))
    weight_DP = rng.multinomial(len(positive), np.full(len(positive), 1 / len(positive)), draws)
    weight_DN = rng.multinomial(len(negative), np.full(len(negative), 1 / len(negative)), draws)
    sampled_D = ((weight_DP @ win_PN) * weight_DN).sum(axis=1) / win_PN.size
    return Interval(value, *percentile_bounds(sampled_D, level))


def compare_passes(once: Sequence[float | None], twice: Sequence[float | None]) -> dict[str, Any]:
    """How far two passes answer alike: `{"n", "equal", "kappa", "table"}`.

    `n` is the number of windows that both answered, `equal` the share of equal answers (yes above 0.5), `kappa`
    Cohen's, and `table` counts `[[no no, no yes], [yes no, yes yes]]`.
    """
    both = [(int(a > 0.5), int(b > 0.5)) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
    table = np.zeros((2, 2), dtype=np.int64)
    for pair in both:
        table[pair] += 1
    return agreement_of(table)


def agreement_of(table: NDArray[np.int64]) -> dict[str, Any]:
    """`{"n", "equal", "kappa", "table"}` of a square table of counts, first pass by second; None where not known."""
    equal, kappa = (None if np.isnan(found) else round(float(found), 4) for found in equal_and_kappa(table))
    return {"n": int(table.sum()), "equal": equal, "kappa": kappa, "table": table.tolist()}


def equal_and_kappa(table_XKK: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of equal answers [X] and Cohen's kappa [X] of square tables of counts, first pass by second.

    Kappa is (equal - chance) / (1 - chance), chance being what the margins alone give; NaN where that is everything
    (both passes gave one and the same answer throughout), and both are NaN where there is nothing.
    """
    n_X = table_XKK.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        equal_X = np.trace(table_XKK, axis1=-2, axis2=-1) / n_X
        chance_X = (table_XKK.sum(axis=-2) * table_XKK.sum(axis=-1)).sum(axis=-1) / n_X**2
        kappa_X = np.where(chance_X > 1 - 1e-12, np.nan, (equal_X - chance_X) / (1 - chance_X))
    return np.asarray(equal_X, np.float64), kappa_X


def execute_answers(vocabulary: Vocabulary) -> Answer:
    """Answers of a rule executed on the windows, as one who follows it to the letter would give them.

    Detection: the rule is true somewhere in the window. Fuzzing: it is true on at least half of the marked tokens.
    """

    def answer(explanation: Explanation, windows: Windows) -> list[float | None]:
        if explanation.rule is None:
            return [None] * len(windows)
        true_WS = execute_rule(explanation.rule, windows.ids_WS, windows.segments_WS, vocabulary)
        if windows.marked_WS is None:
            return np.asarray(true_WS.any(axis=1)).tolist()
        marked_W = windows.marked_WS.sum(axis=1)
        hits_W = (true_WS & windows.marked_WS).sum(axis=1)
        return [2 * hits >= max(marked, 1) for hits, marked in zip(hits_W.tolist(), marked_W.tolist(), strict=True)]

    return answer


def find_lenders(
    features: Sequence[str], groups: Sequence[Any] | NDArray[Any], texts: Sequence[Any] | NDArray[Any], seed: int
) -> NDArray[np.int64]:
    """For each feature the number of another one whose explanation it is given as a control.

    Features stand in a circle in the order of a hash of seed and name, and each borrows from the next one of another
    group (the two polarities of a direction are a group) that is explained by another text; -1 where there is none.
    So a feature that is explained later changes the control of those just before it and of no other, whose scores need
    not be paid again.
    """
    hashes = (digest([seed, "borrow", feature]).encode() for feature in features)
    order = np.argsort(np.fromiter(hashes, "S64", len(features)), kind="stable")
    out = np.full(len(features), -1)
    for place, number in enumerate(order):
        others = (order[(place + step) % len(order)] for step in range(1, len(order)))
        out[number] = next((k for k in others if groups[k] != groups[number] and texts[k] != texts[number]), -1)
    return out
