"""Recovery on samples whose answer is known, and when it is refused or labelled."""

from typing import Any

import numpy as np
import pytest

from lorascope.errors import BadInput
from lorascope.recovery import recovery_rows
from lorascope.stats import bootstrap_mean, wilson_bounds


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


def test_none_right_is_no_certainty() -> None:
    rows, _ = rows_of(base=samples(0, 20), adapter=samples(20, 20), full=samples(0, 20))
    row = rows[0]
    low, high = wilson_bounds(0, 20)
    assert row["base"] == {"accuracy": 0.0, "low": 0.0, "high": pytest.approx(high)}
    assert row["adapter"] == {"accuracy": 1.0, "low": pytest.approx(1 - high), "high": 1.0}
    assert row["gains"]["full"] == {"value": 0.0, "low": pytest.approx(-high), "high": pytest.approx(high)}
    assert low == 0
    assert row["recovery_reason"] == "the interval of full − base does not lie above 0, so there is no gain to recover"


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
    assert rows[0]["recovery_reason"] == "the full finetune was not evaluated"


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


def seeded(table: list[list[bool]]) -> list[dict[str, Any]]:
    """Samples from [problem][seed]."""
    return [
        {"benchmark": "chain", "id": str(i), "seed": seed, "correct": right}
        for i, row in enumerate(table)
        for seed, right in enumerate(row)
    ]


def width(bounds: dict[str, float]) -> float:
    return bounds["high"] - bounds["low"]


def test_seeds_are_resampled_beside_problems() -> None:
    """Whole seeds that go well or badly: averaging them first would hide that other seeds may go otherwise."""
    rng = np.random.default_rng(1)
    shares = {"base": (0.1, 0.1, 0.1, 0.1), "adapter": (0.2, 0.8, 0.3, 0.7), "full": (0.9, 0.9, 0.9, 0.9)}
    tables = {name: rng.random((200, 4)) < np.array(share) for name, share in shares.items()}
    rows, _ = rows_of(**{name: seeded(table.tolist()) for name, table in tables.items()})
    means = {name: table.mean(1) for name, table in tables.items()}
    averaged = bootstrap_mean(means["adapter"], rng=rng)
    gain = bootstrap_mean(means["adapter"] - means["base"], rng=rng)
    row = rows[0]
    assert row["adapter"]["accuracy"] == pytest.approx(averaged.value)
    assert row["gains"]["adapter"]["value"] == pytest.approx(gain.value)
    # The standard error of four seeds' mean is about 0.13, of 200 problems' about 0.02.
    assert width(row["adapter"]) > 4 * (averaged.high - averaged.low)
    assert width(row["gains"]["adapter"]) > 4 * (gain.high - gain.low)
    assert width(row["recovery"]) > 0.4
    assert row["n"] == 200


def test_seeds_that_all_models_share_cancel() -> None:
    """The same seeds are drawn for all models: what a seed does to each of them does not blur their difference."""
    rng = np.random.default_rng(2)
    luck = np.array([0.0, 0.4, 0.1, 0.3])
    draw = rng.random((200, 4))
    rows, _ = rows_of(
        **{
            name: seeded((draw < share + luck).tolist())
            for name, share in (("base", 0.1), ("adapter", 0.3), ("full", 0.5))
        }
    )
    assert width(rows[0]["adapter"]) > 0.25
    assert width(rows[0]["gains"]["adapter"]) < 0.12
    assert width(rows[0]["recovery"]) < 0.3


def test_equal_seeds_change_nothing_but_the_draws() -> None:
    once, thrice = (
        rows_of(
            **{
                name: seeded([[i < right] * seeds for i in range(100)])
                for name, right in (("base", 20), ("adapter", 50), ("full", 80))
            }
        )[0][0]
        for seeds in (1, 3)
    )
    for name in ("base", "adapter", "full"):
        assert thrice[name]["low"] == pytest.approx(once[name]["low"], abs=0.02)
    assert thrice["recovery"]["high"] == pytest.approx(once["recovery"]["high"], abs=0.02)


def test_twice_the_same_problem_is_refused() -> None:
    with pytest.raises(BadInput, match="twice"):
        rows_of(base=samples(10) + samples(5))
    ragged = seeded([[True, False]] * 5)
    with pytest.raises(BadInput, match="seeds"):
        rows_of(base=ragged[:-1])
    with pytest.raises(BadInput, match="seeds"):
        rows_of(base=ragged, adapter=seeded([[True]] * 5))


def test_problems_that_all_come_out_alike_have_intervals_of_some_width() -> None:
    rows, _ = rows_of(base=samples(0, 20), adapter=samples(20, 20), full=samples(20, 20))
    row = rows[0]
    assert row["base"]["accuracy"] == 0.0 == row["base"]["low"]
    assert row["base"]["high"] == pytest.approx(wilson_bounds(0, 20)[1])
    assert row["adapter"]["low"] == pytest.approx(wilson_bounds(20, 20)[0])
    assert 0.5 < row["gains"]["adapter"]["low"] < 0.8
    assert row["recovery"]["value"] == 1.0
    assert row["recovery"]["low"] < 0.8 < 1.0 < row["recovery"]["high"]
    rows, _ = rows_of(base=samples(7, 20), adapter=samples(7, 20))
    gain = rows[0]["gains"]["adapter"]
    assert gain["value"] == 0.0
    assert gain["low"] == pytest.approx(-gain["high"])
    assert gain["high"] > 0.1


def test_one_problem_shows_no_gain() -> None:
    rows, _ = rows_of(base=samples(0, 1), adapter=samples(1, 1), full=samples(1, 1))
    assert rows[0]["recovery"] is None
    assert rows[0]["gains"]["full"]["low"] < 0
    assert width(rows[0]["adapter"]) > 0.7
