"""The comparison's view: what tests say in words, explainers apart, kinds that are not there named; and its section."""

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from compared_study import add_kind, explained_row, make_compared_study
from lorascope.cli import main
from lorascope.comparison import CompareConfig, compare
from lorascope.config import Options
from lorascope.report import ReportConfig, write_report
from lorascope.report.marks import score_floor, score_mark
from lorascope.study import Study
from lorascope.views import comparison_view
from lorascope.views.compare import uneven_training, verdict
from lorascope.views.feature_list import feature_kind, feature_place
from tiny_store import make_study

TEST: dict[str, Any] = {
    "first": "direction",
    "second": "neuron",
    "n": [400, 380],
    "difference": {"value": 0.12, "low": 0.1, "high": 0.14},
    "p": 0.0001,
    "p_holm": 0.0002,
    "detectable": 0.03,
}


def test_a_difference_is_named_with_its_direction() -> None:
    assert verdict(TEST) == "Directions above MLP neurons (+0.120, +0.100 to +0.140; corrected p < 0.001)."
    lower = TEST | {"difference": {"value": -0.12, "low": -0.14, "high": -0.1}}
    assert verdict(lower) == "Directions below MLP neurons (−0.120, −0.140 to −0.100; corrected p < 0.001)."


def test_no_difference_says_what_would_have_been_found() -> None:
    none = TEST | {"difference": {"value": 0.01, "low": -0.02, "high": 0.04}, "p": 0.4, "p_holm": 1.0}
    assert verdict(none) == (
        "Directions and MLP neurons: no difference found (+0.010, −0.020 to +0.040; corrected p = 1); a single test of "
        "this size finds one of 0.030 or more four times in five."
    )
    corrected = TEST | {"p": 0.02, "p_holm": 0.3}
    assert "no difference found after correction" in verdict(corrected)
    assert "too few to test (n = 400 and 1)" in verdict(TEST | {"p": None, "p_holm": None, "n": [400, 1]})


def test_what_is_paired_is_said_after_the_test() -> None:
    gap = {"value": 0.05, "low": 0.01, "high": 0.09}
    paired = TEST | {"paired": {"addresses": 24, "difference": gap, "p_uncorrected": 0.021}}
    assert verdict(paired) == (
        "Directions above MLP neurons (+0.120, +0.100 to +0.140; corrected p < 0.001). Paired at 24 addresses: "
        "+0.050, +0.010 to +0.090; uncorrected p = 0.021."
    )
    none = {"addresses": 1, "difference": gap, "p_uncorrected": None}
    assert verdict(TEST | {"paired": none}) == verdict(TEST) == verdict(TEST | {"paired": None})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_compared_study(tmp_path_factory.mktemp("view") / "study")
    compare(study, CompareConfig(draws=2000), Options())
    return study


def test_every_kind_has_a_label_and_every_test_its_words(study: Study) -> None:
    view = comparison_view(study)
    (table,) = view["tables"]
    assert [row["label"] for row in table["rows"]][:3] == ["directions", "latents", "MLP neurons"]
    assert not any(row["drawn"] for row in table["rows"])
    assert [group["measure"] for group in table["verdicts"]] == [
        "Detection",
        "Detection above the wrong explanation's",
        "Detection, failures as chance",
        "Fuzzing",
        "Fuzzing above the wrong explanation's",
        "Share with a score",
    ]
    assert sum(len(group["sentences"]) for group in table["verdicts"]) == len(table["tests"]) == 36
    assert [group["shown"] for group in table["verdicts"]] == [True] * 3 + [False] * 3
    detection = table["verdicts"][0]["sentences"]
    assert any(text.startswith("Directions above random directions") for text in detection)
    assert [part["name"] for part in table["by"]] == ["third", "type", "family"]


def test_a_terminal_gets_a_table_and_sentences(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(study.path), "--draws", "2000"]) == 0
    text = capsys.readouterr().out
    view = comparison_view(study)
    (table,) = view["tables"]
    assert len(text.splitlines()) < 100
    for row in table["rows"]:
        assert re.search(rf"^{row['label']}.*  {row['n']} .*{row['score']['value']:.3f} \(", text, re.M)
    for said in table["verdicts"]:
        assert all(sentence in text for sentence in said["sentences"])
        assert all(sentence in text for sentence in said["families"])
    head, *rows = text.split("\n\n")[1].splitlines()
    starts = [head.index(name) for name in ("n ", "scored", "detection", "wrong", "fuzzing")]
    assert all(row[start - 2 : start] == "  " != row[start] for row in rows for start in starts)


def test_before_the_stage_the_command_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    assert comparison_view(study)["missing"]["own"] == f"lorascope compare {study.path}"
    add_kind(study, "direction", [explained_row("L0.q+", 0.7), explained_row("L1.q+", 0.8)], extra=["L2.q+"])
    compare(study, CompareConfig(draws=200), Options())
    view = comparison_view(study)
    assert {entry["label"] for entry in view["missing_kinds"]} >= {"MLP neurons", "random directions"}
    assert view["tables"][0]["rows"][0]["drawn"]
    assert view["tables"][0]["verdicts"] == []


def test_kinds_that_learned_from_less_text_are_named() -> None:
    rows = [{"label": name, "training_tokens": n} for name, n in (("directions", 9000), ("others", 4500), ("x", None))]
    assert uneven_training(rows) == [
        "Explanations of others were learned from 4,500 ordinary tokens, others from up to 9,000."
    ]


@pytest.mark.parametrize(
    ("feature", "kind", "layer", "type_"),
    [
        ("L12.gate+", "direction", 12, "gate"),
        ("random.L12.gate#difference-", "random", 12, "gate"),
        ("untrained.L3.q#1+", "untrained", 3, "q"),
        ("neuron.L3.512-", "neuron", 3, None),
        ("sae.7", "latent", None, None),
    ],
)
def test_controls_have_their_places(feature: str, kind: str, layer: int | None, type_: str | None) -> None:
    assert feature_kind(feature) == kind
    place = feature_place(feature)
    assert (place["layer"], place["type"]) == (layer, type_)


def test_marks_lie_where_the_scores_are() -> None:
    row = {
        "score": {"value": 0.8, "low": 0.7, "high": 0.9},
        "wrong": {"value": 0.5, "low": 0.47, "high": 0.53},
    }
    assert score_floor([row]) == 0.4
    assert score_floor([row | {"wrong": {"value": 0.4, "low": 0.25, "high": 0.5}}]) == 0.2
    drawn = str(score_mark(row, 0.4))
    assert 'class="dot own" cx="66.67%"' in drawn
    assert 'x1="50.00%" x2="83.33%"' in drawn
    assert 'class="chance" x1="16.67%"' in drawn
    assert score_mark({"score": None, "wrong": None}, 0.4) == ""


def test_the_section_shows_all_kinds_without_trouble(study: Study, browser: Browser) -> None:
    study.update_manifest(corpora={})
    write_report(study, ReportConfig(), Options())
    html = (study.path / "report.html").read_text(encoding="utf-8")
    section = re.search(r'<section id="compare">.*?</section>', html, re.S)
    assert section is not None
    assert "style=" not in section[0]
    for width, scheme in ((1280, "light"), (420, "dark")):
        context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 900})
        page = context.new_page()
        trouble: list[str] = []
        page.on("console", lambda message, trouble=trouble: trouble.append(message.text))
        page.on("pageerror", lambda error, trouble=trouble: trouble.append(str(error)))
        page.goto((study.path / "report.html").as_uri())
        main = page.locator("#compare table.compare").first
        assert main.locator("tbody tr").count() == 6
        assert main.locator("circle.own").count() == 6
        box = main.locator("circle.own").first.bounding_box()
        assert box is not None
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#compare").get_by_text("no difference found").count() > 0
        assert trouble == []
