"""Accessibility of every page of the studio by axe-core, in light, dark and narrow; of its dialog and its errors; of
Live with an answer on it; and the contrast of shaded tokens, which axe cannot always tell."""

import base64
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from report_study import complete_maps, make_report_study
from studio_hands import goes_sideways
from studio_server import studio_at
from test_studio_live_browser import answered, done, start, token

PAGES = (
    "/",
    "/map",
    "/features",
    "/feature/L1.gate%2B",
    "/feature/sae.1",
    "/compare?features=L1.gate%2B%2Csae.1%2CL99.q%2B",
    "/traces",
    "/trace/train/0?features=L1.gate%2B%2Csae.1#t12",
    "/evidence",
    "/categories",
    "/notes",
    "/live",
    "/nowhere",
)
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"color_scheme": "light", "viewport": {"width": 360, "height": 800}},
}
NARROW_DARK: dict[str, Any] = {"color_scheme": "dark", "viewport": {"width": 360, "height": 800}}
FOUR = ("L1.gate+", "sae.1", "L2.down+", "L0.up+")
TRACE = f"/trace/train/1?features={quote(','.join(FOUR))}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    study = make_report_study(tmp_path_factory.mktemp("axe") / "study")
    complete_maps(study)
    with studio_at(study) as address:
        yield address


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {node['target']} {node['failureSummary'][:200]}" for v in found for node in v["nodes"][:3]]


def axe(page: Page, kind: str) -> list[Any]:
    found: list[Any] = Axe().run(page, options={"resultTypes": [kind]}).response[kind]
    return found


CASES = [
    *((path, look) for path in PAGES for look in LOOKS),
    *((path, "narrow and dark") for path in ("/", "/feature/L1.gate%2B", TRACE)),
]


@pytest.mark.parametrize(("path", "look"), CASES)
def test_no_violations(browser: Browser, base: str, path: str, look: str) -> None:
    page = browser.new_context(**LOOKS.get(look, NARROW_DARK)).new_page()
    page.goto(base + path)
    page.wait_for_load_state("networkidle")
    if "#t" in path:
        expect(page.locator("#here h3").first).to_be_visible()  # the panel is filled
    assert violations(page) == []
    page.context.close()


@pytest.mark.parametrize("look", LOOKS)
def test_the_list_of_keys(browser: Browser, base: str, look: str) -> None:
    page = browser.new_context(**LOOKS[look]).new_page()
    page.goto(base + "/features")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    assert violations(page) == []
    page.context.close()


@pytest.mark.parametrize("look", LOOKS)
def test_examples_unfolded_to_their_traces(browser: Browser, base: str, look: str) -> None:
    page = browser.new_context(**LOOKS[look]).new_page()
    page.goto(base + "/feature/L1.gate%2B")
    page.wait_for_load_state("networkidle")
    buttons = page.locator("#side-0 .unfold")
    names = []
    for number in range(2):
        buttons.nth(number).click()
        name = f"{buttons.nth(number).get_attribute('aria-label')}, L1.gate+; arrow keys tell activations"
        expect(page.get_by_role("group", name=name, exact=True)).to_be_visible()
        names.append(name)
    assert len(set(names)) == 2, "each is told apart by its name"
    assert violations(page) == []
    page.context.close()


def live_with_an_answer(page: Page, base: str) -> None:
    """Four runs over four features, each steered in another way, every shade, what fires, what differs, and a queue."""
    names = quote(",".join(FOUR))
    page.goto(
        f"{base}/live?features={names}&moves=add:2,scale:2,clamp:1,watch&runs=plain,steered,control,base&prompt=x"
    )
    expect(page.locator("#moves li")).to_have_count(4)
    queue = [{"id": str(n), "state": state, "prompt": "x"} for n, state in enumerate(("running", "waiting"))]
    state = {"phase": "ready", "said": "", "seconds": 1.0, "queue": queue}
    page.route("**/live/state.json", lambda route: route.fulfill(json=state))
    runs = {"plain": 0, "steered": 3, "control": 5, "base": 1}
    tokens = [
        token(run, 1 if i < parts else parts * 100 + i, text=" word" if i % 4 else " ", shown="" if i % 4 else "·")
        | {"activations": {name: float((i + k) % 10) for k, name in enumerate(FOUR)}}
        for run, parts in runs.items()
        for i in range(30)
    ]
    about = start() | {"runs": {run: run for run in runs}, "scales": dict.fromkeys(FOUR, 9.0)}
    about |= {"levels": dict.fromkeys(FOUR, 4.0)}
    answered(page, [about, *tokens, done(**dict.fromkeys(runs, False))])
    expect(page.locator(".run-control .facts")).to_contain_text("parts at token")
    expect(page.locator("#queue p")).to_have_count(2)
    for step in range(1, 10):
        assert page.locator(f".run-steered .output .h{step}").count() > 0
    assert page.locator(".run-steered .output .f.differs").count() > 0
    assert page.locator(".run-steered .live-strip rect").count() == 4 * 27, "a bar for each that is not 0"


TEXTS = """(spans) => {
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const found = spans.map((span) => {
        const range = document.createRange();
        range.selectNodeContents(span);
        pen.fillStyle = getComputedStyle(span).color;
        pen.fillRect(0, 0, 1, 1);
        const boxes = [...range.getClientRects()].filter((box) => box.width > 3);
        const colour = [...pen.getImageData(0, 0, 1, 1).data];
        const name = `${span.className} ${span.textContent}`;
        return { name, colour, boxes: boxes.map((box) => [box.x, box.y, box.right, box.bottom]) };
    });
    for (const span of spans) span.style.color = "transparent"; // what is left is what stands behind the letters
    return found;
}"""
LEAST = """async ([picture, texts]) => {
    const bytes = Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
    const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const pen = new OffscreenCanvas(image.width, image.height).getContext("2d", { willReadFrequently: true });
    pen.drawImage(image, 0, 0);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const light = (d, i) => 0.2126 * linear(d[i]) + 0.7152 * linear(d[i + 1]) + 0.0722 * linear(d[i + 2]);
    return texts.map(({ name, colour, boxes }) => {
        let least = 21;
        for (const [x, y, right, bottom] of boxes) {
            const [left, top] = [Math.ceil(x), Math.ceil(y)];
            const { data } = pen.getImageData(left, top, Math.floor(right) - left, Math.floor(bottom) - top);
            for (let i = 0; i < data.length; i += 4) {
                if (!data[i + 3]) throw new Error(`out of the picture: ${name}`);
                const pair = [light(colour, 0), light(data, i)].sort((a, b) => a - b);
                least = Math.min(least, (pair[1] + 0.05) / (pair[0] + 0.05));
            }
        }
        return [name, least];
    });
}"""
ALL_SHADES = """(spans) => spans.slice(0, 36).forEach((span, n) => {
    const [k, step] = [n % 4, 1 + Math.floor(n / 4)];
    span.className = `hue${k} h${step} f on${k + 1}`;
})"""


def contrasts(page: Page, texts: Locator) -> dict[str, float]:
    """The least contrast of each text with any point behind it, from a picture of the page without its letters."""
    found = texts.evaluate_all(TEXTS)
    picture = base64.b64encode(page.screenshot()).decode()
    blank = page.context.new_page()
    least = dict(blank.evaluate(LEAST, [picture, found]))
    blank.close()
    return least


@pytest.mark.parametrize("look", [*LOOKS, "narrow and dark"])
def test_live_with_an_answer_on_it(browser: Browser, base: str, look: str) -> None:
    wanted = LOOKS.get(look, NARROW_DARK)
    width = wanted.get("viewport", {"width": 1280})["width"]
    tall = {"viewport": {"width": width, "height": 3600}}  # all of it is in one picture
    page = browser.new_context(**wanted | tall).new_page()
    live_with_an_answer(page, base)
    assert violations(page) == []
    assert not goes_sideways(page)
    undecided = [node["html"] for found in axe(page, "incomplete") for node in found["nodes"]]
    assert all("≠" in text or text.startswith("<span") for text in undecided)
    assert {name: ratio for name, ratio in contrasts(page, page.locator("b.parts")).items() if ratio < 4.5} == {}
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shaded_tokens_have_contrast_where_axe_cannot_tell(browser: Browser, base: str, scheme: Any) -> None:
    """Lines of several features and hatches are gradients, before which axe gives up; and short words it leaves out."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 2000}).new_page()
    page.goto(base + TRACE)
    expect(page.locator("#trace span.f").first).to_be_attached()
    undecided = [node for found in axe(page, "incomplete") for node in found["nodes"]]
    assert any("gradient" in check["message"] for node in undecided for check in node["any"])
    in_the_trace = page.locator("#trace > span")
    others = [node["html"] for node in undecided if 'span aria-hidden="true"' not in node["html"]]
    whole = set(in_the_trace.evaluate_all("spans => spans.map((span) => span.outerHTML)"))
    assert set(others) <= whole, "only tokens are undecided, and arrows"
    assert {name: ratio for name, ratio in contrasts(page, in_the_trace).items() if ratio < 4.5} == {}
    page.reload()
    expect(page.locator("#trace span.f").first).to_be_attached()
    counted = page.locator("#trace > span:not(.sp, .sk)")
    counted.evaluate_all(ALL_SHADES)
    shades = {f"hue{k} h{step}" for k in range(4) for step in range(1, 10)}
    found = contrasts(page, counted)
    assert shades <= {" ".join(name.split()[:2]) for name in found}
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    page.context.close()
