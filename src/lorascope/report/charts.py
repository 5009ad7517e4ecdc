"""Charts as inline SVG whose horizontal positions are percentages: they stretch with the page while text keeps its
size, take their colours from the style sheet (so they follow the theme), print, and need no script.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lorascope.report.numbers import figures, nice_ticks, tick, whole

TOP, BOTTOM = 10, 26
"""Space above the plot, and below it for tick labels, in pixels."""


@dataclass(frozen=True)
class Series:
    """One line: points by rising x; `style` is a class of the style sheet (`main`, `faint`, `dots`)."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "main"


def percent_of(value: float, low: float, high: float) -> str:
    """Where a value lies between low and high, as an SVG percentage."""
    return f"{100 * (value - low) / (high - low or 1):.2f}%"


def frame(
    plot: str, y_ticks: Sequence[tuple[float, str]], height: int, y_label: str, x_label: str, title: str
) -> Markup:
    """A plot with its vertical axis beside it, and axis titles. `y_ticks` are (pixel, text)."""
    marks = "".join(f'<text x="44" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>' for y, text in y_ticks)
    return Markup(
        f'<div class="chart"><p class="ylabel">{escape(y_label)}</p>'
        f'<svg class="yaxis" width="48" height="{height}" aria-hidden="true">{marks}</svg>'
        f'<svg class="plot" width="100%" height="{height}" role="img" aria-label="{escape(title)}">{plot}</svg>'
        f'<p class="xlabel">{escape(x_label)}</p></div>'
    )


def grid_lines(y_ticks: Sequence[tuple[float, str]]) -> str:
    """Horizontal hair lines at the ticks."""
    return "".join(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>' for y, _ in y_ticks)


def x_axis(ticks: Sequence[float], low: float, high: float, base: float) -> str:
    """Tick labels under the plot; those at the ends are kept inside."""
    out = f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>'
    for mark in ticks:
        part = (mark - low) / (high - low or 1)
        anchor = "start" if part < 0.02 else "end" if part > 0.98 else "middle"
        out += f'<text x="{100 * part:.2f}%" y="{base + 17}" text-anchor="{anchor}">{escape(tick(mark))}</text>'
    return out


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str, height: int = 260) -> Markup:
    """Lines over a common linear scale, with a legend."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if not xs:
        return Markup('<p class="empty">No points to draw.</p>')
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = padded(min(ys), max(ys))
    base = height - BOTTOM

    def y_of(value: float) -> float:
        return TOP + (base - TOP) * (1 - (value - y_low) / (y_high - y_low))

    y_ticks = [(y_of(t), tick(t)) for t in nice_ticks(y_low, y_high, 5)]
    plot = grid_lines(y_ticks) + x_axis(nice_ticks(x_low, x_high, 6), x_low, x_high, base)
    for one in series:
        if one.style == "dots":
            plot += "".join(
                f'<circle class="dot {one.colour}" cx="{percent_of(x, x_low, x_high)}" cy="{y_of(y):.1f}" r="4"/>'
                for x, y in one.points
            )
        if len(one.points) > 1:
            line = " ".join(f"{1000 * (x - x_low) / (x_high - x_low or 1):.1f},{y_of(y):.1f}" for x, y in one.points)
            # a nested drawing that stretches; its strokes do not
            plot += (
                f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none">'
                f'<polyline class="line {one.style} {one.colour}" points="{line}"/></svg>'
            )
    legend = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line class="line {s.style} {s.colour}" x1="1" x2="25" '
        f'y1="5" y2="5"/>{dot_mark(s)}</svg>{escape(s.label)}</li>'
        for s in series
    )
    return frame(plot, y_ticks, height, y_label, x_label, title) + Markup(f'<ul class="legend">{legend}</ul>')


def dot_mark(series: Series) -> str:
    """The legend's dot of a series of dots."""
    return f'<circle class="dot {series.colour}" cx="13" cy="5" r="4"/>' if series.style == "dots" else ""


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above and below, never negative where the data are not."""
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


@dataclass(frozen=True)
class Column:
    """One column of a column chart."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    muted: bool = False


def column_chart(
    columns: Sequence[Column], *, floor: float | None, x_label: str, y_label: str, title: str, height: int = 240
) -> Markup:
    """Columns from 0 with intervals; muted ones are hatched, the floor is a dashed line."""
    if not columns:
        return Markup('<p class="empty">No columns to draw.</p>')
    tops = [max(c.value, c.high or c.value) for c in columns]
    y_high = padded(0, max([*tops, floor or 0]))[1]
    base, n = height - BOTTOM, len(columns)

    def y_of(value: float) -> float:
        return TOP + (base - TOP) * (1 - max(0.0, value) / y_high)

    y_ticks = [(y_of(t), tick(t)) for t in nice_ticks(0, y_high, 4)]
    plot = grid_lines(y_ticks)
    every = 1 if n <= 12 else 5 if n <= 60 else 10
    for i, column in enumerate(columns):
        x, width, middle = 100 * (i + 0.14) / n, 72 / n, 100 * (i + 0.5) / n
        top = y_of(column.value)
        tip = f"{column.label}: {figures(column.value)}"
        tip += " (no interval)" if column.low is None else f" ({figures(column.low)} to {figures(column.high)})"
        shape = f'x="{x:.2f}%" y="{top:.1f}" width="{width:.2f}%" height="{max(0.5, base - top):.1f}"'
        plot += f'<g data-column="{escape(column.label)}"><title>{escape(tip)}</title>'
        plot += f'<rect class="bar{" muted" if column.muted else ""}" {shape}/>'
        if column.muted:
            plot += f'<rect class="hatch" {shape}/>'
        if column.low is not None and column.high is not None:
            ends = f'y1="{y_of(column.low):.1f}" y2="{y_of(column.high):.1f}"'
            plot += f'<line class="whisker" x1="{middle:.2f}%" x2="{middle:.2f}%" {ends}/>'
        plot += "</g>"
        if i % every == 0:
            plot += f'<text x="{middle:.2f}%" y="{base + 17}" text-anchor="middle">{escape(column.label)}</text>'
    plot += f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>'
    if floor is not None:
        plot += f'<line class="floor" x1="0" x2="100%" y1="{y_of(floor):.1f}" y2="{y_of(floor):.1f}"/>'
    return frame(plot, y_ticks, height, y_label, x_label, title)


def histogram(edges: Sequence[float], counts: Sequence[int], *, level: float | None, colour: str, title: str) -> Markup:
    """Firings by activation, in bins of equal ratio (so the horizontal axis is logarithmic)."""
    if not counts or len(edges) != len(counts) + 1:
        return Markup('<p class="empty">Never fires on this corpus.</p>')
    height, n, most = 56, len(counts), max(counts)
    bars = "".join(
        f'<rect class="bar {colour}" x="{100 * i / n:.2f}%" width="{90 / n:.2f}%" '
        f'y="{height * (1 - count / most):.1f}" height="{height * count / most:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return Markup(
        f'<div class="histogram"><svg width="100%" height="{height}" role="img" aria-label="{escape(title)}">{bars}'
        f'<line class="axis" x1="0" x2="100%" y1="{height}" y2="{height}"/></svg>'
        f'<p class="ends"><span>{figures(edges[0], 2)}</span><span>activation, log scale; tallest {whole(most)}</span>'
        f"<span>{figures(edges[-1], 2)}</span></p></div>"
    )
