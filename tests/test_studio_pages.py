"""Pages of the studio: what is ranked and filtered, classes, comparison, effects measured when they are missing."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from lorascope.config import Options
from lorascope.errors import RunFailed
from lorascope.explain import ExplainConfig
from lorascope.report.grids import decoder_map
from lorascope.report.marks import score_pair, share_bar
from lorascope.store import Store, store_folder
from lorascope.studio import measuring
from lorascope.studio.app import make_app
from lorascope.studio.notes import FILE, append_events, read_events
from lorascope.studio.pages import JSON_ONLY, PAGES
from lorascope.study import Study, write_json
from lorascope.views.control_scores import control_means
from lorascope.views.effects import CACHE, direction_effects
from lorascope.views.maps import class_grid, score_grid
from report_study import FLOOR, make_report_study

GATE = quote("L1.gate+", safe="")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("pages") / "study")
    direction_effects(study, "train")
    direction_effects(study, "heldout")
    return study


@pytest.fixture
def copy(study: Study, tmp_path: Path) -> Study:
    return Study(Path(shutil.copytree(study.path, tmp_path / "copy")))


def client_of(study: Study) -> TestClient:
    return TestClient(make_app(study, Options()), raise_server_exceptions=False)


def ids(client: TestClient, query: str) -> list[str]:
    return [row["id"] for row in client.get(f"/features.json?size=500&{query}").json()["rows"]]


def add_judge(study: Study) -> None:
    """A judge who classified three features and explained one of them."""
    said = {"L1.gate+": (0, "the zebra at the end"), "L2.down+": (2, None), "L2.down-": (1, None)}
    rows = [
        {"feature": name, "explainer": "judge:small", "text": text, "rule": None, "reason": None, "scored": None}
        | {"class": {"class": number, "reason": f"because {number}", "failure": None}, "corpus": "heldout"}
        for name, (number, text) in said.items()
    ]
    with (study.path / "explanations" / "direction.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_classes_stand_on_the_map_in_the_table_and_on_the_page(copy: Study) -> None:
    add_judge(copy)
    client = client_of(copy)
    view = client.get("/map.json").json()["map"]
    grid = next(grid for grid in view["grids"] if grid["key"] == "class")
    assert grid["values"][view["types"].index("gate")][1] == 0
    assert grid["values"][view["types"].index("down")][2] == 1, "the more specific polarity"
    assert sum(value is not None for line in grid["values"] for value in line) == 2
    assert grid["notes"]["L2.down"] == "+ 2 polysemantic; − 1 broad or noisy but consistent"
    html = client.get("/map").text
    assert html.count('class="incell"') == 2
    assert ids(client, "class=0") == ["L1.gate+"]
    assert set(ids(client, "class=1") + ids(client, "class=2")) == {"L2.down+", "L2.down-"}
    page = client.get(f"/feature/{GATE}").text
    assert "Class 0: specific and monosemantic (because 0)" in page
    assert "L1.gate+" in ids(client, "q=zebra"), "all explainers' texts are searched"


def test_without_a_judge_the_map_of_classes_says_what_to_run(study: Study) -> None:
    grids = {grid["key"]: grid for grid in client_of(study).get("/map.json").json()["map"]["grids"]}
    assert "--explainer judge" in grids["class"]["missing"]["run"]


def test_the_shown_direction_of_a_cell_is_the_best_explained_one(study: Study) -> None:
    map_ = {"layers": [0], "types": ["q"]}
    rows = [
        {"kind": "direction", "address": f"L0.q#{i}", "polarity": "+", "detection": score, "class": number}
        for i, (score, number) in enumerate(((0.6, 2), (0.9, 0)))
    ]
    scores, classes = score_grid(study, map_, rows), class_grid(study, map_, rows)
    assert (scores["values"], scores["address"]) == ([[0.9]], [["L0.q#1"]])
    assert (classes["values"], classes["address"]) == ([[0]], [["L0.q#1"]])


def test_what_lies_under_the_floor_is_not_ranked(study: Study) -> None:
    client = client_of(study)
    for order in ("falling", "rising"):
        rows = client.get(f"/features.json?kind=direction&sort=kl&order={order}&size=500").json()["rows"]
        under = [row["kl_under_floor"] for row in rows]
        assert under == sorted(under), "all after those that are ranked"
        ranked = [row["kl"] for row in rows if not row["kl_under_floor"]]
        assert ranked == sorted(ranked, reverse=order == "falling")
        last = [row["id"] for row in rows if row["kl_under_floor"]]
        assert last == [name for name in ids(client, "kind=direction&layer=0") if name in last], "the adapter's order"
    leaders = client.get("/overview.json").json()["leaders"]
    names = [row["id"] for row in leaders["direction"]["rows"]]
    assert names[0] == "L1.gate+"
    assert len(names) == 8
    assert not any(name.startswith("L0.") for name in names)
    assert len(leaders["latent"]["rows"]) == 8


def test_the_overview_lists_and_links_without_a_script(study: Study) -> None:
    html = client_of(study).get("/").text
    begin = html[html.index('id="begin"') :]
    assert f'<a href="/feature/{GATE}">L1.gate+</a>' in begin
    stands_out = html[html.index('class="standout"') : html.index('id="begin"')]
    assert f'<a href="/feature/{GATE}">Direction whose absence changes the model most: L1.gate' in stands_out
    assert '<a href="/features?kind=direction&amp;type=' in stands_out
    assert '<a href="/features?kind=direction&amp;layer=' in stands_out
    assert ">writes " in begin


def test_parts_that_the_report_has_too_speak_of_the_studio(study: Study) -> None:
    client = client_of(study)
    assert "This file" not in client.get("/evidence").text
    assert 'href="#map"' not in client.get("/categories").text
    page = client.get("/map").text
    assert "KL beyond the sum" not in page  # nothing was screened
    assert ">nats per token, 95% interval</th>" in page


def test_screened_and_exact_are_told_apart(copy: Study) -> None:
    folder = copy.path / "ablation"
    rows = pq.read_table(folder / "exact-direction.parquet").to_pylist()
    whole = [row for row in rows if row["segment"] == "all"]
    pq.write_table(pa.Table.from_pylist(whole), folder / "screen-direction.parquet")
    confirmed = [row for row in rows if row["target"] == "L1.gate"]
    pq.write_table(pa.Table.from_pylist(confirmed), folder / "confirmed-direction.parquet")
    (folder / "exact-direction.parquet").unlink()
    write_json(folder / "screen.json", {"kl": FLOOR, "runs": {}})
    client = client_of(copy)
    found = {row["id"]: row["kl_method"] for row in client.get("/features.json?kind=direction&size=500").json()["rows"]}
    assert found["L1.gate+"] == found["L1.gate-"] == "exact"
    assert set(found.values()) == {"exact", "screen"}
    assert "nats per token, exact" in client.get(f"/feature/{GATE}").text
    assert "nats per token, screened" in client.get("/feature/L3.up%2B").text
    assert "nats per token, screened, <b>under the noise floor</b>" in client.get("/feature/L0.q%2B").text
    grid = next(grid for grid in client.get("/map.json").json()["map"]["grids"] if grid["key"] == "kl")
    assert "exact for the 1 that were confirmed" in grid["caption"]
    assert (grid["notes"]["L1.gate"], grid["notes"]["L3.up"]) == ("exact", "screened")


def test_filters_and_unknown_ones(study: Study) -> None:
    client = client_of(study)
    rows = {row["id"]: row for row in client.get("/features.json?size=500").json()["rows"]}
    explained, rest = ids(client, "explained=yes"), ids(client, "explained=no")
    assert explained
    assert sorted(explained + rest) == sorted(rows)
    assert all(rows[name]["text"] for name in explained)
    assert not any(rows[name]["text"] for name in rest)
    assert ids(client, "few=yes") == [name for name, row in rows.items() if row["too_few"]]
    category = next(row["category"] for row in rows.values() if row["category"])
    wanted = [name for name, row in rows.items() if row["category"] == category]
    assert ids(client, f"category={quote(category)}") == wanted
    assert {name.split(".")[1][:-1] for name in ids(client, "type=attn")} == {"q", "k", "v", "o"}
    for wrong, said in (
        *(("colour=red", "colour"), ("explained=maybe", "yes, no"), ("class=3", "0, 1, 2"), ("kind=latents", "latent")),
        *(("type=gates", "gate"), ("layer=99", "0, 1, 2"), ("category=none", category), ("only=stars", "starred")),
    ):
        answer = client.get(f"/features.json?{wrong}")
        assert answer.status_code == 400, wrong
        assert said in answer.json()["error"]


def test_an_address_that_makes_no_sense_is_refused_in_words(study: Study) -> None:
    client = client_of(study)
    for page in (*PAGES, *JSON_ONLY):
        twin = page.json_path.replace("{feature}", "sae.0").replace("{corpus}/{index}", "train/0")
        answer = client.get(f"{twin.replace('{position}', '0')}?corpsu=heldout")
        assert answer.status_code == 400, twin
        assert "corpsu" in answer.json()["error"]
    for wrong, said in (
        *(("/live?runs=plain,twice", "twice"), ("/live?where=here", "generated"), ("/live?seed=x", "seed")),
        *(("/feature/sae.0?all=yes", "all is one of 1"), ("/map?corpus=none", "none"), ("/traces?page=x", "number")),
    ):
        answer = client.get(wrong)
        assert answer.status_code == 400, wrong
        assert said in answer.text
        assert "Not understood" in answer.text


def test_the_table_says_of_which_feature_a_note_is(copy: Study) -> None:
    client = client_of(copy)
    for feature in ("L2.down+", "L2.up+"):
        client.post("/notes", json={"place": f"feature:{feature}", "field": "label", "value": "mine"})
    events = read_events(copy.path / FILE)[0]
    append_events(copy.path / FILE, [events[0] | {"id": "old", "field": "star", "value": True, "about": "another one"}])
    found = client.get("/features.json?q=mine").json()
    assert found["notes"]["L2.down+"]["moved"] == "an earlier adapter's direction"
    assert found["notes"]["L2.up+"]["moved"] == ""
    assert client.get("/features?q=mine").text.count("an earlier adapter&#39;s direction") == 1


def test_the_adapters_order_can_be_reversed(study: Study) -> None:
    client = client_of(study)
    assert ids(client, "size=500&order=rising") == ids(client, "size=500")[::-1]


def test_a_tag_that_no_note_has(copy: Study) -> None:
    client = client_of(copy)
    assert "No notes yet" in client.get("/notes?tag=zzz").text
    client.post("/notes", json={"place": "study", "field": "tag:verb", "value": True})
    html = client.get("/notes?tag=zzz").text
    assert "No note has the tag zzz" in html
    assert "No notes yet" not in html


def test_features_by_tag(copy: Study) -> None:
    client = client_of(copy)
    for place in ("feature:L2.down+", "feature:sae.3", "trace:train:0"):
        client.post("/notes", json={"place": place, "field": "tag:verb", "value": True})
    client.post("/notes", json={"place": "feature:sae.3", "field": "star", "value": True})
    assert ids(client, "tag=verb") == ["L2.down+", "sae.3"]
    assert ids(client, "tag=verb&only=starred") == ["sae.3"]
    assert "<option selected>verb</option>" in client.get("/features?tag=verb").text


def test_one_unknown_feature_leaves_the_comparison_of_the_others(study: Study) -> None:
    client = client_of(study)
    names = quote("L1.gate+,L99.q+,base.L1.gate+,sae.1", safe="")
    answer = client.get(f"/compare?features={names}")
    assert answer.status_code == 200
    assert "There is no feature &#39;L99.q+&#39;" in answer.text
    assert "lorascope record" in answer.text
    twin = client.get(f"/compare.json?features={names}").json()
    assert [page["available"] for page in twin["pages"]] == [True, False, False, True]


def wait(client: TestClient, corpus: str = "train") -> dict[str, Any]:
    """The last word of a measurement."""
    for _ in range(200):
        found: dict[str, Any] = client.get(f"/measured.json?corpus={corpus}").json()
        if not found["running"]:
            break
        time.sleep(0.05)
    return found


def test_effects_are_measured_once_in_the_background(copy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy.path / CACHE)
    go, calls = threading.Event(), []

    def slow(study: Study, corpus: str) -> Any:
        calls.append(corpus)
        assert go.wait(30)
        return direction_effects(study, corpus)

    monkeypatch.setattr(measuring, "direction_effects", slow)
    client = client_of(copy)
    assert client.get(f"/feature/{GATE}.json").json()["sides"][0]["typical"] >= 0
    assert calls == [], "a feature's page needs no reading of a whole store"
    for corpus in ("train", "heldout"):
        for _ in range(3):
            html = client.get(f"/map?corpus={corpus}").text
            assert "data-measuring" in html
            assert "is being read for this map" in html
    assert sorted(calls) == ["heldout", "train"]
    go.set()
    for corpus in ("train", "heldout"):
        assert wait(client, corpus) == {"running": False, "trouble": None}
        grids = {grid["key"]: grid for grid in client.get(f"/map.json?corpus={corpus}").json()["map"]["grids"]}
        assert grids["effect"]["available"]
        assert "data-measuring" not in client.get(f"/map?corpus={corpus}").text
    assert len(calls) == 2


def test_a_measurement_that_fails_says_why(copy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(study: Study, corpus: str) -> Any:
        raise RunFailed("shard-0 is damaged; record this corpus again.")

    shutil.rmtree(copy.path / CACHE)
    monkeypatch.setattr(measuring, "direction_effects", broken)
    client = client_of(copy)
    client.get("/map")
    assert wait(client)["trouble"] == "shard-0 is damaged; record this corpus again."
    html = client.get("/map").text
    assert "shard-0 is damaged" in html
    assert "data-measuring" not in html


def test_links_keep_the_corpus(study: Study) -> None:
    client = client_of(study)
    html = client.get("/map?corpus=heldout").text
    assert '<a href="/map?corpus=heldout" aria-current="true">' in html
    assert '<section id="map" data-corpus="heldout">' in html
    assert "/features?kind=direction&amp;type=attn&amp;corpus=heldout" in html
    assert "/features?kind=direction&amp;layer=2&amp;corpus=heldout" in html
    assert '&amp;corpus=heldout">side by side' in client.get(f"/feature/{GATE}?corpus=heldout").text
    assert ids(client, "kind=direction&type=attn&layer=2&corpus=heldout")


def test_a_feature_page_has_densities_and_the_tokens_around(study: Study) -> None:
    side = client_of(study).get(f"/feature/{GATE}.json").json()["sides"][0]
    assert side["around"]["in"][0]["text"] == "."
    assert side["around"]["out"][0]["count"] >= side["around"]["out"][-1]["count"] > 0
    store = Store.open(store_folder(study.path, "train", "adapter"))
    column = store.addresses.index("L1.gate")
    effect_T = np.concatenate([z[:, column] for _, z in store.chunks()]) * store.effect_per_scalar[column]
    fires_T = (effect_T > side["stats"]["level"]) & store.ordinary
    for name, code in (("prompt", 1), ("think", 2), ("answer", 3)):
        here_T = (store.segments == code) & store.ordinary
        assert side["densities"][name] == pytest.approx(fires_T[here_T].sum() / here_T.sum(), abs=1e-6)
    assert "of its tokens" in share_bar({"think": 1.0}, {"think": 0.25})


def test_scores_stand_beside_controls(copy: Study) -> None:
    score = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 40}
    pair = {"own": score, "wrong": score | {"value": 0.5}, "shuffled": score | {"value": 0.45}}
    shown = score_pair("detection", pair)
    assert "wrong 0.50, shuffled 0.45" in shown
    assert "on shuffled firings 0.45" in shown
    result = {
        "n": 3,
        "features": 3,
        "explained": 3,
        "reasons": {},
        "detection": {"mean": 0.61, "low": 0.6, "high": 0.7},
    }
    for stage in ("explain:heldout:base", "explain:heldout:random:judge"):
        copy.run(stage, ExplainConfig(), Options(), inputs=[], outputs=[], work=lambda: result)
    means = control_means(copy)
    assert [(row["explainer"], row["kind"], row["means"]) for row in means] == [
        ("lexical", "base", {"detection": 0.61}),
        ("judge", "random", {"detection": 0.61}),
    ]
    html = client_of(copy).get(f"/feature/{GATE}").text
    assert "Controls by the same explainer, mean detection: base model 0.61.</p>" in html


def test_controls_stand_beside_judges_of_any_name(copy: Study) -> None:
    judges = {"L1.gate+": "judge:it's a & b", "L1.gate-": "judge:IT'S A & B"}
    result = {"n": 3, "features": 3, "explained": 3, "reasons": {}}
    for judge, mean in zip(judges.values(), (0.61, 0.62), strict=True):
        found = result | {"detection": {"mean": mean, "low": 0.6, "high": 0.7}}
        stage = f"explain:heldout:random:{judge}"
        copy.run(stage, ExplainConfig(), Options(), inputs=[], outputs=[], work=lambda found=found: found)
    file = copy.path / "explanations" / "direction.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    (scored,) = (row for row in rows if row["feature"] == "L1.gate+")
    rows = [row for row in rows if row["feature"] not in judges]
    rows += [scored | {"feature": name, "explainer": judge} for name, judge in judges.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    html = client_of(copy).get(f"/feature/{GATE}").text
    for name, mean in (("judge:it&#39;s a &amp; b", 0.61), ("judge:IT&#39;S A &amp; B", 0.62)):
        assert f"Controls by the same explainer ({name}), mean detection: random {mean}.</p>" in html
    assert "scorekey" in html


def test_a_decoder_shows_its_sign_without_colour(study: Study) -> None:
    decoder = {
        "values": [[1.0, -1.0, 0.001]],
        "address": [["L0.q", "L1.q", "L2.q"]],
        "layers": [0, 1, 2],
        "types": ["q"],
    }
    still, live = decoder_map(decoder, "D"), decoder_map(decoder, "D", live=True)
    assert still.count("minusmark") == live.count("minusmark") == 1
    assert "data-a" not in still
    assert live.count("data-a") == 2
    assert 'data-a="L1.q" data-s="−1.00 effect per unit of activation"' in live
    html = client_of(study).get("/feature/sae.0").text
    assert "data-a=" in html


def test_a_trace_brings_its_activations_along(study: Study) -> None:
    client = client_of(study)
    html = client.get(f"/trace/heldout/1?features={GATE},sae.0").text
    data = json.loads(html.partition("data-features='")[2].partition("'")[0])
    twin = client.get(f"/trace/heldout/1.json?features={GATE},sae.0").json()
    assert data == twin["features"]


def test_twins_hold_no_anchors_and_the_matrix_is_apart(study: Study) -> None:
    client = client_of(study)
    for path in ("/evidence.json", "/categories.json"):
        assert '"card-' not in client.get(path).text
    assert "cosines" not in client.get("/map.json").json()["interactions"]
    links = client.get("/categories").text
    assert 'href="#card-L1.gate+"' in links
    assert client.get("/interactions.json").json()["available"] is False
