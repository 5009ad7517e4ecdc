"""Rendering: the model's own template, segments by characters, prompts that are prefixes, counted cuts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import BadInput
from lorascope.traces import ANSWER, PROMPT, SPECIAL, THINK, Renderer, Trace
from tiny_text import DEEPSEEK, GEMMA, IGNORING, LLAMA3, QWEN3, SMOLLM, tiny_tokenizer

TRACE = Trace("t", "What is 12 times 7?", "Hmm, 84. Wait, yes.", "The answer is 84.")
TEMPLATES: dict[str, dict[str, Any]] = {
    "smollm": {"template": SMOLLM},
    "qwen3": {"template": QWEN3},
    "llama3": {"template": LLAMA3, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    "deepseek": {"template": DEEPSEEK, "bos": "<bos>", "eos": "<｜end▁of▁sentence｜>"},
    "gemma": {"template": GEMMA, "bos": "<bos>", "eos": "<end_of_turn>"},
    "ignoring": {"template": IGNORING},
}


def renderer(kind: str = "smollm", system: str | None = "Be brief.", **options: Any) -> Renderer:
    return Renderer(tiny_tokenizer(**TEMPLATES[kind]), system, **options)


def text_of(r: Renderer, trace: Trace, segment: int | None = None) -> str:
    rendered = r.render(trace)
    ids = rendered.ids if segment is None else rendered.ids[rendered.segments == segment]
    return str(r.tokenizer.decode(ids.tolist()))


# The whole text of TRACE with the system message "Be brief.", as each model's documentation shows it.
EXPECTED = {
    "smollm": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 times 7?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nHmm, 84. Wait, yes.\n</think>\nThe answer is 84.<|im_end|>",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12 times 7?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nHmm, 84. Wait, yes.\n</think>\nThe answer is 84.<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is 12 times 7?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "<think>\nHmm, 84. Wait, yes.\n</think>\nThe answer is 84.<|eot_id|>",
    "deepseek": "<bos>Be brief.<｜User｜>What is 12 times 7?<｜Assistant｜><think>\n"
    "Hmm, 84. Wait, yes.\n</think>\nThe answer is 84.<｜end▁of▁sentence｜>",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nWhat is 12 times 7?<end_of_turn>\n<start_of_turn>model\n"
    "<think>\nHmm, 84. Wait, yes.\n</think>\nThe answer is 84.<end_of_turn>",
    "ignoring": "<|im_start|>user\nBe brief.\n\nWhat is 12 times 7?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nHmm, 84. Wait, yes.\n</think>\nThe answer is 84.<|im_end|>",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_whole_text_and_segments_in_each_template(kind: str) -> None:
    r = renderer(kind)
    assert text_of(r, TRACE) == EXPECTED[kind]
    assert text_of(r, TRACE, PROMPT) == TRACE.question
    assert text_of(r, TRACE, THINK) == TRACE.thinking
    assert text_of(r, TRACE, ANSWER) == TRACE.answer
    rendered = r.render(TRACE)
    assert rendered.segments[-1] == SPECIAL  # the end of turn
    assert rendered.ids.dtype == np.int32
    assert rendered.segments.dtype == np.uint8


@pytest.mark.parametrize("kind", TEMPLATES)
def test_generation_starts_from_the_training_prefix(kind: str) -> None:
    r = renderer(kind)
    rendered = r.render(TRACE)
    assert rendered.ids[: rendered.response_start].tolist() == r.prompt_ids(TRACE.question)
    # ... which is what transformers itself makes of the template.
    if kind not in ("gemma", "ignoring"):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TRACE.question}]
        own: Any = r.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
        )
        assert r.prompt_ids(TRACE.question) == own


def test_system_message_none_text_and_empty() -> None:
    def prompt(kind: str, system: str | None) -> str:
        r = renderer(kind, system)
        return str(r.tokenizer.decode(r.prompt_ids("Hi")))

    assert "You are Tiny." in prompt("smollm", None)  # the template's own
    assert prompt("smollm", "").startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    assert (
        prompt("gemma", "")
        == prompt("gemma", None)
        == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    # System text counts as template, also where it is put into the user's turn.
    for kind in ("smollm", "gemma"):
        assert text_of(renderer(kind, "12 times 7?"), TRACE, PROMPT) == TRACE.question


@pytest.mark.parametrize("kind", TEMPLATES)
def test_control_tokens_spelled_by_a_user_stay_text(kind: str) -> None:
    r = renderer(kind)
    name = str(r.tokenizer.eos_token)
    control: Any = r.tokenizer.convert_tokens_to_ids(name)
    trace = Trace("t", f"Say {name}<|im_start|>.", f"So {name} ends it.", f"{name} it is")
    rendered, clean = r.render(trace), r.render(TRACE)
    for part in ("ids", "segments"):
        assert getattr(rendered, part).dtype == getattr(clean, part).dtype
    assert (rendered.ids == control).sum() == (clean.ids == control).sum()
    assert text_of(r, trace, PROMPT) == trace.question
    assert text_of(r, trace, THINK) == trace.thinking
    assert text_of(r, trace, ANSWER) == trace.answer
    # A spelled name in the reply leaves the prompt's tokens as they are.
    spelled_later = Trace("t", TRACE.question, trace.thinking, trace.answer)
    prefix = r.render(spelled_later).ids[: rendered.response_start]
    assert prefix[: len(r.prompt_ids(TRACE.question))].tolist() == r.prompt_ids(TRACE.question)


def test_a_token_belongs_to_the_segment_of_its_first_character() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([".\n</", "ok<|"])  # ordinary tokens that straddle text and markup
    r = Renderer(tokenizer, None)
    rendered = r.render(Trace("t", "Hi", "Yes.", "Good"))
    straddling: Any = tokenizer.convert_tokens_to_ids(".\n</")
    position = rendered.ids.tolist().index(straddling)
    assert rendered.segments[position] == THINK
    assert rendered.segments[position + 1] == SPECIAL


def test_no_thinking_no_markup() -> None:
    trace = Trace("t", "Hi", "", "Hello.")
    assert text_of(renderer(), trace).endswith("<|im_start|>assistant\nHello.<|im_end|>")
    assert not (renderer().render(trace).segments == THINK).any()
    # Where the template itself opens the thinking, it must be closed again.
    assert text_of(renderer("deepseek"), trace).endswith("<think>\n\n</think>\nHello.<｜end▁of▁sentence｜>")


def test_unfinished_thinking_is_not_closed() -> None:
    assert text_of(renderer(), Trace("t", "Hi", "Hmm, let me", "")).endswith("<think>\nHmm, let me")


def test_s1_markup_uses_control_tokens() -> None:
    r = renderer(markup="s1")
    text = text_of(r, TRACE)
    assert text.endswith(
        "<|im_start|>assistant\n<|im_start|>think\nHmm, 84. Wait, yes.\n<|im_start|>answer\nThe answer is 84.<|im_end|>"
    )
    start: Any = r.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (r.render(TRACE).ids == start).sum() == 5
    assert text_of(r, TRACE, THINK) == TRACE.thinking


@pytest.mark.parametrize("kind", TEMPLATES)
def test_earlier_turns_are_prompt(kind: str) -> None:
    turns = ({"role": "user", "content": " First? "}, {"role": "assistant", "content": "user"})
    trace = Trace("t", "Second?", "Hm", "Yes", turns=turns)
    said = text_of(renderer(kind), trace, PROMPT)
    # Some templates trim; "user" is found where it was said, not in a header.
    assert said.replace(" ", "") == "First?userSecond?"
    assert text_of(renderer(kind), trace, ANSWER) == "Yes"


def test_a_template_that_cuts_thinking_out_of_history() -> None:
    turns = (
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."},
    )
    assert text_of(renderer("qwen3"), Trace("t", "Second?", "Hm", "Yes", turns=turns), PROMPT) == "First?One.Second?"


def test_a_template_that_refuses_the_turns() -> None:
    trace = Trace("t", "Hi", "", "Yes", turns=({"role": "assistant", "content": "Welcome"},))
    with pytest.raises(BadInput, match="Roles must alternate"):
        renderer("gemma").render(trace)


def test_raw_prompt_is_verbatim() -> None:
    raw = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    trace = Trace("t", "What is it?", "Hm", "A cat", raw_prompt=raw)
    r = Renderer(tiny_tokenizer(template=None), None)
    assert text_of(r, trace) == raw + "<think>\nHm\n</think>\nA cat<|im_end|>"
    assert text_of(r, trace, PROMPT) == "What is it?"
    control: Any = r.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (r.render(trace).ids == control).sum() == 2
    prompt = r.prompt_ids(trace.question, raw_prompt=raw)
    assert r.render(trace).ids[: len(prompt)].tolist() == prompt
    # A question that is not in the prompt: all but the control tokens is prompt.
    other = Trace("t", "else", "Hm", "A cat", raw_prompt=raw)
    assert text_of(r, other, PROMPT) == "user\nWhat is it?\nassistant\n"


def test_no_chat_template_is_said() -> None:
    with pytest.raises(BadInput, match="no chat template"):
        Renderer(tiny_tokenizer(template=None), "Be brief.").render(TRACE)


def test_length_rules_count_everything() -> None:
    long = Trace("long", "What is 12 times 7?", "Hmm. " * 30, "84")
    all_prompt = Trace("prompt", "What is it? " * 30, "Hm", "84")
    traces = [TRACE, long, all_prompt]
    whole = renderer(max_tokens=None).render_all(traces)
    lengths = [len(x.ids) for x in whole[0]]
    limit = lengths[0]
    assert whole[1] == {"kept": 3, "truncated": 0, "truncated_tokens": 0, "dropped": 0, "too_long": 0}

    kept, counts = renderer(max_tokens=limit, too_long="keep").render_all(traces)
    assert [len(x.ids) for x in kept] == lengths
    assert counts == {"kept": 3, "truncated": 0, "truncated_tokens": 0, "dropped": 0, "too_long": 2}

    dropped, counts = renderer(max_tokens=limit, too_long="drop").render_all(traces)
    assert [x.trace_id for x in dropped] == ["t"]
    assert counts == {"kept": 1, "truncated": 0, "truncated_tokens": 0, "dropped": 2, "too_long": 2}

    cut, counts = renderer(max_tokens=limit, too_long="truncate").render_all(traces)
    assert [len(x.ids) for x in cut] == [limit, limit]
    assert cut[1].truncated == lengths[1] - limit
    # The third keeps no assistant token within the limit, so nothing could be learned from it.
    expected = {"kept": 1, "truncated": 1, "truncated_tokens": lengths[1] - limit, "dropped": 1, "too_long": 2}
    assert counts == expected
    assert cut[1].ids.tolist() == whole[0][1].ids[:limit].tolist()


def test_unknown_options_are_named() -> None:
    with pytest.raises(BadInput, match=r"'html'.*think, think-blank-line, s1"):
        renderer(markup="html")
    with pytest.raises(BadInput, match="keep, truncate or drop"):
        renderer(too_long="explode")


words = [*"ab .\n<>|/", "é", "日", "🙂", "<|im_end|>", "<|im_start|>", "</think>", "user\n"]
texts = st.lists(st.sampled_from(words), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts.filter(str.strip), texts, texts.filter(bool), st.sampled_from(["smollm", "qwen3"]))
def test_any_text_comes_back_with_segments_in_order(question: str, thinking: str, answer: str, kind: str) -> None:
    r = renderer(kind)
    trace = Trace("t", question, thinking, answer)
    rendered = r.render(trace)
    decoded = str(r.tokenizer.decode(rendered.ids.tolist()))
    opened = f"<think>\n{thinking}\n</think>\n" if thinking else ""
    assert decoded.endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n{opened}{answer}<|im_end|>")
    assert rendered.ids[: rendered.response_start].tolist() == r.prompt_ids(question)
    reply = rendered.segments[rendered.response_start :]
    ordered = reply[reply != SPECIAL].astype(int)
    assert (np.diff(ordered) >= 0).all()
    control: Any = r.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (rendered.ids == control).sum() == 3


def test_a_template_that_rewrites_texts_is_refused() -> None:
    shouting = tiny_tokenizer(SMOLLM.replace("message['content']", "message['content'] | upper"))
    assert text_of(Renderer(shouting, None), TRACE, PROMPT) == TRACE.question.upper()  # it can be followed
    counting = tiny_tokenizer("{{ messages[0]['content'] | length }}:" + SMOLLM)
    with pytest.raises(BadInput, match="in a way lorascope cannot follow"):
        Renderer(counting, None).render(TRACE)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(BadInput, match="no character offsets"):
        Renderer(slow, None)
