"""The stage `lorascope categorize STUDY`: categories of features, their shares, and clusters found without a taxonomy.

Shapes: F = features, N = directions, P = points of a space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.explain.budget import Budget, account, limits_of
from lorascope.explain.categories.asking import judge_asker
from lorascope.explain.categories.assign import (
    REASON_SILENT,
    Ask,
    AskAll,
    Assignment,
    assign_by_asking,
    assign_by_words,
)
from lorascope.explain.categories.clusters import unit_rows
from lorascope.explain.categories.extras import embed_texts, place_by_umap
from lorascope.explain.categories.kinds import Kind, explained_words, output_file, read_kind
from lorascope.explain.categories.shares import Group, make_groups, share_rows, tally_traces
from lorascope.explain.categories.spaces import (
    STATES,
    Place,
    Space,
    activity_vectors,
    explanation_vectors,
    first_two,
    flow_rows,
    make_space,
    spaced_tokens,
    state_vectors,
)
from lorascope.explain.categories.tables import (
    compare_spaces,
    describe_points,
    describe_space,
    feature_table,
    token_table,
)
from lorascope.explain.categories.taxonomy import Taxonomy, load_taxonomy
from lorascope.explain.categories.words import (
    explanation_words,
    feature_text,
    make_bags,
    one_explanation,
)
from lorascope.explain.judge_log import is_passing
from lorascope.explain.judges import Reply
from lorascope.explain.settings import JudgeConfig, check_judge
from lorascope.explained import ASSIGNED, CATEGORIES, NO_ANSWER, NONE_FITS, WITHOUT, current_rows, inputs_of
from lorascope.features import FeatureSet, load_features
from lorascope.layers import layer_count
from lorascope.progress import progress
from lorascope.study import Study, atomic_write_text, stream_rows, whole_folder, write_json
from lorascope.token_text import open_tokenizer, vocabulary_texts

FOLDER = "categories"
RELATIVE_UNIT = "effect over rms of the base's own output, per unit of activation"
MAPS = {"pca", "umap"}


@dataclass(frozen=True)
class CategorizeConfig(JudgeConfig):
    """Sort features into the categories of a taxonomy, measure their shares, and cluster the features without it."""

    taxonomy: str | None = None
    """YAML file of categories, subcategories, their words and examples (default: the seven functional categories)."""
    by: str = "lexical"
    """What assigns: lexical (words of explanation and examples, no model) or judge (a language model behind a URL)."""
    kinds: str = "latent,direction"
    """Kinds of features, separated by commas: direction, latent, base, random, untrained, neuron."""
    corpus: str = "heldout"
    """Corpus whose examples and firings are used."""
    map: str = "pca"
    """How the 2-D maps are made: pca, or umap (needs umap-learn)."""
    embed: str | None = None
    """Sentence-transformers model (hub id or folder) that embeds explanations for their clusters; needs
    sentence-transformers (default: TF-IDF)."""
    enough: int = 20
    """A feature that fires on fewer tokens is not clustered."""


def categorize(study: Study, config: CategorizeConfig, options: Options, ask: Ask | None = None) -> dict[str, Any]:
    """Write `categories/`: KIND.jsonl, shares.json, clusters.json, flow.json (latents) and maps.parquet.

    Args:
        ask: with `by="judge"`, a function from a feature's text to a name or None, in place of the judge behind a URL.

    Returns:
        `{"corpus", "taxonomy", "kinds": {kind: {"features", "assigned", "none_fits", "no_answer", "without", "shares":
        [{"category", "n", "count", "rate", "mass"}]}}}`, shares as in `share_rows` but for subcategories, and `"spent"`
        as in `explain` where a judge behind a URL was asked.

    Raises:
        BadInput: an unknown option's value or kind, a file that is no taxonomy, a judge that is not given, a missing
            package.
        MissingStage: examples or explanations are missing; the message names the command.
    """
    kinds = [kind.strip() for kind in config.kinds.split(",") if kind.strip()]
    if config.by not in ("lexical", "judge") or config.map not in MAPS:
        raise BadInput("--by is lexical or judge, and --map is pca or umap.")
    if not kinds or config.enough < 1:
        raise BadInput("Name at least one kind in --kinds, and give --enough a number of at least 1.")
    if config.by == "judge" and ask is None:
        check_judge(config, "--by judge")
    taxonomy = load_taxonomy(config.taxonomy)
    features = {kind: load_features(study, config.corpus, kind) for kind in dict.fromkeys(kinds)}
    inputs = required_inputs(study, config.corpus, features)

    def work() -> dict[str, Any]:
        budget = Budget(limits_of(config))
        with whole_folder(study.path / FOLDER) as folder, asker(study, config, taxonomy, budget, ask) as ask_all:
            found = fill_folder(study, folder, config, options, taxonomy, features, ask_all)
        return found | ({"spent": account(budget)} if config.by == "judge" and ask is None else {})

    names = [f"{kind}.jsonl" for kind in features] + ["shares.json", "clusters.json", "maps.parquet"]
    names += ["flow.json"] if "latent" in features else []
    study.expire("categorize", unless=CATEGORIES)
    result = study.run(
        "categorize",
        replace(config, taxonomy=f"{config.taxonomy or 'built-in'} {identity(taxonomy)}"),
        options,
        inputs=inputs,
        outputs=[f"{FOLDER}/{name}" for name in names],
        work=work,
    )
    rows = (row for kind in features for row in stream_rows(study.path / FOLDER / f"{kind}.jsonl"))
    if any(is_passing(row["reason"].removeprefix(f"{REASON_SILENT}: ")) for row in rows):
        study.expire("categorize")  # so that the same command asks for these again
    return result


@contextmanager
def asker(
    study: Study, config: CategorizeConfig, taxonomy: Taxonomy, budget: Budget, ask: Ask | None
) -> Iterator[AskAll | None]:
    """Inside, what answers for many features at once; None where words assign."""
    if config.by != "judge":
        yield None
    elif ask is not None:
        yield lambda texts: [Reply(ask(text)) for text in texts]
    else:
        with judge_asker(study, config, taxonomy, budget) as ask_all:
            yield ask_all


def identity(taxonomy: Taxonomy) -> str:
    """A short hash of a taxonomy's content: an edited file makes the stage stale."""
    said: list[object] = [taxonomy.name, taxonomy.descriptions, taxonomy.examples]
    for sub in taxonomy.subcategories:
        words = [sorted(sub.words), [p.pattern for p in sub.patterns], sorted(sub.classes), sorted(sub.segments)]
        said.append([sub.category, sub.name, sub.description, sub.examples, *words])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def required_inputs(study: Study, corpus: str, features: dict[str, FeatureSet]) -> list[str]:
    """The files that are read; MissingStage for the first that is not there."""
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    inputs = ["tokenizer/tokenizer.json"]
    for kind in features:
        needed = [f"examples/{corpus}/{kind}-{what}.parquet" for what in ("examples", "stats")]
        for path in (*needed, "examples/levels.json"):
            study.require(path, f"lorascope examples STUDY --corpus {corpus}")
        study.require(f"explanations/{kind}.jsonl", f"lorascope explain STUDY --kinds {kind}")
        require_current(study, corpus, kind)
        inputs += [*needed, f"explanations/{kind}.jsonl", *inputs_of(corpus, kind)]
    inputs += [output_file(corpus)] if (study.path / output_file(corpus)).is_file() else []
    return list(dict.fromkeys(inputs))


def require_current(study: Study, corpus: str, kind: str) -> None:
    """Raise MissingStage where examples or explanations are of other features than the study has now.

    Ids alone do not tell: another autoencoder of the same size has the same ones.
    """
    rows = study.path / f"explanations/{kind}.jsonl"
    none_said = next(stream_rows(rows), None) is None
    for of_now, command in (
        (study.is_current(f"examples:{corpus}:{kind}"), "examples"),
        (none_said or any(True for _ in current_rows(study, kind, stream_rows(rows))), "explain"),
    ):
        if not of_now:
            raise MissingStage(
                f"What {command} found is of other {kind} features than the study has now; run: "
                f"lorascope {command} {study.path}."
            )


def fill_folder(
    study: Study,
    folder: Path,
    config: CategorizeConfig,
    options: Options,
    taxonomy: Taxonomy,
    features: dict[str, FeatureSet],
    ask_all: AskAll | None,
) -> dict[str, Any]:
    """Everything of one run, into a folder; the stage's result."""
    texts = vocabulary_texts(open_tokenizer(study.path / "tokenizer"))
    place: Place = first_two if config.map == "pca" else partial(place_by_umap, seed=options.seed)
    counts: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    clusters: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    tables: list[pa.Table] = []
    for name, of_kind in progress(features.items(), len(features), "categorize", "kind"):
        kind = read_kind(study, config.corpus, of_kind, texts)
        draws = partial(generator, options.seed, name)
        assigned = assign_kind(kind, taxonomy, ask_all, draws("null"))
        atomic_write_text(
            folder / f"{name}.jsonl",
            "".join(json.dumps(one.as_row(), ensure_ascii=False, allow_nan=False) + "\n" for one in assigned),
        )
        groups, group_F = make_groups(assigned, taxonomy)
        shares[name] = measure_shares(kind, groups, group_F, draws("shares"))
        counts[name] = count_assigned(assigned) | {"shares": of_categories(shares[name]["rows"])}
        spaces = feature_spaces(kind, config, options.device, place, draws("spaces"))
        clusters += [describe_space(space, kind, config.enough) for space in spaces]
        agreement += compare_spaces(spaces, assigned, draws("agreement"))
        tables += [feature_table(space, kind, assigned) for space in spaces]
        if kind.decoder_FN is not None:
            write_json(folder / "flow.json", make_flow(kind, assigned, layer_count(study) or 1))
    states = load_features(study, config.corpus, "direction").store
    at_T = spaced_tokens(states, STATES)
    space = make_space("token", "states", at_T, state_vectors(states, at_T), place, generator(options.seed, "states"))
    clusters.append(describe_points(space))
    tables.append(token_table(space, states, texts))
    order = [{"name": c, "description": taxonomy.descriptions[c]} for c in taxonomy.categories]
    about = {
        "method": CATEGORIES,
        "corpus": config.corpus,
        "by": config.by,
        "taxonomy": taxonomy.name,
        "categories": order,
    }
    write_json(folder / "shares.json", about | {"kinds": shares})
    write_json(
        folder / "clusters.json",
        {"map": config.map, "embed": config.embed, "enough": config.enough, "spaces": clusters, "agreement": agreement},
    )
    pq.write_table(pa.concat_tables(tables), folder / "maps.parquet")
    return {"method": CATEGORIES, "corpus": config.corpus, "taxonomy": taxonomy.name, "kinds": counts}


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """A generator of the purpose's own, so that one option or kind does not change the draws of another."""
    return np.random.default_rng([seed, *" ".join(purpose).encode()])


def assign_kind(kind: Kind, taxonomy: Taxonomy, ask_all: AskAll | None, rng: np.random.Generator) -> list[Assignment]:
    """A category, or a reason for none, for every feature of a kind."""
    ids = kind.features.ids
    if ask_all is not None:
        told = [feature_text(rows, found) for rows, found in zip(kind.rows_F, kind.examples_F, strict=True)]
        return assign_by_asking(ids, told, ask_all, taxonomy)
    said = [explanation_words(one_explanation(rows)) for rows in kind.rows_F]
    sources = [(*words, found) for words, found in zip(said, kind.examples_F, strict=True)]
    return assign_by_words(ids, make_bags(sources), taxonomy, rng)


def count_assigned(assigned: Sequence[Assignment]) -> dict[str, int]:
    """How many features have a category, fit none, had no usable answer, or had nothing to go by."""
    outcomes = {"assigned": ASSIGNED, "none_fits": NONE_FITS, "no_answer": NO_ANSWER, "without": WITHOUT}
    counts = {name: sum(one.outcome == outcome for one in assigned) for name, outcome in outcomes.items()}
    return {"features": len(assigned)} | counts


def feature_spaces(
    kind: Kind, config: CategorizeConfig, device: str, place: Place, rng: np.random.Generator
) -> list[Space]:
    """The spaces of one kind: explanations, co-activation, and for latents decoder rows."""
    point_P = np.flatnonzero(kind.firings_F >= config.enough)
    explained_P = np.array([p for p in point_P if explained_words(kind, int(p))], np.int64)
    if config.embed is None or len(explained_P) < 2:
        said = explanation_vectors([explained_words(kind, int(p)) for p in explained_P])
    else:
        texts = [str(row["text"]) for p in explained_P for row in one_explanation(kind.rows_F[int(p)])]
        said = embed_texts(texts, config.embed, device)
    spaces = [make_space(kind.name, "explanations", explained_P, said, place, rng)]
    if kind.decoder_FN is not None:
        unit = unit_rows(kind.decoder_FN[point_P])
        spaces.append(make_space(kind.name, "decoder", point_P, unit, place, rng))
    spaces.append(make_space(kind.name, "coactivation", point_P, activity_vectors(kind.features, point_P), place, rng))
    return spaces


def measure_shares(
    kind: Kind, groups: Sequence[Group], group_F: NDArray[np.int64], rng: np.random.Generator
) -> dict[str, Any]:
    """The shares of one kind with what they are of."""
    fires_RG, mass_RG = tally_traces(kind.features, kind.level_F, kind.worth_F, group_F, len(groups))
    return {
        "features": len(kind.features.ids),
        "traces": len(fires_RG),
        "firings": int(fires_RG.sum()),
        "relative": kind.relative,
        "rows": share_rows(kind.features.ids, groups, group_F, fires_RG, mass_RG, rng),
    }


def of_categories(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole categories with a feature in them, without their subcategories."""
    kept = ("category", "n", "count", "rate", "mass")
    return [{name: row[name] for name in kept} for row in rows if row["subcategory"] is None and row["n"]]


def make_flow(kind: Kind, assigned: Sequence[Assignment], layers: int) -> dict[str, Any]:
    """`flow.json`: the latents that have words, by category and subcategory (see `flow_rows`)."""
    assert kind.decoder_FN is not None
    kept = [f for f, one in enumerate(assigned) if one.outcome != WITHOUT]
    groups = [(assigned[f].category or assigned[f].outcome, assigned[f].subcategory) for f in kept]
    rows = flow_rows(kind.features.store.addresses, layers, kind.decoder_FN[kept] / kind.output_N, groups)
    unit = RELATIVE_UNIT if kind.relative else "effect per unit of activation"
    return {"unit": unit, "relative": kind.relative, "latents": len(kept), "rows": rows}
