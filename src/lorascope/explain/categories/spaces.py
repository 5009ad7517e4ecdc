"""The spaces in which features lie: their explanations, decoder rows, co-activation; and the raw states of tokens.

Shapes: P = points (features or tokens), X = dimensions, T = sampled tokens, N = directions, F = features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.addresses import direction_layer, direction_type
from lorascope.explain.categories.clusters import (
    COMPONENTS,
    FloatArray,
    IntArray,
    find_clusters,
    leading_components,
    weigh_words,
)
from lorascope.features import FeatureSet
from lorascope.layers import layer_third
from lorascope.store import Store

TOKENS = 4_096
"""Most tokens from which co-activation is measured."""
STATES = 1_500
"""Most tokens on the map of raw states."""
OUTSIDE = "outside the layers"
Place = Callable[[FloatArray], FloatArray]
"""From coordinates [P, X] to a map [P, 2]."""


@dataclass(frozen=True)
class Space:
    """Points of one kind in one space: which (numbers of features, or tokens of the store), clusters, and a map."""

    kind: str
    name: str
    point_P: IntArray
    label_P: IntArray
    map_P2: FloatArray
    silhouettes: dict[int, float]


def make_space(
    kind: str, name: str, point_P: IntArray, vectors_PX: NDArray[np.floating], place: Place, rng: np.random.Generator
) -> Space:
    """Clusters and map of vectors, both on their leading principal components; one cluster where all are equal."""
    points_PX = leading_components(vectors_PX, COMPONENTS, rng) if len(point_P) > 1 else np.zeros((len(point_P), 0))
    if points_PX.shape[1] == 0:
        return Space(kind, name, point_P, np.zeros(len(point_P), np.int64), np.zeros((len(point_P), 2)), {})
    label_P, silhouettes = find_clusters(points_PX, rng)
    return Space(kind, name, point_P, label_P, (place if len(point_P) > 3 else first_two)(points_PX), silhouettes)


def first_two(points_PX: FloatArray) -> FloatArray:
    """The map by principal components: the first two coordinates [P, 2], 0 where there are fewer."""
    out_P2 = np.zeros((len(points_PX), 2))
    out_P2[:, : points_PX.shape[1]] = points_PX[:, :2]
    return out_P2


def add_up(entries: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Weighted words with the weights of equal words added, in lower case and without spaces around them."""
    total: dict[str, float] = {}
    for text, weight in entries:
        word = text.strip(" ").casefold() or text
        total[word] = total.get(word, 0.0) + weight
    return total


def explanation_vectors(words_P: Sequence[Sequence[tuple[str, float]]]) -> FloatArray:
    """TF-IDF of the explanations' words [P, words]."""
    return weigh_words([add_up(entries) for entries in words_P])


def activity_vectors(features: FeatureSet, point_P: IntArray) -> NDArray[np.float32]:
    """Activations over at most `TOKENS` evenly spaced ordinary tokens, each feature about its mean and of length 1,
    [P, T]: dot products are correlations."""
    at_T = spaced_tokens(features.store, TOKENS)
    acts_PT = features.encode(features.store.rows(at_T), point_P).T
    acts_PT = acts_PT - acts_PT.mean(axis=1, keepdims=True)
    unit_PT: NDArray[np.float32] = acts_PT / np.maximum(np.linalg.norm(acts_PT, axis=1, keepdims=True), 1e-30)
    return unit_PT


def state_vectors(store: Store, at_T: IntArray) -> NDArray[np.float32]:
    """Effects of all directions at some tokens, [T, N]."""
    return store.rows(at_T) * store.effect_per_scalar


def spaced_tokens(store: Store, most: int) -> IntArray:
    """At most so many evenly spaced ordinary tokens of the store."""
    at_T = np.flatnonzero(store.ordinary)
    return at_T[:: max(1, -(-len(at_T) // most))]


def layer_thirds(addresses: Sequence[str], count: int) -> list[str]:
    """The third of the model's layers that each direction is in; a module outside the layers is called so."""
    layers = [direction_layer(a) for a in addresses]
    return [OUTSIDE if layer is None else f"{layer_third(layer, count)} third" for layer in layers]


def flow_rows(
    addresses: Sequence[str], count: int, decoder_FN: NDArray[np.floating], group_F: Sequence[tuple[str, str | None]]
) -> list[dict[str, Any]]:
    """From matrix types and layer thirds through groups of latents to categories, a row each.

    Args:
        count: the model's layers.
        decoder_FN: in a unit that is the same for all types: effect relative to the base's own outputs.

    Returns:
        `{"type", "third", "category", "subcategory", "latents", "weight"}`: the weight is the sum of |decoder|
        over the latents of the group and the directions of that type and third.
    """
    thirds = layer_thirds(addresses, count)
    places = [(direction_type(a), third) for a, third in zip(addresses, thirds, strict=True)]
    order = list(dict.fromkeys(places))
    into_NP = np.eye(len(order))[[order.index(place) for place in places]]
    weight_FP = np.abs(decoder_FN) @ into_NP
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, group in enumerate(group_F):
        groups.setdefault(group, []).append(number)
    return [
        {
            "type": type_,
            "third": third,
            "category": category,
            "subcategory": subcategory,
            "latents": len(members),
            "weight": float(weight_FP[members, p].sum()),
        }
        for (category, subcategory), members in groups.items()
        for p, (type_, third) in enumerate(order)
    ]
