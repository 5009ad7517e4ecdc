"""The report's larger figures: from a view's data to a chart."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lorascope.report.charts import Column, Series, column_chart, line_chart
from lorascope.report.marks import Bar
from lorascope.views.feature_list import CLASSES

Json = dict[str, Any]
COLOURS = ("c0", "c1", "c2", "c3")


def loss_chart(curves: Json) -> Markup:
    """Training loss (smoothed, on top of the raw one) and held-out loss of the main runs."""
    series: list[Series] = []
    for colour, run in zip(COLOURS, [run for run in curves["runs"] if run["main"]], strict=False):
        raw = [(s, v) for s, v in zip(run["steps"], run["loss"], strict=True) if v is not None]
        smooth = [(s, v) for s, v in zip(run["steps"], run["smoothed"], strict=True) if v is not None]
        series.append(Series(f"{run['label']}, training batch", raw, colour, "faint"))
        series.append(Series(f"{run['label']}, smoothed", smooth, colour))
        if run["heldout"]:
            held = [(s, v) for s, v in run["heldout"] if v is not None]
            series.append(Series(f"{run['label']}, held out", held, colour, "dots"))
    title = "Loss by training step"
    return line_chart(series, x_label="optimizer step", y_label="cross-entropy, nats per token", title=title)


def layer_chart(ablation: Json) -> Markup:
    """KL of switching off one layer's directions, in layer order."""
    rows = sorted(ablation["by"]["layer"]["rows"], key=lambda row: layer_number(row["target"]))
    columns = [
        Column(
            row["target"].removeprefix("L"), row["kl"]["value"], row["kl"]["low"], row["kl"]["high"], row["under_floor"]
        )
        for row in rows
        if row["kl"]
    ]
    label = "KL(adapted ‖ layer off), nats per token"
    title = "KL of switching off all directions of one layer"
    return column_chart(columns, floor=ablation["floor"], x_label="layer", y_label=label, title=title)


def layer_number(target: str) -> int:
    """The number in `L12`; what has none comes last."""
    digits = target.removeprefix("L")
    return int(digits) if digits.isdigit() else 1 << 30


def kl_bars(rows: Sequence[Json]) -> list[Bar]:
    """Rows of an ablation table as bars."""
    return [
        Bar(row["target"], row["kl"]["value"], row["kl"]["low"], row["kl"]["high"], muted=row["under_floor"])
        for row in rows
        if row["kl"]
    ]


def accuracy_bars(models: Sequence[Json]) -> list[Bar]:
    """Models as dots: base and adapter and full in their own colours."""
    kinds = {"base": "base", "adapter": "adapter", "full": "full"}
    return [Bar(m["label"], m["accuracy"], m["low"], m["high"], kinds.get(m["name"], "other")) for m in models]


def patched_bars(rows: Sequence[Json]) -> list[Bar]:
    """Variants of the patched KL."""
    return [
        Bar(r["label"], r["kl"]["value"], r["kl"]["low"], r["kl"]["high"], f"role-{r['role']}") for r in rows if r["kl"]
    ]


def sae_chart(curve: Json) -> Markup:
    """Variance unexplained while the SAE trains."""
    pairs = [(s, v) for s, v in zip(curve["steps"], curve["fvu"], strict=True) if v is not None]
    series = [Series("training batches", pairs, "c0")]
    label = "variance unexplained"
    return line_chart(series, x_label="step", y_label=label, title="Variance unexplained by step", height=200)


def card_names(directions: Sequence[Json]) -> set[str]:
    """Addresses that have a card, to which map cells link."""
    return {card["address"] for card in directions}


def class_meaning(number: int) -> str:
    """What a judge's class of a feature means, in words."""
    return CLASSES[number]
