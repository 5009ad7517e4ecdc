"""The stage: rows for every feature, resuming, superseding, headline numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.explain import ExplainConfig, explain_features, rule_from_json, summarise_rows
from lorascope.explain.rows import keep_rows
from lorascope.study import Study, read_json, read_rows, write_json
from lorascope.views import explanation_scores
from planted_text import add_latents, planted_study

CONFIG = ExplainConfig(kinds="direction", examples=30, learn=128)


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, str], dict[str, Any]]:
    study, ids = planted_study(tmp_path_factory.mktemp("explained") / "study")
    return study, ids, explain_features(study, CONFIG, Options())


def rows_of(study: Study, kind: str = "direction") -> dict[str, dict[str, Any]]:
    rows = read_rows(study.path / "explanations" / f"{kind}.jsonl")
    assert len({row["feature"] for row in rows}) == len(rows)
    return {row["feature"]: row for row in rows}


def test_every_feature_has_one_row(explained: tuple[Study, dict[str, str], dict[str, Any]]) -> None:
    study, ids, result = explained
    rows = rows_of(study)
    assert set(rows) == {f"L{k}.gate{sign}" for k in range(6) for sign in "+-"}
    for name in ("a token", "a token after another", "a number while thinking", "anything after Wait"):
        row = rows[ids[name]]
        assert row["scored"]["detection"]["value"] >= 0.95
        assert row["scored"]["fuzzing"]["value"] >= 0.95
        assert row["explainer"] == "lexical"
        assert row["reason"] is None
        assert row["text"].startswith("fires on ")
        assert rule_from_json(row["rule"])
        lender = row["scored"]["wrong_from"]
        assert lender.rstrip("+-") != row["feature"].rstrip("+-")
        assert row["scored"]["detection_wrong"]["n"] == row["scored"]["detection"]["n"] >= 20
    nothing = rows[ids["nothing"]]
    assert (nothing["rule"], nothing["scored"]) == (None, None)
    assert nothing["reason"] == "fires on 0 tokens of the training corpus, fewer than 8"
    assert 0.3 < rows[ids["chance"]]["scored"]["detection"]["value"] < 0.7
    assert result["direction"]["n"] == 12
    assert sum(result["direction"]["reasons"].values()) + result["direction"]["n_detection"] == 12
    assert result["direction"]["reasons"] == {"fires on fewer than 8 tokens of the training corpus": 7}


def test_headline_numbers(explained: tuple[Study, dict[str, str], dict[str, Any]]) -> None:
    study, _, result = explained
    summary = study.summary
    rows = [row for row in rows_of(study).values() if row["scored"]]
    own = np.mean([row["scored"]["detection"]["value"] for row in rows])
    wrong = np.mean([row["scored"]["detection_wrong"]["value"] for row in rows])
    assert summary["detection"]["mean"] == pytest.approx(own, abs=1e-4)
    assert summary["detection_wrong"]["mean"] == pytest.approx(wrong, abs=1e-4)
    assert summary["detection_gain"]["mean"] == pytest.approx(own - wrong, abs=2e-4)
    assert summary["detection_gain"] == result["all"]["detection_gain"]
    for key in ("detection", "detection_wrong", "detection_gain"):
        assert summary[key]["low"] <= summary[key]["mean"] <= summary[key]["high"]
    assert "explain:heldout:direction" in summary["stages"]
    assert summary["explanations"] == {
        "direction": {"corpus": "heldout", "features": 12, "tried": 12, "scored": len(rows), "limit": None}
    }


def test_a_cut_off_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    explain_features(study, CONFIG, Options())
    files = [study.path / "explanations" / name for name in ("direction.jsonl", "unscored/direction.jsonl")]
    whole = [file.read_bytes() for file in files]
    for file, data in zip(files, whole, strict=True):
        lines = data.splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    name = "explain:heldout:direction"
    study.update_manifest(stages={name: {**study.manifest["stages"][name], "config": None}})
    explain_features(study, CONFIG, Options())
    assert [file.read_bytes() for file in files] == whole
    assert not list((study.path / "explanations").rglob("superseded.jsonl"))


def test_rows_whose_inputs_changed_are_moved_aside(tmp_path: Path) -> None:
    study, ids = planted_study(tmp_path / "study", traces=60)
    explain_features(study, CONFIG, Options())
    before = rows_of(study)
    levels = read_json(study.path / "examples" / "levels.json")
    levels["direction"][ids["a token"]] = 1.5
    write_json(study.path / "examples" / "levels.json", levels)
    explain_features(study, CONFIG, Options())
    after = rows_of(study)
    assert set(after) == set(before)
    changed = {feature for feature in after if after[feature]["key"] != before[feature]["key"]}
    assert ids["a token"] in changed
    aside = read_rows(study.path / "explanations" / "superseded.jsonl")
    assert ids["a token"] in {row["feature"] for row in aside}
    unscored = read_rows(study.path / "explanations" / "unscored" / "superseded.jsonl")
    assert [row["feature"] for row in unscored] == [ids["a token"]]


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    first = explain_features(study, CONFIG, Options())
    stamp = (study.path / "explanations" / "direction.jsonl").stat().st_mtime_ns
    assert explain_features(study, CONFIG, Options()) == first
    assert (study.path / "explanations" / "direction.jsonl").stat().st_mtime_ns == stamp


def test_latents_are_explained_too(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    add_latents(study)
    result = explain_features(study, ExplainConfig(examples=30, learn=128), Options())
    assert rows_of(study, "latent")["sae.0"]["text"] == "fires on ' is'"
    assert result["all"]["n"] == 17
    assert result["latent"]["n"] == 5


def test_each_kind_has_a_record_and_the_headline_is_over_all_of_them(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    add_latents(study)
    together = replace(CONFIG, kinds="direction,latent")
    explain_features(study, together, Options())
    whole = study.summary
    finished = {name: record["finished"] for name, record in study.manifest["stages"].items()}
    assert list(finished) == ["explain:heldout:direction", "explain:heldout:latent"]
    result = explain_features(study, replace(CONFIG, kinds="latent"), Options())
    assert study.summary == whole  # not of the latents alone
    assert {name: record["finished"] for name, record in study.manifest["stages"].items()} == finished
    assert result["all"]["n"] == 17
    assert [row["kind"] for row in explanation_scores(study)["rows"]] == ["all", "direction", "latent"]


def test_controls_are_scored_but_not_in_the_headline(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    explain_features(study, CONFIG, Options())
    before = study.summary
    for corpus in ("train", "heldout"):
        shutil.copytree(study.path / "scalars" / corpus / "adapter", study.path / "scalars" / corpus / "base")
    levels = read_json(study.path / "examples" / "levels.json")
    write_json(
        study.path / "examples" / "levels.json",
        levels | {"base": {f"base.{name}": level for name, level in levels["direction"].items()}},
    )
    explain_features(study, replace(CONFIG, kinds="base"), Options())
    assert study.summary["detection"] == before["detection"]
    assert study.summary["explanations"]["base"]["features"] == 12
    assert [row["kind"] for row in explanation_scores(study)["rows"]] == ["all", "direction", "base"]


def test_a_limited_run_says_so(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    explain_features(study, CONFIG, Options())
    explain_features(study, replace(CONFIG, limit=4), Options())
    result = study.manifest["stages"]["explain:heldout:direction"]["result"]
    assert (result["features"], result["n"], result["limit"]) == (12, 4, 4)
    said = study.summary["explanations"]["direction"]
    assert (said["features"], said["tried"], said["limit"]) == (12, 4, 4)
    assert said["scored"] == result["n_detection"]
    assert explanation_scores(study)["rows"][1]["label"] == "directions (4 of 12, drawn)"


def test_scoring_on_another_corpus_takes_the_place_of_the_first(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    explain_features(study, CONFIG, Options())
    (study.path / "scalars" / "copy").symlink_to(study.path / "scalars" / "heldout")
    explain_features(study, replace(CONFIG, corpus="copy"), Options())
    assert list(study.manifest["stages"]) == ["explain:copy:direction"]
    assert study.summary["explanations"]["direction"]["corpus"] == explanation_scores(study)["corpus"] == "copy"


def test_limit_and_traces_also_in_training(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    result = explain_features(study, ExplainConfig(kinds="direction", limit=4, learn=64, max_tokens=1000), Options())
    assert len(rows_of(study)) == 4
    left_out = result["direction"]["traces_left_out"]
    assert left_out["heldout"]["also_in_training"] == 0
    assert left_out["train"]["over_limit"] > 30
    (study.path / "scalars" / "copy").symlink_to(study.path / "scalars" / "train")
    result = explain_features(study, ExplainConfig(kinds="direction", corpus="copy"), Options())
    assert result["direction"]["traces_left_out"]["copy"]["also_in_training"] == 60
    assert result["all"]["detection"] is None
    assert all("scoring corpus" in row["reason"] for row in rows_of(study).values() if row["rule"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=8)
    for config, message in [
        (ExplainConfig(corpus="train"), "another --corpus"),
        (ExplainConfig(explainer="oracle"), "no explainer 'oracle'"),
        (ExplainConfig(kinds="direction,soul"), "no kind of feature 'soul'"),
        (ExplainConfig(kinds=" "), "at least one kind"),
        (ExplainConfig(kinds="direction", limit=0), "at least 1"),
    ]:
        with pytest.raises(BadInput, match=message):
            explain_features(study, config, Options())
    with pytest.raises(MissingStage, match="lorascope record"):
        explain_features(study, ExplainConfig(kinds="direction", corpus="more"), Options())
    with pytest.raises(MissingStage, match="lorascope sae"):
        explain_features(study, ExplainConfig(), Options())
    write_json(study.path / "examples" / "levels.json", {"direction": {"L0.gate+": 1.0}})
    with pytest.raises(MissingStage, match="lorascope examples"):
        explain_features(study, CONFIG, Options())
    (study.path / "examples" / "levels.json").unlink()
    with pytest.raises(MissingStage, match="lorascope examples"):
        explain_features(study, CONFIG, Options())


def test_rows_of_other_explainers_stay(tmp_path: Path) -> None:
    file = tmp_path / "direction.jsonl"
    rows = [
        {"explainer": who, "key": key, "text": "日本\u2028"}
        for who, key in [("lexical", "a"), ("judge", "b"), ("lexical", "c")]
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"expl', encoding="utf-8")
    done = keep_rows(file, {"c"}, "lexical")
    assert [key in done for key in "abc"] == [False, False, True]
    assert done.read("c") == rows[2]
    assert [row["key"] for row in read_rows(file)] == ["b", "c"]
    done.append({"explainer": "lexical", "key": "d", "text": "日本"})
    assert [done.read(key)["text"] for key in "cd"] == ["日本\u2028", "日本"]
    assert [row["key"] for row in read_rows(file)] == ["b", "c", "d"]
    assert [row["key"] for row in read_rows(tmp_path / "superseded.jsonl")] == ["a"]
    file.write_text("{}\nnonsense\n")
    with pytest.raises(RunFailed, match="line 2"):
        read_rows(file)


def test_rows_are_summarised_without_being_held() -> None:
    """Rows that as dicts would be of 25 MB: of each a few numbers are kept."""

    def rows() -> Iterator[dict[str, Any]]:
        score = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 100, "unparsed": 1, "counts": {"unmatched_token": 2}}
        names = [f"{task}{ending}" for task in ("detection", "fuzzing") for ending in ("", "_wrong", "_shuffled")]
        for number in range(5_000):
            scored = {name: json.loads(json.dumps(score)) for name in names}
            yield {"feature": f"L{number}.gate+", "text": f"text {number}" * 20, "reason": None, "scored": scored}

    tracemalloc.start()
    result = summarise_rows(rows(), np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result["n"] == 5_000
    assert result["detection"]["mean"] == pytest.approx(0.7)
    most = 3 * 8 * 1_000_000  # of the bootstrap, whatever the number of rows
    assert peak < most + 5_000 * 600


def test_the_two_polarities_are_one_cluster() -> None:
    def row(feature: str, own: float) -> dict[str, Any]:
        scored = {
            "detection": {"value": own, "n": 4, "unparsed": 1, "counts": {"unmatched_token": 2}},
            "detection_wrong": {"value": 0.5},
            "fuzzing": None,
        }
        return {"feature": feature, "rule": {}, "reason": None, "scored": scored}

    both = [row(f"L{k}.gate{sign}", 0.5 + 0.1 * (k % 4)) for k in range(20) for sign in "+-"]
    lone = [row(f"sae.{k}", 0.5 + 0.1 * (k % 4)) for k in range(40)]
    counts = {"n": 160, "unparsed": 40, "unmatched_token": 80}
    assert summarise_rows(both, np.random.default_rng(0))["detection_counts"] == counts
    wide = summarise_rows(both, np.random.default_rng(0))["detection"]
    narrow = summarise_rows(lone, np.random.default_rng(0))["detection"]
    assert wide["mean"] == narrow["mean"]
    ratio = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
    assert ratio == pytest.approx(2**0.5, rel=0.1)


def test_no_language_model_is_loaded() -> None:
    code = "import sys, lorascope.explain; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
