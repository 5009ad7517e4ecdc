"""Reasoning traces from the formats in which they are passed around, as one type.

A new format is one function from a row to a Trace, and its line in ROW_FORMATS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.errors import BadInput
from lorascope.traces.files import read_rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """A question with the thinking and the answer of an assistant.

    `turns` are the messages before the question, each {"role", "content"}, system messages left out (the
    study's takes their place). `raw_prompt`, when given, is used as the prompt exactly as it is. An empty
    `answer` marks a trace that was cut off while thinking.
    """

    id: str
    question: str
    thinking: str
    answer: str
    gold: str | None = None
    family: str | None = None
    turns: tuple[dict[str, str], ...] = ()
    raw_prompt: str | None = None


class Malformed(Exception):
    """A row that is not what its format promises; the message says what is wrong with it."""


_THINK = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_S1 = re.compile(r"\s*<\|im_start\|>think\n(.*?)<\|im_start\|>answer\n?(.*)", re.DOTALL)
_OPENERS = ("<think>", "<|im_start|>think\n")
_END_OF_TURN = re.compile(r"(?:\s*(?:<\|[^<>|]+\|>|<｜[^<>｜]+｜>|</s>|<eos>|<end_of_turn>))+\s*$")
# What stands between the last user header and the end of that turn in the templates s1 and others use.
_RAW_QUESTIONS = (
    re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL),
    re.compile(r"<\|start_header_id\|>user<\|end_header_id\|>\s*(.*?)<\|eot_id\|>", re.DOTALL),
    re.compile(r"<｜User｜>(.*?)<｜Assistant｜>", re.DOTALL),
)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def read_traces(source: str | Path, *, limit: int | None = None, response_template: str | None = None) -> list[Trace]:
    """Read traces from a JSON, JSON Lines or Parquet file (gzip or not) or `hub:owner/name[:split]`.

    Formats: chat `messages`, `prompt`/`completion`, ShareGPT `conversations`, s1K columns,
    `question`/`thinking`/`answer`, and plain `text`, split after the last `response_template`. Thinking is
    taken from its own field or parsed out of think markup. Ids are made unique. At most `limit` traces.
    Raises BadInput naming the file, the line and what is wrong.
    """
    traces: list[Trace] = []
    seen: dict[str, int] = {}
    for where, number, row in read_rows(source):
        if limit is not None and len(traces) >= limit:
            break
        try:
            trace = parse_row(row, f"{number:05d}", response_template)
        except Malformed as error:
            raise BadInput(f"{where}: {error}.") from error
        # Files with several samples per question repeat ids; what we store is looked up by id.
        seen[trace.id] = seen.get(trace.id, 0) + 1
        if seen[trace.id] > 1:
            unique = f"{trace.id}#{seen[trace.id]}"
            seen[unique] = 1
            trace = replace(trace, id=unique)
        traces.append(trace)
    if not traces:
        raise BadInput(f"{source} holds no traces: give a file with at least one row.")
    return traces


def parse_row(row: object, default_id: str, response_template: str | None = None) -> Trace:
    """One row of any known format as a Trace. Raises Malformed."""
    if not isinstance(row, Mapping):
        raise Malformed(f"expected an object with named columns, found {_kind(row)}")
    for columns, parse in ROW_FORMATS:
        if all(row.get(column) is not None for column in columns):
            trace = parse(row, default_id)
            break
    else:
        if "text" not in row:
            raise Malformed(f"unknown columns {', '.join(map(str, row)) or '(none)'}; expected {_known_formats()}")
        trace = _from_text(row, default_id, response_template)
    if not trace.thinking and not trace.answer:
        raise Malformed("the trace has neither thinking nor answer")
    if not trace.question.strip() and not trace.raw_prompt:
        raise Malformed("the question is empty")
    return trace


def split_thinking(text: str) -> tuple[str, str]:
    """Thinking and answer of an assistant's text in `<think>` or s1 markup; thinking "" without markup."""
    match = _S1.match(text) or _THINK.match(text)
    if match:
        return match.group(1).strip(), match.group(2).strip()
    for opener in _OPENERS:
        if text.lstrip().startswith(opener):
            return text.lstrip()[len(opener) :].strip(), ""  # cut off while thinking
    return "", text.strip()


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write traces as normalised JSON Lines, every field on every line; whole or not at all."""
    path = Path(path)
    lines = [json.dumps(asdict(trace), ensure_ascii=False) + "\n" for trace in traces]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_traces(path: str | Path) -> Iterator[Trace]:
    """Read what `write_traces` wrote, one by one. Raises BadInput naming the line that is not a normalised trace."""
    for where, _, row in read_rows(path):
        try:
            trace = Trace(**row)
        except TypeError as error:
            raise BadInput(f"{where}: not a normalised trace; make the study's traces again.") from error
        yield replace(trace, turns=tuple(trace.turns))


# -- rows of each format ------------------------------------------------------------------------------------


def _from_messages(row: Row, default_id: str) -> Trace:
    return _from_turns(row["messages"], "messages", row, default_id)


def _from_sharegpt(row: Row, default_id: str) -> Trace:
    return _from_turns(row["conversations"], "conversations", row, default_id)


def _from_prompt_completion(row: Row, default_id: str) -> Trace:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise Malformed("prompt and completion must be texts or lists of messages")
    return _from_turns([*prompt, *completion], "prompt and completion", row, default_id)


def _from_s1k(row: Row, default_id: str) -> Trace:
    author = next(a for a in _S1K_AUTHORS if row.get(f"{a}thinking_trajectory") is not None)
    thinking = _text(row, f"{author}thinking_trajectory").strip()
    answer = _text(row, f"{author}attempt").strip()
    question = _text(row, "question")
    return _labelled(Trace(default_id, question, thinking, answer), row, gold_columns=("gold", "solution"))


def _from_question(row: Row, default_id: str) -> Trace:
    question, answer = _text(row, "question"), _text(row, "answer")
    stated = next((c for c in _THINKING_COLUMNS if row.get(c) is not None), None)
    if stated is not None:
        trace = Trace(default_id, question, _text(row, stated).strip(), answer.strip())
    else:
        trace = Trace(default_id, question, *split_thinking(answer))
    trace = _labelled(trace, row)
    return _without_gsm8k_notes(trace)


def _from_text(row: Row, default_id: str, response_template: str | None) -> Trace:
    text = _text(row, "text")
    if not response_template:
        raise Malformed("a text column needs --response-template, the text after which the assistant speaks")
    start = text.rfind(response_template)
    if start < 0:
        raise Malformed(f"the text does not contain the response template {response_template!r}")
    raw_prompt = text[: start + len(response_template)]
    thinking, answer = split_thinking(_END_OF_TURN.sub("", text[len(raw_prompt) :]))
    question = next((found[-1] for pattern in _RAW_QUESTIONS if (found := pattern.findall(raw_prompt))), text[:start])
    trace = Trace(default_id, question.strip(), thinking, answer, raw_prompt=raw_prompt)
    return _labelled(trace, row)


_S1K_AUTHORS = ("deepseek_", "gemini_")
_THINKING_COLUMNS = ("thinking", "reasoning_content", "reasoning")
RowFormat = tuple[tuple[str, ...], Callable[[Row, str], Trace]]
ROW_FORMATS: tuple[RowFormat, ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_sharegpt),
    (("prompt", "completion"), _from_prompt_completion),
    *((("question", f"{author}thinking_trajectory", f"{author}attempt"), _from_s1k) for author in _S1K_AUTHORS),
    (("question", "answer"), _from_question),
)


def _known_formats() -> str:
    return (
        "messages, conversations, prompt + completion, question + deepseek_thinking_trajectory + "
        "deepseek_attempt, question + answer (+ thinking), or text with --response-template"
    )


# -- shared by the formats ----------------------------------------------------------------------------------


def _from_turns(messages: object, name: str, row: Row, default_id: str) -> Trace:
    turns = list(_messages(messages, name))
    if not turns or turns[-1]["role"] != "assistant":
        raise Malformed(f"{name} must end with a message of the assistant")
    if len(turns) < 2 or turns[-2]["role"] != "user":
        raise Malformed(f"{name} must have a user's message before the assistant's last one")
    last = turns[-1]
    thinking, answer = split_thinking(last["content"])
    if last["thinking"]:
        thinking, answer = last["thinking"].strip(), last["content"].strip()
    # Templates drop the thinking of earlier turns from the context, and so do we.
    earlier = tuple({"role": t["role"], "content": _said(t)} for t in turns[:-2])
    return _labelled(Trace(default_id, turns[-2]["content"], thinking, answer, turns=earlier), row)


def _said(turn: Mapping[str, str]) -> str:
    return split_thinking(turn["content"])[1] if turn["role"] == "assistant" else turn["content"]


def _messages(messages: object, name: str) -> Iterator[dict[str, str]]:
    """Messages with known roles, system messages left out, each {"role", "content", "thinking"}."""
    if not isinstance(messages, list):
        raise Malformed(f"{name} must be a list of messages, found {_kind(messages)}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise Malformed(f"{name} must hold objects with role and content, found {_kind(message)}")
        speaker = message.get("role", message.get("from"))
        role = _ROLES.get(str(speaker))
        if role is None:
            raise Malformed(f"{name} has the role {speaker!r}; expected {', '.join(_ROLES)}")
        if role == "system":
            continue
        thinking = next((message[c] for c in _THINKING_COLUMNS if message.get(c)), "")
        if not isinstance(thinking, str):
            raise Malformed(f"the thinking of a message must be a text, found {_kind(thinking)}")
        content = _content(message.get("content", message.get("value")), name)
        yield {"role": role, "content": content, "thinking": thinking}


def _content(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and "text" in p for p in content):
        return "".join(str(part["text"]) for part in content)
    raise Malformed(f"a message in {name} must have a text as its content, found {_kind(content)}")


def _labelled(trace: Trace, row: Row, gold_columns: tuple[str, ...] = ("gold",)) -> Trace:
    """The trace with the row's own id, gold answer and family, where it has them."""

    def first(columns: Iterable[str]) -> str | None:
        value = next((row[c] for c in columns if row.get(c) is not None), None)
        return None if value is None else str(value)

    return replace(
        trace,
        id=first(("id", "uid")) or trace.id,
        gold=first(gold_columns),
        family=first(("family", "type", "source_type")),
    )


def _without_gsm8k_notes(trace: Trace) -> Trace:
    """GSM8K answers carry `<<a*b=c>>` notes, which are stripped, and end in `#### gold`."""
    _, mark, gold = trace.answer.rpartition("\n#### ")
    if not mark or "\n" in gold:
        return trace
    answer = re.sub(r"<<[^<>]*>>", "", trace.answer)
    return replace(trace, answer=answer, gold=trace.gold or gold.strip())


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Malformed(f"{column} must be a text, found {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
