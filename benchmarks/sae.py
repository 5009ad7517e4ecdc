"""SAE training steps: tokens per second beside SAELens and dictionary_learning, batch-top-k, same rows and batches.

    python benchmarks/sae.py STUDY

Two sizes: 210 → 1,680 on the study's state, and 448 → 3,584 on the first 448 of the states of three successive tokens.
Every contestant takes the same
standardised batches from memory, so data loading is nobody's cost; the variance unexplained of all is given too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import DEVICE, compare, main, roofline, row, versions

K, BATCH, LR, BLOCK, REPEATS, TOKENS = 16, 512, 1e-3, 60, 5, 400_000


def sparse_rows(width: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows that are sums of 16 of 8 x width random directions with uneven frequencies, plus noise."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((8 * width, width)).astype(np.float32) / np.sqrt(width)
    frequency = 1 / (1 + np.arange(8 * width)) ** 0.7
    which = rng.choice(8 * width, (count, K), p=frequency / frequency.sum())
    strength = rng.exponential(1.0, (count, K)).astype(np.float32)
    rows = np.empty((count, width), np.float32)
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        rows[part] = (strength[part, :, None] * atoms[which[part]]).sum(axis=1)
    rows += 0.05 * rng.standard_normal(rows.shape).astype(np.float32)
    rows -= rows.mean(axis=0)
    return rows * np.float32(np.sqrt(width / (rows**2).sum(axis=1).mean()))


class Batches:
    """Shuffled batches of rows in memory, without end."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.rng = torch.from_numpy(rows).to(DEVICE), np.random.default_rng(0)

    def __iter__(self) -> Any:
        while True:
            order = torch.from_numpy(self.rng.permutation(len(self.rows))).to(DEVICE)
            for part in order.split(BATCH)[: len(order) // BATCH]:
                yield self.rows[part]


def ours(rows: np.ndarray, steps: int) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Our loop as the SAE stage runs it: a function that makes so many steps, and the last batches' unexplained."""
    from lorascope.sae.steps import Weights, initial_weights
    from lorascope.sae.training import SAEConfig, run_steps

    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    weights = initial_weights(rows.shape[1], 8 * rows.shape[1], generator)
    weights = Weights(*(tensor.to(DEVICE) for tensor in weights.parameters()))
    source = iter(Batches(rows))

    class Held:
        """Rows in memory in the shape that the stage's reader has."""

        def __len__(self) -> int:
            return len(rows)

        def batches(self, size: int, rng: Any) -> Any:
            return (batch.cpu().numpy() for batch in source)  # as the stage reads them: from the host

    config = SAEConfig(tokens=steps * BATCH, batch=BATCH, lr=LR, k=K)
    lines = run_steps(weights, Held(), config, rng, generator)  # type: ignore[arg-type]
    recent: list[float] = []

    def advance(count: int) -> None:
        for _ in range(count):
            recent.append(next(lines)["fvu"])

    return advance, lambda: statistics.mean(recent[-20:])


def saelens(rows: np.ndarray, steps: int) -> tuple[Callable[[int], None], Callable[[], float]]:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    width = rows.shape[1]
    torch.manual_seed(0)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=width, d_sae=8 * width, k=K, device=DEVICE))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * BATCH,
        device=DEVICE,
        autocast=False,
        lr=LR,
        lr_end=LR / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=steps // 100,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=2000,
        feature_sampling_window=10_000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    source = iter(Batches(rows))
    trainer = SAETrainer(config, sae, source)
    recent: list[float] = []

    def advance(count: int) -> None:
        for _ in range(count):
            x = next(source)
            output = trainer.step(x)
            trainer.n_training_steps += 1
            recent.append(float((output.sae_out - x).pow(2).sum() / x.pow(2).sum()))

    return advance, lambda: statistics.mean(recent[-20:])


def dictionary_learning(rows: np.ndarray, steps: int) -> tuple[Callable[[int], None], Callable[[], float]]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    width = rows.shape[1]
    trainer = BatchTopKTrainer(
        steps=steps,
        activation_dim=width,
        dict_size=8 * width,
        k=K,
        layer=0,
        lm_name="state",
        lr=LR,
        warmup_steps=max(1, steps // 100),
        decay_start=steps * 4 // 5,
        threshold_start_step=100,
        seed=0,
        device=DEVICE,
    )
    source = iter(Batches(rows))
    state = SimpleNamespace(step=0)
    recent: list[float] = []

    def advance(count: int) -> None:
        for _ in range(count):
            x = next(source)
            loss = trainer.update(state.step, x)
            state.step += 1
            recent.append(loss * len(x) / float(x.pow(2).sum()))

    return advance, lambda: statistics.mean(recent[-20:])


PEERS = {
    "sae_vs_saelens": (saelens, "sae-lens"),
    "sae_vs_dictionary_learning": (dictionary_learning, "dictionary-learning"),
}


def state_rows(study_path: Path) -> np.ndarray:
    """The study's ordinary training tokens in the SAE's training unit."""
    from lorascope.sae.moments import choose_unit, measure_moments
    from lorascope.sae.rows import Rows
    from lorascope.store import Store

    store = Store.open(study_path / "scalars" / "train" / "adapter")
    rows = Rows(store, choose_unit(measure_moments(store), "effect"))
    return rows.sample(len(rows), np.random.default_rng(0))


def measure(study_path: Path) -> dict[str, Any]:
    """Both peers at both sizes; the smaller ratio counts."""
    state = state_rows(study_path)
    wide = np.concatenate([state[:-2], state[1:-1], state[2:]], axis=1)[:, :448]
    sizes = {"210 → 1,680": state, "448 → 3,584": np.ascontiguousarray(wide)}
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in PEERS}
    for size, rows in sizes.items():
        steps = TOKENS // BATCH
        for key, (peer_of, package) in PEERS.items():
            # A fresh one of ours for each peer, so that both are timed over the same part of their training.
            mine, own_unexplained = ours(rows, steps)
            theirs, peer_unexplained = peer_of(rows, steps)
            own_seconds, peer_seconds, times_faster = compare(partial(mine, BLOCK), partial(theirs, BLOCK), REPEATS)
            for contestant in (mine, theirs):
                contestant(steps - BLOCK * (REPEATS + 1))
            width, unexplained, peers = rows.shape[1], own_unexplained(), peer_unexplained()
            # The dense encoder; decoding and three sparse gradients; Adam reads four numbers a weight and writes three.
            flops = BLOCK * BATCH * width * (2 * 8 * width + 8 * K)
            moved = BLOCK * 7 * 4 * (2 * 8 * width * width)
            found[key].append(
                row(
                    times_faster,
                    BLOCK * BATCH / own_seconds,
                    BLOCK * BATCH / peer_seconds,
                    "tokens/s",
                    size=size,
                    **roofline(own_seconds, flops, moved),
                    agrees=unexplained <= 1.01 * peers,
                    unexplained_ours=unexplained,
                    unexplained_peer=peers,
                    versions=versions(package),
                )
            )
    return {
        key: min(rows, key=lambda r: r["ratio"]) | {"agrees": all(r["agrees"] for r in rows), "sizes": rows}
        for key, rows in found.items()
    }


if __name__ == "__main__":
    main(measure)
