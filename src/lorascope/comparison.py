"""`lorascope compare`: directions, latents, neurons and controls in one table, with intervals, tests and power.

Every number is a mean over the features of a kind that one explainer was asked about. Features without an explanation
or a score are counted by reason, and `score_all` takes them as chance, since a mean over scored features alone
flatters a kind that fails often. Features whose requests failed and are
to be asked again are in no score. Explainers are never mixed. Shape legend: n features, M measures, D draws.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorascope.addresses import TYPE_ORDER, direction_layer, direction_type
from lorascope.comparison_cells import (
    CLASSES,
    MEASURES,
    METHOD,
    SCORES,
    SEGMENTS,
    WHOSE,
    Cell,
    Json,
    explain_command,
    files_of,
    read_kind,
)
from lorascope.comparison_tests import ALL_SHARES, interval_of, is_pair, known_number, means, tests_of, with_value
from lorascope.config import Options
from lorascope.differences import Share, benjamini_hochberg, holm
from lorascope.errors import BadInput, MissingStage
from lorascope.explained import LEXICAL, current_rows, inputs_of
from lorascope.features import DIFFERENCE, cluster_of, source_of
from lorascope.layers import THIRDS, layer_count, layer_third
from lorascope.stats import FloatArray
from lorascope.study import Study, stream_rows, write_json

ORDER = ("direction", "latent", "neuron", "random", "untrained", "base")
"""Kinds in the order of the table."""
OUTPUT = "compare/compare.json"
FAMILIES = ("isotropic", "difference")


@dataclass(frozen=True)
class CompareConfig:
    """Compare kinds of features: scores beside wrong explanations', classes, densities, segments, with tests."""

    corpus: str = "heldout"
    """Corpus that the explanations were scored on, whose densities and segments are taken."""
    draws: int = 10_000
    """Bootstrap draws of each interval, and permutations of each test."""


def compare(study: Study, config: CompareConfig, options: Options) -> Json:
    """Write `compare/compare.json` and return it.

    Returns:
        `{"method", "corpus", "explainers", "corrected_over", "rows", "tests", "by": {"third", "type", "family":
        {"rows", "tests"}}, "missing", "stale"}`. A row: `{"explainer", "kind", "group", "n", "clusters", "features",
        "training_tokens", "explained", "scored", "failures": {reason: n}, "to_retry", "unread": {"own": {"answers",
        "unread", "share"}, "wrong", "shuffled"}, "score": {"value", "low", "high"}, "wrong",
        "shuffled", "gain", "auroc", "fuzzing", "fuzzing_wrong", "fuzzing_shuffled", "fuzzing_gain", "fuzzing_auroc",
        "score_all", "scored_share", "classes": {"0", "1", "2", "none"} or None, "density",
        "segments": {"prompt", "think", "answer"}, "reasoning"}`; None where nothing is known. A test:
        `{"explainer", "group", "measure", "first", "second", "n", "difference": {"value", "low", "high"}, "p",
        "p_pooled_uncorrected", "detectable", "paired": {"addresses", "difference", "p_uncorrected"} or None,
        "not_compared": {"kind", "tokens": [n, n], "reason", "run"} or None, "p_holm", "q"}`: first - second. A test
        that is `not_compared` is of unequal things, says why, and is not to be claimed from. The two last are corrected
        over all tests of one table and one explainer, so the error rate is controlled in each table and not over all of
        them together; what is called uncorrected is as it is called, and the pooled one takes the polarities of a
        direction as independent too.

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

    study.expire("compare", unless=METHOD)
    return study.run("compare", config, options, inputs=inputs, outputs=[OUTPUT], work=work)


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
        "method": METHOD,
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
    return explain_command(study, corpus, kind, LEXICAL)


def rows_about(study: Study, corpus: str, kind: str) -> Iterator[Json]:
    """The rows of all explainers about a kind, scored on a corpus; one in memory at a time."""
    rows = stream_rows(study.path / f"explanations/{kind}.jsonl")
    return (row for row in rows if row["corpus"] == corpus)


def stale_explainers(study: Study, corpus: str, kind: str, explainers: Sequence[str]) -> list[Json]:
    """Explainers whose rows are all of features that a kind no longer has, with the command that renews them."""
    stale = []
    for explainer in explainers:
        run = explain_command(study, corpus, kind, explainer)
        if not study.is_current(f"examples:{corpus}:{kind}"):
            run = f"lorascope examples {study.path} --corpus {corpus} --kinds {kind}"
        stale.append({"kind": kind, "explainer": explainer, "run": run})
    return stale


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
    draws = [cell.draws(config.draws, seed) for cell in cells]
    rows = [row_of(cell, draws_DM) for cell, draws_DM in zip(cells, draws, strict=True)]
    tests: list[Json] = []
    for explainer in dict.fromkeys(cell.explainer for cell in cells):
        own = [
            test
            for i, first in enumerate(cells)
            for j, second in enumerate(cells)
            if (first.explainer, second.group) == (explainer, first.group) and is_pair(first, second)
            for test in tests_of(first, second, draws[i], draws[j], config.draws, seed)
        ]
        p = [test["p"] if test["p"] is not None else np.nan for test in own]
        for test, p_holm, q in zip(own, holm(p), benjamini_hochberg(p), strict=True):
            tests.append(test | {"p_holm": known_number(p_holm), "q": known_number(q)})
    return {"rows": rows, "tests": tests}


def row_of(cell: Cell, draws_DM: FloatArray) -> Json:
    """A cell's row."""
    intervals = {
        name: interval_of(Share(value, draws_DM[:, k], with_value(cell, k)), name in ALL_SHARES)
        for k, (name, value) in enumerate(zip(MEASURES, means(cell), strict=True))
    }
    failures = dict(Counter(said.reason for said in cell.said if said.reason is not None))
    classes = {name: intervals[f"class_{name}"] for name in CLASSES}
    return {
        "explainer": cell.explainer,
        "kind": cell.kind,
        "group": cell.group,
        "n": len(cell.ids),
        "clusters": len(cell.clustered.sums_CM),
        "features": cell.size,
        "training_tokens": cell.learned and cell.learned.ordinary,
        "explained": sum(said.explained for said in cell.said),
        "scored": len(cell.ids) - sum(failures.values()),
        "failures": failures,
        "to_retry": sum(said.to_retry for said in cell.said),
        "unread": {whose: unread(cell, whose) for whose in WHOSE},
        **{name: intervals[name] for name in (*SCORES, "score_all", "scored_share")},
        "classes": classes if all(classes.values()) else None,
        "density": intervals["density"],
        "segments": {name: intervals[name] for name in SEGMENTS},
        "reasoning": intervals["reasoning"],
    }


def unread(cell: Cell, whose: str) -> Json:
    """How many answers the scores rest on that were tried with one explanation, and how many of them were not read."""
    counts = [said.answers.get(whose, (0, 0)) for said in cell.said]
    asked, failed = (sum(count[k] for count in counts) for k in (0, 1))
    return {"answers": asked, "unread": failed, "share": known_number(failed / asked) if asked else None}
