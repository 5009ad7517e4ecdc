"""What a training run sees, and when: control traces, steps of like length, the learning rate, batches.

Shapes: B = sequences, T = tokens, M = supervised positions of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorascope.kl import assistant_positions
from lorascope.traces import Rendered, Trace, pad_ids, plan_batches


def control_traces(traces: Sequence[Trace], control: str, seed: int) -> list[Trace]:
    """Training traces of a control: without their thinking, or with that of another problem of the family."""
    if control == "answers":
        return [replace(trace, thinking="") for trace in traces]
    if control != "shuffled":
        return list(traces)
    rng = np.random.default_rng(seed)
    families: dict[str | None, list[int]] = {}
    for index, trace in enumerate(traces):
        families.setdefault(trace.family, []).append(index)
    donors = list(range(len(traces)))
    for members in families.values():
        # A cyclic shift of a random order: nobody keeps the own trace (where there is another one).
        order = rng.permutation(members).tolist()
        for trace, donor in zip(order, order[1:] + order[:1], strict=True):
            donors[trace] = donor
    return [replace(trace, thinking=traces[donor].thinking) for trace, donor in zip(traces, donors, strict=True)]


def plan_steps(lengths: Sequence[int], batch: int, epochs: float, max_steps: int | None, seed: int) -> list[list[int]]:
    """Which traces each step takes: every epoch all of them once, in batches of like length, in a seeded order.

    Lengths are sorted within windows of 8 batches, so that padding is small and order still random. What is
    left over in an epoch is a smaller batch.
    """
    rng = np.random.default_rng(seed)
    total = math.ceil(math.ceil(len(lengths) / batch) * epochs)
    total = total if max_steps is None else min(total, max_steps)
    steps: list[list[int]] = []
    while len(steps) < total:
        order = rng.permutation(len(lengths))
        batches = []
        for start in range(0, len(order), 8 * batch):
            window = order[start : start + 8 * batch]
            window = window[np.argsort([lengths[i] for i in window], kind="stable")]
            batches += [window[i : i + batch].tolist() for i in range(0, len(window), batch)]
        steps += [batches[i] for i in rng.permutation(len(batches))]
    return steps[:total]


def rate_at(step: int, total: int, peak: float, warmup: float) -> float:
    """Learning rate of step 0..total-1: linear over the warm-up, then a cosine to zero.

    As transformers' cosine schedule, but a step ahead in the warm-up, where that one's first step has a rate of zero.
    """
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class Batch(NamedTuple):
    """What one forward pass of training takes."""

    ids_BT: Tensor
    rows_M: Tensor
    """Row of each supervised position."""
    positions_M: Tensor
    """The supervised positions: the loss is that of the tokens after them."""
    position_ids_BT: Tensor | None = None
    """Where packed sequences restart; None where every row is one sequence."""


def plan_packs(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups of sequences of at most `token_budget` tokens in all, longest first where they fit; no padding."""
    packs: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((k for k, (used, _) in enumerate(packs) if used + lengths[index] <= token_budget), None)
        if place is None:
            packs.append((lengths[index], [index]))
        else:
            packs[place] = (packs[place][0] + lengths[index], [*packs[place][1], index])
    return [members for _, members in packs]


def batch_tensors(traces: Sequence[Rendered], device: torch.device) -> Batch:
    """Right-padded rows of some traces and their supervised positions."""
    ids_BT, _ = pad_ids([trace.ids for trace in traces], 0)
    positions = [assistant_positions(trace) for trace in traces]
    rows = np.repeat(np.arange(len(traces)), [len(p) for p in positions])
    parts = (ids_BT, torch.from_numpy(rows), torch.from_numpy(np.concatenate(positions)))
    return Batch(*(part.to(device) for part in parts))


def packed_tensors(traces: Sequence[Rendered], device: torch.device) -> Batch:
    """The same as one row: sequences follow each other, and their position ids restart."""
    starts = np.cumsum([0, *(len(trace.ids) for trace in traces)])[:-1]
    ids = np.concatenate([trace.ids for trace in traces])
    positions = np.concatenate([start + assistant_positions(t) for start, t in zip(starts, traces, strict=True)])
    places = np.concatenate([np.arange(len(trace.ids)) for trace in traces])
    parts = (ids[None], np.zeros_like(positions), positions, places[None])
    return Batch(*(torch.from_numpy(part.astype(np.int64)).to(device) for part in parts))


def batches_of(traces: Sequence[Rendered], token_budget: int, device: torch.device, *, pack: bool) -> Iterator[Batch]:
    """All traces in batches of at most `token_budget` tokens, packed or padded."""
    arrange, make = (plan_packs, packed_tensors) if pack else (plan_batches, batch_tensors)
    for chosen in arrange([len(trace.ids) for trace in traces], token_budget):
        yield make([traces[i] for i in chosen], device)
