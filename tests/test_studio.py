"""The studio's server: pages and their JSON twins, search, what is refused, and a study that changes while open."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from lorascope.adapter import Adapter
from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.features import load_features
from lorascope.studio import app, server
from lorascope.studio.app import make_app
from lorascope.studio.guard import BODY_LIMIT, Rules, guarded, rules_for
from lorascope.studio.notes import FILE
from lorascope.studio.pages import PAGES
from lorascope.studio.server import StudioConfig, address_of, bind, serve
from lorascope.study import Study
from lorascope.views.effects import direction_effects
from report_study import HOSTILE, make_report_study

BASE = "http://127.0.0.1:8700"
GATE = quote("L1.gate+", safe="")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("studio") / "study")
    addresses = Adapter.load(study.path / "adapter").addresses
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(8, len(addresses)))
    gradients[:, 1] = -gradients[:, 0]
    kl_NN = (gradients.T @ gradients).astype(np.float32)
    metadata = {"addresses": ",".join(addresses)}
    save_file({"kl_NN": kl_NN}, study.path / "ablation" / "interactions.safetensors", metadata)
    direction_effects(study, "train")  # else a map would measure them while tests copy the study
    return study


def client_of(study: Study, host: str = "127.0.0.1", rules: Rules | None = None) -> TestClient:
    guarded_app = guarded(make_app(study, Options()), rules or rules_for(host))
    return TestClient(guarded_app, base_url=BASE, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(study: Study) -> Iterator[TestClient]:
    with client_of(study) as client:
        yield client


def addresses(features: str = GATE) -> list[tuple[str, str]]:
    """Address of every page and of its twin."""
    filled = {"{feature}": features, "{corpus}": "train", "{index}": "0"}
    found = []
    for page in PAGES:
        path, twin = page.path, page.twin or f"{page.path}.json"
        for name, value in filled.items():
            path, twin = path.replace(name, value), twin.replace(name, value)
        found.append((path, twin))
    return found


@pytest.mark.parametrize(("path", "twin"), addresses())
def test_every_page_has_a_json_twin(client: TestClient, path: str, twin: str) -> None:
    page, value = client.get(path), client.get(twin)
    assert page.status_code == value.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert isinstance(value.json(), dict)
    assert "NaN" not in value.text


@pytest.mark.parametrize(("path", "twin"), addresses())
def test_an_empty_study_says_what_to_run(tmp_path: Path, path: str, twin: str) -> None:
    client = client_of(Study.create(tmp_path / "study", model="tiny", system=""))
    page = client.get(path)
    assert page.status_code in (200, 404)
    if path not in ("/notes", "/compare", "/trace/train/0"):
        assert "lorascope " in page.text
        assert str(tmp_path) in page.text


def test_search_filters_sorts_and_pages(client: TestClient, study: Study) -> None:
    def ids(query: str) -> list[str]:
        return [row["id"] for row in client.get(f"/features.json?{query}").json()["rows"]]

    everything = client.get("/features.json?size=500").json()
    assert everything["found"] == everything["total"] == len(everything["rows"])
    assert len({row["id"] for row in everything["rows"]}) == everything["total"]
    stop = next(row for row in everything["rows"] if row["id"] == "L1.gate+")
    assert "." in stop["tokens"]
    assert "L1.gate+" in ids("q=l1.gate")
    assert ids("q=zzzz-nothing") == []
    word = stop["text"].split()[-1].lower()
    assert "L1.gate+" in ids(f"q={quote(word)}&size=500")
    assert all(name.startswith("sae.") for name in ids("kind=latent"))
    assert all(".gate" in name for name in ids("type=gate"))
    assert all(name.startswith("L2.") for name in ids("layer=2"))
    kls = [row["kl"] for row in client.get("/features.json?sort=kl&size=500").json()["rows"]]
    known = [kl for kl in kls if kl is not None]
    assert known == sorted(known, reverse=True)
    assert kls[: len(known)] == known, "features without a KL come last"
    assert ids("sort=kl&size=1")[0].startswith("L1.gate")
    rising = [row["max"] for row in client.get("/features.json?sort=max&order=rising&size=500").json()["rows"]]
    assert rising == sorted(rising)
    first, second = ids("size=10"), ids("size=10&page=2")
    assert first + second == ids("size=20")
    for wrong in ("sort=colour", "order=up", "page=0", "size=0", "size=501", "page=x", f"q={'x' * 201}", "corpus=../x"):
        assert client.get(f"/features.json?{wrong}").status_code == 400, wrong


def test_top_tokens_are_those_of_the_strongest_examples(client: TestClient, study: Study) -> None:
    page = client.get(f"/feature/{GATE}.json?all=1").json()
    peaks = [example["tokens"][example["peak"]] for example in page["sides"][0]["examples"]["top"]]
    rows = client.get("/features.json?size=500").json()["rows"]
    tokens = next(row["tokens"] for row in rows if row["id"] == "L1.gate+")
    assert set(tokens) <= set(peaks)
    assert max(set(peaks), key=peaks.count) == tokens[0]


def test_feature_page_shows_both_polarities_and_what_is_near(client: TestClient, study: Study) -> None:
    page = client.get(f"/feature/{GATE}.json").json()
    assert [side["id"] for side in page["sides"]] == ["L1.gate+", "L1.gate-"]
    assert page["steps"] == {"previous": "L1.o+", "next": "L1.up+"}
    latent = client.get("/feature/sae.0.json").json()
    assert [side["id"] for side in latent["sides"]] == ["sae.0"]
    assert latent["steps"]["previous"] is None
    assert client.get("/feature/L1.gate.json").json()["id"] == "L1.gate+"
    assert client.get("/feature/L99.gate%2B").status_code == 404
    cosines = page["near"]["L1.gate+"]["cosine"]
    modules = {a: m for m in Adapter.load(study.path / "adapter").modules for a in [f"L{m.layer}.{m.type}"]}
    own = modules["L1.gate"].a_RI[0]
    for row in cosines:
        other = modules[row["id"]].a_RI[0]
        assert row["cosine"] == pytest.approx(float(own @ other / own.norm() / other.norm()), abs=1e-5)
        assert row["of"] == "read"


def test_co_activation_equals_counting(client: TestClient, study: Study) -> None:
    """The share of a feature's sampled firings at which another fires, counted from all activations."""
    near = client.get("/feature/sae.0.json").json()["near"]["sae.0"]
    names = [row["id"] for row in client.get("/features.json?kind=latent&sort=n_firing&size=5").json()["rows"]]
    features = load_features(study, "train", "latent")
    acts = features.columns(np.arange(len(features.ids)))
    checked = 0
    for name in [*names, "sae.0"]:
        page = client.get(f"/feature/{name}.json?all=1").json()
        near = page["near"][name]
        sample = [e for where, group in page["sides"][0]["examples"].items() if where != "top" for e in group]
        places = [features.store.offsets[e["trace"]] + e["position"] for e in sample]
        assert near["sampled"] == len(places)
        shares = [row["share"] for row in near["together"]]
        assert shares == sorted(shares, reverse=True)
        for row in near["together"]:
            other = features.ids.index(row["id"])
            assert row["share"] == pytest.approx(float((acts[places, other] > 0).mean()))
            checked += 1
    assert checked > 5


def test_traces_by_several_features_and_what_fires(client: TestClient, study: Study) -> None:
    page = client.get(f"/trace/train/1.json?features={GATE},sae.0").json()
    features = load_features(study, "train", "direction")
    column = features.ids.index("L1.gate+")
    first, stop = features.store.offsets[1:3]
    wanted = features.columns([column])[first:stop, 0]
    assert page["features"][0]["values"] == pytest.approx(wanted.tolist())
    assert page["features"][1]["id"] == "sae.0"
    t = int(wanted.argmax())
    here = client.get(f"/fires/train/1/{t}.json").json()
    assert here["token"] == page["tokens"][t]
    assert "L1.gate+" in [row["id"] for row in here["kinds"]["direction"]["rows"]]
    acts = features.columns(np.arange(len(features.ids)))[first + t]
    levels = json.loads((study.path / "examples" / "levels.json").read_text())["direction"]
    firing = [name for name, value in zip(features.ids, acts, strict=True) if value > levels[name]]
    assert here["kinds"]["direction"]["firing"] == len(firing)
    too_many = ",".join(f"sae.{i}" for i in range(5))
    for wrong in ("/trace/train/9999", "/trace/none/0", "/trace/train/x", "/fires/train/1/99999.json"):
        assert client.get(wrong).status_code == 404, wrong
    assert client.get(f"/trace/train/0?features={too_many}").status_code == 400
    page = client.get("/trace/train/0.json?features=L9.x%2B,sae.0,none").json()
    assert [feature["id"] for feature in page["features"]] == ["sae.0"]
    assert list(page["unknown"]) == ["L9.x+", "none"]
    html = client.get("/trace/train/0?features=L9.x%2B,sae.0,none").text
    assert 'id="trace"' in html
    assert "There is no feature &#39;L9.x+&#39;" in html


def test_traces_are_those_of_a_recorded_corpus(study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    shutil.rmtree(copy.path / "scalars" / "heldout")
    client = client_of(copy)
    assert client.get("/traces.json").json()["corpus"] == "train"
    assert "/traces?corpus=heldout" in client.get("/traces").text
    shutil.rmtree(copy.path / "scalars")
    for address in ("/traces", "/traces?corpus=train"):
        page = client.get(address)
        assert page.status_code == 200
        assert "lorascope record" in page.text
    assert client.get("/traces.json").json()["corpus"] == "heldout"


def test_traces_begin_with_their_questions_and_are_searched(client: TestClient, study: Study) -> None:
    page = client.get("/traces.json?corpus=train").json()
    traces = study.traces("train")
    assert [row["question"] for row in page["rows"]] == [trace.question for trace in traces]
    # the made recording's responses begin with its first tokens, which are template
    assert all(row["text"].startswith(row["question"]) for row in page["rows"])
    words = traces[3].question.split()[2:5]
    found = client.get("/traces.json", params={"corpus": "train", "q": " ".join(words).upper()}).json()
    wanted = [i for i, trace in enumerate(traces) if all(word.lower() in trace.question.lower() for word in words)]
    assert [row["index"] for row in found["rows"]] == wanted
    assert (found["found"], found["total"]) == (len(wanted), len(traces))
    html = client.get("/traces", params={"corpus": "train", "q": "<b>no such words"}).text
    assert "No question has all of these words" in html
    assert "<b>no" not in html


def test_a_map_of_a_recording_that_was_removed_says_what_to_run(study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    assert direction_effects(copy, "train")
    for file in (copy.path / "scalars" / "train" / "adapter").iterdir():
        file.unlink()
    page = client_of(copy).get("/map")
    assert page.status_code == 200
    assert f"lorascope record {copy.path} --corpus train" in page.text


def test_the_map_has_scores_and_interactions(client: TestClient) -> None:
    view = client.get("/map.json").json()
    grids = {grid["key"]: grid for grid in view["map"]["grids"]}
    assert grids["score"]["available"]
    gate = view["map"]["types"].index("gate")
    rows = client.get("/features.json?size=500").json()["rows"]
    best = max(row["detection"] for row in rows if row["address"] == "L1.gate" and row["detection"] is not None)
    assert grids["score"]["values"][gate][1] == best
    page = client.get("/map").text
    assert "KL beyond the sum, nats" in page
    assert "0.5 chance" in page
    assert len(view["latents"]) == 4
    assert f'<a href="/feature/{view["latents"][0]}"' in page
    found = view["interactions"]
    n = len(found["addresses"])
    matrix = client.get("/interactions.json").json()
    assert matrix["addresses"] == found["addresses"]
    codes = np.frombuffer(base64.b64decode(matrix["cosines"]), np.int8).reshape(n, n)
    assert np.all(np.diag(codes) == 127)
    assert codes[0, 1] == -127, "planted: the second direction cancels the first"
    strongest = max(abs(pair["kl"]) for pair in found["pairs"])
    assert abs(found["pairs"][0]["kl"]) == strongest


def test_no_path_reaches_the_file_system(client: TestClient) -> None:
    secret = quote("../../study.json", safe="")
    for path in (
        f"/static/{secret}",
        "/static/app.py",
        "/static/..%2fapp.py",
        f"/trace/{secret}/0",
        "/trace/..%2F..%2Fscalars%2Ftrain/0",
        f"/feature/{secret}",
        f"/feature/base.{secret}",
        f"/features?corpus={secret}",
        f"/feature/{GATE}?corpus=..",
        f"/fires/{secret}/0/0.json",
        f"/traces?corpus={secret}",
        "/study.json",
        "/scalars/train/adapter/plan.json",
    ):
        response = client.get(path)
        assert response.status_code == (400 if "corpus=" in path else 404), path
        assert '"stages"' not in response.text


def test_hostile_text_is_escaped(client: TestClient, study: Study) -> None:
    assert HOSTILE in study.traces("train")[0].thinking
    html = client.get("/trace/train/0").text
    assert "<script>window" not in html
    assert "</textarea><script" not in html
    assert "&lt;" in html
    client.post("/notes", json={"place": "trace:train:0", "field": "text", "value": HOSTILE})
    client.post("/notes", json={"place": "trace:train:0", "field": "label", "value": '"><script>'})
    for path in ("/trace/train/0", "/notes"):
        html = client.get(path).text
        assert "<script>window" not in html
        assert '"><script>' not in html
    (study.path / FILE).unlink()
    html = client.get(f"/features?q={quote(HOSTILE)}").text
    assert "<script>window" not in html


def test_headers_and_policy(client: TestClient) -> None:
    for path in ("/", "/features.json", "/static/studio.js", "/nowhere", "/notes.jsonl"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("path", [path for path, _ in addresses()])
def test_pages_have_nothing_inline_and_fetch_nothing_from_outside(client: TestClient, path: str) -> None:
    html = client.get(path).text
    assert " style=" not in html
    assert "<style" not in html
    assert html.count("<script") == html.count("<script src=") + html.count('<script type="module" src=')
    assert "onclick" not in html
    assert 'src="http' not in html
    assert 'href="http' not in html


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9999"}, 200),
        ({"host": "localhost:9999", "origin": "http://localhost:9999"}, 200),  # through a forwarded port
        ({"host": "localhost:9999", "origin": BASE}, 403),
        ({"host": "[::1]:80"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:8700"}, 421),
        ({"host": "192.168.1.5:8700"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9"}, 403),
        ({"origin": BASE}, 200),
        ({"sec-fetch-site": "cross-site"}, 200),
    ],
)
def test_hosts_and_origins(client: TestClient, headers: dict[str, str], status: int) -> None:
    assert client.get("/state.json", headers=headers).status_code == status
    body = {"place": "study", "field": "text", "value": "x"}
    written = client.post("/notes", json=body, headers=headers).status_code
    assert written == (403 if headers.get("sec-fetch-site") == "cross-site" else status)


def test_only_get_and_post_and_short_bodies(client: TestClient) -> None:
    assert client.put("/notes", json={}).status_code == 405
    assert client.delete("/notes").status_code == 405
    long = {"place": "study", "field": "text", "value": "x" * BODY_LIMIT}
    assert client.post("/notes", json=long).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield b'{"place": "study", "field": "text", "value": "'
        for _ in range(3):
            yield b"x" * (BODY_LIMIT // 2)
        yield b'"}'

    undeclared = client.post("/notes", content=pieces(), headers={"content-type": "application/json"})
    assert undeclared.status_code >= 400
    for wrong in (b"no json", b"[]", b'"text"', b'{"place": 3}'):
        response = client.post("/notes", content=wrong, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]


def test_notes_are_written_searched_merged_and_exported(client: TestClient, study: Study) -> None:
    (study.path / FILE).unlink(missing_ok=True)
    place = "feature:L2.down+"
    for field, value in (("text", "the verb TO BE"), ("star", True), ("tag:verb", True), ("label", "copula")):
        assert client.post("/notes", json={"place": place, "field": field, "value": value}).status_code == 200
    assert [row["id"] for row in client.get("/features.json?q=copula").json()["rows"]] == ["L2.down+"]
    assert [row["id"] for row in client.get("/features.json?only=starred").json()["rows"]] == ["L2.down+"]
    (note,) = client.get("/notes.json").json()["notes"]
    assert (note["text"], note["star"], note["tags"], note["label"]) == ("the verb TO BE", True, ["verb"], "copula")
    exported = client.get("/notes.jsonl").text
    assert len(exported.splitlines()) == 4
    (study.path / FILE).unlink()
    assert client.post("/notes/merge", content=exported).json() == {"added": 4, "known": 0, "unread": 0}
    assert client.get("/notes.jsonl").text == exported
    assert client.get("/notes.json?tag=none").json()["notes"] == []
    (study.path / FILE).unlink()


def test_a_study_made_anew_is_shown_as_such(study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    client = client_of(copy)
    before = client.get("/state.json").json()["state"]
    assert f'data-state="{before}"' in client.get("/").text
    old = client.get("/features.json?size=1").json()["total"]
    shutil.rmtree(copy.path)
    for path in ("/", "/features", "/feature/sae.0", "/trace/train/0.json"):
        response = client.get(path)
        assert response.status_code in (200, 404, 503)
        assert "Traceback" not in response.text
    make_report_study(copy.path, layers=2, traces=12)
    assert client.get("/state.json").json()["state"] != before
    now = client.get("/features.json?size=1").json()["total"]
    assert now < old
    assert client.get("/feature/L3.gate%2B").status_code == 404
    assert client.get("/feature/L1.gate%2B").status_code == 200


def test_another_autoencoder_leaves_no_explanation_of_the_old_ones_latents(study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    client = client_of(copy)
    rows = client.get("/features.json?kind=latent&explained=yes").json()["rows"]
    assert any(row["text"] for row in rows)
    assert "Out of date" not in client.get("/features").text
    weights = load_file(copy.path / "sae" / "sae_weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy.path / "sae" / "sae_weights.safetensors")
    copy.summarise({"sae": {"l0": 1.0}})
    client = client_of(copy)
    assert not any(row["text"] for row in client.get("/features.json?kind=latent").json()["rows"])
    assert any(row["text"] for row in client.get("/features.json?kind=direction").json()["rows"])
    page = client.get("/features").text
    assert "Out of date" in page
    assert "explain:heldout:latent" in page


def test_damage_is_a_sentence(study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    (copy.path / "examples" / "train" / "direction-stats.parquet").write_bytes(b"broken")
    response = client_of(copy).get("/features")
    assert response.status_code == 503
    assert "run its stage again" in response.text


def test_a_study_that_changes_under_a_page_asks_to_reload(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(study: Study, path: Any, query: Any) -> Any:
        study.summarise({"changed": "meanwhile"})
        raise ValueError("shapes do not fit")

    page = replace(next(page for page in PAGES if page.path == "/map"), view=changing)
    monkeypatch.setattr(app, "PAGES", [page])
    client = client_of(study)
    for path in ("/map", "/map.json"):
        response = client.get(path)
        assert response.status_code == 503
        assert "reload" in response.text


def test_ports_and_addresses(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(BadInput, match=f"127.0.0.1:{port}"):
        bind("127.0.0.1", port)
    with pytest.raises(BadInput, match="--port"):
        bind("127.0.0.1", 70000)
    taken.close()
    assert address_of("0.0.0.0", 80) == "http://127.0.0.1:80/"
    assert address_of("::1", 80) == "http://[::1]:80/"
    monkeypatch.setattr(server.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install starlette uvicorn"):
        serve(study, StudioConfig(), Options())


def test_the_command_names_a_missing_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studio", str(tmp_path / "none"), "--no-open"]) == 2
    assert "is not a study" in capsys.readouterr().err


def test_tokens_of_a_map_lead_to_their_traces(client: TestClient) -> None:
    links = re.findall(r'href="(/trace/heldout/\d+)#t\d+"', client.get("/categories").text)
    assert len(links) > 50
    assert client.get(links[0]).status_code == 200
