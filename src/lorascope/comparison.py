"""`lorascope compare`: directions, latents, neurons and controls in one table, with intervals, tests and power.

Every number is a mean over the features of a kind that one explainer was asked about. Features without an explanation
or a score are counted by reason, and `score_all` takes them as chance, since a mean over scored features alone
flatters a kind that fails often. Explainers are never mixed. Shape legend: n features, M measures, D draws.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.addresses import TYPE_ORDER, direction_layer, direction_type
from lorascope.config import Options
from lorascope.differences import (
    Clustered,
    Share,
    benjamini_hochberg,
    bootstrap_means,
    cluster_values,
    compare_means,
    compare_pairs,
    difference_of_shares,
    holm,
    proportions_p,
    ratio,
    smallest_difference,
)
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.explained import LEXICAL, current_rows, inputs_of, plain_reason
from lorascope.features import DIFFERENCE, cluster_of, source_of
from lorascope.layers import THIRDS, layer_count, layer_third
from lorascope.stats import FloatArray, percentile_bounds
from lorascope.study import Study, read_json, stream_rows, write_json

Json = dict[str, Any]
ORDER = ("direction", "latent", "neuron", "random", "untrained", "base")
"""Kinds in the order of the table."""
OUTPUT = "compare/compare.json"
CHANCE = 0.5
SEGMENTS = ("prompt", "think", "answer")
SHARES = tuple(f"share_{name}" for name in SEGMENTS)
CLASSES = ("0", "1", "2", "none")
SCORES = {
    "score": "detection",
    "wrong": "detection_wrong",
    "shuffled": "detection_shuffled",
    "gain": "detection_gain",
    "auroc": "detection_auroc",
    "fuzzing": "fuzzing",
    "fuzzing_wrong": "fuzzing_wrong",
    "fuzzing_shuffled": "fuzzing_shuffled",
    "fuzzing_gain": "fuzzing_gain",
    "fuzzing_auroc": "fuzzing_auroc",
}
"""A row's mean scores, and where a feature's score is in its explanation's row (a gain: less the wrong one's; AUROCs,
which only judges have, are inside the score)."""
MEASURES = (*SCORES, "score_all", "scored_share", *(f"class_{c}" for c in CLASSES), "density", *SEGMENTS, "reasoning")
TESTED = ("score", "score_all", "fuzzing", "scored_share", "class_0", "class_1", "class_2", "reasoning")
PROPORTIONS = ("scored_share", "class_0", "class_1", "class_2")
ALL_SHARES = (*PROPORTIONS, "class_none")
PAIRED = ("random", "untrained", "base")
"""Kinds that have a feature, or several, at each direction's address."""
FAMILIES = ("isotropic", "difference")


@dataclass(frozen=True)
class CompareConfig:
    """Compare kinds of features: scores beside wrong explanations', classes, densities, segments, with tests."""

    corpus: str = "heldout"
    """Corpus that the explanations were scored on, whose densities and segments are taken."""
    draws: int = 10_000
    """Bootstrap draws of each interval, and permutations of each test."""


@dataclass(frozen=True)
class Cell:
    """Features of one kind, or those of them in one group (a layer third, a type)."""

    explainer: str
    kind: str
    group: str | None
    ids: list[str]
    said: list[tuple[bool, str | None]]
    """Of each feature, whether it has an explanation, and why it has no score (None: it has one)."""
    size: int
    """Features of the kind, explained or not."""
    training_tokens: int | None
    """Ordinary tokens of the kind's training recording, from which rules were learned."""
    values_nM: FloatArray

    @cached_property
    def clustered(self) -> Clustered:
        """Values by direction."""
        return cluster_values(self.values_nM, [cluster_of(name) for name in self.ids])

    def draws(self, config: CompareConfig, seed: int) -> FloatArray:
        """Bootstrap draws [D, M]; they depend on the cell alone, so that another kind changes nothing."""
        name = f"{self.explainer} {self.kind} {self.group}".encode()
        return bootstrap_means(self.clustered, np.random.default_rng([seed, *name]), config.draws)


def compare(study: Study, config: CompareConfig, options: Options) -> Json:
    """Write `compare/compare.json` and return it.

    Returns:
        `{"corpus", "explainers", "corrected_over", "rows", "tests", "by": {"third", "type", "family": {"rows",
        "tests"}}, "missing", "stale"}`. A row: `{"explainer", "kind", "group", "n", "clusters", "features",
        "training_tokens", "explained", "scored", "failures": {reason: n}, "score": {"value", "low", "high"}, "wrong",
        "shuffled", "gain", "auroc", "fuzzing", "fuzzing_wrong", "fuzzing_shuffled", "fuzzing_gain", "fuzzing_auroc",
        "score_all", "scored_share", "classes": {"0", "1", "2", "none"} or None, "density",
        "segments": {"prompt", "think", "answer"}, "reasoning"}`; None where nothing is known. A test:
        `{"explainer", "group", "measure", "first", "second", "n", "difference": {"value", "low", "high"}, "p",
        "p_pooled_uncorrected", "detectable", "paired": {"addresses", "difference", "p_uncorrected"} or None, "p_holm",
        "q"}`: first - second. The two last are corrected over all tests of one table and one explainer, so the error
        rate is controlled in each table and not over all of them together; what is called uncorrected is as it is
        called, and the pooled one takes the polarities of a direction as independent too.

    Raises:
        BadInput: too few draws.
        MissingStage: nothing is explained on this corpus.
    """
    if config.draws < 100:
        raise BadInput("--draws must be at least 100.")
    study.corpus_file(config.corpus)  # refuses a name that is none
    names = {name for kind in ORDER for name in (*files_of(config.corpus, kind), *inputs_of(config.corpus, kind))}
    inputs = sorted(name for name in names if study.fingerprint(name))

    def work() -> Json:
        result = comparison_of(study, config, options.seed)
        write_json(study.path / OUTPUT, result)
        return result

    return study.run("compare", config, options, inputs=inputs, outputs=[OUTPUT], work=work)


def files_of(corpus: str, kind: str) -> list[str]:
    """What is known of a kind: statistics, explanations, reasoning scores."""
    return [
        f"examples/{corpus}/{kind}-stats.parquet",
        f"explanations/{kind}.jsonl",
        f"reasoning/{corpus}/{kind}.parquet",
    ]


def comparison_of(study: Study, config: CompareConfig, seed: int) -> Json:
    """All tables."""
    cells: list[Cell] = []
    missing, stale = [], []
    for kind in ORDER:
        told = dict.fromkeys(row["explainer"] for row in rows_about(study, config.corpus, kind))
        of_now = study.is_current(f"examples:{config.corpus}:{kind}")
        current = current_rows(study, kind, rows_about(study, config.corpus, kind)) if of_now else ()
        found, now = read_kind(study, config.corpus, kind, current)
        cells += found
        stale += stale_explainers(study, config.corpus, kind, [name for name in told if name not in now])
        if not told or (now and not found):
            missing.append({"kind": kind, "run": command_for(study, config.corpus, kind)})
    if not cells:
        gone = (missing + stale)[0]
        raise MissingStage(f"No features are explained and scored on {config.corpus}; run: {gone['run']}.")
    groupings: dict[str, Callable[[str, str], Sequence[str]]] = {
        "third": thirds_of(layer_count(study)),
        "type": types_of,
        "family": families_of,
    }
    tables = {name: table_of(split_cells(cells, group), config, seed) for name, group in groupings.items()}
    explainers = list(dict.fromkeys(cell.explainer for cell in cells))
    whole = table_of(cells, config, seed)
    return {
        "corpus": config.corpus,
        "explainers": explainers,
        "corrected_over": "the tests of one table and one explainer",
        **whole,
        "by": tables,
        "missing": missing,
        "stale": stale,
    }


def command_for(study: Study, corpus: str, kind: str) -> str:
    """The next command towards a kind's row."""
    source = source_of(kind)
    for name in dict.fromkeys(("train", corpus)):
        if not (study.path / "scalars" / name / source / "index.json").is_file():
            return f"lorascope record {study.path} --corpus {name} --source {source}"
    if kind == "latent" and not (study.path / "sae" / "sae_weights.safetensors").is_file():
        return f"lorascope sae {study.path}"
    if not (study.path / files_of(corpus, kind)[0]).is_file():
        return f"lorascope examples {study.path} --corpus {corpus} --kinds {kind}"
    return f"lorascope explain {study.path} --corpus {corpus} --kinds {kind}"


def rows_about(study: Study, corpus: str, kind: str) -> Iterator[Json]:
    """The rows of all explainers about a kind, scored on a corpus; one in memory at a time."""
    rows = stream_rows(study.path / f"explanations/{kind}.jsonl")
    return (row for row in rows if row["corpus"] == corpus)


def stale_explainers(study: Study, corpus: str, kind: str, explainers: Sequence[str]) -> list[Json]:
    """Explainers whose rows are all of features that a kind no longer has, with the command that renews them."""
    renew = f"lorascope explain {study.path} --corpus {corpus} --kinds {kind}"
    stale = []
    for explainer in explainers:
        judge = "" if explainer == LEXICAL else f" --explainer judge --judge-model {explainer.partition(':')[2]} ..."
        run = renew + judge
        if not study.is_current(f"examples:{corpus}:{kind}"):
            run = f"lorascope examples {study.path} --corpus {corpus} --kinds {kind}"
        stale.append({"kind": kind, "explainer": explainer, "run": run})
    return stale


def read_kind(study: Study, corpus: str, kind: str, explained: Iterable[Json]) -> tuple[list[Cell], set[str]]:
    """A kind's features that were explained for a corpus, one cell per explainer, and whose explanations there are.

    Rows are looked at once and not kept.
    """
    stats_file, _, reasoning_file = (study.path / name for name in files_of(corpus, kind))
    stats = {row["feature"]: row for row in table_rows(stats_file, ("feature", "density", "n_firing", *SHARES))}
    # Scores of features that the study no longer has are left out.
    reasoned = table_rows(reasoning_file, ("feature", "score"))
    reasoned = reasoned if study.is_current(f"reasoning:{corpus}:{kind}") else []
    reasoning = {row["feature"]: row["score"] for row in reasoned}
    index = study.path / "scalars" / "train" / source_of(kind) / "index.json"
    tokens = read_json(index)["counts"]["ordinary"] if index.is_file() else None
    explainers: set[str] = set()
    by_explainer: dict[str, dict[str, tuple[FloatArray, tuple[bool, str | None]]]] = {}
    for row in explained:
        name = row["feature"]
        explainers.add(row["explainer"])
        if name in stats:
            values = np.array(measure(row, stats[name], reasoning.get(name)))
            failed = not np.isfinite(values[MEASURES.index("score")])
            reason = plain_reason(row.get("reason") or "no score") if failed else None
            by_explainer.setdefault(row["explainer"], {})[name] = values, (row["text"] is not None, reason)
    cells = []
    for explainer, found in by_explainer.items():
        values_nM = np.array([values for values, _ in found.values()])
        classes = [MEASURES.index(f"class_{name}") for name in CLASSES]
        if (values_nM[:, MEASURES.index("class_none")] == 1).all():
            values_nM[:, classes] = np.nan  # nobody was asked for classes
        said = [of_feature for _, of_feature in found.values()]
        cells.append(Cell(explainer, kind, None, list(found), said, len(stats), tokens, values_nM))
    return cells, explainers


def table_rows(path: Path, columns: Sequence[str]) -> list[Json]:
    """Some columns of a Parquet file as dicts, none when it does not exist.

    Raises:
        RunFailed: the file is damaged, or has no such columns.
    """
    if not path.is_file():
        return []
    try:
        rows: list[Json] = pq.read_table(path, columns=list(columns)).select(list(columns)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunFailed(f"{path} is damaged ({error}); remove it and run its stage again.") from error
    return rows


def class_of(row: Json) -> str | None:
    """The class that a judge gave, `0`, `1` or `2`: a row's `"class": {"class", "reason", "failure"}`."""
    text = str((row.get("class") or {}).get("class"))
    return text if text in ("0", "1", "2") else None


def measure(row: Json, stat: Json, reasoning: float | None) -> list[float]:
    """A feature's number for each of `MEASURES`, NaN where it has none."""
    scored = row["scored"] or {}
    found = {name: (scored.get(name) or {}).get("value", np.nan) for name in SCORES.values()}
    for task in ("detection", "fuzzing"):
        found[f"{task}_auroc"] = ((scored.get(task) or {}).get("auroc") or {}).get("value", np.nan)
        found[f"{task}_gain"] = found[task] - found[f"{task}_wrong"]
    known = bool(np.isfinite(found["detection"]))
    given = class_of(row) or "none"
    classes = [float(given == name) for name in CLASSES]
    shares = [stat[name] if stat["n_firing"] else np.nan for name in SHARES]
    return [
        *(found[name] for name in SCORES.values()),
        found["detection"] if known else CHANCE,
        float(known),
        *classes,
        stat["density"],
        *shares,
        np.nan if reasoning is None else reasoning,
    ]


def place_of(kind: str, feature: str) -> tuple[int | None, str | None]:
    """Layer and type of a feature; a neuron has no type, a latent neither."""
    if kind == "latent":
        return None, None
    address = cluster_of(feature).removeprefix(f"{kind}.")
    return direction_layer(address), None if kind == "neuron" else direction_type(address)


def thirds_of(count: int | None) -> Callable[[str, str], Sequence[str]]:
    """The grouping of features by thirds of the model's layers, where their number is known."""

    def third_of(kind: str, feature: str) -> Sequence[str]:
        layer = place_of(kind, feature)[0]
        return () if layer is None or count is None else (layer_third(layer, count),)

    return third_of


def types_of(kind: str, feature: str) -> Sequence[str]:
    """The type that a feature is of."""
    type_ = place_of(kind, feature)[1]
    return () if type_ is None else (type_,)


def families_of(kind: str, feature: str) -> Sequence[str]:
    """Both families of random directions, each beside all trained ones."""
    if kind == "direction":
        return FAMILIES
    return () if kind != "random" else (FAMILIES[DIFFERENCE in feature],)


def split_cells(cells: Sequence[Cell], groups_of: Callable[[str, str], Sequence[str]]) -> list[Cell]:
    """The features of each cell by group: early to late, q to down, the kinds of each group together."""
    parts: list[Cell] = []
    for cell in cells:
        members: dict[str, list[int]] = {}
        for number, name in enumerate(cell.ids):
            for group in groups_of(cell.kind, name):
                members.setdefault(group, []).append(number)
        parts += [
            replace(
                cell,
                group=group,
                ids=[cell.ids[i] for i in chosen],
                said=[cell.said[i] for i in chosen],
                values_nM=cell.values_nM[chosen],
            )
            for group, chosen in members.items()
        ]
    known = [*THIRDS, *TYPE_ORDER, *FAMILIES]
    return sorted(parts, key=lambda part: known.index(part.group) if part.group in known else len(known))


def table_of(cells: Sequence[Cell], config: CompareConfig, seed: int) -> Json:
    """`{"rows", "tests"}` of some cells; those of one explainer and group are compared, and corrected per explainer."""
    draws = [cell.draws(config, seed) for cell in cells]
    rows = [row_of(cell, draws_DM) for cell, draws_DM in zip(cells, draws, strict=True)]
    tests: list[Json] = []
    for explainer in dict.fromkeys(cell.explainer for cell in cells):
        own = [
            test
            for i, first in enumerate(cells)
            for j, second in enumerate(cells)
            if (first.explainer, second.group) == (explainer, first.group) and is_pair(first, second)
            for test in tests_of(first, second, draws[i], draws[j], config, seed)
        ]
        p = [test["p"] if test["p"] is not None else np.nan for test in own]
        for test, p_holm, q in zip(own, holm(p), benjamini_hochberg(p), strict=True):
            tests.append(test | {"p_holm": known_number(p_holm), "q": known_number(q)})
    return {"rows": rows, "tests": tests}


def is_pair(first: Cell, second: Cell) -> bool:
    """What is compared: directions with every other kind, and latents with neurons."""
    kinds = (first.kind, second.kind)
    return first.explainer == second.explainer and (
        kinds == ("latent", "neuron") or (first.kind == "direction" != second.kind)
    )


def row_of(cell: Cell, draws_DM: FloatArray) -> Json:
    """A cell's row."""
    intervals = {
        name: interval_of(Share(value, draws_DM[:, k], with_value(cell, k)), name in ALL_SHARES)
        for k, (name, value) in enumerate(zip(MEASURES, means(cell), strict=True))
    }
    failures = dict(Counter(reason for _, reason in cell.said if reason is not None))
    classes = {name: intervals[f"class_{name}"] for name in CLASSES}
    return {
        "explainer": cell.explainer,
        "kind": cell.kind,
        "group": cell.group,
        "n": len(cell.ids),
        "clusters": len(cell.clustered.sums_CM),
        "features": cell.size,
        "training_tokens": cell.training_tokens,
        "explained": sum(explained for explained, _ in cell.said),
        "scored": len(cell.ids) - sum(failures.values()),
        "failures": failures,
        **{name: intervals[name] for name in (*SCORES, "score_all", "scored_share")},
        "classes": classes if all(classes.values()) else None,
        "density": intervals["density"],
        "segments": {name: intervals[name] for name in SEGMENTS},
        "reasoning": intervals["reasoning"],
    }


def means(cell: Cell) -> list[float]:
    """The mean of each measure."""
    return [float(value) for value in cell.clustered.means_M]


def with_value(cell: Cell, k: int) -> int:
    """How many clusters of a cell have a value of a measure."""
    return int((cell.clustered.counts_CM[:, k] > 0).sum())


def interval_of(mean: Share, is_share: bool = False) -> Json | None:
    """`{"value", "low", "high"}`, rounded; None without a value, and None as bounds of a single cluster's mean."""
    if not np.isfinite(mean.value):
        return None
    if is_share and mean.at_end:
        return rounded(mean.value, mean.bounds)
    return rounded(mean.value, percentile_bounds(mean.draws_D) if mean.clusters > 1 else (np.nan, np.nan))


def rounded(value: float, bounds: tuple[float, float]) -> Json:
    """`{"value", "low", "high"}`."""
    return {name: known_number(number) for name, number in zip(("value", "low", "high"), (value, *bounds), strict=True)}


def known_number(value: float) -> float | None:
    """A number to six significant figures; None when it is not finite."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def address_means(cell: Cell) -> dict[str, FloatArray]:
    """The mean [M] of a cell's features at each address of a direction: both polarities, both random families."""
    addresses = [cluster_of(name).removeprefix(f"{cell.kind}.").removesuffix(DIFFERENCE) for name in cell.ids]
    found = cluster_values(cell.values_nM, addresses)
    return dict(zip(dict.fromkeys(addresses), ratio(found.sums_CM, found.counts_CM), strict=True))


def paired_comparisons(first: Cell, second: Cell, config: CompareConfig, seed: int) -> list[Json] | None:
    """For each measure, directions against what stands at the same addresses; None for a kind without such."""
    if (first.kind, second.kind) not in [("direction", kind) for kind in PAIRED]:
        return None
    one, two = address_means(first), address_means(second)
    difference_PM = np.array([one[address] - two[address] for address in one if address in two])
    name = f"paired {first.explainer} {first.kind} {second.kind} {first.group}".encode()
    rng = np.random.default_rng([seed, *name])
    found = compare_pairs(difference_PM.reshape(-1, len(MEASURES)), rng, config.draws)
    return [
        {
            "addresses": pair.pairs,
            "difference": interval_of(Share(pair.difference, pair.draws_D, pair.pairs)),
            "p_uncorrected": known_number(pair.p),
        }
        for pair in found
    ]


def tests_of(
    first: Cell, second: Cell, draws_DM: FloatArray, other_DM: FloatArray, config: CompareConfig, seed: int
) -> list[Json]:
    """Tests of each measure that both cells have."""
    name = f"{first.explainer} {first.kind} {second.kind} {first.group}".encode()
    rng = np.random.default_rng([seed, *name])
    found = compare_means(first.clustered, second.clustered, rng, config.draws)
    pairs = paired_comparisons(first, second, config, seed)
    cells, draws = (first, second), (draws_DM, other_DM)
    counts = [[int(n) for n in cell.clustered.counts_CM.sum(0)] for cell in cells]
    hits = [[round(float(s)) for s in cell.clustered.sums_CM.sum(0)] for cell in cells]
    tests = []
    for k, measure_name in enumerate(MEASURES):
        n, other_n = counts[0][k], counts[1][k]
        if measure_name not in TESTED or not n or not other_n:
            continue
        pooled, error = np.nan, found[k].standard_error
        # A single cluster tells nothing of how far another would be from it, on whichever side it stands.
        enough = all(with_value(cell, k) > 1 for cell in cells)
        bounds = percentile_bounds(draws_DM[:, k] - other_DM[:, k]) if enough else (np.nan, np.nan)
        if measure_name in PROPORTIONS:
            pooled = proportions_p(hits[0][k], n, hits[1][k], other_n)
            shares = [Share(means(c)[k], d[:, k], with_value(c, k)) for c, d in zip(cells, draws, strict=True)]
            if enough and any(share.at_end for share in shares):
                bounds, error = difference_of_shares(*shares)
        tests.append(
            {
                "explainer": first.explainer,
                "group": first.group,
                "measure": measure_name,
                "first": first.kind,
                "second": second.kind,
                "n": [n, other_n],
                "difference": rounded(found[k].difference, bounds),
                "p": known_number(found[k].p),
                "p_pooled_uncorrected": known_number(pooled),
                "detectable": known_number(smallest_difference(error)),
                "paired": pairs and pairs[k],
            }
        )
    return tests
