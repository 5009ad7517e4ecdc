"""What goes into `clusters.json` and `maps.parquet`.

Shapes: P = points of a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lorascope.explain.categories.assign import Assignment
from lorascope.explain.categories.clusters import measure_agreement
from lorascope.explain.categories.kinds import Kind, explained_words
from lorascope.explain.categories.spaces import Space, add_up
from lorascope.features import cluster_of
from lorascope.store import Store
from lorascope.traces import SEGMENT_NAMES

CLUSTER_WORDS = 4


def describe_points(space: Space) -> dict[str, Any]:
    """A space's clusters for `clusters.json`: how many points, the silhouette of each number tried, the sizes."""
    sizes = np.bincount(space.label_P) if len(space.label_P) else np.zeros(0, np.int64)
    return {
        "kind": space.kind,
        "space": space.name,
        "points": len(space.point_P),
        "k": len(sizes),
        "silhouettes": {str(k): round(v, 4) for k, v in space.silhouettes.items()},
        "clusters": [{"cluster": c, "size": int(size)} for c, size in enumerate(sizes)],
    }


def describe_space(space: Space, kind: Kind, enough: int) -> dict[str, Any]:
    """`describe_points` of features, with why the others have no point, and the words that set each cluster apart."""
    few = int((kind.firings_F < enough).sum())
    unexplained = len(kind.firings_F) - few - len(space.point_P)
    described = describe_points(space) | {"too_few_firings": few, "without_explanation": unexplained}
    words_P = [add_up(explained_words(kind, int(p))) for p in space.point_P]
    everywhere: dict[str, float] = {}
    inside: list[dict[str, float]] = [{} for _ in described["clusters"]]
    for words, label in zip(words_P, space.label_P, strict=True):
        for word, weight in words.items():
            everywhere[word] = everywhere.get(word, 0.0) + weight
            inside[label][word] = inside[label].get(word, 0.0) + weight
    total = sum(everywhere.values())
    for cluster, words in zip(described["clusters"], inside, strict=True):
        # what the cluster says more often than all features do
        own = sum(words.values())
        more = {w: v - own * everywhere[w] / total for w, v in words.items()}
        cluster["words"] = [w for w in sorted(more, key=lambda w: (-more[w], w)) if more[w] > 0][:CLUSTER_WORDS]
    return described


def compare_spaces(
    spaces: Sequence[Space], assigned: Sequence[Assignment], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Agreement of each two clusterings of one kind on the features that both have, and of each with the categories."""
    names = list(dict.fromkeys(one.category for one in assigned if one.category is not None))
    labels: dict[str, dict[int, int]] = {
        space.name: dict(zip(space.point_P.tolist(), space.label_P.tolist(), strict=True)) for space in spaces
    }
    labels["categories"] = {f: names.index(one.category) for f, one in enumerate(assigned) if one.category is not None}
    pairs = [(a, b) for i, a in enumerate(labels) for b in list(labels)[i + 1 :]]
    rows: list[dict[str, Any]] = []
    for one, two in pairs:
        both = sorted(labels[one].keys() & labels[two].keys())
        if len(both) < 4:
            continue
        one_P, two_P = (np.array([labels[name][f] for f in both]) for name in (one, two))
        found = measure_agreement(one_P, two_P, [cluster_of(assigned[f].feature) for f in both], rng)
        rows.append({"kind": spaces[0].kind, "one": one, "two": two} | found)
    return rows


def map_table(space: Space, columns: dict[str, list[Any]]) -> pa.Table:
    """One space's rows of `maps.parquet`.

    Columns: `kind, space, x, y, cluster, feature, category, trace, position, text, segment`. A
    token has no feature and category, a feature no trace, position, text and segment.
    """
    n = len(space.point_P)
    types = {
        "feature": pa.string(),
        "category": pa.string(),
        "trace": pa.int32(),
        "position": pa.int32(),
        "text": pa.string(),
        "segment": pa.string(),
    }
    fixed = {
        "kind": pa.array([space.kind] * n, pa.string()),
        "space": pa.array([space.name] * n, pa.string()),
        "x": pa.array(space.map_P2[:, 0].astype(np.float32)),
        "y": pa.array(space.map_P2[:, 1].astype(np.float32)),
        "cluster": pa.array(space.label_P.astype(np.int32)),
    }
    return pa.table(fixed | {name: pa.array(columns.get(name, [None] * n), type_) for name, type_ in types.items()})


def feature_table(space: Space, kind: Kind, assigned: Sequence[Assignment]) -> pa.Table:
    """The map of features."""
    return map_table(
        space,
        {
            "feature": [kind.features.ids[p] for p in space.point_P],
            "category": [assigned[p].category for p in space.point_P],
        },
    )


def token_table(space: Space, store: Store, texts: Sequence[str]) -> pa.Table:
    """The map of tokens."""
    trace = store.token_traces(space.point_P)
    return map_table(
        space,
        {
            "trace": trace.tolist(),
            "position": (space.point_P - store.offsets[trace]).tolist(),
            "text": [texts[t] for t in np.asarray(store.tokens)[space.point_P]],
            "segment": [SEGMENT_NAMES[s] for s in np.asarray(store.segments)[space.point_P]],
        },
    )
