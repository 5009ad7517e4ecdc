"""Which tokens a feature's examples stand on and before, and how densely it fires in each segment."""

from collections import Counter

import numpy as np
import numpy.typing as npt

from lorascope.features import FeatureSet
from lorascope.token_text import TokenTable, vocabulary_text
from lorascope.traces import SEGMENT_NAMES
from lorascope.views.reading import Json

MOST = 8
"""Tokens listed, the commonest."""
NOTHING_AROUND: Json = {"examples": 0, "in": [], "out": []}


def tokens_around(features: FeatureSet, vocabulary: TokenTable, rows: list[Json]) -> Json:
    """The tokens that a feature's examples fire on and those that follow, by how often they do.

    Args:
        rows: the feature's rows of the table of examples.

    Returns:
        `{"examples": how many different ones, "in": [{"text", "count"}], "out": [{"text", "count"}]}`; an example on
        the last token of its trace has nothing that follows.
    """
    store = features.store
    places = np.array(sorted({int(store.offsets[row["trace"]]) + row["position"] for row in rows}), np.int64)
    ends = store.offsets[store.token_traces(places) + 1]
    followed = places[places + 1 < ends]
    return {
        "examples": len(places),
        "in": commonest(store.tokens[places], vocabulary),
        "out": commonest(store.tokens[followed + 1], vocabulary),
    }


def commonest(ids: npt.NDArray[np.int32], vocabulary: TokenTable) -> list[Json]:
    """The commonest token ids as `{"text", "count"}`, at most `MOST`; of equally common ones the lower id first."""
    counts = sorted(Counter(ids.tolist()).items(), key=lambda found: (-found[1], found[0]))
    return [{"text": vocabulary_text(vocabulary, number), "count": count} for number, count in counts[:MOST]]


def segment_densities(features: FeatureSet, stats: Json) -> dict[str, float | None]:
    """Firings in each segment ÷ its ordinary tokens; None for a segment without any.

    Args:
        stats: the feature's row of the table of statistics.
    """
    tokens = dict(zip(SEGMENT_NAMES, features.store.ordinary_by_segment, strict=True))
    return {
        name: stats[f"share_{name}"] * stats["n_firing"] / tokens[name] if tokens[name] else None
        for name in SEGMENT_NAMES
        if f"share_{name}" in stats
    }
