"""One training step of a batch-top-k autoencoder: dense encoding, then only the selected entries.

A batch of B rows keeps its k·B largest scores, score = relu(pre-activation) × decoder norm. The loss is the squared
error, summed over directions and averaged over rows, plus an auxiliary loss in which dead latents predict what is
left. The gradients are written out; tests compare them with autograd on the dense form.

Legend: B rows, N directions, F latents, M selected entries, D dead latents.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

REVIVE_STRENGTH = 3.0
"""Chosen by measurement (docs/log.md): 1 leaves more latents dead, 5 more of the variance unexplained."""
AUXILIARY_ROWS = 8
"""One row in so many takes part in the auxiliary loss: it reaches what all rows reach, at a fraction of the cost."""


@dataclass
class Weights:
    """Parameters in training; both matrices latent-major, so that a latent's row is contiguous."""

    W_enc_FN: Tensor
    W_dec_FN: Tensor
    b_enc_F: Tensor
    b_dec_N: Tensor

    def parameters(self) -> list[Tensor]:
        """All four, for the optimiser."""
        return [self.W_enc_FN, self.W_dec_FN, self.b_enc_F, self.b_dec_N]


@dataclass(frozen=True)
class StepResult:
    """What one step saw. `fired` holds the latents among the selected entries."""

    loss: float
    error: float
    """Squared error, summed over directions, averaged over rows."""
    cut: float
    """The smallest selected score."""
    selected: int
    fired: Tensor
    left_BN: Tensor
    """What the selected entries leave of the batch: x minus the reconstruction."""


@dataclass(frozen=True)
class Entries:
    """The selected entries of a batch in row order: where they are and their activations."""

    rows_M: Tensor
    latents_M: Tensor
    values_M: Tensor
    offsets_B: Tensor
    """First entry of each row."""


def initial_weights(n_directions: int, n_latents: int, generator: torch.Generator) -> Weights:
    """Random decoder rows of norm 1, the encoder their transpose, biases zero.

    Shorter rows, or rows along data, leave more latents dead and more of the variance unexplained (docs/log.md).
    """
    W_dec = torch.randn(n_latents, n_directions, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return Weights(W_dec.clone(), W_dec, torch.zeros(n_latents), torch.zeros(n_directions))


def on_cpu(tensor: Tensor) -> bool:
    """Whether numpy can work on a tensor in place."""
    return tensor.device.type == "cpu"


def select_largest(scores_BF: Tensor, count: int | None, floor: float = 0.0) -> tuple[Tensor, float]:
    """Flat positions (ascending) of the `count` largest positive scores, and the smallest of these scores.

    Fewer where fewer are positive. `floor` is a guess from below of the smallest kept score: it only saves time.
    On the CPU a partition of the candidates; elsewhere `torch.topk`. Without a count: all scores above the floor.
    """
    flat = scores_BF.reshape(-1)
    if count is None:
        found = (flat > floor).nonzero()[:, 0]
        return found, float(flat[found].min()) if len(found) else 0.0
    if not on_cpu(flat):
        values, found = torch.topk(flat, min(count, len(flat)), sorted=False)
        found = found[values > 0].sort().values
        return found, float(flat[found].min()) if len(found) else 0.0
    scores = flat.numpy()
    candidates = np.flatnonzero(scores > floor)
    if len(candidates) < count and floor > 0:
        candidates = np.flatnonzero(scores > 0)
    values_ = scores[candidates]
    if len(candidates) <= count:
        return torch.from_numpy(candidates), float(values_.min()) if len(values_) else 0.0
    cut = np.partition(values_, len(values_) - count)[len(values_) - count]
    kept = np.flatnonzero(values_ >= cut)
    if len(kept) > count:  # several scores equal the cut
        ties = np.flatnonzero(values_ == cut)
        kept = np.setdiff1d(kept, ties[len(ties) - (len(kept) - count) :])
    return torch.from_numpy(candidates[kept]), float(cut)


def gather_entries(scores_BF: Tensor, norms_F: Tensor, flat_M: Tensor) -> Entries:
    """The entries at ascending flat positions of the scores, which are activation × decoder norm."""
    n_rows, n_latents = scores_BF.shape
    rows = flat_M // n_latents
    latents = flat_M - rows * n_latents
    starts = torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))
    return Entries(rows, latents, scores_BF.reshape(-1)[flat_M] / norms_F[latents], starts)


def sort_by_latent(latents_M: Tensor, n_latents: int) -> Tensor:
    """The stable order that brings each latent's entries together."""
    if on_cpu(latents_M) and n_latents <= 1 << 16:
        # Numpy sorts 16-bit numbers by radix, several times faster than it or torch sorts wider ones.
        return torch.from_numpy(latents_M.numpy().astype(np.uint16).argsort(kind="stable"))
    return latents_M.argsort(stable=True)


def dot_rows(left_BN: Tensor, right_FN: Tensor, entries: Entries) -> Tensor:
    """left[row] · right[latent] of every entry: the derivative of a sparse product by its values."""
    if not on_cpu(left_BN):
        return (left_BN[entries.rows_M] * right_FN[entries.latents_M]).sum(1)
    ends = torch.cat((entries.offsets_B, torch.tensor([len(entries.rows_M)])))
    shape = (len(left_BN), len(right_FN))
    with warnings.catch_warnings():  # PyTorch says once that these tensors are in beta; tests hold them to autograd
        warnings.filterwarnings("ignore", message="Sparse CSR")
        where = torch.sparse_csr_tensor(ends, entries.latents_M, entries.values_M, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(where, left_BN, right_FN.T, beta=0.0).values()


def sum_rows(table_XN: Tensor, index_M: Tensor, weights_M: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums of table rows, one per bag of entries: a sparse matrix times a dense one."""
    return embedding_bag(index_M, table_XN, offsets, mode="sum", per_sample_weights=weights_M)


@torch.no_grad()
def train_step(
    weights: Weights, x_BN: Tensor, count: int | None, *, floor: float, dead_D: Tensor, aux_coefficient: float
) -> StepResult:
    """Compute the loss of one batch and put its gradients into `.grad` of the weights.

    Args:
        count: number of entries the batch keeps (k·B); None keeps all with a score above `floor`.
        floor: with a count, a guess from below of the smallest kept score.
        dead_D: numbers of the latents that the auxiliary loss revives.
    """
    n_rows = len(x_BN)
    centred = x_BN - weights.b_dec_N
    norms = weights.W_dec_FN.norm(dim=1)
    # Scores in place, negative ones too: a second array of this size would cost as much as the selection.
    scores = torch.addmm(weights.b_enc_F, centred, weights.W_enc_FN.T).mul_(norms)
    flat, cut = select_largest(scores, count, max(floor, 0.0))
    entries = gather_entries(scores, norms, flat)
    product = sum_rows(weights.W_dec_FN, entries.latents_M, entries.values_M, entries.offsets_B)
    residual = product.add_(weights.b_dec_N).sub_(x_BN)
    error = float(residual.pow(2).sum()) / n_rows
    slope = residual * (2.0 / n_rows)
    backward_selected(weights, centred, slope, entries, dot_rows(slope, weights.W_dec_FN, entries))
    auxiliary, left = 0.0, residual.neg_()
    if len(dead_D) and aux_coefficient > 0:
        # Batches are shuffled, so their first rows are as good as any.
        part = slice(0, -(-n_rows // AUXILIARY_ROWS))
        values = scores[part, dead_D].relu() / norms[dead_D].clamp_min(1e-12)
        auxiliary = backward_dead(weights, centred[part], values, left[part], dead_D, aux_coefficient)
    return StepResult(error + auxiliary, error, cut, len(flat), entries.latents_M, left)


@torch.no_grad()
def backward_selected(
    weights: Weights, centred_BN: Tensor, slope_BN: Tensor, entries: Entries, slope_values_M: Tensor
) -> None:
    """Gradients of the squared error, given its derivatives by the reconstruction and by the selected values."""
    n_latents = len(weights.W_dec_FN)
    # By latent: the same entries sorted so that each latent's are together.
    order = sort_by_latent(entries.latents_M, n_latents)
    starts = torch.searchsorted(entries.latents_M[order], torch.arange(n_latents, device=order.device))
    rows = entries.rows_M[order]
    weights.W_dec_FN.grad = sum_rows(slope_BN, rows, entries.values_M[order], starts)
    weights.W_enc_FN.grad = sum_rows(centred_BN, rows, slope_values_M[order], starts)
    slope_enc = slope_values_M.new_zeros(n_latents).index_add_(0, entries.latents_M, slope_values_M)
    weights.b_enc_F.grad = slope_enc
    # b_dec is added to the output and taken from the input.
    weights.b_dec_N.grad = slope_BN.sum(0) - slope_enc @ weights.W_enc_FN


@torch.no_grad()
def backward_dead(
    weights: Weights, centred_BN: Tensor, values_BD: Tensor, left_BN: Tensor, dead_D: Tensor, coefficient: float
) -> float:
    """Add the gradients of the auxiliary loss: the N/2 strongest dead latents of each row predict what is left.

    Returns the loss: coefficient · min(1, D / (N/2)) · squared error, as in SAELens.

    Args:
        values_BD: activations of the dead latents, at least 0.
    """
    n_rows, n_directions = centred_BN.shape
    most = max(1, n_directions // 2)
    share = coefficient * min(1.0, len(dead_D) / most)
    values = values_BD
    if len(dead_D) > most:
        values = torch.where(values >= kth_largest(values, most), values, 0.0)
    W_dec, W_enc = weights.W_dec_FN[dead_D], weights.W_enc_FN[dead_D]
    residual = values @ W_dec - left_BN
    slope = residual * (2.0 * share / n_rows)
    slope_before = (slope @ W_dec.T).masked_fill_(values <= 0, 0.0)
    slope_enc = slope_before.sum(0)
    add_rows(weights.W_dec_FN, dead_D, values.T @ slope)
    add_rows(weights.W_enc_FN, dead_D, slope_before.T @ centred_BN)
    add_rows(weights.b_enc_F, dead_D, slope_enc)
    gradient = weights.b_dec_N.grad
    assert gradient is not None
    gradient -= slope_enc @ W_enc
    return share * float(residual.pow(2).sum()) / n_rows


def kth_largest(values_BD: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, [B, 1]; on the CPU numpy's partition is several times faster than a top k."""
    if not on_cpu(values_BD):
        return values_BD.topk(k, dim=1).values[:, -1:]
    place = values_BD.shape[1] - k
    return torch.from_numpy(np.partition(values_BD.numpy(), place, axis=1)[:, place : place + 1].copy())


def add_rows(parameter: Tensor, index_D: Tensor, change: Tensor) -> None:
    """Add to some rows of a parameter's gradient."""
    assert parameter.grad is not None
    parameter.grad.index_add_(0, index_D, change)


@torch.no_grad()
def revive(
    weights: Weights,
    optimiser: torch.optim.Optimizer,
    x_BN: Tensor,
    left_BN: Tensor,
    dead_F: Tensor,
    generator: torch.Generator,
    strength: float = REVIVE_STRENGTH,
) -> Tensor:
    """Point dead latents at what the live ones leave of a batch; returns the numbers of those changed.

    Rows are drawn by their squared error, at most half of them. A latent reads and writes along what is left of its
    row, and starts to fire above what nine tenths of the rows reach. At its own row it adds `strength` times what is
    left, shared with the latents that point the same way: many rows of a batch can lack the same thing, and
    unshared they overshoot, draw the batch's whole budget of k and are revived again.

    Args:
        left_BN: x minus the reconstruction, as a step gave it.
        dead_F: which latents are dead.
    """
    dead_D = dead_F.nonzero()[:, 0]
    errors_B = left_BN.pow(2).sum(1).cpu()
    count = min(len(dead_D), len(left_BN) // 2, int((errors_B > 0).sum()))
    if count == 0 or bool(dead_F.all()):
        return dead_D[:0]
    rows = torch.multinomial(errors_B, count, generator=generator).to(left_BN.device)
    length = left_BN[rows].norm(dim=1)
    direction = left_BN[rows] / length[:, None]
    reach = (x_BN - weights.b_dec_N) @ direction.T
    own = reach[rows, torch.arange(count, device=rows.device)]
    start = torch.minimum(reach.kthvalue(int(0.9 * len(reach)) + 1, dim=0).values, own / 2)
    shared = (direction @ direction.T).relu().sum(1)
    gain = (strength * length / shared / (own - start)).clamp_max(1.0)
    usable = own > 0  # else the row's projection on what it lacks is negative, and no encoder along it fires there
    chosen = dead_D[torch.randperm(len(dead_D), generator=generator)[:count].to(dead_D.device)][usable]
    direction, gain, start = direction[usable], gain[usable], start[usable]
    norm = weights.W_dec_FN[~dead_F].norm(dim=1).mean()
    weights.W_dec_FN[chosen] = direction * norm
    weights.W_enc_FN[chosen] = direction * (gain / norm)[:, None]
    weights.b_enc_F[chosen] = -gain * start / norm
    for parameter in (weights.W_enc_FN, weights.W_dec_FN, weights.b_enc_F):
        for name in ("exp_avg", "exp_avg_sq"):
            optimiser.state[parameter][name][chosen] = 0.0
    return chosen
