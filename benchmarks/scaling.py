"""Does cost grow with the work and nothing else? Five jobs at 1, 4 and 16 times the work: seconds and peak memory.

    python benchmarks/scaling.py STUDY

Each size runs in a process of its own. Memory is what the process has allocated while the work runs (of a model that
is read from a mapped file that is without its weights); `grown` is what of it is beyond what it held when work began.
Buffers whose size is an option of the product (a batch, a shard, the autoencoder's pool of rows) are made small here,
so that all sizes are well beyond one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, MODEL, allocated_memory, allocated_peak, print_rows, seconds

SIZES = (1, 4, 16)
DIRECTIONS = 210


def recording(study_path: Path, size: int) -> Callable[[], Any]:
    """16 traces of the study, times the size; batches of 512 and shards of 2,048 tokens: many end on the way."""
    from lorascope import recording
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused_reading import fused_reading
    from lorascope.models import load_model
    from lorascope.packing import prepare_packing
    from lorascope.study import Study

    recording.SHARD_TOKENS = 2048
    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    rendered, _ = study.renderer(tokenizer).render_all((study.traces("train") * 2)[: 16 * (size + 1)])
    pack = DEVICE == "cpu" and prepare_packing(model, max(len(r.ids) for r in rendered))
    adapter = Adapter.load(study.path / "adapter")

    def record(traces: list[Any]) -> None:
        plan = recording.plan_recording(adapter, traces, 512, {})
        with tempfile.TemporaryDirectory() as folder, attach(model, adapter) as attached, fused_reading(attached):
            recording.fill_stores(
                [(Path(folder), plan)], traces, attached, recording.adapter_scalars, "bench", pack=pack
            )

    record(rendered[-16:])
    return lambda: record(rendered[: 16 * size])


def training(study_path: Path, size: int) -> Callable[[], Any]:
    """Training for one step of 8 traces, times the size; the work is the tokens of these steps."""
    from lorascope.config import Options
    from lorascope.study import Study
    from lorascope.training import TrainConfig, train

    folder = Path(tempfile.mkdtemp())
    copy = folder / "study"
    shutil.copytree(study_path, copy, ignore=shutil.ignore_patterns("adapter", "train", "scalars"))
    manifest = json.loads((copy / "study.json").read_text())
    (copy / "study.json").write_text(json.dumps(manifest | {"stages": {}, "adapter": None}))
    config = TrainConfig(max_steps=size + 1, batch=8, learning_rate="2e-3", eval_every=1000, eval_traces=2)

    def steps() -> tuple[float, float]:
        train(Study.open(copy), config, Options(device=DEVICE))
        lines = [json.loads(line) for line in (copy / "train" / "adapter.jsonl").read_text().splitlines()]
        shutil.rmtree(folder)
        lines = [line for line in lines if line["step"] > 1]  # the first one warms up
        return sum(line["seconds"] for line in lines), sum(line["tokens"] for line in lines)

    return steps


def screening(study_path: Path, size: int) -> Callable[[], Any]:
    """4 passes over one held-out trace, times the size, of which one at a time is in memory."""
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.models import load_model
    from lorascope.screening import screen
    from lorascope.study import Study

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    model.requires_grad_(False)
    traces, _ = study.renderer(tokenizer).render_all(study.traces("heldout")[:1] * 16)
    adapter = Adapter.load(study.path / "adapter")

    def passes(count: int) -> None:
        with attach(model, adapter) as attached:
            screen(attached, traces[:count], passes=4, budget=len(traces[0].ids))

    passes(1)
    return lambda: passes(size)


def wave_store(folder: Path, n_tokens: int) -> Any:
    """A store of heavy-tailed scalars, the same block in another order for every trace."""
    from examples import TRACE, write_store

    rng = np.random.default_rng(0)
    block = rng.standard_t(4, (TRACE, DIRECTIONS)).astype(np.float32)
    return write_store(folder, n_tokens // TRACE, DIRECTIONS, lambda i: np.roll(block, i, axis=0) * (1 + i % 7 / 7))


def searching(_: Path, size: int) -> Callable[[], Any]:
    """Levels and examples in 100,000 tokens of 210 directions, times the size."""
    from examples import polarities

    from lorascope.example_search import ExamplesConfig, search
    from lorascope.features import firing_levels

    folder = tempfile.mkdtemp()

    def work() -> None:
        search(features, firing_levels(features), ExamplesConfig(), 0)
        shutil.rmtree(folder)

    features = polarities(wave_store(Path(folder), 100_000 * size))
    return work


def sae_steps(_: Path, size: int) -> Callable[[], Any]:
    """One pass of the autoencoder over 80,000 tokens of 210 directions, times the size, read from a store."""
    from lorascope.config import Options
    from lorascope.sae.moments import choose_unit, measure_moments
    from lorascope.sae.rows import Rows
    from lorascope.sae.training import SAEConfig, fit

    folder = tempfile.mkdtemp()
    store = wave_store(Path(folder), 80_000 * size)
    rows = Rows(store, choose_unit(measure_moments(store), "effect"), memory=1 << 24)

    def work() -> None:
        fit(rows, SAEConfig(epochs=1), Options(device=DEVICE))
        shutil.rmtree(folder)

    return work


JOBS = {"train": training, "record": recording, "screen": screening, "examples": searching, "sae": sae_steps}


def measure(study: Path) -> dict[str, Any]:
    """Seconds and peak memory of every job at every size; the ratio is time per work at 16 times over that at once."""
    found: dict[str, Any] = {}
    for job in JOBS:
        runs = []
        for size in SIZES:
            command = [sys.executable, __file__, str(study), "--job", job, "--size", str(size)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append({"size": size} | json.loads(output.splitlines()[-1]))
        first, last = runs[0], runs[-1]
        before, after = (run["seconds"] / run["work"] for run in (first, last))
        found[f"scaling_{job}"] = {
            "ratio": after / before,
            "ours": after,
            "peer": before,
            "unit": "seconds per work at 16 times, beside once; less is better",
            "memory_ratio": last["peak"] / first["peak"],
            "runs": runs,
        }
    return found


def main() -> None:
    """One job of one size, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--size", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if not options.job:
        print_rows(measure(options.study))
        return
    work, told = JOBS[options.job](options.study, options.size), []
    start = allocated_memory()
    with allocated_peak() as peak:
        spent = seconds(lambda: told.append(work()))
    # A job that also prepares, or warms up, tells how long the work itself took, and how much there was.
    took, done = told[0] or (spent, options.size)
    print(json.dumps({"seconds": took, "work": done, "peak": peak[0], "grown": peak[0] - start}))


if __name__ == "__main__":
    main()
