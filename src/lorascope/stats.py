"""Intervals, mostly by bootstrap. Every random draw takes an explicit generator.

Names: n = samples, D = draws, S = seeds, M = what is measured on the same samples and seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
DRAWS = 10_000
ROUNDING = 1e-12
"""Relative difference that sums in another order may have; differences of scores near 0 have it of a tenth."""


@dataclass(frozen=True)
class Interval:
    """A value with its percentile-bootstrap interval; both bounds are NaN where there is none."""

    value: float
    low: float
    high: float

    def as_dict(self, value_name: str = "value") -> dict[str, float | None]:
        """`{"value", "low", "high"}`, or with another name for the value (`accuracy`, `mean`); None for NaN."""
        return {value_name: known(self.value), "low": known(self.low), "high": known(self.high)}

    def rounded(self, digits: int, value_name: str = "value") -> dict[str, float | None]:
        """`as_dict` with rounded numbers."""
        return Interval(*(round(number, digits) for number in (self.value, self.low, self.high))).as_dict(value_name)


def known(value: float) -> float | None:
    """A number for JSON: None when it is not finite."""
    return float(value) if math.isfinite(value) else None


def bootstrap_statistic(
    n: int,
    statistic: Callable[[NDArray[np.int64]], float],
    *,
    rng: np.random.Generator,
    draws: int = 2_000,
    level: float = 0.95,
) -> Interval:
    """Interval of any statistic of the row numbers 0..n-1, by resampling rows with replacement.

    `statistic` takes an index array [n] and returns a number; draws that give NaN are left out.
    """
    value = float(statistic(np.arange(n)))
    samples = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)], dtype=np.float64)
    return Interval(value, *percentile_bounds(samples, level))


def percentile_bounds(samples_D: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of the draws, ignoring NaN; NaN bounds when nothing is left, or when they have no width.

    Resampling one row (or rows that are all alike) gives one and the same draw: that tells nothing of how far off it
    may be, so that there is no interval, where one of no width would look like certainty.
    """
    samples_D = samples_D[np.isfinite(samples_D)]
    if len(samples_D) == 0:
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(samples_D, [tail, 1 - tail])
    if high - low <= ROUNDING * max(abs(low), abs(high), 0.1):
        return float("nan"), float("nan")
    return float(low), float(high)


def wilson_bounds(hits: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a share, hits of n (Wilson, 1927, JASA 22, 209-212): of some width also at 0 and at 1.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n). ValueError without values.
    """
    if n < 1:
        raise ValueError("A share needs at least one value.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, spare = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + spare / (4 * n))
    low, high = (p + spare / 2 - half) / (1 + spare), (p + spare / 2 + half) / (1 + spare)
    return 0.0 if hits == 0 else low, 1.0 if hits == n else high  # exactly, whatever rounding says


def alike_bounds(value: float, n: int, least: float, most: float) -> tuple[float, float]:
    """Bounds of the mean of n values that are all `value`, where others might have been from `least` to `most`.

    At most the share w of all values is another, w being the upper end of Wilson's interval of 0 of n; at worst these
    are all `least`, or all `most`. For shares of 0 and 1 this is Wilson's interval.
    """
    w = wilson_bounds(0, n)[1]
    return value - w * (value - least), value + w * (most - value)


def bootstrap_mean(
    values_n: Sequence[float] | FloatArray,
    *,
    rng: np.random.Generator,
    clusters: Sequence[object] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Interval:
    """Mean of values with its interval; `clusters` (one label per value) are resampled whole.

    The two polarities of one direction, or the seeds of one problem, are one cluster. No bounds of a single cluster, or
    of clusters that are all alike.
    """
    values = np.asarray(values_n, dtype=np.float64)
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    labels = list(clusters) if clusters is not None else list(range(len(values)))
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    cluster_n = np.array([numbers[label] for label in labels])
    sums = np.bincount(cluster_n, weights=values, minlength=len(numbers)).astype(np.float64)
    counts = np.bincount(cluster_n, minlength=len(numbers)).astype(np.float64)
    return bootstrap_ratio(sums, counts, rng=rng, draws=draws, level=level)


def bootstrap_ratio(
    numerator_n: Sequence[float] | FloatArray,
    denominator_n: Sequence[float] | FloatArray,
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Interval:
    """sum(numerator) / sum(denominator) with its interval over rows (traces, clusters): a pooled mean.

    No bounds of a single row that counts, or of rows that are all alike.
    """
    numerator = np.asarray(numerator_n, dtype=np.float64)
    denominator = np.asarray(denominator_n, dtype=np.float64)
    total = denominator.sum()
    if len(numerator) == 0 or total == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = percentile_bounds(ratio_draws(numerator, denominator, rng, draws), level)
    return Interval(float(numerator.sum() / total), low, high)


def ratio_draws(numerator_n: FloatArray, denominator_n: FloatArray, rng: np.random.Generator, draws: int) -> FloatArray:
    """Bootstrap draws [D] of sum(numerator) / sum(denominator), in slices so that memory stays flat."""
    n = len(numerator_n)
    out = np.empty(draws)
    rows = max(1, 1_000_000 // n)
    for start in range(0, draws, rows):
        pick = rng.integers(0, n, (min(rows, draws - start), n))
        with np.errstate(invalid="ignore", divide="ignore"):
            out[start : start + rows] = numerator_n[pick].sum(1) / denominator_n[pick].sum(1)
    return out


def bootstrap_crossed(values_nS: FloatArray, *, rng: np.random.Generator, draws: int = DRAWS) -> Interval:
    """Mean of values with its interval over samples and seeds, as `crossed_draws`; one seed is `bootstrap_mean`."""
    if values_nS.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = percentile_bounds(crossed_draws(values_nS[:, :, None], rng, draws)[:, 0])
    return Interval(float(values_nS.mean()), low, high)


def crossed_draws(values_nSM: FloatArray, rng: np.random.Generator, draws: int = DRAWS) -> FloatArray:
    """Bootstrap draws [D, M] of means: each draw takes samples anew, then seeds, the same ones for all M.

    Seeds are taken whole, for a seed may go well or badly on all samples. Where they do not, the intervals are
    somewhat wider than need be (what is left of sample and seed is counted up to three times).
    """
    n, seeds, many = values_nSM.shape
    out = np.empty((draws, many))
    rows = max(1, 4_000_000 // values_nSM.size)
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        means = values_nSM[rng.integers(0, n, (count, n))].sum(1) / n
        if seeds > 1:
            pick = rng.integers(0, seeds, (count, seeds))
            out[start : start + count] = np.take_along_axis(means, pick[:, :, None], axis=1).mean(1)
        else:
            out[start : start + count] = means[:, 0]
    return out


def false_discovery_rates(p_F: Sequence[float] | FloatArray) -> FloatArray:
    """Benjamini-Hochberg q-values [F]: rejecting all q <= x keeps the expected share of false ones at most x.

    After Benjamini and Hochberg (1995); holds for independent and for positively dependent p-values.
    """
    p = np.asarray(p_F, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1]  # never above 1: the largest p is scaled by 1
    return q
