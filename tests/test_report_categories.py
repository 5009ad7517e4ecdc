"""The categories' part of the report: what its figures add up to, where they lead, and that colour is not all."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from lorascope.config import Options
from lorascope.explain.categories import CategorizeConfig, categorize
from lorascope.report import ReportConfig, write_report
from lorascope.report.flows import GAP, HEIGHT, flow_chart, flow_paths, flow_table, place_nodes
from lorascope.report.rings import arc, colour_class, share_rings
from lorascope.report.scatter import SHAPES, link_target, point_map, shape_of
from lorascope.study import Study
from lorascope.views import category_view, feature_page
from lorascope.views.category_shares import left_out, rising
from planted_categories import PLANTED, planted_categories
from report_study import HOSTILE, make_report_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study, _ = planted_categories(tmp_path_factory.mktemp("categories") / "study")
    categorize(study, CategorizeConfig(), Options())
    write_report(study, ReportConfig(latents=2, traces=1), Options())
    return study


def opened(browser: Browser, path: Path, **context: Any) -> tuple[Page, list[str]]:
    page = browser.new_context(offline=True, **context).new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto((path / "report.html").as_uri())
    return page, trouble


def test_view_says_what_to_run(tmp_path: Path) -> None:
    view = category_view(Study.create(tmp_path / "study", model="tiny", system=None))
    assert view["available"] is False
    assert view["missing"]["run"] == f"lorascope train {tmp_path / 'study'}"
    assert view["missing"]["own"] == f"lorascope categorize {tmp_path / 'study'}"


def test_view_of_planted_categories(study: Study) -> None:
    view = category_view(study)
    latents = view["kinds"][0]
    assert [entry["number"] for entry in view["categories"]] == list(range(1, 8))
    for i, (category, subcategory) in enumerate(PLANTED):
        group = next(group for group in latents["members"] if group["category"] == category)
        assert [(sub["name"], sub["n"], [f["id"] for f in sub["features"]]) for sub in group["subcategories"]] == [
            (subcategory, 1, [f"sae.{i}"])
        ]
    page = feature_page(study, "sae.3", "heldout")
    assert (page["category"]["category"], page["category"]["subcategory"]) == list(PLANTED)[3]
    outcomes = [(group["category"], group["number"], group["anchor"], group["n"]) for group in latents["members"][-3:]]
    assert outcomes[0] == ("none fits", 0, "none-fits", 2)
    assert [one[2:] for one in outcomes[1:]] == [("no-answer", 0), ("nothing-to-go-by", 0)]
    directions = view["kinds"][1]
    assert directions["members"][-1]["n"] == 9  # polarities that never fire
    anchors = [row["anchor"] for row in latents["rows"]]
    assert len(set(anchors)) == len(anchors)
    listed = {sub["anchor"] for group in latents["members"] for sub in group["subcategories"] if sub["name"]}
    assert {row["anchor"] for row in latents["rows"] if row["subcategory"] and row["n"]} == listed
    assert (view["listed"], view["drawn"]) == (8, 500)
    points = {(one["kind"], one["space"]): one["points"] for one in view["maps"]}
    assert {point["id"] for point in points["latent", "decoder"]} == {f"sae.{i}" for i in range(9)}
    assert all(0 <= point[axis] <= 1 for one in points.values() for point in one for axis in "xy")
    assert "sae.0: computational operations, cluster" in "".join(p["said"] for p in points["latent", "decoder"])


def test_a_map_says_what_is_not_on_it_and_a_table_what_is_circular(study: Study, browser: Browser) -> None:
    assert rising({"2": 0.1, "3": 0.3, "10": 0.3}) == 10
    assert rising({"2": 0.1, "3": 0.3, "10": 0.2}) is None
    assert rising({}) is None
    space = {"too_few_firings": 3, "without_explanation": 2}
    assert [(part["n"], part["why"]) for part in left_out(space, 20)] == [
        (3, "fire on fewer than 20 tokens"),
        (2, "have no explanation's words"),
    ]
    assert left_out({"kind": "token"}, 20) == []
    page, _ = opened(browser, study.path)
    captions = page.locator("#categories .mapgrid figcaption").all_inner_texts()
    maps = [one["label"] for one in category_view(study)["maps"]]
    said = [label for label, caption in zip(maps, captions, strict=True) if "9 that fire on fewer than 20" in caption]
    assert said == ["Directions by explanation", "Directions by co-activation"]
    table = page.locator("#categories .data", has_text="Adjusted Rand index")
    assert "agree by the way they are made" in table.locator("caption").inner_text()
    marked = [row for row in table.locator("tbody tr").all_inner_texts() if "share their words" in row]
    assert len(marked) >= 1
    assert all("by explanation" in row and "categories" in row for row in marked)


def test_flow_keeps_its_weight() -> None:
    rows = [
        {"type": t, "third": third, "category": c, "subcategory": s, "number": n, "latents": 1, "weight": base * w}
        for (t, third, base) in (("q", "early third", 3.0), ("up", "late third", 5.0))
        for (c, s, n, w) in (
            ("a", "same", 1, 1.0),
            ("b", "same", 2, 2.0),
            ("b", "rare", 2, 0.01),
            ("none fits", None, 0, 1.0),
        )
    ]
    paths = flow_paths(rows)
    placed, scale = place_nodes(paths)
    total = sum(row["weight"] for row in rows)
    names = [[node.name for node in placed if node.column == c] for c in range(4)]
    assert names == [
        ["q", "up"],
        ["early third", "late third"],
        ["same", "same", "other groups", "none fits"],
        ["a", "b", "none fits"],
    ]
    for c in range(4):
        column = sorted(place for node, place in placed.items() if node.column == c)
        assert sum(height for _, height in column) == pytest.approx(scale * total)
        for (top, height), (after, _) in pairwise(column):
            assert after == pytest.approx(top + height + GAP)
        assert column[0][0] >= -1e-9
        assert column[-1][0] + column[-1][1] <= HEIGHT + 1e-9
    table = flow_table({"rows": rows}, "type")
    assert [(name, share) for name, _, share in table] == [("q", pytest.approx(3 / 8)), ("up", pytest.approx(5 / 8))]
    assert all(sum(inside.values()) == pytest.approx(1) for _, inside, _ in table)
    assert table[0][1]["a"] == pytest.approx(1 / 4.01)
    svg = str(flow_chart({"rows": rows}))
    assert svg.count('class="ribbon') == 6 + 8 + 4
    assert svg.count('href="#map"') == 4
    studio = str(flow_chart({"rows": rows}, types="/features?kind=direction&type={}", thirds="/map"))
    assert 'href="/features?kind=direction&amp;type=q"' in studio
    assert studio.count('href="/map"') == 2
    assert "#map" not in studio
    assert "style=" not in svg


def test_rings_are_shares_of_a_circle() -> None:
    assert arc(0, 0.25, (100, 200)) == ("M210.0 10.0A200 200 0 0 1 410.0 210.0L310.0 210.0A100 100 0 0 0 210.0 110.0Z")
    assert " 0 1 1 " in arc(0, 0.75, (100, 200))
    assert "NaN" not in arc(0, 1, (100, 200))

    def share(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    rows = [
        {"category": "<b>", "subcategory": None, "number": 1, "anchor": "1", "n": 3, "rate": share(0.75)},
        {"category": "<b>", "subcategory": "x", "number": 1, "anchor": "1-1", "n": 2, "rate": share(0.5)},
        {"category": "<b>", "subcategory": "y", "number": 1, "anchor": "1-2", "n": 1, "rate": share(0.25)},
        {"category": "none fits", "subcategory": None, "number": 0, "anchor": "none-fits", "n": 1, "rate": share(0.15)},
        {"category": "no answer", "subcategory": None, "number": 0, "anchor": "no-answer", "n": 1, "rate": share(0.1)},
    ]
    svg = str(share_rings({"kind": "latent", "label": "latents", "features": 4, "rows": rows}))
    assert "<b>" not in svg
    assert 'aria-label="&lt;b&gt;: 75% (74% to 76%), 3 latents"' in svg
    assert svg.count('class="outer k1"') == 2
    ends = ("1", "1-1", "1-2", "none-fits", "no-answer")  # an outer arc's is its subcategory's
    assert re.findall(r'href="#([^"]+)"', svg) == [f"cat-latent-{end}" for end in ends]
    empty = {"kind": "latent", "label": "latents", "features": 0, "rows": [{**rows[0], "rate": None}]}
    assert "Nothing fires" in share_rings(empty)


def test_points_have_a_shape_of_their_own_and_a_target() -> None:
    assert len(set(SHAPES)) == len(SHAPES) == 10
    assert [shape_of(n) for n in (0, 1, 9, 10)] == [0, 1, 9, 1]
    assert [colour_class(n) for n in (0, 1, 9, 10)] == ["k0", "k1", "k9", "k1"]
    assert link_target("L1.gate-", "2", "direction", ["L1.gate"], []) == "card-L1.gate"
    assert link_target("sae.3", "2", "latent", ["sae.3"], ["sae.3"]) == "card-sae.3"
    assert link_target("sae.4", "2", "latent", ["sae.3"], ["sae.4"]) == "m-sae.4"
    assert link_target("sae.5", "no-answer", "latent", [], []) == "cat-latent-no-answer"
    point: dict[str, Any] = {"id": "sae.4", "x": 0.5, "y": 1.0, "number": 2, "anchor": "2", "segment": None}
    point |= {"cluster": 0, "said": "<i>"}
    html = str(point_map({"label": "L", "kind": "latent", "corpus": "heldout", "points": [point]}, [], []))
    assert "&lt;i&gt;" in html
    assert "<i>" not in html
    assert 'class="point k2" x="50.0%" y="12"' in html
    token = point | {"id": None, "number": None, "anchor": None, "segment": "think", "trace": 7, "position": 31}
    one = {"label": "L", "kind": "token", "corpus": "my set", "points": [token]}
    assert '<a href="/trace/my%20set/7#t31" tabindex="-1">' in point_map(one, [], [], "/trace/{corpus}")
    assert 'href="/' not in point_map(one, [], [])  # the report has no page of a trace


def test_figures_lead_to_the_features(study: Study, browser: Browser) -> None:
    page, trouble = opened(browser, study.path)
    fold = page.locator("#cat-latent-1")
    assert not fold.evaluate("e => e.open")
    page.locator('.rings a[href="#cat-latent-1"]').first.click()
    assert fold.evaluate("e => e.open")
    assert "sae.0" in fold.inner_text()
    assert "adding and subtracting" in fold.inner_text()
    arc_ = page.locator(".rings a:has(path.outer)").first
    heading = str(arc_.get_attribute("href"))[1:]
    fold.evaluate("e => { e.open = false; }")
    arc_.dispatch_event("click")
    assert page.evaluate("id => document.getElementById(id).tagName", heading) == "H4"
    assert "adding and subtracting" in page.locator(f"#{heading}").inner_text()
    assert fold.evaluate("e => e.open")
    assert page.get_by_text("at most 8 of each subcategory").count() == 2
    assert page.get_by_text("draws at most 500 points").count() == 1
    page.locator('.flow a[href="#cat-latent-7"]').last.click()
    assert page.locator("#cat-latent-7").evaluate("e => e.open")
    for name in ("#card-sae.", "#m-sae."):
        link = page.locator(f'.points a[href^="{name}"]').first
        target = str(link.get_attribute("href"))[1:]
        page.evaluate("id => { document.getElementById(id).closest('details').open = false; }", target)
        link.dispatch_event("click")
        assert page.evaluate("id => document.getElementById(id).closest('details').open", target)
    hrefs = page.locator("#categories a").evaluate_all("links => links.map(a => a.getAttribute('href').slice(1))")
    gone = page.evaluate("ids => ids.filter(id => !document.getElementById(id))", hrefs)
    assert gone == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    places = [f"Category: {category}, {sub} lexical" for category, sub in PLANTED]
    cards = page.locator(".card.latent").evaluate_all("all => all.map(card => [card.dataset.card, card.textContent])")
    for name, text in cards:
        number = int(name.removeprefix("sae."))
        assert [place in text for place in places] == [i == number for i in range(len(places))]
    assert trouble == []


def test_every_figure_has_its_numbers_in_words(study: Study, browser: Browser) -> None:
    page, _ = opened(browser, study.path)
    table = page.locator("#categories .ringtable").first
    assert table.locator("tbody tr").count() == 8
    said = table.locator("tbody tr").first.inner_text()
    assert re.search(r"1 computational operations\s+most of it: adding and subtracting\s+\d+% \(.+% to \d+%\)", said)
    flow = page.locator("#categories details", has_text="The flow as a table")
    flow.locator("summary").click()
    cells = flow.locator("tbody tr").evaluate_all("rows => rows.map(r => [...r.children].map(c => c.innerText))")
    assert [row[0] for row in cells] == ["q", "gate", "down", "early third", "middle third", "late third"]
    assert [row[1] for row in cells] == ["33%"] * 6  # nine latents of one length each
    assert cells[3][2:5] == ["33%"] * 3
    assert cells[5][-1] == "67%"  # two of the three latents of the last layer fit none
    assert page.locator("#categories .data", has_text="Adjusted Rand index").locator("tbody tr").count() >= 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_the_paper(study: Study, browser: Browser, scheme: str) -> None:
    page, _ = opened(browser, study.path, color_scheme=scheme)
    ratios = page.evaluate(
        """() => {
        const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const light = (colour) => {
          context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
        const paper = getComputedStyle(document.body).backgroundColor;
        const on = getComputedStyle(document.querySelector(".rings .on")).fill;
        return [...Array(10).keys()].map((i) => {
          const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
          path.setAttribute("class", `k${i}`);
          document.querySelector(".rings").append(path);
          const fill = getComputedStyle(path).fill;
          path.remove();
          return [ratio(fill, paper), ratio(fill, on)];
        });
    }"""
    )
    assert min(paper for paper, _ in ratios) >= 3, ratios  # graphical objects
    assert min(on for _, on in ratios) >= 3, ratios  # numbers in large bold type


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_page_and_hostile_tokens_stay_text(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, width: int
) -> None:
    study = make_report_study(tmp_path_factory.mktemp("hostile") / "study", traces=12)
    write_report(study, ReportConfig(directions=2, latents=2, traces=1), Options())
    page, trouble = opened(browser, study.path, viewport={"width": width, "height": 800})
    page.locator("#categories details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    assert HOSTILE[:2] in study.traces("heldout")[0].thinking
    assert page.locator("#categories .points use").count() > 50
    assert page.locator("#categories img, #categories textarea, #categories script").count() == 0
    assert trouble == []
