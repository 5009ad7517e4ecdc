"""Live: what a request may be; a planted direction turns the text; one generation at a time, stoppable, in a queue."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.studio.app import make_app
from lorascope.studio.guard import guarded, rules_for
from lorascope.studio.live import LONGEST_PROMPT, MOST_WAITING, Job, Live, read_request
from lorascope.study import Study
from planted_model import planted_traces, save_planted
from studio_server import studio_at
from test_steering_stage import FEATURE, PROMPT, WORD, plant_writer

BASE = "http://127.0.0.1:8700"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("live")
    model, adapter = save_planted(folder)
    plant_writer(model, adapter)
    traces = planted_traces(folder / "all.jsonl")
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:40]))
    path = folder / "study"
    new = ["new", "--model", str(model), "--traces", str(traces), "--adapter", str(adapter), "--system", ""]
    for name, *rest in (new, ["record"], ["record", "--corpus", "heldout"], ["examples"]):
        assert main([name, str(path), *rest]) == 0, name
    return Study.open(path)


@pytest.fixture(scope="module")
def client(study: Study) -> Iterator[TestClient]:
    with TestClient(guarded(make_app(study, Options()), rules_for("127.0.0.1")), base_url=BASE) as client:
        yield client


def strong_amount(study: Study) -> float:
    """An amount that makes the planted effect 200, far beyond what else is in the residual stream."""
    table = pq.read_table(study.path / "examples" / "train" / "direction-stats.parquet").to_pydict()
    return 200 / dict(zip(table["feature"], table["p99"], strict=True))[FEATURE]


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
        {"prompt": "x", "runs": ["steered"]},
        {"prompt": "x", "watch": "L0.q+"},
        {"prompt": "x", "watch": [f"sae.{i}" for i in range(9)]},
        {"prompt": "x", "steers": [{"feature": "L0.q+"}]},
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
    response = client.post("/live/generate", json=wrong)
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
    events = heard(client, runs=["base", "plain", "steered", "control"], steers=steers, watch=["L0.gate+"])
    kinds = [event["event"] for event in events if event["event"] != "waiting"]
    assert kinds[:2] == ["queued", "start"]
    assert kinds[-1] == "done"
    assert text_of(events, "steered")[1:] == [WORD] * 7
    for run in ("plain", "control", "base"):
        assert text_of(events, run)[1:] != [WORD] * 7
    token = next(event for event in events if event["event"] == "token" and event["run"] == "steered")
    assert set(token["activations"]) == {FEATURE, "L0.gate+"}
    runs = [event["run"] for event in events if event["event"] == "token"][:4]
    assert runs == ["plain", "steered", "control", "base"], "the runs go forward together"
    again = heard(client, runs=["steered", "plain"], steers=steers)
    assert text_of(again, "plain") == text_of(events, "plain")


def test_what_the_engine_refuses_is_said(client: TestClient) -> None:
    for steers, words in (
        ([{"feature": "L9.gate+", "mode": "add", "amount": 1}], "There is no feature"),
        ([{"feature": "sae.1", "mode": "add", "amount": 1}], "lorascope sae"),
        ([{"feature": FEATURE, "mode": "push", "amount": 1}], "There is no mode"),
    ):
        last = heard(client, runs=["steered"], steers=steers)[-1]
        assert last["event"] == "failed"
        assert words in last["error"]
    assert heard(client)[-1]["event"] == "done", "the next one is served all the same"


def drained(job: Job) -> list[dict[str, Any]]:
    events = []
    for _ in range(300):
        event = job.next_event(0.2)
        if event is not None:
            events.append(event)
            if event["event"] in ("done", "failed"):
                return events
    raise AssertionError("the job never ended")


def test_one_at_a_time_stoppable_in_a_queue(study: Study) -> None:
    live = Live(study, Options())
    long = read_request({"prompt": PROMPT, "max_new_tokens": 2048})
    first, second, third = (live.submit(long) for _ in range(3))
    while first.next_event(0.2) is None:
        pass
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


def test_in_the_browser_a_slider_changes_the_text(study: Study, browser: Browser) -> None:
    with studio_at(study) as address:
        page = browser.new_page()
        trouble: list[str] = []
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(address + "/feature/L1.down%2B")
        page.get_by_role("link", name="watch and steer it live").click()
        page.wait_for_url("**/live?features=**")
        expect(page.locator("#moves li")).to_have_count(1)
        page.locator("#prompt").fill(PROMPT)
        page.locator("#tokens").fill("8")
        page.locator("#go").click()
        expect(page.locator("#said")).to_contain_text("Done", timeout=60_000)
        plain = page.locator(".run-plain .output").inner_text()
        assert plain
        page.locator("#moves select").select_option("add")
        assert page.locator('[name="run"][value="steered"]').is_checked()
        slider = page.locator("#moves input")
        amount = str(round(strong_amount(study)))
        slider.evaluate("(s, v) => { s.max = v; s.value = v; s.dispatchEvent(new Event('input')); }", amount)
        page.locator("#go").click()
        expect(page.locator(".run-steered .facts")).to_contain_text("parts at token 1", timeout=60_000)
        assert page.locator(".run-steered .output").inner_text().count(WORD) >= 6
        assert page.locator(".run-plain .output").inner_text() == plain
        assert page.locator(".run-steered .parts").inner_text() == "≠"
        assert page.locator(".run-steered .live-strip rect").count() == 8
        page.locator("#tokens").fill("2000")
        page.locator("#go").click()
        expect(page.locator("#stop")).to_be_enabled()
        expect(page.locator(".run-plain .output span").first).to_be_visible()
        page.locator("#stop").click()
        expect(page.locator("#said")).to_have_text("Stopped.", timeout=60_000)
        assert trouble == []
