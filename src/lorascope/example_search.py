"""Example search: where each feature is strongest, a sample of where it fires, and statistics of its firing.

One pass over the corpus; memory does not grow with it. Shape legend: T tokens, F features, M firings in a list,
H bins of a histogram.
"""

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.features import (
    BINS,
    BINS_PER_OCTAVE,
    KINDS,
    LOWEST,
    FeatureSet,
    available_kinds,
    bins_of,
    firing_levels,
    load_features,
)
from lorascope.progress import progress
from lorascope.selection import Candidates, Ints, Selection, activation_keys, random_keys, rank_in_runs
from lorascope.store import Floats, Store
from lorascope.study import Study, read_json, write_json
from lorascope.traces import SEGMENT_NAMES

LEVELS = "examples/levels.json"
POOL = 4  # the sample of firings is so many times larger than what is kept per quantile
SHOWN_BINS = 40


@dataclass(frozen=True)
class ExamplesConfig:
    """Find the strongest examples of every feature, a sample per activation quantile, and its statistics."""

    corpus: str = "train"
    """Corpus to search."""
    kinds: str = "auto"
    """Kinds, comma-separated: direction, latent, base, random, untrained, neuron (auto: whose stages have been run)."""
    k: int = 50
    """Number of strongest examples per feature."""
    per_trace: int = 4
    """Most examples of a feature from one trace."""
    quantiles: int = 5
    """Number of quantiles of the firing activations."""
    per_quantile: int = 10
    """Number of random examples per quantile."""
    enough: int = 20
    """A feature that fires on fewer tokens is counted as having too few examples."""


@dataclass(frozen=True)
class Found:
    """What one pass finds for the F features of one kind."""

    top: Candidates
    sample: Candidates
    n_ordinary: int
    histogram_FH: npt.NDArray[np.uint32]
    """Firings by activation, in bins of equal ratio."""
    total_F: npt.NDArray[np.float64]
    """Sum of the firing activations."""
    segments_F4: Ints
    """Firings per segment."""

    @property
    def n_firing_F(self) -> Ints:
        """Number of firings."""
        return self.segments_F4.sum(axis=1)


def examples(study: Study, config: ExamplesConfig, options: Options) -> dict[str, Any]:
    """Search a corpus for examples of all features of some kinds; `{"corpus", "kinds": {kind: counts}}`.

    Raises:
        BadInput: an unknown kind or a number below 1.
        MissingStage: the corpus, or the training corpus for the firing levels, is not recorded.
    """
    if min(config.k, config.per_trace, config.quantiles, config.per_quantile) < 1:
        raise BadInput("--k, --per-trace, --quantiles and --per-quantile must be at least 1.")
    results: dict[str, Any] = {}
    for kind in chosen_kinds(study, config):
        features = load_features(study, config.corpus, kind)
        source = features.store.folder.name
        paths = {f"scalars/{corpus}/{source}/index.json" for corpus in (config.corpus, "train")}
        folder = f"examples/{config.corpus}"

        def work(features: FeatureSet = features) -> dict[str, Any]:
            return search_kind(study, config, features, options.seed)

        results[kind] = study.run(
            f"examples:{config.corpus}:{kind}",
            replace(config, kinds=kind),
            options,
            inputs=sorted(paths) + (["sae/sae_weights.safetensors"] if kind == "latent" else []),
            outputs=[f"{folder}/{kind}-examples.parquet", f"{folder}/{kind}-stats.parquet", LEVELS],
            work=work,
        )
        if kind not in read_json(study.path / LEVELS):  # the file was lost and came back with another kind
            train_levels(study, features)
    study.summarise({"examples": {config.corpus: results}})
    return {"corpus": config.corpus, "kinds": results}


def chosen_kinds(study: Study, config: ExamplesConfig) -> list[str]:
    """The kinds of features asked for."""
    if config.kinds == "auto":
        kinds = available_kinds(study, config.corpus)
        for corpus in (config.corpus, "train") if not kinds else ():
            load_features(study, corpus, next(iter(KINDS)))  # says what is missing
        return kinds
    return list(dict.fromkeys(part.strip() for part in config.kinds.split(",")))


def search_kind(study: Study, config: ExamplesConfig, features: FeatureSet, seed: int) -> dict[str, Any]:
    """Search, and write the tables of one kind; the counts."""
    level_F = train_levels(study, features)
    found = search(features, level_F, config, seed)
    folder = study.path / "examples" / config.corpus
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / f"{features.kind}-examples.parquet", example_table(features, found, config))
    write_table(folder / f"{features.kind}-stats.parquet", stats_table(features, found, level_F))
    n_firing = found.n_firing_F
    return {
        "features": len(features.ids),
        "ordinary_tokens": found.n_ordinary,
        "never_fire": int((n_firing == 0).sum()),
        "too_few": int((n_firing < config.enough).sum()),
        "examples": len(found.top.key) + len(found.sample.key),
    }


def train_levels(study: Study, features: FeatureSet) -> Floats:
    """Firing levels [F] from the training corpus, saved in `examples/levels.json`.

    Raises:
        MissingStage: the training corpus is not recorded.
        RunFailed: it was recorded with another adapter.
    """
    train = load_features(study, "train", features.kind)
    if train.ids != features.ids:
        raise RunFailed(f"The corpora of {study.path} were recorded with different adapters; record them again.")
    level_F = firing_levels(train)
    path = study.path / LEVELS
    levels = read_json(path) if path.exists() else {}
    named = {name: float(level) for name, level in zip(train.ids, level_F, strict=True)}
    write_json(path, levels | {features.kind: named})
    return level_F


def search(features: FeatureSet, level_F: Floats, config: ExamplesConfig, seed: int) -> Found:
    """One pass over the corpus: exact top k, a random sample of firings, and their statistics.

    Both take at most `per_trace` examples of a feature from a trace, ties to the earlier token. The top k are
    the largest activations above 0 among ordinary tokens, whether they fire or not; the rest is about firings.
    """
    store, count = features.store, len(features.ids)
    top = Selection(count, config.k, config.per_trace)
    sample = Selection(count, POOL * config.quantiles * config.per_quantile, config.per_trace)
    histogram_FH = np.zeros((count, BINS), np.uint32)
    total_F = np.zeros(count)
    segments_F4 = np.zeros((count, len(SEGMENT_NAMES)), np.int64)
    what = f"examples {features.kind}"
    for start, acts_TF in progress(features.chunks(), features.n_chunks, what, "chunk"):
        acts_TF[~store.ordinary[start : start + len(acts_TF)]] = 0
        firing = candidates_above(acts_TF, level_F, start, store)
        if (top.bound_F < activation_keys(level_F)).any():
            for first, stop in trace_pieces(store, start, start + len(acts_TF)):
                piece_TF = acts_TF[first - start : stop - start]
                top.add(candidates_above(piece_TF, piece_bound(piece_TF, top), first, store))
            top.merge()  # raises the bounds
        else:
            top.add(firing)
        slots = firing.feature * histogram_FH.shape[1] + bins_of(firing.value)
        np.add.at(histogram_FH.reshape(-1), slots, 1)
        total_F += np.bincount(firing.feature, firing.value, count)
        place = firing.feature * len(SEGMENT_NAMES) + store.segments[firing.position]
        segments_F4 += np.bincount(place, minlength=segments_F4.size).reshape(segments_F4.shape)
        sample.add(replace(firing, key=random_keys(seed, firing.feature, firing.position)))
    n_ordinary = int(store.ordinary.sum())
    return Found(top.merge(), sample.merge(), n_ordinary, histogram_FH, total_F, segments_F4)


def candidates_above(acts_TF: Floats, low_F: Floats, start: int, store: Store) -> Candidates:
    """All activations above `low_F` in a block of rows, by rising position."""
    flat = np.flatnonzero(acts_TF > low_F)
    row, feature = np.divmod(flat, acts_TF.shape[1])
    value = acts_TF.reshape(-1)[flat]
    trace_T = store.token_traces(np.arange(start, start + len(acts_TF)))
    return Candidates(feature, activation_keys(value), row + start, trace_T[row].astype(np.int64), value)


def trace_pieces(store: Store, start: int, stop: int) -> list[tuple[int, int]]:
    """The range [start, stop) of tokens, cut where a trace begins."""
    first, last = np.searchsorted(store.offsets, [start + 1, stop])
    cuts = [start, *store.offsets[first:last].tolist(), stop]
    return list(pairwise(cuts))


def piece_bound(piece_TF: Floats, top: Selection) -> Floats:
    """What an activation in this piece of a trace must exceed to matter for the top k, [F].

    Of the largest activations of many parts of the piece, `per_trace` are at least the bound: whatever is
    smaller has that many better ones in its trace. This spares long traces' rows at the start of a corpus.
    """
    bound_F = top.bound_F.view(np.float32)
    parts = 4 * top.per_trace
    rows = len(piece_TF) // parts
    if rows < 2:
        return bound_F
    largest_PF = piece_TF[: rows * parts].reshape(parts, rows, -1).max(axis=1)
    last_F = np.partition(largest_PF, parts - top.per_trace, axis=0)[parts - top.per_trace]
    return np.maximum(bound_F, np.nextafter(last_F, np.float32(0)))


def bin_edges() -> npt.NDArray[np.float64]:
    """Edges of the histogram's bins, [H + 1]."""
    steps = np.arange(BINS + 1)
    octave, part = np.divmod(steps, BINS_PER_OCTAVE)
    return np.exp2(octave + LOWEST) * (1 + part / BINS_PER_OCTAVE)


def firing_quantile(counts_H: npt.NDArray[Any], share: float, largest: float) -> float:
    """The activation that a share of the firings lie below, to within a bin (1.6%) and at most `largest`."""
    below = np.concatenate([[0], np.cumsum(counts_H)])
    if below[-1] == 0:
        return 0.0
    wanted = share * below[-1]
    bin_ = int(np.clip(np.searchsorted(below, wanted, side="left") - 1, 0, len(counts_H) - 1))
    low, high = bin_edges()[bin_ : bin_ + 2]
    inside = (wanted - below[bin_]) / max(1, counts_H[bin_])
    return float(min(low + inside * (high - low), largest))


def quantile_of(found: Found, sample: Candidates, quantiles: int) -> Ints:
    """The quantile (0 lowest) of each sampled firing among all firings of its feature, by the histogram."""
    bin_M = bins_of(sample.value)
    below_FH = np.cumsum(found.histogram_FH, axis=1, dtype=np.uint32)
    inside_M = found.histogram_FH[sample.feature, bin_M].astype(np.float64)
    upto_M = below_FH[sample.feature, bin_M].astype(np.float64)
    edges = bin_edges()
    part_M = np.clip((sample.value - edges[bin_M]) / (edges[bin_M + 1] - edges[bin_M]), 0, 1)
    rank_M = upto_M - inside_M + part_M * inside_M
    share_M = rank_M / found.n_firing_F[sample.feature]
    return np.clip((share_M * quantiles).astype(np.int64), 0, quantiles - 1)


def example_table(features: FeatureSet, found: Found, config: ExamplesConfig) -> pa.Table:
    """Rows (feature, where, rank, trace, position, activation): the top k, then the sample of each quantile."""
    quantile_M = quantile_of(found, found.sample, config.quantiles)
    # by feature and quantile, in the random order of the sample
    order = np.lexsort((~found.sample.key, quantile_M, found.sample.feature))
    order = order[rank_in_runs(found.sample.feature[order], quantile_M[order]) < config.per_quantile]
    # then by falling activation within a quantile
    value, position = found.sample.value, found.sample.position
    feature = found.sample.feature
    order = order[np.lexsort((position[order], -value[order], quantile_M[order], feature[order]))]
    sample, quantile = found.sample.take(order), quantile_M[order]
    parts = {
        "feature": np.concatenate([found.top.feature, sample.feature]),
        "where": np.concatenate([np.zeros(len(found.top.key), np.int64), quantile + 1]),
        "rank": np.concatenate([rank_in_runs(found.top.feature), rank_in_runs(sample.feature, quantile)]),
        "trace": np.concatenate([found.top.trace, sample.trace]),
        "position": np.concatenate([found.top.position, sample.position]),
        "activation": np.concatenate([found.top.value, sample.value]),
    }
    parts["position"] = parts["position"] - features.store.offsets[parts["trace"]]
    rows = np.lexsort((parts["rank"], parts["where"], parts["feature"]))
    names = pa.array(["top", *(f"q{i}" for i in range(config.quantiles))])
    columns = {
        "feature": pa.array(features.ids).take(pa.array(parts["feature"][rows])),
        "where": names.take(pa.array(parts["where"][rows])),
        **{key: pa.array(parts[key][rows].astype(np.int32)) for key in ("rank", "trace", "position")},
        "activation": pa.array(parts["activation"][rows]),
    }
    return pa.table(columns)


def stats_table(features: FeatureSet, found: Found, level_F: Floats) -> pa.Table:
    """One row per feature; shares, mean and p99 of a feature that never fires are 0."""
    n_F = found.n_firing_F
    some_F = np.maximum(n_F, 1)
    largest_F = np.zeros(len(n_F), np.float32)
    first = rank_in_runs(found.top.feature) == 0
    largest_F[found.top.feature[first]] = found.top.value[first]
    histograms = [shown_histogram(counts_H) for counts_H in found.histogram_FH]
    p99 = [
        firing_quantile(counts_H, 0.99, float(largest))
        for counts_H, largest in zip(found.histogram_FH, largest_F, strict=True)
    ]
    columns: dict[str, Any] = {
        "feature": features.ids,
        "level": level_F,
        "density": n_F / max(1, found.n_ordinary),
        "n_firing": n_F,
        "max": largest_F,
        "p99": np.array(p99, np.float32),
        "mean": (found.total_F / some_F).astype(np.float32),
        "hist_edges": pa.array([edges for edges, _ in histograms], pa.list_(pa.float32())),
        "hist_counts": pa.array([counts for _, counts in histograms], pa.list_(pa.int64())),
    }
    for segment, name in enumerate(SEGMENT_NAMES):
        if name != "special":
            columns[f"share_{name}"] = found.segments_F4[:, segment] / some_F
    return pa.table(columns)


def shown_histogram(counts_H: npt.NDArray[np.uint32]) -> tuple[list[float], list[int]]:
    """Edges and counts of at most `SHOWN_BINS` bins of equal ratio around the firings; empty without any."""
    filled = np.flatnonzero(counts_H)
    if not len(filled):
        return [], []
    width = 1
    while filled[-1] // width - filled[0] // width >= SHOWN_BINS:
        width *= 2
    first, stop = filled[0] // width * width, (filled[-1] // width + 1) * width
    counts = counts_H[first:stop].reshape(-1, width).sum(axis=1)
    return bin_edges()[first : stop + 1 : width].tolist(), [int(n) for n in counts]


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
