"""The rows of Neuronpedia's bulk import, as data: the fields of each of its tables that are written here.

Rows of features, activations and explanations go into the database by the columns of a file's first row, so every
row of a file has the same fields; fields left out take the database's defaults. The other four are made one by one
and may hold no field that the database does not know.
"""

from typing import Any

TEXT, NUMBER, WHOLE, FLAG = "text", "number", "whole", "flag"
TEXTS, NUMBERS = "texts", "numbers"
OPTIONAL = "?"
"""After a type: the value may be null."""

TABLES: dict[str, dict[str, str]] = {
    "release": {
        "name": TEXT,
        "description": TEXT,
        "descriptionShort": TEXT,
        "creatorName": TEXT,
        "creatorId": TEXT,
        "visibility": TEXT,
        "defaultSourceSetName": TEXT,
        "defaultSourceId": TEXT,
    },
    "model": {
        "id": TEXT,
        "displayName": TEXT,
        "displayNameShort": TEXT,
        "creatorId": TEXT,
        "owner": TEXT,
        "instruct": FLAG,
        "layers": WHOLE,
        "neuronsPerLayer": WHOLE,
        "visibility": TEXT,
    },
    "sourceset": {
        "modelId": TEXT,
        "name": TEXT,
        "description": TEXT,
        "type": TEXT,
        "creatorName": TEXT,
        "creatorId": TEXT,
        "releaseName": TEXT,
        "visibility": TEXT,
        "allowInferenceSearch": FLAG,
    },
    "source": {
        "id": TEXT,
        "modelId": TEXT,
        "setName": TEXT,
        "creatorId": TEXT,
        "visibility": TEXT,
        "hasDashboards": FLAG,
        "inferenceEnabled": FLAG,
        "dataset": TEXT,
        "num_prompts": WHOLE,
        "notes": TEXT,
    },
    "features": {
        "modelId": TEXT,
        "layer": TEXT,
        "index": TEXT,
        "sourceSetName": TEXT,
        "creatorId": TEXT,
        "vectorLabel": TEXT,
        "hookName": TEXT + OPTIONAL,
        "maxActApprox": NUMBER,
        "frac_nonzero": NUMBER,
        "pos_str": TEXTS,
        "pos_values": NUMBERS,
        "neg_str": TEXTS,
        "neg_values": NUMBERS,
        "freq_hist_data_bar_heights": NUMBERS,
        "freq_hist_data_bar_values": NUMBERS,
        "logits_hist_data_bar_heights": NUMBERS,
        "logits_hist_data_bar_values": NUMBERS,
    },
    "activations": {
        "id": TEXT,
        "modelId": TEXT,
        "layer": TEXT,
        "index": TEXT,
        "creatorId": TEXT,
        "tokens": TEXTS,
        "values": NUMBERS,
        "maxValue": NUMBER,
        "maxValueTokenIndex": WHOLE,
        "minValue": NUMBER,
        "qualifyingTokenIndex": WHOLE,
        "binMin": NUMBER,
        "binMax": NUMBER,
        "binContains": NUMBER,
        "dataIndex": TEXT,
        "dataSource": TEXT,
    },
    "explanations": {
        "id": TEXT,
        "modelId": TEXT,
        "layer": TEXT,
        "index": TEXT,
        "authorId": TEXT,
        "description": TEXT,
        "typeName": TEXT + OPTIONAL,
        "explanationModelName": TEXT + OPTIONAL,
        "notes": TEXT,
    },
}


def row_faults(table: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of a table: fields missing, unknown, or not of their type."""
    fields = TABLES[table]
    faults = [f"{name} is missing" for name in fields if name not in row]
    faults += [f"{name} is no field" for name in row if name not in fields]
    return faults + [
        f"{name} is no {kind}" for name, kind in fields.items() if name in row and not fits(row[name], kind)
    ]


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of a type."""
    if kind.endswith(OPTIONAL):
        return value is None or fits(value, kind.removesuffix(OPTIONAL))
    if kind in (TEXTS, NUMBERS):
        return isinstance(value, list) and all(fits(item, TEXT if kind == TEXTS else NUMBER) for item in value)
    types: dict[str, type | tuple[type, ...]] = {TEXT: str, WHOLE: int, NUMBER: (int, float), FLAG: bool}
    return isinstance(value, types[kind]) and (kind == FLAG or not isinstance(value, bool))
