"""The report: one file that needs nothing else, shows what the study holds, and runs no text of a trace."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.report import ReportConfig, build, write_report
from lorascope.report.build import embedded_json
from lorascope.report.gather import gather
from lorascope.report.grids import ramp_of
from lorascope.report.numbers import duration, figures, memory, nice_ticks, percent, tick
from lorascope.report.tokens import heat, heat_tokens, lone_text, shown_text
from lorascope.study import Study
from lorascope.views import reasoning_view
from report_study import HOSTILE, make_report_study

CONFIG = ReportConfig(directions=4, latents=3, traces=3, examples=3, window=12)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("report") / "study")
    write_report(study, CONFIG, Options())
    return study


def opened(browser: Browser, path: Path, **context: Any) -> tuple[Page, list[str]]:
    """The report in a new window, offline; the list collects errors and requests."""
    page = browser.new_context(offline=True, **context).new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((path / "report.html").as_uri())
    return page, trouble


def text_of(study: Study) -> str:
    return (study.path / "report.html").read_text(encoding="utf-8")


def test_result_and_size(study: Study) -> None:
    result = write_report(study, CONFIG, Options())
    assert result["bytes"] == (study.path / "report.html").stat().st_size < 20e6
    assert (result["directions"], result["latents"], result["traces"]) == (4, 3, 3)
    assert result["missing"] == []
    assert study.manifest["stages"]["report"]["result"] == result


def test_nothing_is_fetched(study: Study) -> None:
    html = text_of(study)
    assert not re.search(
        r"""(?:src|href|action|data)\s*=\s*["']?(?:https?:)?//""", html.replace("http://www.w3.org/2000/svg", "")
    )
    assert "@import" not in html
    assert "url(#hatch)" in html
    assert not re.search(r"url\((?!#hatch)", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert unescape(policy[1]).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy[1]


def test_opens_without_errors(study: Study, browser: Browser) -> None:
    page, trouble = opened(browser, study.path)
    page.locator("#openall").click()
    page.wait_for_timeout(200)
    assert trouble == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for section in (
        "summary",
        "training",
        "map",
        "ablation",
        "directions",
        "latents",
        "traces",
        "sae",
        "dropped",
        "made",
    ):
        assert page.locator(f"#{section}").is_visible()


def test_hostile_tokens_are_text(study: Study, browser: Browser) -> None:
    """A trace that holds markup is shown as it is; none of it becomes an element or runs."""
    first = study.traces("heldout")[0]
    assert HOSTILE in first.thinking
    everything = replace(CONFIG, traces=40)
    write_report(study, everything, Options())
    page, trouble = opened(browser, study.path)
    shown = page.locator("#trace-0").evaluate("box => box.textContent")
    assert HOSTILE in shown.replace("·", " ").replace("\u00a0", " ")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#trace-0 img, #trace-0 script, main textarea").count() == 0
    assert page.locator("script").count() == 2
    assert trouble == []
    write_report(study, CONFIG, Options())


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--<script>", "b": "&\u2028"}
    text = str(embedded_json(value))
    assert "<" not in text
    assert ">" not in text
    assert "&" not in text
    assert json.loads(text) == value


def test_words_and_numbers_of_the_study(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    lead = page.locator(".lead").inner_text()
    assert "the adapter 50%" in lead
    assert "Full finetune under-trained at this budget" in lead
    tiles = page.locator(".tiles").inner_text()
    assert "+40 points" in tiles
    assert "KL with the SAE's reconstruction\n20%" in tiles
    assert page.locator("#ablation .bars").nth(1).locator("tbody tr").count() == 7
    assert page.locator("#grid-kl rect.hatch").count() >= 7
    assert "adapter, MLP off" in page.locator("#main").inner_text()
    assert page.locator("#sae .bars tbody tr").count() == 6
    assert "attention sinks" in page.locator("#dropped").inner_text()


def test_map_switch_and_readout_by_keyboard(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    assert page.locator("#grid-kl").is_visible()
    page.locator("#tab-kl").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#grid-spread").is_visible()
    assert page.locator("#grid-kl").is_hidden()
    page.keyboard.press("ArrowLeft")
    page.locator("#grid-kl svg.map").focus()
    assert page.locator("#grid-kl .readout").inner_text().startswith("L0.q: ")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    readout = page.locator("#grid-kl .readout").inner_text()
    assert readout.startswith("L1.gate: 0.500 nats")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('.card').dataset.card") == "L1.gate"


def test_cards_by_keyboard_and_filter(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    names = page.locator(".card").evaluate_all("cards => cards.map(card => card.dataset.card)")
    assert names[0] == "L1.gate"
    current = "document.activeElement.closest('.card').dataset.card"
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate(current) == names[1]
    page.keyboard.press("k")
    assert page.evaluate(current) == names[0]
    page.keyboard.press("Enter")
    assert page.locator(".card").first.get_attribute("open") is None
    page.keyboard.press("/")
    page.keyboard.type("l1.gate")
    assert page.locator("#found").inner_text().endswith(f"of {len(names)} cards")
    assert page.locator(".card").first.is_visible()
    assert page.locator(".card").nth(1).is_hidden()
    page.keyboard.press("Escape")
    assert page.locator(".card").nth(1).is_visible()


def test_polarities_stand_apart(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    card = page.locator("#card-L1\\.gate")
    plus, minus = card.locator(".side.plus"), card.locator(".side.minus")
    assert plus.locator(".example .peak").count() >= 3
    assert all("." in text for text in plus.locator(".examples").first.locator(".peak").all_inner_texts())
    assert minus.locator(".example").count() > 0
    weight = plus.locator(".peak").first.evaluate("e => getComputedStyle(e).fontWeight")
    assert int(weight) >= 700
    assert "underline" in plus.locator(".f").first.evaluate("e => getComputedStyle(e).textDecorationLine")


def test_whole_traces_are_coloured(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    page.locator("#feature").select_option(label=page.locator("#feature option").first.inner_text())
    assert "fires on" in page.locator("#counted").inner_text()
    lit = page.locator("#trace-0 span[data-v]").all_inner_texts()
    assert lit
    assert all("." in text for text in lit)
    page.locator("#trace").select_option("1")
    assert page.locator("#trace-0").is_hidden()
    assert page.locator("#trace-1").is_visible()
    page.locator("#next").click()
    assert page.locator("#trace-1 .here").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_and_contrast(study: Study, browser: Browser, scheme: str) -> None:
    """Every heat step and the soft text have WCAG AA contrast in both themes and all three hues."""
    page, _ = opened(browser, study.path, color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    worst = page.evaluate(CONTRAST)
    assert min(worst.values()) >= 4.5, worst
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    worst = page.evaluate(CONTRAST)
    assert min(worst.values()) >= 4.5, worst


CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const shown = (place, names, under) => {
    const box = document.createElement("p");
    box.className = "tokens";
    const token = document.createElement("span");
    token.className = names;
    token.textContent = "x";
    box.append(token);
    document.querySelector(place).append(box);
    const style = getComputedStyle(token);
    const found = ratio(style.color, under(style));
    box.remove();
    return found;
  };
  const out = {};
  for (const place of [".side.plus", ".side.minus", ".latent .side"]) {
    for (let step = 1; step <= 9; step++) {
      out[`${place} h${step}`] = shown(place, `h${step}`, (style) => style.backgroundColor);
    }
    const line = getComputedStyle(document.querySelector(".card")).borderTopColor; // that of the hatching
    out[`${place} hatched`] = shown(place, "un sp", () => line);
  }
  const paper = getComputedStyle(document.body).backgroundColor;
  for (const place of [".caption", ".kicker", ".tag", ".contents a", ".chart text", ".empty, .facts"]) {
    const style = getComputedStyle(document.querySelector(place));
    out[place] = ratio(place.endsWith("text") ? style.fill : style.color, paper);
  }
  return out;
}"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(study: Study, browser: Browser, width: int) -> None:
    page, _ = opened(browser, study.path, viewport={"width": width, "height": 800})
    page.locator("#openall").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_prints_in_light(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator(".contents").is_hidden()
    assert page.locator("#grid-norm").is_visible()
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light"


def test_an_empty_study_says_what_to_run(tmp_path: Path, browser: Browser) -> None:
    study = Study.create(tmp_path / "study", model="tiny", system="")
    result = write_report(study, ReportConfig(), Options())
    assert any(command.startswith("lorascope train") for command in result["missing"])
    page, trouble = opened(browser, study.path)
    assert trouble == []
    said = page.locator("main").inner_text()
    for command in ("train", "evaluate", "ablate", "record", "examples", "reasoning", "lens", "sae"):
        assert f"lorascope {command} " in said


def test_reports_are_the_same_twice(study: Study) -> None:
    first, second = (build.render_html(gather(study, CONFIG, seed=5)) for _ in range(2))
    assert first == second


def test_bad_numbers_and_too_large(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--window"):
        write_report(study, replace(CONFIG, window=0), Options())
    with pytest.raises(BadInput, match="negative"):
        write_report(study, replace(CONFIG, latents=-1), Options())
    before = text_of(study)
    monkeypatch.setattr(build, "LIMIT", 1000)
    with pytest.raises(RunFailed, match="show less"):
        write_report(study, replace(CONFIG, directions=1), Options())
    assert text_of(study) == before


def test_token_texts() -> None:
    assert shown_text(" a\n") == " a↵"
    assert shown_text("  ") == "··"
    assert shown_text("") == "◌"
    assert shown_text("\u202ex\x00") == "⟨202E⟩x⟨0000⟩"
    assert shown_text("👩\u200d🔬") == "👩\u200d🔬"
    assert [heat(v, 2.0) for v in (None, 0.0, 1e-9, 1.0, 2.0, 3.0)] == [0, 0, 1, 5, 9, 9]
    assert [heat(v, 2.0, 1.0) for v in (0.9, 1.0, 1.1, 2.0)] == [0, 0, 1, 9]
    example = {
        "tokens": ["<b>", " is", "&"],
        "values": [0.0, 2.0, 0.5],
        "segments": [0, 2, 2],
        "peak": 1,
        "more_before": True,
        "more_after": False,
    }
    html = str(heat_tokens(example, 2.0, 1.0))
    assert "&lt;b&gt;" in html
    assert '<wbr><span class="h9 f peak" data-v="2.00">\u00a0is</span>' in html, "a line ends before the space"
    assert '<span class="h3" data-v="0.500">&amp;</span>' in html
    assert [lone_text(text) for text in (" is ", " ", "a\n", "")] == ["·is·", "·", "a↵", "◌"]


def test_what_counts_for_no_feature_has_no_heat() -> None:
    """Template and an attention sink, far stronger than the token that fires."""
    example = {
        "tokens": ["<|im_start|>", "a", " is", "\n", "b"],
        "values": [90.0, 80.0, 2.0, 0.0, 0.0],
        "segments": [0, 2, 2, 2, 2],
        "sinks": [1],
        "peak": 2,
        "more_before": False,
        "more_after": False,
    }
    html = str(heat_tokens(example, 2.0, 1.0))
    assert '<span class="un sp" data-v="90.0">&lt;|im_start|&gt;</span>' in html
    assert '<span class="un sk" data-v="80.0">a</span>' in html
    assert html.count(" f ") == 1
    assert html.endswith("↵<wbr>b")


def test_numbers() -> None:
    shown = [figures(v) for v in (None, 0, 0.01234, -1.5, 1234.5, 4.2e-5, 12345678)]
    assert shown == ["–", "0", "0.0123", "−1.50", "1,234", "4.2·10⁻⁵", "1.2·10⁷"]
    assert [percent(v) for v in (0, 0.0004, 0.034, 0.5, 1e-6)] == ["0%", "0.04%", "3.4%", "50%", "<0.01%"]
    assert [figures(v) for v in (0.0099999, 0.00099999, 999.9)] == ["0.0100", "0.00100", "1,000"]
    assert [tick(v) for v in (0, 0.5, 10, 2500, 0.0001)] == ["0", "0.5", "10", "2,500", "10⁻⁴"]
    assert [duration(v) for v in (3.21, 59.0, 61, 3700)] == ["3.2 s", "59 s", "1 min 1 s", "1 h 1 min"]
    assert [memory(v) for v in (2**20, 3 * 2**29)] == ["1 MiB", "1.50 GiB"]
    assert nice_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3, 3) == [3]


def test_ramps() -> None:
    grid = {"values": [[0.001, 1.0, None]], "scale": "log", "floor": 0.01}
    ramp = ramp_of(grid)
    assert ramp is not None
    assert (ramp.low, ramp.high) == (0.01, 1.0)
    assert [ramp.step(v) for v in (0.001, 0.01, 0.1, 1.0)] == [0, 0, 6, 11]
    assert ramp_of({"values": [[None]]}) is None
    scores = ramp_of({"values": [[0.4, 0.5, 0.74, 1.0]], "scale": "linear", "start": 0.5})
    assert scores is not None
    assert [scores.step(v) for v in (0.4, 0.5, 0.74, 1.0)] == [0, 0, 5, 11]
    by_chance = ramp_of({"values": [[0.4, 0.5]], "scale": "linear", "start": 0.5})
    assert by_chance is not None
    assert (by_chance.low, by_chance.high) == (0.5, 1.0)
    assert ramp_of({"values": [[0.0]], "scale": "log"}) is None


def test_reasoning_features_and_the_lens_are_shown_as_text(study: Study, browser: Browser) -> None:
    page, trouble = opened(browser, study.path)
    section = page.locator("#reasoning")
    assert "Found in the thinking of heldout" in section.inner_text()
    assert section.locator("table").count() >= 3
    view = reasoning_view(study)
    shown = {row["feature"] for kind in view["kinds"] for row in kind["rows"]}
    linked = section.locator("a[href^='#card-']")
    assert linked.count() >= 1
    section.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    name = linked.first.inner_text().replace("−", "-")
    assert name in shown | {row["feature"] for contrast in view["contrasts"] for row in contrast["predictors"]}
    linked.first.click()
    card = page.locator(f'[id="card-{name.rstrip("+-")}"]')
    assert card.get_attribute("open") is not None
    assert page.evaluate("document.activeElement.closest('.card').id") == card.get_attribute("id")
    lens = page.locator('[id="card-L1.gate"] .lens')
    assert lens.count() == 2
    assert "weak" not in str(lens.first.get_attribute("class"))
    assert "60%" in lens.nth(1).inner_text()
    assert lens.first.locator(".tok").all_inner_texts() == ["</b><script>hacked", "·think", "↵", "<E2 80>"]
    assert lens.first.inner_text().startswith("Reads")
    assert page.evaluate("window.hacked") is None
    assert trouble == []
