"""Whether two groups differ: means that respect clusters, tests of their difference, corrections for many tests, power.

Values of one cluster (the two polarities of a direction) are no independent evidence: they are resampled, permuted and
counted in variances together. Shape legend: n values, C clusters, M measures of the same values, D draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lorascope.stats import FloatArray, false_discovery_rates, percentile_bounds, wilson_bounds

SLICE = 4_000_000
"""Random numbers that exist at once."""


@dataclass(frozen=True)
class Clustered:
    """Sums and numbers of the values of each cluster; a missing value adds nothing to either."""

    sums_CM: FloatArray
    counts_CM: FloatArray

    @property
    def means_M(self) -> FloatArray:
        """Mean of the values, NaN where there is none."""
        return ratio(self.sums_CM.sum(0), self.counts_CM.sum(0))


def cluster_values(values_nM: FloatArray, clusters: Sequence[object]) -> Clustered:
    """Values (NaN: missing) gathered by their cluster's label."""
    numbers = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    cluster_n = np.array([numbers[label] for label in clusters], dtype=np.int64)
    known_nM = np.isfinite(values_nM)
    sums_CM, counts_CM = (np.zeros((len(numbers), values_nM.shape[1])) for _ in range(2))
    np.add.at(sums_CM, cluster_n, np.where(known_nM, values_nM, 0.0))
    np.add.at(counts_CM, cluster_n, known_nM.astype(np.float64))
    return Clustered(sums_CM, counts_CM)


def ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    """above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def bootstrap_means(group: Clustered, rng: np.random.Generator, draws: int) -> FloatArray:
    """Bootstrap draws [D, M] of the means: clusters are drawn with replacement, the same ones for all measures."""
    many = len(group.sums_CM)
    out = np.empty((draws, group.sums_CM.shape[1]))
    rows = max(1, SLICE // max(1, many))
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        times_DC = rng.multinomial(many, np.full(many, 1 / many), size).astype(np.float64)
        out[start : start + size] = ratio(times_DC @ group.sums_CM, times_DC @ group.counts_CM)
    return out


def moments(group: Clustered) -> FloatArray:
    """What means and their variances are made of, per cluster, [C, 6 M]: sum, number, products, whether it has any."""
    s, n = group.sums_CM, group.counts_CM
    return np.concatenate([s, n, s * s, s * n, n * n, n > 0], axis=1)


def means_and_variances(totals: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Means and their variances [..., M] from totals [..., 6 M] of `moments`.

    The variance is that of a ratio of cluster totals, C/(C - 1) · Σ_c (S_c - m·n_c)² / N² (Cochran, Sampling
    Techniques, 1977, section 6.4): right also where the values of a cluster depend on each other.
    """
    s, n, ss, sn, nn, clusters = np.split(totals, 6, axis=-1)
    mean = ratio(s, n)
    spread = np.maximum(ss - 2 * mean * sn + mean**2 * nn, 0.0)
    return mean, ratio(spread, n * n) * ratio(clusters, clusters - 1)


@dataclass(frozen=True)
class Comparison:
    """Difference of two groups' means of one measure, its standard error, and the p-value of the permutation test."""

    difference: float
    standard_error: float
    p: float


def compare_means(first: Clustered, second: Clustered, rng: np.random.Generator, draws: int) -> list[Comparison]:
    """Differences first - second, one per measure, each tested two-sided by permuting whole clusters between groups.

    The statistic is the difference over its standard error, so that the test also holds where the groups differ in
    spread or in the size of their clusters (Chung and Romano, 2013, Annals of Statistics 41, 484-507). p is
    (1 + draws at least as large) / (1 + draws); NaN where a group has fewer than two clusters with a value.
    """
    moments_CK = np.concatenate([moments(first), moments(second)])
    total_K = moments_CK.sum(0)
    own_K = moments_CK[: len(first.sums_CM)].sum(0)
    difference_M, error_M, t_M = studentised(own_K, total_K)
    larger_M = np.zeros(len(t_M))
    label_C = np.zeros(len(moments_CK))
    label_C[: len(first.sums_CM)] = 1.0
    rows = max(1, SLICE // len(label_C))
    for start in range(0, draws, rows):
        labels_DC = rng.permuted(np.tile(label_C, (min(rows, draws - start), 1)), axis=1)
        found_DM = studentised(labels_DC @ moments_CK, total_K)[2]
        # a permutation without a statistic counts as larger, so that a small group never looks surer than it is
        larger_M += (~(np.abs(found_DM) < np.abs(t_M) * (1 - 1e-9))).sum(0)
    p_M = np.where(np.isfinite(error_M), (1 + larger_M) / (1 + draws), np.nan)
    return [Comparison(float(d), float(e), float(p)) for d, e, p in zip(difference_M, error_M, p_M, strict=True)]


@dataclass(frozen=True)
class PairedComparison:
    """Mean difference of pairs in one measure, its bootstrap draws [D], and the p-value of the sign-flip test."""

    pairs: int
    difference: float
    draws_D: FloatArray
    p: float


def compare_pairs(difference_PM: FloatArray, rng: np.random.Generator, draws: int) -> list[PairedComparison]:
    """Differences of pairs (NaN: one of the two is missing), each measure tested two-sided by flipping their signs.

    Without a difference each pair's is as likely to be of either sign (Fisher, The Design of Experiments, 1935,
    section 21). p is (1 + draws at least as far from 0) / (1 + draws); NaN for fewer than two pairs.
    """
    known_PM = np.isfinite(difference_PM)
    plain_PM = np.where(known_PM, difference_PM, 0.0)
    total_M, n_M = plain_PM.sum(0), known_PM.sum(0)
    larger_M = np.zeros(len(total_M))
    many = len(plain_PM)
    rows = max(1, SLICE // max(1, many))
    for start in range(0, draws, rows):
        signs_DP = rng.integers(0, 2, (min(rows, draws - start), many)) * 2.0 - 1.0
        larger_M += (np.abs(signs_DP @ plain_PM) >= np.abs(total_M) * (1 - 1e-9)).sum(0)
    resampled_DM = bootstrap_means(Clustered(plain_PM, known_PM.astype(np.float64)), rng, draws) if many else plain_PM
    p_M = np.where(n_M > 1, (1 + larger_M) / (1 + draws), np.nan)
    return [
        PairedComparison(int(n_M[k]), float(mean), resampled_DM[:, k], float(p_M[k]))
        for k, mean in enumerate(ratio(total_M, n_M.astype(np.float64)))
    ]


def studentised(own: FloatArray, total_K: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Difference of means, its standard error and their ratio, [..., M], of a group and of all others.

    Without any spread the ratio is 0 for equal means, else infinite.
    """
    (mean, variance), (other, other_variance) = (means_and_variances(part) for part in (own, total_K - own))
    difference, error = mean - other, np.sqrt(variance + other_variance)
    flat = error <= 1e-12
    t = np.divide(difference, error, out=np.full(error.shape, np.nan), where=~flat)
    return difference, error, np.where(flat, np.where(np.abs(difference) < 1e-12, 0.0, np.inf), t)


def two_sided(z: float) -> float:
    """Probability that a standard normal is at least as far from 0 as z."""
    return math.erfc(abs(z) / math.sqrt(2))


def proportions_p(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Two-sided p of the z-test of two proportions with pooled variance; takes every value as independent.

    z = (p₁ - p₂) / √(p(1 - p)(1/n₁ + 1/n₂)), p the pooled share (Fleiss, Levin and Paik, Statistical Methods for
    Rates and Proportions, 2003, section 3.1, without continuity correction). 1 where the pooled share is 0 or 1.

    Raises:
        ValueError: a group is empty.
    """
    if min(n, other_n) < 1:
        raise ValueError("Each group must have at least one value.")
    pooled = (hits + other_hits) / (n + other_n)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / other_n))
    return two_sided((hits / n - other_hits / other_n) / error) if error > 0 else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that any false finding among them has the stated probability (Holm, 1979); NaN stays."""
    p = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    out: NDArray[np.float64] = np.full(len(p), np.nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in out]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values: the smallest false discovery rate at which each is a finding (Benjamini, Hochberg, 1995); NaN stays."""
    p = np.asarray(p_values, dtype=np.float64)
    out, known = np.full(len(p), np.nan), np.isfinite(p)
    out[known] = false_discovery_rates(p[known])
    return [float(value) for value in out]


def smallest_difference(standard_error: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided test at `alpha` finds with probability `power`: (z₁₋α/₂ + z_power) · SE."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * standard_error


@dataclass(frozen=True)
class Share:
    """A share of features, its bootstrap draws [D], and how many clusters it is of."""

    value: float
    draws_D: FloatArray
    clusters: int

    @property
    def at_end(self) -> bool:
        """Whether it is 0 or 1, where neither bootstrap nor spread knows of any uncertainty."""
        return self.value in (0.0, 1.0)

    @property
    def bounds(self) -> tuple[float, float]:
        """Its interval by bootstrap; Wilson's, of clusters, at the ends."""
        if self.at_end:
            return wilson_bounds(self.value * self.clusters, self.clusters)
        return percentile_bounds(self.draws_D)


def difference_of_shares(first: Share, second: Share) -> tuple[tuple[float, float], float]:
    """The interval of first - second from each one's own, and the standard error that such an interval would have.

    After Zou and Donner (2008), Statistics in Medicine 27, 1693-1702.
    """
    (low, high), (other_low, other_high) = first.bounds, second.bounds
    below = math.hypot(first.value - low, other_high - second.value)
    above = math.hypot(high - first.value, second.value - other_low)
    difference = first.value - second.value
    return (difference - below, difference + above), (below + above) / (2 * NormalDist().inv_cdf(0.975))
