"""Which tokens a feature's examples stand on and before, and how densely it fires in each segment."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorascope.features import FeatureSet
from lorascope.store import INDEX, Store
from lorascope.traces import SEGMENT_NAMES
from lorascope.views.kept import stamp
from lorascope.views.reading import Json

MOST = 8
"""Tokens listed, the commonest."""


def tokens_around(features: FeatureSet, texts: list[str], rows: list[Json]) -> Json:
    """The tokens that a feature's examples fire on and those that follow, by how often they do.

    Args:
        texts: readable text of every vocabulary id.
        rows: the feature's rows of the table of examples.

    Returns:
        `{"examples": how many different ones, "in": [{"text", "count"}], "out": [{"text", "count"}]}`; an example on
        the last token of its trace has nothing that follows.
    """
    store = features.store
    places = np.unique([store.offsets[row["trace"]] + row["position"] for row in rows]).astype(np.int64)
    ends = store.offsets[store.token_traces(places) + 1]
    followed = places[places + 1 < ends]
    return {
        "examples": len(places),
        "in": commonest(store.tokens[places], texts),
        "out": commonest(store.tokens[followed + 1], texts),
    }


def commonest(ids: npt.NDArray[np.int32], texts: list[str]) -> list[Json]:
    """The commonest token ids as `{"text", "count"}`, at most `MOST`; of equally common ones the lower id first."""
    found, counts = np.unique(ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST]
    return [{"text": texts[found[i]] if found[i] < len(texts) else "", "count": int(counts[i])} for i in order]


def segment_densities(features: FeatureSet, stats: Json) -> dict[str, float | None]:
    """Firings in each segment ÷ its ordinary tokens; None for a segment without any.

    Args:
        stats: the feature's row of the table of statistics.
    """
    folder = features.store.folder
    tokens = ordinary_tokens(folder, *stamp(folder / INDEX))
    return {
        name: stats[f"share_{name}"] * stats["n_firing"] / tokens[name] if tokens[name] else None
        for name in SEGMENT_NAMES
        if f"share_{name}" in stats
    }


@lru_cache(maxsize=8)
def ordinary_tokens(folder: Path, size: int, modified: int) -> dict[str, int]:
    """How many ordinary tokens each segment has, of one state of a store."""
    store = Store.open(folder)
    counts = np.bincount(store.segments[store.ordinary], minlength=len(SEGMENT_NAMES))
    return {name: int(count) for name, count in zip(SEGMENT_NAMES, counts, strict=True)}
