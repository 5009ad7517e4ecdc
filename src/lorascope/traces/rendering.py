"""Reasoning traces as token ids with a segment per token, in the model's own chat template.

The prompt (template + generation prompt) and the assistant's part are tokenised apart and joined, so that
generation starts from exactly the prefix that training saw. Text that came from a user (question, thinking,
answer, system text) never turns into a control token, whatever it spells; template and markup text does.

Legend: T tokens of one rendered trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.traces.formats import Trace

if TYPE_CHECKING:  # stages that only read a study must not import transformers
    from transformers import PreTrainedTokenizerBase

SPECIAL, PROMPT, THINK, ANSWER = 0, 1, 2, 3
SEGMENT_NAMES = ("special", "prompt", "think", "answer")


@dataclass(frozen=True)
class Markup:
    """What the assistant writes before and after its thinking."""

    open: str
    close: str


MARKUPS: dict[str, Markup] = {
    "think": Markup("<think>\n", "\n</think>\n"),
    "think-blank-line": Markup("<think>\n", "\n</think>\n\n"),  # as Qwen3 and DeepSeek-R1 write it
    "s1": Markup("<|im_start|>think\n", "\n<|im_start|>answer\n"),
}

# Llama templates print a date: a fixed one keeps training, recording and evaluation on the same tokens.
_DATE = "26 Jul 2024"
_SLOT = re.compile(r"(LORASCOPE-SLOT-\d+-END)")


@dataclass(frozen=True)
class Rendered:
    """One trace as tokens: `ids` int32 [T] and `segments` uint8 [T], the end-of-turn token included.

    `response_start` is the position of the assistant's first token: the logits at t >= response_start - 1
    predict the assistant's token t + 1. `truncated` is the number of tokens cut off the end.
    """

    trace_id: str
    ids: NDArray[np.int32]
    segments: NDArray[np.uint8]
    response_start: int
    truncated: int = 0


@dataclass(frozen=True)
class Piece:
    """A run of text of one segment; in a `literal` run the names of control tokens are plain text."""

    text: str
    segment: int
    literal: bool


@dataclass(frozen=True, eq=False)
class Renderer:
    """Turns traces into tokens, the same way for training, recording and evaluation.

    `system`: the study's system message, None for what the template does when it is given none, "" for a
    system message without text. Templates that refuse or ignore system messages get it in front of the first
    user message, with an empty line between. `markup`: a key of MARKUPS. `too_long`: what happens to traces
    of more than `max_tokens` tokens: kept whole, truncated at the end, or dropped.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    markup: str = "think"
    max_tokens: int | None = None
    too_long: Literal["keep", "truncate", "drop"] = "truncate"

    def __post_init__(self) -> None:
        if self.markup not in MARKUPS:
            raise BadInput(f"Unknown think markup {self.markup!r}: choose one of {', '.join(MARKUPS)}.")
        if self.too_long not in ("keep", "truncate", "drop"):
            raise BadInput(f"Unknown rule {self.too_long!r} for long traces: choose keep, truncate or drop.")
        if not getattr(self.tokenizer, "is_fast", False):
            raise BadInput("This model's tokenizer gives no character offsets: use a model with a tokenizer.json file.")

    def prompt_ids(
        self, question: str, turns: Sequence[Mapping[str, str]] = (), raw_prompt: str | None = None
    ) -> list[int]:
        """Token ids of everything before the assistant's first token, for generation."""
        ids, _ = self._tokenise(self._prompt_pieces(question, turns, raw_prompt))
        return [int(token) for token in ids]

    def render(self, trace: Trace) -> Rendered:
        """The whole trace as tokens, cut at `max_tokens` when the rule is to truncate."""
        prompt = self._prompt_pieces(trace.question, trace.turns, trace.raw_prompt)
        prompt_ids, prompt_segments = self._tokenise(prompt)
        prompt_text = "".join(piece.text for piece in prompt)
        reply_ids, reply_segments = self._tokenise(self._reply_pieces(trace, prompt_text))
        ids = np.concatenate([prompt_ids, reply_ids])
        segments = np.concatenate([prompt_segments, reply_segments])
        cut = 0
        if self.too_long == "truncate" and self.max_tokens is not None:
            cut = max(0, len(ids) - self.max_tokens)
        kept = len(ids) - cut
        # copies, since a view would keep what is cut off
        return Rendered(trace.id, ids[:kept].copy(), segments[:kept].copy(), len(prompt_ids), cut)

    def render_all(self, traces: Iterable[Trace]) -> tuple[list[Rendered], dict[str, int]]:
        """Render traces and count what the length rule did.

        Counts: `kept` (whole), `truncated` with `truncated_tokens`, `dropped` (by the rule, or because
        truncation left no assistant token); the three add up to the number of traces. `too_long` is the
        number of traces over the limit, whatever was done with them.
        """
        counts = {"kept": 0, "truncated": 0, "truncated_tokens": 0, "dropped": 0, "too_long": 0}
        results: list[Rendered] = []
        for trace in traces:
            rendered = self.render(trace)
            length = len(rendered.ids) + rendered.truncated
            over = self.max_tokens is not None and length > self.max_tokens
            counts["too_long"] += over
            if over and (self.too_long == "drop" or len(rendered.ids) <= rendered.response_start):
                counts["dropped"] += 1
                continue
            counts["truncated" if rendered.truncated else "kept"] += 1
            counts["truncated_tokens"] += rendered.truncated
            results.append(rendered)
        return results, counts

    @cached_property
    def end_of_turn(self) -> str:
        """What ends an assistant's turn: the template's text up to the first control token after it."""
        eos = str(self.tokenizer.eos_token or "")
        if not self.tokenizer.chat_template:
            return eos
        question, reply = "LORASCOPE-SLOT-0-END", "LORASCOPE-SLOT-1-END"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        after = self._apply_template(messages, generation=False).rpartition(reply)[2]
        control = self._control_tokens.search(after)
        return after[: control.end()] if control else eos

    # -- the prompt -----------------------------------------------------------------------------------------

    def _prompt_pieces(self, question: str, turns: Sequence[Mapping[str, str]], raw_prompt: str | None) -> list[Piece]:
        if raw_prompt is not None:
            return self._raw_pieces(raw_prompt, question)
        texts: list[str] = []
        segments: list[int] = []

        def slot(text: str, segment: int = PROMPT) -> int:
            texts.append(text)
            segments.append(segment)
            return len(texts) - 1

        # Each message is a role and the slots whose texts make up its content.
        plan: list[tuple[str, list[int]]] = []
        if self.system is not None and not self._folds_system:
            plan.append(("system", [slot(self.system, SPECIAL)]))
        folded = [slot(self.system, SPECIAL)] if self.system and self._folds_system else []
        for turn in (*turns, {"role": "user", "content": question}):
            lead = folded if turn["role"] == "user" else []
            plan.append((turn["role"], [*lead, slot(turn["content"])]))
            folded = [] if lead else folded

        def fill(fillings: Sequence[str]) -> str:
            messages = [{"role": r, "content": "\n\n".join(fillings[i] for i in slots)} for r, slots in plan]
            return self._apply_template(messages, generation=True)

        # An empty text stays empty in the marked version too: templates may test for it.
        marks = [f"LORASCOPE-SLOT-{i}-END" if text else "" for i, text in enumerate(texts)]
        return _locate(fill(texts), fill(marks), texts, segments)

    def _raw_pieces(self, raw_prompt: str, question: str) -> list[Piece]:
        """A verbatim prompt: its control tokens are real; the question is prompt, the rest template."""
        start = raw_prompt.rfind(question) if question else -1
        if start < 0:
            return [Piece(raw_prompt, PROMPT, literal=False)]
        stop = start + len(question)
        return [
            Piece(raw_prompt[:start], SPECIAL, literal=False),
            Piece(raw_prompt[start:stop], PROMPT, literal=False),
            Piece(raw_prompt[stop:], SPECIAL, literal=False),
        ]

    @cached_property
    def _folds_system(self) -> bool:
        mark = "LORASCOPE-SLOT-0-END"
        messages = [{"role": "system", "content": mark}, {"role": "user", "content": "Hello"}]
        try:
            return mark not in self._apply_template(messages, generation=True)
        except BadInput:
            if not self.tokenizer.chat_template:
                raise
            return True  # such as Gemma's "System role not supported"

    def _apply_template(self, messages: list[dict[str, str]], generation: bool) -> str:
        if not self.tokenizer.chat_template:
            raise BadInput(
                "This model's tokenizer has no chat template: use an instruction-tuned model, or traces of "
                "plain text with --response-template."
            )
        from jinja2 import TemplateError

        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, date_string=_DATE
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadInput(f"The model's chat template refuses a conversation of {roles}: {error}.") from error
        return str(text)

    # -- the assistant's part -------------------------------------------------------------------------------

    def _reply_pieces(self, trace: Trace, prompt_text: str) -> list[Piece]:
        markup = MARKUPS[self.markup]
        # DeepSeek-R1's generation prompt already opens the thinking: write only what is missing of it.
        opened = next((s for s in (markup.open, markup.open.rstrip()) if prompt_text.endswith(s)), "")
        pieces: list[Piece] = []
        if trace.thinking:
            pieces += [
                Piece(markup.open[len(opened) :], SPECIAL, literal=False),
                Piece(trace.thinking, THINK, literal=True),
            ]
        if trace.thinking and not trace.answer:
            return pieces  # an unfinished trace: neither the end of thinking nor of the turn was written
        if trace.thinking or opened:
            pieces.append(Piece(markup.close, SPECIAL, literal=False))
        return [
            *pieces,
            Piece(trace.answer, ANSWER, literal=True),
            Piece(self.end_of_turn, SPECIAL, literal=False),
        ]

    # -- tokens ---------------------------------------------------------------------------------------------

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        names = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special and str(t)]
        names.sort(key=len, reverse=True)  # the longest name wins where one begins with another
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _tokenise(self, pieces: Sequence[Piece]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and segments of joined pieces; a token is of the segment in which its first character lies."""
        text = "".join(piece.text for piece in pieces)
        lengths = [len(piece.text) for piece in pieces]
        segment_of = np.repeat(np.array([p.segment for p in pieces], dtype=np.uint8), lengths)
        literal = np.repeat(np.array([p.literal for p in pieces], dtype=bool), lengths)
        spelled = False  # does user's text spell a control token?
        for start, stop in (match.span() for match in self._control_tokens.finditer(text)):
            if literal[start:stop].any():
                spelled = True
            else:
                segment_of[start:stop] = SPECIAL  # those in a raw prompt are not marked yet
        if spelled:
            ids, starts = self._encode_around(text, literal)
        else:
            ids, starts = self._encode(text, control=True)
        if not ids:
            return np.zeros(0, np.int32), np.zeros(0, np.uint8)
        # Offsets never run backwards, so a token without characters belongs to its predecessor's.
        first = np.minimum(np.maximum.accumulate(np.array(starts)), len(text) - 1)
        return np.array(ids, dtype=np.int32), segment_of[first]

    def _encode(self, text: str, control: bool) -> tuple[list[int], list[int]]:
        """Ids and first-character offsets; without `control`, names of control tokens are plain text."""
        out: Any = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=not control
        )
        return list(out["input_ids"]), [start for start, _ in out["offset_mapping"]]

    def _encode_around(self, text: str, literal: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
        """As `_encode`, with control tokens only where they lie outside literal text."""
        ids: list[int] = []
        starts: list[int] = []
        position = 0

        def plain(stop: int) -> None:
            if stop > position:
                part_ids, part_starts = self._encode(text[position:stop], control=False)
                ids.extend(part_ids)
                starts.extend(position + start for start in part_starts)

        edges = np.flatnonzero(np.diff(literal, prepend=True, append=True))
        for run_start, run_stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            for match in self._control_tokens.finditer(text, run_start, run_stop):
                plain(match.start())
                control_id: Any = self.tokenizer.convert_tokens_to_ids(match.group())
                ids.append(int(control_id))
                starts.append(match.start())
                position = match.end()
        plain(len(text))
        return ids, starts


def _locate(real: str, marked: str, texts: Sequence[str], segments: Sequence[int]) -> list[Piece]:
    """Find each slot's text in a rendered prompt, given the same prompt with marks in place of the texts.

    Templates trim texts, drop earlier turns or cut the thinking out of them, so what stands between two
    pieces of template is taken as it is in `real`.
    """
    parts = _SLOT.split(marked)  # template, mark, template, mark, ..., template
    pieces: list[Piece] = []
    position = 0
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if not real.startswith(part, position):
                raise _unfollowable()
            stop, segment, literal = position + len(part), SPECIAL, False
        else:
            slot = int(part.split("-")[2])
            last = number == len(parts) - 2
            stop = _end_of_text(real, position, texts[slot], parts[number + 1], last)
            segment, literal = segments[slot], True
        if stop > position:
            pieces.append(Piece(real[position:stop], segment, literal))
        position = stop
    if position != len(real):
        raise _unfollowable()
    return pieces


def _end_of_text(real: str, start: int, text: str, following: str, last: bool) -> int:
    for candidate in (text, text.strip(), text.rstrip(), text.lstrip()):
        stop = start + len(candidate)
        if real.startswith(candidate + following, start) and (not last or stop + len(following) == len(real)):
            return stop
    stop = len(real) - len(following) if last else real.find(following, start) if following else -1
    if stop < start:
        raise _unfollowable()
    return stop


def _unfollowable() -> BadInput:
    return BadInput(
        "The model's chat template changes messages in a way lorascope cannot follow: use plain-text traces "
        "with --response-template."
    )
