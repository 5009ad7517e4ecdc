"""The stage with a judge: planted truth, controls, agreement, failures, cut-off runs, budgets, rows kept apart."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from lorascope.cli import main
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.explain import ExplainConfig, explain_features, explainers_of
from lorascope.explain.asking import endpoints
from lorascope.explain.scored import in_order
from lorascope.report.build import make_environment
from lorascope.study import Study, read_rows
from lorascope.views import explanation_scores, feature_page
from planted_text import add_latents, planted_study
from scripted_judge import (
    RULES,
    Said,
    Scripted,
    explanation_in,
    knowing_judge,
    pieces_of,
    prompt_of,
    scripted_judge,
)

CONFIG = ExplainConfig(
    kinds="direction", explainer="judge", judge_model="m", judge_url="http://127.0.0.1:9/v1", examples=30, learn=128
)
SMALL = replace(CONFIG, examples=6, judge_retries=0)
TASKS = ("detection", "fuzzing")
PLANTED = ("a token", "a token after another", "anything after Wait", "a number while thinking")


def rows_of(study: Study, label: str = "judge:m", kind: str = "direction") -> dict[str, dict[str, Any]]:
    rows = [r for r in read_rows(study.path / "explanations" / f"{kind}.jsonl") if r["explainer"] == label]
    assert len({row["feature"] for row in rows}) == len(rows)
    return {row["feature"]: row for row in rows}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, str], dict[str, Any], Scripted]:
    study, ids = planted_study(tmp_path_factory.mktemp("judged") / "study")
    explain_features(study, replace(CONFIG, explainer="lexical"), Options())
    with scripted_judge(knowing_judge) as server:
        result = explain_features(study, replace(CONFIG, judge_url=server.url, passes=2), Options())
    return study, ids, result, server


def test_planted_truth_comes_out(judged: tuple[Study, dict[str, str], dict[str, Any], Scripted]) -> None:
    study, ids, result, _ = judged
    rows = rows_of(study)
    said = ("the word is", "is after answer", "whatever follows Wait", "numbers while thinking")
    for name, text, number in zip(PLANTED, said, (0, 0, 0, 1), strict=True):
        row = rows[ids[name]]
        assert (row["text"], row["class"]["class"], row["rule"]) == (text, number, None)
        assert row["class"]["reason"] == f"It is {text}."
        # A reader of text alone cannot tell "word1", "4" from "word14", so windows of numbers are beyond it.
        for task in ("fuzzing",) if name == "a number while thinking" else ("detection", "fuzzing"):
            assert row["scored"][task]["value"] >= 0.95
            assert row["scored"][task]["auroc"]["value"] >= 0.95
            assert row["scored"][task]["unparsed"] == 0
        assert row["scored"]["wrong_from"].rstrip("+-") != row["feature"].rstrip("+-")
    assert rows[ids["chance"]]["class"]["class"] == 2
    assert rows[ids["nothing"]]["reason"] == "fires on 0 tokens of the training corpus, fewer than 8"
    shuffled = [r["scored"][f"{t}_shuffled"]["value"] for r in rows.values() if r["scored"] for t in TASKS]
    assert len(shuffled) == 10
    assert 0.45 <= np.mean(shuffled) <= 0.55
    found = result["direction"]
    assert found["classes"] == {"0": 3, "1": 1, "2": 1, "failed": 0}
    assert (found["n"], found["explained"], found["n_detection"]) == (12, 5, 5)
    assert found["longer_than_asked"] == 0
    assert 0.4 < found["detection_wrong"]["mean"] < 0.6
    assert 0.45 <= found["fuzzing_shuffled"]["mean"] <= 0.55


def test_a_steady_judge_agrees_with_itself(judged: tuple[Study, dict[str, str], dict[str, Any], Scripted]) -> None:
    _, _, result, _ = judged
    for task in TASKS:
        assert result["direction"][f"{task}_agreement"]["equal"] == 1
        assert result["direction"][f"{task}_agreement"]["n"] == 260
    assert result["direction"]["classes_agreement"]["kappa"] == 1


def test_what_a_judge_sees(judged: tuple[Study, dict[str, str], dict[str, Any], Scripted]) -> None:
    _, _, _, server = judged
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for request in server.requests:
        kind, shown = prompt_of(request)
        by_kind.setdefault(kind, []).append((request["messages"][0]["content"], shown))
        assert all(text not in shown for text in ("\ufffd", "L0.gate"))
    assert len(by_kind["explanation"]) == 5
    assert len(by_kind["class"]) == 10  # two passes
    for _, shown in by_kind["explanation"]:
        assert len(pieces_of(shown)) == 10
        levels = [int(number) for number in re.findall(r'" (\d+)(?=;|$)', shown, re.M)]
        assert len(levels) >= 10
        assert max(levels) == 10
        assert min(levels) >= 1
    classes = {shown for _, shown in by_kind["class"]}
    assert {shown for _, shown in by_kind["explanation"]} <= classes  # apart, but from the same examples
    assert not any(text in shown for text in RULES for shown in classes)
    for told, shown in by_kind["confidence"]:
        assert len(pieces_of(shown)) <= 5
        assert ("<<" in shown) == ("the marks << and >>" in told)
    orders = Counter(len(pieces_of(shown)) for _, shown in by_kind["confidence"])
    assert orders[5] > 100


def test_order_tells_nothing(judged: tuple[Study, dict[str, str], dict[str, Any], Scripted]) -> None:
    """Positives come first in a quiz; a judge that answers by place must be at chance."""
    study, _, _, _ = judged

    def by_place(request: dict[str, Any]) -> Said:
        kind, shown = prompt_of(request)
        if kind == "confidence":
            count = len(pieces_of(shown))
            return Said(json.dumps({"confidence": [10] * (count // 2) + [0] * (count - count // 2)}))
        return knowing_judge(request)

    with scripted_judge(by_place) as server:
        config = replace(CONFIG, judge_model="place", judge_url=server.url)
        result = explain_features(study, config, Options())
    assert abs(result["direction"]["detection"]["mean"] - 0.5) < 0.1
    assert abs(result["direction"]["fuzzing"]["mean"] - 0.5) < 0.1


def test_rows_of_explainers_are_never_mixed(
    judged: tuple[Study, dict[str, str], dict[str, Any], Scripted],
) -> None:
    study, ids, result, _ = judged
    lexical, judge = rows_of(study, "lexical"), rows_of(study)
    assert set(lexical) == set(judge)
    assert all(row["rule"] is None for row in judge.values())
    own = np.mean([row["scored"]["detection"]["value"] for row in lexical.values() if row["scored"]])
    assert study.summary["detection"]["mean"] == pytest.approx(own, abs=1e-4)
    assert study.summary["judges"]["judge:m"]["detection"] == result["all"]["detection"]
    assert explainers_of(study)[:2] == ["lexical", "judge:m"]
    shown = [(row["kind"], row["explainer"]) for row in explanation_scores(study)["rows"]]
    assert shown[:4] == [("all", "lexical"), ("direction", "lexical"), ("all", "judge:m"), ("direction", "judge:m")]
    assert {"explain:heldout:direction", "explain:heldout:direction:judge:m"} <= set(study.manifest["stages"])
    page = feature_page(study, ids["a token"], "heldout")
    assert page["explanation"]["explainer"] == "lexical"
    assert page["explanation"]["also"][0]["text"] == "the word is"


def test_lexical_rows_carry_the_shuffled_control(
    judged: tuple[Study, dict[str, str], dict[str, Any], Scripted],
) -> None:
    study, _, _, _ = judged
    rows = [row for row in rows_of(study, "lexical").values() if row["scored"]]
    values = [row["scored"][f"{task}_shuffled"]["value"] for row in rows for task in TASKS]
    assert len(values) == 10
    assert 0.45 <= np.mean(values) <= 0.55


def test_a_third_of_the_answers_failing_loses_nothing(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    draw = random.Random(0)
    bad = [Said("no"), Said("", finish="length"), Said('{"confidence": [1]}'), Said(status=500, body=""), Said("")]

    def failing(request: dict[str, Any]) -> Said:
        return draw.choice(bad) if draw.random() < 1 / 3 else knowing_judge(request)

    with scripted_judge(failing) as server:
        first = explain_features(study, replace(SMALL, judge_url=server.url), Options())["direction"]
    rows = rows_of(study)
    assert len(rows) == first["n"] == 12
    assert sum(first["classes"].values()) == 5
    assert all(row["text"] or row["reason"] for row in rows.values())
    unparsed = first["detection_counts"]["unparsed"]
    own = [row["scored"]["detection"] for row in rows.values() if row["scored"] and row["scored"]["detection"]]
    final = [sum(n for why, n in score["failures"].items() if why != "HTTP 500") for score in own]
    assert unparsed == sum(final) > 0  # what failed in passing is no answer, good or bad
    assert min(score["n"] + score["failures"].get("HTTP 500", 0) for score in own) > 10
    assert set(first["detection_failures"]) >= {"not JSON", "HTTP 500", "truncated"}
    assert any(row.get("retry") for row in rows.values())
    final = {row["key"]: row for row in read_rows(study.path / "explanations" / "judges" / "m.jsonl")}
    again = [row for row in final.values() if row["failure"] == "HTTP 500"]
    with scripted_judge(knowing_judge) as server:
        second = explain_features(study, replace(SMALL, judge_url=server.url), Options())["direction"]
        asked = {json.dumps(request["messages"], sort_keys=True) for request in server.requests}
        # What failed in passing is asked again, what failed for good is not.
        assert {json.dumps(row["messages"], sort_keys=True) for row in again} <= asked
        for row in final.values():
            if row["failure"] != "HTTP 500":
                assert json.dumps(row["messages"], sort_keys=True) not in asked
        assert "HTTP 500" not in second["detection_failures"]
        assert not any(row.get("retry") for row in rows_of(study).values())
        count = len(server.requests)
        explain_features(study, replace(SMALL, judge_url=server.url), Options())
        assert len(server.requests) == count


def test_a_finished_run_replays_offline(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    with scripted_judge(knowing_judge) as server:
        config = replace(SMALL, judge_url=server.url)
        explain_features(study, config, Options())
    first = rows_of(study)
    (study.path / "explanations" / "direction.jsonl").unlink()
    (unscored,) = (study.path / "explanations" / "unscored").glob("direction*.jsonl")
    unscored.unlink()
    result = explain_features(study, replace(config, judge_key_env="NOT_SET"), Options())
    assert rows_of(study) == first
    assert result["direction"]["spent"]["calls"] == 0
    assert result["direction"]["spent"]["replayed"] > 0


def test_a_killed_run_continues_without_a_repeated_call(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    held, answered, lock = threading.Event(), [0], threading.Lock()

    def holding(request: dict[str, Any]) -> Said:
        with lock:
            answered[0] += 1
            late = answered[0] > 20
        if late:  # from here on nothing is answered until the run is killed
            held.wait(60)
        return knowing_judge(request)

    log = study.path / "explanations" / "judges" / "m.jsonl"
    arguments = ["explain", str(study.path), "--explainer", "judge", "--judge-model", "m", "--kinds", "direction"]
    arguments += ["--examples", "6", "--judge-retries", "0", "--judge-url"]
    with scripted_judge(holding) as server:
        command = [sys.executable, "-m", "lorascope", *arguments, server.url]
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as run:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (not log.is_file() or log.read_bytes().count(b"\n") < 20):
                time.sleep(0.02)
            run.send_signal(signal.SIGKILL)
        held.set()
        paid = [json.dumps(json.loads(line)["messages"]) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(paid) == 20
    with scripted_judge(knowing_judge) as server:
        assert main([*arguments, server.url]) == 0
        asked = [json.dumps(request["messages"]) for request in server.requests]
    assert not set(paid) & set(asked)
    assert len(set(asked)) == len(asked)
    assert len(rows_of(study)) == 12


def test_a_spent_budget_keeps_what_is_done_and_a_larger_one_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    with scripted_judge(knowing_judge) as server:
        arguments = ["explain", str(study.path), "--explainer", "judge", "--judge-model", "m", "--kinds", "direction"]
        arguments += ["--examples", "6", "--judge-url", server.url]
        assert main([*arguments, "--budget-calls", "15"]) == 1
        error = capsys.readouterr().err
        assert "budget is spent (15 requests" in error
        assert error.count("\n") == 1
        assert len(server.requests) == 15
        assert main([*arguments, "--budget-calls", "1000"]) == 0
        asked = [json.dumps(request["messages"]) for request in server.requests]
        assert len(set(asked)) == len(asked)
    assert len(rows_of(study)) == 12


def test_other_judges_for_classes_and_for_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ids = planted_study(tmp_path / "study", traces=60)
    monkeypatch.setenv("MAIN_KEY", "main-key")

    def contrary(request: dict[str, Any]) -> Said:
        kind, shown = prompt_of(request)
        if kind == "confidence":
            return Said(json.dumps({"confidence": [0] * len(pieces_of(shown))}))
        return Said(json.dumps({"reason": "no", "class": 2}))

    with scripted_judge(knowing_judge) as one, scripted_judge(contrary) as two:
        config = replace(SMALL, judge_url=one.url, judge_key_env="MAIN_KEY")
        config = replace(config, class_judge_model="c", second_judge_model="n", second_judge_url=two.url)
        result = explain_features(study, config, Options())["direction"]
        assert {request["model"] for request in one.requests} == {"m", "c"}
        assert {request["model"] for request in two.requests} == {"n"}
        assert {prompt_of(request)[0] for request in one.requests if request["model"] == "c"} == {"class"}
        assert {headers["authorization"] for headers in one.headers} == {"Bearer main-key"}
        assert {headers["authorization"] for headers in two.headers} == {"Bearer none"}  # its key goes nowhere else
    assert 0.4 < result["detection_agreement"]["equal"] < 0.7
    assert result["detection_agreement"]["kappa"] == pytest.approx(0, abs=1e-9)
    assert result["classes_agreement"]["n"] == 5
    assert rows_of(study)[ids["a token"]]["class_again"]["class"] == 2
    names = sorted(path.name for path in (study.path / "explanations" / "judges").glob("*.jsonl"))
    assert names == ["c.jsonl", "m.jsonl", "n.jsonl"]


def test_an_address_alone_makes_two_passes(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    with scripted_judge(knowing_judge) as one, scripted_judge(knowing_judge) as two:
        config = replace(SMALL, judge_url=one.url, second_judge_url=two.url)
        result = explain_features(study, config, Options())["direction"]
        assert two.requests
        assert {request["model"] for request in two.requests} == {"m"}
    assert result["classes_agreement"]["n"] > 0
    assert {row["with"] for row in explanation_scores(study)["agreement"]} == {f"judge:m at {two.url}"}


@pytest.mark.parametrize("option", ["model", "url", "key_env"])
def test_any_option_of_a_second_judge_makes_two_passes(option: str) -> None:
    second = endpoints(replace(SMALL, judge_url="http://one", **{f"second_judge_{option}": "other"}))[1]
    assert second is not None
    assert getattr(second, option) == "other"
    assert endpoints(replace(SMALL, judge_url="http://one"))[1] is None


def test_latents_go_through_the_same_path(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    add_latents(study)
    with scripted_judge(knowing_judge) as server:
        result = explain_features(study, replace(SMALL, kinds="direction,latent", judge_url=server.url), Options())
    row = rows_of(study, kind="latent")["sae.0"]
    assert (row["text"], row["scored"]["fuzzing"]["value"]) == ("the word is", 1.0)
    assert (result["latent"]["n"], result["all"]["n"]) == (5, 17)
    assert study.summary["judges"]["judge:m"]["explanations"]["latent"]["features"] == 5
    spent = [result[kind]["spent"] for kind in ("direction", "latent")]  # each kind has what it cost itself
    assert sum(one["calls"] for one in spent) == len(server.requests) > spent[0]["calls"] > spent[1]["calls"] > 0
    assert sum(one["tokens_in"] for one in spent) == 100 * len(server.requests)
    assert study.summary["detection"] == result["all"]["detection"]  # there is no lexical one


def test_a_larger_limit_asks_again_only_what_was_cut_off(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)

    def script(request: dict[str, Any]) -> Said:
        cut = prompt_of(request)[0] == "class" and request["max_tokens"] < 1000
        return Said("<think>so", finish="length") if cut else knowing_judge(request)

    with scripted_judge(script) as server:
        config = replace(SMALL, judge_url=server.url)
        first = explain_features(study, config, Options())["direction"]
        assert first["classes"] == {"0": 0, "1": 0, "2": 0, "failed": 5}
        asked = len(server.requests)
        second = explain_features(study, replace(config, judge_max_tokens=1000), Options())["direction"]
        assert [prompt_of(request)[0] for request in server.requests[asked:]] == ["class"] * 5
        assert second["classes"]["failed"] == 0
        assert second["detection"] == first["detection"]
        assert len(rows_of(study)) == 12
        explain_features(study, config, Options())
        assert len(server.requests) == asked + 5


def test_answers_of_the_same_name_from_elsewhere_are_used_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    add_latents(study)
    with scripted_judge(knowing_judge) as one:
        explain_features(study, replace(SMALL, judge_url=one.url), Options())
        assert capsys.readouterr().err == ""
    with scripted_judge(knowing_judge) as two:
        explain_features(study, replace(SMALL, kinds="direction,latent", judge_url=two.url), Options())
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"Answers of 'm' from {one.url} are used again in this run at {two.url}" in said
        assert "--judge-model" in said


def test_long_explanations_are_kept_and_counted(tmp_path: Path) -> None:
    study, ids = planted_study(tmp_path / "study", traces=60)
    said = " ".join(f"word{k}" for k in range(11))

    def wordy(request: dict[str, Any]) -> Said:
        kind, _ = prompt_of(request)
        return Said(json.dumps({"explanation": said})) if kind == "explanation" else knowing_judge(request)

    with scripted_judge(wordy) as server:
        result = explain_features(study, replace(SMALL, judge_url=server.url), Options())
    assert result["direction"]["longer_than_asked"] == 5
    assert rows_of(study)[ids["a token"]]["text"] == said


def test_an_interruption_waits_for_what_is_in_flight_and_asks_nothing_more(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)

    def slow(request: dict[str, Any]) -> Said:
        return replace(knowing_judge(request), delay=0.3)

    arguments = ["explain", str(study.path), "--explainer", "judge", "--judge-model", "m", "--kinds", "direction"]
    with scripted_judge(slow) as server:
        command = [sys.executable, "-m", "lorascope", *arguments, "--judge-url", server.url]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and len(server.requests) < 20:
                time.sleep(0.02)
            run.send_signal(signal.SIGINT)
            _, error = run.communicate(timeout=60)
        assert (run.returncode, error.count("\n")) == (130, 1)
        rows = read_rows(study.path / "explanations" / "judges" / "m.jsonl")
        assert len(rows) == len(server.requests) < 60  # of more than 300, and each that was paid for is kept
        assert all(row["failure"] is None for row in rows)


def test_bad_options_of_judges_are_named(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=8)
    for changes, message in [
        ({"judge_model": None}, "--judge-model and --judge-url"),
        ({"judge_url": ""}, "--judge-model and --judge-url"),
        ({"judge_url": "localhost:8000"}, "must be like http"),
        ({"judge_url": "http://me:secret@host/v1"}, "leave the key out"),
        ({"judge_url": "http://x/v1", "class_judge_url": "https://host/v1?key=1"}, "leave the key out"),
        ({"passes": 3}, "--passes"),
        ({"judge_concurrency": 0}, "--judge-concurrency"),
        ({"judge_timeout": 0.0}, "--judge-timeout"),
        ({"budget_calls": 0}, "--budget-calls"),
        ({"budget_money": 1.0}, "--price-in"),
        ({"budget_money": 1.0, "price_in": 5.0, "price_out": -1.0}, "below 0"),
        ({"asked": 0}, "at least 1"),
    ]:
        with pytest.raises(BadInput, match=message):
            explain_features(study, replace(CONFIG, **changes), Options())


def test_a_judge_that_is_not_there_loses_nothing(tmp_path: Path) -> None:
    study, _ = planted_study(tmp_path / "study", traces=60)
    with scripted_judge(knowing_judge) as server:
        pass
    with pytest.raises(RunFailed, match="does not answer"):
        explain_features(study, replace(SMALL, judge_url=server.url), Options())
    with scripted_judge(knowing_judge) as server:
        result = explain_features(study, replace(SMALL, judge_url=server.url), Options())
    assert result["direction"]["explained"] == 5


def test_explanations_in_prompts_are_read_back() -> None:
    shown = 'The feature is said to be active as follows: "it \\"is\\""\n\n1. (think) "x"'
    assert explanation_in(shown) == 'it "is"'


def test_an_interrupted_run_begins_nothing_more() -> None:
    made: list[int] = []

    def work(item: int) -> int:
        made.append(item)
        if item == 3:
            raise KeyboardInterrupt
        return item

    stopped: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        for _ in in_order(work, range(1000), 2, lambda: stopped.append(True)):
            pass
    assert stopped == [True]
    assert len(made) < 12
    assert list(in_order(str, range(50), 3, lambda: None)) == [(k, str(k)) for k in range(50)]


def test_ranks_and_agreement_reach_the_reader(
    judged: tuple[Study, dict[str, str], dict[str, Any], Scripted],
) -> None:
    study, _, result, _ = judged
    view = explanation_scores(study)
    rows = [row for row in view["agreement"] if row["explainer"] == "judge:m"]
    assert [(row["what"], row["with"]) for row in rows] == [
        (what, "its own second pass") for what in (*TASKS, "classes")
    ]
    assert all(row["equal"] == {"value": 1, "low": None, "high": None} for row in rows)
    assert (rows[0]["label"], rows[0]["n"]) == ("directions", result["direction"]["detection_agreement"]["n"])
    environment = make_environment(jinja2.PackageLoader("lorascope.report"))
    page = environment.from_string('{% import "parts.html.j2" as parts %}{% include "scores.html.j2" %}')
    html = page.render(scores=view)
    auroc = view["rows"][2]["tasks"]["detection"]["auroc"]
    assert f"{auroc['value']:.2f} ({auroc['low']:.2f} to {auroc['high']:.2f})" in html
    assert "How far judges agree" in html
    lexical = view | {"ranked": False, "agreement": []}
    plain = page.render(scores=lexical)
    assert "AUROC" not in plain
    assert "agree" not in plain
