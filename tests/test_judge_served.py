"""A real server as judge, `transformers serve` with the built-in model: its answers arrive, and one is read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorascope.config import Options
from lorascope.explain import ExplainConfig, explain_features
from lorascope.explain.budget import Budget, Limits
from lorascope.explain.judge_log import TRUNCATED, is_passing
from lorascope.explain.judges import Endpoint, Judge, Question, open_log
from lorascope.explain.prompts import ask_confidence, read_confidence
from lorascope.models import load_tokenizer
from lorascope.study import read_rows
from planted_text import planted_study

SERVE = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(URL, model) of a running server."""
    folder = load_tokenizer("smollm2-135m-instruct").name_or_path
    port = free_port()
    output = tmp_path_factory.mktemp("served") / "log.txt"
    command = [sys.executable, "-c", SERVE, "serve", folder, "--port", str(port), "--host", "127.0.0.1"]
    with output.open("wb") as file:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=file, stderr=file, env=os.environ.copy())
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        server.terminate()
        server.wait(30)


def test_a_served_model_explains_and_scores(tmp_path: Path, served: tuple[str, str]) -> None:
    url, model = served
    study, ids = planted_study(tmp_path / "study", traces=60)
    seed = next(s for s in range(1000) if np.random.default_rng(s).permutation(12)[0] == 0)  # draws the first feature
    config = ExplainConfig(kinds="direction", explainer="judge", judge_model=model, judge_url=url, limit=1)
    config = replace(config, examples=5, asked=10, window=4, shown=4, judge_max_tokens=12, judge_concurrency=2)
    result = explain_features(study, config, Options(seed=seed))["direction"]
    (row,) = read_rows(study.path / "explanations" / "direction.jsonl")
    assert (row["feature"], row["explainer"]) == (ids["a token"], f"judge:{model}")
    assert row["text"] or row["reason"]
    assert row["class"]["reason"] or row["class"]["failure"]
    asked = read_rows(next((study.path / "explanations" / "judges").glob("*.jsonl")))
    assert len(asked) == result["spent"]["calls"] >= 2
    assert all(row["tokens_in"] > 20 and 1 <= row["tokens_out"] <= 12 and row["text"] for row in asked)
    assert not any(row["failure"] and is_passing(row["failure"]) for row in asked)
    assert result["spent"]["tokens_out"] == sum(row["tokens_out"] for row in asked)
    (study.path / "explanations" / "direction.jsonl").unlink()
    again = explain_features(study, replace(config, judge_url="http://127.0.0.1:9/v1"), Options(seed=seed))["direction"]
    assert (again["spent"]["calls"], again["reasons"]) == (0, result["reasons"])


def test_a_served_model_is_asked_every_scoring_question(
    tmp_path: Path, served: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explanation is given, for a model of 135M writes none that can be read; everything after it is the product's:
    the questions of detection and fuzzing, on the feature and on a shuffled one, the rows, the scores."""
    url, model = served
    study, _ = planted_study(tmp_path / "study", traces=60)
    given = {"text": "the word is", "rule": None, "reason": None, "class": None}
    monkeypatch.setattr("lorascope.explain.asking.explain_feature", lambda *_: dict(given))
    sent: list[str] = []
    send = Judge._send  # 48 tokens below are enough for ten numbers in JSON, which take about 30

    def record(self: Judge, question: Question) -> Any:
        sent.append(json.dumps(question.messages))
        return send(self, question)

    monkeypatch.setattr(Judge, "_send", record)
    seed = next(s for s in range(1000) if np.random.default_rng(s).permutation(12)[0] == 0)  # draws the first feature
    config = ExplainConfig(kinds="direction", explainer="judge", judge_model=model, judge_url=url, limit=1)
    config = replace(config, examples=5, asked=10, window=2, judge_max_tokens=48, judge_concurrency=2)
    result = explain_features(study, config, Options(seed=seed))["direction"]
    (row,) = read_rows(study.path / "explanations" / "direction.jsonl")
    assert row["text"] == given["text"]
    kept = read_rows(next((study.path / "explanations" / "judges").glob("*.jsonl")))
    assert Counter(json.dumps(one["messages"]) for one in kept) == Counter(sent)
    assert len(sent) == result["spent"]["calls"] == 4
    marked = ["stand between the marks" in one["messages"][0]["content"] for one in kept]
    assert sorted(marked) == [False, False, True, True]
    for one in kept:  # the server counted its tokens: it was there
        assert '"the word is"' in one["messages"][1]["content"]
        assert one["served_model"]
        assert one["tokens_in"] > 200
        assert 1 <= one["tokens_out"] <= 48
        assert one["text"]
        assert one["finish"] == ("length" if one["failure"] == TRUNCATED else "stop")
        assert one["failure"] is None or not is_passing(one["failure"])
    for name in ("detection", "fuzzing", "detection_shuffled", "fuzzing_shuffled"):
        score = row["scored"][name]
        assert sum(score["failures"].values()) == score["unparsed"] in (0, score["n"])
        assert 8 <= score["n"] <= 10
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    failed = [one["failure"] for one in kept if one["failure"]]
    said = Counter(
        reason for name in row["scored"] if name != "wrong_from" for reason in row["scored"][name]["failures"]
    )
    assert said == Counter(failed)


def test_a_served_model_is_asked_for_a_number_and_it_is_read(tmp_path: Path, served: tuple[str, str]) -> None:
    """One window, shown how by three others, for a model of 135M knows no other way: a number comes back.

    The server may keep to the schema, refuse it (then the concession is on record) or pass over it, as this one does;
    the text is read in any case.
    """
    url, model = served
    told = 'Does the text have the word "is"? Answer with JSON: {"confidence": [0 to 10]}'
    messages = [{"role": "system", "content": told}]
    for text, number in (("two plus two is four", 9), ("Then we stop here", 1), ("the answer is seven", 9)):
        messages += [{"role": "user", "content": text}]
        messages += [{"role": "assistant", "content": json.dumps({"confidence": [number]})}]
    messages += [{"role": "user", "content": "日本 🙂 it is so"}]
    schema = ask_confidence("the word is", ["(think) it is so"], None, 0).schema
    question = Question(messages, "confidence", schema, lambda value: read_confidence(value, 1))
    log = open_log(tmp_path, Endpoint(model, url))
    with Judge(Endpoint(model, url, max_tokens=40), log, Budget(Limits()), 1) as judge:
        (reply,) = judge.ask_all([question])
    log.close()
    (row,) = read_rows(next(tmp_path.glob("*.jsonl")))
    assert (reply.failure, row["finish"]) == (None, "stop")
    assert set(row["left_out"]) <= {"response_format"}
    assert row["attempts"] == 1 + len(row["left_out"])
    assert reply.value == [number / 10 for number in json.loads(row["text"])["confidence"]]
    assert len(reply.value) == 1
    assert row["served_model"]
