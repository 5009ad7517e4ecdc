"""Layer × type maps: one row per matrix type, one column per layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from lorascope.addresses import direction_layer
from lorascope.report.numbers import figures, tick

STEPS = 12
"""Shades of the sequential ramp: classes r0 to r11."""
SIGNED_STEPS = 6
"""Shades of either sign: classes n1 to n6 and p1 to p6."""
CELL = 22
SMALL_CELL = 14


@dataclass(frozen=True)
class Ramp:
    """How values become shades: linear, or logarithmic from `low` on."""

    low: float
    high: float
    log: bool

    def step(self, value: float) -> int:
        """The shade of a value, 0 to STEPS - 1."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / (math.log(self.high / self.low) or 1)
        else:
            part = (value - self.low) / (self.high - self.low or 1)
        return min(STEPS - 1, max(0, int(part * STEPS)))


def ramp_of(grid: Mapping[str, Any]) -> Ramp | None:
    """The scale of a grid from its values (those under the floor do not count); None when it is empty. A linear one
    begins at the grid's `start`, 0 without one."""
    values = [v for row in grid["values"] for v in row if v is not None]
    if not values:
        return None
    if grid.get("scale") == "log":
        positive = [v for v in values if v > 0]
        if not positive:
            return None
        floor = grid.get("floor")
        low = max(min(positive), floor) if floor and floor < max(positive) else min(positive)
        return Ramp(max(low, max(positive) * 1e-4), max(positive), True)
    start = float(grid.get("start", 0.0))
    return Ramp(start, max(values) if max(values) > start else start + 0.5, False)


def layer_map(grid: Mapping[str, Any], layers: Sequence[Any], types: Sequence[str], cards: set[str]) -> Markup:
    """One map with its axes and colour key. Cells carry their address and value for the read-out and for links."""
    names: Mapping[int, str] = grid.get("names") or {}
    ramp = Ramp(0.0, float(len(names)), False) if names else ramp_of(grid)
    if ramp is None:
        return Markup('<p class="empty">All values are 0.</p>')
    cells = []
    exact = set(grid.get("exact") or ())
    for row, _ in enumerate(types):
        for column, _ in enumerate(layers):
            value = grid["values"][row][column]
            if value is None:
                cells.append(cell(row, column, len(layers), "none", ""))
                continue
            address = str(grid["address"][row][column])
            under = grid["under_floor"][row][column]
            said = says(grid, address, value, under)
            extra = f' data-a="{escape(address)}" data-s="{escape(said)}"' + (
                ' data-card="1"' if address in cards else ""
            )
            shade = class_shade(value) if names else f"r{ramp.step(value)}"
            cells.append(cell(row, column, len(layers), shade, extra))
            if address in exact:
                cells.append(exact_mark(row, column, len(layers)))
            if under:
                cells.append(cell(row, column, len(layers), "hatch", ""))
            if names:
                cells.append(cell_text(row, column, len(layers), str(value)))
    ends = ", ".join(f"{number} {name}" for number, name in names.items())
    ends = ends or f"from {figures(ramp.low)} to {figures(ramp.high)} {grid['unit']}"
    label = f"{grid['label']} by layer and matrix type, {ends}"
    attributes = f'class="map" tabindex="0" role="application" aria-roledescription="map" aria-label="{escape(label)}"'
    key = class_key(names) if names else colour_key(grid, ramp)
    return frame_map("".join(cells), layers, types, attributes) + key


def class_shade(number: int) -> str:
    """The shade of a class: 0 is the darkest."""
    return f"r{max(1, 9 - 4 * number)}"


def class_key(names: Mapping[int, str]) -> Markup:
    """What the numbers and shades of classes mean."""
    entries = "".join(
        f'<li><svg width="18" height="14" aria-hidden="true"><rect class="{class_shade(number)}" width="18" '
        f'height="14"/></svg><b>{number}</b> {escape(name)}</li>'
        for number, name in names.items()
    )
    return Markup(f'<ul class="legend">{entries}</ul>')


def says(grid: Mapping[str, Any], address: str, value: float, under: bool) -> str:
    """The read-out of one cell."""
    note = (grid.get("notes") or {}).get(address, "")
    if grid.get("names"):
        return f"class {note}"
    text = f"{figures(value)} {grid['unit']}"
    bounds = (grid.get("intervals") or {}).get(address)
    if bounds:
        known = bounds[0] is not None
        text += f", 95% interval {figures(bounds[0])} to {figures(bounds[1])}" if known else ", no interval"
    return text + (f", {note}" if note else "") + (", under the noise floor" if under else "")


def cell(row: int, column: int, columns: int, name: str, extra: str, size: int = CELL, gap: float = 1) -> str:
    """One rectangle; positions along the layers are percentages."""
    width = 100 / columns
    return (
        f'<rect class="{name}" x="{column * width + 0.03 * width:.3f}%" width="{0.94 * width:.3f}%" '
        f'y="{row * size + gap / 2}" height="{size - gap}"{extra}/>'
    )


def cell_text(row: int, column: int, columns: int, text: str) -> str:
    """A short text in the middle of a cell."""
    place = f'x="{100 * (column + 0.5) / columns:.3f}%" y="{CELL * (row + 0.5) + 4:.0f}"'
    return f'<text class="incell" {place} text-anchor="middle">{escape(text)}</text>'


def frame_map(cells: str, layers: Sequence[Any], types: Sequence[str], attributes: str, size: int = CELL) -> Markup:
    """Cells with type names on the left and layer numbers below."""
    height = size * len(types)
    names = "".join(
        f'<text x="42" y="{size * (i + 0.5) + 4:.0f}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(types)
    )
    every = tick_step(len(layers))
    ticks = "".join(
        f'<text x="{100 * (i + 0.5) / len(layers):.2f}%" y="{height + 15}" text-anchor="middle">{escape(layer)}</text>'
        for i, layer in enumerate(layers)
        if not isinstance(layer, int) or layer % every == 0
    )
    wide = " wide" if len(layers) > 40 else ""
    return Markup(
        f'<div class="chart mapframe{wide}"><p class="ylabel">matrix type</p>'
        f'<svg class="yaxis" width="48" height="{height + 20}" aria-hidden="true">{names}</svg>'
        f'<div class="scroll"><svg width="100%" height="{height + 20}" {attributes}>{cells}{ticks}</svg></div>'
        f'<p class="xlabel">layer</p></div>'
    )


def tick_step(layers: int) -> int:
    """Every how many layers one is named."""
    return 1 if layers <= 12 else 5 if layers <= 60 else 10


def matrix_ticks(addresses: Sequence[str]) -> list[tuple[str, int]]:
    """(place in percent, number) of layers along an axis of directions in the adapter's order, each at its first."""
    first: dict[int, int] = {}
    for place, address in enumerate(addresses):
        if (layer := direction_layer(address)) is not None:
            first.setdefault(layer, place)
    every = tick_step(len(first))
    return [
        (f"{100 * (place + 0.5) / len(addresses):.2f}%", layer) for layer, place in first.items() if layer % every == 0
    ]


def colour_key(grid: Mapping[str, Any], ramp: Ramp) -> Markup:
    """The ramp with its ends and unit."""
    swatches = "".join(f'<rect class="r{i}" x="{i * 14}" width="14" y="0" height="10"/>' for i in range(STEPS))
    floor = grid.get("floor")
    note = (
        '<li><svg width="18" height="10" aria-hidden="true"><rect class="r0" width="18" height="10"/>'
        f'<rect class="hatch" width="18" height="10"/></svg>under the noise floor of a single direction, '
        f"{figures(floor)}</li>"
        if floor is not None
        else ""
    )
    if grid.get("exact"):
        note += (
            '<li><svg class="map" width="18" height="14" aria-hidden="true"><rect class="r3" width="18" height="14"/>'
            '<circle class="exactmark" cx="14" cy="4" r="2"/></svg>exact; the others are screened</li>'
        )
    scale = "logarithmic" if ramp.log else "linear"
    low = f"{tick(ramp.low)} {escape(grid['start_name'])}" if "start_name" in grid else figures(ramp.low)
    return Markup(
        f'<ul class="legend"><li>{low}'
        f'<svg width="{14 * STEPS}" height="10" aria-hidden="true">{swatches}</svg>'
        f"{figures(ramp.high)} {escape(grid['unit'])} ({scale})</li>{note}</ul>"
    )


def decoder_map(decoder: Mapping[str, Any], title: str, live: bool = False) -> Markup:
    """A latent's signed map: orange where it pushes a direction up, purple with a − where down; tiny entries are blank.

    Args:
        live: cells carry their address and value, for a read-out and for links; else it is a picture.
    """
    values = decoder["values"]
    most = max((abs(v) for row in values for v in row if v is not None), default=0.0)
    if most == 0:
        return Markup('<p class="empty">It writes nothing.</p>')
    layers, types = decoder["layers"], decoder["types"]
    size = SMALL_CELL
    cells = [f'<rect class="blank" x="0" y="0" width="100%" height="{size * len(types)}"/>']
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value is None or abs(value) < 0.04 * most:
                continue
            step = min(SIGNED_STEPS, 1 + int(abs(value) / most * SIGNED_STEPS))
            said = f"{'+' if value > 0 else ''}{figures(value)} effect per unit of activation"
            extra = f' data-a="{escape(decoder["address"][row][column])}" data-s="{escape(said)}"' if live else ""
            name = f"{'p' if value > 0 else 'n'}{step}"
            cells.append(cell(row, column, len(layers), name, extra, size, 1))
            if value < 0:
                cells.append(minus_mark(row, column, len(layers), size))
    role = 'tabindex="0" role="application" aria-roledescription="map"' if live else 'role="img"'
    attributes = f'class="map small" {role} aria-label="{escape(title)}"'
    return frame_map("".join(cells), layers, types, attributes, size)


def exact_mark(row: int, column: int, columns: int) -> str:
    """A dot in the upper right corner of a cell whose value is exact among screened ones."""
    return f'<circle class="exactmark" cx="{100 * (column + 0.8) / columns:.3f}%" cy="{CELL * row + 4}" r="2"/>'


def minus_mark(row: int, column: int, columns: int, size: int) -> str:
    """A minus sign across a cell."""
    width = 100 / columns
    return (
        f'<rect class="minusmark" x="{(column + 0.28) * width:.3f}%" width="{0.44 * width:.3f}%" '
        f'y="{size * (row + 0.5) - 0.75}" height="1.5"/>'
    )


def strongest_writes(decoder: Mapping[str, Any], count: int = 6) -> list[tuple[str, str]]:
    """(address, signed effect per unit of activation) of the largest entries."""
    pairs = [
        (abs(v), a, v)
        for row, names in zip(decoder["values"], decoder["address"], strict=True)
        for v, a in zip(row, names, strict=True)
        if v
    ]
    return [(a, ("+" if v > 0 else "") + figures(v, 2)) for _, a, v in sorted(pairs, reverse=True)[:count]]
