"""Where the time of a job goes: shares of processor time by kind of operation, as a Markdown table.

    python benchmarks/profiles.py STUDY [--jobs train,record,exact,screen,sae]

For docs/log.md, beside the rooflines of `make bench`. Every job runs once before it is profiled.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, MODEL
from torch.profiler import ProfilerActivity, profile

GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "sparse_sampled_addmm"),
    "attention": ("_scaled_dot_product", "flash_attention"),
    "sparse sums": ("_embedding_bag", "sort", "index_add", "searchsorted"),
    "copies": ("copy_", "cat", "index", "gather", "index_select", "_to_copy", "clone", "fill_", "index_put"),
    "exp, softmax": ("exp", "softmax", "log_softmax", "logsumexp", "silu", "silu_backward"),
    "optimiser": ("_fused_adam", "_foreach", "Optimizer"),
}


def group_of(name: str) -> str:
    """The kind of an operation."""
    if name == "mkldnn::_linear_pointwise":
        return "matrix products"
    short = name.removeprefix("aten::")
    for group, starts in GROUPS.items():
        if any(short == start or short.startswith((start + "_", start + ".")) for start in starts):
            return group
        if any(start.startswith("_") and short.startswith(start) for start in starts):
            return group
    return "elementwise and the rest" if name.startswith(("aten::", "mkldnn::")) else "Python and numpy"


def training(study_path: Path) -> Callable[[], Any]:
    """Two steps of 16 traces."""
    from scaling import training as steps

    return lambda: steps(study_path, 1)()


def recording(study_path: Path) -> Callable[[], Any]:
    """16 traces."""
    from scaling import recording as record

    return record(study_path, 1)


def held(study_path: Path) -> tuple[Any, Any, Any]:
    """The model, the adapter and 8 held-out traces."""
    from lorascope.adapter import Adapter
    from lorascope.models import load_model
    from lorascope.study import Study

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    traces, _ = study.renderer(tokenizer).render_all(study.traces("heldout")[:8])
    return model.requires_grad_(False), Adapter.load(study.path / "adapter"), traces


def exact(study_path: Path) -> Callable[[], Any]:
    """Leave-one-out of all directions on 8 traces."""
    from lorascope.ablation import make_targets
    from lorascope.attached import attach
    from lorascope.leave_one_out import leave_out

    model, adapter, traces = held(study_path)

    def work() -> None:
        with attach(model, adapter) as attached:
            leave_out(attached, traces, make_targets(adapter.addresses, "direction"), 0.0, 4096)

    return work


def screening(study_path: Path) -> Callable[[], Any]:
    """Four passes of screening on 8 traces."""
    from lorascope.attached import attach
    from lorascope.screening import screen

    model, adapter, traces = held(study_path)

    def work() -> None:
        with attach(model, adapter) as attached:
            screen(attached, traces, passes=4, budget=4096)

    return work


def autoencoder(study_path: Path) -> Callable[[], Any]:
    """200 steps of the autoencoder at 210 → 1,680."""
    from sae import ours, state_rows

    advance, _ = ours(state_rows(study_path), 2000)
    return lambda: advance(200)


JOBS = {"train": training, "record": recording, "exact": exact, "screen": screening, "sae": autoencoder}


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """Shares of processor time by kind of operation, of the second run."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        group = group_of(event.key)
        spent[group] = spent.get(group, 0.0) + event.self_cpu_time_total
    whole = sum(spent.values())
    return {group: spent.get(group, 0.0) / whole for group in (*GROUPS, "elementwise and the rest", "Python and numpy")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", default=",".join(JOBS))
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    jobs = options.jobs.split(",")
    found = {job: shares(JOBS[job](options.study)) for job in jobs}
    print("| |", " | ".join(jobs), "|")
    print("|---|" + "---|" * len(jobs))
    for group in next(iter(found.values())):
        print(f"| {group} |", " | ".join(f"{found[job][group]:.0%}" for job in jobs), "|")


if __name__ == "__main__":
    main()
