"""The studio under a reader's hands: focus, typing, touch, and addresses that lead nowhere."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from lorascope.adapter import Adapter
from lorascope.study import Study
from lorascope.views.effects import CACHE
from report_study import complete_maps, make_report_study
from studio_server import studio_at
from test_studio_browser import opened


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("touch") / "study")
    complete_maps(study)
    return study


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def test_a_name_is_taken_only_when_it_is_whole(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/heldout/1")
    page.locator("#add").focus()
    page.keyboard.type("sae.1")
    expect(page.locator('#suggested option[value="sae.1"]')).to_be_attached()
    page.keyboard.type("7")
    expect(page.locator('#suggested option[value="sae.17"]')).to_be_attached()
    expect(page.locator("#chips li")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator("#chips li")).to_have_count(1)
    chip = page.locator("#chips a")
    expect(chip).to_have_text("sae.17")
    assert chip.get_attribute("href") == "/feature/sae.17?corpus=heldout"
    page.locator("#add").fill("sae.2")
    expect(page.locator('#suggested option[value="sae.2"]')).to_be_attached()
    choose = "new InputEvent('input', {inputType: 'insertReplacementText'})"
    page.locator("#add").evaluate(f"input => {{ input.value = 'sae.2'; input.dispatchEvent({choose}); }}")
    expect(page.locator("#chips li")).to_have_count(2)
    page.locator("#trace").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    links = page.locator("#here li a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert all(link.endswith("?corpus=heldout") for link in links)
    assert trouble == []


def test_a_token_that_is_not_there(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/0#t99999")
    expect(page.locator("#toast")).to_contain_text("there is no token 99999")
    assert trouble == [], "nothing is asked of the server"


def test_sorting_keeps_the_focus_and_paging_goes_to_the_top(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/features", viewport={"width": 1280, "height": 600})
    page.locator('[data-sort="kl"]').focus()
    page.keyboard.press("Enter")
    expect(page.locator('th[aria-sort="descending"]')).to_contain_text("KL")
    assert page.evaluate("document.activeElement.dataset.sort") == "kl"
    said = page.locator(".found").element_handle()
    page.locator("#after").click()
    expect(page.locator(".found")).to_contain_text("page 2 of")
    assert said.evaluate("element => element.isConnected"), "the same element: its change is read out"
    expect(page.locator(".found")).to_be_in_viewport()
    assert page.evaluate("document.activeElement.closest('.pager') !== null")
    assert trouble == []


def test_a_refusal_is_shown_in_its_own_words(browser: Browser, base: str) -> None:
    page, _ = opened(browser, base + "/features")
    answer = '<main><p class="absent">The study changed while it was read; reload the page.</p></main>'
    page.route("**/features?q=*", lambda route: route.fulfill(status=503, content_type="text/html", body=answer))
    page.locator("#q").fill("x")
    expect(page.locator("#toast")).to_have_text("The study changed while it was read; reload the page.")


def test_picks_are_kept_for_this_study_only(browser: Browser, base: str) -> None:
    page, _ = opened(browser, base + "/features?corpus=heldout")
    page.locator(".pick").first.check()
    (key,) = page.evaluate("Object.keys(sessionStorage)")
    assert key == f"lorascope-picked-{page.locator('#filters').get_attribute('data-study')}"
    assert "corpus=heldout" in page.locator("#compare").get_attribute("href")


def test_a_click_on_the_matrix_opens_its_row_though_no_pointer_moved_there(
    browser: Browser, base: str, study: Study
) -> None:
    page, trouble = opened(browser, base + "/map")
    names = Adapter.load(study.path / "adapter").addresses
    matrix = page.locator("#matrix")
    matrix.scroll_into_view_if_needed()
    box = matrix.bounding_box()
    y = box["y"] + (names.index("L2.down") + 0.5) * box["height"] / len(names)
    place = "{bubbles: true, clientX: canvas.getBoundingClientRect().left + 2, clientY: y}"
    matrix.evaluate(f"(canvas, y) => canvas.dispatchEvent(new MouseEvent('click', {place}))", y)
    page.wait_for_url("**/feature/L2.down%2B")
    assert trouble == []


def test_the_decoder_map_reads_out_and_opens(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/feature/sae.0?corpus=heldout")
    picture = page.locator(".decoder svg.map")
    picture.focus()
    expect(page.locator(".decoder .readout")).to_contain_text("effect per unit of activation")
    address = page.locator(".decoder rect.at").get_attribute("data-a")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/feature/{address}%2B?corpus=heldout")
    assert trouble == []


def test_a_map_reloads_when_its_measurement_ends(browser: Browser, study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    shutil.rmtree(copy.path / CACHE)
    with studio_at(copy) as address:
        page, trouble = opened(browser, address + "/map?corpus=heldout")
        expect(page.locator('#grid-effect rect[data-a="L1.gate"]')).to_be_attached(timeout=15_000)
        assert page.locator("[data-measuring]").count() == 0
        page.locator("#tab-effect").click()
        page.locator('#grid-effect rect[data-a="L1.gate"]').click()
        page.wait_for_url("**/feature/L1.gate%2B?corpus=heldout")
        assert trouble == []


def test_columns_and_bars_lead_to_their_features(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/map?corpus=heldout")
    page.locator('#groups g[data-column="2"] rect').first.click()
    page.wait_for_url("**/features?kind=direction&layer=2&corpus=heldout")
    names = page.locator("tr[data-id]").evaluate_all("rows => rows.map(row => row.dataset.id)")
    assert len(names) == 14
    assert all(name.startswith("L2.") for name in names)
    page.go_back()
    page.locator("#groups").get_by_role("link", name="mlp").click()
    page.wait_for_url("**/features?kind=direction&type=mlp&corpus=heldout")
    assert trouble == []


def test_tokens_and_badges_hold_together_on_a_narrow_screen(browser: Browser, base: str) -> None:
    """Every token shorter than a line is on one line, and so is every badge."""
    in_lines = """boxes => boxes.filter((box) => box.textContent.length < 20 && box.getClientRects().length > 1)
        .map((box) => box.textContent)"""
    for address in ("/trace/train/1", "/trace/train/0?features=L1.gate%2B", "/feature/L1.gate%2B"):
        page, _ = opened(browser, base + address, viewport={"width": 360, "height": 800})
        for what in (".tokens span", ".mark-seg"):
            assert page.locator(what).count() >= 3
            assert page.locator(what).evaluate_all(in_lines) == [], address
        page.context.close()


def test_a_panel_below_the_fold_is_brought_into_view(browser: Browser, base: str) -> None:
    page, _ = opened(browser, base + "/trace/train/1", viewport={"width": 390, "height": 844})
    page.locator("#trace > span").nth(20).click()
    expect(page.locator("#here h3").first).to_be_in_viewport()
