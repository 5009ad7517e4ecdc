"""Categories: planted words come out as planted, shuffled ones at the chance that is stated, shares as counted."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.explain.categories import CategorizeConfig, categorize
from lorascope.explain.categories.asking import list_names
from lorascope.explain.categories.assign import CHANCE, assign_by_words
from lorascope.explain.categories.shares import bootstrap_shares, make_groups, tally_traces
from lorascope.explain.categories.spaces import layer_thirds
from lorascope.explain.categories.stage import identity
from lorascope.explain.categories.taxonomy import load_taxonomy, membership, parse_taxonomy
from lorascope.explain.categories.words import explanation_words, make_bags
from lorascope.explained import ASSIGNED
from lorascope.features import load_features
from lorascope.recording import OUTPUT_RMS
from lorascope.study import Study, read_json, write_json
from lorascope.views import category_view
from planted_categories import DECODER, PLANTED, planted_categories

CONFIG = CategorizeConfig()
Planted = tuple[Study, dict[str, tuple[str, str]], dict[str, Any]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    study, where = planted_categories(tmp_path_factory.mktemp("categories") / "study")
    return study, where, categorize(study, CONFIG, Options())


def rows_of(study: Study, kind: str) -> dict[str, dict[str, Any]]:
    lines = (study.path / "categories" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["feature"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("kind", ["latent", "direction"])
def test_planted_words_come_out_as_planted(planted: Planted, kind: str) -> None:
    study, where, result = planted
    rows = rows_of(study, kind)
    assert list(rows) == load_features(study, "heldout", kind).ids
    found = {feature: (row["category"], row["subcategory"]) for feature, row in rows.items() if feature in where}
    assert found == {feature: where[feature] for feature in found}
    assert len(found) == len(PLANTED)
    neutral, chance = ("sae.7", "sae.8") if kind == "latent" else ("L2.gate+", "L2.down+")
    for feature in (neutral, chance):
        assert rows[feature]["category"] is None
        assert rows[feature]["reason"].startswith("none fits: the nearest, ")
    assert all(row["score"] > row["threshold"] for row in rows.values() if row["category"])
    counts = dict(result["kinds"][kind])
    assert counts["assigned"] == len(PLANTED)
    assert counts["without"] == (0 if kind == "latent" else 9)  # nothing is ever below 0
    assert counts["none_fits"] == 2
    shares = counts.pop("shares")
    assert sum(counts.values()) == 2 * counts["features"]
    assert sum(row["n"] for row in shares) == counts["features"]
    assert sum(row["count"]["value"] for row in shares) == pytest.approx(1)


def test_shares_are_those_of_the_activations(planted: Planted) -> None:
    """By hand from the scalars: latents are the directions, each writes DECODER per unit."""
    study, where, _ = planted
    store = load_features(study, "heldout", "latent").store
    z = np.concatenate([store.trace(i)[1] for i in range(store.n_traces)])[store.ordinary]
    code = z * (z > 0.5)
    table = read_json(study.path / "categories" / "shares.json")["kinds"]["latent"]
    assert table["firings"] == int((code > 0).sum())
    for i, place in enumerate(PLANTED):
        assert where[f"sae.{i}"] == place
        row = next(row for row in table["rows"] if (row["category"], row["subcategory"]) == place)
        whole = next(row for row in table["rows"] if (row["category"], row["subcategory"]) == (place[0], None))
        assert row["n"] == 1
        assert row["count"]["value"] == pytest.approx(1 / 9)
        assert row["rate"]["value"] == pytest.approx((code[:, i] > 0).sum() / (code > 0).sum())
        assert row["mass"]["value"] == pytest.approx(code[:, i].sum() / code.sum(), rel=1e-5)
        assert [whole[name] for name in ("n", "count", "rate", "mass")] == [
            row[n] for n in ("n", "count", "rate", "mass")
        ]
        for share in (row["rate"], row["mass"]):
            assert share["low"] < share["value"] < share["high"]
            assert share["high"] - share["low"] < 0.1
    for name in ("count", "rate", "mass"):
        assert sum(row[name]["value"] for row in table["rows"] if row["subcategory"] is None) == pytest.approx(1)


def test_matrix_types_are_added_up_relative_to_their_own_outputs(planted: Planted, tmp_path: Path) -> None:
    """Directions of equal relative effect weigh the same, also where the matrices' outputs differ a hundredfold."""
    _, _, result = planted
    outputs = [1.0, 100.0, 10.0] * 3  # q, gate, down
    study, _ = planted_categories(tmp_path / "study", outputs=outputs)
    found = categorize(study, CONFIG, Options())
    tables = read_json(study.path / "categories" / "shares.json")["kinds"]
    flow = read_json(study.path / "categories" / "flow.json")
    for kind in ("latent", "direction"):
        assert tables[kind]["relative"]
        for row, other in zip(found["kinds"][kind]["shares"], result["kinds"][kind]["shares"], strict=True):
            assert row["category"] == other["category"]
            assert row["mass"]["value"] == pytest.approx(other["mass"]["value"], rel=1e-3)
    assert flow["relative"]
    weights = {(row["type"], row["third"], row["category"]): row["weight"] for row in flow["rows"] if row["weight"] > 0}
    assert list(weights.values()) == pytest.approx([DECODER] * 9)
    (study.path / "scalars" / "heldout" / "adapter" / OUTPUT_RMS).unlink()
    raw = categorize(study, CONFIG, Options())
    assert not read_json(study.path / "categories" / "shares.json")["kinds"]["direction"]["relative"]
    assert not category_view(study)["flow"]["relative"]
    spelling = [row["mass"]["value"] for row in raw["kinds"]["direction"]["shares"]][1]
    assert spelling > 0.3  # L0.gate, whose raw effect is a hundred times that of L0.q


def test_categories_of_an_earlier_version_are_marked_and_made_again(planted: Planted, tmp_path: Path) -> None:
    study, _ = planted_categories(tmp_path / "study")
    categorize(study, CONFIG, Options())
    assert category_view(study)["outdated"] is None
    file = study.path / "categories" / "shares.json"
    shares, record = read_json(file), study.manifest["stages"]["categorize"]
    write_json(file, {key: value for key, value in shares.items() if key != "method"})
    earlier = {key: value for key, value in record["result"].items() if key != "method"}
    study.update_manifest(stages={"categorize": record | {"result": earlier}})
    assert category_view(study)["outdated"] == f"lorascope categorize {study.path} --corpus heldout"
    categorize(study, CONFIG, Options())
    assert category_view(study)["outdated"] is None
    assert read_json(file) == shares


def test_tally_equals_brute_force(planted: Planted) -> None:
    study, _, _ = planted
    features = load_features(study, "heldout", "direction")
    n = len(features.ids)
    rng = np.random.default_rng(0)
    group, worth = rng.integers(0, 4, n), rng.uniform(0.5, 2, n).astype(np.float32)
    level = np.full(n, 1.2, np.float32)
    fires, mass = tally_traces(features, level, worth, group, 4)
    acts = features.columns(np.arange(n))
    for trace in range(features.store.n_traces):
        part = acts[features.store.trace(trace)[0]]
        for g in range(4):
            assert fires[trace, g] == (part[:, group == g] > level[0]).sum()
            assert mass[trace, g] == pytest.approx((part * worth)[:, group == g].sum(), rel=1e-5)


def test_intervals_cover_the_truth() -> None:
    """Of 200 samples of 80 traces, about 95% of the intervals hold the share that the traces were drawn with."""
    rng = np.random.default_rng(0)
    columns = np.eye(2)
    inside = 0
    for _ in range(200):
        traces = rng.poisson(rng.gamma(2.0, 4.0, (80, 1)) * [0.3, 0.7])
        share = bootstrap_shares(traces.astype(float), columns, rng)[0]
        assert share is not None
        inside += share["low"] <= 0.3 <= share["high"]
    assert 0.89 <= inside / 200 <= 0.99
    assert bootstrap_shares(np.zeros((5, 2)), columns, rng) == [None, None]


def test_flow_adds_up_to_the_decoder(planted: Planted) -> None:
    study, _, _ = planted
    flow = read_json(study.path / "categories" / "flow.json")
    assert flow["latents"] == 9
    assert sum(row["weight"] for row in flow["rows"]) == pytest.approx(9 * DECODER)
    weights = {(r["type"], r["third"], r["category"]): r["weight"] for r in flow["rows"] if r["weight"] > 0}
    # latent i writes to direction i alone: L{i // 3}, type i % 3
    expected = {
        (("q", "gate", "down")[i % 3], ("early third", "middle third", "late third")[i // 3], place[0]): DECODER
        for i, place in enumerate(PLANTED)
    }
    assert expected.items() <= weights.items()
    assert {k: v for k, v in weights.items() if k not in expected} == {
        ("gate", "late third", "none fits"): DECODER,
        ("down", "late third", "none fits"): DECODER,
    }
    assert layer_thirds(["embed", "L4.q", "L5.q", "L8.q", "L11.q"], 12) == [
        "outside the layers",
        "middle third",
        "middle third",
        "late third",
        "late third",
    ]


def test_clusters_and_maps_hold_every_point(planted: Planted) -> None:
    study, _, _ = planted
    found = read_json(study.path / "categories" / "clusters.json")
    spaces = {(s["kind"], s["space"]): s for s in found["spaces"]}
    assert set(spaces) == {
        *((kind, space) for kind in ("latent", "direction") for space in ("explanations", "coactivation")),
        ("latent", "decoder"),
        ("token", "states"),
    }
    table = pq.read_table(study.path / "categories" / "maps.parquet").to_pylist()
    for (kind, name), space in spaces.items():
        rows = [row for row in table if (row["kind"], row["space"]) == (kind, name)]
        assert len(rows) == space["points"] == sum(c["size"] for c in space["clusters"])
        assert Counter(row["cluster"] for row in rows) == {c["cluster"]: c["size"] for c in space["clusters"]}
        assert all(np.isfinite([row["x"], row["y"]]).all() for row in rows)
        # the planted explanations hardly share a word, so that most lie at one place
        assert len({(row["x"], row["y"]) for row in rows}) > (0 if name == "explanations" else 5)
    states = [row for row in table if row["kind"] == "token"]
    assert all(row["text"] and row["segment"] == "answer" and row["feature"] is None for row in states)
    # directions that never fire are left out of the clusters and counted
    assert spaces["direction", "coactivation"]["points"] == 9
    for (kind, name), space in spaces.items():
        if kind != "token":
            assert (space["too_few_firings"], space["without_explanation"]) == (9 if kind == "direction" else 0, 0), (
                name
            )
    assert all({"one", "two", "value", "null_95", "p", "n"} <= set(row) for row in found["agreement"])


def test_a_second_run_is_up_to_date_and_gives_the_same(planted: Planted) -> None:
    study, _, result = planted
    before = {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()}
    assert categorize(study, CONFIG, Options()) == result
    assert "categorize: up to date" in (study.path / "log.txt").read_text()
    for path in (study.path / "categories").iterdir():
        path.unlink()
    assert categorize(study, CONFIG, Options()) == result
    assert {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()} == before


def test_features_of_shuffled_words_are_assigned_at_the_stated_chance() -> None:
    taxonomy = load_taxonomy(None)
    rng = np.random.default_rng(0)
    words = [f" {w}" for sub in taxonomy.subcategories for w in sorted(sub.words)] + [f" zorb{i}" for i in range(200)]
    bags = make_bags([([], [], [(words[i], 1.0) for i in rng.integers(0, len(words), 20)]) for _ in range(600)])
    assigned = assign_by_words([str(i) for i in range(600)], bags, taxonomy, rng)
    share = np.mean([one.category is not None for one in assigned])
    assert CHANCE / 3 < share < 2 * CHANCE


def test_every_subcategory_is_reached_by_its_own_words() -> None:
    taxonomy = load_taxonomy(None)
    rng = np.random.default_rng(1)
    owned = {(s.category, s.name): sorted(s.words) for s in taxonomy.subcategories if len(s.words) > 4}
    assert len(owned) >= 25
    noise = [f" zorb{i}" for i in range(50)]
    sources = [
        ([], [], [(f" {w}", 1.0) for w in rng.choice(words, 20)] + [(str(n), 1.0) for n in rng.choice(noise, 6)])
        for words in owned.values()
    ]
    assigned = assign_by_words([str(i) for i in range(len(owned))], make_bags(sources), taxonomy, rng)
    right = [one.category == place[0] for one, place in zip(assigned, owned, strict=True)]
    assert np.mean(right) >= 0.9  # some words are of two categories


def test_membership_prefers_listed_words_then_classes_then_descriptions() -> None:
    taxonomy = parse_taxonomy(
        """
categories:
  - name: one
    subcategories:
      - {name: listed, words: [Plus, "\\n", " "], patterns: ["[0-9]+"]}
      - {name: classed, classes: [operator, letter], segments: [answer]}
  - name: two
    subcategories:
      - {name: described, description: "Everything about tangents.", words: [plus]}
""",
        "test",
    )
    texts = [
        " plus",
        "PLUS",
        "\n",
        " ",
        "42",
        "+",
        " x",
        "class:letter",
        "segment:answer",
        "segment:think",
        " tangents",
    ]
    member = membership([*texts, " other", "class:number"], taxonomy)
    assert member.tolist() == [
        *[[0.5, 0, 0.5]] * 2,
        *[[1, 0, 0]] * 3,
        *[[0, 1, 0]] * 4,
        [0, 0, 0],
        [0, 0, 0.5],
        *[[0, 0, 0]] * 2,
    ]
    assert taxonomy.find("Two") == ("two", None)
    assert taxonomy.find("classed ") == ("one", "classed")
    assert taxonomy.find("one/ Listed") == ("one", "listed")
    assert taxonomy.find("two / listed") is None


def test_words_of_rules_and_texts() -> None:
    rule = {
        "any": [{"all": [{"at": 0, "tokens": [" is", " was"]}, {"at": 1, "class": "number"}, {"segment": "think"}]}]
    }
    of_rules, of_texts = explanation_words(
        [
            {"rule": rule, "text": "fires on ' is'"},
            {"rule": None, "text": "The word Wait, twice."},
            {"rule": None, "text": None},
        ]
    )
    assert sorted(of_rules) == [(" is", 0.5), (" was", 0.5), ("class:number", 0.5), ("segment:think", 0.25)]
    assert of_texts == [(" word", 1.0), (" wait", 1.0), (" twice", 1.0)]
    bags = make_bags([(of_rules, of_texts, []), ([], [], [])])
    assert bags.weight_M.sum() == pytest.approx(1)
    assert bags.starts_F.tolist() == [0, 7, 7]
    assert bags.weight_M[bags.source_M == 1].sum() == pytest.approx(0.5)


def test_examples_are_shown_to_a_judge_and_make_another_taxonomy() -> None:
    text = """
categories:
  - name: one
    description: The first.
    examples: ['"is" in "it is"', "two\n lines"]
    subcategories:
      - {name: inner, description: Within., examples: [deep]}
      - {name: bare}
"""
    taxonomy = parse_taxonomy(text, "test")
    assert list_names(taxonomy) == (
        '- one: The first. For example: "\\"is\\" in \\"it is\\""; "two lines"\n'
        '- one / inner: Within. For example: "deep"\n'
        "- one / bare: "
    )
    assert not membership([" deep"], taxonomy).any()  # words are of names, descriptions and lists
    for old, new in ((", examples: [deep]", ""), ('"it is"', '"it was"')):
        assert identity(parse_taxonomy(text.replace(old, new), "test")) != identity(taxonomy)
    assert set(load_taxonomy(None).examples) == set(load_taxonomy(None).categories)


BAD = {
    "categories: []": "must hold a mapping with a list",
    "[1, 2]": "must hold a mapping with a list",
    "a: [": "as YAML",
    "categories: [{name: a}]": "needs a list of `subcategories`",
    "categories: [{subcategories: []}]": "has no `name`",
    "categories: [{name: a, subcategories: [{name: b, words: [no]}]}]": "must be put in quotes",
    "categories: [{name: a, subcategories: [{name: b, word: [x]}]}]": "unknown key 'word'",
    "categories: [{name: a, example: [x], subcategories: [{name: b}]}]": "unknown key 'example'",
    "{kategories: 1, categories: [{name: a, subcategories: [{name: b}]}]}": "unknown key 'kategories'",
    "categories: [{name: a, examples: x, subcategories: [{name: b}]}]": "must be a list",
    "categories: [{name: a, subcategories: [{name: b, examples: [1]}]}]": "must be put in quotes",
    "categories: [{name: a, subcategories: [{name: b, examples: ['']}]}]": "must be a short text",
    "categories: [{name: a, subcategories: [{name: b, classes: [verb]}]}]": "names 'verb' under classes",
    "categories: [{name: a, subcategories: [{name: b, patterns: ['(']}]}]": "no regular expression",
    "categories: [{name: a, subcategories: [{name: b, words: x}]}]": "must be a list",
    "categories: [{name: a, subcategories: [{name: b}, {name: b}]}]": "two subcategories of one name",
    "categories: [{name: a, subcategories: [{name: b}]}, {name: a, subcategories: [{name: b}]}]": "twice",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_taxonomy_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(BadInput, match=BAD[text].replace("(", r"\(")) as caught:
        load_taxonomy(str(tmp_path / "t.yaml"))
    assert str(tmp_path / "t.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_taxonomy_is_used_and_its_edits_are_noticed(planted: Planted, tmp_path: Path) -> None:
    study, _, _ = planted
    before = {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()}
    file = tmp_path / "own.yaml"
    file.write_text("categories: [{name: zorbs, subcategories: [{name: first, patterns: ['zorb[abc]']}]}]")
    categorize(study, replace(CONFIG, taxonomy=str(file), kinds="latent"), Options())
    rows = rows_of(study, "latent")
    assert {f: r["subcategory"] for f, r in rows.items() if r["category"] == "zorbs"} == {"sae.7": "first"}
    assert not (study.path / "categories" / "direction.jsonl").exists()  # of another taxonomy
    categorize(study, replace(CONFIG, kinds="direction"), Options())
    assert (study.path / "categories" / "direction.jsonl").read_bytes() == before["direction.jsonl"]
    file.write_text(file.read_text().replace("first", "edited"))
    categorize(study, replace(CONFIG, taxonomy=str(file), kinds="latent"), Options())
    assert rows_of(study, "latent")["sae.7"]["subcategory"] == "edited"
    categorize(study, CONFIG, Options())
    assert {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()} == before


def test_bad_options_and_missing_stages(planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, _, _ = planted
    for change, said in (
        ({"by": "vote"}, "--by is lexical or judge"),
        ({"by": "judge"}, "--judge-model"),
        ({"map": "tsne"}, "--map is pca or umap"),
        ({"kinds": " "}, "at least one kind"),
        ({"kinds": "circuit"}, "no kind of feature 'circuit'"),
        ({"enough": 0}, "at least 1"),
        ({"taxonomy": str(tmp_path / "none.yaml")}, "Cannot read the taxonomy"),
    ):
        with pytest.raises(BadInput, match=said):
            categorize(study, replace(CONFIG, **change), Options())
    path = study.path / "explanations" / "latent.jsonl"
    path.rename(tmp_path / "kept")
    with pytest.raises(MissingStage, match=r"lorascope explain .* --kinds latent"):
        categorize(study, CONFIG, Options())
    (tmp_path / "kept").rename(path)
    assert main(["categorize", str(study.path), "--corpus", "other"]) == 2
    assert "lorascope record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "module", "said"),
    [
        (["--map", "umap"], "umap", "--map umap needs the umap-learn package: pip install umap-learn."),
        (
            ["--embed", "some/model"],
            "sentence_transformers",
            "--embed needs the sentence-transformers package: pip install sentence-transformers.",
        ),
    ],
)
def test_extras_that_are_not_installed_are_named(
    planted: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: list[str],
    module: str,
    said: str,
) -> None:
    study, _, _ = planted
    before = {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()}
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["categorize", str(study.path), *option]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lorascope: {said}"
    assert {p.name: p.read_bytes() for p in (study.path / "categories").iterdir()} == before


def test_groups_of_a_judge_that_names_only_the_category() -> None:
    taxonomy = load_taxonomy(None)
    rng = np.random.default_rng(0)
    assigned = assign_by_words(["a"], make_bags([([], [], [])]), taxonomy, rng)
    groups, group_F = make_groups(
        [*assigned, replace(assigned[0], category="result formulation", outcome=ASSIGNED)], taxonomy
    )
    assert [groups[g] for g in group_F] == [("nothing to go by", None), ("result formulation", None)]
