"""Shuffled batches of a store's ordinary tokens in the training unit, with bounded memory.

Legend: B rows of a batch, N directions.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorascope.sae.moments import Floats, Unit

if TYPE_CHECKING:
    from lorascope.store import Store

Numbers = npt.NDArray[np.int64]

MEMORY = 1 << 30
"""Bytes of rows held at once. A corpus that fits is read once and shuffled whole in every epoch; of another there are
two parts of half this size, one that is used and one that is read meanwhile."""
SLICE = 1 << 26
"""Bytes of rows that are read and brought into the unit in one go, which takes as much again three times over."""
BLOCK = 1024
"""Consecutive rows read together when the corpus does not fit."""


class Rows:
    """The ordinary tokens of a store as training rows."""

    def __init__(self, store: Store, unit: Unit, *, memory: int = MEMORY, block: int = BLOCK) -> None:
        self.store, self.unit, self.block = store, unit, block
        self.index: Numbers = np.flatnonzero(store.ordinary)
        self.held = max(block, memory // (4 * len(store.addresses)))
        self._all: Floats | None = None

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, count: int, rng: np.random.Generator) -> Floats:
        """At most `count` different rows, in corpus order, float32 [rows, N]."""
        chosen = rng.choice(len(self), min(count, len(self)), replace=False, shuffle=False)
        return self._read(np.sort(chosen))

    def batches(self, size: int, rng: np.random.Generator) -> Generator[Floats, None, None]:
        """Batches, float32 [B, N], without end, epoch after epoch; rows that fill no batch wait for the next ones.

        While the rows of one part of the corpus are used, a thread reads those of the next; it ends when this generator
        is closed. What it raises is raised here, when its rows are due.
        """
        size = min(size, len(self))
        waiting = np.empty((0, len(self.store.addresses)), np.float32)
        parts = self._parts(rng)
        with ThreadPoolExecutor(1, "sae-rows") as reader:
            coming = reader.submit(self._load, next(parts))
            while True:
                rows = coming.result()  # the part before goes now, so two are held and never three
                order = rng.permutation(len(rows))
                coming = reader.submit(self._load, next(parts))
                stop = size - len(waiting)
                while stop <= len(order):
                    batch = rows[order[max(0, stop - size) : stop]]
                    yield batch if len(batch) == size else np.concatenate([waiting, batch])
                    waiting = waiting[:0]
                    stop += size
                waiting = np.concatenate([waiting, rows[order[max(0, stop - size) :]]])

    def _parts(self, rng: np.random.Generator) -> Iterator[Numbers]:
        """The rows of one part of the corpus after another without end: the whole, or random blocks that fill half."""
        if len(self) <= self.held:
            while True:
                yield np.arange(len(self))
        per_part = max(1, self.held // 2 // self.block)
        while True:
            blocks = rng.permutation(-(-len(self) // self.block))
            for start in range(0, len(blocks), per_part):
                ranges = [
                    np.arange(b * self.block, min((b + 1) * self.block, len(self)))
                    for b in np.sort(blocks[start : start + per_part])
                ]
                yield np.concatenate(ranges)

    def _load(self, numbers: Numbers) -> Floats:
        """The rows of a part; the whole corpus is read once and kept."""
        if len(self) > self.held:
            return self._read(numbers)
        if self._all is None:
            self._all = self._read(numbers)
        return self._all

    def _read(self, numbers: Numbers) -> Floats:
        """Rows, float32 [len(numbers), N], made slice by slice so that little is held beside them."""
        rows = np.empty((len(numbers), len(self.store.addresses)), np.float32)
        step = max(1, SLICE // (4 * rows.shape[1]))
        for start in range(0, len(rows), step):
            part = self.index[numbers[start : start + step]]
            rows[start : start + step] = self.unit.apply(self.store.rows(part))
        return rows
