"""The layer × type maps: what the adapter is, does, causes, and how sparsely.

A cell is one adapted matrix. At rank r it holds r directions; a map then shows the largest of them (the norm map the
norm of the whole matrix's change), and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.addresses import TYPE_ORDER, direction_layer, direction_type
from lorascope.store import INDEX, store_folder
from lorascope.study import Study
from lorascope.views.ablation_tables import COMMAND, ablation_table, direction_kl
from lorascope.views.directions import open_directions
from lorascope.views.effects import direction_effects
from lorascope.views.feature_list import CLASSES
from lorascope.views.reading import Json, json_file, missing, ready

OUTSIDE = "-"
"""The column of modules that are in no numbered layer."""
RECORD = "lorascope record STUDY --corpus {}"
ABOUT: dict[str, Json] = {
    "norm": {
        "label": "Weight change",
        "unit": "Frobenius norm ‖s·b·aᵀ‖",
        "scale": "linear",
        "caption": "How large the adapter's change of each matrix is: s·‖a‖·‖b‖. It says nothing of how often or how "
        "strongly the direction is driven.",
    },
    "effect": {
        "label": "Effect",
        "unit": "rms of s·‖b‖·z",
        "scale": "log",
        "caption": "Root mean square, over ordinary tokens, of the length that the direction writes. Matrix types "
        "write into different spaces, so compare along a row; across types use the relative effect or KL.",
    },
    "relative": {
        "label": "Relative effect",
        "unit": "rms of s·‖b‖·z over rms of ‖W·x‖",
        "scale": "log",
        "caption": "The effect as a share of the base matrix's own output, so that types can be compared. That output "
        "is measured in the adapted model on a sample of traces.",
    },
    "kl": {
        "label": "KL when off",
        "unit": "nats per predicted token",
        "scale": "log",
        "caption": "KL(adapted ‖ that one direction off), exact, pooled over the assistant tokens of held-out traces. "
        "Hatched cells lie under the noise floor: they cannot be told from a re-run and are not ranked.",
    },
    "spread": {
        "label": "Spread",
        "unit": "participation (E|e|)² / E[e²]",
        "scale": "linear",
        "caption": "How evenly the effect e is spread over ordinary tokens: 1 if |e| is the same on every token, 0.64 "
        "for a Gaussian, near 0 if a few tokens carry everything. It needs no threshold, so it can be compared "
        "among directions.",
    },
    "score": {
        "label": "Detection score",
        "unit": "balanced accuracy",
        "scale": "linear",
        "start": 0.5,
        "start_name": "chance",
        "caption": "How well the explanation of the direction's better explained polarity tells, on traces it never "
        "saw, where it fires. The scale begins at chance, 0.5, and what lies below has its first shade.",
    },
    "class": {
        "label": "Class",
        "unit": "class",
        "scale": "classes",
        "caption": "What a judge says of the examples of the direction's more specific polarity; the number of the "
        "class stands in the cell. Cells without a number were not classified.",
    },
}
METHODS = {"exact": "exact", "screen": "screened"}
JUDGED = "lorascope explain STUDY --explainer judge --judge-model NAME --judge-url URL"


Effects = dict[str, list[Any]]


def direction_map(
    study: Study, corpus: str = "train", effects_of: Callable[[Study, str], Effects | None] = direction_effects
) -> Json:
    """All layer × type maps.

    Args:
        effects_of: gives the effects of a recorded corpus, or None while they are still being measured.

    Returns:
        `{"available", "rank", "layers": [0, 1, ..], "types": ["q", ..], "grids": [grid]}`; a grid is
        `{"key", "label", "unit", "scale", "caption", "available", "values": [types][layers] of number or None,
        "under_floor": the same of bool, "floor", "address": the same of the shown direction, "notes": {address: what
        else its read-out says}, "exact": [addresses that are not screened, where others are]}` or, when
        its stage has not run, `{"key", "label", "available": False, "missing"}`.
    """
    adapter = open_directions(study)
    if adapter is None:
        return missing(study, "the layer × type map", "lorascope train STUDY")
    addresses = adapter.addresses
    layers, types = axes(addresses)
    place = Places(addresses, layers, types)
    per_direction = [
        float(np.linalg.norm(factor_product(a_RI, b_OR)) * scale)
        for module, a_RI, b_OR, scale in adapter.factors()
        for _ in range(module.rank)
    ]
    grids = [place.grid("norm", per_direction)]
    recorded = (store_folder(study.path, corpus, "adapter") / INDEX).is_file()
    effects = effects_of(study, corpus) if recorded else None
    if effects is not None:
        grids += [place.grid("effect", effects["rms"]), relative_grid(study, place, corpus, effects["rms"])]
        grids += [kl_grid(study, place), place.grid("spread", effects["participation"])]
    else:
        command = RECORD.format(corpus)
        grids += [absent(study, "effect", command), absent(study, "relative", command), kl_grid(study, place)]
        grids += [absent(study, "spread", command)]
    about = {"available": True, "rank": adapter.rank, "corpus": corpus}
    return dict(ready(about | {"layers": layers, "types": types, "grids": grids}))


def relative_grid(study: Study, place: "Places", corpus: str, rms_N: Sequence[float]) -> Json:
    """Effects over the rms of the base's own outputs, or what to run."""
    measured = json_file(study, f"scalars/{corpus}/adapter/output_rms.json")
    if not measured or len(measured["rms"]) != len(rms_N):
        return absent(study, "relative", RECORD.format(corpus))
    relative = [effect / own if own > 0 else None for effect, own in zip(rms_N, measured["rms"], strict=True)]
    return place.grid("relative", relative)


def factor_product(a_RI: npt.NDArray[Any], b_OR: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A small matrix [R, R] with the Frobenius norm of b·a, without forming b·a."""
    _, ra = np.linalg.qr(a_RI.T.astype(np.float64))
    _, rb = np.linalg.qr(b_OR.astype(np.float64))
    return np.asarray(rb @ ra.T)


def axes(addresses: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Layers (0 to the last, then `OUTSIDE` if needed) and types in column order."""
    numbers = [n for n in map(direction_layer, addresses) if n is not None]
    layers: list[Any] = list(range(max(numbers) + 1)) if numbers else []
    if len(numbers) < len(addresses):
        layers.append(OUTSIDE)
    types = sorted({direction_type(a) for a in addresses}, key=lambda t: (TYPE_ORDER.get(t, len(TYPE_ORDER)), t))
    return layers, types


class Places:
    """Where each direction stands in a layer × type grid."""

    def __init__(self, addresses: Sequence[str], layers: list[Any], types: list[str]) -> None:
        self.addresses, self.layers, self.types = addresses, layers, types
        columns = [direction_layer(a) for a in addresses]
        self.columns = [layers.index(OUTSIDE if n is None else n) for n in columns]
        self.rows = [types.index(direction_type(a)) for a in addresses]

    def grid(self, key: str, values: Sequence[float | None], under: Sequence[bool] | None = None) -> Json:
        """A grid of the largest (by absolute value) of each cell's directions."""
        cells, names, marks = self.blank(None), self.blank(None), self.blank(False)
        for i, value in enumerate(values):
            row, column = self.rows[i], self.columns[i]
            old = cells[row][column]
            if value is not None and (old is None or abs(value) > abs(old)):
                cells[row][column], names[row][column] = value, self.addresses[i]
                marks[row][column] = bool(under[i]) if under else False
        about = ABOUT.get(key, {})
        return about | {"key": key, "available": True, "values": cells, "address": names, "under_floor": marks}

    def blank(self, fill: Any) -> list[list[Any]]:
        """A grid [types][layers] of one value."""
        return [[fill] * len(self.layers) for _ in self.types]


def kl_grid(study: Study, place: Places) -> Json:
    """The KL map with its floor, or what to run."""
    table, rows = ablation_table(study, "direction"), direction_kl(study)
    if not table["available"]:
        return absent(study, "kl", COMMAND.format("direction"))
    found = [rows.get(address) for address in place.addresses]
    values = [row["kl"]["value"] if row and row["kl"] else None for row in found]
    under = [bool(row and row["under_floor"]) for row in found]
    bounds = {a: [r["kl"]["low"], r["kl"]["high"]] for a, r in rows.items() if r["kl"]}
    about = {"floor": table["floor"], "intervals": bounds}
    if table["method"] == "screen":
        exact = [address for address, row in rows.items() if row["method"] == "exact"]
        how = "screened (to second order, with sampled labels)"
        how += f", exact for the {len(exact)} that were confirmed" if exact else ""
        about["caption"] = ABOUT["kl"]["caption"].replace("exact", how)
        about["exact"] = exact
        about["notes"] = {address: METHODS[row["method"]] for address, row in rows.items()}
    return place.grid("kl", values, under) | about


def absent(study: Study, key: str, command: str) -> Json:
    """A grid whose stage has not run."""
    return {"key": key, "label": ABOUT[key]["label"]} | missing(study, f"the map of {ABOUT[key]['label']}", command)


def signed_map(addresses: Sequence[str], values: Sequence[float]) -> Json:
    """A signed number per direction as a layer × type map: `{"layers", "types", "values", "address"}`."""
    layers, types = axes(addresses)
    grid = Places(addresses, layers, types).grid("", list(values))
    return {"layers": layers, "types": types, "values": grid["values"], "address": grid["address"]}


def score_grid(study: Study, map_: Json, rows: Sequence[Json]) -> Json:
    """A grid of detection scores on the axes of a map: of each direction's better explained polarity.

    Args:
        map_: what `direction_map` gave.
        rows: the feature table's.
    """
    best: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "direction" and row["detection"] is not None:
            best[row["address"]] = max(best.get(row["address"], 0.0), row["detection"])
    if not best:
        return absent(study, "score", "lorascope explain STUDY")
    return Places(list(best), map_["layers"], map_["types"]).grid("score", list(best.values()))


def class_grid(study: Study, map_: Json, rows: Sequence[Json]) -> Json:
    """A grid of the classes that a judge gave, each of the more specific polarity, or what to run without any.

    Its values are the classes, its `notes` name those of both polarities.
    """
    given: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["kind"] == "direction" and row["class"] is not None:
            given.setdefault(row["address"], {})[row["polarity"].replace("-", "−")] = row["class"]
    if not given:
        return absent(study, "class", JUDGED)
    place = Places(list(given), map_["layers"], map_["types"])
    least = len(CLASSES)  # of a cell the largest value is shown, and here the most specific direction is
    grid = place.grid("class", [least - min(classes.values()) for classes in given.values()])
    grid["values"] = [[None if value is None else least - value for value in line] for line in grid["values"]]
    notes = {
        address: "; ".join(f"{sign} {number} {CLASSES[number]}" for sign, number in sorted(classes.items()))
        for address, classes in given.items()
    }
    return grid | {"notes": notes, "names": CLASSES}
