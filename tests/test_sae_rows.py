"""Training rows: the order of a plain loop, memory within its bound, a reader that is never in the way or left over."""

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope.errors import RunFailed
from lorascope.sae import rows as rows_module
from lorascope.sae.moments import choose_unit, measure_moments
from lorascope.sae.rows import Rows
from lorascope.sae.steps import initial_weights
from lorascope.sae.training import SAEConfig, run_steps
from lorascope.store import Store
from tiny_store import make_study, write_store

COLUMNS, BLOCK = 6, 32
BYTES = 4 * COLUMNS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    z = np.random.default_rng(0).standard_normal((1000, COLUMNS)) + np.arange(COLUMNS)
    sink = np.random.default_rng(1).random(1000) < 0.1
    return write_store(make_study(tmp_path / "study"), z, [50] * 20, sink=sink, shard_tokens=150)


def make_rows(store: Store, held: int) -> Rows:
    return Rows(store, choose_unit(measure_moments(store), "std"), memory=held * BYTES, block=BLOCK)


def plain_loop(rows: Rows, part: int | None, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Read a part (None: everything), shuffle it, cut it into batches, and only then think of the next."""
    everything = rows.sample(len(rows), np.random.default_rng(0))
    waiting = np.empty((0, COLUMNS), np.float32)
    while True:
        parts = [np.arange(len(rows))]
        if part is not None:
            blocks = rng.permutation(-(-len(rows) // BLOCK))
            chosen = [np.sort(blocks[i : i + part // BLOCK]) for i in range(0, len(blocks), part // BLOCK)]
            parts = [np.flatnonzero(np.isin(np.arange(len(rows)) // BLOCK, some)) for some in chosen]
        for numbers in parts:
            waiting = np.concatenate([waiting, everything[numbers][rng.permutation(len(numbers))]])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]


@pytest.mark.parametrize(("held", "part"), [(5000, None), (256, 128), (64, 32)])
@pytest.mark.parametrize("size", [50, 300])  # the larger one takes rows of several parts
def test_batches_come_in_the_order_of_a_plain_loop(store: Store, held: int, part: int | None, size: int) -> None:
    rows = make_rows(store, held)
    ours, theirs = rows.batches(size, np.random.default_rng(7)), plain_loop(rows, part, size, np.random.default_rng(7))
    for _ in range(4 * len(rows) // size):
        np.testing.assert_array_equal(next(ours), next(theirs))


def test_rows_are_in_the_unit_whatever_the_slice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(store, 5000)
    wanted = rows.unit.apply(store.rows(np.flatnonzero(store.ordinary)))
    for size in (1, 100, 1 << 26):
        monkeypatch.setattr(rows_module, "SLICE", size)
        np.testing.assert_array_equal(rows.sample(10_000, np.random.default_rng(0)), wanted)


@pytest.mark.parametrize("fits", [True, False])
def test_memory_stays_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    """Slices are a sixteenth of the bound, as they are by default."""
    columns, count = 64, 60_000
    memory = 4 * columns * count // (1 if fits else 3)
    monkeypatch.setattr(rows_module, "SLICE", memory // 16)
    z = np.random.default_rng(0).standard_normal((count, columns), np.float32)
    store = write_store(make_study(tmp_path / "s"), z, [1000] * 60, shard_tokens=10_000)
    del z
    rows = Rows(store, choose_unit(measure_moments(store), "effect"), memory=memory)
    batches = rows.batches(512, np.random.default_rng(0))
    tracemalloc.start()
    try:
        for _ in range(2 * count // 512):
            next(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        batches.close()
    assert 0.6 * memory < peak < 1.3 * memory


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sae-rows")]


def test_the_next_part_is_read_while_one_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls, second = make_rows(store, 256), [], threading.Event()
    real = rows._read

    def read(numbers: Any) -> Any:
        calls.append(threading.current_thread())
        if len(calls) == 2:
            second.set()
        return real(numbers)

    monkeypatch.setattr(rows, "_read", read)
    batches = rows.batches(10, np.random.default_rng(0))
    next(batches)
    assert second.wait(30)
    for _ in range(11):  # the rest of the first part
        next(batches)
    assert len(calls) == 2  # one part ahead and no more
    assert threading.current_thread() not in calls
    batches.close()


@pytest.mark.parametrize("held", [256, 5000])
def test_a_generator_closed_early_leaves_no_thread(store: Store, held: int) -> None:
    batches = make_rows(store, held).batches(10, np.random.default_rng(0))
    next(batches)
    assert len(readers()) == 1
    batches.close()
    assert readers() == []


def test_what_the_reader_raises_reaches_the_trainer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = make_rows(store, 256), []
    real = rows._read

    def read(numbers: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RunFailed("shard-00002 is damaged")
        return real(numbers)

    monkeypatch.setattr(rows, "_read", read)
    weights = initial_weights(COLUMNS, 12, torch.Generator().manual_seed(0))
    config = SAEConfig(k=2, batch=32, epochs=1, expansion=2)
    with pytest.raises(RunFailed, match="damaged"):
        list(run_steps(weights, rows, config, np.random.default_rng(0), torch.Generator()))
    assert len(calls) == 3
    assert readers() == []


def test_a_training_that_fails_leaves_no_thread(store: Store) -> None:
    weights = initial_weights(COLUMNS, 12, torch.Generator().manual_seed(0))
    config = SAEConfig(k=2, batch=32, epochs=5, expansion=2, lr=1e30)
    with pytest.raises(RunFailed, match="--lr") as failure:
        list(run_steps(weights, make_rows(store, 256), config, np.random.default_rng(0), torch.Generator()))
    assert failure.tb is not None  # which holds the frames
    assert readers() == []
