"""Explanations on disk: JSON Lines to which finished rows are appended, one per feature and explainer.

A row's `key` is a hash of all that it was computed from. A cut-off run leaves whole rows (and perhaps half a line,
which is cut away); the next run computes only the missing keys. Rows whose inputs changed go to `superseded.jsonl`, and
so do rows marked `retry`, which had a failure that may be gone by now, and rows whose `truncated_under` is a smaller
limit of a judge's answer than there is now.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from lorascope.explain.places import Places, key_number
from lorascope.study import stream_rows

Row = dict[str, Any]


class RowFile:
    """One explainer's rows in such a file, by key. In memory is only where each starts, 16 bytes a row."""

    def __init__(self, path: Path, at: Places) -> None:
        """Rows start at these bytes of the file, by key."""
        self._path, self._at = path, at

    def __contains__(self, key: str) -> bool:
        return self._at.find(key_number(key)) is not None

    def read(self, key: str) -> Row:
        """The row with a key; any thread may ask. KeyError without one."""
        place = self._at.find(key_number(key))
        if place is None:
            raise KeyError(key)
        with self._path.open("rb") as file:
            file.seek(place)
            row: Row = json.loads(file.readline())
        return row

    def append(self, row: Row) -> None:
        """Append one row under its key; one thread at a time."""
        place = self._path.stat().st_size
        append_row(self._path, row)
        self._at.put(key_number(row["key"]), place)


def append_row(path: Path, row: Row) -> None:
    """Append one row and its line break in a single write."""
    with path.open("ab") as file:
        file.write(row_line(row).encode("utf-8"))


def keep_rows(
    path: Path, wanted: Container[str], explainer: str, said: Row | None = None, most_tokens: int | None = None
) -> RowFile:
    """Make a file ready for appending; returns this explainer's rows with a wanted key.

    Other rows of the explainer are moved to `superseded.jsonl` beside it; rows of other explainers stay.

    Args:
        said: what kept rows say from now on; it is not part of what they were computed from.
        most_tokens: of one answer of a judge; None where nothing is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    at = Places()
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("wb") as file:
            for row in stream_rows(path):
                if row["explainer"] == explainer:
                    if row["key"] not in wanted or row.get("retry") or _cut_short(row, most_tokens):
                        append_row(path.with_name("superseded.jsonl"), {"file": path.name, **row})
                        continue
                    if at.find(key_number(row["key"])) is not None:
                        continue
                    at.put(key_number(row["key"]), file.tell())
                    row |= said or {}
                file.write(row_line(row).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        # An unchanged file keeps its time, by which others tell that it is the same.
        if not path.is_file() or not filecmp.cmp(new, path, shallow=False):
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return RowFile(path, at)


def _cut_short(row: Row, most_tokens: int | None) -> bool:
    """Whether a row has an answer that was cut off and may be longer now."""
    return most_tokens is not None and row.get("truncated_under", most_tokens) < most_tokens


def row_line(row: Row) -> str:
    """A row as one line of JSON, with its line break."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
