"""Shuffled batches of a store's ordinary tokens in the training unit, with bounded memory.

Legend: B rows of a batch, N directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorascope.sae.moments import Floats, Unit

if TYPE_CHECKING:
    from lorascope.store import Store

MEMORY = 1 << 30
"""Bytes of rows held at once. A corpus that fits is read once and shuffled whole in every epoch."""
BLOCK = 1024
"""Consecutive rows read together when the corpus does not fit."""


class Rows:
    """The ordinary tokens of a store as training rows."""

    def __init__(self, store: Store, unit: Unit, *, memory: int = MEMORY, block: int = BLOCK) -> None:
        self.store, self.unit, self.block = store, unit, block
        self.index: npt.NDArray[np.int64] = np.flatnonzero(store.ordinary)
        self.held = max(block, memory // (4 * len(store.addresses)))
        self._all: Floats | None = None

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        """At most `count` different rows, in corpus order."""
        chosen = rng.choice(len(self), min(count, len(self)), replace=False, shuffle=False)
        return self._read(np.sort(chosen))

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Floats]:
        """Batches [B, N] without end, epoch after epoch; rows that fill no batch wait for the next ones."""
        size = min(size, len(self))
        waiting = np.empty((0, len(self.store.addresses)), np.float32)
        while True:
            for rows in self._pools(rng):
                order = rng.permutation(len(rows))
                stop = size - len(waiting)
                while stop <= len(order):
                    batch = rows[order[max(0, stop - size) : stop]]
                    yield batch if len(batch) == size else np.concatenate([waiting, batch])
                    waiting = waiting[:0]
                    stop += size
                waiting = np.concatenate([waiting, rows[order[max(0, stop - size) :]]])

    def _pools(self, rng: np.random.Generator) -> Iterator[Floats]:
        """One epoch in parts of at most the held size: the whole corpus, or random blocks of it."""
        if len(self) <= self.held:
            if self._all is None:
                self._all = self._read(np.arange(len(self)))
            yield self._all
            return
        blocks = rng.permutation(-(-len(self) // self.block))
        per_pool = max(1, self.held // self.block)
        for start in range(0, len(blocks), per_pool):
            parts = [
                np.arange(b * self.block, min((b + 1) * self.block, len(self)))
                for b in np.sort(blocks[start : start + per_pool])
            ]
            yield self._read(np.concatenate(parts))

    def _read(self, numbers: npt.NDArray[np.int64]) -> Floats:
        return self.unit.apply(self.store.rows(self.index[numbers]))
