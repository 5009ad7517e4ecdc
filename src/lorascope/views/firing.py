"""Whole traces coloured by several features, and everything that fires on one token.

Shape legend: T tokens of a trace, F features.
"""

from itertools import dropwhile
from typing import Any

import numpy as np

from lorascope.errors import BadInput, MissingStage
from lorascope.features import FeatureSet
from lorascope.study import Study
from lorascope.traces import SEGMENT_NAMES
from lorascope.views.feature_list import decoder_norms, feature_kind
from lorascope.views.kept import kept_view
from lorascope.views.nearby import thresholds
from lorascope.views.one_feature import (
    column_of,
    command_in,
    explanation_of,
    open_features,
    token_part,
    typical_activation,
)
from lorascope.views.one_trace import trace_features, trace_page
from lorascope.views.reading import Json, feature_rows, known_levels, missing, missing_levels, ready

MOST_FEATURES = 4
"""Most features that a trace is coloured by at once."""
SHOWN = 15
CORPUS_PAGE = 50
BEGINNING, QUESTION = 30, 48
"""Tokens shown of a response and of a question."""
PROMPT = SEGMENT_NAMES.index("prompt")


def coloured_trace(study: Study, corpus: str, index: int, features: list[str]) -> Json:
    """A trace with the activations of up to `MOST_FEATURES` features on each of its tokens.

    Returns:
        The dict of `trace_page` with `"features": [{"id", "kind", "values": [T], "level", "missing", "typical",
        "max"}]`. `max` is the largest activation on ordinary tokens of the corpus or of this trace. Where there is no
        firing level yet, `level` is None and `missing` says what to run.

    Raises:
        BadInput: no such corpus, trace or feature, or too many features.
    """
    check_corpus(study, corpus)
    if len(features) > MOST_FEATURES:
        raise BadInput(f"A trace can be coloured by at most {MOST_FEATURES} features at once.")
    page = trace_page(study, corpus, index)
    if not page["available"]:
        return page
    columns = {name: known_column(study, corpus, name) for name in features}
    values_FT = trace_features(study, corpus, index, features, page["length"])
    ordinary_T = np.array(page["segments"]) != 0
    ordinary_T[page["sinks"]] = False
    shown = []
    for name, values_T in zip(features, values_FT, strict=True):
        kind = feature_kind(name)
        stats = feature_rows(study, f"examples/{corpus}/{kind}-stats.parquet", name)
        most = max(float(values_T[ordinary_T].max(initial=0)), stats[0]["max"] if stats else 0.0)
        typical = typical_activation(open_features(study, corpus, kind), columns[name])
        level = 0.0 if kind == "latent" else known_levels(study, kind).get(name)
        gone = missing_levels(study, corpus, kind) if level is None else None
        about = {"id": name, "kind": kind, "level": level, "missing": gone}
        shown.append(about | {"values": values_T, "typical": typical, "max": most})
    return page | {"features": ready(shown)}


def check_corpus(study: Study, corpus: str) -> None:
    """Raise BadInput for a corpus that the study does not have: names from an address never become paths."""
    if corpus not in study.corpora():
        raise BadInput(f"There is no corpus {corpus!r}; there are: {', '.join(study.corpora()) or 'none yet'}.")


def known_column(study: Study, corpus: str, feature: str) -> int:
    """The column of a feature among those of its kind.

    Raises:
        BadInput: it is not there.
    """
    kind = feature_kind(feature)
    column = column_of(open_features(study, corpus, kind), feature)
    if column is None:
        raise BadInput(f"There is no feature {feature!r} of kind {kind} in {study.path}.")
    return column


def fires_here(study: Study, corpus: str, index: int, position: int) -> Json:
    """What fires on one token, strongest first.

    Returns:
        `{"available", "corpus", "index", "position", "token", "ordinary", "kinds": {kind: {"firing": number or None,
        "rows": [{"id", "activation", "level", "ratio", "text"}], "missing": {"what", "run"} or None}}}`. Latents are
        ordered by the length of what they write, other features by their activation relative to their firing level,
        which is `ratio` (None where that level is 0); `text` is a feature's explanation. What is not `ordinary` counts
        for no feature.

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
    place = int(store.offsets[index]) + position
    kinds = {}
    for kind in ("direction", "latent"):
        try:
            kinds[kind] = firing_of(study, corpus, kind, place)
        except MissingStage:
            continue
    token = token_part(study, open_features(study, corpus, "direction"), index, position, position + 1)["tokens"][0]
    ordinary = bool(store.segments[place] != 0 and not store.sink[place])
    about = {"corpus": corpus, "index": index, "position": position, "token": token, "ordinary": ordinary}
    return dict(ready({"available": True} | about | {"kinds": kinds}))


def firing_of(study: Study, corpus: str, kind: str, place: int) -> Json:
    """The features of one kind that fire on one token of the corpus, or what to run before that is known."""
    features = open_features(study, corpus, kind)
    acts_F = features.encode(features.store.visit(np.array([place])), None)[0]
    level_F, _ = kept_view(study, thresholds, corpus, kind)
    if np.isnan(level_F).all():
        return {"firing": None, "rows": [], "missing": missing_levels(study, corpus, kind)}
    firing = np.flatnonzero(acts_F > level_F)
    # no ratio to a level of 0: such a feature is silent on 99% of tokens, and comes after those with a ratio
    ratio_F = np.divide(acts_F, level_F, out=np.zeros_like(acts_F), where=level_F > 0)
    if features.latent:
        norms = decoder_norms(study)
        written_F = acts_F * np.array([norms.get(name, 1.0) for name in features.ids], np.float32)
        order = firing[np.argsort(-written_F[firing], kind="stable")]
    else:
        order = firing[np.lexsort((-acts_F[firing], -ratio_F[firing]))]
    rows: list[dict[str, Any]] = [
        {
            "id": features.ids[i],
            "activation": float(acts_F[i]),
            "level": float(level_F[i]),
            "ratio": float(ratio_F[i]) if level_F[i] > 0 else None,
            "text": (explanation_of(study, kind, features.ids[i]) or {}).get("text"),
        }
        for i in order[:SHOWN]
    ]
    return {"firing": len(firing), "rows": rows, "missing": None}


def trace_list(study: Study, corpus: str, page: int = 1, search: str = "") -> Json:
    """The traces of a corpus whose question or name has all words of a search, `CORPUS_PAGE` at a time.

    Returns:
        `{"available", "corpus", "corpora", "total", "found", "search", "page", "pages", "rows": [{"index", "id",
        "length", "question", "text"}]}`; `text` is how the trace's response begins, without the mark of its thinking.
    """
    check_corpus(study, corpus)
    corpora = study.corpora()
    try:
        features = open_features(study, corpus, "direction")
    except MissingStage as error:
        gone = missing(study, f"the traces of {corpus}", command_in(error, corpus))
        return gone | {"corpus": corpus, "corpora": corpora}
    store = features.store
    found = list(range(store.n_traces))
    if words := search.lower().split():
        texts = kept_view(study, question_texts, corpus)
        found = [i for i in found if all(word in texts[i] for word in words)]
    pages = max(1, -(-len(found) // CORPUS_PAGE))
    page = min(max(1, page), pages)
    rows = []
    for i in found[(page - 1) * CORPUS_PAGE : page * CORPUS_PAGE]:
        length = int(store.offsets[i + 1] - store.offsets[i])
        start = min(int(store.response_start[i]), length - 1)
        part = token_part(study, features, i, start, min(length, start + BEGINNING))
        said = "".join(dropwhile(str.isspace, after_markup(part))).rstrip()
        about = {"index": i, "id": store.trace_ids[i], "length": length}
        rows.append(about | {"question": question_of(study, features, i, QUESTION), "text": said})
    shown = {"total": store.n_traces, "found": len(found), "search": search, "page": page, "pages": pages}
    return {"available": True, "rows": rows, "corpus": corpus, "corpora": corpora} | shown


def after_markup(part: Json) -> list[str]:
    """The tokens of a part of a trace from the first on that is no template or markup."""
    pairs = dropwhile(lambda pair: pair[1] == 0, zip(part["tokens"], part["segments"], strict=True))
    return [text for text, _ in pairs]


def question_of(study: Study, features: FeatureSet, trace: int, most: int | None = None) -> str:
    """The text of a trace's prompt, of so many tokens at most; "…" where there are more."""
    store = features.store
    first = int(store.offsets[trace])
    asked = np.flatnonzero(store.segments[first : int(store.offsets[trace + 1])] == PROMPT)
    if not len(asked):
        return ""
    start, stop = int(asked[0]), int(asked[-1]) + 1
    shown = stop if most is None else min(stop, start + most)
    text = "".join(token_part(study, features, trace, start, shown)["tokens"]).strip()
    return text + ("…" if shown < stop else "")


def question_texts(study: Study, corpus: str) -> list[str]:
    """What a search looks through for each trace of a recorded corpus: its question and its name, in small letters."""
    features = open_features(study, corpus, "direction")
    names = features.store.trace_ids
    return [f"{question_of(study, features, i)} {name}".lower() for i, name in enumerate(names)]
