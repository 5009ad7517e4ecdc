"""AUROC: how often a score is higher at a positive than at a negative, ties counted half.

Shape legend: P places (positives and negatives), B features, G groups of equal score.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lorascope.reasoning.words import Mask
from lorascope.stats import FloatArray
from lorascope.store import Floats


def column_aurocs(scores_PB: Floats, positive_P: Mask) -> FloatArray:
    """AUROC of each column, float64 [B]; NaN without positives or negatives."""
    pos_MB, neg_MB = scores_PB[positive_P], np.sort(scores_PB[~positive_P], axis=0)
    if not len(pos_MB) or not len(neg_MB):
        return np.full(scores_PB.shape[1], np.nan)
    below_B = np.array(
        [
            (np.searchsorted(neg, pos, "left") + np.searchsorted(neg, pos, "right")).mean() / 2
            for pos, neg in zip(pos_MB.T, neg_MB.T, strict=True)
        ]
    )
    return below_B / len(neg_MB)


def weighted_auroc(score_P: npt.NDArray[np.floating], positive_P: Mask) -> Callable[[FloatArray], float]:
    """AUROC of one score as a function of weights [P], for resampling: the places are sorted once.

    Its value is NaN when the positives or the negatives have no weight.
    """
    group_P = np.unique(score_P, return_inverse=True)[1]
    count = int(group_P.max(initial=-1)) + 1

    def measure(weight_P: FloatArray) -> float:
        pos_G = np.bincount(group_P, weight_P * positive_P, count)
        neg_G = np.bincount(group_P, weight_P * ~positive_P, count)
        pairs = pos_G.sum() * neg_G.sum()
        if pairs == 0:
            return float("nan")
        return float((pos_G * (np.cumsum(neg_G) - neg_G / 2)).sum() / pairs)

    return measure
