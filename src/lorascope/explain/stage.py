"""The stage `lorascope explain STUDY`: explain every feature on the training corpus, score on another corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from lorascope.config import Options
from lorascope.errors import RunFailed
from lorascope.explain.budget import Budget, BudgetSpent, limits_of, say_spent
from lorascope.explain.explainers import EXPLAINERS
from lorascope.explain.job import Explainer, Job, prepare_job
from lorascope.explain.judges import file_name
from lorascope.explain.rows import Row, RowFile, keep_rows
from lorascope.explain.scored import in_order, score_feature
from lorascope.explain.scoring import borrow_explanations
from lorascope.explain.settings import TRAIN, ExplainConfig, check_config
from lorascope.explain.summary import pool_kinds, record_name, summarise_rows
from lorascope.explained import LEXICAL, explain_records, inputs_of, made_from
from lorascope.features import FeatureSet, cluster_of, load_features
from lorascope.progress import progress
from lorascope.study import Study, digest, read_json, stream_rows

METHOD = 3
"""Goes into the rows' keys: raise it when the search or the scores change."""


def explain_features(study: Study, config: ExplainConfig, options: Options) -> dict[str, Any]:
    """Write rows to `explanations/KIND.jsonl` for each kind and the mean scores to `summary.json`.

    Returns:
        `{"all": ..., KIND: ...}`: mean scores as `summarise_rows` gives them; `all` pools whatever kinds this explainer
        explained, in this run or before, but controls.

    Raises:
        BadInput: an unknown kind or explainer, scoring on the training corpus, or a judge that is not to be had.
        MissingStage: a corpus is not recorded, levels or SAE are missing; the message names the command.
        RunFailed: the budget is spent, or the judge does not answer; what is done is kept.
    """
    kinds = check_config(config)
    levels = read_json(study.require("examples/levels.json", "lorascope examples STUDY"))
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    sides = {kind: (load_features(study, TRAIN, kind), load_features(study, config.corpus, kind)) for kind in kinds}
    label = label_of(config)
    budget = Budget(limits_of(config))
    results: dict[str, Any] = {}
    for kind, pair in sides.items():

        def work(kind: str = kind, pair: tuple[FeatureSet, FeatureSet] = pair) -> dict[str, Any]:
            with closing(prepare_job(study, config, options.seed, kind, *pair, levels)) as job:
                return _explain_one(study, job, budget)

        rows = f"explanations/{kind}.jsonl"
        name = record_name(config.corpus, kind, label)
        if any(row["explainer"] == label and row.get("retry") for row in stream_rows(study.path / rows)):
            study.expire(name)
        results[kind] = study.run(
            name,
            replace(config, kinds=kind),
            options,
            inputs=[
                *inputs_of(config.corpus, kind),
                "tokenizer/tokenizer.json",
            ],
            outputs=[rows, unscored_file(kind, label)],
            work=work,
        )
    return {"all": _summarise(study, config, label, results)} | results


def label_of(config: ExplainConfig) -> str:
    """What the rows of a run are labelled with: `lexical`, `judge:MODEL`."""
    return LEXICAL if config.explainer == LEXICAL else f"{config.explainer}:{config.judge_model}"


def unscored_file(kind: str, label: str) -> str:
    """Where explanations wait for their scores; one file for each explainer, and so its record's own output."""
    return f"explanations/unscored/{kind}{'' if label == LEXICAL else '.' + file_name(label)}.jsonl"


def _explain_one(study: Study, job: Job, budget: Budget) -> dict[str, Any]:
    """Explain and score one kind; its mean scores, of how many of its features, and the traces left out."""
    with EXPLAINERS[job.config.explainer](study, job, budget) as explainer:
        before = explainer.account()
        try:
            rows = _score_all(study, job, explainer, *_explain_kind(study, job, explainer))
        except BudgetSpent:
            raise RunFailed(_how_far(study, job, explainer)) from None
        # One budget is for all kinds of a run, a record for one of them.
        spent = {name: round(count - before[name], 6) for name, count in explainer.account().items()}
    return (
        summarise_rows(rows, np.random.default_rng(job.seed))
        | {
            "features": job.n_features,
            "limit": job.config.limit,
            "traces_left_out": {
                TRAIN: job.training.reading.left_out,
                job.config.corpus: job.scoring.reading.left_out,
            },
        }
        | ({"spent": spent} if spent else {})
    )


def _how_far(study: Study, job: Job, explainer: Explainer) -> str:
    """What a spent budget was spent on."""
    paid, label = say_spent(explainer.account()), explainer.label
    files = (unscored_file(job.kind, label), f"explanations/{job.kind}.jsonl")
    explained, scored = (sum(row["explainer"] == label for row in stream_rows(study.path / file)) for file in files)
    return (
        f"The budget is spent ({paid}); of {len(job.numbers)} {job.kind} features {explained} are explained and "
        f"{scored} scored. What was answered is kept, and the same command continues."
    )


def _summarise(study: Study, config: ExplainConfig, label: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the headline, over all kinds that this explainer explained and not just this run's, and what each is of.

    The headline is the lexical explainer's; a judge's stands under `judges`, and is the headline only without another.
    """
    pooled = pool_kinds(study, label)
    headline = {name: pooled[name] for name in ("detection", "detection_wrong", "detection_gain")}
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
    if label != LEXICAL:
        study.summarise({"judges": {label: {"explanations": said} | (headline if pooled["n"] else {})}})
    if label == LEXICAL or not explain_records(study):
        study.summarise((headline if pooled["n"] else {}) | {"explanations": said})
    return pooled


def _explain_kind(study: Study, job: Job, explainer: Explainer) -> tuple[RowFile, dict[str, str]]:
    """The explanation (or the reason why there is none) of each feature, kept in `unscored/`, and its key there."""
    path = study.path / unscored_file(job.kind, explainer.label)
    settings = [METHOD, explainer.settings, job.config.window, job.seed]
    keys = {
        feature: digest([feature, explainer.label, settings, job.training.hash_of(number)])[:32]
        for feature, number in job.numbers.items()
    }
    done = keep_rows(path, set(keys.values()), explainer.label, most_tokens=explainer.most_tokens)

    def explain(feature: str) -> Row | None:
        return None if keys[feature] in done else explainer.explain(feature, job.numbers[feature])

    made = in_order(explain, job.numbers, explainer.workers, explainer.stop)
    for feature, found in progress(made, len(job.numbers), f"explain {job.kind}", "feature"):
        if found is not None:
            done.append({"feature": feature, "explainer": explainer.label, **found, "key": keys[feature]})
    return done, keys


def _score_all(
    study: Study, job: Job, explainer: Explainer, explained: RowFile, explained_as: dict[str, str]
) -> Iterator[Row]:
    """Score each explanation beside its controls; rows without scores say why. They are in `KIND.jsonl`."""
    path = study.path / "explanations" / f"{job.kind}.jsonl"
    texts = {feature: explained.read(key)["text"] for feature, key in explained_as.items()}
    able = [feature for feature, text in texts.items() if text is not None]
    lenders = borrow_explanations(
        able, [cluster_of(feature) for feature in able], [texts[feature] for feature in able], job.seed
    )
    settings = [METHOD, explainer.scoring_settings, job.config.corpus, job.config.examples, job.config.window, job.seed]
    keys: dict[str, str] = {}
    for feature, number in job.numbers.items():
        lender = lenders.get(feature)
        lent = explained.read(explained_as[lender]) if lender else None
        wrong = [lent["text"], lent["rule"]] if lent else None
        parts = [explained_as[feature], texts[feature], settings, job.scoring.hash_of(number), lender, wrong]
        keys[feature] = digest(parts)[:32]
    said = {"made_from": made_from(study, job.config.corpus, job.kind)}
    done = keep_rows(path, set(keys.values()), explainer.label, said, explainer.most_tokens)

    def score(feature: str) -> Row | None:
        if keys[feature] in done:
            return None
        row = explained.read(explained_as[feature])
        lender = lenders.get(feature)
        kept = {name: value for name, value in row.items() if name != "key"}
        kept |= {"scored": None, "reason": row["reason"], "corpus": job.config.corpus}
        if row["text"] is not None:
            kept |= score_feature(job, explainer, row, explained.read(explained_as[lender]) if lender else None)
        return kept | said | {"key": keys[feature]}

    made = in_order(score, job.numbers, explainer.workers, explainer.stop)
    for _, row in progress(made, len(job.numbers), f"score {job.kind}", "feature"):
        if row is not None:
            done.append(row)
    return (done.read(key) for key in keys.values())
