"""One kind of features with all that categories are made from.

Shapes: F = features, N = directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load_file

from lorascope.errors import MissingStage
from lorascope.explain.categories.words import Weighted, example_words, explanation_words, one_explanation, sort_rows
from lorascope.explain.rows import Row
from lorascope.explained import current_rows
from lorascope.features import DIFFERENCE, FeatureSet
from lorascope.study import Study, read_json, stream_rows


@dataclass(frozen=True)
class Kind:
    """One kind of features with what is known of each, in the order of `features.ids`."""

    features: FeatureSet
    level_F: NDArray[np.float32]
    worth_F: NDArray[np.float32]
    """Length written per unit of activation: relative to the base's own outputs, or (`relative` False) in effect."""
    decoder_FN: NDArray[np.float32] | None
    """A latent's decoder row in effect units; None for other kinds."""
    output_N: NDArray[np.float32]
    """The rms of the base's own output where each direction writes; 1 where that is not recorded or all write into one
    space."""
    relative: bool
    """Whether `output_N` was measured."""
    firings_F: NDArray[np.int64]
    rows_F: list[list[Row]]
    """Explanations, of any explainer."""
    examples_F: list[Weighted]

    @property
    def name(self) -> str:
        """The kind's name."""
        return self.features.kind


def read_kind(study: Study, corpus: str, features: FeatureSet, texts: Sequence[str]) -> Kind:
    """Levels, decoder, firings, explanations and example tokens of one kind.

    Raises:
        MissingStage: levels or statistics are of other features than the study has now.
    """
    name, store = features.kind, features.store
    known = read_json(study.path / "examples" / "levels.json").get(name, {})
    stats = pq.read_table(study.path / "examples" / corpus / f"{name}-stats.parquet", columns=["feature", "n_firing"])
    if stats.column("feature").to_pylist() != features.ids or not set(features.ids) <= set(known):
        raise MissingStage(
            f"The examples of {corpus} are not of these {name} features; run: lorascope examples {study.path} "
            f"--corpus {corpus}"
        )
    decoder_FN = None
    measured_N = output_lengths(study, corpus, features)
    output_N = np.ones(len(store.addresses), np.float32) if measured_N is None else measured_N
    if features.latent:
        decoder: NDArray[Any] = load_file(study.path / "sae" / "sae_weights.safetensors")["W_dec"]
        decoder_FN = (decoder * store.effect_per_scalar).astype(np.float32)
        worth_F = np.linalg.norm(decoder_FN / output_N, axis=1).astype(np.float32)
    else:
        worth_F = np.repeat(1 / output_N, 2)  # both polarities of each direction in turn
    rows = sort_rows(current_rows(study, name, stream_rows(study.path / "explanations" / f"{name}.jsonl")))
    table = pq.read_table(study.path / "examples" / corpus / f"{name}-examples.parquet")
    found = example_words(table, store, texts)
    return Kind(
        features,
        np.array([known[feature] for feature in features.ids], np.float32),
        worth_F,
        decoder_FN,
        output_N,
        measured_N is not None,
        stats.column("n_firing").to_numpy().astype(np.int64),
        [rows.get(feature, []) for feature in features.ids],
        [found.get(feature, []) for feature in features.ids],
    )


def output_lengths(study: Study, corpus: str, features: FeatureSet) -> NDArray[np.float32] | None:
    """The recorded rms of ‖W·x‖ of the matrix into which each column of a kind's store writes, float32 [N].

    Matrix types write into different spaces, so effects are added only relative to it. It is measured on the adapter's
    run; controls write into the same matrices. None where any is not known (as of neurons, which have one space).
    """
    file = study.path / output_file(corpus)
    if not file.is_file():
        return None
    measured = read_json(file)
    known = dict(zip(measured["address"], measured["rms"], strict=True))
    lengths = [known.get(address.removesuffix(DIFFERENCE), 0.0) for address in features.store.addresses]
    return np.array(lengths, np.float32) if min(lengths, default=0.0) > 0 else None


def output_file(corpus: str) -> str:
    """Where `record` says how long the base's own outputs are."""
    return f"scalars/{corpus}/adapter/output_rms.json"


def explained_words(kind: Kind, number: int) -> Weighted:
    """The words of one feature's explanation: a judge's text where there is one, else the rule."""
    of_rules, of_texts = explanation_words(one_explanation(kind.rows_F[number]))
    return of_rules + of_texts
