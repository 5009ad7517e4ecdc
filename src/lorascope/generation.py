"""Text from a model, with or without an adapter attached, greedy or sampled, in batches.

Generation itself is transformers' `generate`; here are batching, stopping and the thinking budget.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from lorascope.attached import Attached
from lorascope.progress import progress
from lorascope.traces import MARKUPS, Renderer


@dataclass(frozen=True)
class Sampling:
    """How to generate."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    rows: int = 32
    """Sequences generated at once."""
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
    """Responses to prompts of token ids, in their order. Sampled results depend on the batching (`rows`)."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = [order[i : i + sampling.rows] for i in range(0, len(order), sampling.rows)]
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
    rest = replace(sampling, max_new_tokens=sampling.max_new_tokens - budget)
    more = continue_rows(model, renderer, [prompts[i] + starts[i] for i in open_rows], rest) if open_rows else []
    for i, result in zip(open_rows, more, strict=True):
        first[i] = Generation(starts[i] + result.ids, result.finished)
    return first


@torch.no_grad()
def continue_rows(model: Any, renderer: Renderer, prompts: Sequence[list[int]], sampling: Sampling) -> list[Generation]:
    """One call of transformers' `generate` on left-padded prompts."""
    live = model.model if isinstance(model, Attached) else model
    tokenizer, device = renderer.tokenizer, live.get_input_embeddings().weight.device
    ends, pad = stop_ids(live, renderer), tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    width = max(len(p) for p in prompts)
    ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature > 0 else None,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(sampling.seed)
        if isinstance(model, Attached):
            stack.enter_context(model.generating())
        output = live.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
    return [cut_at_end(row, ends) for row in output[:, width:].tolist()]


def cut_at_end(ids: list[int], ends: Sequence[int]) -> Generation:
    """The ids before the first end token; finished if there is one."""
    for position, id_ in enumerate(ids):
        if id_ in ends:
            return Generation(ids[:position], True)
    return Generation(ids, False)


def stop_ids(model: Any, renderer: Renderer) -> list[int]:
    """Ids that end a response: the template's end of turn, the tokenizer's and the model's end of text."""
    tokenizer = renderer.tokenizer
    found: list[int] = tokenizer(renderer.end_of_turn, add_special_tokens=False)["input_ids"][:1]
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = [*found, *(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in ends if i is not None))
