"""Scoring the explanations of a job: detection and fuzzing, beside a wrong explanation and a shuffled feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.firings import shift_firings
from lorascope.explain.job import Explainer, Job, feature_rng
from lorascope.explain.judge_log import TRUNCATED, is_passing
from lorascope.explain.rows import Row
from lorascope.explain.rules import rule_from_json
from lorascope.explain.scoring import LEAST_SCORING, Explanation, Quiz, pose_detection, pose_fuzzing, too_few
from lorascope.explain.windows import draw_windows

UNFINISHED = "too many requests failed, to be sent again"

Item = TypeVar("Item")
Made = TypeVar("Made")


def score_feature(job: Job, explainer: Explainer, number: int, row: Row, lender: Row | None) -> Row:
    """`{"scored": ...}` of one explained feature by its number, or `{"reason"}` when there are too few windows.

    `scored` has `detection` and `fuzzing`, each also with `_wrong` (the explanation of `wrong_from`) and `_shuffled`
    (the same explanation on the feature's firings shifted within their traces). Where there are too few windows for one
    of the two it is None, and `without` has the reason by its name. Windows whose requests failed in passing are left
    out of a score, and sent again when the same is run again (`retry`): an outage is not the explanation's. Where too
    few are left, there is no score, and `unfinished` has how many failed for which reason.
    """
    feature = row["feature"]
    at_n, activation_n = job.scoring.firings.of(number)
    if len(at_n) < LEAST_SCORING:
        return {"reason": f"fires on {len(at_n)} tokens of the scoring corpus, fewer than {LEAST_SCORING}"}
    rng = feature_rng(job.seed, "score", feature)
    quizzes, n_quiet = _pose(job, at_n, activation_n, rng)
    if n_quiet < LEAST_SCORING:
        return {"reason": f"only {n_quiet} windows of the scoring corpus are without it, fewer than {LEAST_SCORING}"}
    own = _explanation(feature, row)
    scored: dict[str, Any] = {}
    for name, quiz in quizzes.items():
        if reason := too_few(quiz):
            scored[name] = None
            scored.setdefault("without", {})[name] = reason
            continue
        scored[name] = explainer.score(quiz, own, rng) | {"counts": quiz.counts}
        if lender:
            scored[f"{name}_wrong"] = explainer.score(quiz, _explanation(feature, lender), rng)
    shuffled = _score_shuffled(job, explainer, own, at_n, activation_n)
    scored |= shuffled | {"wrong_from": lender["feature"] if lender else None}
    if explainer.agree:
        kept = {name: quiz for name, quiz in quizzes.items() if scored[name]}
        scored["agreement"] = {name: explainer.agree(quiz, own) for name, quiz in kept.items()}
    failures = _failures_in(scored)
    _set_aside(scored)
    return (
        {"scored": scored}
        | ({"retry": True} if any(map(is_passing, failures)) else {})
        | ({"truncated_under": explainer.most_tokens} if TRUNCATED in failures else {})
    )


def _pose(
    job: Job, at_n: NDArray[np.int64], activation_n: NDArray[np.float32], rng: np.random.Generator
) -> tuple[dict[str, Quiz], int]:
    """Both quizzes about firings of the scoring corpus, and how many windows there are without any."""
    corpus = job.scoring.reading.corpus
    sample = draw_windows(corpus, at_n, activation_n, wanted=job.config.examples, radius=job.config.window, rng=rng)
    quizzes = {"detection": pose_detection(corpus, sample), "fuzzing": pose_fuzzing(corpus, sample, rng)}
    return quizzes, len(sample.index_WS) - sample.n_positive


def _score_shuffled(
    job: Job, explainer: Explainer, own: Explanation, at_n: NDArray[np.int64], activation_n: NDArray[np.float32]
) -> dict[str, Any]:
    """The same explanation on shifted firings, with draws of its own; nothing where too few windows are left."""
    rng = feature_rng(job.seed, "shuffle", own.feature)
    moved_n, order_n = shift_firings(job.scoring.reading.corpus, at_n, job.config.window, rng)
    if len(moved_n) < LEAST_SCORING:
        return {}
    quizzes, n_quiet = _pose(job, moved_n, activation_n[order_n], rng)
    if n_quiet < LEAST_SCORING:
        return {}
    posed = {name: quiz for name, quiz in quizzes.items() if not too_few(quiz)}
    return {f"{name}_shuffled": explainer.score(quiz, own, rng) for name, quiz in posed.items()}


def _explanation(feature: str, row: Row) -> Explanation:
    """What a row says, of the feature that it is tried on."""
    return Explanation(feature, row["text"], None if row["rule"] is None else rule_from_json(row["rule"]))


def _set_aside(scored: dict[str, Any]) -> None:
    """Move what has no value, as too many of its requests failed, to `unfinished`, with what stands beside it."""
    unfinished: dict[str, Any] = {}
    for name in ("detection", "fuzzing"):
        parts = [f"{name}{ending}" for ending in ("", "_wrong", "_shuffled")]
        lost = [key for key in parts if scored.get(key) and "value" not in scored[key]]
        if name in lost:
            scored.setdefault("without", {})[name] = UNFINISHED
            scored.get("agreement", {}).pop(name, None)
            lost = [key for key in parts if scored.get(key)]
        unfinished |= {key: scored.pop(key)["failures"] for key in lost}
        scored.setdefault(name, None)
    if unfinished:
        scored["unfinished"] = unfinished


def _failures_in(scored: dict[str, Any]) -> set[str]:
    """Why answers could not be read."""
    parts = [part for part in scored.values() if isinstance(part, dict)]
    parts += list(scored.get("agreement", {}).values())
    return {reason for part in parts for reason in part.get("failures", ())}


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], workers: int, stop: Callable[[], None]
) -> Iterator[tuple[Item, Made]]:
    """(item, work(item)) in the order of the items, up to `workers` at once and never many more in memory.

    When one fails, or the run is interrupted, `stop` is called, those not yet begun are dropped, and the error is
    raised once the others have ended.
    """
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    rest = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="feature") as pool:
        waiting: list[tuple[Item, Future[Made]]] = []
        try:
            while True:
                waiting += [(item, pool.submit(work, item)) for item in islice(rest, 2 * workers - len(waiting))]
                if not waiting:
                    return
                item, future = waiting.pop(0)
                yield item, future.result()
        except BaseException:
            stop()
            for _, future in waiting:
                future.cancel()
            raise
