"""What stands near a feature: by the cosine of its vectors, and by what else fires where it fires.

Shape legend: M sampled firings, F features, N directions, D width of the residual stream.
"""

import numpy as np
import numpy.typing as npt

from lorascope.addresses import WRITE, rank_addresses, side_of
from lorascope.errors import MissingStage
from lorascope.features import FeatureSet
from lorascope.study import Study
from lorascope.views.directions import open_directions
from lorascope.views.feature_list import feature_kind, feature_place
from lorascope.views.kept import kept_view, stamp
from lorascope.views.one_feature import column_of, open_features
from lorascope.views.reading import Json, feature_rows, known_levels, path_of, read_table, ready

NEAR = 8
LEAST_SHARE = 0.1
"""Features that fire on fewer of the sampled firings are not called co-active."""


def nearby(study: Study, corpus: str, feature: str) -> Json:
    """A feature's neighbours.

    Returns:
        `{"cosine": [{"id", "cosine", "of": "read" or "write"}], "together": [{"id", "share", "density"}], "sampled"}`.
        Cosines are those of directions' vectors in the residual stream, with directions of the same side (latents'
        decoders are in the feature's page). `together` are features of the same kind, by the share of this one's
        sampled firings on which they fire: those with most of share · log(share / density). `sampled` is how many
        firings that is.
    """
    kind = feature_kind(feature)
    found: Json = {"cosine": [], "together": [], "sampled": 0}
    if kind == "direction":
        found["cosine"] = direction_cosines(study, str(feature_place(feature)["address"]))
    try:
        features = open_features(study, corpus, kind)
    except MissingStage:
        return found
    rows = feature_rows(study, f"examples/{corpus}/{kind}-examples.parquet", feature) or []
    sample = [row for row in rows if row["where"] != "top"]
    column = column_of(features, feature)
    if not sample or column is None:
        return found
    return dict(ready(found | co_active(study, corpus, features, column, sample)))


def co_active(study: Study, corpus: str, features: FeatureSet, column: int, sample: list[Json]) -> Json:
    """Features that fire on the sampled firings of one."""
    store = features.store
    places_M = np.array([store.offsets[row["trace"]] + row["position"] for row in sample], np.int64)
    level_F, density_F = kept_view(study, thresholds, corpus, features.kind)
    share_F = (features.encode(store.visit(places_M), None) > level_F).mean(axis=0)
    share_F[column] = 0.0
    if not features.latent:
        share_F[column ^ 1] = 0.0  # the other polarity can never fire with this one
    gain_F = np.where(share_F >= LEAST_SHARE, share_F * np.log(np.maximum(share_F, 1e-9) / density_F), 0.0)
    chosen = [int(i) for i in np.argsort(-gain_F)[:NEAR] if gain_F[i] > 0]
    order = sorted(chosen, key=lambda i: -share_F[i])
    together = [{"id": features.ids[i], "share": float(share_F[i]), "density": float(density_F[i])} for i in order]
    return {"together": together, "sampled": len(sample)}


def thresholds(study: Study, corpus: str, kind: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Firing level and density of each feature of a kind, [F].

    A feature without a level has NaN, above which nothing is: before its examples were searched for nobody knows where
    it fires. Density is at least one in a million.
    """
    features = open_features(study, corpus, kind)
    levels = {} if features.latent else known_levels(study, kind)
    unknown = 0.0 if features.latent else np.nan
    level_F = np.array([levels.get(name, unknown) for name in features.ids], np.float32)
    known: dict[str, float] = {}
    if path := path_of(study, f"examples/{corpus}/{kind}-stats.parquet"):
        stats = read_table(path, *stamp(path))
        known = dict(zip(stats["feature"].to_pylist(), stats["density"].to_pylist(), strict=True))
    return level_F, np.maximum([known.get(name, 0.0) for name in features.ids], 1e-6)


def direction_cosines(study: Study, address: str) -> list[Json]:
    """Directions whose residual-stream vectors are closest to this one's, by absolute cosine."""
    found: list[Json] = []
    for side, (names, unit_ND) in kept_view(study, residual_vectors).items():
        if address not in names:
            continue
        own = names.index(address)
        cosine_N = unit_ND @ unit_ND[own]
        for i in [int(i) for i in np.argsort(-np.abs(cosine_N)) if i != own][:NEAR]:
            found.append({"id": names[i], "cosine": float(cosine_N[i]), "of": side})
    return found


def residual_vectors(study: Study) -> dict[str, tuple[list[str], npt.NDArray[np.float32]]]:
    """Unit vectors in the residual stream: `read` of q k v gate up …, `write` of o, down …, each with its addresses."""
    adapter = open_directions(study)
    sides: dict[str, tuple[list[str], list[npt.NDArray[np.float32]]]] = {"read": ([], []), "write": ([], [])}
    for module, a_RI, b_OR, _ in adapter.factors() if adapter else ():
        if (side := side_of(module.type)) is None:
            continue
        names, vectors = sides[side]
        names += rank_addresses(module.layer, module.type, module.rank)
        vectors += list(b_OR.T if side == WRITE else a_RI)
    return {side: (names, unit_rows(vectors)) for side, (names, vectors) in sides.items() if names}


def unit_rows(vectors: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """The vectors as rows of length 1 (a zero vector stays zero)."""
    rows_ND = np.stack(vectors)
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
