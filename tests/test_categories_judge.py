"""Categories by a judge: what it is told, that nothing is lost or paid for twice, and options that make no sense."""

import ast
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.explain.categories import CategorizeConfig, categorize
from lorascope.explain.categories.assign import REASON_WITHOUT
from lorascope.explain.categories.words import feature_text
from lorascope.explained import NONE_FITS
from lorascope.study import Study, read_json, read_rows
from planted_categories import NEUTRAL, PLANTED, planted_categories
from scripted_judge import Said, scripted_judge

CONFIG = CategorizeConfig(by="judge")
STRONGEST = re.compile(r"""^Strongest on: ('[^']*'|"[^"]*") \(""", re.M)


def rows_of(study: Study, kind: str) -> dict[str, dict[str, Any]]:
    return {row["feature"]: row for row in read_rows(study.path / "categories" / f"{kind}.jsonl")}


def strongest_in(text: str) -> str:
    """The commonest token of what a judge is told."""
    found = STRONGEST.search(text)
    assert found, text
    return str(ast.literal_eval(found.group(1)))


def place_of(text: str) -> tuple[str, str] | None:
    """The planted category of what a judge is told, None for words of no category."""
    return next((place for place, words in PLANTED.items() if strongest_in(text) in words), None)


def named(request: dict[str, Any]) -> Said:
    """A judge that names the planted category."""
    place = place_of(request["messages"][1]["content"])
    return Said(json.dumps({"category": " / ".join(place) if place else "none fits"}))


def test_a_judge_is_told_one_explanation_and_no_id() -> None:
    rule = {"feature": "L3.down-", "text": "fires on ' is'", "rule": {"any": []}, "explainer": "lexical"}
    judges = {"feature": "L3.down-", "text": "forms of to be", "rule": None, "explainer": "judge:m"}
    failed = {"feature": "L3.down-", "text": None, "rule": None, "explainer": "judge:n"}
    tokens = [(" is", 1.0), (" was", 1.0), (" is", 1.0), ("it", 0.5)]
    assert feature_text([rule], tokens) == "Explanation: fires on ' is'\nStrongest on: ' is' (2), ' was' (1)"
    assert feature_text([rule, failed, judges], []) == "Explanation: forms of to be"
    assert feature_text([failed], tokens) == "Strongest on: ' is' (2), ' was' (1)"
    assert feature_text([failed], []) == ""


def test_a_judge_that_fails_a_third_of_the_time_loses_nothing(tmp_path: Path) -> None:
    study, where = planted_categories(tmp_path / "study", traces=20)
    told: list[str] = []

    def ask(text: str) -> str | None:
        told.append(text)
        if strongest_in(text) in NEUTRAL[:3]:
            return NONE_FITS.title()
        if len(told) % 3 == 0:
            return None
        category, subcategory = place_of(text) or ("astrology", "")
        return category if len(told) % 3 == 1 else f"{category.upper()} / {subcategory}"

    result = categorize(study, CONFIG, Options(), ask)
    for kind, features in (("latent", 9), ("direction", 18)):
        rows = rows_of(study, kind)
        assert len(rows) == features == result["kinds"][kind]["features"]
        assert all(row["by"] == "judge" and row["reason"] for row in rows.values())
        for feature, row in rows.items():
            if row["category"]:
                assert row["category"] == where[feature][0]
                assert row["subcategory"] in (None, where[feature][1])
        reasons = Counter(row["reason"] for row in rows.values() if row["category"] is None)
        counts = result["kinds"][kind]
        assert reasons["no answer from the judge"] >= 2
        assert sum(row["outcome"] == "no answer" for row in rows.values()) == counts["no_answer"]
        assert counts["no_answer"] == reasons["no answer from the judge"] + sum(
            n for reason, n in reasons.items() if "'astrology" in reason.lower()
        )
        assert reasons["none fits, says the judge"] == counts["none_fits"] == 1
        assert reasons[REASON_WITHOUT] == counts["without"] == features - 9
        assert counts["assigned"] + sum(reasons.values()) == features
    assert len(told) == 18
    planted = [text for text in told if place_of(text)]
    assert len(planted) == 2 * len(PLANTED)
    assert all(text.startswith("Explanation: fires on ") and text.count("\n") == 1 for text in planted)
    assert not any(re.search(r"sae\.\d|L\d\.", text) for text in told)
    shares = read_json(study.path / "categories" / "shares.json")
    assert shares["by"] == "judge"
    whole = sum(row["n"] for row in shares["kinds"]["latent"]["rows"] if row["subcategory"] is None)
    assert whole == 9


def test_a_judge_behind_a_url_is_asked_once_and_continues_after_its_budget(tmp_path: Path) -> None:
    study, where = planted_categories(tmp_path / "study", traces=20)

    def script(request: dict[str, Any]) -> Said:
        place = place_of(request["messages"][1]["content"])
        assert place is None or f"- {place[0]} / {place[1]}: " in request["messages"][0]["content"]
        return named(request)

    with scripted_judge(script) as judge:
        config = replace(CONFIG, judge_model="m", judge_url=judge.url, judge_concurrency=2, judge_max_tokens=2000)
        with pytest.raises(RunFailed, match="the same command continues"):
            categorize(study, replace(config, budget_calls=5), Options())
        assert len(judge.requests) == 5
        with pytest.raises(RunFailed, match="the same command continues"):
            categorize(study, replace(config, budget_tokens=1000), Options())
        assert len(judge.requests) == 5  # one more could cost more than that
        result = categorize(study, replace(config, budget_calls=100), Options())
        asked = [json.dumps(request, sort_keys=True) for request in judge.requests]
        assert len(asked) == len(set(asked)) <= 18
        assert {request["max_tokens"] for request in judge.requests} == {2000}
    of_this_run = len(asked) - 5  # the first five were paid by the first run
    spent = {"calls": of_this_run, "tokens_in": 100 * of_this_run, "tokens_out": 10 * of_this_run, "money": 0.0}
    assert result["spent"].pop("replayed") >= 5  # and more, where features of two kinds are told in the same words
    assert result["spent"] == spent
    assert study.manifest["stages"]["categorize"]["result"]["spent"].items() >= spent.items()
    for kind in ("latent", "direction"):
        for feature, row in rows_of(study, kind).items():
            assert (row["category"], row["subcategory"]) == where.get(feature, (None, None))
    assert result["kinds"]["latent"]["assigned"] == sum(name.startswith("sae.") for name in where)


def test_a_passing_failure_of_the_judge_has_its_reason_and_is_asked_again(tmp_path: Path) -> None:
    study, where = planted_categories(tmp_path / "study", traces=20)
    down = {"now": True}

    def script(request: dict[str, Any]) -> Said:
        busy = down["now"] and place_of(request["messages"][1]["content"]) == where["sae.1"]
        return Said(status=503, body="busy") if busy else Said(json.dumps({"category": "none fits"}))

    with scripted_judge(script) as judge:
        config = replace(CONFIG, kinds="latent", judge_model="m", judge_url=judge.url, judge_retries=0)
        first = categorize(study, config, Options())
        assert rows_of(study, "latent")["sae.1"]["reason"] == "no answer from the judge: HTTP 503"
        down["now"], asked = False, len(judge.requests)
        second = categorize(study, config, Options())
        assert len(judge.requests) == asked + 1
    assert (first["kinds"]["latent"]["no_answer"], second["kinds"]["latent"]["no_answer"]) == (1, 0)


def test_a_larger_limit_asks_again_only_what_was_cut_off(tmp_path: Path) -> None:
    study, where = planted_categories(tmp_path / "study", traces=20)

    def script(request: dict[str, Any]) -> Said:
        long = place_of(request["messages"][1]["content"]) in (where["sae.1"], where["sae.2"])
        return Said("<think>", finish="length") if long and request["max_tokens"] < 1000 else named(request)

    with scripted_judge(script) as judge:
        config = replace(CONFIG, kinds="latent", judge_model="m", judge_url=judge.url)
        assert categorize(study, config, Options())["kinds"]["latent"]["no_answer"] == 2
        assert rows_of(study, "latent")["sae.1"]["reason"] == "no answer from the judge: truncated"
        asked = len(judge.requests)
        longer = categorize(study, replace(config, judge_max_tokens=1000), Options())
        assert (len(judge.requests) - asked, longer["kinds"]["latent"]["no_answer"]) == (2, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "--by judge needs --judge-model"),
        ({"judge_model": "m", "judge_url": "nowhere"}, "must be like http"),
        ({"judge_model": "m", "judge_url": "http://localhost:1/v1", "judge_concurrency": 0}, "at least 1"),
        ({"judge_model": "m", "judge_url": "http://localhost:1/v1", "budget_money": 1.0}, "--price-in"),
    ],
)
def test_a_judge_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    study = Study.create(tmp_path / "study", model="m", system=None)
    with pytest.raises(BadInput, match=said):
        categorize(study, replace(CONFIG, **changes), Options())
