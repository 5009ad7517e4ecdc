"""Small marks that go into tables and cards: bars with intervals, shares per segment, pairs of scores."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from lorascope.report.numbers import figures, minus, percent

SEGMENTS = ("prompt", "think", "answer")
NO_INTERVAL = "no interval"
"""In the place of bounds that are None."""
ROW = 22
"""Height of a bar's row in pixels."""


@dataclass(frozen=True)
class Bar:
    """One row of a bar table; `kind` is a class of the style sheet, `note` goes under the label."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: str = ""
    note: str = ""
    muted: bool = False


def bar_mark(bar: Bar, high: float, floor: float | None, dot: bool) -> Markup:
    """The drawing of one row: a bar from 0 (or a dot) with its interval, and the floor as a dashed line."""
    middle = ROW / 2

    def at(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, value / high)):.2f}%"

    parts = [f'<line class="grid" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>', quarter_ticks(middle)] if dot else []
    if not dot:
        shape = f'x="0" y="4" width="{at(bar.value)}" height="{ROW - 8}"'
        parts.append(f'<rect class="bar {bar.kind}{" muted" if bar.muted else ""}" {shape}/>')
        if bar.muted:
            parts.append(f'<rect class="hatch" {shape}/>')
    if bar.low is not None and bar.high is not None:
        ends = f'x1="{at(bar.low)}" x2="{at(bar.high)}" y1="{middle}" y2="{middle}"'
        parts.append(f'<line class="whisker {bar.kind}{" thick" if dot else ""}" {ends}/>')
    if dot:
        parts.append(f'<circle class="dot {bar.kind}" cx="{at(bar.value)}" cy="{middle}" r="5"/>')
    if floor is not None:
        parts.append(f'<line class="floor" x1="{at(floor)}" x2="{at(floor)}" y1="0" y2="{ROW}"/>')
    return Markup(f'<svg class="mark" width="100%" height="{ROW}" aria-hidden="true">{"".join(parts)}</svg>')


def quarter_ticks(middle: float) -> str:
    """Short lines at the quarters of a scale."""
    places = (f"{part}%" for part in (0, 25, 50, 75, 100))
    return "".join(f'<line class="axis" x1="{x}" x2="{x}" y1="{middle - 4:g}" y2="{middle + 4:g}"/>' for x in places)


def percent_axis() -> Markup:
    """What the ticks of a scale from 0 to 100% stand at, for the head of its column."""
    ends = ((0, "start"), (50, "middle"), (100, "end"))
    marks = "".join(f'<text x="{part}%" y="12" text-anchor="{anchor}">{part}%</text>' for part, anchor in ends)
    return Markup(f'<svg class="mark" width="100%" height="15" role="img" aria-label="0 to 100%">{marks}</svg>')


def scale_top(bars: Sequence[Bar], floor: float | None = None) -> float:
    """The right end of a common scale for bars and their intervals."""
    return 1.02 * max([*(max(b.value, b.high or b.value) for b in bars), floor or 0.0, 1e-12])


def share_bar(shares: Mapping[str, float | None] | None, densities: Mapping[str, float | None] | None = None) -> Markup:
    """Where firings are, as one bar of three parts with their shares in words.

    Args:
        densities: share of each segment's ordinary tokens on which the feature fires, said beside its share of firings.
    """
    if not shares or not any(shares.values()):
        return Markup("")
    start, parts, words = 0.0, "", []
    for name in SEGMENTS:
        part = float(shares.get(name) or 0.0)
        width = max(0.0, 100 * part - (0.6 if part < 0.99 else 0))
        parts += f'<rect class="seg-{name}" x="{100 * start:.2f}%" width="{width:.2f}%" y="0" height="8"/>'
        dense = (densities or {}).get(name)
        fires = f", {percent(dense)} of its tokens" if dense is not None else ""
        words.append(f'<span><i class="key seg-{name}"></i>{name} {percent(part)}{fires}</span>')
        start += part
    said = ", ".join(f"{name} {percent(float(shares.get(name) or 0.0))}" for name in SEGMENTS)
    return Markup(
        f'<div class="shares"><svg width="100%" height="8" role="img" aria-label="Firings by segment: {escape(said)}">'
        f'{parts}</svg><p class="ends">{"".join(words)}</p></div>'
    )


def score_floor(rows: Sequence[Mapping[str, Any]]) -> float:
    """The left end, a tenth, of a scale to 1 that holds all scores of some rows and the line of chance."""
    known = [row[name] for row in rows for name in ("score", "wrong") if row[name]]
    ends = [score["value"] if score["low"] is None else score["low"] for score in known]
    return max(0.0, math.floor(10 * min([0.45, *ends])) / 10)


def score_mark(row: Mapping[str, Any], low: float) -> Markup:
    """A row's mean detection score beside that of wrong explanations, from `low` to 1, with chance as a line."""
    if not row["score"]:
        return Markup("")
    drawing = score_dots(row["score"], row["wrong"], low)
    return Markup(f'<svg class="mark" width="100%" height="{ROW}" aria-hidden="true">{drawing}</svg>')


def score_dots(own: Mapping[str, Any], wrong: Mapping[str, Any] | None, low: float) -> str:
    """Dots with intervals of an own score and a wrong explanation's, on a scale from `low` to 1."""

    def at(value: float) -> str:
        return f"{100 * (value - low) / (1 - low):.2f}%"

    parts = '<line class="grid" x1="0" x2="100%" y1="11" y2="11"/>'
    parts += f'<line class="chance" x1="{at(0.5)}" x2="{at(0.5)}" y1="2" y2="20"/>'
    for score, kind in ((wrong, "wrong"), (own, "own")):
        if score:
            if score["low"] is not None:
                ends = f'x1="{at(score["low"])}" x2="{at(score["high"])}" y1="11" y2="11"'
                parts += f'<line class="whisker thick {kind}" {ends}/>'
            shape = f'cx="{at(score["value"])}" cy="11"'
            parts += f'<circle class="dot {kind}" {shape} r="{5 if kind == "own" else 4}"/>'
    return parts


def two_decimals(value: float) -> str:
    """`0.74`."""
    return f"{value:.2f}"


def score_pair(name: str, pair: Mapping[str, Any] | None) -> Markup:
    """An explanation's own score, from 0 to 1 with chance marked, beside its controls: that of a wrong explanation, and
    its own on the feature's firings shifted within their traces (shuffled)."""
    own = (pair or {}).get("own")
    if not own:
        return Markup("")
    said = f"{name}: own {own['value']:.2f} ({bounds_words(own, two_decimals)}, n = {own['n']})"
    words = []
    for control, meaning in (("wrong", "wrong explanation"), ("shuffled", "on shuffled firings")):
        if score := (pair or {}).get(control):
            said += f", {meaning} {score['value']:.2f} ({bounds_words(score, two_decimals)})"
            words.append(f"{control} {score['value']:.2f}")
    against = f'<span class="muted">{", ".join(words) or "no control"}</span>'
    wrong = (pair or {}).get("wrong")
    return Markup(
        f'<div class="score" title="{escape(said)}"><span class="name">{escape(name)}</span>'
        f'<svg width="100%" height="22" role="img" aria-label="{escape(said)}">{score_dots(own, wrong, 0.0)}</svg>'
        f"<b>{own['value']:.2f}</b>{against}</div>"
    )


def interval_words(value: Mapping[str, Any] | None, as_percent: bool = False) -> str:
    """`0.012 (0.010 to 0.015)`, or `0.012 (no interval)` where there was nothing to resample."""
    if not value or value.get("value") is None:
        return "–"
    shown = percent if as_percent else figures
    return f"{shown(value['value'])} ({bounds_words(value, shown)})"


def bounds_words(value: Mapping[str, Any], shown: Callable[[float], str] = figures) -> str:
    """`0.010 to 0.015`, or `no interval`."""
    return NO_INTERVAL if value.get("low") is None else f"{shown(value['low'])} to {shown(value['high'])}"


def interval_note(values: Iterable[Mapping[str, Any] | None], rows: str = "trace") -> str:
    """Why some of these intervals have no bounds, in a sentence; empty where all have."""
    bare = any(value and value.get("value") is not None and value.get("low") is None for value in values)
    return f" No interval: one {rows}, or {rows}s that are all alike, leave nothing to resample." if bare else ""


def score_words(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`0.74 (0.72 to 0.76)`, or `+0.21 (+0.19 to +0.23)`, or `0.74 (no interval)`."""
    if not value or value.get("value") is None:
        return "–"
    style = "+.2f" if signed else ".2f"
    if value["low"] is None:
        return minus(f"{value['value']:{style}} ({NO_INTERVAL})")
    return minus(f"{value['value']:{style}} ({value['low']:{style}} to {value['high']:{style}})")
