"""KL and cross-entropy per predicted token, in fp32, without keeping whole-vocabulary softmaxes.

The direction is always KL(p || q): p is the reference run (the adapted model), q the changed one. A value at
position t belongs to the prediction of token t + 1, hence to that token's segment.

Shapes: B batch, T tokens, D hidden width, V vocabulary, M scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
class TokenScores:
    """What two runs say about the same M predicted tokens: fp32, nats, each [M], on the CPU."""

    kl: Tensor
    ce_p: Tensor
    ce_q: Tensor


def assistant_positions(rendered: Rendered) -> np.ndarray:
    """Positions whose prediction is part of the response, int64 [M]: response_start - 1 to T - 2."""
    return np.arange(max(rendered.response_start - 1, 0), len(rendered.ids) - 1, dtype=np.int64)


def predicted_segments(rendered: Rendered) -> np.ndarray:
    """Segment of the token that each of `assistant_positions` predicts, uint8 [M]."""
    return rendered.segments[assistant_positions(rendered) + 1]


def kl_per_token(logits_p_MV: Tensor, logits_q_MV: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """KL(p || q) of each row in nats, fp32 [M], from logits (or log-probabilities) of any dtype."""
    pairs = zip(logits_p_MV.split(chunk), logits_q_MV.split(chunk), strict=True)
    parts = [_kl(_log_probabilities(p), _log_probabilities(q)) for p, q in pairs]
    return torch.cat(parts) if parts else logits_p_MV.new_zeros(0, dtype=torch.float32)


def hidden_scores(
    head: Callable[[Tensor], Tensor],
    hidden_p_MD: Tensor,
    hidden_q_MD: Tensor,
    targets_M: Tensor,
    *,
    chunk: int = CHUNK,
) -> TokenScores:
    """Compare two runs from their last hidden states, the LM head applied `chunk` positions at a time.

    `head` maps [m, D] to logits [m, V]; `targets_M` are the ids that came next (int64).
    """
    kl, ce_p, ce_q = [], [], []
    for part in _slices(len(targets_M), chunk):
        logp = _log_probabilities(head(hidden_p_MD[part]))
        logq = _log_probabilities(head(hidden_q_MD[part]))
        target = targets_M[part].to(logp.device)[:, None]
        ce_p.append(-logp.gather(1, target)[:, 0].cpu())
        ce_q.append(-logq.gather(1, target)[:, 0].cpu())
        kl.append(_kl(logp, logq).cpu())
    if not kl:
        empty = torch.zeros(0)
        return TokenScores(empty, empty, empty)
    return TokenScores(torch.cat(kl), torch.cat(ce_p), torch.cat(ce_q))


def reference_scores(
    head: Callable[[Tensor], Tensor],
    logp_MV: Tensor,
    hidden_q_MD: Tensor,
    targets_M: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`(kl, ce_q)` of a changed run against a reference whose fp32 log-probabilities are kept, each [M] on the CPU.

    For many changed runs against one reference: it saves half of `hidden_scores`' work, for M x V x 4 bytes.
    """
    kl, ce = [], []
    for part in _slices(len(targets_M), chunk):
        logq = _log_probabilities(head(hidden_q_MD[part]))
        ce.append(-logq.gather(1, targets_M[part].to(logq.device)[:, None])[:, 0].cpu())
        kl.append(_kl(logp_MV[part], logq).cpu())
    return torch.cat(kl), torch.cat(ce)


def hidden_kls(
    head: Callable[[Tensor], Tensor], hidden_p_MD: Tensor, hidden_q_QMD: Sequence[Tensor], *, chunk: int = CHUNK
) -> Tensor:
    """KL(p || q) of one run to each of Q others from their last hidden states, fp32 [Q, M] on the CPU."""
    kls = torch.zeros(len(hidden_q_QMD), len(hidden_p_MD))
    for part in _slices(len(hidden_p_MD), chunk):
        logp = _log_probabilities(head(hidden_p_MD[part]))
        for number, hidden_q_MD in enumerate(hidden_q_QMD):
            kls[number, part] = _kl(logp, _log_probabilities(head(hidden_q_MD[part]))).cpu()
    return kls


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Sum of p·log(p/q) - p + q.

    Both distributions sum to 1, so the last two terms are 0 in exact arithmetic; here they cancel the rounding
    of the two normalisers to first order, which would otherwise drown KLs near 1e-6.
    """
    p = logp.exp()
    extra = torch.exp(logq).sub_(p)
    return extra.addcmul_(p, torch.sub(logp, logq)).sum(dim=-1)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
