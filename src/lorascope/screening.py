"""Screening: the KL of switching off every direction at once, from a few backward passes.

Put a gate g (1 = as trained) on each direction and sequence. With labels y_t drawn from the adapted model's own
predictions after the trace's prefix and independent signs ε_t, to second order

    KL(adapted ‖ c off), summed over a sequence ≈ ½ · E[(∂/∂g_c Σ_t ε_t log p_t(y_t))²].

One backward pass gives this for all directions and sequences; sums of gradients give any group of directions, and
their products all pairwise interactions. Exact leave-one-out confirms the leaders.

Shapes: B = sequences of a batch, S = all sequences, T = tokens, N = directions, R = directions of a module, M =
scored positions, K = passes, D = model width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lorascope import edits
from lorascope.attached import Attached, find_module, head_of, wide_linear
from lorascope.decoders import text_decoder
from lorascope.fused import agrees, forwards, norm_form, plain_head
from lorascope.kl import CHUNK, assistant_positions
from lorascope.progress import progress
from lorascope.rank1 import Linear, forward_linear, unflattened
from lorascope.traces import Rendered, pad_ids, plan_batches

FIRST_PASSES, MOST_PASSES = 4, 64
"""Passes after which the precision is looked at first, and at which it is given up."""
DRAWN = 8
"""Passes whose labels are drawn together, from one computation of the logits."""


@dataclass(frozen=True)
class Screened:
    """Gate gradients of K passes; everything else is algebra on them."""

    gradients_KSN: NDArray[np.float32]
    tokens_S: NDArray[np.int64]
    """Scored positions of each trace."""
    nulls: dict[str, NDArray[np.float64]]
    """What each null run changes in the gradients of some traces [C, N], over the root of their scored positions."""

    def kl_KSG(self, members_GN: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Each pass's estimate of each group's KL, summed over a trace's tokens, nats."""
        gradients = self.gradients_KSN.astype(np.float64) @ members_GN.T
        return 0.5 * gradients**2

    def null_kls(self, members_GN: NDArray[np.bool_]) -> dict[str, float]:
        """The largest KL of any of the groups in each null run, nats per token, pooled over its traces."""
        found = {name: 0.5 * ((null_CN @ members_GN.T) ** 2).sum(axis=0) for name, null_CN in self.nulls.items()}
        return {name: float(kl_G.max()) for name, kl_G in found.items()}

    def interactions_NN(self) -> NDArray[np.float64]:
        """½·E[gradient_c · gradient_d], nats per token: a group's KL is the sum over its square block."""
        flat = self.gradients_KSN.reshape(-1, self.gradients_KSN.shape[-1]).astype(np.float64)
        return 0.5 * flat.T @ flat / (len(self.gradients_KSN) * self.tokens_S.sum())


class GateFunction(torch.autograd.Function):
    """An adapted linear map with a gate of 1 on each direction and sequence; gradients of the input and the gates.

    Weights are constants here, so that nothing but the scalars is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates_BR: Tensor, linear: Linear) -> Tensor:
        """Output [..., O] of x [..., I], the tokens of B sequences one after the other."""
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO, z_TR = forward_linear(x_TI, linear)
        ctx.save_for_backward(z_TR)
        ctx.linear, ctx.shape, ctx.sequences = linear, x.shape, len(gates_BR)
        return unflattened(y_TO, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Gradients of (x, gates, linear)."""
        linear: Linear = ctx.linear
        assert linear.a_RI is not None
        assert linear.b_OR is not None
        (z_TR,) = ctx.saved_tensors
        slope_TO = slope.reshape(-1, slope.shape[-1])
        u_TR = slope_TO.float() @ linear.b_OR
        gates = (u_TR * z_TR).view(ctx.sequences, -1, z_TR.shape[1]).sum(dim=1).mul_(linear.scale)
        x = None
        if ctx.needs_input_grad[0]:
            x = slope_TO @ (linear.merged() if linear.merges else linear.W_OI)
            if not linear.merges:
                x = torch.addmm(x.float(), u_TR, linear.a_RI, alpha=linear.scale).to(slope.dtype)
            x = x.reshape(ctx.shape)
        return x, gates, None


@contextmanager
def gated(attached: Attached, gates_BN: Tensor) -> Iterator[None]:
    """Inside, forward passes over B sequences are differentiable in their gates."""
    model = attached.model
    forms: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    others = []
    for index, part in enumerate(attached.adapter.modules):
        module = find_module(model, part)
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            a_RI, b_OR = part.a_RI.detach().to(weight.device), part.b_OR.detach().to(weight.device)
            linear = Linear(weight, module.bias, a_RI, b_OR, part.scale)
            forms[module] = partial(gated_linear, attached, index, gates_BN[:, part.columns].to(weight.device), linear)
        else:
            others += attached.addresses[part.columns]
    for module in model.modules():
        form = norm_form(module)
        if form is not None and agrees(module, form):
            forms[module] = form
    with forwards(forms):
        if others:
            with attached.edit(edits.gate(gates_BN, others)):
                yield
        else:
            yield


def gated_linear(attached: Attached, index: int, gates_BR: Tensor, linear: Linear, x: Tensor) -> Tensor:
    """`GateFunction` as a module's forward."""
    attached.by_token(index, x)  # refuses a module that sees some of the tokens only
    result: Tensor = GateFunction.apply(x, gates_BR, linear)
    return result


def screen(
    attached: Attached,
    traces: Sequence[Rendered],
    *,
    passes: int = 0,
    precision: float = 0.2,
    budget: int = 4096,
    seed: int = 0,
) -> Screened:
    """Gate gradients of all traces.

    Args:
        passes: number of backward passes; 0 takes as many as `precision` asks for.
        precision: wanted standard error over KL, the median over directions.
        budget: padded tokens whose activations are held at once.
    """
    plan = plan_batches([len(t.ids) for t in traces], budget)
    gradients = np.zeros((0, len(traces), len(attached.addresses)), np.float32)
    wanted = passes or FIRST_PASSES
    open_draws: dict[int, Iterator[NDArray[np.float32]]] = {}
    while wanted > 0:
        block = np.zeros((wanted, *gradients.shape[1:]), np.float32)
        for number, rows in enumerate(progress(plan, desc="screen", unit="batch", total=len(plan))):
            draws = open_draws.pop(number, None) or gate_draws(attached, traces, rows, seed, len(gradients))
            for k in range(wanted):
                block[k, rows] = next(draws)
            if len(plan) == 1:  # one graph fits into memory, so that later passes need no new forward pass
                open_draws[number] = draws
        gradients = np.concatenate([gradients, block])
        wanted = 0 if passes else min(passes_needed(gradients, precision), MOST_PASSES) - len(gradients)
    tokens_S = np.array([len(assistant_positions(t)) for t in traces])
    return Screened(gradients, tokens_S, null_runs(attached, traces, plan, seed, gradients[0]))


def passes_needed(gradients_KSN: NDArray[np.float32], precision: float) -> int:
    """How many passes bring the median direction's relative standard error down to `precision`."""
    kl_KN = (gradients_KSN.astype(np.float64) ** 2).sum(axis=1)
    mean_N = kl_KN.mean(axis=0)
    alive = mean_N > 0
    if not alive.any():
        return len(kl_KN)
    spread = float(np.median(kl_KN[:, alive].std(axis=0, ddof=1) / mean_N[alive]))
    return max(len(kl_KN), math.ceil((spread / precision) ** 2))


def gate_draws(
    attached: Attached, traces: Sequence[Rendered], rows: Sequence[int], seed: int, first: int
) -> Iterator[NDArray[np.float32]]:
    """Gate gradients [B, N] of one batch, a pass at a time, without end; the graph is kept until it is closed.

    Labels and signs depend on the seed, the trace and the number of the pass (from `first`) alone.
    """
    chosen = [traces[i] for i in rows]
    ids_BT = pad_ids([t.ids for t in chosen], 0)[0].to(attached.device)
    positions = [assistant_positions(t) for t in chosen]
    at = (
        torch.from_numpy(np.repeat(np.arange(len(rows)), [len(p) for p in positions])).to(attached.device),
        torch.from_numpy(np.concatenate(positions)).to(attached.device),
    )
    gates_BN = torch.ones(len(rows), len(attached.addresses), device=attached.device, requires_grad=True)
    with torch.enable_grad(), gated(attached, gates_BN):
        hidden_BTD = text_decoder(attached.model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    scored_MD = hidden_BTD.detach()[at]
    for start in count(first, DRAWN):
        draws_KM, signs_KM = (np.empty((DRAWN, len(scored_MD)), np.float32) for _ in range(2))
        for k in range(DRAWN):
            rngs = [np.random.default_rng([seed, start + k, i]) for i in rows]
            draws_KM[k] = np.concatenate([rng.random(len(p)) for rng, p in zip(rngs, positions, strict=True)])
            signs = [rng.integers(0, 2, len(p)) for rng, p in zip(rngs, positions, strict=True)]
            signs_KM[k] = np.concatenate(signs) * 2 - 1
        slopes = label_slopes(attached, scored_MD, torch.from_numpy(draws_KM), torch.from_numpy(signs_KM))
        for slope_MD in slopes:
            slope_BTD = torch.zeros_like(hidden_BTD)
            slope_BTD[at] = slope_MD.to(slope_BTD.dtype)
            (found,) = torch.autograd.grad(hidden_BTD, gates_BN, slope_BTD, retain_graph=True, allow_unused=True)
            yield found.float().cpu().numpy()


@torch.no_grad()
def label_slopes(attached: Attached, hidden_MD: Tensor, draws_KM: Tensor, signs_KM: Tensor) -> Iterator[Tensor]:
    """For each pass the gradient [M, D] of Σ ε·log p(y) by the hidden states, y drawn from p by inverse CDF.

    Args:
        draws_KM: uniform numbers in [0, 1).
        signs_KM: 1 or -1.
    """
    model, device = attached.model, hidden_MD.device
    draws_KM, signs_KM = draws_KM.to(device), signs_KM.to(device)
    weight_VD = plain_head(model)
    wide_VD = None if weight_VD is None else weight_VD.detach().float()
    head = head_of(model) if wide_VD is None else partial(wide_linear, weight_VD=wide_VD)
    labels, means = [], []
    for start in range(0, len(hidden_MD), CHUNK):
        part = slice(start, start + CHUNK)
        p_MV = torch.softmax(head(hidden_MD[part]), dim=-1)
        if wide_VD is not None:
            # In fp32: where the model is sure, the mean is nearer to the label's row than a rounded mean to itself.
            means.append(p_MV @ wide_VD)
        cdf_MV = p_MV.cumsum_(dim=-1)
        wanted_MK = draws_KM[:, part].T * cdf_MV[:, -1:]
        labels.append(torch.searchsorted(cdf_MV, wanted_MK.contiguous(), right=True).clamp_(max=cdf_MV.shape[1] - 1))
    labels_KM = torch.cat(labels).T
    if wide_VD is not None:
        mean_MD = torch.cat(means)
        for labels_M, signs_M in zip(labels_KM, signs_KM, strict=True):
            yield (wide_VD[labels_M] - mean_MD) * signs_M[:, None]
        return
    for labels_M, signs_M in zip(labels_KM, signs_KM, strict=True):
        yield torch.cat(
            [
                head_slope(head, *parts)
                for parts in zip(hidden_MD.split(CHUNK), labels_M.split(CHUNK), signs_M.split(CHUNK), strict=True)
            ]
        )


def head_slope(head: Callable[[Tensor], Tensor], hidden_MD: Tensor, labels_M: Tensor, signs_M: Tensor) -> Tensor:
    """The same gradient through a head that is more than a product."""
    with torch.enable_grad():
        hidden = hidden_MD.detach().requires_grad_()
        logp_MV = F.log_softmax(head(hidden), dim=-1)
        total = (logp_MV.gather(1, labels_M[:, None])[:, 0] * signs_M).sum()
        return torch.autograd.grad(total, hidden)[0]


def null_runs(
    attached: Attached,
    traces: Sequence[Rendered],
    plan: Sequence[Sequence[int]],
    seed: int,
    gradients_SN: NDArray[np.float32],
) -> dict[str, NDArray[np.float64]]:
    """The first pass of two traces (of one, where there is no other) again, in runs that should change nothing.

    Both are of the first batch, if it has two. Each is run in a batch of its own (twice in it, where it was alone
    before): `rebatched`; both share one: `resplit`; and that once more, beside itself: `rerun`.

    Returns:
        For each run the differences of the traces' gradients [C, N], over the root of their scored positions together.
    """
    chosen = [row for rows in plan[:2] for row in rows][:2]
    lonely = {rows[0] for rows in plan if len(rows) == 1}

    def again(*rows: int) -> NDArray[np.float64]:
        return next(gate_draws(attached, traces, rows, seed, 0)).astype(np.float64)

    planned_CN = gradients_SN[chosen].astype(np.float64)
    together = again(*chosen)
    alone = [again(row, row)[:1] if row in lonely else again(row) for row in chosen]
    differences = {"rerun": again(*chosen) - together, "rebatched": np.concatenate(alone) - planned_CN}
    if len(chosen) > 1:
        differences["resplit"] = together - planned_CN
    root = sum(len(assistant_positions(traces[row])) for row in chosen) ** 0.5
    return {name: difference_CN / root for name, difference_CN in differences.items()}
