"""Passes over one growing sequence while its scalars are moved: what is steered, and what the passes see.

Shape legend: T new tokens of a pass, N directions, n directions of one module, V vocabulary, R directions of one
module, I input width, O output width.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import Attached, attach
from lorascope.edits import Edit
from lorascope.generation import cache_argument, growing_cache
from lorascope.steering.moves import Steer, move_edits, move_shift, needs_codes, shift_edit
from lorascope.steering.panel import Panel
from lorascope.store import Floats

TARGETS = ("adapter", "base", "control")
"""What is steered: the adapted model; the base model (the adapter off, what is added written all the same); or, as a
control, the adapted model with every move written along a random vector as long as the direction's own."""
WHERE = ("generated", "all")
"""Which tokens are edited."""


@dataclass(frozen=True)
class Sequel:
    """One sequence that passes continue: what moves its scalars, and what the model keeps of the tokens so far."""

    attached: Attached
    panel: Panel
    steers: tuple[Steer, ...]
    target: str
    cache: Any
    croppable: bool
    """Whether tokens can be taken off the cache again; else a pass that only looks works on a copy."""
    twins: Adapter | None
    """The control's directions."""


def begin_sequel(attached: Attached, panel: Panel, steers: Sequence[Steer], target: str, seed: int) -> Sequel:
    """An empty sequence; the seed draws the control's vectors."""
    cache = growing_cache(attached.model)
    croppable = cache is not None
    if cache is None:
        cache = DynamicCache(config=attached.model.config)
    twins = random_twins(attached.adapter, seed) if target == "control" else None
    return Sequel(attached, panel, tuple(steers), target, cache, croppable, twins)


def random_twins(adapter: Adapter, seed: int) -> Adapter:
    """A direction beside each of the adapter's: it reads nothing and writes along a random vector of equal length."""
    generator = torch.Generator().manual_seed(seed)

    def twin(module: AdaptedModule) -> AdaptedModule:
        b_OR = torch.randn(module.b_OR.shape, generator=generator)
        b_OR *= module.b_OR.norm(dim=0).cpu() / b_OR.norm(dim=0)
        return replace(module, a_RI=torch.zeros_like(module.a_RI), b_OR=b_OR)

    return replace(adapter, modules=tuple(twin(module) for module in adapter.modules))


@torch.no_grad()
def run_pass(sequel: Sequel, ids: Sequence[int], *, edited: bool) -> tuple[Tensor, Floats]:
    """Append tokens to the sequence.

    Returns:
        Logits [V] after the last of them, and their raw scalars [T, N] as edited; on the base model, what the read
        vectors see there.
    """
    steers = sequel.steers if edited else ()
    if sequel.target == "base":
        return run_base(sequel, steers, ids)
    if sequel.twins is not None:
        return run_control(sequel, steers, ids)
    before_TN = look(sequel, ids) if needs_codes(sequel.panel, steers) else None
    with sequel.attached.edit(*move_edits(sequel.panel, steers, before_TN)), sequel.attached.tap() as reading:
        logits_V = forward(sequel.attached.model, sequel.cache, ids)
    return logits_V, reading.scalars()[0].cpu().numpy()


def run_base(sequel: Sequel, steers: Sequence[Steer], ids: Sequence[int]) -> tuple[Tensor, Floats]:
    """`run_pass` with every scalar read, set to zero, and then moved."""
    seen_TN = torch.zeros(len(ids), len(sequel.panel.addresses))

    def read_and_stop(z_1Tn: Tensor, columns: Tensor) -> Tensor:
        seen_TN[:, columns.cpu()] = z_1Tn[0].cpu()
        return torch.zeros_like(z_1Tn)

    with sequel.attached.edit(Edit("*", read_and_stop), *move_edits(sequel.panel, steers, None)):
        logits_V = forward(sequel.attached.model, sequel.cache, ids)
    return logits_V, seen_TN.numpy()


def run_control(sequel: Sequel, steers: Sequence[Steer], ids: Sequence[int]) -> tuple[Tensor, Floats]:
    """`run_pass` with what the moves would add to each scalar added to that of its random twin instead."""
    assert sequel.twins is not None
    with ExitStack() as stack:
        if steers:
            constant = all(steer.mode == "add" for steer in steers)
            before_TN = np.zeros((1, len(sequel.panel.addresses)), np.float32) if constant else look(sequel, ids)
            beside = stack.enter_context(attach(sequel.attached.model, sequel.twins))
            stack.enter_context(beside.edit(shift_edit(move_shift(sequel.panel, steers, before_TN))))
        reading = stack.enter_context(sequel.attached.tap())
        logits_V = forward(sequel.attached.model, sequel.cache, ids)
    return logits_V, reading.scalars()[0].cpu().numpy()


def look(sequel: Sequel, ids: Sequence[int]) -> Floats:
    """Raw scalars [T, N] of tokens without edits on them, after the sequence so far, which stays as it is."""
    cache = sequel.cache if sequel.croppable else copy.deepcopy(sequel.cache)
    with sequel.attached.tap() as reading:
        forward(sequel.attached.model, cache, ids)
    if sequel.croppable:
        cache.crop(-len(ids))
    return reading.scalars()[0].cpu().numpy()


def forward(model: Any, cache: Any, ids: Sequence[int]) -> Tensor:
    """Logits [V] after the last of some tokens, which are added to the cache."""
    ids_1T = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids_1T, use_cache=True, **last, **cache_argument(model, cache)).logits
    return logits[0, -1]
