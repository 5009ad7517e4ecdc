"""Clusters, silhouettes, agreement and principal components: planted clusters, brute force, published values."""

import numpy as np
import pytest

from lorascope.explain.categories.clusters import (
    adjusted_rand,
    equal_blocks,
    find_clusters,
    k_means,
    leading_components,
    measure_agreement,
    silhouette,
    squared_distances,
    weigh_words,
)


def planted_points(k: int, seed: int, apart: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Points around k corners of a simplex, of unequal sizes."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(k), 20 + 10 * np.arange(k))
    points = apart * np.eye(k, 12)[truth] + rng.normal(size=(len(truth), 12))
    order = rng.permutation(len(truth))
    return points[order], truth[order]


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_planted_clusters_are_found_with_their_number(k: int) -> None:
    points, truth = planted_points(k, seed=k)
    labels, values = find_clusters(points, np.random.default_rng(0))
    assert labels.max() + 1 == k
    assert adjusted_rand(labels, truth) == 1.0
    assert values[k] == max(values.values()) > 0.5
    assert (np.diff(np.bincount(labels)) <= 0).all()  # numbered by size


def test_more_clusters_than_a_dozen_are_found_and_a_tie_goes_to_the_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.repeat(np.arange(20), 12)
    points = 12.0 * np.eye(20)[truth] + np.random.default_rng(0).normal(size=(len(truth), 20))
    labels, values = find_clusters(points, np.random.default_rng(0))
    assert labels.max() + 1 == 20
    assert adjusted_rand(labels, truth) == 1.0
    assert max(values) == 30
    scores = iter([0.30, 0.395, 0.39, 0.40, *[0.2] * 30])
    monkeypatch.setattr("lorascope.explain.categories.clusters.silhouette", lambda *_: next(scores))
    assert find_clusters(points, np.random.default_rng(0))[0].max() + 1 == 3


def test_clusters_are_the_same_for_the_same_seed_and_survive_equal_points() -> None:
    points, _ = planted_points(4, seed=1, apart=2.0)
    one, two = (find_clusters(points, np.random.default_rng(3))[0] for _ in range(2))
    assert (one == two).all()
    assert k_means(np.zeros((9, 2)), 3, np.random.default_rng(0)).max() == 0
    few, values = find_clusters(np.zeros((3, 2)), np.random.default_rng(0))
    assert few.tolist() == [0, 0, 0]
    assert values == {}


def test_k_means_is_a_fixed_point_of_its_own_step() -> None:
    points, _ = planted_points(3, seed=2, apart=1.0)
    labels = k_means(points, 5, np.random.default_rng(0))
    centres = np.stack([points[labels == k].mean(axis=0) for k in range(5)])
    assert (squared_distances(points, centres).argmin(axis=1) == labels).all()


def test_silhouette_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(40, 3)), np.append(rng.integers(0, 3, 39), 3)  # the last point is alone
    distance = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))
    each = []
    for i, own in enumerate(labels):
        mates = [j for j in np.flatnonzero(labels == own) if j != i]
        if not mates:
            each.append(0.0)
            continue
        a = distance[i, mates].mean()
        b = min(distance[i, labels == other].mean() for other in set(labels.tolist()) - {own})
        each.append((b - a) / max(a, b))
    assert silhouette(distance, labels) == pytest.approx(np.mean(each), abs=1e-12)
    assert silhouette(distance, np.zeros(40, np.int64)) == -1.0


def test_adjusted_rand_of_known_tables() -> None:
    a = np.array
    assert adjusted_rand(a([0, 0, 1, 1]), a([1, 1, 0, 0])) == 1.0
    assert adjusted_rand(a([0, 0, 1, 1]), a([0, 0, 1, 2])) == pytest.approx(4 / 7)
    assert adjusted_rand(a([0, 0, 0, 0]), a([0, 1, 2, 3])) == 0.0
    assert adjusted_rand(a([0, 1, 0, 1]), a([0, 0, 1, 1])) == pytest.approx(-0.5)
    # the table of Hubert and Arabie's formula worked by hand: [[1, 1, 0], [1, 2, 1], [0, 0, 4]]
    one, two = a([0, 0, 1, 1, 1, 1, 2, 2, 2, 2]), a([0, 1, 0, 1, 1, 2, 2, 2, 2, 2])
    assert adjusted_rand(one, two) == pytest.approx((7 - 13 * 14 / 45) / (13.5 - 13 * 14 / 45))


def test_agreement_has_a_null() -> None:
    rng = np.random.default_rng(0)
    one, alone = rng.integers(0, 4, 300), [str(k) for k in range(300)]
    same = measure_agreement(one, (one + 1) % 4, alone, rng)
    assert same["value"] == 1.0
    assert same["p"] < 0.002
    assert abs(same["null_95"]) < 0.02
    chance = [measure_agreement(one, rng.integers(0, 4, 300), alone, rng)["p"] for _ in range(20)]
    assert 0.25 < np.mean(chance) < 0.75  # p is uniform where nothing agrees


def test_agreement_deals_out_whole_directions() -> None:
    """Three directions whose polarities always share a label: one of three places for the lone one gives the groups.

    Dealt out point by point there are 6 · 5 / 2 = 15 ways to place its two.
    """
    rng = np.random.default_rng(0)
    one, two = np.array([0, 0, 1, 1, 1, 1]), np.array([1, 1, 0, 0, 0, 0])
    pairs = ["a", "a", "b", "b", "c", "c"]
    found = measure_agreement(one, two, pairs, rng)
    assert (found["value"], found["n"]) == (1.0, 6)
    assert found["p"] == pytest.approx(1 / 3, abs=0.05)
    assert measure_agreement(one, two, list("abcdef"), rng)["p"] == pytest.approx(1 / 15, abs=0.03)
    # a direction of which one polarity is there changes places with others of that kind only
    blocks = equal_blocks(["a", "b", "a", "c", "d", "d"])
    assert [block.tolist() for block in blocks] == [[[1], [3]], [[0, 2], [4, 5]]]


def test_dependent_polarities_are_no_evidence_of_agreement() -> None:
    """Labels by direction, equal on both polarities, and nothing in common: p is uniform, one by one it is not."""
    rng = np.random.default_rng(1)
    names = [f"L{k}" for k in range(40) for _ in "+-"]
    whole, single = [], []
    for _ in range(40):
        one, two = (np.repeat(rng.integers(0, 3, 40), 2) for _ in range(2))
        whole.append(measure_agreement(one, two, names, rng)["p"])
        single.append(measure_agreement(one, two, [str(k) for k in range(80)], rng)["p"])
    assert np.mean(np.array(whole) < 0.1) < 0.25
    assert np.mean(np.array(single) < 0.1) > np.mean(np.array(whole) < 0.1)


def test_components_are_those_of_the_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 30)) * 0.8 ** np.arange(30)
    centred = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = leading_components(values, 5, np.random.default_rng(1))
    assert found.shape == (60, 5)
    assert np.allclose(np.abs(found), np.abs(u * s)[:, :5], rtol=1e-2, atol=1e-2)
    exact = leading_components(values, 30, np.random.default_rng(1))
    assert np.allclose(squared_distances(exact, exact), squared_distances(values, values), atol=1e-8)
    assert leading_components(np.ones((7, 4)), 3, rng).shape == (7, 0)
    assert leading_components(np.ones((7, 0)), 3, rng).shape == (7, 0)


def test_words_are_weighed_by_rarity() -> None:
    found = weigh_words([{"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 1.0}, {"b": 1.0}, {"d": 1.0}])
    idf = np.log(4 / 2)
    length = np.hypot(idf, 2 * idf)
    assert found.tolist() == pytest.approx(np.array([[idf / length, 2 * idf / length], [1, 0], [0, 1], [0, 0]]))
