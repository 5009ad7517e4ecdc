"""Token texts as HTML: escaped, white space visible, heat in ten steps, the peak and firings marked without colour."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from lorascope.report.numbers import figures
from lorascope.traces import SEGMENT_NAMES

STEPS = 9
"""Heat classes h1 to h9."""


def shown_text(text: str) -> str:
    """A token's text with what cannot be seen made visible: line breaks, lone spaces, control characters."""
    if text == "":
        return "◌"  # the first bytes of a character that a later token completes
    if text.strip(" ") == "":
        return "·" * len(text)
    out = []
    for character in text:
        if character == "\n":
            out.append("↵")
        elif character == "\t":
            out.append("⇥")
        elif unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") and character != "\u200d":
            out.append(f"⟨{ord(character):04X}⟩")
        else:
            out.append(character)
    return "".join(out)


def running_text(text: str) -> str:
    """A token's text within others: its leading space holds to it, so that a line never ends between the two."""
    shown = shown_text(text)
    core = shown.lstrip(" ")
    return "\u00a0" * (len(shown) - len(core)) + core


def lone_text(text: str) -> str:
    """A token's text on its own, with leading and trailing spaces as dots."""
    core = text.strip(" ")
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "·" * left + shown_text(core) + "·" * right if core else shown_text(text)


def breaks(before: str, text: str, code: int) -> str:
    """Where a line may end before a token: before its leading space, at a mark of the template, after a line break."""
    mark = code == 0 and text[:1] in ("<", "[")
    return "<wbr>" if text[:1] == " " or mark or before[-1:] == "\n" else ""


def heat(value: float | None, most: float, typical: float = 0.0) -> int:
    """The heat step of an activation between the typical one (0, up to there no heat) and the largest (STEPS)."""
    if value is None or value <= typical or most <= typical:
        return 0
    return min(STEPS, 1 + int(STEPS * (value - typical) / (most - typical) * 0.9999))


def segment_mark(code: int) -> str:
    """A small label where a segment begins."""
    return f'<i class="mark-seg">{SEGMENT_NAMES[code]}</i>'


def heat_tokens(example: Mapping[str, Any], most: float, level: float, typical: float = 0.0) -> Markup:
    """The tokens of one example: shade = activation, underlined = fires, bold and framed = the example's token.
    Template, markup and attention sinks never count as firing: they are hatched, however strong."""
    parts: list[str] = ["<span class=more>…</span>" if example["more_before"] else ""]
    last, before, sinks = None, "", example.get("sinks", ())
    for i, (text, value, code) in enumerate(
        zip(example["tokens"], example["values"], example["segments"], strict=True)
    ):
        if code != last and code != 0:
            parts.append(segment_mark(code))
        last = code if code != 0 else last
        parts.append(breaks(before, text, code))
        before, counts = text, code != 0 and i not in sinks
        names = [f"h{step}" if counts else "un"] if (step := heat(value, most, typical)) else []
        if value is not None and value > level and step and counts:
            names.append("f")
        if i == example["peak"]:
            names.append("peak")
        if not counts:
            names.append("sp" if code == 0 else "sk")
        shown = escape(running_text(text))
        if names:
            tip = f' data-v="{figures(value)}"' if step else ""
            parts.append(f'<span class="{" ".join(names)}"{tip}>{shown}</span>')
        else:
            parts.append(str(shown))
    parts.append("<span class=more>…</span>" if example["more_after"] else "")
    return Markup("".join(parts))


def token_list(tokens: Sequence[Mapping[str, Any]]) -> Markup:
    """Tokens on their own, `{"text", "value"}` each."""
    shown = [
        f'<span class="tok" title="{figures(token["value"])}">{escape(lone_text(token["text"]))}</span>'
        for token in tokens
    ]
    return Markup(" ".join(shown))


def plain_tokens(tokens: Sequence[str], segments: Sequence[int], sinks: Sequence[int] = ()) -> Markup:
    """A whole trace, one element per token, line breaks kept; a script colours it. Attention sinks are marked, since
    they never count as firing."""
    parts: list[str] = []
    last, before = None, ""
    uncounted = set(sinks)
    for i, (text, code) in enumerate(zip(tokens, segments, strict=True)):
        if code != last and code != 0:
            parts.append(segment_mark(code))
            last = code
        name = ' class="sp"' if code == 0 else ' class="sk"' if i in uncounted else ""
        parts.append(f"{breaks(before, text, code)}<span{name}>{escape(running_text(text))}</span>")
        parts.append("<br>" * min(2, text.count("\n")))
        before = text
    return Markup("".join(parts))
