"""Example search: scalars per second for the exact top 50 of both polarities, checked against a brute-force search.

python benchmarks/examples.py STUDY
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import main, roofline, row, seconds

TOKENS, DIRECTIONS, TRACE, K, PER_TRACE, REPEATS = 1_000_000, 210, 500, 50, 4, 5


def write_store(folder: Path, n_traces: int, n_directions: int, trace: Callable[[int], np.ndarray]) -> Any:
    """A store as recording would have written it, from a function that gives the scalars [TRACE, N] of each trace."""
    from lorascope.store import Store
    from lorascope.store_writer import StorePlan, StoreWriter, plan_shards

    lengths = [TRACE] * n_traces
    plan = StorePlan(
        addresses=[f"L{i // 7}.{['q', 'k', 'v', 'o', 'gate', 'up', 'down'][i % 7]}" for i in range(n_directions)],
        effect_per_scalar=[1.0] * n_directions,
        trace_ids=[str(i) for i in range(len(lengths))],
        lengths=lengths,
        response_starts=[0] * len(lengths),
        shards=[[list(range(first, stop))] for first, stop in plan_shards(lengths, 1 << 16)],
        about={},
    )
    writer = StoreWriter(folder, plan)
    writer.calibrate(np.abs(trace(0)).max(axis=0))
    for number in writer.missing():
        shard = writer.begin(number)
        for i in plan.shards[number][0]:
            writer.put(shard, i, trace(i), np.zeros(TRACE), np.ones(TRACE), np.zeros(TRACE, bool))
        writer.commit(shard)
    writer.finish()
    return Store.open(folder)


def polarities(store: Any) -> Any:
    """Both polarities of every direction of a store, without a study around it."""
    from functools import partial

    from lorascope.features import FeatureSet, polarity_codes

    ids = [f"{a}{sign}" for a in store.addresses for sign in "+-"]
    return FeatureSet(
        "direction", ids, "effect", False, store, partial(polarity_codes, effect_N=store.effect_per_scalar)
    )


def brute_force(acts_T: np.ndarray) -> set[int]:
    """The best K positions, at most PER_TRACE of a trace, ties to the earlier token."""
    order = np.lexsort((np.arange(len(acts_T)), -acts_T))
    kept: list[int] = []
    used: dict[int, int] = {}
    for position in order:
        trace = int(position) // TRACE
        if used.get(trace, 0) < PER_TRACE:
            used[trace] = used.get(trace, 0) + 1
            kept.append(int(position))
        if len(kept) == K:
            break
    return set(kept)


def measure(_: Path) -> dict[str, Any]:
    """One row; there is no peer that is exact, so the ratio is the speed itself."""
    from lorascope.example_search import ExamplesConfig, search
    from lorascope.features import firing_levels

    rng = np.random.default_rng(0)
    z_TN = rng.standard_t(4, (TOKENS, DIRECTIONS)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        parts = z_TN.reshape(-1, TRACE, DIRECTIONS)
        store = write_store(Path(folder) / "store", len(parts), DIRECTIONS, parts.__getitem__)
        del parts
        del z_TN
        features = polarities(store)
        ids = features.ids
        levels = firing_levels(features)
        config, found = ExamplesConfig(k=K, per_trace=PER_TRACE), []
        search(features, levels, config, 0)
        times = [seconds(lambda: found.append(search(features, levels, config, 0))) for _ in range(REPEATS)]
        top, recall = found[-1].top, []
        for feature in rng.choice(len(ids), 20, replace=False):
            mine = set(top.position[top.feature == feature].tolist())
            recall.append(len(mine & brute_force(features.columns([feature])[:, 0])) / K)
    spent = statistics.median(times)
    speed = TOKENS * DIRECTIONS / spent
    more = roofline(spent, 2 * TOKENS * DIRECTIONS, 2 * TOKENS * DIRECTIONS)
    more |= {"recall": float(np.mean(recall)), "agrees": min(recall) == 1}
    return {"examples_scalars_per_s": row(speed, speed, 1e8, "scalars/s", peer_is="the floor", **more)}


if __name__ == "__main__":
    main(measure)
