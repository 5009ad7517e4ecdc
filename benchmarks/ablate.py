"""Ablation on SmolLM2: exact leave-one-out and screening of all directions beside one full forward per direction.

    python benchmarks/ablate.py STUDY

The peer is a plain fp32 model with the adapter merged into its weights: it takes one direction out of its matrix, runs
every batch in full and scores the same positions, without keeping the vocabulary. Each of its runs costs the same, so
`timed` of them, drawn over all types, stand for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, HEAD, MODEL, TRUNK, main, roofline, row, seconds

TRACES, TIMED, SEEDS = 24, 10, 5


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, for a Spearman correlation (there are no ties)."""
    return np.argsort(np.argsort(values))


def measure(study_path: Path) -> dict[str, Any]:
    """Rows of exact ablation and of screening."""
    from lorascope.ablation import make_targets
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.kl import assistant_positions
    from lorascope.leave_one_out import leave_out
    from lorascope.memory import graph_budget
    from lorascope.models import load_model
    from lorascope.screening import screen
    from lorascope.study import Study
    from lorascope.traces import pad_ids, plan_batches

    study = Study.open(study_path)
    model, tokenizer = load_model(MODEL, device=DEVICE)
    model = model.float().requires_grad_(False)  # on a GPU too: single directions' KLs are small
    rendered, _ = study.renderer(tokenizer).render_all(study.traces("heldout"))
    longest = sorted(rendered, key=lambda r: -len(r.ids))
    traces = longest[:: max(1, len(longest) // TRACES)][:TRACES]
    adapter = Adapter.load(study.path / "adapter")
    tokens = sum(len(r.ids) for r in traces)
    scored = sum(len(assistant_positions(r)) for r in traces)
    batches = []
    for batch in plan_batches([len(r.ids) for r in traces], 4096):
        positions = [assistant_positions(traces[i]) for i in batch]
        at = np.repeat(np.arange(len(batch)), [len(p) for p in positions]), np.concatenate(positions)
        ids_BT = pad_ids([traces[i].ids for i in batch], 0)[0].to(DEVICE)
        batches.append((ids_BT, tuple(torch.from_numpy(index).to(DEVICE) for index in at)))

    plain, _ = load_model(MODEL, device=DEVICE)
    plain = plain.float().requires_grad_(False)
    matrices = {module.path: plain.get_submodule(module.path).weight for module in adapter.modules}
    for module in adapter.modules:
        matrices[module.path].add_((module.scale * module.b_OR @ module.a_RI).to(DEVICE))

    @torch.no_grad()
    def chunks() -> Iterator[torch.Tensor]:
        for ids_BT, at in batches:
            hidden = plain.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[at]
            for part in hidden.split(256):
                yield torch.log_softmax(plain.lm_head(part), dim=-1)

    reference = list(chunks())

    def naive(address: str) -> float:
        number = adapter.addresses.index(address)
        module = next(m for m in adapter.modules if m.columns.start <= number < m.columns.stop)
        rank, weight = number - module.columns.start, matrices[module.path]
        kept = weight.clone()
        weight.sub_((module.scale * torch.outer(module.b_OR[:, rank], module.a_RI[rank])).to(DEVICE))
        total = sum(
            float((before.exp() * (before - after)).sum()) for before, after in zip(reference, chunks(), strict=True)
        )
        weight.copy_(kept)
        return total / scored

    with attach(model, adapter) as attached:
        sample = np.random.default_rng(0).choice(adapter.addresses, TIMED, replace=False).tolist()
        naive(sample[0])
        values: dict[str, float] = {}
        targets = make_targets(adapter.addresses, "direction")
        found: list[Any] = []

        def time_naive(addresses: list[str]) -> list[float]:
            return [seconds(lambda a=a: values.setdefault(a, naive(a))) for a in addresses]

        # The peer before and after ours, so that a slow spell of the machine meets both.
        times = time_naive(sample[: TIMED // 2])
        exact_seconds = seconds(lambda: found.extend(leave_out(attached, traces, targets, 0.0, 4096)))
        times += time_naive(sample[TIMED // 2 :])
        all_naive = statistics.median(times) * len(adapter.addresses)
        sums, floor_runs = found
        exact = np.array([sums[t.by, t.name][:, 0, 0].sum() for t in targets]) / scored
        by_address = dict(zip(adapter.addresses, exact, strict=True))
        off = {a: abs(by_address[a] - value) for a, value in values.items()}
        agree = all(error <= max(1e-3 * values[a], 1e-7) for a, error in off.items())
        screened, screen_times = [], []
        budget = graph_budget(model, 4096)
        for seed in range(SEEDS):
            screen_times.append(
                seconds(lambda seed=seed: screened.append(screen(attached, traces, budget=budget, seed=seed)))
            )
    estimates = [s.kl_KSG(np.eye(len(exact), dtype=bool)).mean(axis=0).sum(axis=0) / scored for s in screened]
    spearman = [float(np.corrcoef(ranks(exact), ranks(e))[0, 1]) for e in estimates]
    leaders = set(np.argsort(-exact)[:20])
    hits = [len(leaders & set(np.argsort(-e)[:20])) for e in estimates]
    bias = [float(np.median(e / exact)) for e in estimates]
    passes = [len(s.gradients_KSN) for s in screened]
    exact_flops = len(exact) * (TRUNK * tokens + 2 * HEAD * scored)
    screen_flops = 2 * TRUNK * tokens * (1 + statistics.median(passes)) + 4 * HEAD * scored
    spent = statistics.median(screen_times)
    # Weights once per pass over a batch: half the trunk on average after a restart, and the head.
    exact_bytes = 4 * len(exact) * len(batches) * (TRUNK / 2 + HEAD)
    screen_bytes = 4 * (1 + statistics.median(passes)) * (TRUNK + HEAD)
    return {
        "ablate_exact_vs_naive": row(
            all_naive / exact_seconds,
            exact_seconds,
            all_naive,
            "seconds for all directions",
            **roofline(exact_seconds, exact_flops, exact_bytes),
            agrees=agree,
            largest_relative_difference=max(error / values[a] for a, error in off.items()),
            timed=TIMED,
            floor=max(floor_runs.values()),
            tokens=tokens,
        ),
        "ablate_screen_vs_naive": row(
            statistics.median(all_naive / t for t in screen_times),
            spent,
            all_naive,
            "seconds for all directions",
            **roofline(spent, screen_flops, screen_bytes),
            agrees=len(traces) >= 8 and tokens >= 2000,
            passes=passes,
            traces=len(traces),
            tokens=tokens,
        ),
        "screen_spearman": row(
            statistics.median(spearman),
            statistics.median(spearman),
            1.0,
            "rank correlation with exact",
            seeds=spearman,
            agrees=0.8 <= statistics.median(bias) <= 1.25 and statistics.median(hits) >= 16,
            median_ratio_to_exact=statistics.median(bias),
            top_20_found=statistics.median(hits),
        ),
    }


if __name__ == "__main__":
    main(measure)
