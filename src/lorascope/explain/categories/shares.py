"""How large the categories are: by number of features, by firings, and by what is written, each with an interval.

Shapes: F = features, T = tokens of a chunk, R = traces (or clusters of features), G = groups, K = columns of a table of
shares, D = bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.categories.assign import Assignment
from lorascope.explain.categories.taxonomy import Taxonomy
from lorascope.explained import NO_ANSWER, NONE_FITS, WITHOUT
from lorascope.features import FeatureSet, cluster_of
from lorascope.stats import Interval, percentile_bounds, wilson_bounds

FloatArray = NDArray[np.float64]
DRAWS = 2_000
DRAW_CELLS = 1 << 22
Group = tuple[str, str | None]
"""Category and subcategory; None for a judge that named only the category, and for the groups without one."""


def make_groups(assigned: Sequence[Assignment], taxonomy: Taxonomy) -> tuple[list[Group], NDArray[np.int64]]:
    """The groups that may occur, in the taxonomy's order, and each feature's, int64 [F]."""
    found = [_group_of(one) for one in assigned]
    groups: list[Group] = []
    for category in taxonomy.categories:
        groups += [(category, sub.name) for sub in taxonomy.subcategories if sub.category == category]
        groups += [(category, None)] if (category, None) in found else []
    groups += [(outcome, None) for outcome in (NONE_FITS, NO_ANSWER, WITHOUT)]
    numbers = {group: number for number, group in enumerate(groups)}
    return groups, np.array([numbers[group] for group in found], np.int64)


def _group_of(one: Assignment) -> Group:
    if one.category is not None:
        return one.category, one.subcategory
    return one.outcome, None


def tally_traces(
    features: FeatureSet, level_F: NDArray[np.float32], worth_F: NDArray[np.float32], group_F: NDArray[np.int64], n: int
) -> tuple[FloatArray, FloatArray]:
    """Firings [R, G] and activation × worth [R, G] of each group in each trace, over ordinary tokens, in one pass.

    Args:
        level_F: a feature fires where its activation is above this.
        worth_F: length that one unit of activation writes (`Kind.worth_F`).
        group_F: each feature's group, of `n`.
    """
    store = features.store
    fires_RG, mass_RG = np.zeros((store.n_traces, n)), np.zeros((store.n_traces, n))
    member_FG = np.eye(n, dtype=np.float32)[group_F]
    weighted_FG = member_FG * worth_F[:, None]
    for start, acts_TF in features.chunks():
        acts_TF[~store.ordinary[start : start + len(acts_TF)]] = 0
        trace_T = store.token_traces(np.arange(start, start + len(acts_TF)))
        first, rows = int(trace_T[0]), np.searchsorted(trace_T, np.arange(trace_T[0], trace_T[-1] + 1))
        for total_RG, per_token_TG in (
            (fires_RG, (acts_TF > level_F).astype(np.float32) @ member_FG),
            (mass_RG, acts_TF @ weighted_FG),
        ):
            total_RG[first : first + len(rows)] += np.add.reduceat(per_token_TG.astype(np.float64), rows, axis=0)
    return fires_RG, mass_RG


def count_clusters(ids: Sequence[str], group_F: NDArray[np.int64], n: int) -> FloatArray:
    """Features of each group in each cluster [R, G]: the two polarities of a direction are one cluster."""
    numbers: dict[str, int] = {}
    row_F = np.array([numbers.setdefault(cluster_of(feature), len(numbers)) for feature in ids], np.int64)
    counts_RG = np.zeros((len(numbers), n))
    np.add.at(counts_RG, (row_F, group_F), 1)
    return counts_RG


def bootstrap_shares(
    values_RG: FloatArray, columns_GK: FloatArray, rng: np.random.Generator, *, counts: bool = False
) -> list[dict[str, float | None] | None]:
    """Each column's share of the total over groups, as `{"value", "low", "high"}`, resampling rows; None without any.

    Bounds are None where resampling changes nothing: of a single row, and of a share that is the same in all rows.

    Args:
        counts: rows are clusters of features that are counted, so that a share of 0 or 1 has Wilson's interval.
        values_RG: amounts per trace (or cluster) and group.
        columns_GK: which groups a column is the sum of, 0 or 1.
    """
    total_G = values_RG.sum(axis=0)
    total = float(total_G.sum())
    if total <= 0:
        return [None] * columns_GK.shape[1]
    rows = len(values_RG)
    size = max(1, DRAW_CELLS // rows)
    draws: list[FloatArray] = []
    for start in range(0, DRAWS, size):
        picked_DR = rng.multinomial(rows, np.full(rows, 1 / rows), min(size, DRAWS - start))
        drawn_DG = picked_DR @ values_RG
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append(drawn_DG @ columns_GK / drawn_DG.sum(axis=1, keepdims=True))
    share_DK = np.concatenate(draws)
    value_K = total_G @ columns_GK / total
    return [
        Interval(
            float(value),
            *(wilson_bounds(value * rows, rows) if counts and value in (0.0, 1.0) else percentile_bounds(draw_D)),
        ).as_dict()
        for value, draw_D in zip(value_K, share_DK.T, strict=True)
    ]


def share_rows(
    ids: Sequence[str],
    groups: Sequence[Group],
    group_F: NDArray[np.int64],
    fires_RG: FloatArray,
    mass_RG: FloatArray,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """One row per category (subcategory None), its subcategories after it; `{"category", "subcategory", "n", "count",
    "rate", "mass"}`, the last three as `bootstrap_shares` gives them.

    `count` is of all features and resamples features (directions whole), `rate` is of all firings and `mass` of all
    that is written; both resample traces.
    """
    keys: list[Group] = []
    for category in dict.fromkeys(group[0] for group in groups):
        inner = [group for group in groups if group[0] == category]
        keys += [(category, None), *(group for group in inner if group[1] is not None)]
    columns_GK = np.array([[float(g == key or (key[1] is None and g[0] == key[0])) for key in keys] for g in groups])
    n_K = np.bincount(group_F, minlength=len(groups)) @ columns_GK
    shares = {
        "count": bootstrap_shares(count_clusters(ids, group_F, len(groups)), columns_GK, rng, counts=True),
        "rate": bootstrap_shares(fires_RG, columns_GK, rng),
        "mass": bootstrap_shares(mass_RG, columns_GK, rng),
    }
    return [
        {"category": key[0], "subcategory": key[1], "n": int(n_K[k])} | {name: s[k] for name, s in shares.items()}
        for k, key in enumerate(keys)
    ]
