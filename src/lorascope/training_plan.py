"""What a training run sees, and when: control traces, steps of like length, the learning rate, padded batches.

Shapes: B = sequences, T = tokens, M = supervised positions of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lorascope.kl import assistant_positions
from lorascope.traces import Rendered, Trace, pad_ids


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

    Lengths are sorted within windows of 8 batches, so that padding is small and order still random.
    """
    rng = np.random.default_rng(seed)
    total = math.ceil(len(lengths) * epochs / batch)
    total = total if max_steps is None else min(total, max_steps)
    steps: list[list[int]] = []
    while len(steps) < total:
        order = rng.permutation(len(lengths))
        batches = []
        for window in np.array_split(order, math.ceil(len(order) / (8 * batch))):
            window = window[np.argsort([lengths[i] for i in window], kind="stable")]
            batches += [window[i : i + batch].tolist() for i in range(0, len(window), batch)]
        steps += [batches[i] for i in rng.permutation(len(batches))]
    return steps[:total]


def rate_at(step: int, total: int, peak: float, warmup: float) -> float:
    """Learning rate of step 0..total-1: linear over the warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def batch_tensors(traces: Sequence[Rendered], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`(ids [B, T], rows [M], positions [M])` of the supervised positions of some traces."""
    ids_BT, _ = pad_ids([trace.ids for trace in traces], 0)
    positions = [assistant_positions(trace) for trace in traces]
    rows = np.repeat(np.arange(len(traces)), [len(p) for p in positions])
    return (
        ids_BT.to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(np.concatenate(positions)).to(device),
    )
