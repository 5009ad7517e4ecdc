"""Clusters and 2-D maps of vectors, and how far two clusterings agree. NumPy only; every draw takes a generator.

Shapes: P = points, Q = points of a sample, X = dimensions, K = clusters, A, B = clusters of two clusterings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
RANGE = range(2, 31)
"""Numbers of clusters that are tried."""
NEARLY = 0.01
"""A silhouette this close to the largest is as good: the fewest clusters that reach it are taken."""
COMPONENTS = 32
RESTARTS = 6
TRIED = 2
ROUNDS = 100
JUDGED = 1_000
"""Most points on which a silhouette is computed."""
PERMUTATIONS = 1_000


def leading_components(values_PX: NDArray[np.floating], count: int, rng: np.random.Generator) -> FloatArray:
    """Coordinates [P, at most count] along the leading principal components (about the mean), by subspace iteration.

    Exact up to rounding where `count` + 8 is at least the smaller side, else to about the gap between components.
    Signs are fixed: each component's largest coordinate in absolute value is positive. Equal vectors have no component.
    """
    centred_PX = values_PX - values_PX.mean(axis=0)
    size = min(count + 8, *centred_PX.shape)
    basis_PL = np.linalg.qr(centred_PX @ rng.normal(size=(centred_PX.shape[1], size)))[0]
    for _ in range(4):
        basis_PL = np.linalg.qr(centred_PX @ (centred_PX.T @ basis_PL))[0]
    u, s, _ = np.linalg.svd(basis_PL.T @ centred_PX, full_matrices=False)
    out_PK = (basis_PL @ u * s)[:, :count]
    out_PK = out_PK[:, s[:count] > max(1e-9 * s.max(initial=0.0), 1e-30)]
    largest = np.abs(out_PK).argmax(axis=0)
    signed: FloatArray = out_PK * np.sign(out_PK[largest, np.arange(out_PK.shape[1])])
    return signed


def k_means(points_PX: FloatArray, k: int, rng: np.random.Generator) -> IntArray:
    """Cluster of each point, int64 [P]: the best of `RESTARTS` runs of Lloyd's algorithm from k-means++ starts.

    Clusters are numbered by falling size. Fewer than `k` different points give fewer clusters.
    """
    best: tuple[float, IntArray] | None = None
    for _ in range(RESTARTS):
        label_P, spread = _lloyd(points_PX, _spread_starts(points_PX, k, rng))
        if best is None or spread < best[0] - 1e-12:
            best = (spread, label_P)
    assert best is not None
    return by_size(best[1])


def by_size(label_P: IntArray) -> IntArray:
    """The same clusters, numbered 0, 1, … by falling size."""
    names, inverse, counts = np.unique(label_P, return_inverse=True, return_counts=True)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
    return rank[inverse]


def _spread_starts(points_PX: FloatArray, k: int, rng: np.random.Generator) -> FloatArray:
    """Greedy k-means++: of a few points drawn in proportion to their squared distance from those chosen, the one
    that leaves the least of it."""
    chosen = [int(rng.integers(len(points_PX)))]
    near_P = squared_distances(points_PX, points_PX[chosen])[:, 0]
    while len(chosen) < k and near_P.sum() > 0:
        tried = rng.choice(len(points_PX), TRIED + int(np.log(k)), p=near_P / near_P.sum())
        left_PQ = np.minimum(near_P[:, None], squared_distances(points_PX, points_PX[tried]))
        best = int(left_PQ.sum(axis=0).argmin())
        chosen.append(int(tried[best]))
        near_P = left_PQ[:, best]
    return points_PX[chosen]


def _lloyd(points_PX: FloatArray, centre_KX: FloatArray) -> tuple[IntArray, float]:
    label_P = np.full(len(points_PX), -1)
    for _ in range(ROUNDS):
        distance_PK = squared_distances(points_PX, centre_KX)
        nearest_P = distance_PK.argmin(axis=1)
        if (nearest_P == label_P).all():
            break
        label_P = nearest_P
        member_KP = np.arange(len(centre_KX))[:, None] == label_P
        count_K = member_KP.sum(axis=1)
        moved_KX = member_KP @ points_PX / np.maximum(count_K, 1)[:, None]
        centre_KX = np.where(count_K[:, None] > 0, moved_KX, centre_KX)
    return label_P.astype(np.int64), float(squared_distances(points_PX, centre_KX).min(axis=1).sum())


def squared_distances(points_PX: FloatArray, other_QX: FloatArray) -> FloatArray:
    """Squared Euclidean distances [P, Q], at least 0."""
    square = (points_PX**2).sum(axis=1)[:, None] + (other_QX**2).sum(axis=1) - 2 * points_PX @ other_QX.T
    return np.maximum(square, 0.0)


def silhouette(distance_QQ: FloatArray, label_Q: IntArray) -> float:
    """Mean silhouette of a clustering: (b − a) / max(a, b), with a the mean distance to one's own cluster and b to the
    nearest other; 0 for a point alone in its cluster (Rousseeuw 1987). −1 for fewer than two clusters.
    """
    names, label_Q = np.unique(label_Q, return_inverse=True)
    if len(names) < 2:
        return -1.0
    member_QK = np.eye(len(names))[label_Q]
    count_K = member_QK.sum(axis=0)
    sum_QK = distance_QQ @ member_QK
    own = np.arange(len(label_Q)), label_Q
    size_Q = count_K[label_Q]
    within_Q = sum_QK[own] / np.maximum(size_Q - 1, 1)
    mean_QK = sum_QK / count_K
    mean_QK[own] = np.inf
    other_Q = mean_QK.min(axis=1)
    larger_Q = np.maximum(within_Q, other_Q)
    value_Q = np.where((size_Q > 1) & (larger_Q > 0), (other_Q - within_Q) / np.where(larger_Q > 0, larger_Q, 1), 0.0)
    return float(value_Q.mean())


def find_clusters(points_PX: FloatArray, rng: np.random.Generator) -> tuple[IntArray, dict[int, float]]:
    """The fewest clusters with a silhouette (on at most `JUDGED` points) within `NEARLY` of the largest.

    Returns:
        labels int64 [P], and the silhouette of each number tried; ({}, one cluster) for fewer than four points.
    """
    n = len(points_PX)
    if n < 4 or points_PX.shape[1] == 0:
        return np.zeros(n, np.int64), {}
    sample = np.sort(rng.permutation(n)[:JUDGED])
    distance_QQ = np.sqrt(squared_distances(points_PX[sample], points_PX[sample]))
    np.fill_diagonal(distance_QQ, 0.0)
    found = {k: k_means(points_PX, k, rng) for k in RANGE if k < n}
    values = {k: silhouette(distance_QQ, label_P[sample]) for k, label_P in found.items()}
    most = max(values.values())
    return found[min(k for k, value in values.items() if value >= most - NEARLY)], values


def adjusted_rand(one_P: IntArray, two_P: IntArray) -> float:
    """Adjusted Rand index of two clusterings of the same points: 1 equal, 0 as by chance (Hubert and Arabie 1985)."""
    columns = int(two_P.max()) + 1
    cells = (int(one_P.max()) + 1) * columns
    table_AB = np.bincount(one_P * columns + two_P, minlength=cells).reshape(-1, columns).astype(np.float64)
    pairs, rows, across, total = (
        float((x * (x - 1) / 2).sum()) for x in (table_AB, table_AB.sum(1), table_AB.sum(0), np.array([len(one_P)]))
    )
    expected = rows * across / total if total else 0.0
    most = (rows + across) / 2
    return 1.0 if most == expected else (pairs - expected) / (most - expected)


def measure_agreement(
    one_P: IntArray, two_P: IntArray, directions_P: Sequence[str], rng: np.random.Generator
) -> dict[str, float]:
    """Adjusted Rand index beside the same for labels dealt out anew: `{"value", "null_95", "p", "n"}`.

    The labels of a direction's polarities depend on each other, so whole directions change places, each with one that
    has as many points. `null_95` is the 95th percentile over `PERMUTATIONS`, `p` the share of them (and the observed
    one) that reach it.

    Args:
        directions_P: what each point is a polarity of; a latent is one of its own.
    """
    value = adjusted_rand(one_P, two_P)
    blocks = equal_blocks(directions_P)
    null = np.array([adjusted_rand(one_P, _deal_anew(two_P, blocks, rng)) for _ in range(PERMUTATIONS)])
    p = (1 + int((null >= value - 1e-12).sum())) / (1 + PERMUTATIONS)
    return {"value": value, "null_95": float(np.quantile(null, 0.95)), "p": p, "n": len(one_P)}


def equal_blocks(directions_P: Sequence[str]) -> list[IntArray]:
    """Numbers of the points of each direction, one table [directions, points] for each number of points that occurs."""
    members: dict[str, list[int]] = {}
    for number, direction in enumerate(directions_P):
        members.setdefault(direction, []).append(number)
    sizes = sorted({len(own) for own in members.values()})
    return [np.array([own for own in members.values() if len(own) == size], np.int64) for size in sizes]


def _deal_anew(label_P: IntArray, blocks: Sequence[IntArray], rng: np.random.Generator) -> IntArray:
    dealt_P = label_P.copy()
    for block in blocks:
        dealt_P[block] = label_P[rng.permutation(block)]  # rows change places, and stay whole
    return dealt_P


def weigh_words(words_P: Sequence[dict[str, float]], most: int = 2_000) -> FloatArray:
    """TF-IDF [P, words]: each point's weighted words times log(P / points with the word), rows of length 1.

    Only the `most` words of the largest number of points are kept, and those of one point alone are not.
    """
    counts: dict[str, int] = {}
    for entries in words_P:
        for word in entries:
            counts[word] = counts.get(word, 0) + 1
    kept = sorted((w for w, c in counts.items() if c > 1), key=lambda w: (-counts[w], w))[:most]
    numbers = {word: i for i, word in enumerate(kept)}
    out_PV = np.zeros((len(words_P), len(kept)))
    for row, entries in enumerate(words_P):
        for word, weight in entries.items():
            if word in numbers:
                out_PV[row, numbers[word]] = weight * np.log(len(words_P) / counts[word])
    return unit_rows(out_PV)


def unit_rows(values_PX: NDArray[np.floating]) -> FloatArray:
    """Rows scaled to length 1; zero rows stay."""
    length_P1 = np.linalg.norm(values_PX, axis=1, keepdims=True)
    scaled: FloatArray = np.asarray(values_PX, np.float64) / np.where(length_P1 > 0, length_P1, 1.0)
    return scaled
