"""The built-in explainer: a short executable rule per feature, found by counting, without any model.

The search learns on windows of the training corpus drawn like the scorer's (`windows.draw_windows`). A rule is
worth a weighted mean of two balanced accuracies, each minus its chance: does it pick the windows in which the feature
fires, and the tokens on which it does? Clauses are grown by a small beam search, joined greedily, and pay for their
length. Counting is exact and nothing is random but the windows.

Shapes: W = windows, S = tokens of a window, R = real tokens of all windows (row by row), C = the candidate
conditions that hold on enough firing tokens, K = columns of the candidates' table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.candidates import Candidates
from lorascope.explain.rules import Clause, Condition, Rule
from lorascope.explain.windows import Sample

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

WINDOW_WEIGHT = 0.65
"""Share of a rule's worth that is about windows, the rest about tokens: of 0.5, 0.65 and 0.8 the sum of held-out
detection and fuzzing was largest here, on random directions and neurons of SmolLM2 and on a trained adapter."""
BEAM = 4
MAX_CLAUSES = 4
MAX_CONDITIONS = 3
MAX_SET = 6
CONDITION_COST = 0.008
CLAUSE_COST = 0.025
SET_COST = 0.008
LEAST_SUPPORT = 0.02


@dataclass(frozen=True)
class Problem:
    """What the search counts on: `holds_RC` (0/1), the window of each token, what hitting a token or window is worth.

    `packed_RB` is `holds_RC` with eight conditions to a byte: "or" over a window's tokens is 25 times faster on it
    than a maximum. `token_R` and `window_W` are +1/positives or -1/negatives, so that a rule's worth is a sum over
    what it hits; `token_R` is 0 before the window's centre.
    """

    holds_RC: FloatArray
    packed_RB: NDArray[np.uint8]
    window_R: IntArray
    token_R: FloatArray
    window_W: FloatArray
    column_C: IntArray


def find_rule(sample: Sample, candidates: Candidates) -> Rule:
    """The rule for the firings of a sample of training windows; () when no condition is better than none."""
    problem = _pose_problem(sample, candidates)
    if problem is None:
        return ()
    token_R, window_W = problem.token_R.copy(), problem.window_W.copy()
    rule: list[Clause] = []
    for _ in range(MAX_CLAUSES):
        found = _best_clause(problem, token_R, window_W)
        if found is None:
            break
        conditions, worth = found
        sets, hit_R, worth = _widen(problem, candidates, conditions, worth, token_R, window_W)
        if worth < CLAUSE_COST:
            break
        rule.append(_write_clause(candidates, problem, sets))
        window_W[problem.window_R[hit_R]] = 0
        token_R[hit_R] = 0
    return tuple(rule)


def _pose_problem(sample: Sample, candidates: Candidates) -> Problem | None:
    """Count what holds where, keeping conditions that hold on at least a fiftieth (and 3) of the firing tokens."""
    real_WS = sample.index_WS >= 0
    window_R, offset_R = np.nonzero(real_WS)
    # A condition may not look past the window's left edge, because the rule will not see it there.
    first_R = np.argmax(real_WS, axis=1)[window_R]
    rows_RK = candidates.table_TK[sample.index_WS[real_WS]]
    none = len(candidates.conditions)
    rows_RK[(offset_R - first_R)[:, None] < candidates.reach_K] = none
    fires_R = sample.fires_WS[real_WS]
    # Tokens before the centre see less than a whole radius before them: they count for the windows, not as tokens.
    counted_R = offset_R >= sample.index_WS.shape[1] // 2
    n_fires, n_silent = int((fires_R & counted_R).sum()), int((~fires_R & counted_R).sum())
    if n_fires == 0 or n_silent == 0 or sample.n_positive == len(sample.index_WS):
        return None
    fires_RK = rows_RK[fires_R & counted_R]
    support = np.bincount(fires_RK.ravel(), minlength=none + 1)[:none]
    kept = np.flatnonzero(support >= max(3, LEAST_SUPPORT * n_fires))
    local = np.full(none + 1, len(kept), dtype=np.int64)
    local[kept] = np.arange(len(kept))
    holds_RC = np.zeros((len(rows_RK), len(kept) + 1), dtype=np.float32)
    holds_RC[np.arange(len(rows_RK))[:, None], local[rows_RK]] = 1
    truth_W = sample.truth_W
    token_R = (np.where(fires_R, 1 / n_fires, -1 / n_silent) * counted_R).astype(np.float32)
    window_W = np.where(truth_W, 1 / truth_W.sum(), -1 / (~truth_W).sum()).astype(np.float32)
    holds_RC = np.ascontiguousarray(holds_RC[:, :-1])
    return Problem(holds_RC, np.packbits(holds_RC > 0, axis=1), window_R, token_R, window_W, kept)


def _worth_of_each(
    problem: Problem, within_R: BoolArray | None, token_R: FloatArray, window_W: FloatArray
) -> FloatArray:
    """Worth [C] of adding each condition to a clause that holds at `within_R` (None: everywhere)."""
    holds_RC, packed_RB, window_R, worth_R = problem.holds_RC, problem.packed_RB, problem.window_R, token_R
    size = holds_RC.shape[1]
    if within_R is not None:
        rows = np.flatnonzero(within_R)
        holds_RC, packed_RB, window_R, worth_R = holds_RC[rows], packed_RB[rows], window_R[rows], worth_R[rows]
    if len(window_R) == 0 or size == 0:
        return np.zeros(size, dtype=np.float32)
    starts = np.flatnonzero(np.diff(window_R, prepend=-1))
    hit_WC = np.unpackbits(np.bitwise_or.reduceat(packed_RB, starts, axis=0), axis=1, count=size)
    of_windows = window_W[window_R[starts]] @ hit_WC.astype(np.float32)
    worth: FloatArray = WINDOW_WEIGHT * of_windows + (1 - WINDOW_WEIGHT) * (worth_R @ holds_RC)
    return worth


def _best_clause(problem: Problem, token_R: FloatArray, window_W: FloatArray) -> tuple[tuple[int, ...], float] | None:
    """The best conjunction by beam search: (numbers of its conditions, its worth less its cost)."""
    worth_C = _worth_of_each(problem, None, token_R, window_W) - CONDITION_COST
    if len(worth_C) == 0:
        return None
    beam: list[tuple[tuple[int, ...], float]] = [
        ((int(c),), float(worth_C[c])) for c in np.argsort(-worth_C, kind="stable")[:BEAM]
    ]
    best = beam[0]
    for _ in range(MAX_CONDITIONS - 1):
        longer: dict[tuple[int, ...], float] = {}
        for numbers, _worth in beam:
            within_R = _all_hold(problem, numbers)
            cost = CONDITION_COST * (len(numbers) + 1)
            more_C = _worth_of_each(problem, within_R, token_R, window_W) - cost
            more_C[list(numbers)] = -np.inf
            for c in np.argsort(-more_C, kind="stable")[:BEAM]:
                longer[tuple(sorted((*numbers, int(c))))] = float(more_C[c])
        beam = sorted(longer.items(), key=lambda item: (-item[1], item[0]))[:BEAM]
        if not beam or beam[0][1] <= best[1]:
            break
        best = beam[0]
    return best


def _all_hold(problem: Problem, numbers: tuple[int, ...]) -> BoolArray:
    holds_RN = problem.holds_RC[:, list(numbers)]
    return np.asarray(holds_RN.all(axis=1), dtype=np.bool_)


def _widen(
    problem: Problem,
    candidates: Candidates,
    numbers: tuple[int, ...],
    worth: float,
    token_R: FloatArray,
    window_W: FloatArray,
) -> tuple[list[list[int]], BoolArray, float]:
    """Turn each token condition into a set of tokens while that pays; (sets of condition numbers, hits, worth)."""
    sets = [[number] for number in numbers]
    slot_C = candidates.slot_C[problem.column_C]
    hit_R = _all_hold(problem, numbers)
    for place, number in enumerate(numbers):
        if slot_C[number] < 0:
            continue
        context_R = np.ones(len(hit_R), dtype=np.bool_)
        for other in (*sets[:place], *sets[place + 1 :]):
            context_R &= problem.holds_RC[:, other].any(axis=1)
        while len(sets[place]) < MAX_SET:
            left_R = np.where(hit_R, np.float32(0), token_R)
            left_W = window_W.copy()
            left_W[problem.window_R[hit_R]] = 0
            gain_C = _worth_of_each(problem, context_R, left_R, left_W) - SET_COST
            gain_C[(slot_C != slot_C[number]) | np.isin(np.arange(len(gain_C)), sets[place])] = -np.inf
            best = int(np.argmax(gain_C))
            if not gain_C[best] > 0:
                break
            sets[place].append(best)
            worth += float(gain_C[best])
            hit_R = hit_R | (context_R & (problem.holds_RC[:, best] > 0))
    return sets, hit_R, worth


def _write_clause(candidates: Candidates, problem: Problem, sets: list[list[int]]) -> Clause:
    clause: list[Condition] = []
    for numbers in sets:
        first, *more = (candidates.conditions[problem.column_C[n]] for n in numbers)
        texts = first.tokens + tuple(text for condition in more for text in condition.tokens)
        clause.append(Condition(first.kind, first.back, texts, first.name))
    return tuple(sorted(clause, key=lambda c: (c.kind, c.back, c.name, c.tokens)))
