"""The table of kinds: known means, failures counted, clusters, groups, explainers apart, what is missing named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compared_study import FAILED, add_kind, classed, explained_row, make_compared_study, row_of, the_test
from lorascope.addresses import TYPE_ORDER
from lorascope.cli import main
from lorascope.comparison import ORDER, CompareConfig, compare
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.example_search import ExamplesConfig, examples
from lorascope.explain import ExplainConfig, explain_features
from lorascope.explained import made_from
from lorascope.features import KINDS
from lorascope.layers import THIRDS, layer_count
from lorascope.report.marks import score_floor, score_mark, score_words
from lorascope.store import Store, store_folder
from lorascope.study import Study, write_json
from lorascope.views.compare import comparison_text, verdict
from planted_text import planted_study
from tiny_store import make_study, write_store

CONFIG = CompareConfig(draws=1000)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, Any]]:
    study = make_compared_study(tmp_path_factory.mktemp("compared") / "study")
    return study, compare(study, CONFIG, Options())


def test_all_six_kinds_with_their_means(compared: tuple[Study, dict[str, Any]]) -> None:
    study, result = compared
    assert [row["kind"] for row in result["rows"]] == ["direction", "latent", "neuron", "random", "untrained", "base"]
    assert {row["kind"] for row in result["rows"]} == set(KINDS)
    assert (result["missing"], result["stale"], result["explainers"]) == ([], [], ["lexical"])
    assert json.loads((study.path / "compare" / "compare.json").read_text()) == result
    for row in result["rows"]:
        assert row["training_tokens"] is None  # nothing is recorded
        lines = (study.path / "explanations" / f"{row['kind']}.jsonl").read_text().splitlines()
        scored = [one["scored"]["detection"]["value"] for one in map(json.loads, lines) if one["scored"]]
        assert (row["n"], row["features"], row["scored"]) == (len(lines), len(lines), len(scored))
        assert row["score"]["value"] == pytest.approx(np.mean(scored), rel=1e-5)
        assert row["score"]["low"] < row["score"]["value"] < row["score"]["high"]
        assert row["gain"]["value"] == pytest.approx(np.mean(scored) - 0.5, rel=1e-5)
        assert row["wrong"]["value"] == 0.5
        assert row["fuzzing"]["value"] == pytest.approx(np.mean(scored) + 0.1, rel=1e-5)
        failed = len(lines) - len(scored)
        assert row["failures"] == {"fires on fewer than 8 tokens of the training corpus": failed}
        assert row["scored_share"]["value"] == pytest.approx(len(scored) / len(lines), rel=1e-5)
        everything = (sum(scored) + 0.5 * failed) / len(lines)
        assert row["score_all"]["value"] == pytest.approx(everything, rel=1e-5)
        assert row["density"]["value"] == pytest.approx(0.01)
        assert {name: part["value"] for name, part in row["segments"].items()} == pytest.approx(
            {"prompt": 0.2, "think": 0.5, "answer": 0.3}
        )
        assert (row["classes"], row["reasoning"]) == (None, None)


def test_a_planted_difference_is_found_and_none_is_not(compared: tuple[Study, dict[str, Any]]) -> None:
    _, result = compared
    worse, equal = the_test(result, "random", "score"), the_test(result, "neuron", "score")
    assert worse["p"] == pytest.approx(1 / 1001, rel=1e-4)  # no permutation comes near
    assert worse["p_holm"] < 0.05
    assert worse["difference"]["low"] > 0.1
    assert equal["p_holm"] > 0.05
    assert abs(equal["difference"]["value"]) < equal["detectable"] < 0.06
    assert the_test(result, "neuron", "score", first="latent")["difference"]["low"] > 0
    for test in result["tests"]:
        assert test["p"] <= test["q"] <= test["p_holm"] <= 1
        assert (test["p_pooled_uncorrected"] is None) == (test["measure"] != "scored_share")


def test_groups_partition_the_features(compared: tuple[Study, dict[str, Any]]) -> None:
    _, result = compared
    by = {name: {(r["kind"], r["group"]): r["n"] for r in table["rows"]} for name, table in result["by"].items()}
    assert {group for kind, group in by["third"] if kind == "direction"} == {"early", "middle", "late"}
    assert by["third"]["direction", "early"] == by["third"]["neuron", "late"] == 16
    assert by["type"]["direction", "gate"] == by["type"]["base", "q"] == 12
    assert not [kind for kind, _ in by["type"] if kind in ("neuron", "latent")]
    assert by["family"]["random", "isotropic"] == by["family"]["random", "difference"] == 48
    assert by["family"]["direction", "difference"] == 48
    for table in result["by"].values():
        groups = {row["group"] for row in table["rows"]}
        assert {test["group"] for test in table["tests"]} == groups
        assert all(test["p"] <= test["p_holm"] for test in table["tests"])


def test_a_recording_of_neurons_moves_no_direction_to_another_third(tmp_path: Path) -> None:
    """Directions in layers 0 to 2 of 9 are early ones, beside neurons or not; so they are of an older study."""
    for known in (True, False):
        study = make_study(tmp_path / f"study{known}")
        write_store(study, [[1.0] * 3], [1], addresses=["L0.q", "L1.q", "L8.q"])  # layer 8 has no explained feature
        if known:
            study.update_manifest(layers=9)
        assert layer_count(study) == 9
        add_kind(study, "direction", [explained_row(f"L{k}.q+", 0.7 + k / 100) for k in range(3)])
        for neurons in (False, True):
            if neurons:
                add_kind(study, "neuron", [explained_row(f"neuron.L{k}.5+", 0.6) for k in range(30)])
            rows = compare(study, CONFIG, Options())["by"]["third"]["rows"]
            assert [(row["group"], row["n"]) for row in rows if row["kind"] == "direction"] == [("early", 3)]


def test_groups_are_in_the_models_order(compared: tuple[Study, dict[str, Any]]) -> None:
    by = compared[1]["by"]
    order = {name: list(dict.fromkeys(row["group"] for row in by[name]["rows"])) for name in by}
    assert order["third"] == [name for name in THIRDS if name in order["third"]]
    assert order["type"] == [name for name in TYPE_ORDER if name in order["type"]]
    assert len(order["third"]) > 1 < len(order["type"])
    for name in by:
        kinds = [[row["kind"] for row in by[name]["rows"] if row["group"] == group] for group in order[name]]
        assert all(names == sorted(names, key=ORDER.index) for names in kinds)


def test_the_authors_classes(tmp_path: Path) -> None:
    """59/146/162 of 367 against 49/100/227 of 376, each feature a cluster of its own."""
    study = make_study(tmp_path / "study")
    for kind, prefix, counts in (("direction", "", (59, 146, 162)), ("neuron", "neuron.", (49, 100, 227))):
        classes = np.repeat([0, 1, 2], counts).tolist()
        rows = [explained_row(f"{prefix}L0.{i}+", 0.7, **classed(c)) for i, c in enumerate(classes)]
        add_kind(study, kind, rows)
    result = compare(study, CompareConfig(), Options())
    row = row_of(result, "direction")
    assert row["classes"]["0"]["value"] == pytest.approx(59 / 367, rel=1e-5)
    assert row["classes"]["none"]["value"] == 0
    first, last = (the_test(result, "neuron", f"class_{c}") for c in (0, 2))
    assert first["p_pooled_uncorrected"] == pytest.approx(0.24, abs=0.005)
    assert first["p"] == pytest.approx(0.24, abs=0.03)
    assert last["p_pooled_uncorrected"] == pytest.approx(1e-5, rel=0.1)
    assert last["p"] < 5e-4


def test_features_without_a_class_are_a_share_of_their_own(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    rows = [explained_row(f"L{i}.q+", 0.7, **classed(0)) for i in range(6)]
    add_kind(study, "direction", [*rows, explained_row("L6.q+", None), explained_row("L7.q+", 0.6)])
    classes = row_of(compare(study, CONFIG, Options()), "direction")["classes"]
    assert [classes[name]["value"] for name in ("0", "1", "2", "none")] == [0.75, 0, 0, 0.25]


def test_a_class_that_nobody_is_in_claims_no_certainty(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    add_kind(
        study, "direction", [explained_row(f"L{k}.gate{sign}", 0.7, **classed(1)) for k in range(12) for sign in "+-"]
    )
    add_kind(study, "latent", [explained_row(f"sae.{k}", 0.7, **classed(1)) for k in range(12)])
    result = compare(study, CompareConfig(draws=500), Options())
    row, test = row_of(result, "direction"), the_test(result, "latent", "class_0")
    assert row["classes"]["0"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.2425, abs=1e-4)}
    assert row["classes"]["1"]["low"] == pytest.approx(1 - 0.2425, abs=1e-4)
    assert test["difference"] == {
        "value": 0.0,
        "low": pytest.approx(-0.2425, abs=1e-4),
        "high": pytest.approx(0.2425, abs=1e-4),
    }
    assert test["p"] == 1.0
    assert test["detectable"] == pytest.approx(2.8016 * 0.2425 / 1.96, abs=1e-3)


def test_one_direction_alone_has_no_interval(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    add_kind(study, "direction", [explained_row(f"L0.q{sign}", score) for sign, score in (("+", 0.6), ("-", 0.8))])
    add_kind(study, "latent", [explained_row(f"sae.{k}", 0.7) for k in range(3)])
    result = compare(study, CONFIG, Options())
    assert row_of(result, "direction")["score"] == {"value": 0.7, "low": None, "high": None}
    assert the_test(result, "latent", "score")["p"] is None
    assert "0.700 (no interval)  " in comparison_text(result)
    assert score_words(row_of(result, "direction")["score"]) == "0.70 (no interval)"
    assert "whisker thick own" not in score_mark(row_of(result, "direction"), score_floor(result["rows"]))


def test_a_single_cluster_on_either_side_has_no_interval_of_the_difference(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    add_kind(study, "direction", [explained_row(f"L0.q{sign}", 0.6, **classed(0)) for sign in "+-"])
    scores = (0.7, 0.8, 0.9)
    add_kind(study, "latent", [explained_row(f"sae.{k}", score, **classed(k)) for k, score in enumerate(scores)])
    add_kind(study, "neuron", [explained_row("neuron.L0.1+", 0.804, **classed(0))])
    result = compare(study, CONFIG, Options())
    for second in ("latent", "neuron"):
        for measure in ("score", "class_0"):
            test = the_test(result, second, measure)
            assert test["difference"]["value"] is not None
            assert [test["difference"][end] for end in ("low", "high")] == [None, None]
            assert (test["p"], test["detectable"]) == (None, None)
            assert "too few to test" in verdict(test)


def test_scores_that_are_all_alike_have_no_interval_and_their_words(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    for kind, prefix, score in (("direction", "", 0.5), ("untrained", "untrained.", 0.5)):
        add_kind(study, kind, [explained_row(f"{prefix}L{k}.q+", score) for k in range(5)])
    result = compare(study, CONFIG, Options())
    assert row_of(result, "direction")["score"] == {"value": 0.5, "low": None, "high": None}
    test = the_test(result, "untrained", "score")
    assert test["difference"] == {"value": 0.0, "low": None, "high": None}
    assert verdict(test) == (
        "Directions and untrained directions: no difference found (+0.000, no interval; corrected p = 1). Paired at 5 "
        "addresses: +0.000, no interval; uncorrected p = 1."
    ).replace("-", "−")


def test_two_polarities_of_a_direction_are_one_cluster(tmp_path: Path) -> None:
    """The same scores on both polarities give the interval of one polarity, not a narrower one."""
    widths = []
    for signs in ("+", "+-"):
        study = make_study(tmp_path / f"study{len(signs)}")
        scores = np.random.default_rng(0).normal(0.7, 0.1, 40)
        rows = [explained_row(f"L{i}.q{sign}", float(s)) for i, s in enumerate(scores) for sign in signs]
        add_kind(study, "direction", rows)
        row = row_of(compare(study, CompareConfig(draws=4000), Options()), "direction")
        assert row["clusters"] == 40
        widths.append(row["score"]["high"] - row["score"]["low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_explainers_are_never_mixed(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    for kind, prefix in (("direction", ""), ("neuron", "neuron.")):
        rows = [explained_row(f"{prefix}L{i}.{i}+", 0.6 + 0.01 * i) for i in range(8)]
        judged = [explained_row(f"{prefix}L{i}.{i}+", 0.9, explainer="judge:m") for i in range(4)]
        add_kind(study, kind, [*rows, *judged])
    result = compare(study, CONFIG, Options())
    assert result["explainers"] == ["lexical", "judge:m"]
    found = {(row["explainer"], row["kind"]): row["score"]["value"] for row in result["rows"]}
    assert found["judge:m", "direction"] == pytest.approx(0.9)
    assert found["lexical", "direction"] == pytest.approx(0.635)
    counts = {(test["explainer"], tuple(test["n"])) for test in result["tests"] if test["measure"] == "score"}
    assert counts == {("lexical", (8, 8)), ("judge:m", (4, 4))}


def test_reasoning_scores_are_read_where_they_are(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    for kind, prefix, shift in (("direction", "", 1.0), ("random", "random.", 0.0)):
        names = [f"{prefix}L{i}.q+" for i in range(12)]
        add_kind(study, kind, [explained_row(name, 0.7) for name in names])
        path = study.path / "reasoning" / "heldout" / f"{kind}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = [shift + 0.1 * i for i in range(11)]  # the last feature has none
        pq.write_table(pa.table({"feature": names[:11], "score": scores, "p": scores}), path)
    result = compare(study, CONFIG, Options())
    assert row_of(result, "direction")["reasoning"]["value"] == pytest.approx(1.5)
    found = the_test(result, "random", "reasoning")
    assert (found["n"], found["p"] < 0.05) == ([11, 11], True)
    pq.write_table(pa.table({"feature": ["a"], "points": [1.0]}), path)
    with pytest.raises(RunFailed, match=r"random.parquet is damaged"):
        compare(study, CONFIG, Options())


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    with pytest.raises(MissingStage, match=r"lorascope record .* --corpus train --source adapter"):
        compare(study, CONFIG, Options())
    with pytest.raises(BadInput, match="--draws"):
        compare(study, CompareConfig(draws=5), Options())
    add_kind(study, "direction", [explained_row(f"L{i}.q+", 0.7) for i in range(5)], extra=["L9.q+"])
    for corpus in ("train", "heldout"):
        write_store(study, np.ones((4, 1)), [4], corpus=corpus, source="base")
    result = compare(study, CONFIG, Options())
    commands = {entry["kind"]: entry["run"] for entry in result["missing"]}
    assert commands["neuron"].endswith("--corpus train --source neurons")
    assert commands["base"].endswith("lorascope examples " + f"{study.path} --corpus heldout --kinds base")
    assert (result["rows"][0]["n"], result["rows"][0]["features"]) == (5, 6)
    assert result["tests"] == []


def say_what_from(study: Study, kind: str, said: str) -> None:
    """Let all rows of a kind say what features they are of."""
    path = study.path / "explanations" / f"{kind}.jsonl"
    rows = [json.loads(line) | {"made_from": said} for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_shuffled_features_and_ranks_are_measures_where_rows_have_them(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    rows = [explained_row(f"L{i}.q+", 0.7) for i in range(4)]
    for row, shuffled, auroc in zip(rows, (0.4, 0.5, 0.6, None), (0.7, 0.8, None, None), strict=True):
        row["scored"] |= {"detection_shuffled": {"value": shuffled}} if shuffled else {}
        row["scored"]["fuzzing"] |= {"auroc": {"value": auroc, "low": 0.1, "high": 0.9}} if auroc else {}
    add_kind(study, "direction", rows)
    found = row_of(compare(study, CONFIG, Options()), "direction")
    assert (found["shuffled"]["value"], found["fuzzing_auroc"]["value"]) == (0.5, 0.75)
    assert found["shuffled"]["low"] < 0.5 < found["shuffled"]["high"]
    assert (found["auroc"], found["fuzzing_shuffled"]) == (None, None)


def test_kinds_at_the_same_addresses_are_paired_by_address(tmp_path: Path) -> None:
    """Ten addresses, each 0.05 better than its partner: of 2¹⁰ choices of signs 2 are as far from 0."""
    study = make_study(tmp_path / "study")
    scores = np.random.default_rng(0).normal(0.7, 0.1, 10)
    for kind, prefix, ends, shift in (
        ("direction", "", ("+", "-"), 0.0),
        ("random", "random.", ("+", "#difference+"), 0.05),
        ("base", "base.", ("+", "-"), 0.05),
        ("neuron", "neuron.", ("+",), 0.05),
    ):
        names = [(f"{prefix}L{i}.{7 if kind == 'neuron' else 'q'}{end}", i) for i in range(10) for end in ends]
        add_kind(study, kind, [explained_row(name, float(scores[i] - shift)) for name, i in names])
    result = compare(study, CompareConfig(draws=20_000), Options())
    for second in ("random", "base"):
        paired = the_test(result, second, "score")["paired"]
        assert paired["addresses"] == 10
        assert paired["difference"] == {"value": pytest.approx(0.05), "low": None, "high": None}  # all alike
        assert paired["p_uncorrected"] == pytest.approx(2 / 2**10, abs=1e-3)
        assert the_test(result, second, "score")["p"] > 0.02  # taken as independent
    assert the_test(result, "neuron", "score")["paired"] is None


def test_stale_explanations_are_left_out_by_name(tmp_path: Path) -> None:
    study = make_compared_study(tmp_path / "study")
    say_what_from(study, "latent", "an earlier one")
    result = compare(study, CONFIG, Options())
    assert "latent" not in {row["kind"] for row in result["rows"]}
    run = f"lorascope explain {study.path} --corpus heldout --kinds latent"
    assert result["stale"] == [{"kind": "latent", "explainer": "lexical", "run": run}]
    judged = explained_row("sae.0", 0.9, explainer="judge:m")
    with (study.path / "explanations" / "latent.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(judged) + "\n")
    both = compare(study, CONFIG, Options())
    assert [row["explainer"] for row in both["rows"] if row["kind"] == "latent"] == ["judge:m"]
    say_what_from(study, "latent", "an earlier one")
    judges = [entry for entry in compare(study, CONFIG, Options())["stale"] if entry["explainer"] == "judge:m"]
    assert judges[0]["run"] == f"{run} --explainer judge --judge-model m ..."


def test_another_autoencoder_makes_a_comparison_stale(tmp_path: Path) -> None:
    """Its latents have the same ids, and no table changes by itself."""
    study = make_compared_study(tmp_path / "study")
    weights = study.path / "sae" / "sae_weights.safetensors"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"one")
    say_what_from(study, "latent", made_from(study, "heldout", "latent"))
    assert "latent" in {row["kind"] for row in compare(study, CONFIG, Options())["rows"]}
    weights.write_bytes(b"another")
    result = compare(study, CONFIG, Options())
    assert "latent" not in {row["kind"] for row in result["rows"]}
    assert [entry["kind"] for entry in result["stale"]] == ["latent"]


@pytest.mark.parametrize("stage", ["examples:heldout:latent", "reasoning:heldout:latent"])
def test_what_was_found_of_an_earlier_autoencoders_latents_is_not_compared(tmp_path: Path, stage: str) -> None:
    study = make_compared_study(tmp_path / "study")
    record = {"inputs": {"sae/sae_weights.safetensors": "of an earlier one"}, "outputs": []}
    study.update_manifest(stages={stage: record})
    result = compare(study, CONFIG, Options())
    latents = [row for row in result["rows"] if row["kind"] == "latent"]
    if stage.startswith("examples"):
        assert latents == []
        run = f"lorascope examples {study.path} --corpus heldout --kinds latent"
        assert result["stale"] == [{"kind": "latent", "explainer": "lexical", "run": run}]
    else:
        assert latents[0]["reasoning"] is None
        assert result["stale"] == []


def test_a_kind_of_features_changes_no_other_kinds_numbers(tmp_path: Path) -> None:
    study = make_compared_study(tmp_path / "study")
    first = compare(study, CONFIG, Options())
    (study.path / "explanations" / "neuron.jsonl").unlink()
    second = compare(study, CONFIG, Options())
    assert [row for row in first["rows"] if row["kind"] != "neuron"] == second["rows"]


def test_the_command_prints_one_document(
    compared: tuple[Study, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    study, result = compared
    assert main(["compare", str(study.path), "--draws", "1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert FAILED.startswith("fires on 3")


def test_planted_directions_beat_their_shuffled_selves(tmp_path: Path) -> None:
    """From stores to the table: planted directions, and the same scalars in random order as the base model's."""
    study, _ = planted_study(tmp_path / "study", traces=100)
    for corpus in ("train", "heldout"):
        store = Store.open(store_folder(study.path, corpus, "adapter"))
        z = np.concatenate([part for _, part in store.chunks()])
        order = np.arange(len(z))
        ordinary = np.flatnonzero(store.ordinary)
        order[ordinary] = np.random.default_rng(1).permutation(ordinary)
        lengths = np.diff(store.offsets).tolist()
        kept = {"tokens": store.tokens, "segments": store.segments, "shard_tokens": 4096}
        write_store(study, z[order], lengths, corpus=corpus, source="base", addresses=store.addresses, **kept)
        examples(study, ExamplesConfig(corpus, k=5), Options())
    # as planted, and not the 1% of the strongest firings
    levels = {f"L{k}.gate{sign}": 0.5 for k in range(6) for sign in "+-"}
    named = {"direction": levels, "base": {f"base.{name}": level for name, level in levels.items()}}
    write_json(study.path / "examples" / "levels.json", named)
    explain_features(study, ExplainConfig(kinds="direction,base", examples=30, learn=128), Options())
    result = compare(study, CONFIG, Options())
    ours, shuffled = row_of(result, "direction"), row_of(result, "base")
    assert (
        ours["training_tokens"]
        == shuffled["training_tokens"]
        == int(Store.open(store_folder(study.path, "train", "base")).ordinary.sum())
    )
    assert ours["score"]["value"] > 0.8
    assert 0.4 < shuffled["score"]["value"] < 0.6
    assert ours["n"] == shuffled["n"] == 12
    assert sum(ours["failures"].values()) == 12 - ours["scored"] > 0
