"""Does cost grow with the work and nothing else? Recording, examples and SAE training at 1, 4 and 16 times the work.

    python benchmarks/scaling.py STUDY

Each size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, MODEL, peak_memory, print_rows, seconds

SIZES = (1, 4, 16)


def recording(study_path: Path, size: int) -> float:
    """32 traces of the study, times the size."""
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused import fused_reading
    from lorascope.memory import MOST_ON_CPU
    from lorascope.models import load_model
    from lorascope.recording import adapter_scalars, fill_stores, plan_recording
    from lorascope.study import Study

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    rendered, _ = study.renderer(tokenizer).render_all(study.traces("train")[:32] * (size + 1))
    adapter = Adapter.load(study.path / "adapter")

    def record(traces: list[Any], folder: str) -> None:
        plan = plan_recording(adapter, traces, MOST_ON_CPU, {})
        with attach(model, adapter) as attached, fused_reading(attached):
            fill_stores([(Path(folder), plan)], traces, attached, adapter_scalars, "bench")

    with tempfile.TemporaryDirectory() as folder:
        record(rendered[-32:], f"{folder}/warm")
        return seconds(lambda: record(rendered[: 32 * size], f"{folder}/store"))


def searching(_: Path, size: int) -> float:
    """100,000 tokens of 210 directions, times the size."""
    from examples import polarities, write_store

    from lorascope.example_search import ExamplesConfig, search
    from lorascope.features import firing_levels

    rng = np.random.default_rng(0)
    block = rng.standard_t(4, (50_000, 210)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        z_TN = np.memmap(f"{folder}/z", np.float32, "w+", shape=(100_000 * size, 210))
        for start in range(0, len(z_TN), len(block)):
            z_TN[start : start + len(block)] = block[rng.permutation(len(block))]
        store = write_store(Path(folder) / "store", z_TN)
        del z_TN
        features = polarities(store)
        levels = firing_levels(features)
        return seconds(lambda: search(features, levels, ExamplesConfig(), 0))


def sae_steps(_: Path, size: int) -> float:
    """60 steps of the autoencoder at 210 → 1,680, times the size."""
    from sae import ours, sparse_rows

    advance, _ = ours(sparse_rows(210, 20_000), 2000)
    advance(20)
    return seconds(lambda: advance(60 * size))


JOBS = {"record": recording, "examples": searching, "sae": sae_steps}


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
        per_work = last["seconds"] / last["size"]
        found[f"scaling_{job}"] = {
            "ratio": per_work / first["seconds"],
            "ours": per_work,
            "peer": first["seconds"],
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
    if options.job:
        took = JOBS[options.job](options.study, options.size)
        print(json.dumps({"seconds": took, "peak": peak_memory()}))
    else:
        print_rows(measure(options.study))


if __name__ == "__main__":
    main()
