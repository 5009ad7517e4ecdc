"""The judge's client against a real socket: every fault, retries, budgets, the file, replay without network or key."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorascope.errors import BadInput, RunFailed
from lorascope.explain.budget import Budget, BudgetSpent, Limits
from lorascope.explain.judge_log import is_passing
from lorascope.explain.judges import (
    Endpoint,
    Judge,
    Question,
    Reply,
    Stopped,
    file_name,
    json_objects,
    open_log,
    read_reply,
)
from lorascope.explain.prompts import ask_explanation
from scripted_judge import Said, Scripted, scripted_judge

Script = Callable[[dict[str, Any]], Said]
GOOD = Said('{"word": "yes"}')


def read_word(value: Any) -> str:
    if not isinstance(value["word"], str):
        raise ValueError("a word")
    return str(value["word"])


SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


def question(text: str = "Say yes.") -> Question:
    return Question([{"role": "user", "content": text}], "word", SCHEMA, read_word)


@contextmanager
def judging(
    folder: Path, server: Scripted, *, limits: Limits | None = None, workers: int = 1, **changes: Any
) -> Iterator[Judge]:
    endpoint = replace(Endpoint("m", server.url, timeout=5.0, retries=2), **changes)
    log = open_log(folder, endpoint)
    try:
        with Judge(endpoint, log, Budget(limits or Limits()), workers) as judge:
            yield judge
    finally:
        log.close()


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "m.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def in_turn(*said: Said) -> Script:
    """Each answer once, the last one for ever."""
    left = list(said)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        (Said('{"word": "y', finish="length"), "truncated"),
        (Said("", finish="length"), "truncated"),
        (Said("yes"), "not JSON"),
        (Said("{yes}"), "not JSON"),
        (Said("[1, 2]"), "not JSON"),
        (Said('{"word": 3}'), "wrong schema"),
        (Said('{"other": "yes"}'), "wrong schema"),
        (Said(""), "empty"),
        (Said(None), "empty"),
        (Said("<think>hm</think>"), "not JSON"),
        (Said("", refusal="I cannot help with that."), "refused"),
        (Said("", finish="content_filter"), "refused"),
        (Said(status=418, body="{}"), "HTTP 418"),
    ],
)
def test_what_cannot_be_read_is_a_row_with_a_reason_and_final(tmp_path: Path, said: Said, failure: str) -> None:
    with scripted_judge(lambda _: said) as server:
        with judging(tmp_path, server) as judge:
            assert judge.ask_all([question()]) == [Reply(failure=failure)]
        assert [row["failure"] for row in rows_in(tmp_path)] == [failure]
        assert not is_passing(failure)
        with judging(tmp_path, server) as judge:
            assert judge.ask_all([question()]) == [Reply(failure=failure)]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"word": "yes"}',
        'Sure!\n```json\n{"word": "yes"}\n```\nAnything else?',
        '<think>{"word": "no"} or not?</think>\n{"word": "yes"}',
        '{not this} {"other": 1} {"word": "no"} {"word": "yes"}',
        '{"word": "yes"} and so on without an e',
    ],
)
def test_json_is_found_where_it_stands(text: str) -> None:
    row = {"text": text, "failure": None, "refusal": None, "finish": "length"}
    assert read_reply(question(), row) == Reply("yes")


def test_json_objects_of_hostile_text() -> None:
    assert json_objects("{" * 5000) == []
    assert json_objects('{"a":' * 3000) == []
    assert json_objects('{"a": {"b": 1}} {"c": 2}') == [{"a": {"b": 1}}, {"c": 2}]


@pytest.mark.parametrize("text", ['日本 🙂 Ω \u2028 \x00 "quoted" \\n', "half of a pair \ud83d here"])
def test_unicode_comes_back_and_is_kept(tmp_path: Path, text: str) -> None:
    with scripted_judge(lambda _: Said(json.dumps({"word": text}))) as server:
        for _ in range(2):
            with judging(tmp_path, server) as judge:
                value = judge.ask_all([question("日本 🙂")])[0].value
                assert value.encode("utf-8", "surrogatepass") == text.encode("utf-8", "surrogatepass")
        assert len(server.requests) == 1
        assert server.requests[0]["messages"][0]["content"] == "日本 🙂"
    with scripted_judge(lambda _: Said(text)) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question("other")])[0].failure == "not JSON"  # and a lone surrogate is no crash


def test_retry_after_is_kept_to(tmp_path: Path) -> None:
    busy = Said(status=429, headers={"Retry-After": "0.6"}, body="{}")
    with scripted_judge(in_turn(busy, GOOD)) as server, judging(tmp_path, server) as judge:
        started = time.monotonic()
        assert judge.ask_all([question()]) == [Reply("yes")]
        assert 0.6 <= time.monotonic() - started < 5
    assert rows_in(tmp_path)[0]["attempts"] == 2
    far = Said(status=429, headers={"Retry-After": "Thu, 01 Jan 2099 00:00:00 GMT"}, body="{}")
    with scripted_judge(lambda _: far) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question("more")]) == [Reply(failure="HTTP 429")]
        assert len(server.requests) == 1  # too long to wait for


@pytest.mark.parametrize(
    ("bad", "failure"),
    [(Said(status=500, body="oops"), "HTTP 500"), (Said('{"word": "yes"}', delay=0.6), "time-out")],
)
def test_passing_failures_are_tried_again_now_and_on_the_next_run(tmp_path: Path, bad: Said, failure: str) -> None:
    with scripted_judge(in_turn(bad, GOOD)) as server, judging(tmp_path, server, timeout=0.25) as judge:
        assert judge.ask_all([question("first")]) == [Reply("yes")]
        assert len(server.requests) == 2
    with scripted_judge(lambda _: bad) as server, judging(tmp_path, server, timeout=0.25, retries=1) as judge:
        assert judge.ask_all([question()]) == [Reply(failure=failure)]
        assert len(server.requests) == 2
        assert judge.ask_all([question()]) == [Reply(failure=failure)]  # in this run it is known
        assert len(server.requests) == 2
    assert rows_in(tmp_path)[-1]["failure"] == failure
    assert is_passing(failure)
    with scripted_judge(lambda _: GOOD) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question()]) == [Reply("yes")]
        assert len(server.requests) == 1


def picky(*refused: str) -> Script:
    """An endpoint that does not know some of the parameters."""

    def script(request: dict[str, Any]) -> Said:
        wrong = [name for name in refused if name in request]
        return Said(status=400, body=f'{{"error": "Unsupported parameter {wrong[0]}"}}') if wrong else GOOD

    return script


@pytest.mark.parametrize("refused", [["response_format"], ["seed", "temperature"], ["max_tokens", "response_format"]])
def test_what_an_endpoint_refuses_is_left_out_from_then_on(tmp_path: Path, refused: list[str]) -> None:
    with scripted_judge(picky(*refused)) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question("one")]) == [Reply("yes")]
        tried = len(server.requests)
        assert tried == 1 + len(refused)
        assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
        assert judge.ask_all([question("two"), question("three")]) == [Reply("yes")] * 2
        assert len(server.requests) == tried + 2
        last = server.requests[-1]
        assert not set(refused) & set(last)
        assert ("max_completion_tokens" in last) == ("max_tokens" in refused)
    assert rows_in(tmp_path)[-1]["left_out"] == sorted(refused)


def test_a_refusal_for_another_reason_changes_nothing_else(tmp_path: Path) -> None:
    long = Said(status=400, body='{"error": "context too long"}')
    script = lambda request: long if "long" in request["messages"][0]["content"] else GOOD  # noqa: E731
    with scripted_judge(script) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question("long")]) == [Reply(failure="HTTP 400")]
        assert judge.ask_all([question("short")]) == [Reply("yes")]
        assert "response_format" in server.requests[-1]
    assert "context too long" in rows_in(tmp_path)[0]["detail"]


def test_a_finished_file_replays_without_network_or_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    questions = [question(f"number {k}") for k in range(5)]
    with scripted_judge(lambda _: GOOD) as server, judging(tmp_path, server, key_env="MY_KEY") as judge:
        first = judge.ask_all(questions)
        assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
    monkeypatch.delenv("MY_KEY")
    with judging(tmp_path, server, key_env="MY_KEY") as judge:  # the server is gone
        assert judge.ask_all(questions) == first == [Reply("yes")] * 5
        with pytest.raises(BadInput, match="MY_KEY is not set"):
            judge.ask_all([question("a new one")])


def test_no_key_is_written_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-service")
    echo = Said(status=500, body="Incorrect key sk-secret-123")
    refusing = replace(echo, status=401)
    with scripted_judge(lambda _: echo) as server, judging(tmp_path, server, key_env="MY_KEY", retries=0) as judge:
        judge.ask_all([question()])
    with (
        scripted_judge(lambda _: refusing) as server,
        judging(tmp_path, server, key_env="MY_KEY") as j,
    ):
        with pytest.raises(BadInput, match=r"refuses the key.*MY_KEY") as refused:
            j.ask_all([question("again")])
        assert "secret" not in str(refused.value)
    with scripted_judge(lambda _: GOOD) as server, judging(tmp_path, server) as judge:
        judge.ask_all([question("without a key")])
        assert "another-service" not in json.dumps(server.headers)
    written = (tmp_path / "m.jsonl").read_text() + caplog.text
    assert "[key]" in written
    assert "secret" not in written


def test_without_the_client_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with scripted_judge(lambda _: GOOD) as server, judging(tmp_path, server) as judge:
        with pytest.raises(BadInput, match="pip install openai"):
            judge.ask_all([question()])
        assert server.requests == []


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_wrong_key_or_model_ends_the_run_at_once(tmp_path: Path, status: int) -> None:
    with (
        scripted_judge(lambda _: Said(status=status, body="{}")) as server,
        judging(tmp_path, server, model="m") as judge,
        pytest.raises(BadInput, match=f"HTTP {status}"),
    ):
        judge.ask_all([question()])
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with scripted_judge(lambda _: GOOD) as server:
        pass
    with judging(tmp_path, server, retries=0) as judge, pytest.raises(RunFailed, match=r"does not answer \(no connec"):
        judge.ask_all([question()])
    with judging(tmp_path, replace(server, url="ftp://x")) as judge, pytest.raises(BadInput, match="http"):
        judge.ask_all([question()])


def test_when_a_run_ends_every_question_ends_for_the_same_cause(tmp_path: Path) -> None:
    script = in_turn(Said(status=401, body="{}", delay=0.2), Said(status=500, body="", delay=0.3))
    with scripted_judge(script) as server, judging(tmp_path, server, workers=4, retries=9) as judge:
        with pytest.raises(BadInput, match="HTTP 401"):
            judge.ask_all([question("a")])
        with pytest.raises(BadInput, match="HTTP 401"):
            judge.ask_all([question(str(k)) for k in range(8)])
        assert len(server.requests) == 1
    with scripted_judge(lambda _: Said(status=500, body="")) as server, judging(tmp_path, server, retries=99) as judge:
        threading.Timer(0.3, judge.stopped.set).start()  # as an interruption does
        with pytest.raises(Stopped):
            judge.ask_all([question("b")])
        assert len(server.requests) < 5


def test_a_server_that_stopped_answering_ends_the_run(tmp_path: Path) -> None:
    with scripted_judge(in_turn(GOOD, Said(status=503, body=""))) as server:  # noqa: SIM117
        with judging(tmp_path, server, retries=0) as judge, pytest.raises(RunFailed, match="20 in a row"):
            judge.ask_all([question(str(k)) for k in range(100)])
    assert len(server.requests) < 30


@pytest.mark.parametrize(
    ("limits", "sent"),
    [
        (Limits(calls=3), 3),
        # A request costs 110 tokens and could cost 400 + 16 + 7: the fourth could go over the limit by one.
        (Limits(tokens=3 * 110 + 422), 3),
        # The first could cost 0.0161; of the third the limit is just above what it could cost after two, 0.01769.
        (Limits(money=0.0160, price_in=4.0, price_out=40.0), 0),
        (Limits(money=0.0177, price_in=4.0, price_out=40.0), 3),
        (Limits(), 8),
    ],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_budgets_stop_before_they_are_exceeded_and_a_larger_one_continues(
    tmp_path: Path, limits: Limits, sent: int, workers: int
) -> None:
    questions = [question(f"number{k}") for k in range(8)]
    with scripted_judge(lambda _: replace(GOOD, delay=0.01)) as server:
        with judging(tmp_path, server, limits=limits, workers=workers) as judge:
            if sent < 8:
                with pytest.raises(BudgetSpent):
                    judge.ask_all(questions)
            else:
                assert judge.ask_all(questions) == [Reply("yes")] * 8
        assert len(server.requests) == len(rows_in(tmp_path)) <= 8
        assert abs(len(server.requests) - sent) <= (0 if workers == 1 or limits.calls else 1)
        with judging(tmp_path, server, workers=workers) as judge:
            assert judge.ask_all(questions) == [Reply("yes")] * 8
        assert len(server.requests) == 8


def test_retries_count_as_calls(tmp_path: Path) -> None:
    with (
        scripted_judge(lambda _: Said(status=500, body="")) as server,
        judging(tmp_path, server, limits=Limits(calls=2), retries=9) as judge,
        pytest.raises(BudgetSpent),
    ):
        judge.ask_all([question()])
    assert len(server.requests) == 2


def test_a_request_waits_when_those_in_flight_may_turn_out_cheaper() -> None:
    budget = Budget(Limits(tokens=1000))
    budget.reserve(300, 400)
    waited = threading.Event()

    def second() -> None:
        budget.reserve(300, 400)
        waited.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not waited.wait(0.1)
    budget.settle((300, 400), (100, 10))
    assert waited.wait(5)
    thread.join()
    budget.settle((300, 400), (300, 400))
    with pytest.raises(BudgetSpent):
        budget.reserve(300, 400)
    assert (budget.spent.calls, budget.spent.tokens_in, budget.spent.tokens_out) == (2, 400, 410)


def test_never_more_in_flight_than_workers(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def script(_: dict[str, Any]) -> Said:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return GOOD

    with scripted_judge(script) as server, judging(tmp_path, server, workers=3) as judge:
        assert judge.ask_all([question(str(k)) for k in range(12)]) == [Reply("yes")] * 12
    assert most == [3]


def test_the_file_is_keyed_by_content(tmp_path: Path) -> None:
    with scripted_judge(lambda _: GOOD) as server:
        with judging(tmp_path, server) as judge:
            judge.ask_all([question(), question(), replace(question(), seed=1)])
            assert len(server.requests) == 2
            judge.ask_all([replace(question(), schema={"type": "object"})])
            assert len(server.requests) == 3
        for change in ({"temperature": 0.5}, {"max_tokens": 7}, {"max_tokens": 7000}):
            with judging(tmp_path, server, **change) as judge:
                judge.ask_all([question()])
        assert len(server.requests) == 4  # how long an answer may be is not what is asked
        with judging(tmp_path, server, temperature=-1.0) as judge:
            judge.ask_all([question()])
        assert "temperature" not in server.requests[-1]
    row = rows_in(tmp_path)[0]
    assert (row["tokens_in"], row["tokens_out"], row["url"], row["model"]) == (100, 10, server.url, "m")
    assert (row["max_tokens"], row["served_model"]) == (400, "m")
    assert row["messages"] == question().messages


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with scripted_judge(lambda _: replace(GOOD, delay=0.1)) as server, judging(tmp_path, server, workers=3) as judge:
        assert judge.ask_all([question("a"), question("a"), question("b"), question("a")]) == [Reply("yes")] * 4
        assert len(server.requests) == 2


def test_names_of_models_as_files() -> None:
    assert file_name("gpt-5.1") == "gpt-5.1"
    assert file_name("a/b:c") != file_name("a-b-c")
    assert not set("/\\:") & set(file_name("../../a\\b:c"))
    assert not file_name("..").startswith(".")


@pytest.mark.parametrize(
    ("text", "value", "failure"),
    [
        (
            'The format is {"explanation": "at most 10 words"}. Mine: {"explanation": "the word is"}',
            "the word is",
            None,
        ),
        ('<think>maybe {"explanation": "a draft"}', None, "truncated"),
        ('<think>{"explanation": "a draft"}</think>{"explanation": "final"}', "final", None),
    ],
)
def test_drafts_and_echoes_are_no_answers(text: str, value: str | None, failure: str | None) -> None:
    row = {"text": text, "failure": None, "refusal": None, "finish": "length" if failure else "stop"}
    reply = read_reply(ask_explanation(["(think) x"], ("<<", ">>"), 0), row)
    assert (reply.value, reply.failure) == (value, failure)


@pytest.mark.parametrize("body", ["<html>busy</html>", '{"choices": []}', '{"error": "upstream is busy"}'])
def test_what_a_gateway_passes_on_is_asked_again(tmp_path: Path, body: str) -> None:
    with scripted_judge(in_turn(Said(body=body), GOOD)) as server, judging(tmp_path, server) as judge:
        assert judge.ask_all([question()]) == [Reply("yes")]
        assert len(server.requests) == 2


def test_a_forbidden_prompt_ends_no_run_that_was_answered(tmp_path: Path) -> None:
    script = in_turn(GOOD, Said(status=403, body="moderated"), GOOD)
    with scripted_judge(script) as server, judging(tmp_path, server) as judge:
        replies = [judge.ask_all([question(str(i))])[0] for i in range(3)]
    assert replies == [Reply("yes"), Reply(failure="HTTP 403"), Reply("yes")]


def test_a_larger_limit_asks_again_only_what_was_cut_off(tmp_path: Path) -> None:
    """5 of 20 answers do not fit: they alone are asked again, and a smaller limit afterwards asks nothing."""

    def script(request: dict[str, Any]) -> Said:
        long = int(request["messages"][0]["content"]) % 4 == 0
        return Said('{"word": "y', finish="length") if long and request["max_tokens"] < 100 else GOOD

    questions = [question(str(k)) for k in range(20)]
    whole = [Reply("yes")] * 20
    cut = [Reply(failure="truncated") if k % 4 == 0 else Reply("yes") for k in range(20)]
    with scripted_judge(script) as server:
        for limit, asked, replies in ((50, 20, cut), (50, 0, cut), (99, 5, cut), (60, 0, cut), (100, 5, whole)):
            before = len(server.requests)
            with judging(tmp_path, server, max_tokens=limit) as judge:
                assert judge.ask_all(questions) == replies
                assert judge.ask_all(questions) == replies
            assert len(server.requests) - before == asked
        with judging(tmp_path, server, max_tokens=50) as judge:
            assert judge.ask_all(questions) == whole
        assert len(server.requests) == 30


def test_a_time_out_counts_what_it_may_have_read(tmp_path: Path) -> None:
    log, budget = open_log(tmp_path, Endpoint("m", "")), Budget(Limits())
    slow = replace(GOOD, delay=0.6)
    with (
        scripted_judge(lambda _: slow) as server,
        Judge(Endpoint("m", server.url, timeout=0.2, retries=1), log, budget, 1) as judge,
    ):
        assert judge.ask_all([question()]) == [Reply(failure="time-out")]
    log.close()
    # Two attempts of "Say yes." (8 bytes) and 16 for what is around a message; what was written is not known.
    assert (budget.spent.calls, budget.spent.tokens_in, budget.spent.tokens_out) == (2, 48, 0)
