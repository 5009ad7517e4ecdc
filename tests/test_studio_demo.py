"""The studio over a study as `lorascope demo` makes it (a tiny model): through all eight parts, in a browser."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from lorascope import demo
from lorascope.config import Options
from lorascope.study import Study
from studio_hands import goes_sideways, slider_of
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


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def overview(page: Page) -> None:
    """Accuracy and why no recovery is given, the curve of the one run, what was left out."""
    expect(page.locator("h1")).to_be_visible()
    accuracy = page.locator("#accuracy")
    expect(accuracy.locator("figure").first).to_contain_text("adapter", ignore_case=True)
    expect(accuracy.locator(".recovery").first).to_contain_text("not given: ")
    curve = page.locator("#training").get_by_role("img", name="Loss by training step")
    expect(curve).to_be_visible()
    assert curve.get_by_role("img").count() >= 2, "held-out losses before and after"
    expect(page.locator("#training tbody tr")).to_have_count(1)
    expect(page.locator("#dropped")).to_contain_text("explain")
    assert page.locator("#stale").count() == 0


def from_the_map_to_a_trace(page: Page) -> None:
    """A cell leads to its direction, an example to its trace; there, what fires and where next."""
    page.keyboard.press("g")
    page.keyboard.press("m")
    page.wait_for_url("**/map")
    expect(page.locator("[data-measuring]")).to_have_count(0, timeout=20_000)  # then it has been made anew
    page.locator("rect[data-a]:visible").first.click()
    page.wait_for_url("**/feature/**")
    expect(page.locator(".example").first).to_be_visible()
    page.locator(".example .where a").first.click()
    page.wait_for_url("**/trace/**")
    # (a direction at layer 0 may have its largest value on over 1% of tokens, and then fires on none: no list)
    expect(page.locator("#here h3").first).to_be_visible()


def table(page: Page, address: str) -> tuple[str, str]:
    """Every kind that the demo makes, controls too; searched, sorted, two beside each other. The two that fire most."""
    page.goto(address + "/features")
    kinds = page.locator('select[name="kind"] option').evaluate_all("all => all.map(o => o.value)")
    assert {"direction", "latent", "base", "random", "untrained", "neuron"} <= set(kinds)
    page.keyboard.press("/")
    page.keyboard.type("l1.gate")
    page.wait_for_url("**/features?q=l1.gate")
    names = page.locator("tr[data-id]").evaluate_all("rows => rows.map((row) => row.dataset.id)")
    assert {"L1.gate+", "L1.gate-"} <= set(names)
    assert all("L1.gate" in name for name in names)
    page.locator("#q").fill("")
    page.wait_for_url("**/features")
    page.locator('select[name="kind"]').select_option("direction")
    page.wait_for_url("**kind=direction**")
    page.locator('[data-sort="n_firing"]').click()
    expect(page.locator('th[aria-sort="descending"]')).to_contain_text("Firings")
    picked = page.locator("tr[data-id]").evaluate_all("rows => rows.slice(0, 2).map((row) => row.dataset.id)")
    for name in picked:
        page.get_by_role("checkbox", name=f"Compare {name}", exact=True).check()
    page.locator("#compare").click()
    expect(page.locator(".side-by-side > section")).to_have_count(2)
    expect(page.locator(".side-by-side > section").last.locator(".example").first).to_be_visible()
    return picked[0], picked[1]


def jumps(page: Page, address: str, feature: str) -> None:
    """In the trace of its strongest example, the next firing is a token that is lit, and the panel is of it."""
    page.goto(f"{address}/feature/{feature.replace('+', '%2B')}")
    page.locator(f'.side[aria-label="{feature}"] .example .where a').first.click()
    page.wait_for_url("**/trace/**")
    expect(page.locator("#here h3").first).to_be_visible()
    page.get_by_role("button", name="Next firing").click()
    expect(page.locator("#counted")).to_contain_text(re.compile(r"firing \d+ of"))
    assert page.locator("#trace .cursor.f").count() == 1
    at = page.locator("#trace > span").evaluate_all("s => s.findIndex((t) => t.classList.contains('cursor'))")
    expect(page.locator("#here h2")).to_contain_text(f"Token {at}:")


def steering(page: Page) -> None:
    """Two runs side by side, one steered as far as the slider goes."""
    page.get_by_role("link", name="watch and steer it live").first.click()
    page.wait_for_url("**/live?**")
    page.locator("#prompt").fill("What is 2 plus 3?")
    page.locator("#tokens").fill("12")
    page.get_by_role("combobox", name="What to do to").first.select_option("add")
    slider_of(page, "").first.press("End")
    page.locator("#go").click()
    expect(page.locator("#said")).to_contain_text("Done", timeout=60_000)
    plain, steered = (page.locator(f".run-{name} .output").inner_text() for name in ("plain", "steered"))
    assert plain
    assert plain != steered
    expect(page.locator(".run-steered .facts")).to_contain_text("parts at token")


def test_through_all_eight_parts(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/")
    overview(page)
    from_the_map_to_a_trace(page)
    first, _ = table(page, base)
    jumps(page, base, first)
    for path, said in (("/evidence", "random"), ("/categories", "none fits")):
        page.goto(base + path)
        expect(page.locator("main")).to_contain_text(said)
    page.goto(f"{base}/feature/{first.replace('+', '%2B')}")
    steering(page)
    # Notes: a star is in the file at once.
    page.goto(f"{base}/feature/{first.replace('+', '%2B')}")
    page.keyboard.press("s")
    expect(page.locator(".note-editor .saved").filter(has_text="Saved.")).to_have_count(1)
    page.goto(base + "/notes")
    expect(page.locator(".notes")).to_contain_text(first.replace("-", "−"))
    assert trouble == []
    page.context.close()


def test_every_page_dark_and_narrow(browser: Browser, base: str) -> None:
    look = {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}
    page, trouble = opened(browser, base + "/", **look)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    paths = ("/", "/map", "/features", "/feature/L1.gate%2B", "/traces", "/trace/train/0?features=L1.gate%2B")
    for path in (*paths, "/evidence", "/categories", "/notes", "/live?features=L1.gate%2B&moves=add:2"):
        page.goto(base + path)
        page.wait_for_load_state("networkidle")
        assert not goes_sideways(page), path
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    assert trouble == []
    page.context.close()
