"""Live: what a request may be; a planted direction turns the text; one generation at a time, stoppable, in a queue."""

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from live_study import drained, make_live_study, strong_amount
from lorascope.adapter import Adapter
from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.steering import stream
from lorascope.studio import live as live_engine
from lorascope.studio import live_routes
from lorascope.studio.app import make_app
from lorascope.studio.guard import guarded, rules_for
from lorascope.studio.live import LONGEST_PROMPT, MOST_WAITING, Job, Live, Request, read_request, sample_prompts
from lorascope.study import Study
from test_steering_stage import FEATURE, PROMPT, WORD

BASE = "http://127.0.0.1:8700"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_live_study(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def client(study: Study) -> Iterator[TestClient]:
    with TestClient(guarded(make_app(study, Options()), rules_for("127.0.0.1")), base_url=BASE) as client:
        yield client


def heard(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The events of one generation."""
    response = client.post("/live/generate", json={"prompt": PROMPT, "max_new_tokens": 8} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part]


def text_of(events: list[dict[str, Any]], run: str) -> list[str]:
    return [event["text"] for event in events if event["event"] == "token" and event["run"] == run]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"prompt": " "},
        {"prompt": "x" * (LONGEST_PROMPT + 1)},
        {"prompt": "x", "runs": ["other"]},
        {"prompt": "x", "runs": []},
        {"prompt": "x", "runs": [[]]},
        {"prompt": "half a character: \ud83e"},
        {"prompt": "x", "runs": ["steered"]},
        {"prompt": "x", "watch": "L0.q+"},
        {"prompt": "x", "watch": [f"sae.{i}" for i in range(9)]},
        {"prompt": "x", "steers": [{"feature": "L0.q+"}]},
        {"prompt": "x", "steers": [{"feature": "L0.q+", "mode": "off"}] * 9},
        {"prompt": "x", "steers": [{"feature": "L0.q+", "mode": "add", "amount": "much"}]},
        {"prompt": "x", "steers": [{"feature": "L0.q+", "mode": "add", "amount": 1e9}]},
        {"prompt": "x", "max_new_tokens": 0},
        {"prompt": "x", "max_new_tokens": 10**6},
        {"prompt": "x", "max_new_tokens": True},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "seed": -1},
    ],
)
def test_requests_are_checked(client: TestClient, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        read_request(wrong)
    headers = {"content-type": "application/json"}
    response = client.post("/live/generate", content=json.dumps(wrong), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]


def test_the_model_is_loaded_only_when_asked(study: Study) -> None:
    with TestClient(guarded(make_app(study, Options()), rules_for("127.0.0.1")), base_url=BASE) as client:
        assert client.get("/live").status_code == 200
        assert client.get("/live/state.json").json()["phase"] == "closed"
        assert client.post("/live/open").json()["phase"] in ("loading", "ready")
        for _ in range(600):
            phase = client.get("/live/state.json").json()["phase"]
            if phase != "loading":
                break
            time.sleep(0.1)
        assert phase == "ready"


def test_a_planted_direction_turns_the_text(client: TestClient, study: Study) -> None:
    steers = [{"feature": FEATURE, "mode": "add", "amount": strong_amount(study)}]
    runs = ["base", "plain", "base_steered", "steered", "control"]
    events = heard(client, runs=runs, steers=steers, watch=["L0.gate+"])
    kinds = [event["event"] for event in events if event["event"] != "waiting"]
    assert kinds[:2] == ["queued", "start"]
    assert kinds[-1] == "done"
    for run in ("steered", "base_steered"):
        assert text_of(events, run)[2:] == [WORD] * 6  # the first two may share a character
    for run in ("plain", "control", "base"):
        assert text_of(events, run)[2:] != [WORD] * 6
    token = next(event for event in events if event["event"] == "token" and event["run"] == "steered")
    assert set(token["activations"]) == {FEATURE, "L0.gate+"}
    runs = [event["run"] for event in events if event["event"] == "token"][:5]
    assert runs == ["plain", "steered", "control", "base", "base_steered"], "the runs go forward together"
    start = next(event for event in events if event["event"] == "start")
    levels = json.loads((study.path / "examples" / "levels.json").read_text())["direction"]
    assert start["levels"] == {name: levels[name] for name in (FEATURE, "L0.gate+")}
    again = heard(client, runs=["steered", "plain"], steers=steers)
    assert text_of(again, "plain") == text_of(events, "plain")


def test_what_the_engine_refuses_is_said(client: TestClient) -> None:
    for steers, words in (
        ([{"feature": "L9.gate+", "mode": "add", "amount": 1}], "There is no feature"),
        ([{"feature": "sae.1", "mode": "add", "amount": 1}], "lorascope sae"),
        ([{"feature": FEATURE, "mode": "push", "amount": 1}], "There is no mode"),
        ([{"feature": FEATURE, "mode": "off"}], "can only be added"),
    ):
        last = heard(client, runs=["base_steered"], steers=steers)[-1]
        assert last["event"] == "failed"
        assert words in last["error"]
    assert heard(client)[-1]["event"] == "done", "the next one is served all the same"


def test_one_at_a_time_stoppable_in_a_queue(study: Study) -> None:
    live = Live(study, Options())
    long = read_request({"prompt": PROMPT, "max_new_tokens": 2048})
    first, second, third = (live.submit(long) for _ in range(3))
    first.events.get(timeout=60)
    shown = live.status()["queue"]
    assert [row["state"] for row in shown] == ["running", "waiting", "waiting"]
    assert [live.place_of(job) for job in (first, second, third)] == [0, 1, 2]
    assert second.events.empty()
    assert live.stop(second.id)
    assert live.stop(first.id)
    assert drained(first)[-1]["stopped"]
    assert live.stop(third.id) or third.stopped.is_set()
    assert not live.stop("nobody")
    quick = live.submit(read_request({"prompt": PROMPT, "max_new_tokens": 2}))
    assert drained(quick)[-1]["event"] == "done"
    assert live.status()["queue"] == []


def test_the_queue_has_an_end(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live(study, Options())
    monkeypatch.setattr(live, "open", lambda: None)  # nothing takes them
    for _ in range(MOST_WAITING):
        live.submit(read_request({"prompt": "x"}))
    with pytest.raises(BadInput, match="Too many"):
        live.submit(read_request({"prompt": "x"}))


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    live = Live(Study.create(tmp_path / "study", model="no-such-model", system=""), Options())
    last = drained(live.submit(read_request({"prompt": "x"})))[-1]
    assert last["event"] == "failed"
    assert "lorascope train" in last["error"]
    assert live.status()["phase"] == "failed"


def test_live_takes_up_stages_that_run_while_it_is_open(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    shutil.rmtree(copy.path / "examples")
    loaded = []
    load = stream.load_model
    monkeypatch.setattr(stream, "load_model", lambda *given, **more: loaded.append(1) or load(*given, **more))
    live = Live(copy, Options())

    def heard(**body: Any) -> list[dict[str, Any]]:
        return drained(live.submit(read_request({"prompt": PROMPT, "max_new_tokens": 2} | body)))

    off = {"runs": ["steered"], "steers": [{"feature": "sae.0", "mode": "off"}]}
    assert "lorascope sae" in heard(**off)[-1]["error"]
    sae = ["sae", str(copy.path), "--k", "3", "--expansion", "2", "--tokens", "20000", "--no-patched"]
    assert main(sae) == 0
    assert heard(**off)[-1]["event"] == "done"
    assert heard(watch=[FEATURE, "sae.0"])[0]["scales"] == {FEATURE: None, "sae.0": None}
    assert main(["examples", str(copy.path)]) == 0
    start = heard(watch=[FEATURE, "sae.0"])[0]
    assert start["scales"][FEATURE] == pytest.approx(200 / strong_amount(copy))
    assert start["levels"]["sae.0"] == 0
    systems = []
    opened = live_engine.open_streams
    monkeypatch.setattr(
        live_engine, "open_streams", lambda bench, asked: systems.append(bench.renderer.system) or opened(bench, asked)
    )
    copy.update_manifest(system="Answer in rhymes.")
    weights = copy.path / "sae" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"broken")
    assert heard()[-1]["event"] == "failed"
    weights.write_bytes(whole)
    assert heard()[-1]["event"] == "done"
    assert systems == ["Answer in rhymes."], "prompts are rendered as the study says by now"
    assert len(loaded) == 1, "none of this is a reason to load the model anew"
    Adapter.load(copy.path / "adapter").save(copy.path / "adapter")
    assert heard()[-1]["event"] == "done"
    assert len(loaded) == 2


def test_a_request_that_breaks_ends_only_itself(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    real = live_engine.open_streams

    def streams(bench: Any, request: Any) -> Any:
        if request.seed == 5:
            raise ValueError("the fifth breaks")
        return real(bench, request)

    monkeypatch.setattr(live_engine, "open_streams", streams)
    live = Live(study, Options())
    jobs = [live.submit(read_request({"prompt": PROMPT, "max_new_tokens": 2, "seed": seed})) for seed in (5, 6)]
    assert drained(jobs[0])[-1] == {"event": "failed", "error": "ValueError: the fifth breaks"}
    assert drained(jobs[1])[-1]["event"] == "done"
    assert live.status()["phase"] == "ready"


def test_a_job_that_comes_while_the_engine_dies_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live(Study.create(tmp_path / "study", model="no-such-model", system=""), Options())
    real, dying, go_on = live.fail, threading.Event(), threading.Event()

    def fail_slowly(event: dict[str, Any]) -> None:
        real(event)
        dying.set()
        go_on.wait(60)

    monkeypatch.setattr(live, "fail", fail_slowly)
    drained(live.submit(read_request({"prompt": "x"})))
    assert dying.wait(60)
    second = live.submit(read_request({"prompt": "x"}))
    assert "lorascope train" in drained(second)[-1]["error"]
    go_on.set()


def test_twelve_open_streams_hold_no_thread(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of twelve waiting pages hears at once, with a single thread for all else that needs one."""
    monkeypatch.setattr(live_routes, "QUIET", 2.0)
    live = Live(study, Options())
    done = {"event": "done", "stopped": False, "ended": {}, "tokens_per_second": math.inf}

    async def listen() -> list[str]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        jobs = [Job(Request("x")) for _ in range(12)]
        streams = [live_routes.server_sent(live, job) for job in jobs]
        for one in streams:
            assert '"queued"' in await anext(one)
        waiting = [asyncio.ensure_future(anext(one)) for one in streams]
        await asyncio.sleep(0.05)
        threading.Thread(target=jobs[-1].say, args=(done,)).start()
        told = [await asyncio.wait_for(waiting[-1], 1.8), *await asyncio.gather(*waiting[:-1])]
        for one in streams:
            await one.aclose()
        return told

    told = asyncio.run(listen())
    assert json.loads(told[0].removeprefix("data: ")) == done | {"tokens_per_second": None}, "infinity is no JSON"
    assert all('"waiting"' in text for text in told[1:]), "a page that waits is told so"


def test_a_feature_that_is_not_there_is_named_and_left_out(client: TestClient) -> None:
    asked = f"/live?features=L99.gate%2B,plus sign,sae.1,neuron.L0.1%2B,{quote(FEATURE)}"
    twin = client.get(asked.replace("/live", "/live.json")).json()
    assert twin["features"] == ["sae.1", FEATURE], "of latents nobody knows before there is an autoencoder"
    assert list(twin["unknown"]) == ["L99.gate+", "plus sign", "neuron.L0.1+"]
    assert "There is no direction or latent &#39;L99.gate+&#39; to watch." in client.get(asked).text


def test_prompts_to_choose_from_are_of_the_corpus_that_is_named(study: Study, tmp_path: Path) -> None:
    assert sample_prompts(study)[0] == "heldout"
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    manifest = copy.manifest
    del manifest["corpora"]["heldout"]
    (copy.path / "study.json").write_text(json.dumps(manifest))
    lines = [{"question": "\n  two\nlines"}, {"question": " "}]
    copy.corpus_file("train").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sample_prompts(copy) == ("train", ["\n  two\nlines"])
    with TestClient(guarded(make_app(copy, Options()), rules_for("127.0.0.1")), base_url=BASE) as client:
        page = client.get("/live").text
    assert '<option value="\n  two\nlines">' in page
    assert 'placeholder="Ask the model something">\n\n  two\nlines</textarea>' in page
    assert "From the traces of train" in page
