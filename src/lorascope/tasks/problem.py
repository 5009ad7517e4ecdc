"""The data every task family, question file and verifier shares."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["number", "text", "list", "choice", "roles", "math"]
"""How an answer is read out of a response and compared (see `lorascope.tasks.answers`)."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Slip:
    """A marked error in a worked trace: the wrong sentence, and the one that corrects it later."""

    wrong: str
    correction: str


@dataclass(frozen=True)
class Problem:
    """One verifiable problem, with a worked trace when a task family made it.

    `key` identifies the content (never the wording): two problems with one key are the same problem.
    `group` is what training and held-out problems may not share: the key by default, something coarser
    where the key alone would leak (the word whose letters are counted, the form of a puzzle).
    """

    id: str
    family: str
    question: str
    gold: str
    kind: Kind = "number"
    thinking: str = ""
    answer: str = ""
    difficulty: int = 0
    key: str = ""
    group: str = ""
    options: tuple[str, ...] = ()
    slips: tuple[Slip, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Score:
    """The verdict on one response; `extracted` is None when no answer could be read (unparsed)."""

    correct: bool
    extracted: str | None


@dataclass(frozen=True)
class Draft:
    """What a family's function returns: a problem before it is named (id, family and difficulty)."""

    question: str
    gold: str
    key: str
    thinking: str
    answer: str
    kind: Kind = "number"
    group: str = ""
    slips: tuple[Slip, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Family:
    """A kind of problem: `make(rng, difficulty)` draws one at a difficulty of 1 to 5."""

    name: str
    description: str
    make: Callable[[random.Random, int], Draft]
