"""Asking a judge: any server that speaks OpenAI's chat completions, through the official client.

A question carries its messages, the JSON schema of its answer and a function that reads such an answer. Every
question ends in a value or in a failure with a reason; both are kept in a `JudgeLog`, and what is there is not asked
again, unless it was cut off and may be longer now. What an endpoint refuses (a schema, a temperature, a seed) is left
out from then on: the prompt asks for the same JSON in words, and it is looked for in whatever comes back.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from lorascope.errors import BadInput, RunFailed
from lorascope.explain.budget import Budget
from lorascope.explain.judge_log import TRUNCATED, JudgeLog, is_passing
from lorascope.explain.rows import Row
from lorascope.explain.settings import JudgeConfig, check_url
from lorascope.study import digest

LONGEST_WAIT = 120.0
"""Seconds: a server that asks for a longer pause than this has failed for now."""
WORN_OUT = 20
"""So many questions in a row that fail in passing, all retries used, end the run: the server is not there."""
HOPELESS = {
    401: "refuses the key",
    402: "asks for money first",
    403: "does not allow this",
    404: "does not know this address or model",
}
CONCESSIONS = ("response_format", "temperature", "seed", "max_tokens")


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is and how it is asked. The key itself is never here, only the name of its variable."""

    model: str
    url: str
    key_env: str = ""
    temperature: float = 0.0
    max_tokens: int = 400
    timeout: float = 120.0
    retries: int = 4


def endpoint_of(config: JudgeConfig) -> Endpoint:
    """The judge that a command's options name; they have been checked."""
    return Endpoint(
        str(config.judge_model),
        str(config.judge_url),
        config.judge_key_env,
        config.judge_temperature,
        config.judge_max_tokens,
        config.judge_timeout,
        config.judge_retries,
    )


@dataclass(frozen=True)
class Question:
    """One request. `read` turns the answer's JSON into a value; ValueError when it is not as the schema says."""

    messages: list[dict[str, str]]
    name: str
    schema: dict[str, Any]
    read: Callable[[Any], Any]
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The value of an answer, or why there is none (`truncated`, `not JSON`, `HTTP 500`, ...)."""

    value: Any = None
    failure: str | None = None


@dataclass
class Received:
    """What came back for one question, after all retries: `failure` is None when an answer arrived.

    `served_model` is the name that the server gives to the model that answered.
    """

    text: str | None = None
    finish: str | None = None
    refusal: str | None = None
    failure: str | None = None
    detail: str | None = None
    served_model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    attempts: int = 0
    left_out: list[str] = field(default_factory=list)


class Stopped(Exception):
    """The run is ending: this question was not asked."""


class Judge:
    """An endpoint with its file and budget. Use it as a context: leaving it waits for what is in flight."""

    def __init__(self, endpoint: Endpoint, log: JudgeLog, budget: Budget, workers: int) -> None:
        """Nothing is opened towards the network until the first question that is not in the file."""
        self.endpoint = endpoint
        self.stopped = threading.Event()
        self._log = log
        self._budget = budget
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._lock = threading.Lock()
        self._client: Any = None
        self._key = ""
        self._left_out: frozenset[str] = frozenset()
        self._failed_in_a_row = 0
        self._answered = False
        self._cause: Exception | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        """Replies in the order of the questions, asked as far at once as there are workers; equal ones are asked once.

        Raises:
            BudgetSpent: one of them would go over the budget; those that were sent are kept.
            Stopped: the run was interrupted.
            BadInput: the endpoint refuses the key or the model, or there is no key.
            RunFailed: the endpoint does not answer any more.
        """
        keys = [digest(self._content(question))[:32] for question in questions]
        asked = dict(zip(keys, questions, strict=True))
        futures = {key: self._pool.submit(self._ask, key, question) for key, question in asked.items()}
        return [futures[key].result() for key in keys]

    def _ask(self, key: str, question: Question) -> Reply:
        row = self._log.find(key)
        if row is not None and not self._cut_short(row):
            self._budget.count_replayed()
            return read_reply(question, row)
        if self.stopped.is_set():
            raise self._cause or Stopped()
        started = time.monotonic()
        received = self._send(question)
        reply = read_reply(question, asdict(received))
        row = {"key": key, "at": datetime.now(UTC).isoformat(timespec="seconds"), "url": self.endpoint.url}
        row |= self._content(question) | {"max_tokens": self.endpoint.max_tokens} | asdict(received)
        row |= {"failure": reply.failure, "seconds": round(time.monotonic() - started, 3)}
        self._log.append(row)
        self._watch(reply)
        return reply

    def _content(self, question: Question) -> dict[str, Any]:
        """What an answer depends on, and so what it is kept under; not how long it may be (see `_cut_short`)."""
        return {
            "model": self.endpoint.model,
            "messages": question.messages,
            "schema": question.schema,
            "sampling": {"temperature": self.endpoint.temperature, "seed": question.seed},
        }

    def _cut_short(self, row: Row) -> bool:
        """Whether an answer ended at a smaller limit than it would have now, and so is none yet."""
        return row["failure"] == TRUNCATED and int(row["max_tokens"]) < self.endpoint.max_tokens

    def _watch(self, reply: Reply) -> None:
        """End the run when nothing arrives any more."""
        with self._lock:
            gone = reply.failure is not None and is_passing(reply.failure)
            self._failed_in_a_row = self._failed_in_a_row + 1 if gone else 0
            self._answered |= not gone
            never_there = reply.failure == "no connection" and not self._answered
            if self._failed_in_a_row < WORN_OUT and not never_there:
                return
        why = f"{reply.failure}, {self._failed_in_a_row} in a row"
        kept = "what was answered is kept, and the same command continues"
        raise self._end(RunFailed(f"The judge at {self.endpoint.url} does not answer ({why}); {kept}."))

    def _end(self, cause: Exception) -> Exception:
        """Have every other question end for the same cause."""
        self._cause = self._cause or cause
        self.stopped.set()
        return self._cause

    def _send(self, question: Question) -> Received:
        """Send one question, with retries and concessions, each attempt within the budget."""
        received = Received()
        refused: frozenset[str] = frozenset()
        retries = 0
        while True:
            received.attempts += 1
            left_out = self._left_out | refused
            failure, wait, body = self._attempt(question, received, left_out)
            if failure is None:
                received.failure, received.detail, received.left_out = None, None, sorted(left_out)
                self._left_out |= refused
                return received
            received.failure, received.detail = failure, body or None
            if conceded := _concession(failure, body, left_out):
                refused |= {conceded}
                continue
            if not is_passing(failure) or retries >= self.endpoint.retries or wait > LONGEST_WAIT:
                return received
            # Doubling pauses, of random length so that workers do not come back all at once.
            pause = wait or min(0.5 * 2**retries, 30.0) * (0.5 + random.random() / 2)
            retries += 1
            if self.stopped.wait(pause):
                raise self._cause or Stopped()

    def _attempt(
        self, question: Question, received: Received, left_out: frozenset[str]
    ) -> tuple[str | None, float, str]:
        """One request: (failure or None, seconds that the server asks to wait, what it said)."""
        client = self._connect()
        import openai

        reserved = (_most_tokens(question), self.endpoint.max_tokens)
        self._budget.reserve(*reserved)
        used = (0, 0)
        try:
            # The client's plain `post`: its typed method takes twice the time, mostly to look at types.
            answer = client.post("/chat/completions", body=self._arguments(question, left_out), cast_to=object)
            _unpack(answer, received)
            # An endpoint that does not say what it used is counted at four bytes a token.
            written = len((received.text or "").encode()) // 4
            used = (
                reserved[0] // 4 if received.tokens_in is None else received.tokens_in,
                written if received.tokens_out is None else received.tokens_out,
            )
            return None, 0.0, ""
        except openai.APITimeoutError:
            used = (reserved[0], 0)  # it may have been read, and then it is billed
            return "time-out", 0.0, ""
        except openai.APIStatusError as error:
            body = self._redact(error.response.text)[:500]
            # Once something was answered, 403 is about this prompt (moderation), not about the key.
            if error.status_code in HOPELESS and not (error.status_code == 403 and self._answered):
                raise self._end(BadInput(self._hopeless(error.status_code))) from None
            return f"HTTP {error.status_code}", _retry_after(error.response.headers.get("retry-after")), body
        except openai.APIConnectionError as error:
            return "no connection", 0.0, self._redact(str(error.__cause__ or error))[:500]
        except (openai.APIResponseValidationError, ValueError) as error:
            return "no chat completion", 0.0, self._redact(str(error))[:500]
        finally:
            self._budget.settle(reserved, used)

    def _arguments(self, question: Question, left_out: frozenset[str]) -> dict[str, Any]:
        schema = {"name": question.name, "strict": True, "schema": question.schema}
        arguments: dict[str, Any] = {
            "response_format": {"type": "json_schema", "json_schema": schema},
            "seed": question.seed,
            "max_tokens": self.endpoint.max_tokens,
        }
        if self.endpoint.temperature >= 0:
            arguments["temperature"] = self.endpoint.temperature
        if "max_tokens" in left_out:  # the name that some hosted models want
            arguments["max_completion_tokens"] = self.endpoint.max_tokens
        kept = {name: value for name, value in arguments.items() if name not in left_out}
        return {"model": self.endpoint.model, "messages": question.messages} | kept

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                self._key = read_key(self.endpoint)
                self._client = open_client(self.endpoint, self._key)
            return self._client

    def _redact(self, text: str) -> str:
        """A server's words without the key, should it repeat it."""
        return clean(text.replace(self._key, "[key]") if self._key else text)

    def _hopeless(self, status: int) -> str:
        where = f"The judge at {self.endpoint.url} {HOPELESS[status]} (HTTP {status})"
        named = (
            f"the variable {self.endpoint.key_env}" if self.endpoint.key_env else "--judge-key-env (no key was sent)"
        )
        return f"{where}; check {named}, the model {self.endpoint.model!r} and the address."


def read_key(endpoint: Endpoint) -> str:
    """The key from the environment, "" where none is wanted.

    Raises:
        BadInput: the variable is not set.
    """
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise BadInput(f"The environment variable {endpoint.key_env} is not set; put the judge's key there.")
    return key


def open_client(endpoint: Endpoint, key: str) -> Any:
    """The official client for an endpoint, without retries of its own, so that each attempt is counted.

    Raises:
        BadInput: the client is not installed, or the address is none.
    """
    check_url(endpoint.url)
    try:
        import openai
    except ImportError as error:
        raise BadInput("Judges need the openai package: pip install openai.") from error
    # What the environment says of another service's organisation is not sent to this one, nor is its key.
    headers = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.OpenAI(
        api_key=key or "none",
        base_url=endpoint.url,
        timeout=endpoint.timeout,
        max_retries=0,
        default_headers=headers,
    )


def open_log(folder: Path, endpoint: Endpoint) -> JudgeLog:
    """The file of a judge in the folder `explanations/judges` of a study, named after the model."""
    return JudgeLog(folder / f"{file_name(endpoint.model)}.jsonl")


def file_name(model: str) -> str:
    """A model's name as a file's."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip(".-")[-80:] or "model"
    return plain if plain == model else f"{plain}-{digest(model)[:6]}"


def read_reply(question: Question, row: Row) -> Reply:
    """The reply that a row of the file (or what just came back) amounts to."""
    if row["text"] is None and row["failure"] is not None:
        return Reply(failure=row["failure"])
    if row["refusal"] or row["finish"] == "content_filter":
        return Reply(failure="refused")
    text = (row["text"] or "").strip()
    if not text:
        return Reply(failure=TRUNCATED if row["finish"] == "length" else "empty")
    found = json_objects(text)
    for value in reversed(found):  # what comes before the last one is a draft, or the question's own example
        try:
            return Reply(question.read(value))
        except (ValueError, KeyError, TypeError):
            continue
    if row["finish"] == "length":
        return Reply(failure=TRUNCATED)
    return Reply(failure="wrong schema" if found else "not JSON")


def json_objects(text: str) -> list[dict[str, Any]]:
    """Every JSON object that stands in a text, in order; thinking, closed or cut off, is left out."""
    text = text.rsplit("</think>", 1)[-1].split("<think>", 1)[0].strip()
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone halves of surrogate pairs are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unpack(answer: Any, received: Received) -> None:
    """Take over what an answer says; ValueError when it is no chat completion."""
    try:
        choice = answer["choices"][0]
        message, usage = choice["message"], answer.get("usage") or {}
        said, refusal = message.get("content"), message.get("refusal")
        received.tokens_in, received.tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {str(answer)[:200]}") from error
    received.text = clean(said if isinstance(said, str) else "")
    received.refusal = clean(str(refusal)) if refusal else None
    received.finish = choice.get("finish_reason")
    served = answer.get("model")
    received.served_model = clean(served) if isinstance(served, str) else None


def _most_tokens(question: Question) -> int:
    """More tokens than the messages can have: no token is shorter than a byte."""
    return sum(len(message["content"].encode()) + 16 for message in question.messages)


def _concession(failure: str, body: str, left_out: frozenset[str]) -> str | None:
    """What to leave out after a refusal: what the server names, else the schema; None when that is not the matter."""
    if failure not in ("HTTP 400", "HTTP 422", "HTTP 501"):
        return None
    able = [name for name in CONCESSIONS if name not in left_out]
    named = [name for name in able if name in body]
    return next(iter(named or [name for name in able if name == "response_format"]), None)


def _retry_after(header: str | None) -> float:
    """Seconds from a `Retry-After` header, which holds seconds or a date; 0 when there is none."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
