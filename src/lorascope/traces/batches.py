"""Batches of token sequences: planned by length under a token budget, padded on the right.

Legend: B sequences of a batch, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:  # the planner is used by stages that need no torch
    import torch


def plan_batches(lengths: Sequence[int], token_budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group sequences of like length so that each batch has at most `token_budget` tokens, padding included.

    Returns lists of indices into `lengths`, shortest sequences first; every index is in exactly one batch.
    A sequence longer than the budget is a batch of its own. The plan depends on the arguments alone.
    Raises ValueError when the budget or `max_rows` is below one.
    """
    if token_budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError("token_budget and max_rows must be at least 1")
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted by length, so the newest sequence is the longest and sets the padded width.
        full = (len(batch) + 1) * lengths[index] > token_budget or len(batch) == max_rows
        if batch and full:
            batches.append(batch)
            batch = []
        batch.append(index)
    if batch:
        batches.append(batch)
    return batches


def pad_ids(list_of_ids: Sequence[ArrayLike], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put sequences of token ids into one right-padded table.

    Returns `ids_BT` (int64) and `lengths_B` (int64), both on the CPU.
    """
    import torch

    rows = [np.asarray(ids, dtype=np.int64) for ids in list_of_ids]
    lengths_B = torch.tensor([row.size for row in rows], dtype=torch.int64)
    table = np.full((len(rows), max((row.size for row in rows), default=0)), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : row.size] = row
    return torch.from_numpy(table), lengths_B
