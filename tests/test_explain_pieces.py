"""What a judge is shown: whole characters, marks that the text lacks, and which examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lorascope.explain.asking import choose_examples
from lorascope.explain.pieces import choose_marks, mark_texts, show_pieces, window_texts
from lorascope.explain.prompts import (
    ask_class,
    ask_confidence,
    ask_explanation,
    read_class,
    read_confidence,
    read_explanation,
    show_piece,
)
from lorascope.explain.windows import Windows
from lorascope.token_text import token_table
from planted_text import make_tokenizer, make_words

TABLE = token_table(make_tokenizer())
_, WORDS = make_words()


def byte_ids(text: str) -> list[int]:
    """One token per byte."""
    vocabulary = make_tokenizer().get_vocab()
    characters = {bytes: k for k, bytes in enumerate(TABLE.pieces) if len(bytes) == 1}
    assert len(vocabulary) > 256
    return [characters[bytes([byte])] for byte in text.encode()]


def test_tokens_are_decoded_together() -> None:
    ids = [-1, *byte_ids("é🙂"), WORDS[" is"], -1]
    texts = window_texts(TABLE, np.array(ids, np.int32))
    assert texts == ["", "", "é", "", "", "", "🙂", " is", ""]


def test_characters_that_the_edge_cuts_are_left_out() -> None:
    ids = [*byte_ids("🙂")[2:], WORDS[" is"], *byte_ids("日")[:2]]
    assert "".join(window_texts(TABLE, np.array(ids, np.int32))) == " is"
    assert window_texts(TABLE, np.array(byte_ids("日")[1:], np.int32)) == ["", ""]


def test_marks_stand_around_whole_characters_and_runs() -> None:
    marks = ("<<", ">>")
    assert mark_texts(["a", "b", "c", "d"], [False, True, True, False], marks) == "a<<bc>>d"
    assert mark_texts(["a", "b"], [False, True], marks) == "a<<b>>"
    assert mark_texts(["a", "", "é", "b"], [False, True, False, False], marks) == "a<<é>>b"
    assert mark_texts(["", "a"], [False, False], marks) == "a"


@pytest.mark.parametrize("text", ["1 << 2", "[[x]] >>", "<<[[{{⟦⟪", "<<[[{{⟦⟪ <1< >2>"])
def test_marks_do_not_occur_in_the_text(text: str) -> None:
    opening, closing = choose_marks(["plain", text])
    assert opening not in text
    assert closing not in text
    marked = mark_texts(["x", text], [True, False], (opening, closing))
    assert marked.count(opening) == marked.count(closing) == 1


def test_a_window_is_shown_as_quoted_data_with_its_segment() -> None:
    ids = np.array([[WORDS["\n"], WORDS[" is"], WORDS[","]]], np.int32)
    segments = np.array([[1, 2, 2]], np.uint8)
    plain, none = show_pieces(TABLE, Windows(ids, segments))
    assert (plain, none) == (['(think) "\\n is,"'], None)
    marked, marks = show_pieces(TABLE, Windows(ids, segments, np.array([[False, True, False]])))
    assert (marked, marks) == (['(think) "\\n<< is>>,"'], ("<<", ">>"))
    assert show_piece('a"b', "answer", [(' "', 3)]) == '(answer) "a\\"b"\n   activations: " \\"" 3'


def test_questions_say_how_they_are_to_be_answered() -> None:
    pieces = ['(think) "one"', '(think) "two"']
    for question, field in (
        (ask_explanation(pieces, ("[[", "]]"), 0), "explanation"),
        (ask_class(pieces, ("[[", "]]"), 0), "class"),
        (ask_confidence("words", pieces, None, 0), "confidence"),
        (ask_confidence("words", pieces, ("[[", "]]"), 0), "confidence"),
    ):
        told, shown = (message["content"] for message in question.messages)
        assert f'"{field}"' in told
        assert field in question.schema["required"]
        assert shown.endswith('1. (think) "one"\n2. (think) "two"')
        assert not {"MARKS", "NUMBERS"} & set(told.split())
    assert "[number 1, number 2]" in told
    assert "marks [[ and ]]" in told
    assert json.dumps("words") in shown


def test_answers_of_the_wrong_kind_are_refused() -> None:
    assert read_explanation({"explanation": " two\n words "}) == "two words"
    assert read_class({"class": 2, "reason": "r"}) == {"class": 2, "reason": "r"}
    assert read_confidence({"confidence": [0, 10, 5.5]}, 3) == [0, 1, 0.55]
    wrong = [
        (read_explanation, {"explanation": ""}),
        (read_explanation, {"explanation": "x" * 401}),
        (read_explanation, {"explanation": ["x"]}),
        (read_class, {"class": 3, "reason": "r"}),
        (read_class, {"class": True, "reason": "r"}),
        (read_class, {"class": 0}),
    ]
    for read, value in wrong:
        with pytest.raises((ValueError, KeyError)):
            read(value)
    for value in (
        {"confidence": [1, 2]},
        {"confidence": [1, 2, 11]},
        {"confidence": [1, 2, True]},
        {"confidence": "1"},
    ):
        with pytest.raises(ValueError, match=r"confidence|numbers"):
            read_confidence(value, 3)


def test_examples_are_the_strongest_and_spread_over_the_rest() -> None:
    n = 1000
    at, activation = np.arange(n) * 50, np.arange(n, dtype=np.float32)
    trace = np.repeat(np.arange(n // 4), 4)
    chosen = choose_examples(at, activation, trace, 10, 16, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 10
    assert {995, 996, 997, 998, 999} <= set(chosen.tolist())
    assert (chosen < 800).sum() >= 2
    other = choose_examples(at, activation, trace, 10, 16, np.random.default_rng(1))
    assert set(other.tolist()) != set(chosen.tolist())


def test_examples_are_of_several_traces_and_apart_where_there_are_enough() -> None:
    trace = np.repeat([0, 1, 2], [100, 20, 20])
    at = np.arange(140) * 5
    activation = np.linspace(2, 1, 140).astype(np.float32)
    chosen = choose_examples(at, activation, trace, 10, 16, np.random.default_rng(0))
    assert len(chosen) == 10
    assert max(np.bincount(trace[chosen])) <= 4
    places = np.sort(at[chosen])
    assert (np.diff(places) > 16).all()
    few = choose_examples(at[:6], activation[:6], trace[:6], 10, 16, np.random.default_rng(0))
    assert sorted(few.tolist()) == list(range(6))  # crowded ones where there are no others
