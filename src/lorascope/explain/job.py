"""What explaining one kind of features needs, whoever explains: its tokens and firings on both corpora."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import MissingStage
from lorascope.explain.firings import Firings, Reading, collect_firings, read_corpus, trace_contents
from lorascope.explain.rows import Row
from lorascope.explain.scoring import Explanation, Quiz
from lorascope.explain.settings import TRAIN, ExplainConfig
from lorascope.explain.windows import Sample, draw_windows
from lorascope.features import load_features
from lorascope.heap import return_freed
from lorascope.study import Study, read_json

LEVELS = "examples/levels.json"
LEAST_TRAINING = 8
"""Fewest firings on the training corpus from which an explanation is sought."""


@dataclass(frozen=True)
class Side:
    """One kind of features on one corpus: its tokens, its firings, and a hash of what is not per feature."""

    reading: Reading
    firings: Firings
    identity: str

    def hash_of(self, number: int) -> str:
        """A hash of the corpus and of where one feature fires."""
        at_n, activation_n = self.firings.of(number)
        said = self.identity.encode() + at_n.tobytes() + activation_n.tobytes()
        return hashlib.blake2b(said, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Job:
    """One kind of features on the training and the scoring corpus."""

    config: ExplainConfig
    seed: int
    kind: str
    n_features: int
    """Of the kind, before --limit."""
    ids: list[str]
    """Of the features to explain, in that order."""
    numbers: NDArray[np.int64]
    """Of the same among all features of the kind."""
    training: Side
    scoring: Side

    def close(self) -> None:
        """Remove what was put into files for the time of the job."""
        self.training.firings.close()
        self.scoring.firings.close()


@dataclass(frozen=True)
class Explainer:
    """What explains: an entry of the table of explainers, made for one job."""

    label: str
    """Stands in every row, so that rows of different explainers are never mixed: `lexical`, `judge:MODEL`."""
    settings: list[Any]
    """What its explanations depend on beside the firings."""
    scoring_settings: list[Any]
    """What its answers depend on beside the explanation and the windows."""
    workers: int
    """How many features may be in work at once."""
    explain: Callable[[str, int], Row]
    """From a feature's id and number to `text`, `rule` and `reason` (why there is no text), and what else it says."""
    score: Callable[[Quiz, Explanation, np.random.Generator], dict[str, Any]]
    """The score of an explanation on a quiz, JSON-ready (`Score.as_dict` at least)."""
    agree: Callable[[Quiz, Explanation], dict[str, Any]] | None = None
    """Agreement of a second pass with the first on the same quiz."""
    account: Callable[[], dict[str, Any]] = dict
    """What the run has spent, for its record."""
    stop: Callable[[], None] = lambda: None
    """Begin nothing more: the run is ending, and only waits for what is in flight."""
    most_tokens: int | None = None
    """Of one answer of a judge. A row with an answer that was cut off says under how many, and is redone under more."""


def prepare_job(
    study: Study,
    config: ExplainConfig,
    seed: int,
    kind: str,
) -> Job:
    """Read both corpora and find where every feature fires. Close it when it is done with.

    Nothing else of the two feature sets and of the levels is kept: together they are 0.4 KB a feature.

    Raises:
        MissingStage: a corpus is not recorded, the SAE is missing, or the firing levels are of other features.
    """
    training, scoring = (load_features(study, corpus, kind) for corpus in (TRAIN, config.corpus))
    known = read_json(study.path / LEVELS).get(kind, {})
    if not set(training.ids) <= set(known) or training.ids != scoring.ids:
        raise MissingStage(f"The firing levels are not of these {kind} features; run: lorascope examples {study.path}.")
    levels_F = np.array([known[feature] for feature in training.ids], dtype=np.float32)
    # In an order drawn by seed, so that what a cut-off run has done is a fair sample, as --limit draws one.
    chosen = np.random.default_rng([seed, 0]).permutation(len(training.ids))[: config.limit]
    # Generators of their own: all kinds are explained and scored on the same traces, whatever --limit says.
    seen = frozenset(trace_contents(training.store))
    readings = [
        read_corpus(training.store, max_tokens=config.max_tokens, rng=np.random.default_rng([seed, 1])),
        read_corpus(scoring.store, max_tokens=config.max_tokens, rng=np.random.default_rng([seed, 2]), seen=seen),
    ]
    made = [
        Side(reading, collect_firings(features, reading, levels_F, study.path), _identify(reading))
        for features, reading in zip((training, scoring), readings, strict=True)
    ]
    return_freed()
    return Job(config, seed, kind, len(training.ids), [training.ids[k] for k in chosen], chosen, made[0], made[1])


def _identify(reading: Reading) -> str:
    corpus = reading.corpus
    hash_ = hashlib.blake2b(digest_size=16)
    for array in (corpus.tokens_T, corpus.segments_T, corpus.ordinary_T, corpus.first_T):
        hash_.update(np.ascontiguousarray(array).tobytes())
    return hash_.hexdigest()


def feature_rng(seed: int, purpose: str, feature: str) -> np.random.Generator:
    """A generator of the feature's own, so that its draws do not depend on which others are explained."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(f"{seed} {purpose} {feature}".encode()).digest()[:16]))


def learning_sample(job: Job, feature: str, number: int, wanted: int) -> Sample:
    """Training windows of a feature, around firings and without any."""
    at_n, activation_n = job.training.firings.of(number)
    return draw_windows(
        job.training.reading.corpus,
        at_n,
        activation_n,
        wanted=wanted,
        radius=job.config.window,
        rng=feature_rng(job.seed, "learn", feature),
    )


def too_rare(job: Job, number: int) -> str | None:
    """Why a feature is not explained, None when it fires often enough on the training corpus."""
    count = len(job.training.firings.of(number)[0])
    if count >= LEAST_TRAINING:
        return None
    return f"fires on {count} tokens of the training corpus, fewer than {LEAST_TRAINING}"


def without_text(reason: str) -> Row:
    """The row of a feature without an explanation."""
    return {"text": None, "rule": None, "reason": reason}
