"""Whether two kinds of features differ: the tests of `lorascope compare`, and intervals of its means.

Shape legend: M measures, D draws, P pairs.
"""

import numpy as np

from lorascope.comparison_cells import MEASURES, Cell, Json
from lorascope.differences import (
    Share,
    cluster_values,
    compare_means,
    compare_pairs,
    difference_of_shares,
    proportions_p,
    ratio,
    smallest_difference,
)
from lorascope.features import DIFFERENCE, cluster_of
from lorascope.stats import FloatArray, percentile_bounds

TESTED = (
    *("score", "gain", "score_all", "fuzzing", "fuzzing_gain", "scored_share"),
    *("class_0", "class_1", "class_2", "reasoning"),
)
"""A score's gain is less the wrong explanation's: a kind that any explanation fits has a high score and no gain."""
OF_EXPLANATIONS = tuple(name for name in TESTED if name != "reasoning")
"""What depends on the text that explanations were learned from."""
PROPORTIONS = ("scored_share", "class_0", "class_1", "class_2")
ALL_SHARES = (*PROPORTIONS, "class_none")
PAIRED = ("random", "untrained", "base")
"""Kinds that have a feature, or several, at each direction's address."""
UNEVEN = 0.1
"""The share by which the text that two kinds' explanations were learned from may differ and they be compared: rules and
examples of more text are better ones."""


def is_pair(first: Cell, second: Cell) -> bool:
    """What is compared: directions with every other kind, and latents with neurons."""
    kinds = (first.kind, second.kind)
    return first.explainer == second.explainer and (
        kinds == ("latent", "neuron") or (first.kind == "direction" != second.kind)
    )


def unequal_text(first: Cell, second: Cell) -> Json | None:
    """Why two kinds cannot be compared, where explanations of one were learned from much less text than the other's."""
    one, two = first.learned, second.learned
    if one is None or two is None:
        return None
    tokens = [one.ordinary, two.ordinary]
    if min(tokens) >= (1 - UNEVEN) * max(tokens):
        return None
    if tokens[0] < tokens[1]:
        kind, other, run = first.kind, second.kind, one.as_much_as(two)
    else:
        kind, other, run = second.kind, first.kind, two.as_much_as(one)
    reason = f"{kind} explained from {min(tokens)} ordinary tokens of the training corpus, {other} from {max(tokens)}"
    return {"kind": kind, "tokens": tokens, "reason": reason, "run": run}


def means(cell: Cell) -> list[float]:
    """The mean of each measure."""
    return [float(value) for value in cell.clustered.means_M]


def with_value(cell: Cell, k: int) -> int:
    """How many clusters of a cell have a value of a measure."""
    return int((cell.clustered.counts_CM[:, k] > 0).sum())


def interval_of(mean: Share, is_share: bool = False) -> Json | None:
    """`{"value", "low", "high"}`, rounded; None without a value, and None as bounds of a single cluster's mean."""
    if not np.isfinite(mean.value):
        return None
    if is_share and mean.at_end:
        return rounded(mean.value, mean.bounds)
    return rounded(mean.value, percentile_bounds(mean.draws_D) if mean.clusters > 1 else (np.nan, np.nan))


def rounded(value: float, bounds: tuple[float, float]) -> Json:
    """`{"value", "low", "high"}`."""
    return {name: known_number(number) for name, number in zip(("value", "low", "high"), (value, *bounds), strict=True)}


def known_number(value: float) -> float | None:
    """A number to six significant figures; None when it is not finite."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def address_means(cell: Cell) -> dict[str, FloatArray]:
    """The mean [M] of a cell's features at each address of a direction: both polarities, both random families."""
    addresses = [cluster_of(name).removeprefix(f"{cell.kind}.").removesuffix(DIFFERENCE) for name in cell.ids]
    found = cluster_values(cell.values_nM, addresses)
    return dict(zip(dict.fromkeys(addresses), ratio(found.sums_CM, found.counts_CM), strict=True))


def paired_comparisons(first: Cell, second: Cell, many: int, seed: int) -> list[Json] | None:
    """For each measure, directions against what stands at the same addresses; None for a kind without such."""
    if (first.kind, second.kind) not in [("direction", kind) for kind in PAIRED]:
        return None
    one, two = address_means(first), address_means(second)
    difference_PM = np.array([one[address] - two[address] for address in one if address in two])
    name = f"paired {first.explainer} {first.kind} {second.kind} {first.group}".encode()
    rng = np.random.default_rng([seed, *name])
    found = compare_pairs(difference_PM.reshape(-1, len(MEASURES)), rng, many)
    return [
        {
            "addresses": pair.pairs,
            "difference": interval_of(Share(pair.difference, pair.draws_D, pair.pairs)),
            "p_uncorrected": known_number(pair.p),
        }
        for pair in found
    ]


def tests_of(first: Cell, second: Cell, draws_DM: FloatArray, other_DM: FloatArray, many: int, seed: int) -> list[Json]:
    """Tests of each measure that both cells have."""
    name = f"{first.explainer} {first.kind} {second.kind} {first.group}".encode()
    rng = np.random.default_rng([seed, *name])
    found = compare_means(first.clustered, second.clustered, rng, many)
    pairs, unequal = paired_comparisons(first, second, many, seed), unequal_text(first, second)
    cells, draws = (first, second), (draws_DM, other_DM)
    counts = [[int(n) for n in cell.clustered.counts_CM.sum(0)] for cell in cells]
    hits = [[round(float(s)) for s in cell.clustered.sums_CM.sum(0)] for cell in cells]
    tests = []
    for k, measure_name in enumerate(MEASURES):
        n, other_n = counts[0][k], counts[1][k]
        if measure_name not in TESTED or not n or not other_n:
            continue
        pooled, error = np.nan, found[k].standard_error
        # A single cluster tells nothing of how far another would be from it, on whichever side it stands.
        enough = all(with_value(cell, k) > 1 for cell in cells)
        bounds = percentile_bounds(draws_DM[:, k] - other_DM[:, k]) if enough else (np.nan, np.nan)
        if measure_name in PROPORTIONS:
            pooled = proportions_p(hits[0][k], n, hits[1][k], other_n)
            shares = [Share(means(c)[k], d[:, k], with_value(c, k)) for c, d in zip(cells, draws, strict=True)]
            if enough and any(share.at_end for share in shares):
                bounds, error = difference_of_shares(*shares)
        tests.append(
            {
                "explainer": first.explainer,
                "group": first.group,
                "measure": measure_name,
                "first": first.kind,
                "second": second.kind,
                "n": [n, other_n],
                "difference": rounded(found[k].difference, bounds),
                "p": known_number(found[k].p),
                "p_pooled_uncorrected": known_number(pooled),
                "detectable": known_number(smallest_difference(error)),
                "paired": pairs and pairs[k],
                "not_compared": unequal if measure_name in OF_EXPLANATIONS else None,
            }
        )
    return tests
