"""Live in a browser: a slider turns the text; what is asked for is in the address; where runs part is marked."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from live_study import make_live_study
from lorascope import steering
from lorascope.study import Study
from planted_model import WRITER, WRITES
from report_study import make_report_study
from studio_hands import goes_sideways, slider_of
from studio_server import studio_at
from test_steering_stage import PROMPT


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_live_study(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def test_a_slider_changes_the_text(base: str, browser: Browser) -> None:
    page = browser.new_page()
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(base + "/feature/L1.down%2B")
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
    slider_of(page, WRITER).press("End")
    page.locator("#go").click()
    expect(page.locator(".run-steered .facts")).to_contain_text("parts at token 1", timeout=60_000)
    assert page.locator(".run-steered .output").inner_text().replace("\u00a0", " ").count(WRITES) >= 6
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


def test_what_is_asked_for_is_in_the_address(base: str, browser: Browser) -> None:
    page = browser.new_page()
    asked = (  # with an amount beyond the slider's ends
        "features=L1.down%2B,L0.gate%2B&moves=add:12.5,watch&runs=plain,steered&seed=7&tokens=4&prompt=%0Abalan%0Akepor"
    )
    page.goto(f"{base}/live?{asked}")

    def shown() -> dict[str, Any]:
        values = {name: page.locator(f"#{name}").input_value() for name in ("prompt", "seed", "tokens", "where")}
        runs = page.locator('[name="run"]:checked').evaluate_all("ticks => ticks.map(tick => tick.value)")
        names = page.locator("#moves a").all_inner_texts()
        modes = page.locator("#moves select").evaluate_all("modes => modes.map(mode => mode.value)")
        return values | {"runs": runs, "modes": modes, "names": names}

    first = shown()
    assert first["prompt"] == "\nbalan\nkepor"
    assert (first["seed"], first["tokens"], first["where"]) == ("7", "4", "generated")
    assert (first["runs"], first["modes"]) == (["plain", "steered"], ["add", "watch"])
    assert page.locator('#moves input[type="number"]').first.input_value() == "12.5"
    page.locator("#seed").fill("9")
    page.locator("#where").select_option("all")
    page.locator("#moves select").last.select_option("off")
    page.wait_for_url("**moves=add%3A12.5%2Coff**")
    page.wait_for_url("**seed=9**")
    second = shown()
    page.reload()
    assert shown() == second
    assert (second["seed"], second["where"], second["modes"]) == ("9", "all", ["add", "off"])
    page.locator("#prompt").fill("x" * 3000)
    expect(page.locator("#unshared")).to_be_visible()
    given = parse_qs(urlsplit(page.url).query)
    assert "prompt" not in given
    assert given["features"] == ["L1.down+,L0.gate+"]
    page.locator("#prompt").fill("short")
    expect(page.locator("#unshared")).to_be_hidden()
    page.wait_for_url("**prompt=short")
    page.close()


def test_a_second_window_waits_and_may_stop_the_first(base: str, browser: Browser) -> None:
    pages = [browser.new_page() for _ in range(2)]
    for page, prompt, tokens in zip(pages, ("balan kepor", "monim ridok"), (2000, 3), strict=True):
        page.goto(f"{base}/live?prompt={prompt}&tokens={tokens}")
        page.locator("#go").click()
        expect(page.locator("#stop")).to_be_enabled()
    first, second = pages
    expect(first.locator(".run-plain .output span").first).to_be_visible(timeout=60_000)
    expect(second.locator("#said")).to_have_text("1 before this one")
    for page in pages:
        rows = page.locator("#queue p")
        expect(rows).to_have_text(["running: “balan kepor” Stop", "waiting: “monim ridok” Stop"], timeout=15_000)
        assert not goes_sideways(page)
    assert second.locator(".run-plain").count() == 0
    second.locator("#queue p").filter(has_text="running").get_by_role("button", name="Stop").click()
    expect(first.locator("#said")).to_have_text("Stopped.", timeout=60_000)
    expect(second.locator("#said")).to_contain_text("Done", timeout=60_000)
    expect(second.locator(".run-plain .facts")).to_contain_text("3 tokens")
    for page in pages:
        expect(page.locator("#queue p")).to_have_count(0)
        page.close()


def test_the_loading_of_the_model_is_shown_while_it_goes_on(
    study: Study, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loaded = steering.open_bench, threading.Event()

    def open_slowly(*given: Any, **more: Any) -> Any:
        loaded.wait(60)
        return real(*given, **more)

    monkeypatch.setattr(steering, "open_bench", open_slowly)
    with studio_at(study) as address:
        page = browser.new_page()
        page.goto(f"{address}/live?prompt=balan&tokens=3")
        bar, said = page.get_by_role("progressbar", name="Loading the model"), page.locator("#said")
        expect(bar).to_be_visible()
        loading = re.compile(r"^Loading .*model: [1-9]\d* s$")
        expect(said).to_have_text(loading)
        page.locator("#go").click()
        expect(said).to_have_text("Asking…")
        expect(said).to_have_text(loading)
        expect(bar).to_be_visible()
        loaded.set()
        expect(said).to_contain_text("Done", timeout=60_000)
        expect(bar).to_be_hidden()
        page.reload()
        expect(said).to_have_text("The model is loaded.")
        expect(bar).to_be_hidden()
        page.close()


def answered(page: Page, events: list[dict[str, Any]]) -> None:
    """Have the page generate, with these events for an answer."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in [{"event": "queued", "id": "1", "before": 0}, *events])
    page.unroute("**/live/generate")
    page.route("**/live/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.locator("#go").click()
    expect(page.locator("#go")).to_be_enabled()


def token(run: str, number: int, activation: float | None = 0.0, text: str = " a", shown: str = "") -> dict[str, Any]:
    about = {"event": "token", "run": run, "token_id": number, "text": text, "shown": shown or text, "end": False}
    return about | {"activations": {"L1.down+": activation}}


def start(level: float | None = 1.0, scale: float | None = None) -> dict[str, Any]:
    runs = {name: name for name in ("plain", "steered", "base")}
    return {"event": "start", "runs": runs, "scales": {"L1.down+": scale}, "levels": {"L1.down+": level}}


def done(**ended: bool) -> dict[str, Any]:
    return {"event": "done", "stopped": False, "ended": ended, "tokens_per_second": 5.0}


def test_where_runs_part_is_marked_to_the_end(base: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{base}/live?features=L1.down%2B&prompt=x")
    runs = {"plain": [1, 2, 3, 4], "steered": [1, 2], "base": [1, 9, 3, 8]}
    tokens = [token(run, ids[i]) for i in range(4) for run, ids in runs.items() if i < len(ids)]
    answered(page, [start(), *tokens, done(plain=False, steered=True, base=False)])
    expect(page.locator(".run-steered .facts")).to_have_text("2 tokens, ended by the model; parts at token 2")
    assert page.locator(".run-steered .output").evaluate("box => box.lastChild.className") == "parts"
    expect(page.locator(".run-base .facts")).to_have_text("4 tokens, cut at the limit; parts at token 1")
    marks = page.locator(".run-base .output span").evaluate_all("s => s.map(t => t.classList.contains('differs'))")
    assert marks == [False, True, False, True]
    assert page.locator(".run-base .parts").count() == 1
    same = [token(run, number) for number in (1, 2) for run in runs]
    answered(page, [start(), *same, done(plain=True, steered=True, base=False)])
    expect(page.locator(".run-steered .facts")).to_have_text("2 tokens, ended by the model; the same as unsteered")
    longer = [*same, token("steered", 3)]
    answered(page, [start(), *longer, done(plain=True, steered=False, base=True)])
    expect(page.locator(".run-steered .facts")).to_have_text("3 tokens, cut at the limit; parts at token 2")
    assert page.locator(".run-steered .differs").count() == 1
    answered(page, [start(), *same])
    expect(page.locator("#said")).to_contain_text("broke off")
    output = page.locator(".run-steered .output")
    expect(output).to_have_attribute("aria-label", "steered; arrow keys tell activations")
    page.goto(f"{base}/live?prompt=x")
    unwatched = [one | {"activations": {}} for one in same]
    answered(page, [start(), *unwatched, done(plain=True, steered=True, base=True)])
    expect(output).to_have_attribute("aria-label", "steered")
    page.close()


def test_shades_follow_the_scale_and_firings_are_underlined(base: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{base}/live?features=L1.down%2B&prompt=x")
    tokens = [token("plain", 1, 1.0), token("plain", 2, 10.0, " ", "·"), token("plain", 3, None)]
    answered(page, [start(level=2.0), *tokens, done(plain=False)])
    spans = page.locator(".run-plain .output span")
    classes = spans.evaluate_all("spans => spans.map(span => [...span.classList].sort())")
    assert classes == [["h1"], ["f", "h9"], []], "the first was the strongest until the second came"
    assert spans.all_inner_texts()[1] == "·"
    answered(page, [start(level=None, scale=20.0), *tokens, done(plain=False)])
    classes = spans.evaluate_all("spans => spans.map(span => [...span.classList].sort())")
    assert classes == [["h1"], ["h5"], []], "without a level nobody knows what fires"
    page.close()


def test_a_name_is_taken_when_it_is_chosen_or_entered(browser: Browser, tmp_path: Path) -> None:
    """Typing sae.17 passes sae.1, which is a suggestion by then."""
    with studio_at(make_report_study(tmp_path / "study", layers=2, traces=12)) as address:
        page = browser.new_page()
        page.goto(address + "/live")
        page.locator("#add").press_sequentially("sae.1")
        expect(page.locator('#suggested option[value="sae.1"]')).to_be_attached()
        page.locator("#add").press_sequentially("7")
        assert page.locator("#moves li").count() == 0
        page.locator("#add").press("Enter")
        expect(page.locator("#moves li a")).to_have_text("sae.17")
        page.locator("#add").press_sequentially("sae.")
        expect(page.locator('#suggested option[value="sae.2"]')).to_be_attached()
        page.locator("#add").evaluate("""box => {
            box.value = 'sae.2';
            box.dispatchEvent(new InputEvent('input', { inputType: 'insertReplacementText', bubbles: true }));
        }""")
        expect(page.locator("#moves li a").last).to_have_text("sae.2")
        first = page.request.get(address + "/features.json?size=12&q=fires").json()["rows"][0]["id"]
        page.locator("#add").fill("fires")
        page.locator("#add").press("Enter")
        expect(page.locator("#moves li a").last).to_have_text(first.replace("-", "−"))
        for nothing in ("L99.gate+", "no such words"):
            page.locator("#add").fill(nothing)
            page.locator("#add").press("Enter")
            expect(page.locator("#toast")).to_have_text(f"No such feature: {nothing}")
        expect(page.locator("#moves li")).to_have_count(3)
        page.close()


def test_the_steered_feature_is_shown_and_strips_have_their_scale(base: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{base}/live?features=L9.q%2B,L0.gate%2B,L1.down%2B&moves=off,watch,add:1&runs=plain,steered&prompt=x")
    names = {"L0.gate+": 0.0, "L1.down+": 3.0}
    tokens = [token("plain", 1) | {"activations": names}, token("steered", 2) | {"activations": names}]
    about = start() | {"scales": dict.fromkeys(names), "levels": dict.fromkeys(names, 1.0)}
    answered(page, [about, *tokens, done(plain=False, steered=False)])
    assert page.locator("#moves select").evaluate_all("s => s.map((mode) => mode.value)") == ["watch", "add"]
    assert page.locator("#colour").input_value() == "L1.down+"
    scales = page.locator(".run-plain .live-strip .scale")
    expect(scales).to_have_text(["does not fire", "largest 3.00, scale to 3.00"])
    hues = page.locator(".run-plain .strip").evaluate_all("s => s.map((svg) => svg.classList[1])")
    assert hues == ["hue0", "hue2"]
    expect(page.locator(".run-plain .output")).to_have_class("whole tokens output hue2")
    both = page.locator(".run-steered .f.differs").evaluate(
        "t => [getComputedStyle(t).borderTopStyle, getComputedStyle(t).textDecorationLine]"
    )
    assert both == ["dotted", "underline"]
    page.locator("#colour").select_option("L0.gate+")
    answered(page, [about, *tokens, done(plain=False, steered=False)])
    assert page.locator("#colour").input_value() == "L0.gate+", "what was chosen by hand stays"
    page.close()
