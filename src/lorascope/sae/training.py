"""Train the autoencoder on a recorded corpus and save it as a SAELens folder.

Legend: T tokens, B rows of a batch, N directions, F latents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.progress import progress
from lorascope.sae.files import CONFIG, WEIGHTS, save_sae
from lorascope.sae.model import SAE, fold
from lorascope.sae.moments import UNITS, choose_unit, measure_moments
from lorascope.sae.quality import measure_quality
from lorascope.sae.rows import Rows
from lorascope.sae.steps import StepResult, Weights, initial_weights, revive, select_largest, train_step
from lorascope.store import Store, store_folder
from lorascope.study import Study, write_json

CALIBRATION_ROWS = 65_536
"""Training tokens on which the threshold is set (all, where there are fewer)."""
DEAD_WINDOW = 1_000_000
"""A latent is dead when it fired on none of so many training tokens, or of one epoch."""
BETAS = (0.9, 0.99)
"""With 0.999 a latent that fires seldom keeps the pace of its first steps, and ten times more die (docs/log.md)."""
CLIP_NORM = 1.0
"""Largest norm of a step's gradient: else the first steps' set Adam's pace for a thousand more (docs/log.md)."""
TRACKING = 0.1
"""How fast a tracked threshold follows: this power of selected / wanted multiplies it at every step."""
REVIVE_EVERY, REVIVE_UNTIL = 200, 0.7
"""Steps between revivals of dead latents, and the share of training at which they end."""


@dataclass(frozen=True)
class SAEConfig:
    """Train a sparse autoencoder on all directions' scalars and measure it, also by patched KL."""

    corpus: str = "train"
    """Recorded corpus to train on."""
    heldout: str = "heldout"
    """Recorded corpus to measure quality on."""
    unit: str = "effect"
    """Unit of the input: effect (s·‖b‖·z, relative sizes kept), std (every direction of variance 1), raw."""
    expansion: int = 8
    """Latents per direction."""
    k: int = 16
    """Mean number of latents that fire on a token."""
    tokens: int = 1_000_000
    """Tokens to train on; a smaller corpus is passed several times, a larger one once unless --epochs says so."""
    epochs: int | None = None
    """Passes over the corpus, in place of --tokens."""
    batch: int = 512
    """Tokens per step."""
    lr: float = 1e-3
    """Learning rate of Adam, after a warm-up and with a decay to zero over the last fifth."""
    selection: str = "exact"
    """exact: a batch keeps its k x batch largest scores; tracked: all above a threshold that follows this number."""
    aux: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents."""
    patched: bool = True
    """Also measure patched KL, which needs the model; --no-patched leaves it out."""
    patched_tokens: int = 4096
    """Most held-out tokens on which patched KL is measured, prompts included."""


def train_sae(study: Study, config: SAEConfig, options: Options) -> dict[str, Any]:
    """The stage: scalars of a corpus to `sae/`. Returns the headline `{fvu_effect, fvu_std, l0, dead, ...}`.

    Raises:
        BadInput: an option makes no sense.
        MissingStage: a corpus is not recorded.
    """
    check_config(config)
    source, heldout = (store_folder(study.path, name, "adapter") for name in (config.corpus, config.heldout))
    inputs = [f"{folder.relative_to(study.path)}/index.json" for folder in (source, heldout)]

    def work() -> dict[str, Any]:
        return fit_and_measure(study.path / "sae", Store.open(source), Store.open(heldout), config, options)

    outputs = [f"sae/{name}" for name in (CONFIG, WEIGHTS, "metrics.json", "training.jsonl")]
    result = study.run("sae", config, options, inputs=inputs, outputs=outputs, work=work)
    study.summarise({"sae": {name: result[name] for name in ("fvu_effect", "fvu_std", "l0", "dead")}})
    return result


def check_config(config: SAEConfig) -> None:
    """Refuse options that make no sense, in one sentence."""
    if config.unit not in UNITS:
        raise BadInput(f"--unit {config.unit} is unknown; use {', '.join(UNITS)}.")
    if config.selection not in ("exact", "tracked"):
        raise BadInput(f"--selection is exact or tracked, not {config.selection!r}.")
    for name in ("expansion", "k", "tokens", "batch", "epochs"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} must be at least 1, not {value}.")
    if config.lr <= 0 or config.aux < 0:
        raise BadInput("--lr must be above 0 and --aux not below.")


def fit_and_measure(folder: Path, store: Store, heldout: Store, config: SAEConfig, options: Options) -> dict[str, Any]:
    """Train on one store, measure on another, write the folder; returns the headline numbers."""
    if store.addresses != heldout.addresses:
        raise BadInput("The two corpora were recorded with different adapters; record both again.")
    started = time.perf_counter()
    moments = measure_moments(store)
    unit = choose_unit(moments, config.unit)
    folder.mkdir(parents=True, exist_ok=True)
    trained = fit(Rows(store, unit), config, options, log=folder / "training.jsonl")
    seconds = time.perf_counter() - started
    sae = fold(trained, unit)
    quality = measure_quality(sae, unit, moments, store, heldout)
    metadata = {
        "unit": config.unit,
        "corpus": config.corpus,
        "addresses": store.addresses,
        "k": config.k,
        "seed": options.seed,
        "hook_name": "lorascope.scalars",
        "model_name": None,
    }
    save_sae(folder, sae, metadata)
    write_json(folder / "metrics.json", quality | {"unit": config.unit, "training_seconds": round(seconds, 2)})
    names = ("fvu_effect", "fvu_std", "l0", "dead", "fvu_unit", "pca_fvu_unit")
    return {name: quality[name] for name in names}


def fit(rows: Rows, config: SAEConfig, options: Options, log: Path | None = None) -> SAE:
    """Train on rows in the training unit; the result takes that unit, its decoder rows have norm 1."""
    device = resolve_device(options)
    generator = torch.Generator().manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    n_latents = config.expansion * len(rows.store.addresses)
    weights = initial_weights(len(rows.store.addresses), n_latents, generator)
    weights = Weights(*(tensor.to(device) for tensor in weights.parameters()))
    with closing(run_steps(weights, rows, config, rng, generator)) as lines, ExitStack() as stack:
        file = stack.enter_context(log.open("w", encoding="utf-8")) if log else None
        for line in lines:
            if file:
                file.write(json.dumps(line) + "\n")
    sample = torch.from_numpy(rows.sample(CALIBRATION_ROWS, rng))
    return finish(weights, sample, config.k)


def run_steps(
    weights: Weights, rows: Rows, config: SAEConfig, rng: np.random.Generator, generator: torch.Generator
) -> Generator[dict[str, Any], None, None]:
    """The training loop; yields the metrics of every step."""
    size = min(config.batch, len(rows))
    total = (config.epochs * len(rows) if config.epochs else max(config.tokens, len(rows))) // size
    optimiser = torch.optim.Adam(weights.parameters(), lr=config.lr, betas=BETAS, fused=True)
    device, window = weights.b_dec_N.device, min(DEAD_WINDOW, len(rows))
    idle_F = torch.zeros(len(weights.b_enc_F), dtype=torch.int64, device=device)
    floor, started = 0.0, time.perf_counter()
    with closing(rows.batches(size, rng)) as batches:  # its thread ends with the training, however that ends
        for step in progress(range(total), total=total, desc="sae", unit="step"):
            x_BN = torch.from_numpy(next(batches)).to(device)
            for group in optimiser.param_groups:
                group["lr"] = config.lr * schedule(step, total)
            dead_D = (idle_F >= window).nonzero()[:, 0]
            tracked = config.selection == "tracked" and floor > 0
            count = None if tracked else config.k * size
            result = train_step(weights, x_BN, count, floor=floor, dead_D=dead_D, aux_coefficient=config.aux)
            if not np.isfinite(result.loss):
                raise RunFailed(f"The SAE's loss is not finite at step {step}; lower --lr.")
            torch.nn.utils.clip_grad_norm_(weights.parameters(), CLIP_NORM)
            optimiser.step()
            idle_F += size
            idle_F[result.fired] = 0
            if step and step % REVIVE_EVERY == 0 and step < REVIVE_UNTIL * total:
                idle_F[revive(weights, optimiser, x_BN, result.left_BN, idle_F >= window, generator)] = 0
            floor = next_floor(config, floor if tracked else None, result, config.k * size)
            yield step_metrics(step, size, result, x_BN, len(dead_D), optimiser.param_groups[0]["lr"], started)


def next_floor(config: SAEConfig, threshold: float | None, result: StepResult, wanted: int) -> float:
    """What the next step's scores are held against: a guess from below, or the tracked threshold."""
    if config.selection == "exact":
        return 0.9 * result.cut
    if threshold is None:  # the first step selects exactly
        return result.cut
    return float(threshold * min(max(result.selected / wanted, 0.5), 2.0) ** TRACKING)


def step_metrics(
    step: int, size: int, result: StepResult, x_BN: Tensor, dead: int, lr: float, started: float
) -> dict[str, Any]:
    """A line of `training.jsonl`; `fvu` is about the training mean, which the unit puts at 0."""
    return {
        "step": step + 1,
        "tokens": (step + 1) * size,
        "loss": result.loss,
        "fvu": result.error * size / max(float(x_BN.pow(2).sum()), 1e-30),
        "l0": result.selected / size,
        "cut": result.cut,
        "dead": dead,
        "lr": lr,
        "seconds": round(time.perf_counter() - started, 3),
    }


def schedule(step: int, total: int) -> float:
    """Share of the learning rate: up over the first hundredth, down to zero over the last fifth."""
    up = max(1, total // 100)
    down = max(1, total // 5)
    return min(1.0, (step + 1) / up, (total - step) / down)


@torch.no_grad()
def finish(weights: Weights, sample_TN: Tensor, k: int) -> SAE:
    """Decoder rows to norm 1 (codes take up the norm), and the threshold at which a sample's mean L0 is k.

    Selection in training was by activation × norm, so one number is the threshold of all latents.
    """
    norms = weights.W_dec_FN.norm(dim=1).clamp_min(1e-12)
    W_enc, b_enc = weights.W_enc_FN * norms[:, None], weights.b_enc_F * norms
    # The training form takes b_dec from its input; the saved one has this in b_enc.
    b_enc = b_enc - W_enc @ weights.b_dec_N
    sae = SAE(
        W_enc.T.contiguous(),
        weights.W_dec_FN / norms[:, None],
        b_enc,
        weights.b_dec_N.clone(),
        torch.zeros_like(b_enc),
    )
    kept = []
    for part in sample_TN.to(b_enc.device).split(4096):
        codes = sae.encode(part).reshape(-1)
        # The threshold lies far above the 4k-th score per token, so the rest need not be kept.
        kept.append(codes[select_largest(codes, 4 * k * len(part))[0]])
    scores = torch.cat(kept)
    wanted = min(k * len(sample_TN), len(scores))
    threshold = float(scores.kthvalue(len(scores) - wanted + 1).values) if wanted else 0.0
    # A code fires above its threshold, and the smallest wanted one should.
    sae.threshold_F.fill_(np.nextafter(np.float32(threshold), np.float32(0)))
    return sae


def resolve_device(options: Options) -> torch.device:
    """`auto` is a CUDA device where there is one, else the CPU.

    Raises:
        BadInput: there is no such device.
    """
    try:
        device = torch.device(
            options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"The device {options.device!r} cannot be used here; try --device cpu.") from error
    return device
