"""Executable rules: what they mean, what they may see, how they are written down."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lorascope.errors import BadInput
from lorascope.explain.rules import (
    PADDING,
    Condition,
    Rule,
    describe_rule,
    execute_rule,
    make_vocabulary,
    rule_from_json,
    rule_to_json,
    token_classes,
)
from planted_text import make_words

VOCABULARY, IDS = make_words()
SEGMENT = {"p": 1, "t": 2, "a": 3}


def run(rule: Rule, texts: list[str], segments: str = "") -> list[int]:
    """The places at which a rule is true in one row of tokens."""
    ids = np.array([[IDS.get(text, PADDING) for text in texts]], dtype=np.int32)
    seg = np.array([[SEGMENT[s] for s in segments or "t" * len(texts)]], dtype=np.uint8)
    return np.flatnonzero(execute_rule(rule, ids, seg, VOCABULARY)[0]).tolist()


def at(back: int, *tokens: str) -> Condition:
    return Condition("at", back, tokens)


def test_conditions_mean_what_they_say() -> None:
    texts = [" answer", " is", "7", "Wait", ",", " is", "5"]
    assert run(((at(0, " is"),),), texts) == [1, 5]
    assert run(((at(0, " is"), at(1, " answer")),), texts) == [1]
    assert run(((at(0, " is"), at(1, " answer")), (at(0, "5", "Wait"),)), texts) == [1, 3, 6]
    assert run(((Condition("at", 0, name="number"),),), texts) == [2, 6]
    assert run(((Condition("within", 2, ("Wait",)),),), texts) == [4, 5]
    assert run(((Condition("at", 0, name="number"), Condition("segment", name="answer")),), texts, "tttttaa") == [6]
    assert run((), texts) == []


def test_a_rule_sees_nothing_outside_its_window() -> None:
    after_wait = ((at(1, "Wait"),), (Condition("within", 8, ("Wait",)),))
    assert run(after_wait, ["Wait", ",", " so"]) == [1, 2]
    assert run(after_wait, [",", " so"]) == []
    # Rows are texts of their own: the end of one is not before the start of the next.
    ids = np.array([[IDS[","], IDS["Wait"]], [IDS[" so"], IDS[" so"]]], dtype=np.int32)
    assert not execute_rule(after_wait, ids, np.full((2, 2), 2, np.uint8), VOCABULARY).any()


def test_padding_is_never_true_and_never_matches() -> None:
    anything = ((Condition("segment", name="special"),),)
    ids = np.array([[PADDING, PADDING, IDS[","]]], dtype=np.int32)
    assert execute_rule(anything, ids, np.zeros((1, 3), np.uint8), VOCABULARY).tolist() == [[False, False, True]]
    for name in VOCABULARY.masks:
        rule = ((Condition("at", 1, name=name),),)
        assert not execute_rule(rule, ids, np.zeros((1, 3), np.uint8), VOCABULARY).any()


def test_token_classes() -> None:
    expected = {
        " 12": ["number"],
        "7": ["number"],
        " Then": ["capitalised"],
        " then": ["lowercase"],
        "ing": ["lowercase", "continuation"],
        " x": ["letter"],
        " +": ["operator"],
        ",": ["punctuation"],
        "\n\n": ["newline"],
        ".\n": ["punctuation", "newline"],
        "  ": ["space"],
        "": [],
        "<|im_end|>": [],
        " 日本": [],
        "<E2 80>": [],
    }
    assert {text: token_classes(text) for text in expected} == expected


def test_texts_that_are_pieces_of_characters_or_shared_by_ids() -> None:
    vocabulary = make_vocabulary(["a", "<C3>", "😀", "a"])
    ids = np.array([[0, 1, 2, 3]], dtype=np.int32)
    segments = np.full((1, 4), 2, np.uint8)
    assert execute_rule(((at(0, "a"),),), ids, segments, vocabulary).tolist() == [[True, False, False, True]]
    assert execute_rule(((at(0, "<C3>", "😀"),),), ids, segments, vocabulary).tolist() == [[False, True, True, False]]


def test_json_there_and_back() -> None:
    rule = (
        (at(0, " is", "日本"), at(2, "\n"), Condition("segment", name="think")),
        (Condition("at", 1, name="number"), Condition("within", 8, ("Wait",))),
    )
    assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"any": [{"all": [{"at": 0, "class": "verb"}]}]},
        {"any": [{"all": [{"at": -1, "tokens": ["x"]}]}]},
        {"any": [{"all": [{"at": 0, "tokens": []}]}]},
        {"any": [{"all": [{"segment": "poem"}]}]},
        {"any": [{"all": [{"at": 0, "tokens": ["x"], "code": "1"}]}]},
    ],
)
def test_what_is_no_rule_is_refused(data: object) -> None:
    with pytest.raises(BadInput, match="Not a rule"):
        rule_from_json(data)


def test_descriptions_are_short_english() -> None:
    rule = ((at(0, " is"), at(1, " answer"), Condition("segment", name="answer")),)
    assert describe_rule(rule) == "fires on ' is' after ' answer' in the answer"
    rule = ((Condition("segment", name="think"), Condition("at", 0, name="number")), (at(1, "\n"),))
    assert describe_rule(rule) == "fires on a number while thinking; or on any token after '\\n'"
    rule = ((Condition("at", 0, name="letter"), Condition("within", 8, ("Wait", ",")), Condition("within", 8, ("7",))),)
    assert describe_rule(rule) == "fires on a single letter with 'Wait' or ',' and '7' among the 8 tokens before"
    rule = ((at(2, " x"), Condition("at", 1, name="operator")),)
    assert describe_rule(rule) == "fires on any token after an operator and 2 tokens after ' x'"
    assert describe_rule(()) == "no rule found"
