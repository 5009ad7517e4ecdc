"""`lorascope reasoning`: every feature's reasoning score, and a word's contrast on request; no model, no judge."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.features import KINDS, FeatureSet, load_features
from lorascope.reasoning.contrast import ContrastSettings, contrast_name, contrast_word
from lorascope.reasoning.model_words import word_log_probability
from lorascope.reasoning.word_scores import Scores, near_words, score_features
from lorascope.reasoning.words import WordMarks, mark_words, read_words
from lorascope.study import Study, atomic_write_bytes, read_json, write_json
from lorascope.token_text import open_tokenizer

TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class ReasoningConfig:
    """Rank features by how much more they fire around reasoning words than in the rest of the thinking; no judge."""

    corpus: str = "heldout"
    """Recorded corpus to read."""
    kinds: str = "auto"
    """Kinds, comma-separated: direction, latent, base, random, untrained, neuron (auto: whose stages have been run)."""
    words: str | None = None
    """File of reasoning words, one per line (default: lorascope's own list)."""
    shifts: int = 2000
    """Shifted copies of the words that make the null; the smallest possible p is 1 / (1 + this)."""
    level: float = 0.05
    """False discovery rate up to which features are listed."""
    top: int = 20
    """Most features listed per kind."""
    contrast: str | None = None
    """Also: which features tell the positions just before this word from others with the same current token."""
    model_logp: bool = False
    """In the contrast, also the model's own log p of the word (this loads the model)."""


@dataclass(frozen=True)
class ScoreSettings:
    """What a record of scores holds: the words themselves, so that an edited list is noticed."""

    corpus: str
    kind: str
    words: tuple[str, ...]
    shifts: int


def find_reasoning(study: Study, config: ReasoningConfig, options: Options) -> dict[str, Any]:
    """Write `reasoning/CORPUS/KIND.parquet` for each kind and, on request, `reasoning/CORPUS/contrast-WORD.json`.

    A table's columns: feature, score, null_mean, null_sd, p, q, n (tokens near a word), n_rest, mean_near, mean_rest.

    Returns:
        `{"corpus", "kinds": {kind: {"features", "silent", "significant", "near_tokens", "rest_tokens", "traces",
        "traces_without_words", "words", "shifts", "top": [{"feature", "score", "z", "p", "q"}]}}, "contrast"}`.

    Raises:
        BadInput: an unknown kind, a bad number, no reasoning word in the corpus, or too rare a word to contrast.
        MissingStage: the corpus is not recorded, or the SAE not trained.
    """
    if config.shifts < 1 or config.top < 0 or not 0 < config.level <= 1:
        raise BadInput("--shifts must be at least 1, --top at least 0 and --level above 0 and at most 1.")
    if config.model_logp and config.contrast is None:
        raise BadInput("--model-logp goes with --contrast WORD.")
    words = read_words(config.words)
    name = contrast_name(config.contrast) if config.contrast is not None else ""
    study.require(TOKENIZER, "lorascope record STUDY")
    sets = [load_features(study, config.corpus, kind) for kind in chosen_kinds(study, config)]
    stores = {features.store.folder: features.store for features in sets}

    @cache  # kinds that share a recording share its words
    def marks(folder: Path) -> WordMarks:
        return mark_words(stores[folder], open_tokenizer(study.path / "tokenizer"), words)

    result: dict[str, Any] = {"corpus": config.corpus, "kinds": {}}
    for features in sets:
        result["kinds"][features.kind] = scores_of_kind(study, config, features, words, marks, options)
    study.summarise({"reasoning": {config.corpus: {k: v["significant"] for k, v in result["kinds"].items()}}})
    if config.contrast is not None:
        result["contrast"] = contrast_of_word(study, config, sets, name, options)
    return result


def chosen_kinds(study: Study, config: ReasoningConfig) -> list[str]:
    """The kinds asked for."""
    if config.kinds != "auto":
        return list(dict.fromkeys(part.strip() for part in config.kinds.split(",")))
    kinds: list[str] = []
    for kind in KINDS:  # unlike firing levels, scores need no training corpus
        with suppress(MissingStage):
            load_features(study, config.corpus, kind)
            kinds.append(kind)
    return kinds or [next(iter(KINDS))]  # loading it says what is missing


def inputs_of(study: Study, sets: Sequence[FeatureSet]) -> list[str]:
    """Files whose change makes these features' results stale."""
    stores = {f"{features.store.folder.relative_to(study.path).as_posix()}/index.json" for features in sets}
    latents = ["sae/sae_weights.safetensors"] if any(features.latent for features in sets) else []
    return [*sorted(stores), *latents, TOKENIZER]


def scores_of_kind(
    study: Study,
    config: ReasoningConfig,
    features: FeatureSet,
    words: tuple[str, ...],
    marks: Callable[[Path], WordMarks],
    options: Options,
) -> dict[str, Any]:
    """Score the features of one kind; the table's counts and its head."""
    relative = f"reasoning/{config.corpus}/{features.kind}.parquet"

    def work() -> dict[str, Any]:
        found = marks(features.store.folder)
        near_T = near_words(features.store, found)
        rng = np.random.default_rng(options.seed)
        scores = score_features(features, near_T, found.thinking_T, shifts=config.shifts, rng=rng)
        counts = corpus_counts(features, found, int(near_T.sum()))
        table = score_table(features, scores, counts)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        atomic_write_bytes(study.path / relative, sink.getvalue().to_pybytes())
        return counts | {"silent": scores.silent, "shifts": config.shifts}

    counts = study.run(
        f"reasoning:{config.corpus}:{features.kind}",
        ScoreSettings(config.corpus, features.kind, words, config.shifts),
        options,
        inputs=inputs_of(study, [features]),
        outputs=[relative],
        work=work,
    )
    return counts | ranked(pq.read_table(study.path / relative).to_pylist(), config.level, config.top)


def corpus_counts(features: FeatureSet, marks: WordMarks, near: int) -> dict[str, Any]:
    """What was read."""
    store = features.store
    thinking = np.unique(store.token_traces(np.flatnonzero(marks.thinking_T)))
    return {
        "features": len(features.ids),
        "near_tokens": near,
        "rest_tokens": int(marks.thinking_T.sum()) - near,
        "traces": store.n_traces,
        "traces_without_thinking": store.n_traces - len(thinking),
        "traces_without_words": store.n_traces - len(np.unique(store.token_traces(marks.first_K))),
        "words": marks.counts,
    }


def score_table(features: FeatureSet, scores: Scores, counts: dict[str, Any]) -> pa.Table:
    """One row per feature, in the order of the features."""
    n = len(features.ids)
    return pa.table(
        {
            "feature": features.ids,
            "score": scores.score_F,
            "null_mean": scores.null_mean_F,
            "null_sd": scores.null_sd_F,
            "p": scores.p_F,
            "q": scores.q_F,
            "n": np.full(n, counts["near_tokens"]),
            "n_rest": np.full(n, counts["rest_tokens"]),
            "mean_near": scores.mean_near_F,
            "mean_rest": scores.mean_rest_F,
        }
    )


def ranked(rows: list[dict[str, Any]], level: float, top: int) -> dict[str, Any]:
    """How many features pass the false discovery rate, and the first of them by score."""
    passed = sorted((row for row in rows if row["q"] <= level), key=lambda row: -row["score"])
    shown = [{key: row[key] for key in ("feature", "score", "null_mean", "null_sd", "p", "q")} for row in passed[:top]]
    return {"level": level, "significant": len(passed), "top": shown}


def contrast_of_word(
    study: Study, config: ReasoningConfig, sets: Sequence[FeatureSet], name: str, options: Options
) -> dict[str, Any]:
    """Run the contrast of `config.contrast`; what its file holds."""
    word = " ".join(str(config.contrast).split()).lower()
    relative = f"reasoning/{config.corpus}/contrast-{name}.json"
    kinds = [features.kind for features in sets]
    needed = [*inputs_of(study, sets), *(["adapter"] if config.model_logp else [])]

    def work() -> dict[str, Any]:
        log_probability = word_log_probability if config.model_logp else None
        tokenizer = open_tokenizer(study.path / "tokenizer")
        found = contrast_word(study, sets, tokenizer, word, options, log_probability)
        write_json(study.path / relative, found)
        return {"word": word, "halves": found["halves"]}

    settings = ContrastSettings(config.corpus, ",".join(kinds), word, config.model_logp)
    study.run(
        f"reasoning:{config.corpus}:contrast:{name}", settings, options, inputs=needed, outputs=[relative], work=work
    )
    return dict(read_json(study.path / relative))
