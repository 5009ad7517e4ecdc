"""Rows of JSON, JSON Lines and Parquet files (gzip or not) and of datasets on the hub, with their places."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorascope.errors import BadInput

Stream = gzip.GzipFile | io.BufferedIOBase
PlacedRow = tuple[str, int, Any]


def read_rows(source: str | Path) -> Iterator[PlacedRow]:
    """Yield (place for messages, row number from 0, row) for each row of a file or hub dataset."""
    if str(source).startswith("hub:"):
        yield from _hub_rows(str(source))
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise BadInput(f"There is no file {path}: give a JSON, JSON Lines or Parquet file, or hub:owner/name[:split].")
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
            yield from _file_rows(path, stream, zipped)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path} is damaged ({error}): get it again.") from error


def _file_rows(path: Path, stream: Stream, zipped: bool) -> Iterator[PlacedRow]:
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if ".parquet" in suffixes:
        yield from _parquet_rows(path, io.BytesIO(stream.read()) if zipped else stream)
    elif ".json" in suffixes:
        yield from _json_rows(path, stream)
    else:
        yield from _json_lines(path, stream)


def _json_lines(path: Path, stream: Stream) -> Iterator[PlacedRow]:
    number = 0
    for line_number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path} line {line_number}"
        try:
            row: Any = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise BadInput(f"{where}: not UTF-8 text.") from error
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not valid JSON ({error.msg}, column {error.colno}).") from error
        yield where, number, row
        number += 1


def _json_rows(path: Path, stream: Stream) -> Iterator[PlacedRow]:
    data = stream.read()
    try:
        document: Any = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the name of .json
            yield from _json_lines(path, io.BytesIO(data))
            return
        raise BadInput(f"{path} line {error.lineno}: not valid JSON ({error.msg}).") from error
    if isinstance(document, dict):
        # Either one row, or the rows under a single name such as "data".
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(document) == 1 and lists and "messages" not in document else [document]
    if not isinstance(document, list):
        raise BadInput(f"{path}: expected a list of objects; give one object per trace.")
    for number, row in enumerate(document):
        yield f"{path} item {number + 1}", number, row


def _parquet_rows(path: Path, stream: Stream) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path} row {number + 1}", number, row
                number += 1
    except pa.ArrowInvalid as error:
        raise BadInput(f"{path} is not a Parquet file: {error}.") from error


def _hub_rows(source: str) -> Iterator[PlacedRow]:
    name, _, split = source.removeprefix("hub:").partition(":")
    split = split or "train"
    try:
        import datasets
    except ImportError as error:
        raise BadInput("Reading hub datasets needs the datasets package: pip install datasets.") from error
    try:
        rows: Any = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield f"{source} row {number + 1}", number, row
    except BadInput:
        raise
    except Exception as error:  # the hub client raises many kinds; each means the data set cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"Could not read the hub dataset {name} split {split}: {reason}") from error
