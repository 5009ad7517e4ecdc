"""What every view needs: files of a study read gently, and numbers that are ready for JSON.

A view never fails because a stage has not run: it carries `"available": False` and a `"missing"` entry
`{"what", "run", "own"}` that names the command. What was found of features that the study no longer has is read as
missing: another autoencoder has latents of the same names. Numbers that are not finite become None.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lorascope.errors import RunFailed
from lorascope.explained import current_rows, made_from
from lorascope.study import Study, read_json
from lorascope.views.kept import kept_once, kept_view, of_other_features, stamp
from lorascope.views.unfinished import first_needed

Json = dict[str, Any]
PLAIN = frozenset((str, int, bool, type(None)))
"""Types whose values JSON holds as they are."""
CODED = ("feature", "where")
"""Columns of tables that say the same few texts in many rows."""
FEATURE_FIRST = re.compile(rb'\{"feature": ?("(?:[^"\\]|\\.)*")')
"""The beginning of a line that is about a feature."""


def ready(value: Any) -> Any:
    """A copy that JSON can hold: NumPy values as Python's, paths as text, NaN and infinities as None."""
    kind = type(value)
    if kind in PLAIN:  # nearly all of a page
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return ready(value.tolist())
    if isinstance(value, np.generic):
        return ready(value.item())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def missing(study: Study, what: str, command: str) -> Json:
    """A view of something that has not been made: what it would show, and what to run.

    `run` is the command that makes it or, where that would only fail, the first stage that it needs; `own` is then the
    command that makes it, else None.
    """
    run, own = (text.replace("STUDY", str(study.path)) for text in (first_needed(study, command), command))
    return {"available": False, "missing": {"what": what, "run": run, "own": None if own == run else own}}


def path_of(study: Study, relative: str) -> Path | None:
    """A file of the study; None when it does not exist, or says something of features that the study no longer has."""
    path = study.path / relative
    return path if path.is_file() and relative not in kept_view(study, of_other_features) else None


def json_file(study: Study, relative: str) -> Any:
    """A JSON file of the study, or None when there is none."""
    path = path_of(study, relative)
    return read_json(path) if path else None


def known_levels(study: Study, kind: str) -> dict[str, float]:
    """Firing levels by feature of a kind; empty before its examples were searched for."""
    return dict((json_file(study, "examples/levels.json") or {}).get(kind, {}))


def missing_levels(study: Study, corpus: str, kind: str) -> Json:
    """What to run where features of a kind have no firing level yet: `{"what", "run"}`."""
    command = f"lorascope examples STUDY --corpus {corpus} --kinds {kind}"
    said: Json = missing(study, f"the level above which a {kind} fires", command)["missing"]
    return said


def json_lines(study: Study, relative: str) -> tuple[Json, ...]:
    """Rows of a JSON Lines file, none when there is none; a last line cut off by an interruption is left out.

    Rows are shared between callers: do not change them.

    Raises:
        RunFailed: a line before the last is not JSON.
    """
    path = path_of(study, relative)
    return parsed_lines(path, *stamp(path)) if path else ()


def explanations(study: Study, kind: str) -> tuple[Json, ...]:
    """Rows of `explanations/KIND.jsonl`, without those of another adapter's or autoencoder's features.

    Rows are shared between callers: do not change them.
    """
    rows: tuple[Json, ...] = kept_view(study, current_explanations, kind)
    return rows


def current_explanations(study: Study, kind: str) -> tuple[Json, ...]:
    """`explanations` of one state of the study."""
    rows = json_lines(study, f"explanations/{kind}.jsonl")
    return tuple(current_rows(study, kind, rows, kept_making))


def explanations_of(study: Study, kind: str, feature: str) -> tuple[Json, ...]:
    """The rows of `explanations` that are of one feature."""
    rows = feature_lines(study, f"explanations/{kind}.jsonl", feature)
    return tuple(current_rows(study, kind, rows, kept_making))


def kept_making(study: Study, corpus: str, kind: str) -> str:
    """`made_from`, computed once per state of the study."""
    return str(kept_view(study, made_from, corpus, kind))


def feature_lines(study: Study, relative: str, feature: str) -> list[Json]:
    """Rows of one feature (key `feature`) of a JSON Lines file, none when there is none; no other line is parsed."""
    path = path_of(study, relative)
    if not path:
        return []
    rows: list[Json] = []
    with path.open("rb") as file:
        for start, length in line_places(path, *stamp(path)).get(feature, ()):
            file.seek(start)
            try:
                rows.append(json.loads(file.read(length)))
            except ValueError as error:
                raise RunFailed(f"A line of {path} is damaged ({error}); remove it or restore the file.") from error
    return rows


def warm_rows(study: Study, relative: str) -> None:
    """Read what finding the rows of a feature in a file needs, if there is such a file."""
    if path := path_of(study, relative):
        (grouped_table if path.suffix == ".parquet" else line_places)(path, *stamp(path))


@kept_once(maxsize=32)
def line_places(path: Path, size: int, modified: int) -> dict[str, list[tuple[int, int]]]:
    """Where the lines of each feature are, as (start, length), in one state of a JSON Lines file.

    A line that does not begin with its feature, as ours do, is parsed for it; one that was cut off is left out.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for line in path.read_bytes().splitlines(keepends=True):
        found = FEATURE_FIRST.match(line) if line.endswith(b"\n") else None
        with contextlib.suppress(ValueError):
            name = feature_name(found[1]) if found else json.loads(line).get("feature")
            places.setdefault(name, []).append((start, len(line)))
        start += len(line)
    return places


@kept_once(maxsize=32)
def parsed_lines(path: Path, size: int, modified: int) -> tuple[Json, ...]:
    """`json_lines` of one state of a file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Json] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunFailed(f"Line {number} of {path} is damaged ({error}); remove it or restore the file.") from error
    return tuple(rows)


def table_rows(study: Study, relative: str, columns: tuple[str, ...] | None = None) -> list[Json] | None:
    """Rows of a Parquet file as dicts (of some columns), or None when there is none.

    Raises:
        RunFailed: the file is damaged.
    """
    path = path_of(study, relative)
    if not path:
        return None
    table = read_table(path, *stamp(path))
    rows: list[Json] = (table.select(list(columns)) if columns else table).to_pylist()
    return rows


def feature_rows(study: Study, relative: str, feature: str) -> list[Json] | None:
    """The rows of one feature (column `feature`), in file order; None when there is no such file."""
    path = path_of(study, relative)
    if not path:
        return None
    table, places = grouped_table(path, *stamp(path))
    rows: list[Json] = table.slice(*places.get(feature, (0, 0))).to_pylist()
    return rows


def feature_name(quoted: bytes) -> str:
    """A text as JSON writes it; few names need JSON's reader, which takes ten times as long."""
    return str(json.loads(quoted)) if b"\\" in quoted else quoted[1:-1].decode()


@kept_once(maxsize=16)
def read_table(path: Path, size: int, modified: int) -> pa.Table:
    """One state of a Parquet file; its columns of `CODED` texts stay numbered.

    `pq.read_table`, Arrow's own conversions from and to NumPy and its functions on columns would load pandas, where
    that is installed, and modules that take longer than all else here.
    """
    try:
        names = pq.read_schema(path).names
        with pq.ParquetFile(path, read_dictionary=[name for name in CODED if name in names]) as file:
            return file.read(use_threads=False)  # more of them take longer, for a table that one reads in 30 ms
    except (OSError, pa.ArrowException) as error:
        raise RunFailed(f"{path} is damaged ({error}); remove it and run its stage again.") from error


@kept_once(maxsize=16)
def grouped_table(path: Path, size: int, modified: int) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
    """One state of a Parquet file with the rows of a feature together, and (first row, number of rows) of each."""
    table = read_table(path, size, modified)
    codes, names = coded(table, "feature")
    if np.any(codes[1:] < codes[:-1]):
        order = np.argsort(codes, kind="stable")
        table, codes = table.take(pa.array(order)), codes[order]
    counts = np.bincount(codes, minlength=len(names))
    firsts = np.cumsum(counts) - counts
    return table, dict(zip(names, zip(firsts.tolist(), counts.tolist(), strict=True), strict=True))


def coded(table: pa.Table, column: str) -> tuple[npt.NDArray[Any], list[Any]]:
    """A column of `CODED` as the number of each row's text, and the texts."""
    found = table[column].unify_dictionaries().combine_chunks()
    return np.from_dlpack(found.indices), found.dictionary.to_pylist()


def plain(table: pa.Table, column: str) -> npt.NDArray[Any]:
    """A column of numbers, none of them missing."""
    return np.from_dlpack(table[column].combine_chunks())


def interval(row: Mapping[str, Any], value: str = "value") -> Json | None:
    """`{"value", "low", "high"}` from a row whose value may have another name; None without a value."""
    number = ready(row.get(value))
    if number is None:
        return None
    return {"value": number, "low": ready(row.get("low")), "high": ready(row.get("high"))}


def stage_records(study: Study, stage: str) -> dict[str, Json]:
    """Records of a stage in all its variants (`record`, `record:heldout:base`), by full name."""
    stages: dict[str, Json] = study.manifest["stages"]
    return {name: record for name, record in stages.items() if name.split(":")[0] == stage}
