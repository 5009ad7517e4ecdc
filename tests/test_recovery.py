"""Recovery on samples whose answer is known, and when it is refused or labelled."""

from typing import Any

import numpy as np
import pytest

from lorascope.errors import BadInput
from lorascope.recovery import recovery_rows


def samples(correct: int, n: int = 100, benchmark: str = "chain") -> list[dict[str, Any]]:
    return [{"benchmark": benchmark, "id": str(i), "correct": i < correct} for i in range(n)]


def rows_of(**models: Any) -> tuple[list[dict[str, Any]], str | None]:
    return recovery_rows({k.replace("_", "-"): v for k, v in models.items()}, np.random.default_rng(0))


def test_known_recovery_with_an_interval_around_it() -> None:
    rows, best = rows_of(base=samples(10), base_3shot=samples(20), adapter=samples(65), full=samples(80))
    row = rows[0]
    assert best == "base-3shot"
    assert (row["benchmark"], row["n"], row["base"]["accuracy"]) == ("all", 100, 0.2)
    assert row["recovery"]["value"] == pytest.approx(0.75)
    assert 0.6 < row["recovery"]["low"] < 0.75 < row["recovery"]["high"] < 0.9
    assert row["recovery_reason"] is None
    assert row["gains"]["adapter"]["value"] == pytest.approx(0.45)
    assert row["others"]["base-3shot"]["accuracy"] == 0.2


def test_no_gain_of_full_means_no_recovery() -> None:
    rows, _ = rows_of(base=samples(50), adapter=samples(60), full=samples(50))
    assert rows[0]["recovery"] is None
    assert "does not lie above 0" in rows[0]["recovery_reason"]


def test_above_one_is_labelled() -> None:
    rows, _ = rows_of(base=samples(10), adapter=samples(80), full=samples(50))
    assert rows[0]["recovery"]["value"] == pytest.approx(1.75)
    assert rows[0]["recovery_reason"] == "full finetune under-trained at this budget"


def test_without_full_there_is_a_reason_and_null() -> None:
    rows, _ = rows_of(base=samples(10), adapter=samples(80))
    assert (rows[0]["full"], rows[0]["recovery"]) == (None, None)
    assert rows[0]["recovery_reason"] == "full was not evaluated"


def test_pairing_makes_the_interval_of_an_equal_gain_tight() -> None:
    # Adapter solves exactly the base's problems and ten more: the paired interval is far from 0.
    rows, _ = rows_of(base=samples(45), adapter=samples(55), full=samples(60))
    assert rows[0]["gains"]["adapter"]["low"] > 0.03


def test_benchmarks_get_rows_of_their_own() -> None:
    mixed = {
        name: samples(c, 50) + samples(c // 2, 50, "gcd") for name, c in (("base", 4), ("adapter", 20), ("full", 40))
    }
    rows, _ = rows_of(**mixed)
    assert [row["benchmark"] for row in rows] == ["all", "chain", "gcd"]
    assert rows[2]["adapter"]["accuracy"] == pytest.approx(0.2)


def test_other_problems_are_refused() -> None:
    with pytest.raises(BadInput, match="other problems"):
        rows_of(base=samples(10), adapter=samples(10, 90))
