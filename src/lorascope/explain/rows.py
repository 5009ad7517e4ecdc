"""Explanations on disk: JSON Lines to which finished rows are appended, one per feature and explainer.

A row's `key` is a hash of all that it was computed from. A cut-off run leaves whole rows (and perhaps half a line,
which is cut away); the next run computes only the missing keys. Rows whose inputs changed go to `superseded.jsonl`, and
so do rows marked `retry`, which had a failure that may be gone by now, and rows whose `truncated_under` is a smaller
limit of a judge's answer than there is now.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorascope.study import atomic_write_text, read_rows

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Append one row and its line break in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row_line(row))


def keep_rows(
    path: Path, wanted: Collection[str], explainer: str, said: Row | None = None, most_tokens: int | None = None
) -> dict[str, Row]:
    """Make a file ready for appending; returns this explainer's rows with a wanted key, by key.

    Other rows of the explainer are moved to `superseded.jsonl` beside it; rows of other explainers stay.

    Args:
        said: what kept rows say from now on; it is not part of what they were computed from.
        most_tokens: of one answer of a judge; None where nothing is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Row] = {}
    kept: list[Row] = []
    for row in read_rows(path):
        if row["explainer"] != explainer:
            kept.append(row)
        elif row["key"] not in wanted or row.get("retry") or _cut_short(row, most_tokens):
            append_row(path.with_name("superseded.jsonl"), {"file": path.name, **row})
        elif row["key"] not in done:
            done[row["key"]] = row | (said or {})
            kept.append(done[row["key"]])
    text = "".join(row_line(row) for row in kept)
    if not path.is_file() or text != path.read_text(encoding="utf-8"):
        atomic_write_text(path, text)
    return done


def _cut_short(row: Row, most_tokens: int | None) -> bool:
    """Whether a row has an answer that was cut off and may be longer now."""
    return most_tokens is not None and row.get("truncated_under", most_tokens) < most_tokens


def row_line(row: Row) -> str:
    """A row as one line of JSON, with its line break."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
