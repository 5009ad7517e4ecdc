"""Executable rules: what the lexical explainer writes, as data that code interprets.

A rule is true at a token when any of its clauses is; a clause is true when all of its conditions are. A condition
looks at the token itself, at one of the tokens before it, at whether a text occurred shortly before, or at the
segment. A rule sees only the tokens it is given: applied to a window, it knows nothing outside the window.

Shapes: W = windows (or traces), S = tokens of a window, V = vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.token_text import readable
from lorascope.traces import SEGMENT_NAMES

BoolArray = NDArray[np.bool_]
PADDING = -1
OPERATORS = frozenset("+-*/=×÷<>^%−·≤≥≠")

CLASSES = {
    "number": "a number",
    "lowercase": "a lower-case word",
    "capitalised": "a capitalised word",
    "letter": "a single letter",
    "continuation": "the rest of a word",
    "punctuation": "punctuation",
    "operator": "an operator",
    "newline": "a line break",
    "space": "white space",
}
"""Token classes by name, with their English; a token can be of several."""


@dataclass(frozen=True)
class Condition:
    """One test at a token. `back` = 0 is the token itself, 1 the one before it.

    kind "at": the token `back` places before has one of the texts `tokens`, or is of class `name`.
    kind "within": one of the texts `tokens` is among the `back` tokens before this one.
    kind "segment": the token is in the segment `name`.
    """

    kind: str
    back: int = 0
    tokens: tuple[str, ...] = ()
    name: str = ""


Clause = tuple[Condition, ...]
Rule = tuple[Clause, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Texts of the vocabulary [V], the ids of each text, and a mask per class [V + 1] (its last entry is padding)."""

    texts: tuple[str, ...]
    ids: dict[str, list[int]]
    masks: dict[str, BoolArray]

    def __len__(self) -> int:
        return len(self.texts)


def make_vocabulary(texts: Sequence[str]) -> Vocabulary:
    """A vocabulary from the readable text of each id (`token_text.vocabulary_texts`)."""
    ids: dict[str, list[int]] = {}
    masks = {name: np.zeros(len(texts) + 1, dtype=np.bool_) for name in CLASSES}
    for number, text in enumerate(texts):
        ids.setdefault(text, []).append(number)
        for name in token_classes(text):
            masks[name][number] = True
    return Vocabulary(tuple(texts), ids, masks)


def token_classes(text: str) -> list[str]:
    """The classes of a token's text."""
    core = text.strip()
    if not core:
        return (["newline"] if "\n" in text else ["space"]) if text else []
    found: list[str] = []
    if core.isdigit():
        found.append("number")
    elif core.isalpha():
        if len(core) == 1:
            found.append("letter")
        elif core[0].isupper():
            found.append("capitalised")
        elif core[0].islower():
            found.append("lowercase")
        if text[0].isalpha():
            found.append("continuation")
    elif all(c in OPERATORS for c in core):
        found.append("operator")
    elif not any(c.isalnum() for c in core) and not core.startswith("<"):
        found.append("punctuation")
    if "\n" in text:
        found.append("newline")
    return found


def execute_rule(
    rule: Rule, ids_WS: NDArray[np.int32], segments_WS: NDArray[np.uint8], vocabulary: Vocabulary
) -> BoolArray:
    """Where the rule is true, bool [W, S]; False at padding (id -1). Each row is a text of its own."""
    real_WS = ids_WS != PADDING
    out_WS = np.zeros(ids_WS.shape, dtype=np.bool_)
    for clause in rule:
        clause_WS = real_WS.copy()
        for condition in clause:
            clause_WS &= _execute_condition(condition, ids_WS, segments_WS, vocabulary)
        out_WS |= clause_WS
    return out_WS


def _execute_condition(
    condition: Condition, ids_WS: NDArray[np.int32], segments_WS: NDArray[np.uint8], vocabulary: Vocabulary
) -> BoolArray:
    if condition.kind == "segment":
        return segments_WS == SEGMENT_NAMES.index(condition.name)
    if condition.name:
        here_WS = vocabulary.masks[condition.name][ids_WS]
    else:
        wanted = [i for text in condition.tokens for i in vocabulary.ids.get(text, [])]
        here_WS = np.isin(ids_WS, np.array(wanted, dtype=ids_WS.dtype))
    if condition.kind == "at":
        return _shift(here_WS, condition.back)
    out_WS = np.zeros_like(here_WS)
    for back in range(1, condition.back + 1):
        out_WS |= _shift(here_WS, back)
    return out_WS


def _shift(mask_WS: BoolArray, back: int) -> BoolArray:
    """What held `back` tokens earlier in the same row; False before the row's start."""
    if back == 0:
        return mask_WS
    out_WS = np.zeros_like(mask_WS)
    out_WS[:, back:] = mask_WS[:, :-back]
    return out_WS


def describe_rule(rule: Rule) -> str:
    """A short English sentence: `fires on ' is' after ' answer' in the answer`."""
    if not rule:
        return "no rule found"
    return "fires on " + "; or on ".join(_describe_clause(clause) for clause in rule)


def _describe_clause(clause: Clause) -> str:
    here = [_describe_text(c) for c in clause if c.kind == "at" and c.back == 0]
    before = [c for c in clause if c.kind == "at" and c.back > 0]
    within = [c for c in clause if c.kind == "within"]
    words = " that is also ".join(here) or "any token"
    for place, condition in enumerate(sorted(before, key=lambda c: c.back)):
        distance = "" if condition.back == 1 else f"{condition.back} tokens "
        words += f"{' and' if place else ''} {distance}after {_describe_text(condition)}"
    for place, condition in enumerate(within):
        words += f" and {_describe_text(condition)}" if place else f" with {_describe_text(condition)}"
    if within:
        words += f" among the {within[0].back} tokens before"
    for condition in clause:
        if condition.kind == "segment":
            words += {"think": " while thinking"}.get(condition.name, f" in the {condition.name}")
    return words


def _describe_text(condition: Condition) -> str:
    if condition.name:
        return CLASSES[condition.name]
    return " or ".join(readable(text) for text in condition.tokens)


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """`{"any": [{"all": [{"at": 0, "tokens": [" is"]}, {"at": 1, "class": "number"}, {"within": 8, "tokens": …},
    {"segment": "think"}]}]}`."""
    return {"any": [{"all": [_condition_to_json(c) for c in clause]} for clause in rule]}


def _condition_to_json(condition: Condition) -> dict[str, Any]:
    if condition.kind == "segment":
        return {"segment": condition.name}
    value = {"class": condition.name} if condition.name else {"tokens": list(condition.tokens)}
    return {condition.kind: condition.back, **value}


def rule_from_json(data: Any) -> Rule:
    """The rule of `rule_to_json`. BadInput when the data is no such rule."""
    try:
        return tuple(tuple(_condition_from_json(c) for c in clause["all"]) for clause in data["any"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"Not a rule of conditions: {str(data)[:200]} ({error!r}).") from error


def _condition_from_json(data: dict[str, Any]) -> Condition:
    keys = set(data)
    if keys == {"segment"} and data["segment"] in SEGMENT_NAMES:
        return Condition("segment", name=data["segment"])
    kind = "at" if "at" in keys else "within"
    back = data[kind]
    if not isinstance(back, int) or not 0 <= back <= 64:
        raise ValueError(f"{kind} must be a whole number of tokens from 0 to 64")
    if keys == {kind, "class"} and data["class"] in CLASSES:
        return Condition(kind, back, name=data["class"])
    if keys == {kind, "tokens"} and data["tokens"] and all(isinstance(t, str) for t in data["tokens"]):
        return Condition(kind, back, tuple(data["tokens"]))
    raise ValueError(f"unknown condition {data}")
