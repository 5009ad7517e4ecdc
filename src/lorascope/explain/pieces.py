"""Windows of tokens as text that a judge can read: whole characters, marked tokens, and marks that the text lacks.

Shapes: W = windows, S = tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.prompts import show_piece
from lorascope.explain.rules import PADDING
from lorascope.explain.windows import Windows
from lorascope.token_text import TokenTable, token_texts
from lorascope.traces import SEGMENT_NAMES

BROKEN = "\ufffd"
MARKS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("⟦", "⟧"), ("⟪", "⟫"))


def window_texts(table: TokenTable, ids_S: NDArray[np.int32]) -> list[str]:
    """The text of each token of a window [S], "" for padding; joined, they are the decoding of the whole window.

    A character that the window's edge cuts is left out. One spread over several tokens belongs to the last of them.
    """
    real = np.flatnonzero(ids_S != PADDING)
    texts = [""] * len(ids_S)
    for place, text in zip(real.tolist(), token_texts(table, ids_S[real].tolist()), strict=True):
        texts[place] = text
    for order, strip in ((real, str.lstrip), (real[::-1], str.rstrip)):
        for place in order.tolist():
            texts[place] = strip(texts[place], BROKEN)
            if texts[place]:
                break
    return texts


def choose_marks(texts: Sequence[str]) -> tuple[str, str]:
    """A pair of marks of which neither occurs in any of the texts."""
    everything = "\n".join(texts)
    for opening, closing in MARKS:
        if opening not in everything and closing not in everything:
            return opening, closing
    number = 1
    while f"<{number}<" in everything or f">{number}>" in everything:
        number += 1
    return f"<{number}<", f">{number}>"


def mark_texts(texts: Sequence[str], marked: Sequence[bool], marks: tuple[str, str]) -> str:
    """The joined text with each run of marked tokens between marks; a mark on part of a character moves to its end."""
    out: list[str] = []
    inside = waiting = False
    for text, wanted in zip(texts, marked, strict=True):
        if not text:
            waiting = waiting or wanted
            continue
        wanted = wanted or waiting
        waiting = False
        if wanted != inside:
            out.append(marks[0] if wanted else marks[1])
            inside = wanted
        out.append(text)
    return "".join(out) + (marks[1] if inside else "")


def show_pieces(table: TokenTable, windows: Windows) -> tuple[list[str], tuple[str, str] | None]:
    """Each window as a judge sees it, and the marks (None where nothing is marked)."""
    texts = [window_texts(table, ids_S) for ids_S in windows.ids_WS]
    if windows.marked_WS is None:
        joined = ["".join(text) for text in texts]
        marks = None
    else:
        marks = choose_marks(["".join(text) for text in texts])
        joined = [mark_texts(t, marked_S.tolist(), marks) for t, marked_S in zip(texts, windows.marked_WS, strict=True)]
    segments = [centre_segment(segments_S) for segments_S in windows.segments_WS]
    return [show_piece(text, segment) for text, segment in zip(joined, segments, strict=True)], marks


def centre_segment(segments_S: NDArray[np.uint8]) -> str:
    """The name of the segment that a window's middle token is in."""
    return SEGMENT_NAMES[int(segments_S[len(segments_S) // 2])]
