"""Every simple condition that holds at each token of a corpus, as numbers, so that a rule search only counts.

Shapes: T = tokens, K = columns of the table, C = conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.rules import CLASSES, PADDING, Condition, Vocabulary
from lorascope.explain.windows import Corpus
from lorascope.traces import SEGMENT_NAMES

IntArray = NDArray[np.int64]
BACK = 3
WITHIN = 8


@dataclass(frozen=True)
class Candidates:
    """`table_TK[t]` are the numbers of the conditions that hold at token t (C = none); `reach_K` is how many tokens a
    column looks back. `conditions` [C]; `slot_C` groups the token conditions of one place, whose texts can be joined
    into one set (-1 for other conditions)."""

    table_TK: NDArray[np.int32]
    reach_K: IntArray
    conditions: tuple[Condition, ...]
    slot_C: IntArray


def make_candidates(corpus: Corpus, vocabulary: Vocabulary, *, least: int = 3) -> Candidates:
    """The table of a corpus: token and classes at 0..3 back, texts within 8 back, segment. Texts that occur fewer than
    `least` times are no candidates."""
    size = len(vocabulary)
    counts_V = np.bincount(corpus.tokens_T[corpus.tokens_T < size], minlength=size)[:size]
    kept_V = np.flatnonzero(counts_V >= least)
    local_V = np.full(size + 1, -1, dtype=np.int32)
    local_V[kept_V] = np.arange(len(kept_V), dtype=np.int32)
    shifted = [_shifted_ids(corpus, back, size) for back in range(WITHIN + 1)]
    columns: list[NDArray[np.int32]] = []
    reach: list[int] = []
    conditions: list[Condition] = []
    slots: list[int] = []

    def add_texts(kind: str, back: int, places: range, slot: int) -> None:
        start = len(conditions)
        conditions.extend(Condition(kind, back, (vocabulary.texts[v],)) for v in kept_V)
        slots.extend([slot] * len(kept_V))
        for place in places:
            local_T = local_V[shifted[place]]
            columns.append(np.where(local_T >= 0, local_T + start, -1).astype(np.int32))
            reach.append(place)

    for back in range(BACK + 1):
        add_texts("at", back, range(back, back + 1), back)
        for name in CLASSES:
            number = len(conditions)
            conditions.append(Condition("at", back, name=name))
            slots.append(-1)
            holds_T = vocabulary.masks[name][shifted[back]]
            columns.append(np.where(holds_T, number, -1).astype(np.int32))
            reach.append(back)
    add_texts("within", WITHIN, range(1, WITHIN + 1), BACK + 1)
    start = len(conditions)
    conditions.extend(Condition("segment", name=name) for name in SEGMENT_NAMES)
    slots.extend([-1] * len(SEGMENT_NAMES))
    columns.append(corpus.segments_T.astype(np.int32) + start)
    reach.append(0)
    return _pack(columns, reach, conditions, slots)


def _shifted_ids(corpus: Corpus, back: int, size: int) -> NDArray[np.int32]:
    """The id `back` tokens earlier in the same trace, padding before its start; ids past the vocabulary are padding."""
    place_T = np.arange(corpus.n_tokens) - back
    ids_T = np.where(place_T >= corpus.first_T, corpus.tokens_T[np.maximum(place_T, 0)], PADDING)
    return np.where(ids_T < size, ids_T, PADDING).astype(np.int32)


def _pack(
    columns: list[NDArray[np.int32]], reach: list[int], conditions: list[Condition], slots: list[int]
) -> Candidates:
    """Put columns of equal reach side by side and drop their empty entries: the table is as wide as it must be."""
    none = len(conditions)
    packed: list[NDArray[np.int32]] = []
    reach_K: list[int] = []
    for distance in sorted(set(reach)):
        stack_TK = np.stack([c for c, r in zip(columns, reach, strict=True) if r == distance], axis=1)
        stack_TK = -np.sort(-stack_TK, axis=1)
        width = max(1, int((stack_TK >= 0).sum(axis=1).max(initial=1)))
        packed.append(np.where(stack_TK[:, :width] >= 0, stack_TK[:, :width], none))
        reach_K += [distance] * width
    table_TK = np.ascontiguousarray(np.concatenate(packed, axis=1), dtype=np.int32)
    return Candidates(table_TK, np.array(reach_K), tuple(conditions), np.array(slots))
