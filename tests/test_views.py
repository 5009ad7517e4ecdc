"""Views: known numbers of a made study come out, and nothing fails where a stage has not run."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lorascope.adapter import build_adapter
from lorascope.errors import BadInput, RunFailed
from lorascope.explained import plain_reason
from lorascope.report import ReportConfig
from lorascope.report.build import render_html
from lorascope.report.gather import gather
from lorascope.store import Store, store_folder
from lorascope.study import Study, write_json
from lorascope.token_text import open_tokenizer
from lorascope.views import (
    ablation_view,
    direction_map,
    dropped,
    explanation_scores,
    feature_page,
    feature_table,
    overview,
    provenance,
    recovery_view,
    sae_page,
    trace_page,
    training_curves,
)
from lorascope.views.feature_list import (
    feature_kind,
    feature_place,
    strongest_directions,
    strongest_latents,
)
from lorascope.views.gains import gain_sentence, recovery_sentence
from lorascope.views.kept import kept_once
from lorascope.views.leaders import leaders
from lorascope.views.maps import signed_map
from lorascope.views.one_trace import trace_features
from lorascope.views.reading import json_lines, missing, ready
from lorascope.views.unfinished import to_run
from report_study import FLOOR, HOSTILE, add_evaluation, make_adapter, make_report_study

PAGES = (
    explanation_scores,
    overview,
    training_curves,
    direction_map,
    ablation_view,
    feature_table,
    sae_page,
    dropped,
    provenance,
    recovery_view,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_report_study(tmp_path_factory.mktemp("views") / "study")


@pytest.fixture
def empty(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "empty", model="tiny", system=None)


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_json(study: Study, page: Any) -> None:
    view = page(study)
    assert view["available"] is True
    json.dumps(view, allow_nan=False)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        (training_curves, "lorascope train"),
        (direction_map, "lorascope train"),
        (ablation_view, "lorascope ablate"),
        (feature_table, "lorascope examples"),
        (sae_page, "lorascope sae"),
        (explanation_scores, "lorascope explain"),
        (recovery_view, "lorascope evaluate"),
        (lambda s: feature_page(s, "L1.gate+"), "lorascope record"),
        (lambda s: feature_page(s, "sae.1"), "lorascope sae"),
        (lambda s: trace_page(s, "train", 0), "lorascope record"),
    ],
)
def test_a_stage_that_has_not_run_is_named(empty: Study, page: Any, command: str) -> None:
    view = page(empty)
    assert view["available"] is False
    said = view["missing"]
    assert said["run"] == f"lorascope train {empty.path}"  # all others would fail, and name another one
    assert (said["own"] or said["run"]).startswith(command)
    assert str(empty.path) in (said["own"] or said["run"])
    json.dumps(view, allow_nan=False)


def test_what_is_missing_is_named_in_the_order_of_the_stages(empty: Study) -> None:
    def ran(*files: str) -> None:
        for file in files:
            (empty.path / file).parent.mkdir(parents=True, exist_ok=True)
            (empty.path / file).touch()

    def named(command: str) -> str:
        return missing(empty, "it", command)["missing"]["run"].replace(str(empty.path), "STUDY")

    empty.update_manifest(corpora={"train": {}, "heldout": {}})
    latents = "lorascope examples STUDY --kinds latent"
    assert len(to_run(empty)) == 8
    assert named(latents) == named("lorascope evaluate STUDY --on TASK") == "lorascope train STUDY"
    ran("adapter/adapter_config.json")
    assert named(latents) == "lorascope record STUDY"
    assert named("lorascope ablate STUDY --by type") == "lorascope ablate STUDY --by type"
    ran("scalars/train/adapter/index.json")
    assert named(latents) == named("lorascope explain STUDY") == "lorascope record STUDY --corpus heldout"
    ran("scalars/heldout/adapter/index.json")
    assert named(latents) == "lorascope sae STUDY"
    assert named("lorascope explain STUDY") == "lorascope examples STUDY"
    ran("sae/sae_weights.safetensors", "examples/levels.json", "explanations/direction.jsonl")
    assert named(latents) == latents
    assert named("lorascope categorize STUDY") == "lorascope examples STUDY --corpus heldout"
    assert [command.split()[1] for command in to_run(empty)] == ["ablate", "examples"]


def test_an_empty_study_has_an_overview(empty: Study) -> None:
    view = overview(empty)
    assert view["adapter"]["available"] is False
    assert view["stand_out"] == []
    assert dropped(empty)["rows"] == []
    assert provenance(empty)["stages"] == []


def test_overview(study: Study) -> None:
    view = overview(study)
    assert (view["adapter"]["directions"], view["adapter"]["layers"], view["adapter"]["rank"]) == (28, 4, 1)
    assert view["adapter"]["parameters"] == 28 * (8 + 6)
    train = view["corpora"][0]
    assert (train["name"], train["traces"], train["sinks"], train["recorded"]) == ("train", 40, 40, ["adapter"])
    assert any("L1.gate" in item["text"] for item in view["stand_out"])


def test_training_curves(study: Study) -> None:
    runs = training_curves(study)["runs"]
    assert [run["name"] for run in runs] == ["adapter", "full"]
    adapter = runs[0]
    assert adapter["steps"] == list(range(1, 41))
    assert [step for step, _ in adapter["heldout"]] == [0, 10, 20, 30, 40]
    assert adapter["last_heldout"] == adapter["best_heldout"] == pytest.approx(0.5 + 1.5 * np.exp(-5))
    assert adapter["tokens"] == 40_000
    assert adapter["smoothed"][0] == pytest.approx(adapter["loss"][0])


def test_ablation_ranks_what_is_above_the_floor(study: Study) -> None:
    view = ablation_view(study)
    assert view["floor"] == FLOOR
    rows = view["by"]["direction"]["rows"]
    assert rows[0]["target"] == "L1.gate"
    assert rows[0]["kl"] == {"value": 0.5, "low": pytest.approx(0.35), "high": pytest.approx(0.7)}
    assert rows[0]["segments"]["think"]["kl"]["value"] == pytest.approx(0.6)
    under = [row["target"] for row in rows if row["under_floor"]]
    assert under == [row["target"] for row in rows[-7:]]
    assert all(target.startswith("L0.") for target in under)


def test_scalars_set_to_their_mean_are_shown_only_where_they_are(study: Study, tmp_path: Path) -> None:
    assert ablation_view(study)["mean"] == {}
    assert 'class="to-mean"' not in render_html(gather(study, ReportConfig(), 0))
    copy = Study(shutil.copytree(study.path, tmp_path / "study"))
    folder = copy.path / "ablation" / "mean"
    folder.mkdir()
    for name, kl in (("exact-type", 0.25), ("confirmed-direction", 0.75)):
        shutil.copy(copy.path / "ablation" / f"exact-{name.split('-')[1]}.parquet", folder / f"{name}.parquet")
        write_json(folder / f"floor-{name}.json", {"kl": kl, "runs": {"rerun": kl}})
    for gone in (False, True):  # also where nothing was switched off
        means = ablation_view(copy)["mean"]
        assert {way: (table["floor"], len(table["rows"])) for way, table in means.items()} == {
            "direction": (0.75, 28),
            "type": (0.25, 7),
        }
        html = render_html(gather(copy, ReportConfig(), 0))
        assert html.count("At its mean") == html.count("At their mean") == 1
        assert "Noise floors: by direction 0.750, by type 0.250." in html
        if not gone:
            for file in (copy.path / "ablation").glob("*-*.parquet"):
                file.unlink()
            copy.update_manifest(corpora={})
    assert not ablation_view(copy)["available"]


def test_norm_map_is_the_norm_of_the_weight_change(study: Study) -> None:
    view = direction_map(study)
    grid = view["grids"][0]
    adapter = make_adapter(4)
    module = next(m for m in adapter.modules if (m.layer, m.type) == (2, "up"))
    norm = float((module.scale * module.b_OR @ module.a_RI).norm())
    assert view["layers"] == [0, 1, 2, 3]
    assert grid["values"][view["types"].index("up")][2] == pytest.approx(norm, rel=1e-5)


def test_effect_and_spread_maps_against_the_store(study: Study) -> None:
    view = direction_map(study)
    store = Store.open(store_folder(study.path, "train", "adapter"))
    z_TN = np.concatenate([z for _, z in store.chunks()])[store.ordinary].astype(np.float64)
    effect_TN = z_TN * store.effect_per_scalar
    column = store.addresses.index("L3.down")
    grids = {grid["key"]: grid for grid in view["grids"]}
    at = view["types"].index("down")
    assert grids["effect"]["values"][at][3] == pytest.approx(float(np.sqrt(np.mean(effect_TN[:, column] ** 2))))
    share = np.abs(effect_TN[:, column]).mean() ** 2 / np.mean(effect_TN[:, column] ** 2)
    assert grids["spread"]["values"][at][3] == pytest.approx(float(share))
    # kept, and the same when read again
    assert (study.path / ".views").is_dir()
    assert direction_map(study) == view


def test_kl_map_marks_the_floor(study: Study) -> None:
    view = direction_map(study)
    grid = next(grid for grid in view["grids"] if grid["key"] == "kl")
    gate = view["types"].index("gate")
    assert grid["values"][gate][1] == 0.5
    assert grid["address"][gate][1] == "L1.gate"
    assert all(row[0] for row in grid["under_floor"])
    assert not any(any(row[1:]) for row in grid["under_floor"])


def test_map_at_rank_two_shows_the_larger_direction(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="tiny", system=None)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    weights = {"model.layers.1.mlp.up_proj": (a, b, 1.0)}
    build_adapter(weights, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}).save(study.path / "adapter")
    view = direction_map(study)
    assert view["rank"] == 2
    assert view["grids"][0]["values"] == [[None, pytest.approx(float((b @ a).norm()), rel=1e-5)]]
    assert signed_map(["L0.q#0", "L0.q#1", "norm"], [1.0, -3.0, 0.5])["values"] == [[-3.0, None], [None, 0.5]]
    assert [grid["available"] for grid in view["grids"]] == [True, False, False, False, False]


def test_feature_table(study: Study) -> None:
    view = feature_table(study)
    assert view["kinds"]["direction"] == 56
    rows = {row["id"]: row for row in view["rows"]}
    row = rows["L1.gate+"]
    assert (row["address"], row["layer"], row["type"], row["polarity"], row["kl"]) == ("L1.gate", 1, "gate", "+", 0.5)
    assert rows["L0.q-"]["kl_under_floor"]
    assert row["detection"] is not None
    best = strongest_directions(view["rows"], 3)
    assert best[0] == "L1.gate"
    assert not any(address.startswith("L0.") for address in strongest_directions(view["rows"], 21))
    ranked = sorted(view["rows"], key=lambda row: -(row["strength"] or 0.0))
    ids = [row["id"] for row in ranked if row["kind"] == "latent" and not row["too_few"]]
    latents = ids[:5]
    strengths = [rows[name]["strength"] for name in latents]
    assert strengths == sorted(strengths, reverse=True)
    assert strongest_latents(study, "train", 500) == ids, "columns say what rows say"
    assert strongest_latents(study, "nowhere", 5) is None
    shown = leaders(study)["latent"]["rows"]
    assert shown == [{key: rows[row["id"]][key] for key in row} for row in shown]
    assert [row["id"] for row in shown[:5]] == latents


def test_ids() -> None:
    assert [feature_kind(name) for name in ("L1.q+", "sae.4", "base.L1.q-", "norm+")] == [
        "direction",
        "latent",
        "base",
        "direction",
    ]
    assert feature_place("base.L12.gate#1-") == {"address": "L12.gate#1", "layer": 12, "type": "gate", "polarity": "-"}


def test_page_of_a_planted_direction(study: Study) -> None:
    page = feature_page(study, "L1.gate+", window=10, top=6, per_quantile=2)
    assert page["unit"] == "effect"
    assert len(page["examples"]["top"]) == 6
    assert set(page["examples"]) == {"top", "q0", "q1", "q2", "q3", "q4"}
    store = Store.open(store_folder(study.path, "train", "adapter"))
    column = store.addresses.index("L1.gate")
    for example in page["examples"]["top"]:
        assert "." in example["tokens"][example["peak"]]
        _, z_TN = store.trace(example["trace"])
        stop = example["start"] + len(example["tokens"])
        effect = z_TN[example["start"] : stop, column] * store.effect_per_scalar[column]
        np.testing.assert_allclose(example["values"], np.maximum(effect, 0), rtol=1e-6)
        assert example["values"][example["peak"]] == pytest.approx(example["activation"])
        assert example["start"] + example["peak"] == example["position"]
        assert len(example["tokens"]) == len(example["values"]) == len(example["segments"]) <= 21
    activations = [example["activation"] for example in page["examples"]["top"]]
    assert activations == sorted(activations, reverse=True)
    assert sum(page["histogram"]["counts"]) == page["stats"]["n_firing"]
    assert sum(page["shares"].values()) == pytest.approx(1)
    assert page["kl"]["kl"]["value"] == 0.5
    assert page["explanation"]["text"].startswith("fires on ")
    assert page["explanation"]["scores"]["detection"]["own"]["n"] > 0
    assert page["missing_stages"] == []


def test_window_of_a_character_spread_over_tokens(study: Study) -> None:
    """Windows that begin inside the first trace show its characters whole."""
    whole = trace_page(study, "train", 0)
    text = "".join(whole["tokens"])
    assert HOSTILE in text
    assert "Zürich 日本 🦜" in text
    assert "\ufffd" not in text
    ids = Store.open(store_folder(study.path, "train", "adapter")).tokens[: whole["length"]].tolist()
    tokenizer = open_tokenizer(study.path / "tokenizer")
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    emoji = next(i for i, token in enumerate(whole["tokens"]) if "🦜" in token)
    assert whole["tokens"][emoji - 1] == ""


def test_page_of_a_latent(study: Study) -> None:
    latent = (strongest_latents(study, "train", 1) or [])[0]
    page = feature_page(study, latent)
    weights = load_file(study.path / "sae" / "sae_weights.safetensors")
    store = Store.open(store_folder(study.path, "train", "adapter"))
    row = weights["W_dec"][int(latent[4:])] * store.effect_per_scalar
    decoder = page["decoder"]
    column = store.addresses.index("L2.down")
    assert decoder["values"][decoder["types"].index("down")][2] == pytest.approx(float(row[column]), rel=1e-5)
    cosines = [near["cosine"] for near in page["neighbours"]]
    assert cosines == sorted(cosines, reverse=True)
    assert latent not in [near["id"] for near in page["neighbours"]]
    example = page["examples"]["top"][0]
    assert example["values"][example["peak"]] == pytest.approx(example["activation"], rel=1e-4)


def test_unknown_features_and_traces(study: Study) -> None:
    with pytest.raises(BadInput, match=r"L99\.q\+"):
        feature_page(study, "L99.q+")
    with pytest.raises(BadInput, match="no trace 40"):
        trace_page(study, "train", 40)
    with pytest.raises(BadInput, match="nothing"):
        trace_page(study, "train", 0, "nothing")


def test_page_without_examples(study: Study) -> None:
    """A corpus that is recorded but not searched: the page says which command is missing."""
    page = feature_page(study, "base.L1.gate+")
    assert page["available"] is False
    assert "--source base" in page["missing"]["run"]


def test_trace_page_and_many_features_agree(study: Study) -> None:
    view = trace_page(study, "heldout", 3, "L2.down+")
    many = trace_features(study, "heldout", 3, ["L2.down+", "sae.0", "L2.down-"], view["length"])
    np.testing.assert_allclose(many[0], view["feature"]["values"], rtol=1e-6)
    assert not np.any((many[0] > 0) & (many[2] > 0))
    assert view["segment_names"][view["segments"][0]] == "special"
    assert {"prompt", "think", "answer"} <= {view["segment_names"][code] for code in view["segments"]}
    assert trace_page(study, "heldout", 3, limit=5)["tokens"] == view["tokens"][:5]


def test_dropped(study: Study) -> None:
    rows = {(row["stage"], row["what"]): row for row in dropped(study)["rows"]}
    assert rows["record train, adapter", "attention sinks"]["count"] == 40
    assert rows["ablate by direction", "under the noise floor"]["count"] == 7
    assert rows["evaluate, adapter", "answers not read"]["count"] == 3
    assert ("sae", "dead latents") in rows
    assert ("traces of train", "traces dropped") in rows
    assert any(stage == "explain directions" for stage, _ in rows)
    assert not any(what.startswith("judge's answers not read") for _, what in rows)  # no judge was asked


def test_what_was_left_out_is_said_once_and_in_words(study: Study, tmp_path: Path) -> None:
    copied = Study.open(shutil.copytree(study.path, tmp_path / "s"))
    stored = copied.path / "scalars" / "train"
    for source, sinks in (("random", 40), ("base", 39)):
        index = json.loads((stored / "adapter" / "index.json").read_text())
        index["counts"]["sinks"] = sinks
        (stored / source).mkdir()
        (stored / source / "index.json").write_text(json.dumps(index))
    lines = [
        {"feature": f"random.L0.q{i}+", "reason": f"fires on {i} tokens of the training corpus, fewer than 8"}
        for i in (3, 5)
    ]
    rows = [line | {"explainer": "lexical", "corpus": "heldout"} for line in lines]
    (copied.path / "explanations" / "random.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {(row["stage"], row["what"]): row for row in dropped(copied)["rows"]}
    assert said["record train, adapter, random", "attention sinks"]["count"] == 40
    assert said["record train, base", "attention sinks"]["count"] == 39
    row = said["explain random controls", "without a score"]
    assert (row["count"], row["rule"]) == (2, "fires on fewer than 8 tokens of the training corpus")


def test_reasons_lose_their_own_numbers() -> None:
    quiet = "only 2 windows of the scoring corpus are without it, fewer than 5"
    assert plain_reason(quiet) == "fewer than 5 windows of the scoring corpus are without it"
    assert plain_reason("no answer after 3 tries of 5") == "no answer after n tries of 5"
    assert plain_reason("no rule found") == "no rule found"


def test_sae_page(study: Study) -> None:
    view = sae_page(study)
    assert [row["key"] for row in view["patched"]["rows"]] == ["exact", "sae", "components", "largest", "mean", "off"]
    assert view["patched"]["rows"][1]["kl"]["value"] == 0.2
    assert 0 <= view["quality"]["fvu_effect"] < 1
    assert "16 principal components" in [row["label"] for row in view["patched"]["rows"]]


def test_provenance(study: Study) -> None:
    view = provenance(study)
    assert "torch" in view["versions"]
    names = [stage["name"] for stage in view["stages"]]
    assert {"sae", "explain:heldout:direction", "examples:train:direction"} <= set(names)
    assert all(stage["seed"] == 0 and stage["seconds"] >= 0 for stage in view["stages"])


def test_recovery_in_words(study: Study) -> None:
    view = recovery_view(study)
    assert view["rows"][0]["models"][1]["gain"]["value"] == pytest.approx(0.4)
    assert view["base_prompt"] == "base"
    said = " ".join(view["sentences"])
    assert "the adapter 50%" in said
    assert "Full finetune under-trained at this budget" in said


def test_words_follow_the_numbers(tmp_path: Path) -> None:
    gain = {"value": 0.02, "low": -0.03, "high": 0.07}
    assert "includes 0" in gain_sentence("adapter", gain)
    worse = gain_sentence("adapter", {"value": -0.2, "low": -0.3, "high": -0.1})
    assert "fewer" in worse
    assert "−20 points" in worse
    row = {"recovery": None, "recovery_reason": "the full finetune was not evaluated"}
    assert recovery_sentence(row) == "Recovery is not given: the full finetune was not evaluated."
    wide = {"recovery": {"value": 0.3, "low": -0.1, "high": 0.8}, "recovery_reason": None}
    assert "includes 0" in recovery_sentence(wide)
    study = Study.create(tmp_path / "s", model="tiny", system=None)
    add_evaluation(study, full_right=0.1)  # no gain of the full finetune: nothing to recover
    assert "no gain to recover" in recovery_view(study)["sentences"][-1]


def test_ready_leaves_nothing_that_json_refuses() -> None:
    value = {"a": np.float32("nan"), "b": [float("inf"), np.int64(3)], 4: np.array([1.5, np.nan]), "p": Path("x")}
    assert ready(value) == {"a": None, "b": [None, 3], "4": [1.5, None], "p": "x"}


def test_damaged_lines(empty: Study) -> None:
    path = empty.path / "explanations" / "direction.jsonl"
    path.parent.mkdir()
    path.write_text('{"feature": "a"}\n{"feat')
    assert [row["feature"] for row in json_lines(empty, "explanations/direction.jsonl")] == ["a"]
    path.write_text('{"feat\n{"feature": "a"}\n')
    with pytest.raises(RunFailed, match="Line 1"):
        json_lines(empty, "explanations/direction.jsonl")


def test_a_damaged_table_is_named(empty: Study) -> None:
    (empty.path / "ablation").mkdir()
    (empty.path / "ablation" / "exact-type.parquet").write_bytes(b"no parquet")
    with pytest.raises(RunFailed, match=r"exact-type\.parquet"):
        ablation_view(empty)


def test_views_load_no_language_model_code() -> None:
    code = "import sys, lorascope.views, lorascope.report; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_explanation_scores_are_the_means_of_the_rows(study: Study) -> None:
    view = explanation_scores(study)
    assert [row["kind"] for row in view["rows"]] == ["all", "direction", "latent"]
    rows = json_lines(study, "explanations/direction.jsonl")
    own = [
        row["scored"]["detection"]["value"] for row in rows if row["scored"] and row["scored"].get("detection_wrong")
    ]
    found = view["rows"][1]["tasks"]["detection"]
    assert found["own"]["value"] == pytest.approx(np.mean(own), abs=1e-3)
    assert found["own"]["n"] == len(own)
    assert found["gain"]["value"] == pytest.approx(found["own"]["value"] - found["wrong"]["value"], abs=1e-3)
    assert view["rows"][1]["n"] == 56


def test_what_several_ask_for_at_once_is_computed_once() -> None:
    computed = []

    @kept_once(maxsize=4)
    def slow(number: int, more: int = 0) -> int:
        computed.append(number)
        time.sleep(0.05)
        return number + more + (slow(number - 1) if number else 0)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(slow, [2] * 4 + [1] * 4)) == [3] * 4 + [1] * 4
    assert sorted(computed) == [0, 1, 2]
    assert slow(2, more=1) == 4
    assert sorted(computed) == [0, 1, 2, 2], "other arguments are another value"
