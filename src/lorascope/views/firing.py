"""Whole traces coloured by several features, and everything that fires on one token.

Shape legend: T tokens of a trace, F features.
"""

from typing import Any

import numpy as np

from lorascope.errors import BadInput, MissingStage
from lorascope.study import Study
from lorascope.views.feature_list import decoder_norms, feature_kind
from lorascope.views.kept import kept_view
from lorascope.views.nearby import thresholds
from lorascope.views.one_feature import column_of, command_in, open_features, token_part, typical_activation
from lorascope.views.one_trace import trace_features, trace_page
from lorascope.views.reading import Json, feature_rows, json_file, missing, ready

MOST_FEATURES = 4
"""Most features that a trace is coloured by at once."""
SHOWN = 15
CORPUS_PAGE = 200


def coloured_trace(study: Study, corpus: str, index: int, features: list[str]) -> Json:
    """A trace with the activations of up to `MOST_FEATURES` features on each of its tokens.

    Returns:
        The dict of `trace_page` with `"features": [{"id", "kind", "values": [T], "level", "typical", "max"}]`. `max`
        is the largest activation on ordinary tokens of the corpus or of this trace.

    Raises:
        BadInput: no such corpus, trace or feature, or too many features.
    """
    check_corpus(study, corpus)
    if len(features) > MOST_FEATURES:
        raise BadInput(f"A trace can be coloured by at most {MOST_FEATURES} features at once.")
    page = trace_page(study, corpus, index)
    if not page["available"]:
        return page
    for name in features:
        check_feature(study, corpus, name)
    values_FT = trace_features(study, corpus, index, features, page["length"])
    ordinary_T = np.array(page["segments"]) != 0
    levels = json_file(study, "examples/levels.json") or {}
    shown = []
    for name, values_T in zip(features, values_FT, strict=True):
        kind = feature_kind(name)
        stats = feature_rows(study, f"examples/{corpus}/{kind}-stats.parquet", name)
        most = max(float(values_T[ordinary_T].max(initial=0)), stats[0]["max"] if stats else 0.0)
        typical = typical_activation(study, open_features(study, corpus, kind), corpus, name)
        level = levels.get(kind, {}).get(name, 0.0)
        shown.append({"id": name, "kind": kind, "values": values_T, "level": level, "typical": typical, "max": most})
    return page | {"features": ready(shown)}


def check_corpus(study: Study, corpus: str) -> None:
    """Raise BadInput for a corpus that the study does not have: names from an address never become paths."""
    if corpus not in study.corpora():
        raise BadInput(f"There is no corpus {corpus!r}; there are: {', '.join(study.corpora()) or 'none yet'}.")


def check_feature(study: Study, corpus: str, feature: str) -> None:
    """Raise BadInput for a feature that is not there."""
    kind = feature_kind(feature)
    if column_of(open_features(study, corpus, kind), feature) is None:
        raise BadInput(f"There is no feature {feature!r} of kind {kind} in {study.path}.")


def fires_here(study: Study, corpus: str, index: int, position: int) -> Json:
    """What fires on one token, strongest first.

    Returns:
        `{"available", "corpus", "index", "position", "token", "kinds": {kind: {"firing": number, "rows": [{"id",
        "activation", "level", "ratio"}]}}}`. Latents are ordered by the length of what they write, other features
        by their activation relative to their firing level, which is `ratio`.

    Raises:
        BadInput: no such corpus, trace or token.
    """
    check_corpus(study, corpus)
    try:
        store = open_features(study, corpus, "direction").store
    except MissingStage as error:
        return missing(study, f"the traces of {corpus}", command_in(error, corpus))
    if not 0 <= index < store.n_traces:
        raise BadInput(f"{corpus} has traces 0 to {store.n_traces - 1}; there is no trace {index}.")
    length = int(store.offsets[index + 1] - store.offsets[index])
    if not 0 <= position < length:
        raise BadInput(f"This trace has tokens 0 to {length - 1}; there is no token {position}.")
    kinds = {}
    for kind in ("direction", "latent"):
        try:
            kinds[kind] = firing_of(study, corpus, kind, int(store.offsets[index]) + position)
        except MissingStage:
            continue
    token = token_part(study, open_features(study, corpus, "direction"), index, position, position + 1)["tokens"][0]
    about = {"corpus": corpus, "index": index, "position": position, "token": token}
    return dict(ready({"available": True} | about | {"kinds": kinds}))


def firing_of(study: Study, corpus: str, kind: str, place: int) -> Json:
    """The features of one kind that fire on one token of the corpus."""
    features = open_features(study, corpus, kind)
    acts_F = features.encode(features.store.visit(np.array([place])), None)[0]
    level_F, _ = kept_view(study, thresholds, corpus, kind)
    if features.latent:
        norms = decoder_norms(study)
        weight_F = acts_F * np.array([norms.get(name, 1.0) for name in features.ids], np.float32)
    else:
        weight_F = acts_F / np.maximum(level_F, 1e-9)
    firing = np.flatnonzero(acts_F > level_F)
    order = firing[np.argsort(-weight_F[firing], kind="stable")][:SHOWN]
    rows: list[dict[str, Any]] = [
        {
            "id": features.ids[i],
            "activation": float(acts_F[i]),
            "level": float(level_F[i]),
            "ratio": None if features.latent else float(weight_F[i]),
        }
        for i in order
    ]
    return {"firing": len(firing), "rows": rows}


def trace_list(study: Study, corpus: str, page: int = 1) -> Json:
    """The traces of a corpus, `CORPUS_PAGE` at a time.

    Returns:
        `{"available", "corpus", "corpora", "total", "page", "pages", "rows": [{"index", "id", "length", "text"}]}`;
        `text` is how the trace's response begins.
    """
    check_corpus(study, corpus)
    corpora = study.corpora()
    try:
        features = open_features(study, corpus, "direction")
    except MissingStage as error:
        return missing(study, f"the traces of {corpus}", command_in(error, corpus)) | {"corpora": corpora}
    store = features.store
    pages = max(1, -(-store.n_traces // CORPUS_PAGE))
    page = min(max(1, page), pages)
    rows = []
    for i in range((page - 1) * CORPUS_PAGE, min(page * CORPUS_PAGE, store.n_traces)):
        length = int(store.offsets[i + 1] - store.offsets[i])
        start = min(int(store.response_start[i]), length - 1)
        part = token_part(study, features, i, start, min(length, start + 30))
        rows.append({"index": i, "id": store.trace_ids[i], "length": length, "text": "".join(part["tokens"])})
    about = {"corpus": corpus, "corpora": corpora, "total": store.n_traces, "page": page, "pages": pages}
    return {"available": True, "rows": rows} | about
