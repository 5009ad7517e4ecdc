"""Exports: other tools load the folders and find the same numbers; Neuronpedia's rows are as its import wants them."""

import csv
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorascope.attached import attach
from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.example_search import ExamplesConfig, examples
from lorascope.export import ExportConfig, export_study, neuronpedia
from lorascope.export.neuronpedia import json_line, slug
from lorascope.export.neuronpedia_schema import TABLES, row_faults
from lorascope.export.tables import ablation_rows
from lorascope.features import load_features
from lorascope.study import Study, write_json
from lorascope.views import feature_table
from report_study import HOSTILE, PLANTED, make_report_study
from tiny_models import random_adapter, tiny_model
from tiny_store import write_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_report_study(tmp_path_factory.mktemp("export") / "My Study")


@pytest.fixture
def study(made: Study, tmp_path: Path) -> Study:
    """A copy to write into."""
    shutil.copytree(made.path, tmp_path / "My Study")
    return Study.open(tmp_path / "My Study")


def export(study: Study, to: str, **settings: Any) -> dict[str, Any]:
    return export_study(study, ExportConfig(to, **settings), Options())


def test_peft_loads_the_adapter_and_computes_the_same(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="tiny", system=None)
    model = tiny_model()
    adapter = random_adapter(model, rank=2)
    adapter.save(study.path / "adapter")
    result = export(study, "peft", output=str(tmp_path / "out"))
    assert result["directions"] == len(adapter.addresses)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = torch.tensor([[5, 9, 2, 7, 11, 3]])
    with torch.no_grad():
        with attach(model, adapter) as attached:
            ours = attached.run(ids).logits
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


READ_BY_SAELENS = """
import sys, torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
sae = SAE.load_from_disk(sys.argv[1])
with torch.no_grad():
    save_file({"codes": sae.encode(load_file(sys.argv[2])["z"])}, sys.argv[3])
"""


def test_saelens_loads_the_sae_and_gives_the_recorded_codes(study: Study, tmp_path: Path) -> None:
    """In a process of its own: SAELens imports TransformerLens, whose warnings and patches stay out of these tests."""
    result = export(study, "saelens")
    latents = load_features(study, "heldout", "latent")
    assert result["latents"] == len(latents.ids)
    z_TN = latents.store.rows(np.arange(300))
    save_file({"z": torch.from_numpy(z_TN)}, tmp_path / "z.safetensors")
    command = [sys.executable, "-c", READ_BY_SAELENS, result["folder"], "z.safetensors", "out.safetensors"]
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = load_file(tmp_path / "out.safetensors")["codes"].numpy()
    ours = latents.encode(z_TN, None)
    assert (ours > 0).any()
    np.testing.assert_allclose(codes, ours, rtol=0, atol=1e-4)


def rows_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table in an export, the files read as the import does it."""
    if table in ("release", "model", "sourceset", "source"):
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*/*/{table}.jsonl"))]
    else:
        files = sorted(folder.glob(f"*/*/{table}/batch-*.jsonl.gz"))
        texts = [gzip.decompress(path.read_bytes()).decode("utf-8") for path in files]

    def number(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    found = []
    for text in texts:
        rows = [json.loads(line, parse_constant=number) for line in text.strip().split("\n")]
        assert len({tuple(row) for row in rows}) == 1  # the first row's fields are the columns of the file
        assert "\\u0000" not in text
        assert "\0" not in text
        found += rows
    return found


NAMED_BY_THE_METHOD = {
    "features": "modelId layer index maxActApprox frac_nonzero pos_str pos_values neg_str neg_values "
    "freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values",
    "activations": "tokens values maxValue maxValueTokenIndex binMin binMax dataIndex",
    "explanations": "index description typeName explanationModelName",
}


def test_neuronpedia_rows_fit_the_schema_and_name_what_belongs_together(study: Study) -> None:
    result = export(study, "neuronpedia")
    folder = Path(result["folder"])
    rows = {table: rows_of(folder, table) for table in TABLES}
    for table, found in rows.items():
        assert found
        for row in found:
            assert row_faults(table, row) == []
        assert set(NAMED_BY_THE_METHOD.get(table, "").split()) <= set(found[0])
    assert {table: len(rows[table]) for table in ("features", "activations", "explanations")} == {
        table: result[table] for table in ("features", "activations", "explanations")
    }
    (model,) = {row["id"] for row in rows["model"]}
    assert model == result["model"] == "tiny"
    layers = range(4)
    assert {row["layers"] for row in rows["model"]} == {4}  # also where latents are, under layer 0
    sources = {f"{n}-my-study-direction" for n in layers} | {"0-my-study-latent"}
    assert {row["id"] for row in rows["source"]} == sources == {path.name for path in (folder / model).iterdir()}
    assert {row["name"] for row in rows["sourceset"]} == {row["setName"] for row in rows["source"]}
    assert {row["releaseName"] for row in rows["sourceset"]} == {row["name"] for row in rows["release"]} == {"my-study"}
    features = {(row["layer"], row["index"]) for row in rows["features"]}
    assert len(features) == len(rows["features"])
    for table in ("activations", "explanations"):
        assert {(row["layer"], row["index"]) for row in rows[table]} <= features
        assert len({row["id"] for row in rows[table]}) == len(rows[table])
    assert {row["modelId"] for table in ("features", "activations", "source") for row in rows[table]} == {model}
    labels = {(row["layer"], int(row["index"])): row["vectorLabel"] for row in rows["features"]}
    places = json.loads((folder / "lorascope.json").read_text())
    assert {(p["source"], p["index"]): p["feature"] for p in places["features"]} == labels
    wanted = [i for kind in ("direction", "latent") for i in load_features(study, "train", kind).ids]
    assert sorted(labels.values()) == sorted(wanted)  # both polarities of every direction, every latent


def test_neuronpedia_values_are_the_recorded_ones(study: Study) -> None:
    result = export(study, "neuronpedia", examples=6, per_quantile=2, window=5)
    folder = Path(result["folder"])
    stats = {}
    for kind in ("direction", "latent"):
        table = pq.read_table(study.path / "examples" / "train" / f"{kind}-stats.parquet").to_pylist()
        stats |= {row["feature"]: row for row in table}
    nonzero: dict[str, float] = {}
    for kind in ("direction", "latent"):
        found = load_features(study, "train", kind)
        acts_TF = found.columns(np.arange(len(found.ids)))[found.store.ordinary]
        nonzero |= dict(zip(found.ids, (acts_TF > 0).mean(axis=0).tolist(), strict=True))
    assert nonzero["L1.gate+"] > 5 * stats["L1.gate+"]["density"]  # of which only the strongest count as firing
    labels = {}
    for row in rows_of(folder, "features"):
        labels[row["layer"], row["index"]] = row["vectorLabel"]
        stat = stats[row["vectorLabel"]]
        assert row["maxActApprox"] == pytest.approx(stat["max"])
        assert row["frac_nonzero"] == pytest.approx(nonzero[row["vectorLabel"]])
        assert row["freq_hist_data_bar_heights"] == stat["hist_counts"]
        assert len(row["freq_hist_data_bar_values"]) == len(stat["hist_counts"])
    sets = {kind: load_features(study, "train", kind) for kind in ("direction", "latent")}
    store = sets["direction"].store
    numbers = {name: i for i, name in enumerate(store.trace_ids)}
    counts: dict[str, int] = {}
    texts = ""
    for row in rows_of(folder, "activations"):
        label = labels[row["layer"], row["index"]]
        features = sets["latent" if label.startswith("sae.") else "direction"]
        trace, position = row["dataIndex"].rsplit(":", 1)
        at, column = int(position), features.ids.index(label)
        part, z_TN = store.trace(numbers[trace])
        acts = features.encode(z_TN, np.array([column]))[:, 0]
        start, stop = max(0, at - 5), min(part.stop - part.start, at + 6)
        np.testing.assert_allclose(row["values"], acts[start:stop], rtol=1e-5, atol=1e-6)
        assert len(row["tokens"]) == len(row["values"]) == stop - start
        assert row["qualifyingTokenIndex"] == at - start
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert row["minValue"] == min(row["values"])
        if row["binMin"] == -1:
            assert row["binContains"] == -1
            assert row["binMax"] == pytest.approx(stats[label]["max"])
        else:
            here = row["values"][row["qualifyingTokenIndex"]]
            assert row["binMin"] - 1e-4 <= here <= row["binMax"] + 1e-4
            assert row["binContains"] == pytest.approx(0.2)
        counts[label] = counts.get(label, 0) + 1
        texts += "".join(row["tokens"]) + "\n"
    assert max(counts.values()) == 6 + 5 * 2
    assert HOSTILE[2:10] in texts  # text of a trace is data here
    for whole in ("日", "🦜"):
        assert whole in texts


def test_neuronpedia_batches_are_the_same_rows_and_exports_the_same_bytes(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(study, "neuronpedia", examples=2, per_quantile=0)
    folder = study.path / "export" / "neuronpedia"
    whole = {table: rows_of(folder, table) for table in TABLES}
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.gz")}
    export(study, "neuronpedia", examples=2, per_quantile=0, window=24, output=str(study.path / "again"))
    assert {p.relative_to(study.path / "again"): p.read_bytes() for p in (study.path / "again").rglob("*.gz")} == first
    monkeypatch.setattr(neuronpedia, "BATCH", 5)
    export(study, "neuronpedia", examples=2, per_quantile=0, output=str(study.path / "small"))
    small = study.path / "small"
    assert len(list(small.glob("*/1-*/features/*.gz"))) == math.ceil(14 / 5)
    for table, rows in whole.items():
        order = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
        assert sorted(rows_of(small, table), key=order) == sorted(rows, key=order)


def test_neuronpedia_has_explanations_with_their_scores_and_the_lens_where_made(study: Study) -> None:
    shutil.rmtree(study.path / "lens")
    result = export(study, "neuronpedia")
    assert [part["run"] for part in result["left_out"]] == [f"lorascope lens {study.path}"]
    labels = {(r["layer"], r["index"]): r["vectorLabel"] for r in rows_of(Path(result["folder"]), "features")}
    found = {labels[r["layer"], r["index"]]: r for r in rows_of(Path(result["folder"]), "explanations")}
    lines = (study.path / "explanations" / "direction.jsonl").read_text().splitlines()
    explained = {row["feature"]: row for row in map(json.loads, lines) if row["text"]}
    assert explained
    for feature, row in explained.items():
        assert found[feature]["description"] == row["text"]
        assert f"detection {row['scored']['detection']['value']:.3g}" in found[feature]["notes"]
        assert found[feature]["typeName"] is None
    assert result["features"] == result["explanations"] + result["without_explanation"]
    lens = {"feature": ["L1.down+"] * 2, "side": ["read", "write"]}
    for end in ("", "bottom_"):
        lens |= {f"{end}tokens": [["x"], [f" {end}a", "b\0"]], f"{end}values": [[1.0], [2.5, 0.5]]}
    (study.path / "lens").mkdir()
    pq.write_table(pa.table(lens), study.path / "lens" / "lens.parquet")
    again = export(study, "neuronpedia")
    assert again["left_out"] == []
    (row,) = [r for r in rows_of(Path(again["folder"]), "features") if r["vectorLabel"] == "L1.down+"]
    assert (row["pos_str"], row["pos_values"]) == ([" a", "b\ufffd"], [2.5, 0.5])
    assert row["neg_str"] == [" bottom_a", "b\ufffd"]


def test_neuronpedia_has_the_explanations_of_every_explainer(study: Study) -> None:
    path = study.path / "explanations" / "direction.jsonl"
    own = next(row for row in map(json.loads, path.read_text().splitlines()) if row["text"])
    judged = [own | {"explainer": "judge:m", "text": "said by m"}, own | {"explainer": "judge:n", "text": None}]
    before = export(study, "neuronpedia")
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in judged))
    after = export(study, "neuronpedia")
    assert after["explanations"] == before["explanations"] + 1
    assert after["without_explanation"] == before["without_explanation"]
    texts = {row["description"] for row in rows_of(Path(after["folder"]), "explanations")}
    assert {own["text"], "said by m"} <= texts


def test_controls_with_examples_are_exported_like_the_rest(study: Study) -> None:
    real = load_features(study, "train", "direction").store
    z = np.random.default_rng(0).normal(size=(real.n_tokens, len(real.addresses)))
    lengths = np.diff(real.offsets).tolist()
    write_store(study, z, lengths, source="base", addresses=real.addresses, tokens=real.tokens, shard_tokens=4096)
    examples(study, ExamplesConfig("train", kinds="base", k=4, per_quantile=2), Options())
    result = export(study, "neuronpedia", examples=2)
    assert result["kinds"] == ["direction", "latent", "base"]
    labels = {r["vectorLabel"]: r["layer"] for r in rows_of(Path(result["folder"]), "features")}
    assert labels["base.L2.down-"] == "2-my-study-base"
    assert len(labels) == result["features"] == 4 * 14 * 2 + len(load_features(study, "train", "latent").ids)
    assert not any("bases" in part["what"] for part in result["left_out"])
    assert export(study, "csv")["features"]["base"] == 4 * 14


def row_with(table: str, **values: Any) -> dict[str, Any]:
    blank = {"text": "", "number": 0.5, "whole": 1, "flag": True, "texts": [], "numbers": []}
    return {name: blank[kind.rstrip("?")] for name, kind in TABLES[table].items()} | values


def test_what_the_database_refuses_is_taken_out_or_refused() -> None:
    line = json_line("activations", row_with("activations", tokens=["a\0b", "\\u0000"], id="x\0"))
    assert json.loads(line)["tokens"] == ["a\ufffdb", "\\u 0000"]
    assert "\\u0000" not in line
    assert line.count("\n") == 1
    for wrong in (math.nan, math.inf):
        with pytest.raises(RunFailed, match="not finite"):
            json_line("activations", row_with("activations", values=[1.0, wrong]))
    with pytest.raises(RunFailed, match="values is no numbers"):
        json_line("activations", row_with("activations", values=[None]))
    faults = row_faults("features", {"modelId": 3} | {k: v for k, v in row_with("features").items() if k != "index"})
    assert faults == ["index is missing"]
    assert row_faults("features", row_with("features", modelId=3, extra=1)) == [
        "extra is no field",
        "modelId is no text",
    ]
    assert row_faults("features", row_with("features", maxActApprox=True)) == ["maxActApprox is no number"]
    assert row_faults("features", row_with("features", hookName=None)) == []


def test_names_are_as_the_site_allows_them(study: Study) -> None:
    assert slug("Qwen/Qwen2.5-32B_Instruct ") == "qwen-qwen2-5-32b-instruct"
    assert slug("日本") == "lorascope"
    result = export(study, "neuronpedia", examples=1, name="Réason v1", model_id="Gemma_2", creator="me")
    assert {path.name for path in Path(result["folder"]).iterdir()} == {"gemma-2", "lorascope.json"}
    assert {row["name"] for row in rows_of(Path(result["folder"]), "release")} == {"r-ason-v1"}
    assert {row["creatorId"] for row in rows_of(Path(result["folder"]), "activations")} == {"me"}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_what_the_views_show(study: Study) -> None:
    result = export(study, "csv")
    folder = Path(result["folder"])
    shown = {row["id"]: row for row in feature_table(study, "train")["rows"]}
    tables = {kind: read_csv(folder / f"features-{kind}.csv") for kind in ("direction", "latent")}
    assert {kind: len(rows) for kind, rows in tables.items()} == result["features"]
    assert sorted(row["id"] for rows in tables.values() for row in rows) == sorted(shown)
    for row in (row for rows in tables.values() for row in rows):
        for name in ("density", "level", "p99", "kl", "detection", "detection_wrong"):
            wanted = shown[row["id"]][name]
            assert row[name] == "" if wanted is None else float(row[name]) == wanted
        assert row["text"] == (shown[row["id"]]["text"] or "")
    tokens = {row["id"]: row["top_tokens"] for row in tables["direction"]}
    for address, trigger in PLANTED.items():
        shown_trigger = trigger.replace("\n", "\\n")
        assert all(shown_trigger in part for part in tokens[f"{address}+"].split("' '"))


def test_tables_of_features_hold_categories_and_reasoning_scores(study: Study) -> None:
    folder = Path(export(study, "csv")["folder"])
    for kind in ("direction", "latent"):
        lines = (study.path / "categories" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        sorted_ = {row["feature"]: row for row in map(json.loads, lines)}
        scored = pq.read_table(study.path / "reasoning" / "heldout" / f"{kind}.parquet").to_pylist()
        scores = {row["feature"]: row for row in scored if math.isfinite(row["score"])}
        assert scores
        for row in read_csv(folder / f"features-{kind}.csv"):
            own = sorted_[row["id"]]
            assert (row["category"], row["category_by"]) == (own["category"] or own["outcome"], "lexical")
            assert row["subcategory"] == (own["subcategory"] or "")
            if row["id"] in scores:
                assert float(row["reasoning_score"]) == pytest.approx(scores[row["id"]]["score"])
                assert float(row["reasoning_q"]) == pytest.approx(scores[row["id"]]["q"])
                assert row["reasoning_corpus"] == "heldout"
            else:
                assert row["reasoning_score"] == ""
    for gone in ("categories", "reasoning"):
        shutil.rmtree(study.path / gone)
    again = export(study, "csv")
    commands = " ".join(part["run"] for part in again["left_out"])
    assert "lorascope categorize" in commands
    assert "lorascope reasoning" in commands
    assert {row["category"] for row in read_csv(folder / "features-latent.csv")} == {""}


def test_tables_of_explanations_hold_every_explainer(study: Study) -> None:
    path = study.path / "explanations" / "direction.jsonl"
    lexical = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    own = next(row for row in lexical if row["scored"])
    ranks = {"value": 0.8, "low": 0.7, "high": 0.9}
    judged = own | {
        "explainer": "judge:m",
        "text": "said\nby, m",
        "class": {"class": 1, "reason": "why", "failure": None},
    }
    judged["scored"] = own["scored"] | {"detection": own["scored"]["detection"] | {"auroc": ranks}}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*lexical, judged]), encoding="utf-8")
    result = export(study, "csv")
    rows = read_csv(Path(result["folder"]) / "explanations-direction.csv")
    assert len(rows) == result["explanations"]["direction"] == len(lexical) + 1
    found = {(row["feature"], row["explainer"]): row for row in rows}
    for row in lexical:
        shown = found[row["feature"], "lexical"]
        assert (shown["text"], shown["reason"]) == (row["text"] or "", row["reason"] or "")
        for score in ("detection", "fuzzing_wrong", "detection_shuffled"):
            part = (row["scored"] or {}).get(score) or {}
            for column, name in ((score, "value"), (f"{score}_low", "low"), (f"{score}_high", "high")):
                assert shown[column] == ("" if part.get(name) is None else str(part[name]))
    last = found[own["feature"], "judge:m"]
    assert (last["text"], last["class"], last["class_reason"]) == ("said\nby, m", "1", "why")
    assert [last[f"detection_auroc{end}"] for end in ("", "_low", "_high")] == ["0.8", "0.7", "0.9"]
    assert found[own["feature"], "lexical"]["detection_auroc"] == ""


def test_tables_of_ablation_hold_every_segment_and_the_floor(study: Study) -> None:
    result = export(study, "csv")
    assert set(result["ablation"]) == {"direction", "layer", "type", "group"}
    for way, count in result["ablation"].items():
        rows = read_csv(Path(result["folder"]) / f"ablation-{way}.csv")
        table = pq.read_table(study.path / "ablation" / f"exact-{way}.parquet").to_pylist()
        assert len(rows) == count == len(table)
        wanted = {(row["target"], row["segment"]): row for row in table}
        for row in rows:
            source = wanted[row["target"], row["segment"]]
            numbers = {
                "kl": "kl",
                "kl_low": "low",
                "kl_high": "high",
                "ce_change": "ce_change",
                "ce_change_low": "ce_low",
            }
            assert all(float(row[ours]) == source[theirs] for ours, theirs in numbers.items())
            assert float(row["kl"]) == source["kl"]
            assert (row["under_floor"], float(row["floor"])) == (str(source["under_floor"]), 0.0005)


def test_what_was_set_to_the_mean_has_tables_of_its_own(study: Study) -> None:
    assert not list(Path(export(study, "csv")["folder"]).glob("ablation-mean-*"))
    folder = study.path / "ablation"
    (folder / "mean").mkdir()
    shutil.copy(folder / "exact-type.parquet", folder / "mean")
    write_json(folder / "mean" / "floor-exact-type.json", {"kl": 0.25, "runs": {"rerun": 0.25}})
    result = export(study, "csv")
    rows = read_csv(Path(result["folder"]) / "ablation-mean-type.csv")
    assert result["ablation"]["mean-type"] == len(rows) == result["ablation"]["type"]
    assert {float(row["floor"]) for row in rows} == {0.25}


def test_what_is_missing_is_named_with_its_command(study: Study) -> None:
    shutil.rmtree(study.path / "explanations")
    shutil.rmtree(study.path / "ablation")
    for to, words in (("csv", ("explain", "ablate")), ("neuronpedia", ("explain",))):
        commands = " ".join(part["run"] for part in export(study, to, examples=1)["left_out"])
        assert all(f"lorascope {word} {study.path}" in commands for word in words)
    for file in (study.path / "examples" / "train").glob("latent-*"):
        file.unlink()
    result = export(study, "neuronpedia", examples=1)
    assert result["kinds"] == ["direction"]
    assert any("--kinds latent" in part["run"] for part in result["left_out"])
    shutil.rmtree(study.path / "examples")
    for to in ("csv", "neuronpedia"):
        with pytest.raises(MissingStage, match="lorascope examples"):
            export(study, to)
    for to, folder, words in (("peft", "adapter", "lorascope train"), ("saelens", "sae", "lorascope sae")):
        shutil.rmtree(study.path / folder)
        with pytest.raises(MissingStage, match=words):
            export(study, to)
    assert not list((study.path / "export").glob(".*"))


def test_a_folder_with_something_else_in_it_is_left_alone(study: Study, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    export(study, "peft", output=str(taken))  # an empty folder is free
    before = study.manifest["stages"]["export:peft"]
    export(study, "peft", output=str(taken))
    assert study.manifest["stages"]["export:peft"] == before  # nothing had changed
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds something already"):
        export(study, "saelens", output=str(taken))
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadInput, match="holds something already"):
        export(study, "peft", output=str(file))
    assert (taken / "notes.txt").read_text() == "mine"


def test_the_command_says_what_it_did_and_what_is_wrong(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(study.path), "--to", "csv", "--corpus", "heldout", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["corpus"] == "heldout"
    for arguments, words in (
        ([], "--to is required"),
        (["--to", "gguf"], "peft, saelens, neuronpedia, csv"),
        (["--to", "csv", "--examples", "0"], "--examples must be at least 1"),
        (["--to", "neuronpedia", "--corpus", "other"], "lorascope examples"),
    ):
        assert main(["export", str(study.path), *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_a_confirmed_direction_of_a_screened_table_is_exact() -> None:
    numbers: dict[str, Any] = {"kl": None, "ce_change": None, "tokens": 1, "under_floor": False, "segments": {}}
    rows = [{"target": name, "method": name} | numbers for name in ("screen", "exact")]
    assert [row["method"] for row in ablation_rows({"rows": rows, "floor": 0.0, "method": "screen"})] == [
        "screen",
        "exact",
    ]
