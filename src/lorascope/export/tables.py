"""CSV tables: one per kind of feature, one per way of ablation."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorascope.errors import MissingStage
from lorascope.export.gaps import missing_features
from lorascope.export.settings import ExportConfig
from lorascope.export.windows import top_tokens
from lorascope.features import FeatureSet, load_features
from lorascope.study import Study
from lorascope.token_text import vocabulary_texts
from lorascope.views import feature_table
from lorascope.views.ablation_tables import WAYS, ablation_table
from lorascope.views.one_feature import tokenizer_of
from lorascope.views.reading import feature_rows

Json = dict[str, Any]
NESTED = ("kl", "ce_change")
"""Numbers of an ablation with an interval: three columns each."""


def write_tables(study: Study, config: ExportConfig, folder: Path) -> Json:
    """`features-KIND.csv` for each kind with examples on the corpus, `ablation-WAY.csv` for each way measured.

    Raises:
        MissingStage: there is neither.
    """
    left_out: list[Json] = []
    kinds = write_features(study, config, folder, left_out)
    ways: dict[str, int] = {}
    for way in WAYS:
        table = ablation_table(study, way)
        if table["available"]:
            ways[way] = write_rows(folder / f"ablation-{way}.csv", ablation_rows(table))
        else:
            left_out.append(table["missing"])
    if not kinds and not ways:
        raise MissingStage(f"There is nothing to put into tables yet; run first: {left_out[0]['run']}.")
    return {"corpus": config.corpus, "features": kinds, "ablation": ways, "left_out": left_out}


def write_features(study: Study, config: ExportConfig, folder: Path, left_out: list[Json]) -> dict[str, int]:
    """The tables of features; number of rows by kind."""
    table = feature_table(study, config.corpus)
    if not table["available"]:
        left_out.append(table["missing"])
        return {}
    kinds = [kind for kind, count in table["kinds"].items() if count]
    left_out += missing_features(study, config.corpus, kinds)
    names = vocabulary_texts(tokenizer_of(study))
    written: dict[str, int] = {}
    for kind in kinds:
        features = load_features(study, config.corpus, kind)
        rows = [row for row in table["rows"] if row["kind"] == kind]
        for row in rows:
            row["top_tokens"] = commonest(study, features, config, names, row["id"])
        written[kind] = write_rows(folder / f"features-{kind}.csv", rows)
    return written


def commonest(study: Study, features: FeatureSet, config: ExportConfig, names: Sequence[str], feature: str) -> str:
    """The commonest tokens among a feature's strongest examples, each in quotes."""
    rows = feature_rows(study, f"examples/{config.corpus}/{features.kind}-examples.parquet", feature) or []
    strongest = [row for row in rows if row["where"] == "top" and row["rank"] < config.examples]
    return " ".join(top_tokens(features, names, strongest))


def ablation_rows(table: Json) -> list[Json]:
    """A row per target and segment (`all` first), with the method and the noise floor in each."""
    rows = []
    for target in table["rows"]:
        for segment, numbers in [("all", target), *target["segments"].items()]:
            row = {"target": target["target"], "segment": segment, "method": table["method"]}
            for name in NESTED:
                interval = numbers[name] or {"value": None, "low": None, "high": None}
                row |= {name: interval["value"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
            row |= {"tokens": numbers["tokens"], "under_floor": numbers["under_floor"], "floor": table["floor"]}
            rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Json]) -> int:
    """Write rows of like fields; what is not known is an empty cell. Returns how many."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)
