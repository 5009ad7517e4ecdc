"""Formats: each as it is passed around, malformed lines named by file, number and fault."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorascope.errors import BadInput
from lorascope.traces import Trace, load_traces, read_traces, split_thinking, write_traces

USER = {"role": "user", "content": "What is 2+2?"}
THOUGHT = "<think>\nHmm, four.\n</think>\n\nIt is 4."
EXPECTED = ("What is 2+2?", "Hmm, four.", "It is 4.")


def read_rows(tmp_path: Path, *rows: Any, **options: Any) -> list[Trace]:
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_traces(file, **options)


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, {"role": "assistant", "content": THOUGHT}]},
    "messages with a system message": {
        "messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": THOUGHT}]
    },
    "messages in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]},
            {"role": "assistant", "content": THOUGHT},
        ]
    },
    "reasoning_content": {
        "messages": [USER, {"role": "assistant", "content": "It is 4.", "reasoning_content": "\nHmm, four.\n"}]
    },
    "reasoning": {"messages": [USER, {"role": "assistant", "content": "It is 4.", "reasoning": "Hmm, four."}]},
    "prompt and completion": {"prompt": "What is 2+2?", "completion": THOUGHT},
    "prompt and completion as messages": {
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": THOUGHT}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is 2+2?"},
            {"from": "gpt", "value": THOUGHT},
        ]
    },
    "s1K": {
        "question": "What is 2+2?",
        "solution": "4",
        "deepseek_thinking_trajectory": "Hmm, four.",
        "deepseek_attempt": "It is 4.",
        "attempt": "ignored",
    },
    "question, thinking, answer": {"question": "What is 2+2?", "thinking": "Hmm, four.", "answer": "It is 4."},
    "question and marked-up answer": {"question": "What is 2+2?", "answer": THOUGHT},
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format(name: str, tmp_path: Path) -> None:
    (trace,) = read_rows(tmp_path, ROWS[name])
    assert (trace.question, trace.thinking, trace.answer) == EXPECTED
    assert trace.turns == ()
    assert trace.raw_prompt is None
    assert trace.gold == ("4" if name == "s1K" else None)


def test_labels_are_kept(tmp_path: Path) -> None:
    row = {"id": "a-1", "type": "sums", "question": "2+2?", "thinking": "Hm", "answer": "4", "gold": 4}
    assert read_rows(tmp_path, row) == [Trace("a-1", "2+2?", "Hm", "4", gold="4", family="sums")]


def test_earlier_turns_lose_their_thinking_and_system_messages(tmp_path: Path) -> None:
    first = [USER, {"role": "assistant", "content": THOUGHT}]
    again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "<think>Yes</think>Yes."}]
    (trace,) = read_rows(tmp_path, {"messages": [{"role": "system", "content": "x"}, *first, *again]})
    assert trace.turns == (
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "It is 4."},
    )
    assert (trace.question, trace.thinking, trace.answer) == ("Sure?", "Yes", "Yes.")


def test_text_with_a_response_template(tmp_path: Path) -> None:
    s1 = (
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_start|>think\nHmm, four.\n<|im_start|>answer\nIt is 4.<|im_end|>\n"
    )
    (trace,) = read_rows(tmp_path, {"text": s1}, response_template="<|im_start|>assistant\n")
    assert (trace.question, trace.thinking, trace.answer) == EXPECTED
    assert trace.raw_prompt == s1[: s1.index("<|im_start|>think")]

    plain = "### Question: What is 2+2?\n### Answer:<think>Hmm, four.</think>It is 4.</s>"
    (trace,) = read_rows(tmp_path, {"text": plain}, response_template="### Answer:")
    assert trace.question == "### Question: What is 2+2?"
    assert (trace.thinking, trace.answer) == EXPECTED[1:]
    assert trace.raw_prompt == "### Question: What is 2+2?\n### Answer:"

    with pytest.raises(BadInput, match="line 1: a text column needs --response-template"):
        read_rows(tmp_path, {"text": plain})
    with pytest.raises(BadInput, match="line 1: the text does not contain the response template 'A:'"):
        read_rows(tmp_path, {"text": plain}, response_template="A:")


def test_thinking_is_parsed_out_of_markup() -> None:
    assert split_thinking(THOUGHT) == EXPECTED[1:]
    assert split_thinking("Hmm, four.\n</think>\n\nIt is 4.") == EXPECTED[1:]  # opened by the prompt
    assert split_thinking("<|im_start|>think\nHmm, four.\n<|im_start|>answer\nIt is 4.") == EXPECTED[1:]
    assert split_thinking("<think>\nHmm, fo") == ("Hmm, fo", "")  # cut off
    assert split_thinking("It is 4.\n") == ("", "It is 4.")
    assert split_thinking("<think>\n\n</think>\n\nIt is 4.") == ("", "It is 4.")


def test_gsm8k_notes_are_stripped(tmp_path: Path) -> None:
    row = {"question": "Eggs?", "answer": "She sells 16 - 3 = <<16-3=13>>13 eggs.\n#### 13"}
    (trace,) = read_rows(tmp_path, row)
    assert trace.answer == "She sells 16 - 3 = 13 eggs.\n#### 13"
    assert trace.gold == "13"


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    rows = [{"id": i, "question": "q", "answer": "a"} for i in ("x", "x", "x#2", "x")]
    ids = [trace.id for trace in read_rows(tmp_path, *rows)]
    assert ids == ["x", "x#2", "x#2#2", "x#3"]
    unnamed = read_rows(tmp_path, {"question": "q", "answer": "a"}, {"question": "q", "answer": "a"})
    assert [trace.id for trace in unnamed] == ["00000", "00001"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.json", lambda f, rows: f.write_text(json.dumps(rows))),
        ("data.json", lambda f, rows: f.write_text(json.dumps({"data": rows}))),
        ("lines.json", lambda f, rows: f.write_text("\n".join(map(json.dumps, rows)))),
        ("t.jsonl", lambda f, rows: f.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))),
        ("t.jsonl.gz", lambda f, rows: f.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))),
        ("t.json.gz", lambda f, rows: f.write_bytes(gzip.compress(json.dumps(rows).encode()))),
        ("t.parquet", lambda f, rows: pq.write_table(pa.Table.from_pylist(rows), f)),
    ],
)
def test_each_container(name: str, write: Any, tmp_path: Path) -> None:
    rows = [ROWS["messages"], ROWS["messages"], ROWS["messages"]]
    write(tmp_path / name, rows)
    traces = read_traces(tmp_path / name, limit=2)
    assert len(traces) == 2
    assert (traces[1].question, traces[1].thinking, traces[1].answer) == EXPECTED


def test_gzipped_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROWS["s1K"]]), tmp_path / "t.parquet")
    file = tmp_path / "t.parquet.gz"
    file.write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert read_traces(file)[0].answer == "It is 4."


GOOD = json.dumps({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"question": "q", ', "line 3: not valid JSON"),
        ("[1, 2]", "line 3: expected an object with named columns, found a list"),
        ('{"instruction": "q", "output": "a"}', "line 3: unknown columns instruction, output; expected messages"),
        ('{"question": "q"}', "line 3: unknown columns question; expected"),
        ('{"question": 7, "answer": "a"}', "line 3: question must be a text, found a number"),
        ('{"question": "q", "answer": ""}', "line 3: the trace has neither thinking nor answer"),
        ('{"question": " ", "answer": "a"}', "line 3: the question is empty"),
        ('{"messages": "hi"}', "line 3: messages must be a list of messages, found a text"),
        ('{"messages": ["hi"]}', "line 3: messages must hold objects with role and content, found a text"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "line 3: messages has the role 'tool'; expected"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 3: messages must end with a message of the assist"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 3: messages must have a user's message before"),
        ('{"conversations": [{"from": "human", "value": null}]}', "must have a text as its content, found nothing"),
        (
            '{"messages": [{"role": "assistant", "content": "", "thinking": [1]}]}',
            "the thinking of a message must be a text, found a list",
        ),
        ('{"prompt": 1, "completion": "a"}', "prompt and completion must be texts or lists of messages"),
        (b"\xff\xfe", "line 3: not UTF-8 text"),
    ],
)
def test_malformed_lines_are_named(line: str | bytes, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(f"{GOOD}\n\n".encode() + bad + b"\n")
    with pytest.raises(BadInput) as caught:
        read_traces(file)
    assert str(file) in str(caught.value)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no file"):
        read_traces(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no traces"):
        read_traces(tmp_path / "empty.jsonl")
    whole = gzip.compress(f"{GOOD}\n".encode() * 2000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="is damaged"):
        read_traces(tmp_path / "cut.jsonl.gz")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match="is not a Parquet file"):
        read_traces(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text('[{"question": "q",\n]')
    with pytest.raises(BadInput, match=r"x\.json line 2: not valid JSON"):
        read_traces(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("7")
    with pytest.raises(BadInput, match="expected a list of objects"):
        read_traces(tmp_path / "y.json")


def test_normalised_traces_come_back(tmp_path: Path) -> None:
    traces = [
        Trace("a", "Zürich?\u2028", "日本\n🙂", "ok", gold="1", family="f"),
        Trace("b", "q", "", "a", turns=({"role": "user", "content": "x"},), raw_prompt="raw"),
    ]
    write_traces(tmp_path / "t.jsonl", traces)
    assert list(load_traces(tmp_path / "t.jsonl")) == traces
    (tmp_path / "t.jsonl").write_text(GOOD)
    with pytest.raises(BadInput, match="line 1: not a normalised trace"):
        list(load_traces(tmp_path / "t.jsonl"))


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "no/such":
            raise ConnectionError("Couldn't reach the hub\nmore")
        return [ROWS["s1K"]]

    library: Any = ModuleType("datasets")
    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read_traces("hub:simplescaling/s1K-1.1")[0].answer == "It is 4."
    assert read_traces("hub:owner/name:validation")[0].answer == "It is 4."
    assert asked == [("simplescaling/s1K-1.1", "train"), ("owner/name", "validation")]
    with pytest.raises(BadInput, match=r"Could not read the hub dataset no/such split train: Couldn't reach the hub$"):
        read_traces("hub:no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install datasets"):
        read_traces("hub:owner/name")


def test_traces_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_traces(file, [Trace("a", "q", "t", "x")])

    def cut_off() -> Iterator[Trace]:
        yield Trace("b", "q", "t", "x" * 100_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_traces(file, cut_off())
    with pytest.raises(UnicodeEncodeError):  # stands for any failure while bytes are written
        write_traces(file, [Trace("b", "q", "t", "\ud800")])
    assert [trace.id for trace in load_traces(file)] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
