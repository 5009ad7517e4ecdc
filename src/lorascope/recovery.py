"""Recovery, (adapter − base) / (full − base), with paired bootstrap intervals over problems.

Arrays: P = problems; an entry is the problem's accuracy, averaged over seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.stats import DRAWS, bootstrap_mean, percentile_bounds

FloatArray = NDArray[np.float64]
Samples = Sequence[Mapping[str, Any]]
MAIN = ("base", "adapter", "full")


def recovery_rows(samples: Mapping[str, Samples], rng: np.random.Generator) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of `eval/recovery.json` (first `all`, then each benchmark) and which prompt base is shown with.

    Raises:
        BadInput: two models were evaluated on different problems.
    """
    scores = {name: problem_scores(rows) for name, rows in samples.items()}
    problems = list(next(iter(scores.values())))
    for name, own in scores.items():
        if set(own) != set(problems):
            raise BadInput(f"The samples of {name} are of other problems; run lorascope evaluate for all models again.")
    prompts = [name for name in scores if name.startswith("base")]
    best = max(prompts, key=lambda name: np.mean(list(scores[name].values())), default=None)
    table = {name: np.array([scores[name][key] for key in problems]) for name in scores}
    if best is not None:
        table["base"] = table[best]
    benchmarks = np.array([key[0] for key in problems])
    rows = [recovery_row("all", table, np.ones(len(problems), bool), rng)]
    rows += [recovery_row(name, table, benchmarks == name, rng) for name in dict.fromkeys(benchmarks.tolist())]
    return rows, best


def problem_scores(rows: Samples) -> dict[tuple[str, str], float]:
    """Accuracy of each problem, over its seeds, by (benchmark, id)."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["id"]), []).append(float(row["correct"]))
    return {key: float(np.mean(values)) for key, values in found.items()}


def recovery_row(
    benchmark: str, table: Mapping[str, FloatArray], chosen: NDArray[np.bool_], rng: np.random.Generator
) -> dict[str, Any]:
    """One row: accuracies with intervals, gains over base with paired intervals, recovery or why there is none."""
    part = {name: values[chosen] for name, values in table.items()}
    row: dict[str, Any] = {"benchmark": benchmark, "n": int(chosen.sum())}
    for name in MAIN:
        row[name] = bootstrap_mean(part[name], rng=rng).as_dict("accuracy") if name in part else None
    row["others"] = {
        name: bootstrap_mean(values, rng=rng).as_dict("accuracy") for name, values in part.items() if name not in MAIN
    }
    row["gains"] = {
        name: bootstrap_mean(values - part["base"], rng=rng).as_dict()
        for name, values in part.items()
        if "base" in part and name != "base"
    }
    value, reason = recover(part, rng)
    return row | {"recovery": value, "recovery_reason": reason}


def recover(part: Mapping[str, FloatArray], rng: np.random.Generator) -> tuple[dict[str, float] | None, str | None]:
    """Recovery with its interval, or the reason why it means nothing here."""
    if missing := [name for name in MAIN if name not in part]:
        return None, f"{missing[0]} was not evaluated"
    base_P, adapter_P, full_P = (part[name] for name in MAIN)
    gain = bootstrap_mean(full_P - base_P, rng=rng)
    if not gain.low > 0:
        return None, "the interval of full - base does not lie above 0, so there is no gain to recover"
    n = len(base_P)
    picks = (rng.integers(0, n, n) for _ in range(DRAWS))
    draws = np.array([ratio(base_P[i], adapter_P[i], full_P[i]) for i in picks])
    value = ratio(base_P, adapter_P, full_P)
    low, high = percentile_bounds(draws)
    note = "full finetune under-trained at this budget" if value > 1 else None
    return {"value": value, "low": low, "high": high}, note


def ratio(base: FloatArray, adapter: FloatArray, full: FloatArray) -> float:
    """(adapter − base) / (full − base) of means; NaN when full equals base (left out of the draws)."""
    gain = full.mean() - base.mean()
    return float((adapter.mean() - base.mean()) / gain) if gain != 0 else float("nan")
