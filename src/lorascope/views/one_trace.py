"""One whole trace, its tokens coloured by a feature."""

from typing import Any

import numpy as np

from lorascope.errors import BadInput, MissingStage
from lorascope.study import Study
from lorascope.traces import SEGMENT_NAMES
from lorascope.views.feature_list import feature_kind
from lorascope.views.one_feature import (
    activations,
    column_of,
    command_in,
    open_features,
    token_part,
)
from lorascope.views.reading import Json, known_levels, missing, ready


def trace_page(study: Study, corpus: str, index: int, feature: str | None = None, *, limit: int | None = None) -> Json:
    """A trace's tokens, segments and, when a feature is named, its activation on each.

    Args:
        index: place of the trace in the store.
        limit: only the first so many tokens.

    Returns:
        `{"available", "corpus", "index", "id", "n_traces", "length", "tokens", "segments", "segment_names",
        "response_start", "sinks": positions of attention sinks, which never count as firing, "feature": {"id", "unit",
        "values", "level", "max"} or None}`.

    Raises:
        BadInput: no such trace or feature.
    """
    try:
        features = open_features(study, corpus, "direction")
    except MissingStage as error:
        return missing(study, f"the traces of {corpus}", command_in(error, corpus))
    store = features.store
    if not 0 <= index < store.n_traces:
        raise BadInput(f"{corpus} has traces 0 to {store.n_traces - 1}; there is no trace {index}.")
    length = int(store.offsets[index + 1] - store.offsets[index])
    stop = min(length, limit or length)
    shown: Json = {
        "available": True,
        "corpus": corpus,
        "index": index,
        "id": store.trace_ids[index],
        "n_traces": store.n_traces,
        "length": length,
        "segment_names": list(SEGMENT_NAMES),
        "response_start": int(store.response_start[index]),
        "feature": trace_feature(study, corpus, index, feature, stop) if feature else None,
    }
    return dict(ready(shown | token_part(study, features, index, 0, stop)))


def trace_feature(study: Study, corpus: str, index: int, feature: str, stop: int) -> Json:
    """One feature's activations on the first `stop` tokens of a trace."""
    kind = feature_kind(feature)
    features = open_features(study, corpus, kind)
    column = column_of(features, feature)
    if column is None:
        raise BadInput(f"There is no feature {feature!r} of kind {kind} in {study.path}.")
    first = int(features.store.offsets[index])
    values = activations(features, column, np.arange(first, first + stop))
    level = 0.0 if features.latent else known_levels(study, kind).get(feature)
    return {
        "id": feature,
        "unit": features.unit,
        "values": values,
        "level": level,
        "max": float(np.max(values, initial=0)),
    }


def trace_features(study: Study, corpus: str, index: int, wanted: list[str], stop: int) -> np.ndarray[Any, Any]:
    """Activations of several features on the first `stop` tokens of a trace, float32 [len(wanted), T].

    The kinds are read once each, so that many features cost little more than one.
    """
    out = np.zeros((len(wanted), stop), np.float32)
    for kind in dict.fromkeys(map(feature_kind, wanted)):
        features = open_features(study, corpus, kind)
        places = [i for i, name in enumerate(wanted) if feature_kind(name) == kind]
        columns = [column_of(features, wanted[i]) for i in places]
        first = int(features.store.offsets[index])
        z_TN = features.store.visit(np.arange(first, first + stop))
        out[places] = features.encode(z_TN, np.array(columns, np.intp)).T
    return out
