"""Assignment of features to the categories of a taxonomy: by their words, or by asking.

By words: a feature's share of a category is how much of its bag's weight belongs there (`taxonomy.membership`), and
its excess is that share less the mean share over all features, so that what every feature speaks of (numbers, say)
proves nothing. The category with the largest excess is taken if that is more than shuffled words give: the same bag
with each word replaced by one drawn from all bags' words of the same source, `DRAWS` times; the upper quantile `CHANCE`
of their largest excess is the feature's own threshold. So of features whose words do not belong together, a share of
about `CHANCE` is assigned all the same.

Shapes: F = features, M = entries of all bags, m = entries of one, V = words, S = subcategories, C = categories,
D = draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lorascope.explain.categories.taxonomy import FloatArray, Taxonomy, membership
from lorascope.explain.categories.words import Bags
from lorascope.explain.judges import Reply
from lorascope.explain.rows import Row
from lorascope.explained import ASSIGNED, NO_ANSWER, NONE_FITS, WITHOUT
from lorascope.token_text import readable

Ask = Callable[[str], str | None]
"""A judge: from a feature's text (`words.feature_text`) to the name of a category or subcategory, `NONE_FITS`, or None
where it gave no answer."""
AskAll = Callable[[list[str]], list[Reply]]
"""The same for many texts at once, in their order; a reply without a value says why."""
CHANCE = 0.05
DRAWS = 2_000
REASON_SILENT = "no answer from the judge"
REASON_WITHOUT = "it has no explanation and no examples"
NAMED = 3
"""Words that a reason cites."""


@dataclass(frozen=True)
class Assignment:
    """One feature's category, None unless its outcome is `ASSIGNED`. `score` and `threshold` are excess shares."""

    feature: str
    outcome: str
    category: str | None
    subcategory: str | None
    by: str
    reason: str
    score: float | None = None
    threshold: float | None = None

    def as_row(self) -> Row:
        """The row of `categories/KIND.jsonl`."""
        return asdict(self)


def assign_by_words(ids: Sequence[str], bags: Bags, taxonomy: Taxonomy, rng: np.random.Generator) -> list[Assignment]:
    """An assignment for each feature, in order; deterministic but for the draws of the null, which take `rng`."""
    member_VS = membership(bags.words, taxonomy)
    member_VC = sum_by_category(member_VS, taxonomy)
    n = len(ids)
    share_FS = bag_shares(bags, member_VS, n)
    share_FC = sum_by_category(share_FS, taxonomy)
    spoken_F = np.diff(bags.starts_F) > 0
    if not spoken_F.any():
        return [Assignment(feature, WITHOUT, None, None, "lexical", REASON_WITHOUT) for feature in ids]
    mean_S, mean_C = share_FS[spoken_F].mean(axis=0), share_FC[spoken_F].mean(axis=0)
    drawn = draw_words(bags, member_VC, rng)
    assigned: list[Assignment] = []
    for number, feature in enumerate(ids):
        if not spoken_F[number]:
            assigned.append(Assignment(feature, WITHOUT, None, None, "lexical", REASON_WITHOUT))
            continue
        threshold = float(np.quantile(shuffled_excess(bags, number, drawn, mean_C), 1 - CHANCE))
        best = int(np.argmax(share_FC[number] - mean_C))
        cited = strongest_words(bags, number, member_VC[:, best])
        name = taxonomy.categories[best]
        shares = float(share_FC[number, best]), float(mean_C[best])
        inside_S = np.where(taxonomy.category_of_S == best, share_FS[number] - mean_S, -np.inf)
        subcategory = taxonomy.subcategories[int(np.argmax(inside_S))].name
        assigned.append(_judge_share(feature, name, subcategory, shares, threshold, cited))
    return assigned


def _judge_share(
    feature: str, category: str, subcategory: str, shares: tuple[float, float], threshold: float, cited: Sequence[str]
) -> Assignment:
    """The nearest category, or none, from the feature's share of it and the mean share."""
    own, mean = shares
    excess, limit = round(own - mean, 4), round(threshold, 4)
    said = f"{own:.0%} of its words, {mean:.0%} of a feature's on average"
    if own - mean > threshold:
        reason = f"{said}: {', '.join(readable(word) for word in cited)}"
        return Assignment(feature, ASSIGNED, category, subcategory, "lexical", reason, excess, limit)
    reason = f"none fits: the nearest, {category}, has {said}; shuffled words reach that"
    return Assignment(feature, NONE_FITS, None, None, "lexical", reason, excess, limit)


def bag_shares(bags: Bags, member_VX: FloatArray, n_features: int) -> FloatArray:
    """How much of each feature's weight belongs to each column, float64 [F, X]."""
    share_FX = np.zeros((n_features, member_VX.shape[1]))
    np.add.at(share_FX, bags.feature_M, bags.weight_M[:, None] * member_VX[bags.word_M])
    return share_FX


def sum_by_category(values_XS: FloatArray, taxonomy: Taxonomy) -> FloatArray:
    """Columns of subcategories added up to columns of categories."""
    into_SC = np.eye(len(taxonomy.categories))[taxonomy.category_of_S]
    summed: FloatArray = values_XS @ into_SC
    return summed


def draw_words(bags: Bags, member_VC: FloatArray, rng: np.random.Generator) -> dict[int, FloatArray]:
    """For each source, what `DRAWS` bags of words drawn from all of the source's entries belong to, float64 [D, m, C].

    m is the largest number of entries that a feature has; one with fewer takes the first. All features share the
    draws, so that equal weights have equal thresholds.
    """
    drawn: dict[int, FloatArray] = {}
    for source in np.unique(bags.source_M).tolist():
        inside = bags.source_M == source
        pool = bags.word_M[inside]
        most = int(np.bincount(bags.feature_M[inside]).max())
        drawn[source] = member_VC[pool[rng.integers(0, len(pool), (DRAWS, most))]]
    return drawn


def shuffled_excess(bags: Bags, number: int, drawn: dict[int, FloatArray], mean_C: FloatArray) -> FloatArray:
    """The largest excess of one feature's bag with drawn words in place of its own, float64 [D]."""
    part = bags.of(number)
    total_DC = np.zeros((DRAWS, len(mean_C)))
    for source in np.unique(bags.source_M[part]).tolist():
        weight_m = bags.weight_M[part][bags.source_M[part] == source]
        total_DC += np.matmul(weight_m, drawn[source][:, : len(weight_m)])
    largest_D: FloatArray = (total_DC - mean_C).max(axis=1)
    return largest_D


def strongest_words(bags: Bags, number: int, member_V: FloatArray) -> list[str]:
    """The words that add most to one feature's share of a category."""
    part = bags.of(number)
    worth: dict[str, float] = {}
    for word, weight in zip(bags.word_M[part], bags.weight_M[part] * member_V[bags.word_M[part]], strict=True):
        if weight > 0:
            worth[bags.words[word]] = worth.get(bags.words[word], 0.0) + float(weight)
    return sorted(worth, key=lambda word: (-worth[word], word))[:NAMED]


def assign_by_asking(ids: Sequence[str], texts: Sequence[str], ask_all: AskAll, taxonomy: Taxonomy) -> list[Assignment]:
    """An assignment for each feature, as the judge answers.

    A feature with nothing to tell is not asked about; those of which the same is told are one question.
    """
    telling = list(dict.fromkeys(text for text in texts if text))
    answers = dict(zip(telling, ask_all(telling), strict=True))
    return [
        _read_reply(feature, answers[text], taxonomy)
        if text
        else Assignment(feature, WITHOUT, None, None, "judge", REASON_WITHOUT)
        for feature, text in zip(ids, texts, strict=True)
    ]


def _read_reply(feature: str, reply: Reply, taxonomy: Taxonomy) -> Assignment:
    """A judge's reply as an assignment; a name that the taxonomy does not have is no answer."""
    answer = reply.value
    if answer is None:
        reason = REASON_SILENT + (f": {reply.failure}" if reply.failure else "")
        return Assignment(feature, NO_ANSWER, None, None, "judge", reason)
    if answer.strip().casefold() == NONE_FITS:
        return Assignment(feature, NONE_FITS, None, None, "judge", "none fits, says the judge")
    found = taxonomy.find(answer)
    if found is None:
        reason = f"the judge named {answer[:80]!r}, which is not in the taxonomy"
        return Assignment(feature, NO_ANSWER, None, None, "judge", reason)
    return Assignment(feature, ASSIGNED, *found, "judge", "the judge's answer")
