"""Recovery, (adapter − base) / (full − base), with paired bootstrap intervals over problems and seeds.

Arrays: P = problems, S = seeds (one, unless responses are sampled several times); an entry is 1 where the response
is right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.stats import Interval, alike_bounds, bootstrap_crossed, crossed_draws, percentile_bounds

FloatArray = NDArray[np.float64]
Samples = Sequence[Mapping[str, Any]]
MAIN = ("base", "adapter", "full")


def recovery_rows(samples: Mapping[str, Samples], rng: np.random.Generator) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of `eval/recovery.json` (first `all`, then each benchmark) and which prompt base is shown with.

    Raises:
        BadInput: two models were evaluated on different problems.
    """
    scores = {name: problem_scores(name, rows) for name, rows in samples.items()}
    problems = list(next(iter(scores.values())))
    seeds = {len(own[key]) for own in scores.values() for key in own}
    for name, own in scores.items():
        if set(own) != set(problems):
            raise BadInput(f"The samples of {name} are of other problems; run lorascope evaluate for all models again.")
    if len(seeds) > 1:
        raise BadInput(
            f"There are samples of {min(seeds)} and of {max(seeds)} seeds; run lorascope evaluate for all models again."
        )
    table = {name: np.array([own[key] for key in problems]) for name, own in scores.items()}
    prompts = [name for name in table if name.startswith("base")]
    best = max(prompts, key=lambda name: table[name].mean(), default=None)
    if best is not None:
        table["base"] = table[best]
    benchmarks = np.array([key[0] for key in problems])
    rows = [recovery_row("all", table, np.ones(len(problems), bool), rng)]
    rows += [recovery_row(name, table, benchmarks == name, rng) for name in dict.fromkeys(benchmarks.tolist())]
    return rows, best


def problem_scores(name: str, rows: Samples) -> dict[tuple[str, str], list[float]]:
    """Whether each response to a problem is right, in the order of seeds, by (benchmark, id)."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        own = found.setdefault((row["benchmark"], row["id"]), {})
        seed = row.get("seed", 0)
        if seed in own:
            raise BadInput(f"Samples of {name}: {row['id']} of {row['benchmark']} is there twice; evaluate it again.")
        own[seed] = float(row["correct"])
    return {key: [own[seed] for seed in sorted(own)] for key, own in found.items()}


def recovery_row(
    benchmark: str, table: Mapping[str, FloatArray], chosen: NDArray[np.bool_], rng: np.random.Generator
) -> dict[str, Any]:
    """One row: accuracies with intervals, gains over base with paired intervals, recovery or why there is none.

    `table` holds [P, S] per model, `chosen` says which problems count.
    """
    part = {name: values[chosen] for name, values in table.items()}
    row: dict[str, Any] = {"benchmark": benchmark, "n": int(chosen.sum())}
    for name in MAIN:
        row[name] = bounded_mean(part[name], 0.0, rng).as_dict("accuracy") if name in part else None
    row["others"] = {
        name: bounded_mean(values, 0.0, rng).as_dict("accuracy") for name, values in part.items() if name not in MAIN
    }
    row["gains"] = {
        name: bounded_mean(values - part["base"], -1.0, rng).as_dict()
        for name, values in part.items()
        if "base" in part and name != "base"
    }
    value, reason = recover(part, rng)
    return row | {"recovery": value, "recovery_reason": reason}


def bounded_mean(values_PS: FloatArray, least: float, rng: np.random.Generator) -> Interval:
    """Mean of values between `least` and 1 with its interval over problems and seeds.

    One problem, or problems that all came out alike, leave nothing to resample; `alike_bounds` are of some width there.
    """
    found = bootstrap_crossed(values_PS, rng=rng)
    if values_PS.size and (len(values_PS) < 2 or np.isnan(found.low)):
        return Interval(found.value, *alike_bounds(found.value, len(values_PS), least, 1.0))
    return found


def recover(
    part: Mapping[str, FloatArray], rng: np.random.Generator
) -> tuple[dict[str, float | None] | None, str | None]:
    """Recovery with its interval, or the reason why it means nothing here."""
    if missing := [name for name in MAIN if name not in part]:
        return None, f"{'the full finetune' if missing[0] == 'full' else missing[0]} was not evaluated"
    base_PS, adapter_PS, full_PS = (part[name] for name in MAIN)
    gain = bounded_mean(full_PS - base_PS, -1.0, rng)
    if not gain.low > 0:
        return None, "the interval of full − base does not lie above 0, so there is no gain to recover"
    draws_D3 = crossed_draws(np.stack([base_PS, adapter_PS, full_PS], axis=2), rng)
    value = ratio(base_PS.mean(), adapter_PS.mean(), full_PS.mean())
    low, high = percentile_bounds(np.array([ratio(*means) for means in draws_D3]))
    if np.isnan(low):  # every draw gave the same: from the bounds of both gains, which is wider than need be
        own = bounded_mean(adapter_PS - base_PS, -1.0, rng)
        ends = [part / whole for part in (own.low, own.high) for whole in (gain.low, gain.high)]
        low, high = min(ends), max(ends)
    note = "full finetune under-trained at this budget" if value > 1 else None
    return Interval(value, low, high).as_dict(), note


def ratio(base: float, adapter: float, full: float) -> float:
    """(adapter − base) / (full − base); NaN when full equals base (left out of the draws)."""
    return float((adapter - base) / (full - base)) if full != base else float("nan")
