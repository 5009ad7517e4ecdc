"""Neuronpedia's rows against its database's own schema, written down apart from what the export is made with."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorascope.config import Options
from lorascope.export import ExportConfig, export_study
from report_study import make_report_study

THEIRS: dict[str, Any] = json.loads(Path(__file__).with_name("neuronpedia_import.json").read_text(encoding="utf-8"))
INT32 = 2**31
MODEL_ID = re.compile(r"[a-zA-Z0-9-_]{1,128}")


def fits(value: Any, kind: str) -> bool:
    """Whether the database takes a value in a column of a kind such as `Float ?` or `String []`."""
    name, *marks = kind.split()
    if value is None:
        return "?" in marks
    if "[]" in marks:
        return isinstance(value, list) and all(item is not None and fits(item, name) for item in value)
    if name in THEIRS["enums"]:
        return value in THEIRS["enums"][name]
    if name == "Int":
        return type(value) is int and -INT32 <= value < INT32
    if name == "Float":
        return type(value) in (int, float) and abs(value) < float("inf")
    return {"String": str, "Boolean": bool}[name] is type(value) and "\0" not in str(value)


def faults(table: str, row: dict[str, Any]) -> list[str]:
    """What the import would refuse or lose of a row."""
    columns = THEIRS["tables"][table]
    needed = [name for name, kind in columns.items() if not set("?=") & set(kind.split())]
    missing = [f"{name} is missing" for name in needed if name not in row]
    unknown = [f"{name} is no column" for name in row if name not in columns]
    return (
        missing
        + unknown
        + [f"{n}: {v!r} is no {columns[n]}" for n, v in row.items() if n in columns and not fits(v, columns[n])]
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every row of every file of an export, by the name of its file or folder."""
    study = make_report_study(tmp_path_factory.mktemp("export") / "study")
    folder = Path(export_study(study, ExportConfig("neuronpedia"), Options())["folder"])
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*/**/*.jsonl*")):
        batch = path.name.endswith(".gz")
        text = gzip.decompress(path.read_bytes()).decode() if batch else path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        found.setdefault(path.parent.name if batch else path.stem, []).extend(lines)
    return found


def test_the_check_finds_what_is_wrong() -> None:
    right = {"id": "0-a", "modelId": "m", "setName": "a", "creatorId": "c"}
    assert faults("source", right) == []
    assert faults("source", {**right, "notes": None, "num_prompts": 3, "visibility": "PUBLIC"}) == []
    del right["setName"]
    wrong = {**right, "id": None, "num_prompts": 2.5, "visibility": "open", "layer": 1, "hasDashboards": 1}
    assert faults("source", wrong) == [
        "setName is missing",
        "layer is no column",
        "id: None is no String",
        "num_prompts: 2.5 is no Int ?",
        "visibility: 'open' is no Visibility =",
        "hasDashboards: 1 is no Boolean =",
    ]
    assert not fits([None], "Float [] =")
    assert not fits([True], "Float []")
    assert not fits("a\0", "String")
    assert not fits(2**31, "Int")


def test_every_row_of_every_table_is_one_that_the_import_takes(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert set(rows) == set(THEIRS["tables"])
    for table, found in rows.items():
        assert found, table
        assert [fault for row in found for fault in faults(table, row)] == [], table


def test_rows_name_what_the_database_has_by_then(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The relations of the schema: sets name releases, sources sets, features sources, the rest features."""
    models = {row["id"] for row in rows["model"]}
    assert all(MODEL_ID.fullmatch(name) for name in models)
    sets = {(row["modelId"], row["name"]) for row in rows["sourceset"]}
    sources = {(row["modelId"], row["id"]) for row in rows["source"]}
    features = {(row["modelId"], row["layer"], row["index"]) for row in rows["features"]}
    assert {row["releaseName"] for row in rows["sourceset"]} <= {row["name"] for row in rows["release"]}
    assert {row["modelId"] for row in rows["sourceset"]} <= models
    assert {(row["modelId"], row["setName"]) for row in rows["source"]} <= sets
    assert {(row["modelId"], row["layer"]) for row in rows["features"]} <= sources
    assert {(row["modelId"], row["sourceSetName"]) for row in rows["features"]} <= sets
    for table in ("activations", "explanations"):
        assert {(row["modelId"], row["layer"], row["index"]) for row in rows[table]} <= features
    for row in rows["release"]:
        assert row["defaultSourceSetName"] in {name for _, name in sets}
        assert row["defaultSourceId"] in {name for _, name in sources}
    for row in rows["activations"]:
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert 0 <= row["qualifyingTokenIndex"] < len(row["tokens"])
    for row in rows["features"]:
        for ends in ("pos", "neg"):
            assert len(row[f"{ends}_str"]) == len(row[f"{ends}_values"])
        for hist in ("freq", "logits"):
            heights, middles = (row[f"{hist}_hist_data_bar_{name}"] for name in ("heights", "values"))
            assert len(heights) == len(middles)
