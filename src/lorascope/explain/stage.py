"""The stage `lorascope explain STUDY`: explain every feature on the training corpus, score on another corpus."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.explain.candidates import Candidates, make_candidates
from lorascope.explain.firings import Firings, Reading, collect_firings, read_corpus, trace_contents
from lorascope.explain.lexical import find_rule
from lorascope.explain.rows import Row, append_row, keep_rows
from lorascope.explain.rules import Vocabulary, describe_rule, make_vocabulary, rule_from_json, rule_to_json
from lorascope.explain.scoring import (
    Answer,
    Explanation,
    Quiz,
    borrow_explanations,
    execute_answers,
    pose_detection,
    pose_fuzzing,
    score_answers,
)
from lorascope.explain.summary import pool_kinds, summarise_rows
from lorascope.explain.windows import draw_windows
from lorascope.features import FeatureSet, cluster_of, load_features
from lorascope.progress import progress
from lorascope.store import INDEX
from lorascope.study import Study, digest, read_json
from lorascope.token_text import open_tokenizer, vocabulary_texts

TRAIN = "train"
LEAST_TRAINING = 8
"""Fewest firings on the training corpus from which a rule is sought."""
LEAST_SCORING = 5
"""Fewest windows of each side on which a score is given."""
METHOD = 1
"""Goes into the rows' keys: raise it when the search or the scores change."""


@dataclass(frozen=True)
class ExplainConfig:
    """Explain each feature by a rule learned on the training corpus and score it on text that the rule never saw."""

    kinds: str = "direction,latent"
    """Kinds of features to explain, separated by commas: direction, latent, base, random, untrained, neuron."""
    corpus: str = "heldout"
    """Corpus to score on; traces that are also in the training corpus are left out."""
    explainer: str = "lexical"
    """What explains: lexical (executable rules, no model, no network)."""
    examples: int = 40
    """Scoring windows of each feature around its firings, and as many in which it does not fire."""
    learn: int = 256
    """Training windows from which a rule is learned, around firings, and as many others."""
    window: int = 8
    """Tokens on either side of a window's centre."""
    max_tokens: int = 500_000
    """Most tokens read of a corpus; of a longer one, whole traces are drawn by seed."""
    limit: int | None = None
    """Explain only this many features of each kind, drawn by seed."""


@dataclass(frozen=True)
class Side:
    """One kind of features on one corpus: its tokens, its firings, and a hash of what is not per feature."""

    reading: Reading
    firings: Firings
    identity: str


@dataclass(frozen=True)
class Job:
    """Everything that explaining one kind needs."""

    config: ExplainConfig
    seed: int
    kind: str
    n_features: int
    """Of the kind, before --limit."""
    numbers: dict[str, int]
    training: Side
    scoring: Side
    vocabulary: Vocabulary
    candidates: Candidates


def explain_features(study: Study, config: ExplainConfig, options: Options) -> dict[str, Any]:
    """Write `explanations/KIND.jsonl` for each kind and the mean scores to `summary.json`.

    Returns:
        `{"all": ..., KIND: ...}`: mean scores as `summarise_rows` gives them; `all` pools whatever kinds are explained,
        in this run or before, but controls.

    Raises:
        BadInput: an unknown kind or explainer, or scoring on the training corpus.
        MissingStage: a corpus is not recorded, levels or SAE are missing; the message names the command.
    """
    kinds = [kind.strip() for kind in config.kinds.split(",") if kind.strip()]
    if config.explainer != "lexical":
        raise BadInput(f"There is no explainer {config.explainer!r}; choose lexical.")
    if config.corpus == TRAIN:
        raise BadInput("Choose another --corpus than train: rules are learned there, so scores would mean nothing.")
    least = min(config.examples, config.learn, config.window, config.max_tokens)
    if not kinds or least < 1 or (config.limit is not None and config.limit < 1):
        raise BadInput("Name at least one kind, and give numbers of at least 1 to the options of explain.")
    levels = read_json(study.require("examples/levels.json", "lorascope examples STUDY"))
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    sides = {kind: (load_features(study, TRAIN, kind), load_features(study, config.corpus, kind)) for kind in kinds}
    vocabulary = cache(lambda: make_vocabulary(vocabulary_texts(open_tokenizer(study.path / "tokenizer"))))
    results: dict[str, Any] = {}
    for kind, pair in sides.items():

        def work(kind: str = kind, pair: tuple[FeatureSet, FeatureSet] = pair) -> dict[str, Any]:
            return _explain_one(study, _prepare(study, config, options.seed, kind, *pair, levels, vocabulary()))

        results[kind] = study.run(
            f"explain:{config.corpus}:{kind}",
            replace(config, kinds=kind),
            options,
            inputs=[
                *sorted((f.store.folder.relative_to(study.path) / INDEX).as_posix() for f in pair),
                "examples/levels.json",
                "tokenizer/tokenizer.json",
                *(["sae/sae_weights.safetensors"] if kind == "latent" else []),
            ],
            outputs=[f"explanations/{kind}.jsonl"],
            work=work,
        )
    return {"all": _summarise(study, config, results)} | results


def _explain_one(study: Study, job: Job) -> dict[str, Any]:
    """Explain and score one kind; its mean scores, of how many of its features, and the traces left out."""
    rows = _score_all(study, job, _explain_kind(study, job))
    return summarise_rows(rows, np.random.default_rng(job.seed)) | {
        "features": job.n_features,
        "limit": job.config.limit,
        "traces_left_out": {
            TRAIN: job.training.reading.left_out,
            job.config.corpus: job.scoring.reading.left_out,
        },
    }


def _summarise(study: Study, config: ExplainConfig, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the headline, over all kinds that are explained and not just this run's, and what each kind's is of."""
    pooled = pool_kinds(study)
    if pooled["n"]:
        study.summarise({name: pooled[name] for name in ("detection", "detection_wrong", "detection_gain")})
    said = {
        kind: {
            "corpus": config.corpus,
            "features": result["features"],
            "tried": result["n"],
            "scored": result["n_detection"],
            "limit": result["limit"],
        }
        for kind, result in results.items()
    }
    study.summarise({"explanations": said})
    return pooled


def _prepare(
    study: Study,
    config: ExplainConfig,
    seed: int,
    kind: str,
    training: FeatureSet,
    scoring: FeatureSet,
    levels: dict[str, dict[str, float]],
    vocabulary: Vocabulary,
) -> Job:
    known = levels.get(kind, {})
    if not set(training.ids) <= set(known) or training.ids != scoring.ids:
        raise MissingStage(f"The firing levels are not of these {kind} features; run: lorascope examples {study.path}.")
    levels_F = np.array([known[feature] for feature in training.ids], dtype=np.float32)
    rng = np.random.default_rng(seed)
    chosen = list(range(len(training.ids)))
    if config.limit is not None:
        chosen = sorted(rng.permutation(len(training.ids))[: config.limit].tolist())
    readings = [
        read_corpus(training.store, max_tokens=config.max_tokens, rng=rng),
        read_corpus(
            scoring.store, max_tokens=config.max_tokens, rng=rng, seen=frozenset(trace_contents(training.store))
        ),
    ]
    made = [
        Side(reading, collect_firings(features, reading, levels_F), _identify(reading))
        for features, reading in zip((training, scoring), readings, strict=True)
    ]
    numbers = {training.ids[k]: int(k) for k in chosen}
    candidates = make_candidates(readings[0].corpus, vocabulary)
    return Job(config, seed, kind, len(training.ids), numbers, made[0], made[1], vocabulary, candidates)


def _identify(reading: Reading) -> str:
    corpus = reading.corpus
    hash_ = hashlib.blake2b(digest_size=16)
    for array in (corpus.tokens_T, corpus.segments_T, corpus.ordinary_T, corpus.first_T):
        hash_.update(np.ascontiguousarray(array).tobytes())
    return hash_.hexdigest()


def _hash_firings(side: Side, number: int) -> str:
    at_n, activation_n = side.firings.of(number)
    return hashlib.blake2b(side.identity.encode() + at_n.tobytes() + activation_n.tobytes(), digest_size=16).hexdigest()


def _feature_rng(seed: int, purpose: str, feature: str) -> np.random.Generator:
    """A generator of the feature's own, so that its draws do not depend on which others are explained."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(f"{seed} {purpose} {feature}".encode()).digest()[:16]))


def _explain_kind(study: Study, job: Job) -> dict[str, Row]:
    """The lexical explanation (or the reason why there is none) of each feature, kept in `unscored/KIND.jsonl`."""
    path = study.path / "explanations" / "unscored" / f"{job.kind}.jsonl"
    settings = [METHOD, job.config.learn, job.config.window, job.seed, len(job.vocabulary)]
    keys = {
        feature: digest([feature, "lexical", settings, _hash_firings(job.training, number)])[:32]
        for feature, number in job.numbers.items()
    }
    done = keep_rows(path, set(keys.values()), "lexical")
    rows: dict[str, Row] = {}
    for feature, number in progress(job.numbers.items(), len(job.numbers), f"explain {job.kind}", "feature"):
        row = done.get(keys[feature])
        if row is None:
            row = {"feature": feature, "explainer": "lexical", **_explain_feature(job, feature, number)}
            row["key"] = keys[feature]
            append_row(path, row)
        rows[feature] = row
    return rows


def _explain_feature(job: Job, feature: str, number: int) -> Row:
    at_n, activation_n = job.training.firings.of(number)
    if len(at_n) < LEAST_TRAINING:
        return _without_rule(f"fires on {len(at_n)} tokens of the training corpus, fewer than {LEAST_TRAINING}")
    sample = draw_windows(
        job.training.reading.corpus,
        at_n,
        activation_n,
        wanted=job.config.learn,
        radius=job.config.window,
        rng=_feature_rng(job.seed, "learn", feature),
    )
    rule = find_rule(sample, job.candidates)
    if not rule:
        return _without_rule("no rule tells its firing tokens from others")
    return {"text": describe_rule(rule), "rule": rule_to_json(rule), "reason": None}


def _without_rule(reason: str) -> Row:
    return {"text": None, "rule": None, "reason": reason}


def _score_all(study: Study, job: Job, explained: dict[str, Row]) -> list[Row]:
    """Score each explanation beside a wrong one; rows without scores say why. Kept in `KIND.jsonl`."""
    path = study.path / "explanations" / f"{job.kind}.jsonl"
    able = [feature for feature, row in explained.items() if row["rule"] is not None]
    lenders = borrow_explanations(able, [cluster_of(f) for f in able], np.random.default_rng(job.seed))
    settings = [METHOD, job.config.corpus, job.config.examples, job.config.window, job.seed]
    keys: dict[str, str] = {}
    for feature, row in explained.items():
        lender = lenders.get(feature)
        wrong = explained[lender]["rule"] if lender else None
        keys[feature] = digest([row["key"], settings, _hash_firings(job.scoring, job.numbers[feature]), lender, wrong])[
            :32
        ]
    done = keep_rows(path, set(keys.values()), "lexical")
    answer = execute_answers(job.vocabulary)
    rows: list[Row] = []
    for feature, row in progress(explained.items(), len(explained), f"score {job.kind}", "feature"):
        finished = done.get(keys[feature])
        if finished is None:
            lender = lenders.get(feature)
            finished = {k: row[k] for k in ("feature", "explainer", "text", "rule")}
            finished |= {"scored": None, "reason": row["reason"], "corpus": job.config.corpus}
            if row["rule"] is not None:
                finished |= _score_feature(job, row, lender, explained, answer)
            finished["key"] = keys[feature]
            append_row(path, finished)
        rows.append(finished)
    return rows


def _score_feature(job: Job, row: Row, lender: str | None, explained: dict[str, Row], answer: Answer) -> Row:
    feature = row["feature"]
    at_n, activation_n = job.scoring.firings.of(job.numbers[feature])
    if len(at_n) < LEAST_SCORING:
        return {"reason": f"fires on {len(at_n)} tokens of the scoring corpus, fewer than {LEAST_SCORING}"}
    rng = _feature_rng(job.seed, "score", feature)
    corpus = job.scoring.reading.corpus
    sample = draw_windows(corpus, at_n, activation_n, wanted=job.config.examples, radius=job.config.window, rng=rng)
    n_quiet = len(sample.index_WS) - sample.n_positive
    if n_quiet < LEAST_SCORING:
        return {"reason": f"only {n_quiet} windows of the scoring corpus are without it, fewer than {LEAST_SCORING}"}
    quizzes = {"detection": pose_detection(corpus, sample), "fuzzing": pose_fuzzing(corpus, sample, rng)}
    scored: dict[str, Any] = {}
    for name, quiz in quizzes.items():
        if quiz.truth_W.all():
            scored[name] = None
            continue
        scored[name] = _score(quiz, row, answer, rng) | {"counts": quiz.counts}
        if lender:
            scored[f"{name}_wrong"] = _score(quiz, explained[lender] | {"feature": feature}, answer, rng)
    return {"scored": scored | {"wrong_from": lender}}


def _score(quiz: Quiz, row: Row, answer: Answer, rng: np.random.Generator) -> dict[str, Any]:
    explanation = Explanation(row["feature"], row["text"], rule_from_json(row["rule"]))
    return score_answers(quiz, answer(explanation, quiz.windows), rng).as_dict()
