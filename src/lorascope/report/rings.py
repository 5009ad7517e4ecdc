"""The two-ring chart of shares: categories inside, their subcategories outside, every arc a link to its features."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from lorascope.report.marks import interval_words

Json = Mapping[str, Any]
SIZE = 420
INNER, OUTER = (88, 138), (142, 196)
"""Radii of the two rings."""
LABELLED = 0.02
"""An arc of at least this share carries its number."""
COLOURS = 9


def colour_class(number: int) -> str:
    """The class of a category's colour; k0 is for none. With more than nine categories colours come again."""
    return f"k{(number - 1) % COLOURS + 1}" if number else "k0"


def arc(start: float, stop: float, radii: tuple[int, int]) -> str:
    """The outline of a ring's part between two shares of the circle, clockwise from the top."""
    stop = min(stop, start + 0.9999)  # a whole circle has no two ends
    large = int(stop - start > 0.5)

    def at(share: float, radius: float) -> str:
        angle = 2 * math.pi * share
        return f"{SIZE / 2 + radius * math.sin(angle):.1f} {SIZE / 2 - radius * math.cos(angle):.1f}"

    near, far = radii
    return (
        f"M{at(start, far)}A{far} {far} 0 {large} 1 {at(stop, far)}"
        f"L{at(stop, near)}A{near} {near} 0 {large} 0 {at(start, near)}Z"
    )


def share_rings(kind: Json, measure: str = "rate") -> Markup:
    """The rings of one kind of features by one of its shares (`count`, `rate`, `mass`)."""
    parts: list[str] = []
    inner = outer = 0.0
    for row in kind["rows"]:
        value = row[measure]["value"] if row[measure] else 0.0
        if value <= 0:
            continue
        if row["subcategory"] is None:
            outer = inner
            parts.append(slice_of(kind, row, inner, inner + value, INNER, measure))
            if value >= LABELLED:
                parts.append(number_on(row["number"], inner + value / 2))
            inner += value
        else:
            parts.append(slice_of(kind, row, outer, outer + value, OUTER, measure))
            outer += value
    if not parts:
        return Markup('<p class="empty">Nothing fires on this corpus.</p>')
    label = f"Shares of categories among {kind['label']}, inside, and of their subcategories, outside"
    middle = SIZE / 2
    words = (
        f'<text class="middle" x="{middle}" y="{middle - 4}" text-anchor="middle">{kind["features"]:,}</text>'
        f'<text class="under-middle" x="{middle}" y="{middle + 18}" text-anchor="middle">{escape(kind["label"])}</text>'
    )
    return Markup(
        f'<svg class="rings" viewBox="0 0 {SIZE} {SIZE}" role="group" aria-label="{escape(label)}">'
        f"{''.join(parts)}{words}</svg>"
    )


def slice_of(kind: Json, row: Json, start: float, stop: float, radii: tuple[int, int], measure: str) -> str:
    """One arc with its words, as a link to the list of its category, or to its subcategory's heading there."""
    name = row["subcategory"] or row["category"]
    said = f"{name}: {interval_words(row[measure], True)}, {row['n']:,} {kind['label']}"
    ring = "outer " if row["subcategory"] else ""
    path = f'<path class="{ring}{colour_class(row["number"])}" d="{arc(start, stop, radii)}"/>'
    target = f"cat-{kind['kind']}-{row['anchor']}"
    return f'<a href="#{target}" aria-label="{escape(said)}"><title>{escape(said)}</title>{path}</a>'


def number_on(number: int, middle: float) -> str:
    """A category's number on the middle of its arc; none is a dash."""
    angle, radius = 2 * math.pi * middle, sum(INNER) / 2
    x, y = SIZE / 2 + radius * math.sin(angle), SIZE / 2 - radius * math.cos(angle) + 6
    return f'<text class="on" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{number or "–"}</text>'


def largest_subcategory(kind: Json, category: str, measure: str) -> str:
    """The subcategory that is most of a category, in words; empty where there is none."""
    inside: Sequence[Json] = [
        row for row in kind["rows"] if row["category"] == category and row["subcategory"] and row[measure]
    ]
    best = max(inside, key=lambda row: row[measure]["value"], default=None)
    return "" if best is None or best[measure]["value"] == 0 else str(best["subcategory"])
