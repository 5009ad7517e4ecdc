"""No score rests on fewer windows than are promised, on either side, and what is missing says why."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorascope.explain.scored import LEAST_SCORING, score_feature
from lorascope.explain.scoring import Explanation, Quiz, score_answers
from lorascope.explain.windows import make_corpus

LENGTH, TRACES, FIRING = 10, 40, 10


def job_of(with_silence: int) -> SimpleNamespace:
    """A feature that fires on all tokens of 10 of 40 traces, but for one token in some; windows are whole traces."""
    total = LENGTH * TRACES
    offsets = np.arange(0, total + 1, LENGTH)
    corpus = make_corpus(
        np.arange(total, dtype=np.int32), np.full(total, 3, np.uint8), np.ones(total, np.bool_), offsets
    )
    fires_T = np.zeros(total, np.bool_)
    fires_T[: LENGTH * FIRING] = True
    fires_T[4 : LENGTH * with_silence : LENGTH] = False
    at_n = np.flatnonzero(fires_T)
    firings = SimpleNamespace(of=lambda _: (at_n, np.ones(len(at_n), np.float32)))
    side = SimpleNamespace(firings=firings, reading=SimpleNamespace(corpus=corpus))
    return SimpleNamespace(scoring=side, seed=0, config=SimpleNamespace(examples=FIRING, window=LENGTH))


def always_yes(quiz: Quiz, _: Explanation, rng: np.random.Generator) -> dict[str, Any]:
    return score_answers(quiz, [1.0] * len(quiz.truth_W), rng).as_dict()


@pytest.mark.parametrize("with_silence", [0, LEAST_SCORING - 1, LEAST_SCORING])
def test_fuzzing_needs_as_many_windows_of_each_side(with_silence: int) -> None:
    row = {"feature": "L0.q+", "text": "fires", "rule": None}
    explainer = SimpleNamespace(score=always_yes, agree=None, most_tokens=None)
    scored = score_feature(job_of(with_silence), explainer, 0, row, row)["scored"]  # type: ignore[arg-type]
    assert scored["detection"]["n_positive"] == scored["detection"]["n_negative"] == FIRING
    if with_silence < LEAST_SCORING:
        assert scored["fuzzing"] is None
        assert "fuzzing_wrong" not in scored
        reason = f"only {with_silence} windows with other tokens to mark, fewer than {LEAST_SCORING}"
        assert scored["without"] == {"fuzzing": reason}
    else:
        assert scored["fuzzing"]["n_negative"] == with_silence
        assert "without" not in scored


def test_an_outage_is_no_score_and_takes_the_wrong_one_with_it() -> None:
    """All requests about detection fail in passing; fuzzing has its score, and so a row that is asked again."""
    failed = {"failures": {"HTTP 500": 2 * FIRING}}

    def half_answered(quiz: Quiz, explanation: Explanation, rng: np.random.Generator) -> dict[str, Any]:
        return failed if quiz.windows.marked_WS is None else always_yes(quiz, explanation, rng)

    explainer = SimpleNamespace(score=half_answered, agree=None, most_tokens=None)
    row = {"feature": "L0.q+", "text": "fires", "rule": None}
    found = score_feature(job_of(LEAST_SCORING), explainer, 0, row, row)  # type: ignore[arg-type]
    assert found["retry"]
    scored = found["scored"]
    assert scored["detection"] is None
    assert not {"detection_wrong", "detection_shuffled"} & set(scored)
    assert {"detection", "detection_wrong"} <= set(scored["unfinished"])
    assert scored["unfinished"]["detection"] == failed["failures"]
    assert scored["without"] == {"detection": "too many requests failed, to be sent again"}
    assert scored["fuzzing"]["n_negative"] == LEAST_SCORING
