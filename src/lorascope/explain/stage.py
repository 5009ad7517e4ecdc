"""The stage `lorascope explain STUDY`: explain every feature on the training corpus, score on another corpus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.config import Options
from lorascope.errors import RunFailed
from lorascope.explain.budget import Budget, BudgetSpent, limits_of, say_spent
from lorascope.explain.explainers import EXPLAINERS
from lorascope.explain.job import LEVELS, Explainer, Job, prepare_job
from lorascope.explain.judges import file_name
from lorascope.explain.places import DIGITS, Keys, key_number
from lorascope.explain.rows import Row, RowFile, keep_rows
from lorascope.explain.scored import in_order, score_feature
from lorascope.explain.scoring import find_lenders
from lorascope.explain.settings import TRAIN, ExplainConfig, check_config
from lorascope.explain.summary import pool_kinds, record_name, summarise_rows
from lorascope.explained import LEXICAL, explain_records, inputs_of, made_from
from lorascope.features import cluster_of, load_features
from lorascope.heap import return_freed
from lorascope.progress import progress
from lorascope.study import Study, digest, stream_rows

METHOD = 3
"""Goes into all keys: raise it when the search changes."""
SCORING = 1
"""Goes into the keys of scored rows: raise it when the scores change."""


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
    study.require(LEVELS, "lorascope examples STUDY")
    study.require("tokenizer/tokenizer.json", "lorascope record STUDY")
    for kind in kinds:  # what is missing of the last is said before the first is paid for
        for corpus in (TRAIN, config.corpus):
            load_features(study, corpus, kind)
    label = label_of(config)
    budget = Budget(limits_of(config))
    results: dict[str, Any] = {}
    for kind in kinds:

        def work(kind: str = kind) -> dict[str, Any]:
            with closing(prepare_job(study, config, options.seed, kind)) as job:
                return _explain_one(study, job, budget)

        rows = f"explanations/{kind}.jsonl"
        name = record_name(config.corpus, kind, label)
        study.expire(name, unless=[METHOD, SCORING])
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
            "method": [METHOD, SCORING],
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
        f"The budget is spent ({paid}); of {len(job.ids)} {job.kind} features {explained} are explained and "
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


def _explain_kind(study: Study, job: Job, explainer: Explainer) -> tuple[RowFile, Keys]:
    """The explanation (or the reason why there is none) of each feature, kept in `unscored/`, and its key there."""
    path = study.path / unscored_file(job.kind, explainer.label)
    settings = [METHOD, explainer.settings, job.config.window, job.seed]
    keys = Keys(len(job.ids))
    for k, feature in enumerate(job.ids):
        keys[k] = digest([feature, explainer.label, settings, job.training.hash_of(job.numbers[k])])[:DIGITS]
    done = keep_rows(path, keys.sort(), explainer.label, most_tokens=explainer.most_tokens)

    def explain(k: int) -> Row | None:
        return None if keys[k] in done else explainer.explain(job.ids[k], int(job.numbers[k]))

    made = in_order(explain, range(len(job.ids)), explainer.workers, explainer.stop)
    for k, found in progress(made, len(job.ids), f"explain {job.kind}", "feature"):
        if found is not None:
            done.append({"feature": job.ids[k], "explainer": explainer.label, **found, "key": keys[k]})
    return done, keys


def _score_all(study: Study, job: Job, explainer: Explainer, explained: RowFile, explained_as: Keys) -> Iterator[Row]:
    """Score each explanation beside its controls; rows without scores say why. They are in `KIND.jsonl`."""
    path = study.path / "explanations" / f"{job.kind}.jsonl"
    lenders = _find_lenders(job, explained, explained_as)

    def lender_of(k: int) -> Row | None:
        return explained.read(explained_as[lenders[k]]) if lenders[k] >= 0 else None

    config = job.config
    settings = [METHOD, SCORING, explainer.scoring_settings, config.corpus, config.examples, config.window, job.seed]
    keys = Keys(len(job.ids))
    for k in range(len(job.ids)):
        lent = lender_of(k)
        lender, wrong = (lent["feature"], [lent["text"], lent["rule"]]) if lent else (None, None)
        text = explained.read(explained_as[k])["text"]
        parts = [explained_as[k], text, settings, job.scoring.hash_of(job.numbers[k]), lender, wrong]
        keys[k] = digest(parts)[:DIGITS]
    return_freed()
    said = {"made_from": made_from(study, job.config.corpus, job.kind)}
    done = keep_rows(path, keys.sort(), explainer.label, said, explainer.most_tokens)

    def score(k: int) -> Row | None:
        if keys[k] in done:
            return None
        row = explained.read(explained_as[k])
        kept = {name: value for name, value in row.items() if name != "key"}
        kept |= {"scored": None, "reason": row["reason"], "corpus": job.config.corpus}
        if row["text"] is not None:
            kept |= score_feature(job, explainer, int(job.numbers[k]), row, lender_of(k))
        return kept | said | {"key": keys[k]}

    made = in_order(score, range(len(job.ids)), explainer.workers, explainer.stop)
    for _, row in progress(made, len(job.ids), f"score {job.kind}", "feature"):
        if row is not None:
            done.append(row)
    return_freed()
    return (done.read(keys[k]) for k in range(len(keys)))


def _find_lenders(job: Job, explained: RowFile, explained_as: Keys) -> NDArray[np.int64]:
    """For each feature the number of the one whose explanation it borrows, -1 for none; texts are only hashed."""
    text_F = np.zeros(len(job.ids), np.uint64)
    able_F = np.zeros(len(job.ids), np.bool_)
    for k in range(len(job.ids)):
        text = explained.read(explained_as[k])["text"]
        if text is not None:
            able_F[k], text_F[k] = True, key_number(digest(text))
    able = np.flatnonzero(able_F)
    features = [job.ids[k] for k in able]
    groups = np.fromiter((key_number(digest(cluster_of(feature))) for feature in features), np.uint64, len(able))
    found = find_lenders(features, groups, text_F[able], job.seed)
    lender_F = np.full(len(job.ids), -1)
    lender_F[able] = np.where(found < 0, -1, able[found])
    return lender_F
