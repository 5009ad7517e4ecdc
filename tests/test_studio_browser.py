"""The studio in a browser: every page opens without errors, keys work, notes stay, hostile text is inert."""

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from lorascope.studio.notes import FILE, Note, current_notes, read_events
from lorascope.study import Study
from lorascope.views.effects import direction_effects
from report_study import HOSTILE, make_report_study
from studio_hands import notes_on
from studio_server import studio_at

PAGES = {
    "overview": "/",
    "map": "/map",
    "features": "/features",
    "direction": "/feature/L1.gate%2B",
    "latent": "/feature/sae.1",
    "compare": "/compare?features=L1.gate%2B%2Csae.1",
    "traces": "/traces",
    "trace": "/trace/train/0?features=L1.gate%2B%2Csae.1#t12",
    "evidence": "/evidence",
    "categories": "/categories",
    "notes": "/notes",
    "live": "/live?features=L1.gate%2B%2Csae.1&moves=add%3A2%2Cclamp%3A1",
    "missing": "/compare",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("browser") / "study")
    direction_effects(study, "train")  # else the map would reload once they are measured
    return study


@pytest.fixture(scope="module")
def base(study: Study) -> Iterator[str]:
    with studio_at(study) as address:
        yield address


def opened(browser: Browser, address: str, **context: Any) -> tuple[Page, list[str]]:
    """A page in a new window; the list collects errors and requests to anywhere else."""
    page = browser.new_context(**context).new_page()
    trouble: list[str] = []
    host = "/".join(address.split("/")[:3])
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(host) else trouble.append(request.url))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    return page, trouble


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_clean_in_every_width_and_theme(browser: Browser, base: str, name: str) -> None:
    for width, scheme in ((360, "light"), (768, "dark"), (1280, "light")):
        page, trouble = opened(
            browser, base + PAGES[name], viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        assert trouble == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("h1").count() == 1
        assert page.locator('nav [aria-current="page"]').count() == (0 if name in ("compare", "missing") else 1)
        page.context.close()


def test_from_the_map_to_the_planted_trigger(browser: Browser, base: str) -> None:
    """Map, direction, example, trace: the planted full stop is lit in each."""
    page, trouble = opened(browser, base + "/map")
    page.locator("#tab-kl").click()
    assert page.locator("#grid-kl .hatch").count() >= 7, "what is under the floor is hatched"
    page.locator('#grid-kl rect[data-a="L1.gate"]').click()
    page.wait_for_url("**/feature/L1.gate%2B")
    plus = page.locator("#side-0")
    peaks = plus.locator(".peak").all_inner_texts()
    assert len(peaks) >= 3
    assert all("." in text for text in peaks)
    plus.locator(".course").scroll_into_view_if_needed()
    expect(plus.locator(".course rect").first).to_be_attached()
    plus.locator(".example .where a").first.click()
    page.wait_for_url("**/trace/train/**")
    expect(page.locator("#counted")).to_contain_text("tokens fire")
    lit = page.locator("#trace span.f:not(.sp)").all_inner_texts()
    assert lit
    assert all("." in text for text in lit)
    expect(page.locator("#here ol").first).to_contain_text("L1.gate+")
    assert trouble == []


def test_jumps_between_firings_and_several_features(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/1?features=L1.gate%2B")
    first = page.locator("#counted").inner_text()
    page.keyboard.press("n")
    assert page.locator("#trace .cursor").inner_text().strip().startswith(".")
    assert page.locator("#counted").inner_text().startswith("firing 1 of ")
    page.keyboard.press("p")
    count = int(first.split()[0])
    assert page.locator("#counted").inner_text().startswith(f"firing {count} of {count}")
    page.locator("#add").fill("L2.down+")
    page.locator("#add").press("Enter")
    expect(page.locator("#chips li")).to_have_count(2)
    assert "L2.down" in page.url
    lines = page.locator("#trace span:is(.on1, .on2)").evaluate_all(
        "spans => spans.map((s) => { const look = getComputedStyle(s); return [s.classList.contains('on1'), "
        "s.classList.contains('on2'), look.backgroundImage.split('gradient(').length - 1, look.paddingBottom]; })"
    )
    assert {(True, False), (False, True)} <= {(first, second) for first, second, _, _ in lines}
    assert {(drawn, room) for _, _, drawn, room in lines} == {(2, "10px")}, "two lines, each with its room"
    page.locator("#chips button").first.click()
    expect(page.locator("#chips li")).to_have_count(1)
    page.locator("#add").fill("nothing+")
    page.locator("#add").press("Enter")
    expect(page.locator("#toast")).to_have_text("No such feature: nothing+")
    expect(page.locator("#chips li")).to_have_count(1)
    page.locator("#add").fill("l1.gate−")
    page.locator("#add").press("Enter")
    expect(page.locator("#chips a").last).to_have_text("L1.gate−")
    page.locator("#trace").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#here h2")).to_contain_text("Token")
    assert trouble == []


def test_the_panel_is_of_the_token_under_the_cursor(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/1?features=L1.gate%2B#t0")
    expect(page.locator("#here")).to_contain_text("nothing fires here")
    expect(page.locator("#here h3").first).to_contain_text("above the firing level, uncounted")
    titles = set()
    for _ in range(2):
        page.locator("#next-firing").click()
        at = page.locator("#trace > span").evaluate_all("s => s.findIndex((t) => t.classList.contains('cursor'))")
        expect(page.locator("#here h2")).to_contain_text(f"Token {at}:")
        expect(page.locator("#here textarea")).to_have_attribute("aria-label", f"Note on token {at}")
        expect(page.locator("#here h3").first).to_contain_text("fire")
        titles.add(at)
    assert len(titles) == 2
    page.locator("#trace").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#here h2")).to_contain_text(f"Token {at + 1}:")
    expect(page.locator("#here textarea")).to_have_count(0)
    assert trouble == []


def test_words_take_the_first_feature_that_they_find(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/1")
    first = page.request.get(base + "/features.json?size=12&q=fires").json()["rows"][0]["id"]
    page.locator("#add").fill("fires")
    page.locator("#add").press("Enter")
    expect(page.locator("#chips a")).to_have_text(first.replace("-", "−"))
    page.goto(base + "/trace/train/1?features=bogus,sae.1")
    expect(page.locator("#chips a")).to_have_text("sae.1")
    expect(page.locator("main > .absent")).to_contain_text("bogus")
    assert trouble == []


def test_what_counts_for_no_feature_is_hatched_and_low_in_strips(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/1?features=L1.gate%2B,L2.down%2B,L0.q%2B,L0.q-")
    kinds = page.locator("#trace > span").evaluate_all("spans => spans.map(span => [...span.classList])")
    uncounted = [names for names in kinds if {"sp", "sk"} & set(names)]
    assert any("un" in names for names in uncounted)
    assert not any(name[0] == "h" and name[1:].isdigit() for names in uncounted for name in names)
    assert not any("un" in names for names in kinds if not {"sp", "sk"} & set(names))
    heights = page.locator("#strips rect.un").evaluate_all("bars => bars.map(bar => bar.getAttribute('height'))")
    assert heights
    assert set(heights) == {"8"}
    shaded = page.locator("#trace > span[class*=hue]:not(.un)")
    assert shaded.count() > 10
    assert all(shaded.evaluate_all("s => s.map((t) => /\\b(on|by)[1-4]\\b/.test(t.className))")), "never by hue alone"
    lines = page.locator("#trace > span:is(.by1, .by2, .by3, .by4):not(.f)").evaluate_all(
        "s => s.map((t) => getComputedStyle(t).backgroundImage.match(/(repeating-)?linear-gradient/g) ?? [])"
    )
    assert lines, "some are shaded and do not fire"
    dotted, track = "repeating-linear-gradient", "linear-gradient"
    for drawn in lines:
        assert sorted(drawn) == [track, track, track, dotted], "its line among the tracks of the others"
    expect(page.locator("#strips .striprow span").first).to_contain_text("1 L1.gate+, 0 to ")
    assert trouble == []


def test_search_as_one_types_sort_and_compare(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/features")
    page.keyboard.press("/")
    page.keyboard.type("l1.gate")
    page.wait_for_url("**/features?q=l1.gate")
    assert page.locator(".found").inner_text().startswith("2 of ")
    page.locator(".pick").nth(0).check()
    page.locator("#q").fill("")
    page.wait_for_url("**/features")
    page.locator('[data-sort="kl"]').click()
    expect(page.locator('th[aria-sort="descending"]')).to_contain_text("KL")
    assert page.locator("tr[data-id]").first.get_attribute("data-id").startswith("L1.gate")
    page.locator('[data-sort="kl"]').click()
    expect(page.locator('th[aria-sort="ascending"]')).to_contain_text("KL")
    page.locator('select[name="kind"]').select_option("latent")
    expect(page.locator("tr[data-id]").first).to_have_attribute("data-id", "sae.0")
    page.locator(".pick").nth(1).check()
    assert "2 of at most" in page.locator("#compare").inner_text()
    page.locator("#compare").click()
    expect(page.locator(".side-by-side section")).to_have_count(2)
    assert trouble == []


def test_keys_move_and_go(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/features")
    names = page.locator("tr[data-id]").evaluate_all("rows => rows.map(row => row.dataset.id)")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator("tr.at").get_attribute("data-id") == names[1]
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_url("**/feature/**")
    assert page.locator("h1").inner_text() == names[0].rstrip("+-")
    page.keyboard.press("j")
    page.wait_for_url("**/feature/L0.k%2B")
    page.keyboard.press("k")
    page.wait_for_url("**/feature/L0.q%2B")
    for key, place in (("m", "/map"), ("t", "/traces"), ("n", "/notes"), ("o", "/")):
        page.keyboard.press("g")
        page.keyboard.press(key)
        page.wait_for_url(base + place)
        page.wait_for_load_state("networkidle")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colour
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colour, "the theme is kept"
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.locator(".leaders li a").first.click()
    page.wait_for_url("**/feature/**")
    assert trouble == []


def test_matrix_by_keyboard(browser: Browser, study: Study, base: str, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    names = ["L0.q", "L1.gate"]
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    matrix = {"kl_NN": np.array([[1, -1], [-1, 4]], np.float32)}
    save_file(matrix, copy.path / "ablation" / "interactions.safetensors", {"addresses": ",".join(names)})
    with studio_at(copy) as address:
        page, trouble = opened(browser, address + "/map")
        page.locator("#matrix").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#pair")).to_have_text("L0.q and L1.gate: cosine −0.50, they cancel")
        pixels = page.evaluate("[...document.querySelector('#matrix').getContext('2d').getImageData(0, 0, 2, 2).data]")
        assert pixels[0:4] == pixels[12:16] != pixels[4:8] == pixels[8:12]
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_url("**/feature/L1.gate%2B")
        assert trouble == []


def saving(page: Page, field: str) -> AbstractContextManager[object]:
    """Wait for the answer to the saving of a field."""
    said = f'"field":"{field}"'
    return page.expect_response(lambda r: r.url.endswith("/notes") and said in (r.request.post_data or ""))


def note_at(study: Study, place: str) -> Note:
    return current_notes(read_events(study.path / FILE)[0]).get(place, Note(place))


def test_notes_are_saved_at_once_and_stay(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/feature/L2.down%2B")
    editor = notes_on(page, "L2.down+")
    with saving(page, "star"):
        page.keyboard.press("s")
    expect(editor.locator(".saved")).to_have_text("Saved.")
    for name, value, last in (
        (".label", "the verb", "label"),
        (".text", f"is, or {HOSTILE}", "text"),
        (".tags", "verb, to be", "tag:to-be"),
    ):
        with saving(page, last):
            editor.locator(name).fill(value)
            editor.locator(name).blur()
    expect(editor.locator(".saved")).to_have_text("Saved.")
    note = note_at(study, "feature:L2.down+")
    assert (note.star, note.label, note.tags) == (True, "the verb", ("to-be", "verb"))
    assert note.text == f"is, or {HOSTILE}"
    page.reload()
    assert editor.locator(".text").input_value() == f"is, or {HOSTILE}"
    assert editor.locator(".star").get_attribute("aria-pressed") == "true"
    page.goto(base + "/notes")
    assert HOSTILE in page.locator(".notes").inner_text()
    assert page.evaluate("window.hacked") is None
    page.goto(base + "/features?q=the+verb")
    assert page.locator("tr[data-id]").count() == 1
    assert "★" in page.locator("tr[data-id]").inner_text()
    theirs = read_events(study.path / FILE)[0][0] | {"id": "theirs", "field": "label", "value": "theirs"}
    page.goto(base + "/notes")
    file = {"name": "n.jsonl", "mimeType": "text/plain", "buffer": (json.dumps(theirs) + "\n").encode()}
    page.locator("#merge").set_input_files(file)
    expect(page.locator("#merged")).to_have_text("1 new, 0 known.")
    assert trouble == []


def test_what_is_typed_last_is_saved_though_the_page_is_left(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/feature/L0.q%2B")
    editor = notes_on(page, "L0.q+")
    editor.locator(".text").press_sequentially("half a thought")
    editor.locator(".tags").press_sequentially("late")
    page.goto(base + "/features?q=half+a+thought")
    page.wait_for_load_state("networkidle")
    note = note_at(study, "feature:L0.q+")
    assert (note.text, note.tags) == ("half a thought", ("late",))
    assert trouble == []


def test_what_was_not_saved_does_not_look_saved(browser: Browser, study: Study, base: str) -> None:
    page, _ = opened(browser, base + "/feature/L0.k%2B")
    editor, tried = notes_on(page, "L0.k+"), []

    def fail_once(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        tried.append(body["field"])
        refused = {"tag:no": 400, "star": 503, "tag:a": 503 if tried.count("tag:a") == 1 else 0}.get(body["field"], 0)
        if refused:
            route.fulfill(status=refused, json={"error": f"No {body['field']}."})
        else:
            route.continue_()

    page.route("**/notes", fail_once)
    editor.locator(".tags").fill("a, b")
    editor.locator(".tags").blur()
    expect(editor.locator(".saved")).to_have_text("Not saved: No tag:a. Trying again…")
    expect(editor.locator(".saved")).to_have_text("Saved.", timeout=20_000)
    editor.locator(".text").fill("words")
    editor.locator(".text").blur()
    expect(editor.locator(".saved")).to_have_text("Saved.")
    assert tried == ["tag:a", "tag:a", "tag:b", "text"], "in the order in which they were made"
    editor.locator(".star").click()
    expect(editor.locator(".saved")).to_have_text("Not saved: No star.")
    expect(editor.locator(".star")).to_have_attribute("aria-pressed", "false")
    editor.locator(".tags").fill("a, b, no, c")
    editor.locator(".tags").blur()
    expect(editor.locator(".saved")).to_have_text("Not saved: No tag:no.")
    note = note_at(study, "feature:L0.k+")
    assert (note.text, note.tags, note.star) == ("words", ("a", "b", "c"), False)
    page.context.close()


def test_a_note_that_was_changed_elsewhere_is_said(browser: Browser, study: Study, base: str) -> None:
    pages = [opened(browser, base + "/feature/L0.up%2B")[0] for _ in range(2)]
    for page, text in zip(pages, ("one", "two"), strict=True):
        editor = notes_on(page, "L0.up+")
        with saving(page, "text"):
            editor.locator(".text").fill(text)
            page.locator("#side-0 .text").blur()
    expect(pages[0].locator("#side-0 .saved")).to_have_text("Saved.")
    expect(pages[1].locator("#side-0 .saved")).to_contain_text("in place of a newer note")
    note = note_at(study, "feature:L0.up+")
    assert (note.text, [event["value"] for event in note.earlier]) == ("two", ["one"])
    with saving(pages[1], "text"):
        pages[1].locator("#side-0 .text").fill("three")
        pages[1].locator("#side-0 .text").blur()
    expect(pages[1].locator("#side-0 .saved")).to_have_text("Saved.")


def test_an_example_unfolds_to_its_whole_trace(browser: Browser, base: str) -> None:
    for address in ("/feature/L1.gate%2B", "/compare?features=L1.gate%2B,sae.0"):
        page, trouble = opened(browser, base + address)
        example = page.locator(".example").first
        short = example.locator(":scope > .tokens").first.inner_text()
        peak = example.locator(".tokens .peak").inner_text()
        example.locator(".unfold").click()
        whole = example.locator(".whole")
        expect(whole).to_be_visible()
        expect(example.locator(".tokens:not(.whole)")).to_be_hidden()
        assert whole.locator(".peak").inner_text() == peak
        assert whole.locator("span.f").count() > 0
        assert len(whole.inner_text()) > len(short)
        example.locator(".unfold").click()
        expect(whole).to_be_hidden()
        expect(example.locator(".tokens:not(.whole)")).to_be_visible()
        assert page.evaluate("window.hacked") is None
        assert trouble == []
        page.context.close()


def test_a_note_on_a_token_is_saved_like_any_other(browser: Browser, study: Study, base: str) -> None:
    page, _ = opened(browser, base + "/trace/train/1#t30")
    area, tried = page.locator("#here textarea"), []

    def fail_once(route: Route) -> None:
        if route.request.method == "POST":
            tried.append(json.loads(route.request.post_data or "{}")["value"])
        if tried == ["odd"]:
            route.fulfill(status=503, json={"error": "Not now."})
        else:
            route.continue_()

    page.route("**/notes", fail_once)
    area.press_sequentially("odd")
    expect(page.locator("#here .saved")).to_have_text("Not saved: Not now. Trying again…")
    page.locator("#trace > span").nth(31).click()
    expect(page.locator("#here h2")).to_contain_text("Token 31")
    page.locator("#trace > span").nth(30).click()
    expect(area).to_have_value("odd")  # what is on its way is still there
    expect(page.locator("#trace > span").nth(30)).to_have_attribute("data-note", "✎", timeout=20_000)
    assert note_at(study, "token:train:1:30").text == "odd"
    assert set(tried) == {"odd"}
    page.locator("#trace > span").nth(32).click()
    expect(page.locator("#here h2")).to_contain_text("Token 32")
    area.press_sequentially("half a thought")
    page.goto(base + "/features")
    page.wait_for_load_state("networkidle")
    assert note_at(study, "token:train:1:32").text == "half a thought"
    page.context.close()


def test_the_side_that_is_asked_for_is_marked_and_starred(browser: Browser, study: Study, base: str) -> None:
    page, trouble = opened(browser, base + "/feature/L0.v-", viewport={"width": 360, "height": 700})
    expect(page.locator(".side.asked")).to_have_attribute("aria-label", "L0.v-")
    expect(page.locator(".side.asked h3").first).to_be_in_viewport()
    with saving(page, "star"):
        page.keyboard.press("s")
    expect(page.locator(".side.asked .saved")).to_have_text("Saved.")
    assert note_at(study, "feature:L0.v-").star
    assert not note_at(study, "feature:L0.v+").star
    page.goto(base + "/feature/L0.v%2B")
    assert page.evaluate("scrollY") == 0
    expect(page.locator(".side.asked")).to_have_attribute("aria-label", "L0.v+")
    assert trouble == []


def test_keys_work_on_a_ticked_box_and_links_are_links(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/features")
    page.locator(".pick").first.check()
    page.keyboard.press("j")
    expect(page.locator("tr.at")).to_have_count(1)
    page.goto(base + "/categories")
    links = page.locator('a.id[href^="/feature/"]')
    assert links.count() > 0
    assert page.locator('a[href^="#card-"]').count() == 0
    address = links.first.get_attribute("href")
    page.locator("details:has(a.id)").first.evaluate("fold => { fold.open = true; }")
    with page.context.expect_page() as other:
        links.first.click(modifiers=["ControlOrMeta"])
    assert other.value.url == f"{base}{address}"
    assert page.url.endswith("/categories")
    assert trouble == []


def test_hostile_tokens_are_text(browser: Browser, base: str) -> None:
    page, trouble = opened(browser, base + "/trace/train/0?features=L1.gate%2B")
    shown = page.locator("#trace").evaluate("box => box.textContent")
    assert HOSTILE in shown.replace("·", " ").replace("\u00a0", " ")
    assert page.locator("#trace img, #trace script, main textarea").count() == 1, "the note's own text area"
    page.locator("#trace > span").nth(30).click()
    expect(page.locator("#here h2")).to_contain_text("Token 30")
    assert page.evaluate("window.hacked") is None
    page.locator("#here textarea").fill(HOSTILE)
    page.locator("#here textarea").blur()
    expect(page.locator("#trace > span").nth(30)).to_have_attribute("data-note", "✎")
    page.reload()
    page.wait_for_load_state("networkidle")
    expect(page.locator("#trace > span").nth(30)).to_have_attribute("data-note", "✎")
    assert page.locator("#here textarea").input_value() == HOSTILE
    assert page.evaluate("window.hacked") is None
    for address in ("/traces?corpus=train", "/features", "/features?q=%3C%2Ftextarea%3E%3Cscript%3E"):
        page.goto(base + address)
        assert page.evaluate("window.hacked") is None
    assert trouble == []


def test_a_changed_study_is_announced(browser: Browser, study: Study, tmp_path: Path) -> None:
    copy = Study(Path(shutil.copytree(study.path, tmp_path / "copy")))
    with studio_at(copy) as address:
        page, _ = opened(browser, address + "/")
        expect(page.locator("#changed")).to_be_hidden()
        copy.summarise({"new": 1})
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#changed")).to_be_visible()
        page.locator("#reload").click()
        page.wait_for_load_state("networkidle")
        expect(page.locator("#changed")).to_be_hidden()


def test_a_stopped_studio_is_said(browser: Browser, study: Study) -> None:
    with studio_at(study) as address:
        page, _ = opened(browser, address + "/feature/L1.gate%2B")
    page.locator(".note-editor .star").first.click()
    expect(page.locator(".note-editor .saved").first).to_contain_text("still running?")
