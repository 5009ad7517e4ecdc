"""Studies with a scalar store of known content, without a model."""

from pathlib import Path
from typing import Any

import numpy as np

from lorascope.store import Store, store_folder
from lorascope.store_writer import StorePlan, StoreWriter, plan_shards
from lorascope.study import Study


def make_study(path: Path) -> Study:
    return Study.create(path, model="tiny", system=None)


def write_store(
    study: Study,
    z: Any,
    lengths: list[int],
    *,
    corpus: str = "train",
    source: str = "adapter",
    addresses: list[str] | None = None,
    effect: list[float] | None = None,
    tokens: Any = None,
    segments: Any = None,
    sink: Any = None,
    shard_tokens: int = 64,
) -> Store:
    """Write scalars [T, N] (all tokens ordinary answer tokens unless said otherwise) and open the store."""
    z = np.asarray(z, np.float32)
    total, columns = z.shape
    assert total == sum(lengths)
    plan = StorePlan(
        addresses=addresses or [f"L{i}.gate" for i in range(columns)],
        effect_per_scalar=effect or [1.0] * columns,
        trace_ids=[f"t{i}" for i in range(len(lengths))],
        lengths=lengths,
        response_starts=[0] * len(lengths),
        shards=[[list(range(first, stop))] for first, stop in plan_shards(lengths, shard_tokens)],
        about={"source": source},
    )
    writer = StoreWriter(store_folder(study.path, corpus, source), plan)
    offsets = np.cumsum([0, *lengths])
    writer.calibrate(np.abs(z).max(axis=0))
    beside = {
        "tokens": np.arange(total) if tokens is None else tokens,
        "segments": np.full(total, 3) if segments is None else segments,
        "sink": np.zeros(total, bool) if sink is None else sink,
    }
    for number in writer.missing():
        shard = writer.begin(number)
        for i in plan.shards[number][0]:
            part = slice(offsets[i], offsets[i + 1])
            writer.put(shard, i, z[part], *(np.asarray(beside[k])[part] for k in ("tokens", "segments", "sink")))
        writer.commit(shard)
    writer.finish()
    return Store.open(writer.folder)


def halves(rng: np.random.Generator, shape: tuple[int, ...], values: int = 50) -> np.ndarray:
    """Random scalars with many ties that half precision holds exactly."""
    return (rng.integers(-values, values + 1, shape) / 8).astype(np.float32)
