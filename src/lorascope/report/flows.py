"""The flow of what latents write: from matrix types and layer thirds through groups of latents to categories.

The ribbons are drawn in a nested drawing that stretches with the page; names keep their size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup, escape

from lorascope.report.numbers import percent
from lorascope.report.rings import colour_class

Json = Mapping[str, Any]
HEIGHT, GAP, WIDTH = 560, 5, 14
"""Of the chart and between nodes, in pixels, and of a node, in thousandths of the chart's width."""
COLUMNS = (0, 300, 600, 986)
"""Left ends of the four columns of nodes, in thousandths of the width."""
HEADS = ("matrix type", "layers", "latents about", "category")
SMALL = 0.012
"""Groups of latents below this share of everything are drawn together, per category."""
NAMED = 8
"""A node of at least this height, in pixels, has its name beside it."""
LAST = 1 << 20
"""Where features without a category (number 0) come in an order by number."""


class Node(NamedTuple):
    """A bar of the chart; `number` is its category's, None for types and thirds."""

    column: int
    name: str
    number: int | None


class Path(NamedTuple):
    """One strand of weight through all four columns."""

    nodes: tuple[Node, Node, Node, Node]
    weight: float


class Ribbon(NamedTuple):
    """All weight of one category from a node to a node of the next column."""

    start: Node
    stop: Node
    number: int


def flow_paths(rows: Sequence[Json]) -> list[Path]:
    """The strands, with small groups of latents put together."""
    total = sum(row["weight"] for row in rows)
    groups: dict[tuple[str, str | None], float] = {}
    for row in rows:
        group = (row["category"], row["subcategory"])
        groups[group] = groups.get(group, 0.0) + row["weight"]
    paths: dict[tuple[Node, Node, Node, Node], float] = {}
    for row in rows:
        category, sub, number = row["category"], row["subcategory"], row["number"]
        small = groups[category, sub] < SMALL * total
        name = category if sub is None else "other groups" if small else sub
        nodes = (
            Node(0, row["type"], None),
            Node(1, row["third"], None),
            Node(2, name, number),
            Node(3, category, number),
        )
        paths[nodes] = paths.get(nodes, 0.0) + row["weight"]
    return [Path(nodes, weight) for nodes, weight in paths.items()]


def place_nodes(paths: Sequence[Path]) -> tuple[dict[Node, tuple[float, float]], float]:
    """Top and height of each node in pixels, and pixels per unit of weight.

    Types and thirds keep the order of the rows; groups and categories have that of the categories' numbers.
    """
    weight: dict[Node, float] = {}
    for path in paths:
        for node in path.nodes:
            weight[node] = weight.get(node, 0.0) + path.weight
    total = sum(path.weight for path in paths)
    ordered = sorted(weight, key=lambda node: 0 if node.number is None else node.number or LAST)
    columns = [[node for node in ordered if node.column == c] for c in range(len(COLUMNS))]
    scale = (HEIGHT - GAP * (max(map(len, columns)) - 1)) / total
    placed: dict[Node, tuple[float, float]] = {}
    for nodes in columns:
        top = (HEIGHT - scale * total - GAP * (len(nodes) - 1)) / 2
        for node in nodes:
            placed[node] = (top, scale * weight[node])
            top += scale * weight[node] + GAP
    return placed, scale


def flow_chart(flow: Json, kind: str = "latent", *, types: str = "#map", thirds: str = "#map") -> Markup:
    """The whole chart; groups and categories link to their features, types and thirds to the map.

    Args:
        types: where a matrix type leads, `{}` being its name.
        thirds: where a third of the layers leads.
    """
    paths = flow_paths(flow["rows"])
    placed, scale = place_nodes(paths)
    total = sum(path.weight for path in paths)
    ribbons = "".join(ribbons_after(paths, placed, scale, column) for column in range(len(COLUMNS) - 1))
    bars = "".join(
        node_mark(node, top, height, height / scale / total, node_target(node, kind, types, thirds))
        for node, (top, height) in placed.items()
    )
    label = "Where the weight of latents' decoder rows goes: matrix types, layer thirds, groups of latents, categories"
    heads = "".join(f"<span>{name}</span>" for name in HEADS)
    return Markup(
        f'<div class="scroll"><div class="flow"><p class="flowheads" aria-hidden="true">{heads}</p>'
        f'<svg width="100%" height="{HEIGHT}" role="group" aria-label="{label}">'
        f'<svg width="100%" height="{HEIGHT}" viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none">{ribbons}</svg>'
        f"{bars}</svg></div></div>"
    )


def node_target(node: Node, kind: str, types: str, thirds: str) -> str:
    """Where a node leads."""
    if node.number is not None:
        return f"#cat-{kind}-{anchor_of(node)}"
    return types.format(quote(node.name, safe="")) if node.column == 0 else thirds


def node_mark(node: Node, top: float, height: float, share: float, target: str) -> str:
    """A node's bar as a link, and its name beside it where there is room: in the last column to its left."""
    colour = "node" if node.number is None else colour_class(node.number)
    said = escape(f"{node.name}: {percent(share)} of what latents write")
    x = COLUMNS[node.column]
    size = f'width="{WIDTH / 10}%" height="{max(height, 0.5):.1f}"'
    bar = f'<rect class="{colour}" x="{x / 10}%" y="{top:.1f}" {size}/>'
    mark = f'<a href="{escape(target)}" aria-label="{said}"><title>{said}</title>{bar}</a>'
    if height < NAMED:
        return mark
    at, anchor = (x - 8, "end") if node.column == len(COLUMNS) - 1 else (x + WIDTH + 8, "start")
    place = f'x="{at / 10}%" y="{top + height / 2 + 4:.1f}" text-anchor="{anchor}"'
    return f"{mark}<text {place}>{escape(node.name)}</text>"


def anchor_of(node: Node) -> str:
    """The list of a node's category: by its number, of features without one by their outcome, which is its name."""
    return str(node.number) if node.number else node.name.replace(" ", "-")


def ribbons_after(paths: Sequence[Path], placed: Mapping[Node, tuple[float, float]], scale: float, column: int) -> str:
    """The ribbons from one column to the next, in the categories' colours."""
    heights: dict[Ribbon, float] = {}
    for path in paths:
        ribbon = Ribbon(path.nodes[column], path.nodes[column + 1], path.nodes[-1].number or 0)
        heights[ribbon] = heights.get(ribbon, 0.0) + scale * path.weight
    by_start = sorted(heights, key=lambda r: (placed[r.start], r.number or LAST, placed[r.stop]))
    by_stop = sorted(heights, key=lambda r: (placed[r.stop], r.number or LAST, placed[r.start]))
    starts = stacked([(r, r.start) for r in by_start], heights, placed)
    stops = stacked([(r, r.stop) for r in by_stop], heights, placed)
    left, right = COLUMNS[column] + WIDTH, COLUMNS[column + 1]
    bend = (left + right) / 2
    return "".join(
        f'<path class="ribbon {colour_class(r.number)}" d="M{left} {starts[r]:.1f}'
        f"C{bend} {starts[r]:.1f} {bend} {stops[r]:.1f} {right} {stops[r]:.1f}V{stops[r] + height:.1f}"
        f'C{bend} {stops[r] + height:.1f} {bend} {starts[r] + height:.1f} {left} {starts[r] + height:.1f}Z"/>'
        for r, height in heights.items()
    )


def stacked(
    ends: Sequence[tuple[Ribbon, Node]], heights: Mapping[Ribbon, float], placed: Mapping[Node, tuple[float, float]]
) -> dict[Ribbon, float]:
    """Top of each ribbon's end: those of one node below each other, in the given order."""
    free = {node: top for node, (top, _) in placed.items()}
    tops: dict[Ribbon, float] = {}
    for ribbon, node in ends:
        tops[ribbon] = free[node]
        free[node] += heights[ribbon]
    return tops


def flow_table(flow: Json, by: str) -> list[tuple[str, dict[str, float], float]]:
    """The chart as numbers: (type or third, share of each category in it, its share of everything)."""
    total = sum(row["weight"] for row in flow["rows"])
    sums: dict[str, dict[str, float]] = {}
    for row in flow["rows"]:
        inside = sums.setdefault(row[by], {})
        inside[row["category"]] = inside.get(row["category"], 0.0) + row["weight"]
    table: list[tuple[str, dict[str, float], float]] = []
    for name, inside in sums.items():
        own = sum(inside.values())
        table.append((name, {category: weight / own for category, weight in inside.items()}, own / total))
    return table
