"""Maps of points in two dimensions: a colour and a shape per category, or per segment for tokens."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from lorascope.report.rings import COLOURS, colour_class

Json = Mapping[str, Any]
HEIGHT, MARGIN = 300, 12
SHAPES = (
    "M-2.4 0H2.4",  # none: a dash
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",
    "M-3.6 -3.6H3.6V3.6H-3.6Z",
    "M0 -4.8L4.4 3.4H-4.4Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.8L4.4 -3.4H-4.4Z",
    "M-1.5 -4.8H1.5V-1.5H4.8V1.5H1.5V4.8H-1.5V1.5H-4.8V-1.5H-1.5Z",
    "M-4.5 -2.6L0 -5L4.5 -2.6V2.6L0 5L-4.5 2.6Z",
    "M-5 -2H5V2H-5Z",
    "M-2 -5H2V5H-2Z",
)
"""Outlines of the shapes s0 to s9, in pixels about their middle."""
SEGMENT_SHAPES = {"prompt": 2, "think": 1, "answer": 3}


def shape_defs() -> Markup:
    """The shapes, once per page, for the points to use."""
    return Markup("".join(f'<path id="s{i}" d="{path}"/>' for i, path in enumerate(SHAPES)))


def shape_of(number: int) -> int:
    """The number of a category's shape; with more than nine categories shapes come again."""
    return (number - 1) % COLOURS + 1 if number else 0


def shape_mark(number: int) -> Markup:
    """A category's shape in its colour, for lists and tables."""
    return Markup(
        f'<svg class="shape" width="12" height="12" aria-hidden="true"><use href="#s{shape_of(number)}" '
        f'class="point {colour_class(number)}" x="6" y="6"/></svg>'
    )


def point_map(one: Json, cards: Collection[str], listed: Collection[str], traces: str = "") -> Markup:
    """One map; a feature's point links to its card, else to its line in the lists, else to its category's list.

    Args:
        traces: where a corpus's traces are, with `{corpus}` in it, for tokens' points to link to; "" where nowhere.
    """
    if not one["points"]:
        return Markup('<p class="empty">No points to draw.</p>')
    place = traces.replace("{corpus}", quote(one["corpus"]))
    marks = "".join(point_mark(point, one["kind"], cards, listed, place) for point in reversed(one["points"]))
    label = f"Map of {one['label'].lower()}: {len(one['points'])} points in two dimensions"
    return Markup(
        f'<svg class="points" width="100%" height="{HEIGHT}" role="group" aria-label="{escape(label)}">{marks}</svg>'
    )


def point_mark(point: Json, kind: str, cards: Collection[str], listed: Collection[str], traces: str) -> str:
    """One point with what it says; a token links to its place under `traces`, unless that is ""."""
    place = f'x="{3 + 94 * point["x"]:.1f}%" y="{MARGIN + (HEIGHT - 2 * MARGIN) * (1 - point["y"]):.0f}"'
    title = f"<title>{escape(point['said'])}</title>"
    if point["id"] is None:
        segment = point["segment"]
        mark = f'<use href="#s{SEGMENT_SHAPES.get(segment, 1)}" class="point seg-{segment}" {place}>{title}</use>'
        address = f"{traces}/{point['trace']}#t{point['position']}"
        return f'<a href="{escape(address)}" tabindex="-1">{mark}</a>' if traces else mark
    mark = f'<use href="#s{shape_of(point["number"])}" class="point {colour_class(point["number"])}" {place}/>'
    target = link_target(point["id"], point["anchor"], kind, cards, listed)
    # the lists below are the way by keyboard: hundreds of stops would be none
    return f'<a href="#{escape(target)}" tabindex="-1">{title}{mark}</a>'


def link_target(feature: str, anchor: str, kind: str, cards: Collection[str], listed: Collection[str]) -> str:
    """Where a feature is to be found on the page; `anchor` is that of its category's list."""
    for name in (feature, feature.rstrip("+-")):
        if name in cards:
            return f"card-{name}"
    return f"m-{feature}" if feature in listed else f"cat-{kind}-{anchor}"


def listed_features(kinds: Sequence[Json]) -> set[str]:
    """Ids of the features that have a line in the lists."""
    return {
        feature["id"]
        for kind in kinds
        for group in kind["members"]
        for sub in group["subcategories"]
        for feature in sub["features"]
    }


def shown_features(categories: Json) -> set[str]:
    """Ids of the features that have a line in the lists or a point on a map."""
    points = {point["id"] for one in categories["maps"] for point in one["points"] if point["id"]}
    return listed_features(categories["kinds"]) | points
