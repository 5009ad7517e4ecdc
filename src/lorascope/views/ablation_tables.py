"""Ablation: what switching directions off does, or setting them to their mean; by direction, layer, type and group."""

from typing import Any

from lorascope.study import Study
from lorascope.views.kept import kept_view
from lorascope.views.reading import Json, interval, json_file, missing, ready, table_rows

WAYS = ("direction", "layer", "type", "group")
COMMAND = "lorascope ablate STUDY --by {}"


def ablation_view(study: Study) -> Json:
    """All ablation tables of a study.

    Returns:
        `{"available", "floor": number or None, "floor_runs": {name: kl}, "screened": [way], "by": {way: table}, "mean":
        {way: table}}` for each way of `WAYS`, where a table is that of `ablation_table`, the floor is the largest among
        them, and `screened` names the ways that were not measured exactly. `mean` has the tables of scalars set to
        their mean (`--to mean`), only those that there are, also where nothing was switched off.
    """
    means = {way: table for way in WAYS if (table := ablation_table(study, way, "mean"))["available"]}
    tables = {way: ablation_table(study, way) for way in WAYS}
    shown = [table for table in tables.values() if table["available"]]
    if not shown:
        return missing(study, "ablation tables", COMMAND.format("direction")) | {"by": tables, "mean": means}
    highest = max(shown, key=lambda table: table["floor"] or 0.0)
    about = {"floor": highest["floor"], "floor_runs": highest["floor_runs"]}
    screened = [way for way, table in tables.items() if table["available"] and table["method"] == "screen"]
    return {"available": True, "screened": screened, "by": tables, "mean": means} | about


def ablation_table(study: Study, way: str, to: str = "zero") -> Json:
    """One table, strongest first; what lies under its noise floor comes last, in the order of the adapter.

    Shared between callers: do not change it. The exact table where there is one, else the screened one (which has
    neither segments nor cross-entropy) with the leaders that were confirmed exactly. To the mean nothing is screened:
    else the screened leaders alone (`--top`).

    Args:
        to: what scalars were set to, zero or mean.

    Returns:
        `{"available", "method": "exact" or "screen", "floor", "floor_runs", "rows": [{"target", "method", "tokens",
        "kl": {"value", "low", "high"}, "ce_change": {..} or None, "under_floor",
        "segments": {"think": {"kl", "ce_change", "tokens", "under_floor"}, ..}}]}`. KL is
        KL(adapted ‖ edited) in nats per predicted assistant token, cross-entropy change in the same unit. A row's
        method is its own: the confirmed rows of a screened table are exact.
    """
    table: Json = kept_view(study, read_ablation, way, to)
    return table


def read_ablation(study: Study, way: str, to: str) -> Json:
    """`ablation_table` of one state of the study."""
    folder, name = ("ablation/mean" if to == "mean" else "ablation"), f"exact-{way}"
    rows, method, confirmed = table_rows(study, f"{folder}/{name}.parquet"), "exact", set[Any]()
    if rows is None and to == "mean":
        name = f"confirmed-{way}"
        rows = table_rows(study, f"{folder}/{name}.parquet")
    elif rows is None:
        rows, method = table_rows(study, f"ablation/screen-{way}.parquet"), "screen"
        checked = table_rows(study, f"ablation/confirmed-{way}.parquet") or []
        confirmed = {row["target"] for row in checked}
        rows = None if rows is None else [row for row in rows if row["target"] not in confirmed] + checked
    if rows is None:
        return missing(study, f"ablation by {way}", COMMAND.format(way) + (" --to mean" if to == "mean" else ""))
    by_target: dict[str, dict[str, Json]] = {}
    for row in rows:
        by_target.setdefault(str(row["target"]), {})[str(row["segment"])] = numbers(row)
    shown = [
        {"target": target, "method": "exact" if target in confirmed else method}
        | (parts.get("all") or {})
        | {"segments": {k: v for k, v in parts.items() if k != "all"}}
        for target, parts in by_target.items()
        if parts.get("all")
    ]
    shown.sort(key=strength)
    about = json_file(study, f"{folder}/floor-{name}.json" if method == "exact" else "ablation/screen.json") or {}
    floor = {"floor": ready(about.get("kl")), "floor_runs": ready(about.get("runs") or {})}
    return {"available": True, "method": method, "rows": shown} | floor


def numbers(row: Json) -> Json:
    """The measured numbers of one row."""
    change = {"value": row.get("ce_change"), "low": row.get("ce_low"), "high": row.get("ce_high")}
    return {
        "kl": interval(row, "kl"),
        "ce_change": interval(change),
        "tokens": ready(row.get("tokens")),
        "under_floor": bool(row.get("under_floor")),
    }


def strength(row: Json) -> tuple[bool, float]:
    """Sort key: by falling KL, rows under the floor (which are not ranked) after all others."""
    under = row["under_floor"] or row["kl"] is None
    return (under, 0.0 if under else -row["kl"]["value"])


def direction_kl(study: Study) -> dict[str, Any]:
    """KL rows by direction's address, empty when directions were not ablated. Shared between callers: do not change
    them."""
    rows: dict[str, Any] = kept_view(study, direction_rows)
    return rows


def direction_rows(study: Study) -> dict[str, Any]:
    """`direction_kl` of one state of the study."""
    table = ablation_table(study, "direction")
    return {row["target"]: row for row in table["rows"]} if table["available"] else {}
