"""The studio by touch and by key: what a pointer reads out, every reader can reach; numbers as the server has them."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, Request, expect

from lorascope.adapter import Adapter
from lorascope.report.grids import layer_map
from lorascope.report.numbers import figures
from lorascope.studio.notes import FILE, current_notes, read_events
from lorascope.study import Study
from report_study import complete_maps, make_report_study
from studio_server import studio_at
from test_studio_browser import opened, saving

SILENT = "L0.v+"
PHONE = {"has_touch": True, "viewport": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("reach") / "study")
    complete_maps(study)
    silence(study)
    return study


def silence(study: Study) -> None:
    """Have one side never fire."""
    folder = study.path / "examples" / "train"
    stats = pq.read_table(folder / "direction-stats.parquet")
    rows = [row | ({"n_firing": 0, "max": 0.0} if row["feature"] == SILENT else {}) for row in stats.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, stats.schema), folder / "direction-stats.parquet")
    examples = pq.read_table(folder / "direction-examples.parquet")
    others = [row for row in examples.to_pylist() if row["feature"] != SILENT]
    pq.write_table(pa.Table.from_pylist(others, examples.schema), folder / "direction-examples.parquet")


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def middle(page: Page, selector: str) -> tuple[float, float]:
    """The middle of an element on the screen."""
    page.locator(selector).first.scroll_into_view_if_needed()
    box = page.locator(selector).first.bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_first_tap_reads_out_and_a_second_opens(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/map#norm", **PHONE)
    readout = page.locator("#grid-norm .readout")
    for address in ("L1.gate", "L2.down"):
        page.touchscreen.tap(*middle(page, f'#grid-norm rect[data-a="{address}"]'))
        expect(readout).to_contain_text(f"{address}: ")
        expect(readout.locator("a")).to_have_attribute("href", f"/feature/{address}%2B")
    assert page.url.endswith("/map#norm")
    page.touchscreen.tap(*middle(page, '#grid-norm rect[data-a="L2.down"]'))
    page.wait_for_url("**/feature/L2.down%2B")
    page.goto(base + "/map#norm")
    page.wait_for_load_state("networkidle")
    page.touchscreen.tap(*middle(page, '#grid-norm rect[data-a="L0.q"]'))
    readout.locator("a").tap()
    page.wait_for_url("**/feature/L0.q%2B")
    assert trouble == []


def test_the_matrix_by_touch_with_its_signs(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/map", **PHONE)
    names = Adapter.load(study.path / "adapter").addresses
    page.locator("#matrix").scroll_into_view_if_needed()
    expect(page.locator("#marks rect").first).to_be_attached()
    marks = page.locator("#marks rect").count()
    assert 0 < marks < len(names) ** 2
    page.locator("#signs").select_option("plus")
    expect(page.locator("#marks rect")).to_have_count(0)
    page.locator("#signs").select_option("minus")
    expect(page.locator("#marks rect")).to_have_count(marks)
    place = middle(page, "#matrix")
    page.touchscreen.tap(*place)
    expect(page.locator("#pair")).to_contain_text("cosine 1.00, alike")
    row = page.locator("#pair").inner_text().split(" ")[0]
    assert page.locator("#pair a").get_attribute("href") == f"/feature/{row}%2B"
    page.touchscreen.tap(*middle(page, "#matrix"))
    page.wait_for_url(f"**/feature/{row}%2B")
    assert trouble == []


def test_another_corpus_keeps_the_map(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/map")
    page.locator("#tab-norm").click()
    page.get_by_role("link", name="heldout").click()
    page.wait_for_url("**/map?corpus=heldout#norm")
    expect(page.locator("#tab-norm")).to_have_attribute("aria-selected", "true")
    assert trouble == []


def test_activations_of_examples_by_key(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/feature/L1.gate%2B")
    box = page.locator("#side-0 .example .tokens").first
    box.focus()
    values = box.locator("[data-v]").evaluate_all("tokens => tokens.map((token) => token.dataset.v)")
    for value in (values[0], values[1], values[0]):
        page.keyboard.press("ArrowLeft" if value == values[0] else "ArrowRight")
        expect(page.locator("#tip")).to_have_text(value)
        expect(page.locator("#told")).to_contain_text(f": {value}")
        expect(box.locator(".cursor")).to_have_attribute("data-v", value)
    page.keyboard.press("Tab")
    expect(page.locator("#tip")).to_be_hidden()
    assert trouble == []


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/trace/train/1?features=L1.gate%2B", "#trace"),
        ("/feature/L1.gate%2B", "#side-0 .example .tokens"),
        ("/map", '[role="tab"][aria-selected="true"]'),
        ("/map", 'svg.map[tabindex="0"]:visible'),
        ("/map", "#matrix"),
    ],
)
def test_an_arrow_with_alt_is_the_browsers(browser: Browser, base: str, path: str, place: str) -> None:
    """Alt+Left is the page before; boxes that arrow keys move in leave it alone."""
    page, trouble = opened(browser, base + path)
    page.evaluate("addEventListener('keydown', (event) => { window.taken = event.defaultPrevented; })")
    box = page.locator(place).first
    box.focus()
    for held in ("altKey", "ctrlKey", "metaKey"):
        box.dispatch_event("keydown", {"key": "ArrowLeft", held: True})
        assert page.evaluate("window.taken") is False, held
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("window.taken") is True
    assert trouble == []
    page.context.close()


def test_the_tip_stays_in_the_window(browser: Browser, base: str) -> None:
    address = base + "/trace/train/1?features=L1.gate%2B,L2.down%2B,L0.q%2B,L0.q-"
    page, trouble = opened(browser, address, viewport={"width": 360, "height": 700})
    tokens = page.locator("#trace > span[data-v]")
    for number in range(0, tokens.count(), 5):
        tokens.nth(number).scroll_into_view_if_needed()
        tokens.nth(number).dispatch_event("pointerover")
        tip = page.locator("#tip").bounding_box()
        assert tip
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= 360
        assert tip["y"] >= 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert trouble == []


def test_a_side_that_never_fires_takes_notes(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, f"{base}/feature/{SILENT.replace('+', '%2B')}")
    side = page.locator(".side.asked")
    expect(side).to_contain_text("Never")
    with saving(page, "star"):
        page.keyboard.press("s")
    expect(side.locator(".saved")).to_have_text("Saved.")
    with saving(page, "text"):
        side.locator(".text").fill("silent")
        side.locator(".text").blur()
    note = current_notes(read_events(study.path / FILE)[0])[f"feature:{SILENT}"]
    assert (note.star, note.text) == (True, "silent")
    assert trouble == []


def test_a_token_has_star_label_and_tags(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/1#t25")
    form = page.locator("#here .note-editor")
    form.locator(".text").focus()
    page.keyboard.press("Tab")
    expect(form.locator(".star")).to_be_focused()
    text, star = form.locator(".text").bounding_box(), form.locator(".star").bounding_box()
    assert text
    assert star
    assert text["y"] < star["y"], "Tab goes down"
    with saving(page, "star"):
        form.locator(".star").click()
    expect(page.locator("#trace > span").nth(25)).to_have_attribute("data-note", "✎")
    form.locator("summary").click()
    for name, value, field in ((".label", "mine", "label"), (".tags", "a, b", "tag:b"), (".text", "odd", "text")):
        with saving(page, field):
            form.locator(name).fill(value)
            form.locator(name).blur()
    expect(form.locator(".saved")).to_have_text("Saved.")
    note = current_notes(read_events(study.path / FILE)[0])["token:train:1:25"]
    assert (note.star, note.label, note.tags, note.text) == (True, "mine", ("a", "b"), "odd")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_load_state("networkidle")
    values = [form.locator(name).input_value() for name in (".label", ".tags", ".text")]
    assert values == ["mine", "a, b", "odd"]
    with saving(page, "star"):
        page.locator("h1").click()
        page.keyboard.press("s")
    assert current_notes(read_events(study.path / FILE)[0])["trace:train:1"].star, "the key is the page's own star"
    assert trouble == []


def test_numbers_are_written_as_the_server_does(browser: Browser, base: str) -> None:
    page, _ = opened(browser, base + "/notes")
    draw = random.Random(0)
    values: list[float | None] = [None, 0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 12.5, 0.125, 1.125, 2.675, 0.09999, 0.0009999]
    values += [99.95, 999.5, 1000.5, 1234.0, 9999.5, 12345.0, 999_949.0, 9_994_999.0, 9_995_000.0, 9_999_999.0]
    values += [1e7, 1.25e7, 1.35e7, 2.5e9, 1e21, 1e300, 4.2e-5, 1e-3, 9.995e-4, 5e-324, 1.0625, 1.1875, 2.5, 3.5, 104.5]
    values += [draw.choice((1, -1)) * 10 ** draw.uniform(-9, 12) for _ in range(300)]
    values += [draw.randrange(10**6) / 2**k for k in range(1, 12) for _ in range(20)]
    script = "async (values) => { const { figures } = await import('/static/shared.js'); return values.map((v) => %s) }"
    assert page.evaluate(script % "figures(v)", values) == [figures(v) for v in values]
    assert page.evaluate(script % "figures(v, 2)", values) == [figures(v, 2) for v in values]
    assert all(v is None or math.isfinite(v) for v in values)


def amounts(request: Request) -> list[float]:
    """How strongly a request is to steer; nothing for any but those that generate."""
    asked = request.url.endswith("/live/generate")
    return [step["amount"] for step in request.post_data_json["steers"]] if asked else []


def moves(page: Page) -> list[Any]:
    """What the request that is sent says of how to steer."""
    with page.expect_request("**/live/generate") as sent:
        page.locator("#go").click()
    return list(sent.value.post_data_json["steers"])


def test_amounts_are_typed_as_precisely_as_wanted(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/live?features=L1.gate%2B&runs=plain&prompt=x")
    page.route("**/live/generate", lambda route: route.fulfill(status=400, json={"error": "Not now."}))
    sent: list[float] = []
    page.on("request", lambda request: sent.extend(amounts(request)))
    slider, exact = page.locator('#moves input[type="range"]'), page.locator('#moves input[type="number"]')
    expect(slider).to_be_hidden()
    expect(exact).to_be_hidden()
    page.locator("#moves select").select_option("add")
    expect(page.locator("#moves .amount")).to_contain_text("× p99")
    exact.fill("3.14159")
    page.wait_for_url("**moves=add%3A3.14159**")
    assert slider.input_value() == "3.25", "to its step"
    assert moves(page) == [{"feature": "L1.gate+", "mode": "add", "amount": 3.14159}]
    exact.fill("-40.5")
    assert slider.input_value() == "-8", "at its end"
    page.wait_for_url("**moves=add%3A-40.5**")
    page.reload()
    expect(exact).to_have_value("-40.5")
    slider.fill("1.5")
    expect(exact).to_have_value("1.5")
    assert moves(page)[0]["amount"] == 1.5
    exact.fill("1e9")
    page.locator("#go").click()
    assert exact.evaluate("input => input.validity.rangeOverflow")
    page.locator("#moves select").select_option("scale")
    expect(page.locator("#moves .amount span")).to_have_text("×")
    page.locator("#moves select").select_option("off")
    expect(slider).to_be_hidden()
    assert moves(page) == [{"feature": "L1.gate+", "mode": "off", "amount": 0}]
    assert sent == [3.14159, 1.5, 0], "requests come in their order: none was made of 1e9"
    assert [text for text in trouble if "400" not in text] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_strips_of_all_runs_are_level(browser: Browser, base: str, width: int) -> None:
    page, _ = opened(browser, base + "/live?features=L1.gate%2B,L2.down%2B", viewport={"width": width, "height": 900})
    page.evaluate("""() => {
        const runs = { plain: "adapter", steered: "adapter, steered" };
        const start = { event: "start", runs, scales: {}, levels: {} };
        const say = (run, i) => ({ event: "token", run, token_id: i, text: " word", shown: " word",
            activations: { "L1.gate+": 1, "L2.down+": 2 } });
        const tokens = [...Array(90).keys()].flatMap((i) => [say("plain", i), ...(i < 4 ? [say("steered", i)] : [])]);
        const done = { event: "done", stopped: false, ended: { plain: true, steered: true }, tokens_per_second: 1 };
        const body = [start, ...tokens, done].map((event) => `data: ${JSON.stringify(event)}\\n\\n`).join("");
        const own = window.fetch;
        const answer = () => Promise.resolve(new Response(body));
        window.fetch = (address, options) => address === "/live/generate" ? answer() : own(address, options);
    }""")
    page.locator("#go").click()
    expect(page.locator("#said")).to_contain_text("Done")
    tops = page.locator(".live-strip").evaluate_all("rows => rows.map((row) => row.getBoundingClientRect().top)")
    assert len(tops) == 4
    if width > 1000:
        assert tops[:2] == tops[2:]
    gap = """panels => { const [text, head] = [panels[0].lastElementChild, panels[1].querySelector("h2")];
        return head.getBoundingClientRect().top - text.getBoundingClientRect().bottom; }"""
    if width < 1000:
        assert 0 <= page.locator(".panel-run").evaluate_all(gap) < 30
    box = page.locator(".run-plain .output")
    box.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_have_text("L1.gate+: 1.00")


def test_exact_cells_among_screened_ones_have_a_dot() -> None:
    grid = {"label": "KL", "unit": "nats", "scale": "log", "values": [[0.1, 0.2]], "under_floor": [[False, False]]}
    grid |= {"address": [["L0.q", "L1.q"]], "floor": 1e-3}
    assert "exactmark" not in layer_map(grid, [0, 1], ["q"], set())
    drawn = layer_map(grid | {"exact": ["L1.q"]}, [0, 1], ["q"], set())
    assert drawn.count("exactmark") == 2, "one cell, and the key"
    assert "exact; the others are screened" in drawn
    assert "matrix type" in drawn
