"""Planted truth: a tiny model whose directions have known triggers goes through every stage, by the command line."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lorascope.cli import main
from lorascope.features import load_features
from lorascope.models import load_model
from lorascope.study import Study
from lorascope.token_text import open_tokenizer
from lorascope.views.ablation_tables import ablation_table
from planted_model import (
    EVERY,
    TRIGGERS,
    answered_traces,
    graded_questions,
    plant_habit,
    planted_traces,
    save_planted,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("planted")
    model, adapter = save_planted(folder)
    traces, path = planted_traces(folder / "traces.jsonl"), folder / "study"
    new = [
        "--model",
        str(model),
        "--traces",
        str(traces),
        "--adapter",
        str(adapter),
        "--heldout",
        "0.4",
        "--system",
        "",
    ]
    commands = [
        ["new", *new],
        ["record"],
        ["record", "--corpus", "heldout"],
        ["ablate", "--traces", "8"],
        ["sae", "--k", "3", "--expansion", "2", "--tokens", "600000", "--patched-tokens", "1500"],
        ["examples"],
        ["examples", "--corpus", "heldout"],
        ["explain"],
        ["report"],
    ]
    for name, *rest in commands:
        assert main([name, str(path), *rest]) == 0, name
    return Study.open(path)


def token_strings(study: Study, corpus: str) -> list[str]:
    store = load_features(study, corpus, "direction").store
    tokenizer = open_tokenizer(study.path / "tokenizer")
    return [tokenizer.decode([int(i)], skip_special_tokens=False) for i in store.tokens]


def test_recorded_scalars_are_large_exactly_on_the_triggers(study: Study) -> None:
    features = load_features(study, "heldout", "direction")
    texts = np.array(token_strings(study, "heldout"))
    for feature, trigger in TRIGGERS.items():
        acts = features.columns([features.ids.index(feature)])[:, 0]
        hits = (texts == trigger) & features.store.ordinary
        others = features.store.ordinary & ~hits & np.isin(texts, EVERY)
        assert hits.sum() > 20
        assert acts[hits].min() > 5 * acts[others].max()


def test_top_examples_are_the_triggers_of_the_right_polarity(study: Study) -> None:
    store = load_features(study, "train", "direction").store
    texts = token_strings(study, "train")
    rows = pq.read_table(study.path / "examples" / "train" / "direction-examples.parquet").to_pylist()
    for feature, trigger in TRIGGERS.items():
        top = [r for r in rows if r["feature"] == feature and r["where"] == "top"]
        assert len(top) == 50
        assert {texts[int(store.offsets[r["trace"]]) + r["position"]] for r in top} == {trigger}


def test_ablation_ranks_the_planted_directions_first(study: Study) -> None:
    rows = pq.read_table(study.path / "ablation" / "exact-direction.parquet").to_pylist()
    ranked = sorted((r for r in rows if r["segment"] == "all"), key=lambda r: -r["kl"])
    assert {r["target"] for r in ranked[:3]} == {feature[:-1] for feature in TRIGGERS}
    assert not any(r["under_floor"] for r in ranked[:3])


def test_screening_ranks_them_first_and_exact_runs_confirm(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy, ignore=shutil.ignore_patterns("ablation"))
    assert main(["ablate", str(copy), "--traces", "8", "--top", "3"]) == 2
    assert "--method screen" in capsys.readouterr().err
    for rest in (["--method", "screen"], ["--top", "3", "--by", "direction"]):
        assert main(["ablate", str(copy), "--traces", "8", *rest]) == 0
    tables = {
        name: {
            r["target"]: r
            for r in pq.read_table(copy / "ablation" / f"{name}-direction.parquet").to_pylist()
            if r["segment"] == "all"
        }
        for name in ("screen", "confirmed")
    }
    planted = {feature[:-1] for feature in TRIGGERS}
    assert set(sorted(tables["screen"], key=lambda name: -tables["screen"][name]["kl"])[:3]) == planted
    assert set(tables["confirmed"]) == planted
    exact = pq.read_table(study.path / "ablation" / "exact-direction.parquet").to_pylist()
    wanted = {r["target"]: r["kl"] for r in exact if r["segment"] == "all"}
    shown = {row["target"]: row["kl"]["value"] for row in ablation_table(Study.open(copy), "direction")["rows"]}
    assert set(shown) == set(wanted)
    assert all(shown[name] == pytest.approx(wanted[name], rel=1e-3) for name in planted)
    assert main(["report", str(copy)]) == 0
    assert "are screened" in (copy / "report.html").read_text()


def test_a_report_of_a_partial_ablation_can_be_written(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy, ignore=shutil.ignore_patterns("ablation"))
    assert main(["ablate", str(copy), "--traces", "2", "--by", "layer"]) == 0
    assert main(["report", str(copy)]) == 0


def trigger_codes(study: Study, corpus: str) -> list[Any]:
    """The latents' codes [tokens, F] at each trigger's tokens."""
    latents = load_features(study, corpus, "latent")
    codes = latents.columns(list(range(len(latents.ids))))
    texts = np.array(token_strings(study, corpus))
    return [codes[latents.store.ordinary & (texts == t)] for t in TRIGGERS.values()]


def test_the_autoencoder_separates_the_triggers(study: Study) -> None:
    # With four triggers on 4% of the tokens nothing presses for one latent each (a planted dictionary that fills
    # the state is recovered atom by atom in test_sae_training); a held-out code must still tell its trigger.
    means = np.stack([codes.mean(axis=0) for codes in trigger_codes(study, "train")])
    for number, codes in enumerate(trigger_codes(study, "heldout")):
        distances = ((codes[:, None] - means) ** 2).sum(axis=-1)
        assert (distances.argmin(axis=1) == number).all()
        assert (codes > 0).any(axis=1).all()


def test_explanations_name_the_triggers_and_score_high_and_wrong_ones_do_not(study: Study) -> None:
    lines = (study.path / "explanations" / "direction.jsonl").read_text().splitlines()
    rows: dict[str, Any] = {row["feature"]: row for row in map(json.loads, lines)}
    for feature, trigger in TRIGGERS.items():
        row = rows[feature]
        assert trigger.strip() in row["text"]
        # The firing level is the 99% quantile, and a trigger is not on exactly 1% of the tokens: the difference
        # is noise that fires, or triggers that do not.
        assert row["scored"]["detection"]["value"] >= 0.9
        assert row["scored"]["fuzzing"]["value"] >= 0.9
        assert row["scored"]["detection_wrong"]["value"] < 0.65


def test_the_summary_and_the_report_say_so(study: Study) -> None:
    summary = study.summary
    assert summary["sae"]["fvu_effect"] < 0.05
    assert summary["patched_kl"] < summary["adapter_off_kl"]
    assert summary["detection"]["mean"] > summary["detection_wrong"]["mean"]
    html = (study.path / "report.html").read_text()
    assert all(feature[:-1] in html for feature in TRIGGERS)


def test_nothing_is_run_twice_and_a_changed_input_is_named_stale(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    before = study.manifest["stages"]["record:train:adapter"]["finished"]
    assert main(["record", str(study.path)]) == 0
    assert study.manifest["stages"]["record:train:adapter"]["finished"] == before
    traces = study.corpus_file("heldout")
    original = traces.read_text()
    traces.write_text("".join(original.splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main(["status", str(study.path), "--json"]) == 0
    states = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    traces.write_text(original)
    stale = [row for name, row in states.items() if name.startswith("ablate")]
    assert stale
    assert stale[0]["state"] == "stale"
    assert "heldout" in stale[0]["why"]


GOLDS = {("7", "7"): 30, ("7", "5"): 18, ("3", "3"): 34, ("3", "5"): 14}
"""Questions of each (group, gold): what always says 5 is right on 32 of 96, what answers by group on 64."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A base model that says 5 to everything; the traces answer 7 or 3 by the words of the question."""
    folder = tmp_path_factory.mktemp("trained")
    model, _ = save_planted(folder)
    plant_habit(model)
    traces, path = answered_traces(folder / "traces.jsonl", 544), folder / "study"
    questions = graded_questions(folder / "graded.jsonl", GOLDS)
    commands = [
        ["new", "--model", str(model), "--traces", str(traces), "--heldout", "64", "--system", ""],
        ["train", "--learning-rate", "2e-3", "--epochs", "6"],
        ["train", "--full", "--learning-rate", "1e-3", "--epochs", "4"],
        ["evaluate", "--on", str(questions), "--max-new-tokens", "8"],
    ]
    for name, *more in commands:
        assert main([name, str(path), *more]) == 0, name
    return Study.open(path)


@pytest.mark.parametrize("name", ["adapter", "full"])
def test_training_learns_what_the_base_model_cannot_know(trained: Study, name: str) -> None:
    result = trained.manifest["stages"][f"train:{name}"]["result"]
    model, tokenizer = load_model(trained.model_name)
    heldout, _ = trained.renderer(tokenizer).render_all(trained.traces("heldout"))
    total = count = 0.0
    for item in heldout:
        ids = torch.from_numpy(item.ids.astype(np.int64))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total += float(losses[item.response_start - 1 :].sum())
        count += len(losses) - item.response_start + 1
    assert count == 2 * len(heldout)  # the answer and the end of the turn
    assert result["heldout_loss_before"] == pytest.approx(total / count, rel=1e-4)
    # Without reading the question, nothing gets below one bit per answer.
    assert result["heldout_loss"] < 0.05 * math.log(2) / 2


def test_evaluation_gives_the_accuracies_that_were_planted(trained: Study) -> None:
    row = json.loads((trained.path / "eval" / "recovery.json").read_text())[0]
    assert row["n"] == sum(GOLDS.values()) == 96
    wanted = {"base": 32 / 96, "adapter": 64 / 96, "full": 64 / 96}
    assert {name: row[name]["accuracy"] for name in wanted} == pytest.approx(wanted)
    assert row["recovery"]["value"] == pytest.approx(1)
    for name, said in (("base", {"5"}), ("adapter", {"3", "7"}), ("full", {"3", "7"})):
        lines = (trained.path / "eval" / f"{name}.jsonl").read_text().splitlines()
        assert {json.loads(line)["extracted"] for line in lines} == said
