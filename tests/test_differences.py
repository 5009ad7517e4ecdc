"""Tests of difference against known answers, brute force and simulation."""

import math

import numpy as np
import pytest

from lorascope.differences import (
    Share,
    benjamini_hochberg,
    bootstrap_means,
    cluster_values,
    compare_means,
    compare_pairs,
    difference_of_shares,
    holm,
    proportions_p,
    smallest_difference,
    two_sided,
)
from lorascope.stats import bootstrap_mean, percentile_bounds

DIRECTIONS, NEURONS = (59, 146, 162), (49, 100, 227)
"""Features in classes 0, 1, 2 in the authors' repository (reference: arXiv 2511.06739, its public code)."""


def of_class(counts: tuple[int, int, int], wanted: int) -> np.ndarray:
    """1 for each feature of the wanted class, 0 for the others, [n, 1]."""
    return np.repeat([float(k == wanted) for k in range(3)], counts)[:, None]


@pytest.mark.parametrize(("wanted", "known", "precision"), [(0, 0.24, 0.005), (2, 1e-5, 5e-6)])
def test_the_authors_counts(wanted: int, known: float, precision: float) -> None:
    assert (sum(DIRECTIONS), sum(NEURONS)) == (367, 376)
    p = proportions_p(DIRECTIONS[wanted], 367, NEURONS[wanted], 376)
    assert p == pytest.approx(known, abs=precision)
    groups = [of_class(counts, wanted) for counts in (DIRECTIONS, NEURONS)]
    first, second = (cluster_values(values, range(len(values))) for values in groups)
    (found,) = compare_means(first, second, np.random.default_rng(0), 20_000)
    assert found.p == pytest.approx(p, abs=0.03 if wanted == 0 else 2e-4)
    assert found.difference == pytest.approx(DIRECTIONS[wanted] / 367 - NEURONS[wanted] / 376)


def test_two_sided_by_known_quantiles() -> None:
    assert two_sided(1.959964) == pytest.approx(0.05, abs=1e-6)
    assert two_sided(-2.575829) == pytest.approx(0.01, abs=1e-6)
    assert two_sided(0) == 1


def test_proportions_without_spread_do_not_differ() -> None:
    assert proportions_p(0, 10, 0, 20) == proportions_p(10, 10, 20, 20) == 1
    with pytest.raises(ValueError, match="at least one"):
        proportions_p(0, 0, 1, 2)


def test_holm_and_benjamini_hochberg_by_hand() -> None:
    p = [0.01, 0.04, 0.03, math.nan, 0.005]
    assert holm(p)[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert holm(p)[4] == pytest.approx(0.02)
    assert benjamini_hochberg(p)[:3] == pytest.approx([0.02, 0.04, 0.04])
    assert benjamini_hochberg(p)[4] == pytest.approx(0.02)
    assert math.isnan(holm(p)[3])
    assert math.isnan(benjamini_hochberg(p)[3])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert benjamini_hochberg([0.9, 0.8]) == [0.9, 0.9]
    assert holm([]) == benjamini_hochberg([]) == []


def test_missing_values_and_clusters_in_means() -> None:
    values = np.array([[1.0, 5.0], [3.0, np.nan], [np.nan, np.nan], [8.0, 7.0]])
    group = cluster_values(values, ["a", "a", "b", "c"])
    np.testing.assert_array_equal(group.sums_CM, [[4, 5], [0, 0], [8, 7]])
    np.testing.assert_array_equal(group.counts_CM, [[2, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(group.means_M, [4, 6])


def test_bootstrap_agrees_with_the_one_of_a_single_measure() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=120) + np.repeat(rng.normal(size=60), 2)
    clusters = np.repeat(np.arange(60), 2).tolist()
    draws = bootstrap_means(cluster_values(values[:, None], clusters), np.random.default_rng(2), 20_000)[:, 0]
    known = bootstrap_mean(values, rng=np.random.default_rng(3), clusters=clusters, draws=20_000)
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx([known.low, known.high], abs=0.01)


def test_the_permutation_test_is_that_over_all_permutations() -> None:
    """Few enough clusters for every way to choose the first group to be tried."""
    from itertools import combinations

    rng = np.random.default_rng(4)
    values, sizes = rng.normal(size=14), [2, 1, 2, 2, 1, 2, 1, 2, 1]
    values[:5] += 1.2
    clusters = np.repeat(np.arange(9), sizes)

    def statistic(chosen: tuple[int, ...]) -> float:
        parts = []
        for inside in (True, False):
            kept = [k for k in range(9) if (k in chosen) == inside]
            total = [values[clusters == k].sum() for k in kept]
            n = [sizes[k] for k in kept]
            mean = sum(total) / sum(n)
            spread = sum((s - mean * m) ** 2 for s, m in zip(total, n, strict=True))
            parts.append((mean, spread / sum(n) ** 2 * len(kept) / (len(kept) - 1)))
        return abs(parts[0][0] - parts[1][0]) / math.sqrt(parts[0][1] + parts[1][1])

    every = [statistic(chosen) for chosen in combinations(range(9), 3)]
    exact = np.mean([t >= statistic((0, 1, 2)) * (1 - 1e-9) for t in every])
    first, second = (cluster_values(values[part, None], clusters[part]) for part in (clusters < 3, clusters >= 3))
    (found,) = compare_means(first, second, np.random.default_rng(5), 40_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(values[clusters < 3].mean() - values[clusters >= 3].mean())


def test_polarities_that_agree_are_not_taken_for_more_evidence() -> None:
    """Every value stands twice: without clusters the test would find differences far too often."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.normal(size=40), 2)[:, None]
        for clustered in (True, False):
            labels = (np.arange(80) // 2 if clustered else np.arange(80)).tolist()
            parts = [cluster_values(values[part], labels[part]) for part in (slice(0, 40), slice(40, 80))]
            found[clustered].append(compare_means(parts[0], parts[1], rng, 400)[0].p)
    assert np.mean(np.array(found[True]) < 0.05) < 0.1
    assert np.mean(np.array(found[False]) < 0.05) > 0.12


def test_power_is_what_is_stated() -> None:
    """A true difference of the stated size is found in about 80% of the cases."""
    hits = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        error = math.sqrt(1 / 60 + 1 / 80)
        first, second = rng.normal(smallest_difference(error), 1, (60, 1)), rng.normal(0, 1, (80, 1))
        groups = [cluster_values(values, range(len(values))) for values in (first, second)]
        hits.append(compare_means(groups[0], groups[1], rng, 400)[0].p < 0.05)
    assert np.mean(hits) == pytest.approx(0.8, abs=0.08)


def test_groups_too_small_or_without_spread() -> None:
    one, some = cluster_values(np.array([[1.0]]), ["a"]), cluster_values(np.array([[0.0], [1.0]]), ["b", "c"])
    assert math.isnan(compare_means(one, some, np.random.default_rng(0), 100)[0].p)
    same = cluster_values(np.ones((9, 1)), range(9))
    assert compare_means(same, same, np.random.default_rng(0), 100)[0].p == 1
    apart = compare_means(same, cluster_values(np.zeros((9, 1)), range(9)), np.random.default_rng(0), 1000)[0]
    assert apart.p < 0.01


def test_the_sign_flip_test_is_that_over_all_flips() -> None:
    """Few enough pairs for every choice of signs to be tried; a missing one is left out."""
    from itertools import product

    values = np.array([0.3, -0.1, 0.4, 0.2, np.nan, 0.5, 0.1, -0.05])
    kept = values[np.isfinite(values)]
    sums = [abs(np.dot(signs, kept)) for signs in product((-1, 1), repeat=len(kept))]
    exact = np.mean(np.array(sums) >= abs(kept.sum()) * (1 - 1e-9))
    one, two = compare_pairs(np.stack([values, np.full(8, np.nan)], axis=1), np.random.default_rng(0), 40_000)
    assert (one.pairs, two.pairs) == (7, 0)
    assert one.p == pytest.approx(exact, abs=0.01)
    assert one.difference == pytest.approx(kept.mean())
    assert math.isnan(two.p)
    assert math.isnan(two.difference)
    ten = compare_pairs(np.ones((10, 1)), np.random.default_rng(0), 100_000)[0]
    assert ten.p == pytest.approx(2 / 2**10, abs=5e-4)
    assert compare_pairs(np.empty((0, 1)), np.random.default_rng(0), 100)[0].pairs == 0


def test_pairs_find_what_their_common_part_hides() -> None:
    """Two kinds that share much of each address, one 0.1 above: paired it is found, as if independent it is not."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, 30)
    first, second = (shared + shift + rng.normal(0, 0.05, 30) for shift in (0.1, 0.0))
    groups = [cluster_values(values[:, None], range(30)) for values in (first, second)]
    assert compare_means(groups[0], groups[1], rng, 1000)[0].p > 0.2
    assert compare_pairs((first - second)[:, None], rng, 1000)[0].p < 0.01


def test_shares_of_none_and_of_all_have_an_interval() -> None:
    rng = np.random.default_rng(0)
    none, all_ = Share(0.0, np.zeros(100), 12), Share(1.0, np.ones(100), 12)
    assert none.bounds == (0.0, pytest.approx(0.2425, abs=1e-4))  # Wilson, 0 of 12
    assert all_.bounds == (pytest.approx(1 - 0.2425, abs=1e-4), 1.0)
    draws_D = rng.normal(0.5, 0.1, 2000)
    assert Share(0.5, draws_D, 12).bounds == percentile_bounds(draws_D)
    # With Wilson's bounds it is method 10 of Newcombe, whose paper has this number (1998, Stat. Med. 17, 873-890).
    bounds, error = difference_of_shares(Share(0.0, np.zeros(1), 10), Share(0.0, np.zeros(1), 20))
    assert bounds == pytest.approx((-0.1611, 0.2775), abs=1e-4)
    assert error == pytest.approx((0.1611 + 0.2775) / (2 * 1.95996), abs=1e-4)
