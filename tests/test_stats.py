"""Intervals of little data: none where nothing can be resampled, never one without width."""

from typing import Any

import numpy as np
import pytest

from lorascope.ablation import make_targets, target_rows, write_rows
from lorascope.cli import readable
from lorascope.explain.categories.shares import bootstrap_shares
from lorascope.explain.scoring import Quiz, rank_answers
from lorascope.explain.windows import Windows
from lorascope.report.marks import interval_note, interval_words, score_words
from lorascope.stats import (
    Interval,
    alike_bounds,
    bootstrap_crossed,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
    percentile_bounds,
    wilson_bounds,
)

NONE = {"low": None, "high": None}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("found", "value"),
    [
        (bootstrap_mean([0.7], rng=rng()), 0.7),
        (bootstrap_mean([0.7, 0.1, 0.1], rng=rng(), clusters="aaa"), 0.3),
        (bootstrap_mean([0.1] * 7, rng=rng()), 0.1),
        (bootstrap_ratio([3.0], [10.0], rng=rng()), 0.3),
        (bootstrap_ratio([3.0, 0.0], [10.0, 0.0], rng=rng()), 0.3),  # the second trace has no such token
        (bootstrap_crossed(np.array([[0.5]]), rng=rng()), 0.5),
        (bootstrap_statistic(1, lambda index: float(index.mean()), rng=rng()), 0.0),
    ],
)
def test_what_cannot_be_resampled_has_no_interval(found: Interval, value: float) -> None:
    assert found.as_dict() == {"value": pytest.approx(value)} | NONE


def test_nothing_at_all_is_null() -> None:
    assert bootstrap_mean([], rng=rng()).as_dict("mean") == {"mean": None} | NONE
    assert bootstrap_ratio([0.0], [0.0], rng=rng()).as_dict() == {"value": None} | NONE
    assert np.isnan(percentile_bounds(np.array([np.nan, np.inf]))).all()


def test_two_rows_that_differ_have_an_interval() -> None:
    found = bootstrap_ratio([3.0, 1.0], [10.0, 10.0], rng=rng())
    assert found.low < found.value < found.high


def test_values_that_are_all_alike_are_bounded_by_how_many_they_are() -> None:
    assert alike_bounds(0.0, 20, 0.0, 1.0) == wilson_bounds(0, 20)
    assert alike_bounds(1.0, 20, 0.0, 1.0) == pytest.approx(wilson_bounds(20, 20))
    low, high = alike_bounds(1.0, 3, -1.0, 1.0)
    assert low < 0 < high == 1.0  # three of three gained: not yet a gain


def test_shares_of_one_trace_have_no_bounds_and_counts_at_the_ends_have_wilsons() -> None:
    columns = np.eye(3)
    one = bootstrap_shares(np.array([[2.0, 13.0, 0.0]]), columns, rng())
    assert one == [{"value": pytest.approx(v)} | NONE for v in (2 / 15, 13 / 15, 0)]
    many = np.zeros((12, 3))
    many[:, 0], many[:7, 1] = 1, 1
    counted = bootstrap_shares(many, columns, rng(), counts=True)
    assert counted[2] == {"value": 0.0, "low": 0.0, "high": pytest.approx(wilson_bounds(0, 12)[1])}
    assert counted[0] is not None
    assert counted[0]["low"] < counted[0]["value"] < counted[0]["high"]
    whole = bootstrap_shares(many[:, :1], np.eye(1), rng(), counts=True)[0]
    assert whole == {"value": 1.0, "low": pytest.approx(wilson_bounds(12, 12)[0]), "high": 1.0}


def test_a_judge_that_always_says_the_same_ranks_at_chance_without_an_interval() -> None:
    windows = Windows(np.zeros((4, 3), np.int32), np.zeros((4, 3), np.uint8), None)
    quiz = Quiz(windows, np.array([True, True, False, False]), {})
    assert rank_answers(quiz, [0.5] * 4, rng()).rounded(4) == {"value": 0.5} | NONE


def test_a_table_of_one_trace_holds_nulls(tmp_path: Any) -> None:
    import pyarrow.parquet as pq

    target = make_targets(["L0.q"], "direction")[0]
    sums = np.array([[[0.4, 0.2, 8], [0.3, 0.1, 3], [0.1, 0.1, 4], [0, 0, 1]]])
    write_rows(tmp_path / "t.parquet", target_rows(target, sums, 0.0, rng()))
    table = pq.read_table(tmp_path / "t.parquet")
    assert str(table.schema.field("low").type) == "double"
    for row in table.to_pylist():
        assert row["kl"] is not None
        assert [row[name] for name in ("low", "high", "ce_low", "ce_high")] == [None] * 4


def test_readers_say_that_there_is_no_interval() -> None:
    bare = {"value": 0.1333} | NONE
    assert readable(bare) == "0.1333 (no interval)"
    assert interval_words(bare, True) == "13% (no interval)"
    assert score_words(bare) == "0.13 (no interval)"
    assert interval_note([None, bare]).endswith("leave nothing to resample.")
    assert interval_note([None, {"value": 0.1, "low": 0.0, "high": 0.2}]) == ""
