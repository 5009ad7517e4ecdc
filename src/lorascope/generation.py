"""Text from a model, with or without an adapter attached, greedy or sampled, in batches.

Generation itself is transformers' `generate`; here are batching, stopping, the thinking budget, a cache that grows
in place, and finished rows leaving the batch.

Shapes: B = rows, T = tokens.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from lorascope.attached import Attached
from lorascope.decoders import text_decoder
from lorascope.progress import progress
from lorascope.traces import MARKUPS, Renderer

STRETCH = 16
"""New tokens between looks at which rows are finished; each look costs a copy of what is kept."""

SHARED = 32
"""Fewest common tokens of all prompts that are worth a pass of their own."""


@dataclass(frozen=True)
class Sampling:
    """How to generate."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """No row ends before so many tokens: for runs of equal length."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    rows: int = 160
    """Most sequences generated at once."""
    token_budget: int = 16_384
    """Most tokens, prompts and longest responses, held at once."""
    thinking_budget: int | None = None
    """Close the thinking after so many tokens, if the model has not (as s1's budget forcing)."""


@dataclass(frozen=True)
class Generation:
    """The ids of one response without its end-of-turn token, and whether the model ended it itself."""

    ids: list[int]
    finished: bool


def generate(
    model: Any, tokenizer: Any, text: str, *, sampling: Sampling | None = None, system: str | None = None
) -> str:
    """The response to one user message in the model's chat template.

    Args:
        model: what `attach` gives, or a plain transformers model.
    """
    renderer = Renderer(tokenizer, system=system)
    result = generate_batch(model, renderer, [renderer.prompt_ids(text)], sampling or Sampling())[0]
    return str(tokenizer.decode(result.ids, skip_special_tokens=False))


def generate_batch(
    model: Any, renderer: Renderer, prompts: Sequence[Sequence[int]], sampling: Sampling, desc: str = "generate"
) -> list[Generation]:
    """Responses to prompts of token ids, in their order. Sampled results depend on the batching."""
    batches = plan_rows([len(p) for p in prompts], sampling)
    results: dict[int, Generation] = {}
    for number, batch in enumerate(progress(batches, desc=desc, unit="batch", total=len(batches))):
        chosen = replace(sampling, seed=sampling.seed + 1000 * number)
        outputs = generate_rows(model, renderer, [list(prompts[i]) for i in batch], chosen)
        results |= dict(zip(batch, outputs, strict=True))
    return [results[i] for i in range(len(prompts))]


def generate_rows(model: Any, renderer: Renderer, prompts: Sequence[list[int]], sampling: Sampling) -> list[Generation]:
    """Responses to the prompts of one batch, the thinking closed by force where a budget says so."""
    budget = sampling.thinking_budget
    if budget is None or budget >= sampling.max_new_tokens:
        return continue_rows(model, renderer, prompts, sampling)
    first = continue_rows(model, renderer, prompts, replace(sampling, max_new_tokens=budget))
    markup, tokenizer = MARKUPS[renderer.markup], renderer.tokenizer
    close = tokenizer(markup.close, add_special_tokens=False)["input_ids"]
    open_rows = [i for i, result in enumerate(first) if not result.finished]
    starts = {}
    for i in open_rows:
        closed = markup.close.strip() in tokenizer.decode(first[i].ids)
        starts[i] = first[i].ids + ([] if closed else close)
    fewest, most = max(0, sampling.min_new_tokens - budget), sampling.max_new_tokens - budget
    rest = replace(sampling, min_new_tokens=fewest, max_new_tokens=most)
    more = continue_rows(model, renderer, [prompts[i] + starts[i] for i in open_rows], rest) if open_rows else []
    for i, result in zip(open_rows, more, strict=True):
        first[i] = Generation(starts[i] + result.ids, result.finished)
    return first


@torch.no_grad()
def continue_rows(model: Any, renderer: Renderer, prompts: Sequence[list[int]], sampling: Sampling) -> list[Generation]:
    """Continue left-padded prompts with transformers' `generate`, finished rows taken out between stretches."""
    live = model.model if isinstance(model, Attached) else model
    tokenizer, device = renderer.tokenizer, live.get_input_embeddings().weight.device
    ends, pad = stop_ids(live, renderer), tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    cache = growing_cache(live)
    fixed = cache is None or (isinstance(model, Attached) and needs_all_rows(model))
    prefix = [] if fixed else common_prefix(prompts)
    width, start = max(len(p) for p in prompts), len(prefix)
    # Padding stands between what all prompts share and the rest, so that the former is run once for all.
    ids_BT = torch.tensor([prefix + [pad] * (width - len(p)) + p[start:] for p in prompts], device=device)
    mask_BT = torch.tensor(
        [[1] * start + [0] * (width - len(p)) + [1] * (len(p) - start) for p in prompts], device=device
    )
    if prefix:
        run_prefix(model, cache, ids_BT[:1, :start], len(prompts))
    responses: list[list[int]] = [[] for _ in prompts]
    rows, left = list(range(len(prompts))), sampling.max_new_tokens
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(sampling.seed)
        stack.enter_context(without_defaults(live))
        if isinstance(model, Attached):
            stack.enter_context(model.generating())
        while rows and left > 0:
            stretch = left if fixed else min(STRETCH, left)
            fewest = sampling.min_new_tokens - sampling.max_new_tokens + left
            settings = GenerationConfig(
                max_new_tokens=stretch,
                min_new_tokens=min(fewest, stretch) if fewest > 0 else None,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
                top_k=0 if sampling.temperature > 0 else None,
                eos_token_id=ends,
                pad_token_id=pad,
            )
            before = ids_BT.shape[1]
            ids_BT = live.generate(
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, **cache_argument(live, cache)
            )
            new_BT = ids_BT[:, before:]
            mask_BT = torch.cat([mask_BT, torch.ones_like(new_BT)], dim=1)
            for row, ids in zip(rows, new_BT.tolist(), strict=True):
                responses[row] += ids
            left -= stretch
            kept = (~torch.isin(new_BT, torch.tensor(ends, device=device)).any(dim=1)).nonzero()[:, 0]
            if len(kept) < len(rows):
                rows = [rows[i] for i in kept.tolist()]
                ids_BT, mask_BT = ids_BT[kept], mask_BT[kept]
                if cache is not None and rows:
                    cache.batch_select_indices(kept)
    return [cut_at_end(response, ends) for response in responses]


@contextmanager
def without_defaults(model: Any) -> Iterator[None]:
    """Without the checkpoint's own ways to generate, so that `Sampling` alone decides.

    transformers fills whatever a passed config leaves open from the model's: Qwen2.5-Instruct's repetition penalty
    would be part of every "greedy" response.
    """
    brought = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = brought


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The ids that all prompts begin with, at least one of each left over; none where sharing them gains little."""
    first, last = min(prompts), max(prompts)
    most = min(len(p) for p in prompts) - 1
    same = next((i for i in range(most) if first[i] != last[i]), most)
    return list(first[:same]) if len(prompts) > 1 and same >= SHARED else []


def run_prefix(model: Any, cache: Any, ids_1T: Tensor, rows: int) -> None:
    """Put the keys and values of a common prefix into the cache, once for each of `rows` rows."""
    live = model.model if isinstance(model, Attached) else model
    before = model.in_prompt if isinstance(model, Attached) else False
    try:
        if isinstance(model, Attached):
            model.in_prompt = True
        text_decoder(live)(input_ids=ids_1T, use_cache=True, **cache_argument(live, cache))
    finally:
        if isinstance(model, Attached):
            model.in_prompt = before
    cache.batch_repeat_interleave(rows)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache under the name that the model takes it by: `cache` since transformers 5.24."""
    known = inspect.signature(text_decoder(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def needs_all_rows(attached: Attached) -> bool:
    """Whether what is read or edited belongs to the rows of the whole batch."""
    return bool(attached.readings) or any(active.edit.per_sequence for active in attached.edits)


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room to grow: a new token is written, not all of them copied."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, width] and return all that is cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


def append(seen: Tensor, new: Tensor) -> Tensor:
    """`cat([seen, new], dim=2)` as a view of a buffer: the one that `seen` is a view of, where it has room."""
    start, end = seen.shape[2], seen.shape[2] + new.shape[2]
    buffer = seen._base
    if buffer is None or buffer.ndim != 4 or buffer.shape[:2] != new.shape[:2] or buffer.shape[2] < end:
        buffer = new.new_empty(*new.shape[:2], end + max(64, end // 2), new.shape[3])
        buffer[:, :, :start] = seen
    buffer[:, :, start:end] = new
    return buffer[:, :, :end]


def growing_cache(model: Any) -> DynamicCache | None:
    """An empty cache of such layers; None for a model that keeps anything but whole keys and values."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def plan_rows(lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Which prompts are continued together: of like length, within the limits on rows and tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        fit = max(1, sampling.token_budget // (lengths[i] + sampling.max_new_tokens))
        if not batches or len(batches[-1]) >= min(sampling.rows, fit):
            batches.append([])
        batches[-1].append(i)
    return batches


def cut_at_end(ids: list[int], ends: Sequence[int]) -> Generation:
    """The ids before the first end token; finished if there is one."""
    for position, id_ in enumerate(ids):
        if id_ in ends:
            return Generation(ids[:position], True)
    return Generation(ids, False)


def stop_ids(model: Any, renderer: Renderer) -> list[int]:
    """Ids that end a response: the template's end of turn, the tokenizer's and the model's end of text."""
    tokenizer = renderer.tokenizer
    turn: list[int] = tokenizer(renderer.end_of_turn, add_special_tokens=False)["input_ids"]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Only a control token ends a turn: before Llama 2's stands a space, which is a token of many responses.
    found = [id_ for id_ in turn if id_ in special][:1]
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = [*found, *(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in ends if i is not None))
