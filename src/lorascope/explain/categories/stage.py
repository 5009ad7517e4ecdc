"""The stage `lorascope categorize STUDY`: categories of features, their shares, and clusters found without a taxonomy.

Shapes: F = features, N = directions, P = points of a space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.explain.categories.assign import Ask, Assignment, assign_by_asking, assign_by_words
from lorascope.explain.categories.extras import embed_texts, place_by_umap
from lorascope.explain.categories.kinds import Kind, explained_words, read_kind
from lorascope.explain.categories.shares import NONE_FITS, Group, make_groups, share_rows, tally_traces
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
)
from lorascope.features import FeatureSet, load_features
from lorascope.progress import progress
from lorascope.store import INDEX
from lorascope.study import Study, atomic_write_text, whole_folder, write_json
from lorascope.token_text import open_tokenizer, vocabulary_texts

FOLDER = "categories"
MAPS = {"pca", "umap"}


@dataclass(frozen=True)
class CategorizeConfig:
    """Sort features into the categories of a taxonomy, measure their shares, and cluster the features without it."""

    taxonomy: str | None = None
    """YAML file of categories, subcategories and their words (default: the seven functional categories)."""
    by: str = "lexical"
    """What assigns: lexical (words of explanation and examples, no model) or judge (given from Python)."""
    kinds: str = "latent,direction"
    """Kinds of features, separated by commas: latent, direction, base."""
    corpus: str = "heldout"
    """Corpus whose examples and firings are used."""
    map: str = "pca"
    """How the 2-D maps are made: pca, or umap (extra umap)."""
    embed: str | None = None
    """Sentence-transformers model (hub id or folder) that embeds explanations for their clusters; needs the extra embed
    (default: TF-IDF)."""
    enough: int = 20
    """A feature that fires on fewer tokens is not clustered."""


def categorize(study: Study, config: CategorizeConfig, options: Options, ask: Ask | None = None) -> dict[str, Any]:
    """Write `categories/`: KIND.jsonl, shares.json, clusters.json, flow.json (latents) and maps.parquet.

    Args:
        ask: with `by="judge"`, a function from a feature's text to the name of a category or subcategory, or None.

    Returns:
        `{"corpus", "taxonomy", "kinds": {kind: {"features", "assigned", "none_fits", "without_words"}}}`.

    Raises:
        BadInput: an unknown option's value or kind, a file that is no taxonomy, a judge that is not given, a missing
            extra.
        MissingStage: examples or explanations are missing; the message names the command.
    """
    kinds = [kind.strip() for kind in config.kinds.split(",") if kind.strip()]
    if config.by not in ("lexical", "judge") or config.map not in MAPS:
        raise BadInput("--by is lexical or judge, and --map is pca or umap.")
    if not kinds or config.enough < 1:
        raise BadInput("Name at least one kind in --kinds, and give --enough a number of at least 1.")
    if config.by == "judge" and ask is None:
        raise BadInput("No judge is given; use --by lexical, or from Python categorize(study, config, options, ask).")
    taxonomy = load_taxonomy(config.taxonomy)
    features = {kind: load_features(study, config.corpus, kind) for kind in dict.fromkeys(kinds)}
    inputs = required_inputs(study, config.corpus, features)

    def work() -> dict[str, Any]:
        with whole_folder(study.path / FOLDER) as folder:
            return fill_folder(study, folder, config, options, taxonomy, features, ask)

    names = [f"{kind}.jsonl" for kind in features] + ["shares.json", "clusters.json", "maps.parquet"]
    result = study.run(
        "categorize",
        replace(config, taxonomy=f"{config.taxonomy or 'built-in'} {identity(taxonomy)}"),
        options,
        inputs=inputs,
        outputs=[f"{FOLDER}/{name}" for name in names],
        work=work,
    )
    study.summarise({"categories": result["kinds"]})
    return result


def identity(taxonomy: Taxonomy) -> str:
    """A short hash of a taxonomy's content: an edited file makes the stage stale."""
    said: list[object] = [taxonomy.name, taxonomy.descriptions]
    for sub in taxonomy.subcategories:
        words = [sorted(sub.words), [p.pattern for p in sub.patterns], sorted(sub.classes), sorted(sub.segments)]
        said.append([sub.category, sub.name, sub.description, *words])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def required_inputs(study: Study, corpus: str, features: dict[str, FeatureSet]) -> list[str]:
    """The files that are read; MissingStage for the first that is not there."""
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    inputs = ["tokenizer/tokenizer.json", "examples/levels.json"]
    for kind, of_kind in features.items():
        needed = [f"examples/{corpus}/{kind}-{what}.parquet" for what in ("examples", "stats")]
        for path in (*needed, "examples/levels.json"):
            study.require(path, f"lorascope examples STUDY --corpus {corpus}")
        study.require(f"explanations/{kind}.jsonl", f"lorascope explain STUDY --kinds {kind}")
        store = of_kind.store.folder.relative_to(study.path).as_posix()
        inputs += [*needed, f"explanations/{kind}.jsonl", f"{store}/{INDEX}"]
        inputs += ["sae/sae_weights.safetensors"] if kind == "latent" else []
    return list(dict.fromkeys(inputs))


def fill_folder(
    study: Study,
    folder: Path,
    config: CategorizeConfig,
    options: Options,
    taxonomy: Taxonomy,
    features: dict[str, FeatureSet],
    ask: Ask | None,
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
        assigned = assign_kind(kind, config.by, taxonomy, ask, draws("null"))
        atomic_write_text(
            folder / f"{name}.jsonl",
            "".join(json.dumps(one.as_row(), ensure_ascii=False, allow_nan=False) + "\n" for one in assigned),
        )
        groups, group_F = make_groups(assigned, taxonomy)
        shares[name] = measure_shares(kind, groups, group_F, draws("shares"))
        counts[name] = count_assigned(assigned)
        spaces = feature_spaces(kind, config, options.device, place, draws("spaces"))
        clusters += [describe_space(space, kind, config.enough) for space in spaces]
        agreement += compare_spaces(spaces, assigned, draws("agreement"))
        tables += [feature_table(space, kind, assigned) for space in spaces]
        if kind.decoder_FN is not None:
            write_json(folder / "flow.json", make_flow(kind, assigned))
    states = load_features(study, config.corpus, "direction").store
    at_T = spaced_tokens(states, STATES)
    space = make_space("token", "states", at_T, state_vectors(states, at_T), place, generator(options.seed, "states"))
    clusters.append(describe_points(space))
    tables.append(token_table(space, states, texts))
    order = [{"name": c, "description": taxonomy.descriptions[c]} for c in taxonomy.categories]
    about = {"corpus": config.corpus, "by": config.by, "taxonomy": taxonomy.name, "categories": order}
    write_json(folder / "shares.json", about | {"kinds": shares})
    write_json(
        folder / "clusters.json",
        {"map": config.map, "embed": config.embed, "enough": config.enough, "spaces": clusters, "agreement": agreement},
    )
    pq.write_table(pa.concat_tables(tables), folder / "maps.parquet")
    return {"corpus": config.corpus, "taxonomy": taxonomy.name, "kinds": counts}


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """A generator of the purpose's own, so that one option or kind does not change the draws of another."""
    return np.random.default_rng([seed, *" ".join(purpose).encode()])


def assign_kind(kind: Kind, by: str, taxonomy: Taxonomy, ask: Ask | None, rng: np.random.Generator) -> list[Assignment]:
    """A category, or a reason for none, for every feature of a kind."""
    ids = kind.features.ids
    if by == "judge" and ask is not None:
        told = [feature_text(f, rows, found) for f, rows, found in zip(ids, kind.rows_F, kind.examples_F, strict=True)]
        return assign_by_asking(ids, told, ask, taxonomy)
    sources = [(*explanation_words(rows), found) for rows, found in zip(kind.rows_F, kind.examples_F, strict=True)]
    return assign_by_words(ids, make_bags(sources), taxonomy, rng)


def count_assigned(assigned: Sequence[Assignment]) -> dict[str, int]:
    """How many features have a category, how many fit none, how many had nothing to go by."""
    fitted = sum(one.category is not None for one in assigned)
    without = sum(one.without_words for one in assigned)
    return {
        "features": len(assigned),
        "assigned": fitted,
        "none_fits": len(assigned) - fitted - without,
        "without_words": without,
    }


def feature_spaces(
    kind: Kind, config: CategorizeConfig, device: str, place: Place, rng: np.random.Generator
) -> list[Space]:
    """The spaces of one kind: explanations, co-activation, and for latents decoder rows."""
    point_P = np.flatnonzero(kind.firings_F >= config.enough)
    explained_P = np.array([p for p in point_P if explained_words(kind, int(p))], np.int64)
    if config.embed is None or len(explained_P) < 2:
        said = explanation_vectors([explained_words(kind, int(p)) for p in explained_P])
    else:
        texts = [" ".join(str(row["text"]) for row in kind.rows_F[int(p)] if row.get("text")) for p in explained_P]
        said = embed_texts(texts, config.embed, device)
    spaces = [make_space(kind.name, "explanations", explained_P, said, place, rng)]
    if kind.decoder_FN is not None:
        unit = kind.decoder_FN[point_P] / np.maximum(kind.worth_F[point_P, None], 1e-30)
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
        "rows": share_rows(kind.features.ids, groups, group_F, fires_RG, mass_RG, rng),
    }


def make_flow(kind: Kind, assigned: Sequence[Assignment]) -> dict[str, Any]:
    """`flow.json`: the latents that have words, by category and subcategory (see `flow_rows`)."""
    assert kind.decoder_FN is not None
    kept = [f for f, one in enumerate(assigned) if not one.without_words]
    groups = [(assigned[f].category or NONE_FITS, assigned[f].subcategory) for f in kept]
    rows = flow_rows(kind.features.store.addresses, kind.decoder_FN[kept], groups)
    return {"unit": "effect per unit of activation", "latents": len(kept), "rows": rows}
