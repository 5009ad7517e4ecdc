"""What optional stages found of a feature: its lens and its categories. Empty when a stage has not run."""

from typing import Any

from lorascope.study import Study
from lorascope.views.reading import Json, feature_rows, json_lines, ready


def lens_rows(study: Study, names: list[str]) -> list[Json]:
    """The rows of `lens/lens.parquet` for some features or addresses, in the file's order."""
    rows: list[Json] = []
    for name in names:
        rows += feature_rows(study, "lens/lens.parquet", name) or []
    return [dict(ready(row)) for row in rows]


def category_rows(study: Study, kind: str, feature: str) -> list[dict[str, Any]]:
    """The rows of `categories/KIND.jsonl` for a feature."""
    return [row for row in json_lines(study, f"categories/{kind}.jsonl") if row.get("feature") == feature]
