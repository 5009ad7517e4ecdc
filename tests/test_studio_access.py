"""Who gets in: the token and its cookie, ways in by SSH; and requests that must not break or hold up the server."""

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from filelock import FileLock
from starlette.testclient import TestClient

from lorascope.config import Options
from lorascope.studio import app, server
from lorascope.studio.app import make_app
from lorascope.studio.guard import Rules, guarded, rules_for
from lorascope.studio.notes import FILE, LOCK
from lorascope.studio.pages import PAGES
from lorascope.studio.server import StudioConfig, serve, ways_in
from lorascope.study import Study
from studio_server import studio_at
from tiny_store import make_study

BASE = "http://127.0.0.1:8700"
BODY = {"place": "study", "field": "text", "value": "x"}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path / "study")


def client_of(study: Study, rules: Rules) -> TestClient:
    app_ = guarded(make_app(study, Options()), rules)
    return TestClient(app_, base_url=BASE, raise_server_exceptions=False, follow_redirects=False)


@pytest.mark.parametrize("rules", [rules_for("0.0.0.0"), rules_for("127.0.0.1", token=True)], ids=["far", "shared"])
def test_nothing_is_read_or_written_without_the_token(study: Study, rules: Rules) -> None:
    client = client_of(study, rules)
    for path in ("/", "/notes", "/notes.jsonl", "/live/state.json", "/static/studio.js", "/?token=wrong", "/?token="):
        for given in ({}, {"x-lorascope-token": "wrong"}, {"cookie": f"{rules.cookie}=wrong"}):
            response = client.get(path, headers=given)
            assert response.status_code == 401, path
            assert "set-cookie" not in response.headers
    for path in ("/notes", "/notes/merge", "/live/open", "/live/generate", "/live/stop"):
        for given in ({}, {"x-lorascope-token": ""}, {"x-lorascope-token": "wrong"}):
            assert client.post(path, json={}, headers=given).status_code == 401
    assert client.post(f"/notes?token={rules.token}", json=BODY).status_code == 401, "an address writes nothing"
    assert client.post("/notes", json=BODY, headers={"x-lorascope-token": str(rules.token)}).status_code == 200


def test_the_token_comes_once_and_stays_as_a_cookie(study: Study) -> None:
    rules = rules_for("0.0.0.0")
    client = client_of(study, rules)
    first = client.get(f"/features?q=a%26b&token={rules.token}")
    assert first.status_code == 303
    assert first.headers["location"] == "/features?q=a%26b"
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert client.get("/notes", headers={"host": "10.0.0.7:8700"}).status_code in (200, 401), "any number of a host"
    assert client.get("/notes", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/notes").status_code == 200
    assert client.post("/notes", json=BODY).status_code == 200
    assert client.post("/notes", json=BODY, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/notes", json=BODY, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert rules.cookie != rules_for("0.0.0.0").cookie, "two studios of one host do not share a cookie"
    assert rules_for("127.0.0.2").token is None


def test_ways_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.socket, "gethostname", lambda: "lab7")
    monkeypatch.setenv("USER", "ann")
    assert ways_in("127.0.0.1", 8700, "", "") == []
    assert ways_in("0.0.0.0", 8701, "?token=t", "") == ["From other machines it is at http://lab7:8701/?token=t"]
    ssh = "10.0.0.9 51000 10.0.0.7 22"
    assert ways_in("127.0.0.1", 8700, "", ssh) == [
        "On your own machine: ssh -N -L 8700:127.0.0.1:8700 ann@10.0.0.7",
        "and there open http://127.0.0.1:8700/",
    ]
    monkeypatch.delenv("USER")
    assert "ssh -N -L 8700:[::1]:8700 10.0.0.7" in ways_in("::1", 8700, "", ssh)[0]


@pytest.mark.parametrize(
    ("connection", "token", "opens"),
    [("", False, True), ("", True, False), ("10.0.0.9 51000 10.0.0.7 22", False, False)],
    ids=["here", "shared", "ssh"],
)
def test_a_browser_is_opened_only_where_nobody_else_looks(
    study: Study,
    connection: str,
    token: bool,
    opens: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("SSH_CONNECTION", connection)
    monkeypatch.setattr(server.webbrowser, "open", opened.append)

    def run(_: Any, sockets: Any) -> None:
        time.sleep(0.8)  # the window opens a little after the start
        for bound in sockets:
            bound.close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    url = serve(study, StudioConfig(token=token), Options())["url"]
    said = capsys.readouterr().err
    assert (f"{url}?token=" in said) == token
    assert ("ssh -N -L" in said) == bool(connection)
    assert opened == ([url] if opens else [])


def test_a_damaged_file_of_notes_is_exported_as_it_is(study: Study) -> None:
    client = client_of(study, rules_for("127.0.0.1"))
    assert client.get("/notes.jsonl").content == b""
    (study.path / FILE).write_bytes(b"caf\xe9\n")
    assert client.get("/notes.jsonl").content == b"caf\xe9\n"
    assert client.get("/notes.json").json()["unread"] == 1
    assert "1 damaged line" in client.get("/notes").text
    refused = client.post("/notes/merge", content=b"")
    assert refused.status_code == 400
    assert "damaged" in refused.json()["error"]


def test_half_a_character_is_refused(study: Study) -> None:
    client = client_of(study, rules_for("127.0.0.1"))
    content = json.dumps(BODY | {"value": "\ud83e"})
    refused = client.post("/notes", content=content, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert "half of a character" in refused.json()["error"]
    assert not (study.path / FILE).exists()


@pytest.mark.parametrize("value", [float("nan"), "\ud83e"], ids=["nan", "surrogate"])
def test_what_json_cannot_hold_is_a_sentence(study: Study, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    page = next(page for page in PAGES if page.path == "/map")
    monkeypatch.setattr(app, "PAGES", [replace(page, view=lambda *_: {"value": value})])
    response = client_of(study, rules_for("127.0.0.1")).get("/map.json")
    assert response.status_code == 500
    assert "traceback" in response.json()["error"]


def test_merging_behind_a_lock_holds_up_no_page(study: Study) -> None:
    with studio_at(study) as address:
        merged: list[bytes] = []

        def merge() -> None:
            request = urllib.request.Request(f"{address}/notes/merge", b"", method="POST")
            with urllib.request.urlopen(request, timeout=30) as response:
                merged.append(response.read())

        with FileLock(study.path / LOCK):
            thread = threading.Thread(target=merge)
            thread.start()
            time.sleep(0.3)
            with urllib.request.urlopen(f"{address}/state.json", timeout=2) as response:
                assert "state" in json.loads(response.read())
            assert not merged
        thread.join(30)
    assert json.loads(merged[0]) == {"added": 0, "known": 0, "unread": 0}
