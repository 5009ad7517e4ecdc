"""KL and cross-entropy change per predicted token, in fp32, without keeping whole-vocabulary softmaxes.

The direction is always KL(p || q): p is the reference run (the adapted model), q a changed one. A value at
position t belongs to the prediction of token t + 1, hence to that token's segment.

Shapes: D hidden width, V vocabulary, M scored positions, Q changed runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorascope.traces import Rendered

CHUNK = 128
"""Positions whose logits exist at once: 128 x 49,152 fp32 logits are 25 MB."""


@dataclass(frozen=True)
class Changes:
    """What Q changed runs say about M predicted tokens: nats, fp32 [Q, M], on the CPU."""

    kl: Tensor
    ce: Tensor
    """Cross-entropy of the token that came, changed minus reference."""


def assistant_positions(rendered: Rendered) -> np.ndarray:
    """Positions whose prediction is part of the response, int64 [M]: response_start - 1 to T - 2."""
    return np.arange(max(rendered.response_start - 1, 0), len(rendered.ids) - 1, dtype=np.int64)


def predicted_segments(rendered: Rendered) -> np.ndarray:
    """Segment of the token that each of `assistant_positions` predicts, uint8 [M]."""
    return rendered.segments[assistant_positions(rendered) + 1]


def compare_hidden(
    head: Callable[[Tensor], Tensor],
    hidden_p_MD: Tensor,
    hidden_q_QMD: Sequence[Tensor],
    targets_M: Tensor,
    *,
    chunk: int = CHUNK,
) -> Changes:
    """Compare changed runs with one reference from their last hidden states, `chunk` positions at a time.

    Args:
        head: maps [m, D] to new logits [m, V]; rounded to bfloat16 they hide what single directions do.
        targets_M: the ids that came next (int64).
    """
    kl, ce = (torch.zeros(len(hidden_q_QMD), len(targets_M)) for _ in range(2))
    for start in range(0, len(targets_M), chunk):
        part = slice(start, start + chunk)
        logits_p = head(hidden_p_MD[part]).float()
        p = torch.softmax(logits_p, dim=-1)
        targets = targets_M[part].to(p.device)
        for number, hidden_q_MD in enumerate(hidden_q_QMD):
            shift = head(hidden_q_MD[part]).float().sub_(logits_p)
            own_kl, own_ce = shifted(p, logits_p, shift, targets)
            kl[number, part], ce[number, part] = own_kl.float(), own_ce.float()
    return Changes(kl, ce)


def shifted(p_MV: Tensor, logits_p_MV: Tensor, shift_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and the change of cross-entropy when d is added to p's logits, each float64 [M] on the CPU.

    With w = Σ p·d and u = Σ p·(e^d - 1): KL = log(1 + u) - w. For small d both terms are much larger than their
    difference, so it is formed as Σ p·(e^d - 1 - d) + (log(1 + u) - u), whose terms are of the KL's own size.
    """
    grown = torch.expm1(shift_MV)
    w_M = torch.linalg.vecdot(p_MV, shift_MV).cpu().double()
    bend_M = torch.linalg.vecdot(p_MV, grown.sub_(shift_MV)).cpu().double()
    u_M = bend_M + w_M
    log_M = torch.log1p(u_M)
    kl_M = torch.where(u_M.abs() < 0.5, bend_M + (log_M - u_M), log_M - w_M)
    # e^d beyond fp32, or 1 + u near 0, where u has lost its digits
    wild = ~(kl_M.isfinite() & log_M.isfinite()) | (u_M < -0.5)
    if wild.any():
        rows = wild.to(p_MV.device)
        before, after = logits_p_MV[rows], logits_p_MV[rows] + shift_MV[rows]
        log_M[wild] = (after.logsumexp(-1) - before.logsumexp(-1)).cpu().double()
        kl_M[wild] = log_M[wild] - w_M[wild]
    return kl_M, log_M - shift_MV.gather(1, targets_M[:, None])[:, 0].cpu()
