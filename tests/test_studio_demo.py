"""The studio over a study as `lorascope demo` makes it (a tiny model): through all eight parts, in a browser."""

import pytest
from playwright.sync_api import Browser, expect

from lorascope import demo
from lorascope.config import Options
from lorascope.study import Study
from studio_server import studio_at
from test_studio_browser import opened
from tiny_folder import save_tiny


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("demo")
    sizes = {"MODEL": str(save_tiny(folder / "model")), "STEPS": 2, "BATCH": 6, "PROBLEMS": 8}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(demo, name, value)
        demo.run_demo(folder / "study", demo.DemoConfig(quick=True), Options())
    return Study.open(folder / "study")


def test_through_all_eight_parts(browser: Browser, study: Study) -> None:
    with studio_at(study) as address:
        # Overview, and what was left out.
        page, trouble = opened(browser, address + "/")
        expect(page.locator("h1")).to_be_visible()
        expect(page.locator("#dropped")).to_contain_text("explain")
        assert page.locator("#stale").count() == 0
        # Map: a cell leads to its direction.
        page.keyboard.press("g")
        page.keyboard.press("m")
        page.wait_for_url("**/map")
        expect(page.locator("[data-measuring]")).to_have_count(0, timeout=20_000)  # then it has been made anew
        page.locator("rect[data-a]:visible").first.click()
        page.wait_for_url("**/feature/**")
        # Feature: examples, explanation with scores, the lens; then the trace that an example stands in.
        expect(page.locator(".example").first).to_be_visible()
        page.locator(".example .where a").first.click()
        page.wait_for_url("**/trace/**")
        # Trace: what fires here.
        # (a direction at layer 0 may have its largest value on over 1% of tokens, and then fires on none: no list)
        expect(page.locator("#here h3").first).to_be_visible()
        # Features: every kind that the demo makes, controls too.
        page.goto(address + "/features")
        kinds = page.locator('select[name="kind"] option').evaluate_all("all => all.map(o => o.value)")
        assert {"direction", "latent", "base", "random", "untrained", "neuron"} <= set(kinds)
        # Evidence and categories.
        for path, said in (("/evidence", "random"), ("/categories", "none fits")):
            page.goto(address + path)
            expect(page.locator("main")).to_contain_text(said)
        # Live: two runs side by side, one steered.
        first = page.request.get(address + "/features.json?kind=direction&size=1").json()["rows"][0]["id"]
        page.goto(f"{address}/feature/{first.replace('+', '%2B')}")
        page.get_by_role("link", name="watch and steer it live").first.click()
        page.wait_for_url("**/live?**")
        page.locator("#prompt").fill("What is 2 plus 3?")
        page.locator("#tokens").fill("6")
        page.locator("#moves select").first.select_option("scale")
        page.locator("#go").click()
        expect(page.locator("#said")).to_contain_text("Done", timeout=60_000)
        assert page.locator(".run-steered .output").inner_text()
        # Notes: a star is in the file at once.
        page.goto(f"{address}/feature/{first.replace('+', '%2B')}")
        page.keyboard.press("s")
        expect(page.locator(".note-editor .saved").first).to_have_text("Saved.")
        page.goto(address + "/notes")
        expect(page.locator(".notes")).to_contain_text(first)
        assert trouble == []
