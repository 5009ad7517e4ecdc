"""The layout of Neuronpedia's bulk import.

    MODEL/SOURCE/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    MODEL/SOURCE/features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz, explanations/batch-N.jsonl.gz
    lorascope.json      which feature each (source, index) is

A source belongs to one layer there. So directions, and other kinds with a layer, are one source per layer and kind;
latents, which read and write all layers, are one source under layer 0. Both polarities of a direction are features of
their own. Activations are in the feature's unit (effect for directions), with the bins of Neuronpedia's converter:
-1 to the largest for the strongest, else what lies in the quantile.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lorascope.addresses import direction_layer
from lorascope.errors import MissingStage, RunFailed
from lorascope.export.gaps import missing_features
from lorascope.export.neuronpedia_schema import row_faults
from lorascope.export.settings import ExportConfig
from lorascope.export.windows import feature_windows
from lorascope.features import KINDS, FeatureSet, load_features
from lorascope.progress import progress
from lorascope.study import Study, write_json
from lorascope.token_text import TokenTable
from lorascope.views.feature_list import feature_place
from lorascope.views.one_feature import vocabulary_of
from lorascope.views.reading import explanations, feature_rows, missing, path_of

Json = dict[str, Any]
BATCH = 256
"""Features per file."""
LENS = "lens/lens.parquet"
WORDS = {
    "direction": "polarities of the directions of a rank-1 LoRA",
    "latent": "latents of a sparse autoencoder over all directions' scalars (they span all layers)",
    "base": "control: the directions' read vectors on the base model's run",
}


@dataclass(frozen=True)
class Source:
    """One source there: the features of one kind in one layer."""

    model: str
    set: str
    layer: int
    creator: str
    corpus: str

    @property
    def id(self) -> str:
        """`12-NAME-direction`."""
        return f"{self.layer}-{self.set}"


def write_neuronpedia(study: Study, config: ExportConfig, folder: Path) -> Json:
    """Every kind of feature with examples on the corpus.

    Raises:
        MissingStage: no examples were searched for on this corpus.
    """
    kinds = [kind for kind in KINDS if path_of(study, stats_path(config, kind))]
    if not kinds:
        raise MissingStage(
            f"There are no examples of the study's features on {config.corpus} yet; "
            f"run first: lorascope examples {study.path} --corpus {config.corpus}."
        )
    table = vocabulary_of(study)
    sets = {kind: load_features(study, config.corpus, kind) for kind in kinds}
    layers = 1 + max(direction_layer(name) or 0 for features in sets.values() for name in features.store.addresses)
    counts = dict.fromkeys(("sources", "features", "activations", "explanations", "without_explanation"), 0)
    places: list[Json] = []
    for kind, features in sets.items():
        columns_of = by_layer(features)
        for layer, columns in columns_of.items():
            source = named_source(study, config, kind, layer)
            write_metadata(folder / source.model / source.id, study, source, features, layers)
            places += [{"source": source.id, "index": i, "feature": features.ids[c]} for i, c in enumerate(columns)]
        nonzero = {} if features.latent else nonzero_shares(features)
        jobs = [(layer, start) for layer, columns in columns_of.items() for start in range(0, len(columns), BATCH)]
        for layer, start in progress(jobs, len(jobs), f"export {kind}", "file"):
            source, columns = named_source(study, config, kind, layer), columns_of[layer][start : start + BATCH]
            rows = batch_rows(study, config, features, table, source, columns, start, nonzero)
            for name in ("features", "activations", "explanations"):
                path = folder / source.model / source.id / name / f"batch-{start // BATCH}.jsonl.gz"
                write_batch(path, name, rows[name])
                counts[name] += len(rows[name])
            counts["without_explanation"] += len(columns) - len({row["index"] for row in rows["explanations"]})
        counts["sources"] += len(columns_of)
    left_out = missing_features(study, config.corpus, kinds)
    if not path_of(study, LENS):
        left_out.append(missing(study, "top tokens of what features write", "lorascope lens STUDY")["missing"])
    write_json(folder / "lorascope.json", {"features": places, "left_out": left_out})
    return {"model": named_model(study, config), "kinds": kinds} | counts | {"left_out": left_out}


def stats_path(config: ExportConfig, kind: str) -> str:
    """Where a kind's statistics are."""
    return f"examples/{config.corpus}/{kind}-stats.parquet"


def by_layer(features: FeatureSet) -> dict[int, list[int]]:
    """Columns by layer; what has none (latents, modules outside the layers) counts as layer 0."""
    groups: dict[int, list[int]] = {}
    for column, feature in enumerate(features.ids):
        groups.setdefault(feature_place(feature)["layer"] or 0, []).append(column)
    return dict(sorted(groups.items()))


def nonzero_shares(features: FeatureSet) -> dict[str, float]:
    """The share of ordinary tokens on which each feature is above 0, in one reading of the store.

    A polarity of a direction is so on about half of them: what is counted elsewhere as firing is above a level.
    """
    store = features.store
    counts_F = np.zeros(len(features.ids), np.int64)
    for start, acts_TF in features.chunks():
        counts_F += (acts_TF[store.ordinary[start : start + len(acts_TF)]] > 0).sum(axis=0)
    shares_F = counts_F / max(1, int(store.ordinary.sum()))
    return dict(zip(features.ids, shares_F.tolist(), strict=True))


def slug(text: str) -> str:
    """A name as Neuronpedia allows it: lower-case letters, digits, single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "lorascope"


def named_model(study: Study, config: ExportConfig) -> str:
    """The base model's id there: asked for, or from the last part of its name."""
    return slug(config.model_id or study.model_name.rstrip("/").rpartition("/")[2])


def named_release(study: Study, config: ExportConfig) -> str:
    """The release's name: asked for, or that of the study's folder."""
    return slug(config.name or study.path.resolve().name)


def named_source(study: Study, config: ExportConfig, kind: str, layer: int) -> Source:
    """The source of one kind's features in one layer."""
    name = f"{named_release(study, config)}-{kind}"
    return Source(named_model(study, config), name, layer, config.creator, config.corpus)


def write_metadata(place: Path, study: Study, source: Source, features: FeatureSet, layers: int) -> None:
    """The four files that say what a source is; `layers`, up to the last recorded one, is the same in all."""
    release = source.set.removesuffix(f"-{features.kind}")
    common = {"creatorId": source.creator, "visibility": "PUBLIC"}
    about = WORDS.get(features.kind, f"features of kind {features.kind}")
    description = f"lorascope: {release}, an adapter of {study.model_name}"
    rows: dict[str, Json] = {
        "release": common
        | {"name": release, "description": description, "descriptionShort": release, "creatorName": "lorascope"}
        | {"defaultSourceSetName": source.set, "defaultSourceId": source.id},
        "model": common
        | {"id": source.model, "displayName": source.model, "displayNameShort": source.model, "owner": "lorascope"}
        | {"instruct": True, "neuronsPerLayer": 0, "layers": layers},
        "sourceset": common
        | {"modelId": source.model, "name": source.set, "description": about, "type": features.kind}
        | {"creatorName": "lorascope", "releaseName": release, "allowInferenceSearch": False},
        "source": common
        | {"id": source.id, "modelId": source.model, "setName": source.set, "hasDashboards": True}
        | {"inferenceEnabled": False, "dataset": source.corpus, "num_prompts": features.store.n_traces}
        | {"notes": f"{about}; activations in units of {features.unit}"},
    }
    place.mkdir(parents=True)
    for name, row in rows.items():
        (place / f"{name}.jsonl").write_text(json_line(name, row), encoding="utf-8")


def batch_rows(
    study: Study,
    config: ExportConfig,
    features: FeatureSet,
    table: TokenTable,
    source: Source,
    columns: Sequence[int],
    start: int,
    nonzero: Mapping[str, float],
) -> dict[str, list[Json]]:
    """The rows of three tables for some columns of a kind, the first of which has index `start`.

    Args:
        nonzero: as `nonzero_shares`; not needed of latents, which fire wherever they are not zero.
    """
    examples_file = f"examples/{config.corpus}/{features.kind}-examples.parquet"
    quantiles = quantile_count(study, examples_file)
    kind, rows = features.kind, dict[str, list[Json]](features=[], activations=[], explanations=[])
    explained: dict[str, list[Json]] = {}  # one of each explainer that has a text
    for row in explanations(study, kind):
        if row.get("text"):
            explained.setdefault(row["feature"], []).append(row)
    for index, column in enumerate(columns, start):
        feature = features.ids[column]
        (stats,) = feature_rows(study, stats_path(config, kind), feature) or [{}]
        key = {"modelId": source.model, "layer": source.id, "index": str(index)}
        rows["features"].append(
            feature_row(study, source, feature, stats, nonzero.get(feature, stats["density"])) | key
        )
        found = feature_rows(study, examples_file, feature) or []
        examples = shown_examples(found, config)
        windows = feature_windows(features, table, column, examples, config.window)
        bins = example_bins(found, quantiles)
        for example, window in zip(examples, windows, strict=True):
            peak = max(window.values)
            rows["activations"].append(
                key
                | {"id": row_id(source, feature, example["where"], example["trace"], example["position"])}
                | {"creatorId": source.creator, "tokens": window.tokens, "values": window.values}
                | {"maxValue": peak, "maxValueTokenIndex": window.values.index(peak), "minValue": min(window.values)}
                | {"qualifyingTokenIndex": window.peak, "dataSource": config.corpus}
                | {"dataIndex": f"{features.store.trace_ids[example['trace']]}:{example['position']}"}
                | bins[example["where"]]
            )
        rows["explanations"] += [explanation_row(source, row) | key for row in explained.get(feature, ())]
    return rows


def feature_row(study: Study, source: Source, feature: str, stats: Json, nonzero: float) -> Json:
    """One feature, above 0 on a share of tokens of `nonzero`; the lens's tokens where they have been made."""
    edges, counts = stats["hist_edges"], stats["hist_counts"]
    lens = [row for row in feature_rows(study, LENS, feature) or [] if row["side"] == "write"]
    ends = lens[0] if lens else {}
    return {
        "sourceSetName": source.set,
        "creatorId": source.creator,
        "vectorLabel": feature,
        "hookName": feature_place(feature)["address"],
        "maxActApprox": stats["max"],
        "frac_nonzero": nonzero,
        "pos_str": ends.get("tokens", []),
        "pos_values": ends.get("values", []),
        "neg_str": ends.get("bottom_tokens", []),
        "neg_values": ends.get("bottom_values", []),
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in pairwise(edges)],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
    }


def shown_examples(rows: Sequence[Json], config: ExportConfig) -> list[Json]:
    """The strongest examples, then some of each quantile."""
    most = {"top": config.examples}
    return [row for row in rows if row["rank"] < most.get(row["where"], config.per_quantile)]


def quantile_count(study: Study, examples_file: str) -> int:
    """Into how many quantiles a kind's examples were sorted; a feature with few firings has not all of them."""
    places = pq.read_table(study.path / examples_file, columns=["where"])["where"].unique().to_pylist()
    return max([1] + [1 + int(place[1:]) for place in places if place != "top"])


def example_bins(rows: Sequence[Json], quantiles: int) -> dict[str, Json]:
    """Neuronpedia's bin of each group of examples: least and largest activation, and the share of firings in it."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["where"], []).append(row["activation"])
    return {
        name: {"binMin": -1, "binMax": max(values), "binContains": -1}
        if name == "top"
        else {"binMin": min(values), "binMax": max(values), "binContains": 1 / quantiles}
        for name, values in groups.items()
    }


def explanation_row(source: Source, row: Json) -> Json:
    """One explanation. Its type and model are null: the import refuses names that its database does not hold."""
    notes = [f"explainer: {row['explainer']}"]
    scored = row.get("scored") or {}
    for name in ("detection", "fuzzing"):
        if own := scored.get(name):
            wrong = scored.get(f"{name}_wrong") or {}
            bounds = "no interval" if own["low"] is None else f"{own['low']:.3g} to {own['high']:.3g}"
            notes.append(f"{name} {own['value']:.3g} ({bounds}) on text it never saw")
            notes += [f"{wrong['value']:.3g} for a wrong explanation"] if wrong else []
    return {
        "id": row_id(source, row["feature"], "explanation", row["explainer"]),
        "authorId": source.creator,
        "description": row["text"],
        "typeName": None,
        "explanationModelName": None,
        "notes": "; ".join(notes),
    }


def row_id(source: Source, *parts: object) -> str:
    """An id that stays the same from export to export, so that importing twice adds nothing."""
    text = json.dumps([source.model, source.id, *parts])
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def storable(text: str) -> str:
    """A text without the character that the import's database refuses, nor the escape that it takes for one."""
    return text.replace("\0", "\ufffd").replace("\\u0000", "\\u 0000")


def storable_value(value: Any) -> Any:
    """A field's value with `storable` texts."""
    if isinstance(value, str):
        return storable(value)
    return [storable(item) if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


def json_line(table: str, row: Json) -> str:
    """One checked row.

    Raises:
        RunFailed: it is not as the import wants it, or holds a number that JSON does not know.
    """
    row = {name: storable_value(value) for name, value in row.items()}
    if faults := row_faults(table, row):
        raise RunFailed(f"A row for Neuronpedia's {table} is not right ({faults[0]}); make its examples anew.")
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise RunFailed(f"A number for Neuronpedia's {table} is not finite; make its examples anew.") from error


def write_batch(path: Path, table: str, rows: Iterable[Json]) -> None:
    """A compressed file of rows, the same bytes each time; none without rows."""
    lines = "".join(json_line(table, row) for row in rows)
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines.encode("utf-8"), mtime=0))
