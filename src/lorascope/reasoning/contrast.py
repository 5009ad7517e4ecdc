"""One word as a contrast: what tells the positions just before it from others with the same current token?

Positives are tokens of the thinking after which the word begins; negatives have the token id of some positive and are
not before the word. The best feature of each kind is chosen on half of the traces and reported on the other half,
beside the best of as many random features chosen likewise, a token unigram, and the model's own probability.

Shape legend: P places, N directions, F features, B features of a block, T tokens of the corpus.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.features import FeatureSet
from lorascope.reasoning.auroc import column_aurocs, weighted_auroc
from lorascope.reasoning.word_scores import require_thinking
from lorascope.reasoning.words import Ints, Mask, WordMarks, mark_words
from lorascope.stats import FloatArray, bootstrap_statistic
from lorascope.store import Floats, Store
from lorascope.study import Study
from lorascope.token_text import vocabulary_texts

MOST_NEGATIVES = 20_000
"""More are drawn by seed, so that all places fit into memory at once."""
LEAST = 5
"""Fewest positives in a half, and fewest negatives, with which a contrast is made."""
DRAWS = 1_000
BLOCK = 256
SHOWN_TOKENS = 8
RANDOM = "random"
"""The kind of recorded controls; without it random features are drawn from the state."""

Encode = Callable[[npt.NDArray[np.intp]], Floats]
"""Columns to their activations on all places, float32 [P, columns]."""
LogProbability = Callable[[Study, Store, Ints, Ints, Options], FloatArray]


@dataclass(frozen=True)
class ContrastSettings:
    """What a contrast's record holds."""

    corpus: str
    kinds: str
    word: str
    model_logp: bool


@dataclass(frozen=True)
class Places:
    """Positives and negatives of a contrast, by rising position in the corpus."""

    position_P: Ints
    positive_P: Mask
    trace_P: Ints
    token_P: Ints
    left_out: int
    """Negatives beyond `MOST_NEGATIVES`."""
    first_ids: Ints
    """Ids of the tokens with which the word begins in this corpus."""

    def within(self, traces: Ints) -> Mask:
        """Which places are in some traces, bool [P]."""
        return np.isin(self.trace_P, traces)


@dataclass(frozen=True)
class Predictor:
    """Something that tells the places apart, chosen or fitted on one half."""

    name: str
    baseline: str | None
    """`random`, `unigram` or `model`; None for a feature."""
    feature: str | None
    kind: str | None
    """Of the feature, or of those that random features stand beside."""
    candidates: int
    """Features it is the best of; 0 for what is no feature."""
    selected: float | None
    """Its AUROC on the half on which it was chosen."""
    score_P: npt.NDArray[np.floating]
    """On all places."""


def contrast_name(word: str) -> str:
    """The word as a part of a file name.

    Raises:
        BadInput: it has no letter or digit.
    """
    name = re.sub(r"\W+", "-", word.lower()).strip("-_")
    if not name:
        raise BadInput(f"--contrast takes a word, not {word!r}.")
    return name


def contrast_word(
    study: Study,
    sets: Sequence[FeatureSet],
    tokenizer: Tokenizer,
    word: str,
    options: Options,
    log_probability: LogProbability | None = None,
) -> dict[str, Any]:
    """The contrast of one word over kinds of features on one corpus.

    Args:
        log_probability: gives the model's log-probability of the word at places; None leaves that row out.

    Returns:
        `{"word", "corpus", "halves": {"selected_on", "reported_on"}, "negatives_left_out", "tokens": [[text, count]],
        "random": {kind: what they are}, "predictors": [row]}`; a row is `{"predictor", "baseline", "feature", "kind",
        "candidates", "selected_auroc", "auroc": interval, "above": {baseline: interval}}`, intervals over traces of the
        reported half. `above` is the paired difference to each baseline.

    Raises:
        BadInput: there is no thinking in this corpus, or the word is too rare there.
        RunFailed: kinds were recorded from different texts.
    """
    rng = np.random.default_rng(options.seed)
    store = sets[0].store
    if any(not np.array_equal(features.store.tokens, store.tokens) for features in sets):
        raise RunFailed(
            f"The sources of {store.folder.parent} differ in their texts; record them again, or name --kinds."
        )
    marks = mark_words(store, tokenizer, [word])
    require_thinking(store, marks.thinking_T)
    places = find_places(store, marks, rng)
    chosen, reported = split_traces(places, word, store, rng)
    scored: list[Predictor] = []
    random: dict[str, str] = {}
    for features in sets:
        if features.kind != RANDOM:
            encode, random[features.kind] = random_features(features, sets, places, rng)
            scored.append(best_feature(features, places, chosen))
            scored.append(best_random(features, encode, places, chosen))
    scored.append(unigram(places, chosen))
    if log_probability is not None:
        wanted = places.within(reported)
        score_P = np.full(len(wanted), np.nan)
        score_P[wanted] = log_probability(study, store, places.position_P[wanted], places.first_ids, options)
        scored.append(Predictor("the model's own log p", "model", None, None, 0, None, score_P))
    texts = vocabulary_texts(tokenizer)
    ids, counts = np.unique(places.token_P[places.positive_P], return_counts=True)
    common = np.argsort(-counts, kind="stable")[:SHOWN_TOKENS]
    return {
        "word": word,
        "corpus": store.folder.parent.name,
        "halves": {"selected_on": half_counts(places, chosen), "reported_on": half_counts(places, reported)},
        "negatives_left_out": places.left_out,
        "tokens": [[texts[ids[i]], int(counts[i])] for i in common],
        "random": random,
        "predictors": report_rows(scored, places, reported, rng),
    }


def find_places(store: Store, marks: WordMarks, rng: np.random.Generator) -> Places:
    """Positives and negatives; a word that opens the thinking has no token of it before itself."""
    before_K = marks.first_K - 1
    kept_K = (before_K >= 0) & marks.thinking_T[before_K]
    kept_K &= store.token_traces(before_K) == store.token_traces(marks.first_K)
    positives = np.unique(before_K[kept_K])
    same_T = np.isin(store.tokens, store.tokens[positives]) & marks.thinking_T
    same_T[before_K[before_K >= 0]] = False
    negatives = np.flatnonzero(same_T)
    left_out = max(0, len(negatives) - MOST_NEGATIVES)
    if left_out:
        negatives = rng.choice(negatives, MOST_NEGATIVES, replace=False)
    position_P = np.sort(np.concatenate([positives, negatives]))
    return Places(
        position_P,
        np.isin(position_P, positives),
        store.token_traces(position_P).astype(np.int64),
        store.tokens[position_P].astype(np.int64),
        left_out,
        np.unique(store.tokens[marks.first_K[kept_K]]).astype(np.int64),
    )


def split_traces(places: Places, word: str, store: Store, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The traces with places in two halves, at random; traces with positives are shared out evenly.

    Raises:
        BadInput: a half would have too few positives or negatives.
    """
    traces = rng.permutation(np.unique(places.trace_P))
    with_positive = np.isin(traces, places.trace_P[places.positive_P])
    ordered = np.concatenate([traces[with_positive], traces[~with_positive]])
    halves = ordered[::2], ordered[1::2]
    for half in halves:
        positive_P = places.positive_P[places.within(half)]
        if min(int(positive_P.sum()), int((~positive_P).sum())) < LEAST:
            raise BadInput(
                f"{word!r} follows only {int(places.positive_P.sum())} tokens of the thinking of "
                f"{store.folder.parent.name} ({int((~places.positive_P).sum())} others are like them), and each half "
                f"needs {LEAST} of both; choose a more frequent word, or a larger --corpus."
            )
    return halves


def half_counts(places: Places, traces: Ints) -> dict[str, int]:
    """How much a half holds."""
    positive_P = places.positive_P[places.within(traces)]
    return {"traces": len(traces), "positives": int(positive_P.sum()), "negatives": int((~positive_P).sum())}


def best_column(encode: Encode, count: int, places: Places, chosen: Ints) -> tuple[int, float]:
    """The column with the highest AUROC on the chosen half, and that AUROC; columns are made a block at a time."""
    kept_P = places.within(chosen)
    best, column = -1.0, 0
    for first in range(0, count, BLOCK):
        block = np.arange(first, min(first + BLOCK, count))
        auroc_B = column_aurocs(encode(block)[kept_P], places.positive_P[kept_P])
        if auroc_B.max() > best:
            best, column = float(auroc_B.max()), first + int(auroc_B.argmax())
    return column, best


def best_feature(features: FeatureSet, places: Places, chosen: Ints) -> Predictor:
    """The feature of a kind with the highest AUROC on the chosen half."""
    z_PN, count = features.store.rows(places.position_P), len(features.ids)
    column, best = best_column(lambda block: features.encode(z_PN, block), count, places, chosen)
    score_P = features.encode(z_PN, np.array([column], np.intp))[:, 0]
    return Predictor(f"best {features.kind}", None, features.ids[column], features.kind, count, best, score_P)


def best_random(features: FeatureSet, encode: Encode, places: Places, chosen: Ints) -> Predictor:
    """The random feature with the highest AUROC on the chosen half, of as many as the kind has."""
    count = len(features.ids)
    column, best = best_column(encode, count, places, chosen)
    score_P = encode(np.array([column], np.intp))[:, 0]
    return Predictor(f"best random for {features.kind}", RANDOM, None, features.kind, count, best, score_P)


def random_features(
    features: FeatureSet, sets: Sequence[FeatureSet], places: Places, rng: np.random.Generator
) -> tuple[Encode, str]:
    """As many random features as a kind has, as a function from columns to activations on all places, and their name.

    Recorded controls of the kind `random` where there are enough; else both signs of random linear combinations of
    the state, each scalar at mean 0 and standard deviation 1 over the places.
    """
    count = len(features.ids)
    recorded = next((one for one in sets if one.kind == RANDOM and len(one.ids) >= count), None)
    if recorded is not None:
        recorded_PN = recorded.store.rows(places.position_P)
        wanted = np.sort(rng.choice(len(recorded.ids), count, replace=False))
        return lambda block: recorded.encode(recorded_PN, wanted[block]), "recorded controls"
    z_PN = features.store.rows(places.position_P)
    sd_N = z_PN.std(axis=0)
    u_PN = (z_PN - z_PN.mean(axis=0)) / np.where(sd_N > 0, sd_N, 1)
    half = rng.standard_normal((u_PN.shape[1], -(-count // 2)), np.float32)
    mix_NF = np.concatenate([half, -half], axis=1)
    return lambda block: np.maximum(u_PN @ mix_NF[:, block], 0), "random linear combinations of the state"


def unigram(places: Places, chosen: Ints) -> Predictor:
    """How often each current token was a positive's on the chosen half, drawn to the mean by one place more."""
    kept_P = places.within(chosen)
    label_P = places.positive_P[kept_P].astype(np.float64)
    size = int(places.token_P.max()) + 1
    total, hits = (np.bincount(places.token_P[kept_P], weight, size) for weight in (None, label_P))
    score_P = ((hits + label_P.mean()) / (total + 1))[places.token_P]
    selected = float(weighted_auroc(score_P[kept_P], places.positive_P[kept_P])(np.ones(int(kept_P.sum()))))
    return Predictor("token unigram", "unigram", None, None, 0, selected, score_P)


def report_rows(
    scored: Sequence[Predictor], places: Places, reported: Ints, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """AUROC of each predictor on the reported half, and how far the features stand above each baseline."""
    kept_P = places.within(reported)
    numbers, trace_P = np.unique(places.trace_P[kept_P], return_inverse=True)
    measures = {p.name: weighted_auroc(p.score_P[kept_P], places.positive_P[kept_P]) for p in scored}

    def interval(statistic: Callable[[FloatArray], float]) -> dict[str, float | None] | None:
        def of_traces(index: Ints) -> float:
            return statistic(np.bincount(index, minlength=len(numbers)).astype(np.float64)[trace_P])

        found = bootstrap_statistic(len(numbers), of_traces, rng=rng, draws=DRAWS)
        return found.as_dict() if np.isfinite(found.value) else None

    def above(one: Predictor) -> dict[str, Any]:
        def gap(baseline: Predictor) -> dict[str, float | None] | None:
            return interval(lambda w: measures[one.name](w) - measures[baseline.name](w))

        return {p.baseline: gap(p) for p in scored if p.baseline and p.kind in (None, one.kind)}

    return [
        {
            "predictor": one.name,
            "baseline": one.baseline,
            "feature": one.feature,
            "kind": one.kind,
            "candidates": one.candidates,
            "selected_auroc": one.selected,
            "auroc": interval(measures[one.name]),
            "above": above(one) if one.feature else {},
        }
        for one in scored
    ]
