"""One feature's page: examples with the activation of every token around them, statistics, explanation, scores.

Shape legend: T tokens of a window, F features, N directions.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import BadInput, MissingStage
from lorascope.explained import LEXICAL
from lorascope.features import FeatureSet, load_features, source_of
from lorascope.store import INDEX, store_folder
from lorascope.study import Study
from lorascope.token_text import TokenTable, open_table, token_texts
from lorascope.traces import SEGMENT_NAMES
from lorascope.views.ablation_tables import direction_kl
from lorascope.views.category_shares import feature_category
from lorascope.views.feature_list import TOO_FEW, decoder_effects, feature_kind, feature_place
from lorascope.views.kept import kept_once, stamp
from lorascope.views.lens import feature_lens
from lorascope.views.maps import signed_map
from lorascope.views.reading import Json, explanations_of, feature_rows, missing, ready
from lorascope.views.token_counts import NOTHING_AROUND, segment_densities, tokens_around

WINDOW = 24
"""Tokens shown on either side of an example."""
MARGIN = 8
"""Tokens decoded before a window, so that a character spread over several tokens stays whole."""
NEIGHBOURS = 6


def feature_page(
    study: Study, feature: str, corpus: str = "train", *, window: int = WINDOW, top: int = 50, per_quantile: int = 10
) -> Json:
    """Everything about one feature on one corpus.

    Returns:
        `{"available", "id", "kind", "address", "layer", "type", "polarity", "corpus", "unit", "latent", "typical",
        "stats": {level, density, n_firing, max, p99, mean, too_few} or None, "histogram": {"edges", "counts"},
        "shares": {"prompt", "think", "answer"}, "densities": those of `segment_densities` or None, "around": those of
        `tokens_around`, "kl": row or None, "explanation": {...} or None, "category": row of
        `categories/KIND.jsonl` or None, "examples": {"top": [example], "q0": [..], ..}, "decoder": signed map or None,
        "neighbours": [{"id", "cosine"}], "lens": [side], "missing_stages": [..]}`; `lens` is that of `feature_lens`.
        An example is `{"trace", "trace_id", "position", "activation", "segment", "start", "peak", "tokens", "values",
        "segments", "sinks", "more_before", "more_after"}`: `peak` is the place of the example in `tokens`, `start` the
        position of `tokens[0]` in its trace. `typical` is the median activation over ordinary tokens: 0 but for
        directions with a constant offset.

    Raises:
        BadInput: there is no such feature.
    """
    kind = feature_kind(feature)
    try:
        features = open_features(study, corpus, kind)
    except MissingStage as error:
        return missing(study, f"the feature {feature} on {corpus}", command_in(error, corpus)) | {"id": feature}
    column = column_of(features, feature)
    if column is None:
        raise BadInput(f"There is no feature {feature!r} of kind {kind} in {study.path}.")
    page = {"available": True, "id": feature, "kind": kind, "corpus": corpus, "unit": features.unit}
    page["typical"] = typical_activation(features, column)
    page |= {"latent": features.latent} | feature_place(feature)
    gone: list[Json] = []
    stats = feature_rows(study, f"examples/{corpus}/{kind}-stats.parquet", feature)
    rows = feature_rows(study, f"examples/{corpus}/{kind}-examples.parquet", feature)
    if stats is None or rows is None:
        command = f"lorascope examples STUDY --corpus {corpus} --kinds {kind}"
        gone.append(missing(study, f"examples of {kind}s on {corpus}", command)["missing"])
    expect_windows(features, rows or [], window)
    page |= statistics(stats[0] if stats else None)
    page["densities"] = segment_densities(features, stats[0]) if stats else None
    page["around"] = tokens_around(features, vocabulary_of(study), rows) if rows else NOTHING_AROUND
    page["examples"] = shown_examples(study, features, column, rows or [], window, top, per_quantile)
    page["kl"] = direction_kl(study).get(str(page["address"])) if kind == "direction" else None
    page["explanation"] = explanation_of(study, kind, feature)
    page["category"] = feature_category(study, kind, feature)
    if page["explanation"] is None:
        gone.append(missing(study, f"the explanation of {feature}", "lorascope explain STUDY")["missing"])
    page |= {"decoder": None, "neighbours": [], "lens": feature_lens(study, feature)}
    if kind == "latent":
        page |= decoder_of(study, column)
    return dict(ready(page | {"missing_stages": gone}))


def expect_windows(features: FeatureSet, rows: list[Json], window: int) -> None:
    """Have the system begin to read the tokens around examples."""
    store = features.store
    places = np.array([store.offsets[row["trace"]] + row["position"] for row in rows], np.int64)
    around = np.unique(places[:, None] + np.arange(-window - MARGIN, window + 1))
    store.expect(around[(around >= 0) & (around < store.n_tokens)])


def command_in(error: MissingStage, corpus: str) -> str:
    """The command that a MissingStage names."""
    _, named, command = str(error).rstrip(".").partition("lorascope ")
    return named + command if named else f"lorascope record STUDY --corpus {corpus}"


def typical_activation(features: FeatureSet, column: int) -> float:
    """The median activation of a direction's polarity over ordinary tokens; 0 for a latent."""
    if features.latent:
        return 0.0
    store, direction = features.store, column // 2
    median = float(store.medians[direction] * store.effect_per_scalar[direction])
    return max(0.0, -median if column % 2 else median)


def open_features(study: Study, corpus: str, kind: str) -> FeatureSet:
    """`load_features`, kept open until the store or the SAE changes.

    Raises:
        MissingStage: the corpus is not recorded or the SAE not trained.
    """
    folder = store_folder(study.path, corpus, source_of(kind))
    files = [folder / INDEX, *([study.path / "sae" / "sae_weights.safetensors"] if kind == "latent" else [])]
    if not all(path.is_file() for path in files):
        return load_features(study, corpus, kind)
    return kept_features(study, corpus, kind, tuple(stamp(path) for path in files))


@kept_once(maxsize=24)
def kept_features(study: Study, corpus: str, kind: str, state: tuple[tuple[int, int], ...]) -> FeatureSet:
    """`load_features` of one state of its files."""
    return load_features(study, corpus, kind)


@lru_cache(maxsize=16)
def numbered(ids: tuple[str, ...]) -> dict[str, int]:
    """The column of each id."""
    return {name: i for i, name in enumerate(ids)}


def column_of(features: FeatureSet, feature: str) -> int | None:
    """The column of a feature in its set, None when it is not there."""
    return numbered(tuple(features.ids)).get(feature)


def vocabulary_of(study: Study) -> TokenTable:
    """What the study's token ids stand for, read once.

    Raises:
        BadInput: the study has no tokenizer.
    """
    path = study.path / "tokenizer" / "tokenizer.json"
    return kept_vocabulary(path, *(stamp(path) if path.is_file() else (0, 0)))


@kept_once(maxsize=2)
def kept_vocabulary(path: Path, size: int, modified: int) -> TokenTable:
    """`vocabulary_of` one state of the tokenizer's file."""
    return open_table(path)


def statistics(row: Json | None) -> Json:
    """A row of the statistics table as the page's parts."""
    if row is None:
        return {"stats": None, "histogram": {"edges": [], "counts": []}, "shares": None}
    keys = ("level", "density", "n_firing", "max", "p99", "mean")
    return {
        "stats": {key: row[key] for key in keys} | {"too_few": row["n_firing"] < TOO_FEW},
        "histogram": {"edges": row["hist_edges"], "counts": row["hist_counts"]},
        "shares": {name: row[f"share_{name}"] for name in SEGMENT_NAMES if f"share_{name}" in row},
    }


def shown_examples(
    study: Study, features: FeatureSet, column: int, rows: list[Json], window: int, top: int, per_quantile: int
) -> dict[str, list[Json]]:
    """Examples by where they come from (`top`, `q0`, ...), each with its window."""
    shown: dict[str, list[Json]] = {}
    chosen: list[Json] = []
    for row in sorted(rows, key=lambda r: (r["where"] != "top", r["where"], r["rank"])):
        group = shown.setdefault(row["where"], [])
        if len(group) < (top if row["where"] == "top" else per_quantile):
            group.append({})
            chosen.append(row)
    windows = example_windows(study, features, column, chosen, window)
    return {where: [next(windows) for _ in group] for where, group in shown.items()}


def example_windows(study: Study, features: FeatureSet, column: int, rows: list[Json], window: int) -> Iterator[Json]:
    """Examples with the tokens around each, in their order; the scalars of all are read together."""
    store = features.store
    firsts = [int(store.offsets[row["trace"]]) for row in rows]
    lengths = [int(store.offsets[row["trace"] + 1]) - first for row, first in zip(rows, firsts, strict=True)]
    bounds = [
        (max(0, row["position"] - window), min(length, row["position"] + window + 1))
        for row, length in zip(rows, lengths, strict=True)
    ]
    places = [np.arange(first + start, first + stop) for first, (start, stop) in zip(firsts, bounds, strict=True)]
    acts = activations(features, column, np.concatenate(places)) if places else np.zeros(0, np.float32)
    parts = np.split(acts, np.cumsum([len(place) for place in places])[:-1])
    for row, length, (start, stop), values in zip(rows, lengths, bounds, parts, strict=False):
        yield example_window(study, features, row, length, start, stop, values)


def example_window(
    study: Study,
    features: FeatureSet,
    row: Json,
    length: int,
    start: int,
    stop: int,
    values: npt.NDArray[np.float32],
) -> Json:
    """One example with the tokens [start, stop) of its trace around it and the activation of each."""
    store, trace, position = features.store, int(row["trace"]), int(row["position"])
    part = token_part(study, features, trace, start, stop)
    return {
        "trace": trace,
        "trace_id": store.trace_ids[trace],
        "position": position,
        "activation": float(row["activation"]),
        "segment": SEGMENT_NAMES[part["segments"][position - start]],
        "start": start,
        "peak": position - start,
        "values": values,
        "more_before": start > 0,
        "more_after": stop < length,
    } | part


def token_part(study: Study, features: FeatureSet, trace: int, start: int, stop: int) -> Json:
    """Texts and segment codes of the tokens [start, stop) of a trace, and which of them are attention sinks."""
    first = int(features.store.offsets[trace])
    before = max(0, start - MARGIN)
    ids = features.store.tokens[first + before : first + stop].tolist()
    texts = token_texts(vocabulary_of(study), ids)[start - before :]
    place = slice(first + start, first + stop)
    sinks = np.flatnonzero(features.store.sink[place]).tolist()
    return {"tokens": texts, "segments": features.store.segments[place].tolist(), "sinks": sinks}


def activations(features: FeatureSet, column: int, places_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """One feature's activation on tokens of the corpus, float32 [T]."""
    return features.encode(features.store.visit(places_T), np.array([column], np.intp))[:, 0]


def explanation_of(study: Study, kind: str, feature: str) -> Json | None:
    """The explanation's row as `{"explainer", "text", "rule", "reason", "class", "scores": {"detection": {"own",
    "wrong", "shuffled"}, ..}, "wrong_from", "also": [the same of other explainers]}`, the lexical explainer's first."""
    rows = explanations_of(study, kind, feature)
    said = [explanation_row(row) for row in sorted(rows, key=lambda row: str(row["explainer"]) != LEXICAL)]
    return said[0] | {"also": said[1:]} if said else None


def explanation_row(row: Json) -> Json:
    """One explainer's explanation of a feature with its scores."""
    scored = row.get("scored") or {}
    scores: dict[str, Any] = {
        name: {
            "own": scored.get(name),
            "wrong": scored.get(f"{name}_wrong"),
            "shuffled": scored.get(f"{name}_shuffled"),
        }
        for name in ("detection", "fuzzing")
    }
    kept = {key: row.get(key) for key in ("explainer", "text", "rule", "reason", "class")}
    return kept | {"scores": scores, "wrong_from": scored.get("wrong_from")}


def decoder_of(study: Study, latent: int) -> Json:
    """Where a latent writes, in effect units, and the latents whose decoder rows are closest by cosine."""
    decoder = decoder_effects(study)
    if decoder is None:
        return {}
    weights_FN, norms_F = decoder.weights_FN, decoder.norms_F
    cosine_F = weights_FN @ weights_FN[latent] / np.maximum(norms_F * norms_F[latent], 1e-12)
    cosine_F[latent] = -np.inf
    near = np.argsort(-cosine_F)[:NEIGHBOURS]
    return {
        "decoder": signed_map(decoder.addresses, weights_FN[latent].tolist()),
        "neighbours": [{"id": f"sae.{i}", "cosine": float(cosine_F[i])} for i in near if np.isfinite(cosine_F[i])],
    }
