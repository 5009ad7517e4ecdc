"""One walk through the studio's eight parts, over a study whose truth is planted: L1.down+ fires on " check" and writes
" wait". It is found on the map, lit in its examples and traces, and steering it turns the text."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from live_study import make_planted_study
from lorascope.studio.notes import FILE, current_notes, read_events
from lorascope.study import Study
from lorascope.views.effects import direction_effects
from planted_model import READS, TRIGGERS, WRITER, WRITES
from studio_hands import goes_sideways, notes_on, slider_of
from studio_server import studio_at
from test_studio_browser import opened

FEATURE = "/feature/L1.down%2B"
PROMPT = "balan kepor monim"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_planted_study(tmp_path_factory.mktemp("walk"))
    direction_effects(study, "train")  # else the map would reload once they are measured
    return study


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def words(texts: list[str]) -> set[str]:
    """Tokens as they are shown, without the spaces that lead them."""
    return {text.replace("\u00a0", " ").strip(" ·") for text in texts}


def from_the_overview_to_the_feature(page: Page) -> None:
    """1 and 2: what changes the model most, and its cell on the map."""
    expect(page.locator(".leaders a").first).to_contain_text(WRITER[:-1])
    page.keyboard.press("g")
    page.keyboard.press("m")
    page.wait_for_url("**/map")
    page.get_by_role("tab", name="KL").click()
    page.locator(f'#grid-kl rect[data-a="{WRITER[:-1]}"]').click()
    page.wait_for_url(f"**{FEATURE}")


def the_feature(page: Page) -> None:
    """4: what it fires on, in its explanation and lit in its examples; what follows and what it writes."""
    plus = page.get_by_role("region", name=WRITER, exact=True)
    expect(plus).to_contain_text("fires on")
    assert words(plus.locator(".peak").all_inner_texts()) == {READS.strip()}
    assert plus.locator(".peak").count() >= 8
    lit = plus.locator(".example .tokens:not(.whole) span.f").all_inner_texts()
    assert words(lit) == {READS.strip()}
    assert plus.locator(".example .tokens span.h9").count() > 0, "at its strongest"
    expect(plus.locator(".around")).to_contain_text(READS.strip())
    expect(plus).to_contain_text(WRITES.strip())  # by the lens
    plus.locator(".course").scroll_into_view_if_needed()
    expect(plus.locator(".course rect").first).to_be_attached()


def the_table(page: Page) -> None:
    """3: found by a word of its explanation, the first by KL, beside another."""
    page.keyboard.press("g")
    page.keyboard.press("f")
    page.wait_for_url("**/features")
    page.keyboard.press("/")
    page.keyboard.type(READS.strip())
    page.wait_for_url("**/features?q=check")
    expect(page.locator(f'tr[data-id="{WRITER}"]')).to_be_visible()
    assert page.locator('tr[data-id="L0.gate+"]').count() == 0, "that fires on another word"
    page.locator('[data-sort="kl"]').click()
    expect(page.locator('th[aria-sort="descending"]')).to_contain_text("KL")
    expect(page.locator("tr[data-id]").first).to_have_attribute("data-id", WRITER)
    for name in (WRITER, "L1.gate+"):
        page.get_by_role("checkbox", name=f"Compare {name}").check()
    page.locator("#compare").click()
    page.wait_for_url("**/compare?**")
    sides = page.locator(".side-by-side > section")
    expect(sides).to_have_count(2)
    for k in range(2):
        assert words(sides.nth(k).locator(".peak").all_inner_texts()) == {TRIGGERS["L1.gate+"].strip()}
    sides.first.locator("h2 a").click()
    page.wait_for_url(f"**{FEATURE}")


def the_trace(page: Page) -> None:
    """5: coloured as it fires, from firing to firing, what else fires there, and by several features."""
    page.locator(".example .where a").first.click()
    page.wait_for_url("**/trace/train/**")
    expect(page.locator("#counted")).to_contain_text("fire")
    fires = page.locator("#trace span.f")
    assert words(fires.all_inner_texts()) == {READS.strip()}
    page.get_by_role("button", name="Next firing").click()
    assert words([page.locator("#trace .cursor").inner_text()]) == {READS.strip()}
    here = page.locator("#here")
    for name in (WRITER, "L1.gate+"):
        expect(here.get_by_role("link", name=name, exact=True)).to_be_visible()
    here.get_by_role("button", name="Colour by L1.gate+").click()
    expect(page.locator("#chips li")).to_have_count(2)
    assert words(page.locator("#trace span.on1.on2").all_inner_texts()) == {READS.strip()}


def text_of(page: Page, run: str) -> str:
    return page.locator(f".run-{run} .output").inner_text().replace("\u00a0", " ")


def generated(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#said")).to_contain_text("Done", timeout=60_000)


def live(page: Page, base: str) -> None:
    """6: watched, then steered as far as the slider goes: same seed, another text, and a control."""
    page.goto(base + FEATURE)
    page.get_by_role("link", name="watch and steer it live").click()
    page.wait_for_url("**/live?features=**")
    page.locator("#prompt").fill(PROMPT)
    page.locator("#tokens").fill("8")
    generated(page)
    plain = text_of(page, "plain")
    assert WRITES not in plain
    expect(page.locator(".run-plain .live-strip")).to_contain_text(WRITER)
    page.get_by_role("combobox", name=f"What to do to {WRITER}").select_option("add")
    for name in ("steered", "control"):
        tick = page.locator(f'[name="run"][value="{name}"]')
        tick.check()
    slider = slider_of(page, WRITER)
    slider.focus()
    slider.press("End")
    assert slider.input_value() == slider.get_attribute("max") == "8"
    generated(page)
    assert text_of(page, "plain") == plain, "the same seed, the same text"
    assert text_of(page, "steered").count(WRITES) >= 6
    assert WRITES not in text_of(page, "control")
    expect(page.locator(".run-steered .facts")).to_contain_text("parts at token 1")
    expect(page.locator(".run-steered .parts")).to_have_text("≠")
    assert page.locator(".run-steered .output .differs").count() == 7
    assert page.locator(".run-steered .output span.f").count() == 8, "it fires on every token"
    assert page.locator(".run-plain .output span.f").count() == 0
    expect(page.locator(".run-steered .scale")).to_contain_text(re.compile(r"largest [4-9]\d"))
    page.wait_for_url("**moves=add%3A8**")


def notes(page: Page, base: str, study: Study) -> None:
    """7: in the study's file at once, listed, and exported as they stand there."""
    page.goto(base + FEATURE)
    editor = notes_on(page, WRITER)
    editor.locator(".label").fill("waits after a check")
    editor.locator(".text").fill("Fires on check, writes wait.")
    editor.locator(".text").blur()
    expect(editor.locator(".saved")).to_have_text("Saved.")
    page.keyboard.press("s")
    expect(editor.locator(".star")).to_have_attribute("aria-pressed", "true")
    expect(editor.locator(".saved")).to_have_text("Saved.")
    note = current_notes(read_events(study.path / FILE)[0])[f"feature:{WRITER}"]
    assert (note.star, note.label, note.text) == (True, "waits after a check", "Fires on check, writes wait.")
    page.goto(base + "/notes")
    expect(page.locator(".notes li")).to_contain_text("waits after a check")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    exported = Path(download.value.path()).read_text()
    assert exported == (study.path / FILE).read_text()
    assert {json.loads(line)["place"] for line in exported.splitlines()} == {f"feature:{WRITER}"}


def by_keyboard(page: Page, base: str) -> None:
    """8: rows, pages and the theme without a mouse."""
    page.goto(base + "/features?q=waits+after")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{FEATURE}")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.keyboard.press("t")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("o")
    page.wait_for_url(base + "/")


def test_one_walk_through_all_eight_parts(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/")
    from_the_overview_to_the_feature(page)
    the_feature(page)
    the_table(page)
    the_trace(page)
    live(page, base)
    notes(page, base, study)
    by_keyboard(page, base)
    page.wait_for_load_state("networkidle")
    assert trouble == []
    page.context.close()


def test_the_same_places_dark_and_narrow(browser: Browser, base: str) -> None:
    """Also once the answer has come: its panels, strips and marks are within the screen."""
    look = {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}
    page, trouble = opened(browser, base + "/", **look)
    shade = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(shade)
    steered = "/live?features=L1.down%2B&moves=add:8&runs=plain,steered&tokens=8&prompt=balan"
    trace = "/trace/train/0?features=L1.down%2B%2CL0.up%2B%2CL1.gate%2B"
    for path in ("/", "/map", "/features", FEATURE, trace, "/notes", steered):
        page.goto(base + path)
        page.wait_for_load_state("networkidle")
        assert not goes_sideways(page), path
        assert page.evaluate(shade) == dark
    generated(page)
    expect(page.locator(".run-steered .parts")).to_be_visible()
    assert WRITES in text_of(page, "steered")
    assert not goes_sideways(page)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(shade) != dark
    assert trouble == []
    page.context.close()
