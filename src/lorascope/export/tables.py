"""CSV tables: features and their explanations by kind, and one table per way of ablation."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorascope.errors import MissingStage
from lorascope.export.gaps import missing_features
from lorascope.export.settings import ExportConfig
from lorascope.export.windows import top_tokens
from lorascope.features import CONTROLS, FeatureSet, load_features
from lorascope.study import Study
from lorascope.token_text import vocabulary_texts
from lorascope.views import feature_table
from lorascope.views.ablation_tables import WAYS, ablation_table
from lorascope.views.one_feature import vocabulary_of
from lorascope.views.reading import explanations, feature_rows, json_lines, missing, path_of, ready, table_rows

Json = dict[str, Any]
NESTED = ("kl", "ce_change")
"""Numbers of an ablation with an interval: three columns each."""
FURTHER = ("category", "subcategory", "category_by", "reasoning_score", "reasoning_q", "reasoning_corpus")
"""What a feature's row says beside the view of features."""
SCORES = tuple(f"{task}{control}" for task in ("detection", "fuzzing") for control in ("", "_wrong", "_shuffled"))
AUROC_ENDS = {"": "value", "_low": "low", "_high": "high"}
HELDOUT = "heldout"


def write_tables(study: Study, config: ExportConfig, folder: Path) -> Json:
    """`features-KIND.csv` and `explanations-KIND.csv` by kind with examples on the corpus, `ablation-WAY.csv` by way,
    and `ablation-mean-WAY.csv` of scalars set to their mean, where that was measured.

    Raises:
        MissingStage: there is neither.
    """
    left_out: list[Json] = []
    kinds = write_features(study, config, folder, left_out)
    explained = {kind: write_explanations(study, kind, folder) for kind in kinds}
    ways: dict[str, int] = {}
    for way in WAYS:
        table = ablation_table(study, way)
        if table["available"]:
            ways[way] = write_rows(folder / f"ablation-{way}.csv", ablation_rows(table))
        else:
            left_out.append(table["missing"])
    for way in WAYS:
        if (table := ablation_table(study, way, "mean"))["available"]:
            ways[f"mean-{way}"] = write_rows(folder / f"ablation-mean-{way}.csv", ablation_rows(table))
    if not kinds and not ways:
        raise MissingStage(f"There is nothing to put into tables yet; run first: {left_out[0]['run']}.")
    counts = {"features": kinds, "explanations": explained, "ablation": ways}
    return {"corpus": config.corpus} | counts | {"left_out": left_out}


def write_features(study: Study, config: ExportConfig, folder: Path, left_out: list[Json]) -> dict[str, int]:
    """The tables of features; number of rows by kind."""
    table = feature_table(study, config.corpus)
    if not table["available"]:
        left_out.append(table["missing"])
        return {}
    kinds = [kind for kind, count in table["kinds"].items() if count]
    left_out += missing_features(study, config.corpus, kinds)
    names = vocabulary_texts(vocabulary_of(study))
    written: dict[str, int] = {}
    for kind in kinds:
        features = load_features(study, config.corpus, kind)
        rows = [row for row in table["rows"] if row["kind"] == kind]
        further = further_columns(study, config.corpus, kind, left_out)
        rows = [row | {"top_tokens": commonest(study, features, config, names, row["id"])} for row in rows]
        rows = [row | further.get(row["id"], dict.fromkeys(FURTHER)) for row in rows]
        written[kind] = write_rows(folder / f"features-{kind}.csv", rows)
    return written


def further_columns(study: Study, corpus: str, kind: str, left_out: list[Json]) -> dict[str, Json]:
    """Category and reasoning score of each feature that has either, by id; what was not made is noted.

    Reasoning scores are those of the corpus or, where there are none, of the held-out one; the column says which.
    """
    found: dict[str, Json] = {}
    for row in json_lines(study, f"categories/{kind}.jsonl"):
        own = {"category": row["category"] or row["outcome"], "subcategory": row["subcategory"]}
        found[row["feature"]] = dict.fromkeys(FURTHER) | own | {"category_by": row["by"]}
    if not found and kind not in CONTROLS:
        left_out.append(
            missing(study, f"categories of {kind}s", f"lorascope categorize STUDY --kinds {kind}")["missing"]
        )
    scored_on = [
        name for name in dict.fromkeys((corpus, HELDOUT)) if path_of(study, f"reasoning/{name}/{kind}.parquet")
    ]
    for name in scored_on[:1]:
        for row in table_rows(study, f"reasoning/{name}/{kind}.parquet", ("feature", "score", "q")) or []:
            own = ready({"reasoning_score": row["score"], "reasoning_q": row["q"], "reasoning_corpus": name})
            found[row["feature"]] = found.get(row["feature"], dict.fromkeys(FURTHER)) | own
    if not scored_on and kind not in CONTROLS:
        command = f"lorascope reasoning STUDY --corpus {corpus} --kinds {kind}"
        left_out.append(missing(study, f"reasoning scores of {kind}s", command)["missing"])
    return found


def write_explanations(study: Study, kind: str, folder: Path) -> int:
    """Every explainer's rows about a kind with their scores; no file where nothing is explained. Returns how many."""
    rows = [explanation_row(row) for row in explanations(study, kind)]
    return write_rows(folder / f"explanations-{kind}.csv", rows) if rows else 0


def explanation_row(row: Json) -> Json:
    """One explanation with its class and, for each score, value, interval and AUROC; None for what it has not."""
    scored, given = row["scored"] or {}, row.get("class") or {}
    flat = {name: row[name] for name in ("feature", "explainer", "corpus", "text", "reason")}
    flat |= {"class": given.get("class"), "class_reason": given.get("reason"), "class_failure": given.get("failure")}
    for score in SCORES:
        part = scored.get(score) or {}
        flat |= {score: part.get("value"), f"{score}_low": part.get("low"), f"{score}_high": part.get("high")}
        flat |= {f"{score}_{count}": part.get(count) for count in ("n", "unparsed")}
        ranks = part.get("auroc") or {}
        flat |= {f"{score}_auroc{end}": ranks.get(name) for end, name in AUROC_ENDS.items()}
    return flat | {"wrong_from": scored.get("wrong_from")}


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
            row = {"target": target["target"], "segment": segment, "method": target["method"]}
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
