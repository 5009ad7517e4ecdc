"""Packed sequences: several in one row, end to end, without padding and without seeing each other.

Linear maps, norms and the loss work on one long row; only attention has to know where sequences begin, which it reads
off the position ids: they restart there. So attention runs over one sequence at a time, with a causal kernel that
needs no mask, and the work is that of the real tokens.

Shapes: B = rows, H = heads, G = heads of keys and values, T = tokens of a row, K = width of a head, N = tokens of a
sequence.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

PACKED = "lorascope_packed"


SHORT = 192
"""Tokens of a sequence up to which plain products beat PyTorch's tiled attention on a CPU, above all backwards."""


class ShortAttention(torch.autograd.Function):
    """Causal attention within short sequences of a packed row by plain products; keeps the attention weights."""

    @staticmethod
    def forward(
        ctx: Any, query_HTK: Tensor, key_GTK: Tensor, value_GTK: Tensor, lengths: list[int], scale: float
    ) -> Tensor:
        """Output [T, H, K]."""
        heads, _, width = query_HTK.shape
        groups, longest = len(key_GTK), max(lengths)
        output_THK = query_HTK.new_empty(query_HTK.shape[1], heads, width)
        future_NN = torch.full((longest, longest), float("-inf"), device=query_HTK.device).triu_(1)
        kept = []
        for q_HNK, k_GNK, v_GNK, o_NHK in zip(
            *(tensor.split(lengths, 1) for tensor in (query_HTK, key_GTK, value_GTK)),
            output_THK.split(lengths),
            strict=True,
        ):
            n = len(o_NHK)
            # The heads that share keys are rows of one product.
            scores = torch.bmm(q_HNK.reshape(groups, -1, width), k_GNK.mT).view(groups, -1, n, n)
            weights = torch.softmax(scores.mul_(scale).add_(future_NN[:n, :n]), dim=-1).view(groups, -1, n)
            o_NHK.copy_(torch.bmm(weights, v_GNK).view(heads, n, width).transpose(0, 1))
            kept.append(weights)
        ctx.save_for_backward(query_HTK, key_GTK, value_GTK, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return output_THK

    @staticmethod
    def backward(ctx: Any, slope_THK: Tensor) -> Any:
        """Gradients of (query, key, value, lengths, scale)."""
        query_HTK, key_GTK, value_GTK, *kept = ctx.saved_tensors
        inputs = (query_HTK, key_GTK, value_GTK)
        grads = [torch.empty_like(tensor) for tensor in inputs]
        groups, width = len(key_GTK), query_HTK.shape[-1]
        parts = (tensor.split(ctx.lengths, 1) for tensor in (*inputs, slope_THK.transpose(0, 1), *grads))
        for weights, q, k_GNK, v_GNK, slope, dq_HNK, dk_GNK, dv_GNK in zip(kept, *parts, strict=True):
            q, slope = (tensor.reshape(groups, -1, width) for tensor in (q, slope))
            dv_GNK.copy_(torch.bmm(weights.mT, slope))
            from_weights = torch.bmm(slope, v_GNK.mT)
            from_scores = torch._softmax_backward_data(from_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            dq_HNK.copy_(torch.bmm(from_scores, k_GNK).view(dq_HNK.shape))
            dk_GNK.copy_(torch.bmm(from_scores.mT, q))
        return *grads, None, None


def packed_attention(
    module: Any,
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention [B, T, H, K] within each sequence of a packed row.

    transformers calls it as it calls its own attention functions. Several rows, a mask of the model's own, or position
    ids that do not restart are attended to as usual.
    """
    if len(query_BHTK) > 1 or attention_mask is not None or position_ids is None:
        return sdpa_attention_forward(module, query_BHTK, key_BHTK, value_BHTK, attention_mask, **settings)
    # `split` and not slices: the gradient of a split is one concatenation, that of each slice a whole row of zeros.
    lengths = sequence_lengths(position_ids)
    unusual = any(settings.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if query_BHTK.device.type == "cpu" and max(lengths) <= SHORT and not (settings.get("dropout") or unusual):
        scale = settings.get("scaling") or query_BHTK.shape[-1] ** -0.5
        return ShortAttention.apply(query_BHTK[0], key_BHTK[0], value_BHTK[0], lengths, scale)[None], None
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query_BHTK, key_BHTK, value_BHTK)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *piece, None, **settings)[0] for piece in pieces], dim=1), None


def sequence_lengths(position_ids_1T: Tensor) -> list[int]:
    """Tokens of each sequence of a packed row, from position ids that restart at zero."""
    row = position_ids_1T.flatten().tolist()
    starts = [0, *(i for i, place in enumerate(row) if place == 0 and i > 0), len(row)]
    return [end - start for start, end in pairwise(starts)]


def longest_unmasked(config: Any) -> float:
    """The longest sequence that a model attends to as a whole: its sliding window's or chunk's size, or no bound."""
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=float("inf"))


@torch.no_grad()
def prepare_packing(model: Any, longest: int) -> bool:
    """Choose an attention that keeps packed sequences apart without a mask, and see that it does.

    FlashAttention's variable lengths on CUDA, where the package is installed and in half precision; else
    `packed_attention`. Both attend to all that came before, so the longest sequence must fit into a model's window.

    Args:
        longest: tokens of the longest sequence that will be packed.

    Returns:
        Whether sequences may be packed; if not, the model is as it was.
    """
    before, weight = model.config._attn_implementation, model.get_input_embeddings().weight
    text = model.config.get_text_config()
    takes_places = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if longest > longest_unmasked(text) or not takes_places:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (24,), generator=generator).to(weight.device)
    places = torch.cat([torch.arange(10), torch.arange(14)])[None].to(weight.device)
    alone = [model.base_model(input_ids=own[None], use_cache=False).last_hidden_state[0] for own in ids.split([10, 14])]
    wanted = torch.cat(alone)
    flash = weight.device.type == "cuda" and is_flash_attn_2_available() and weight.dtype != torch.float32
    AttentionInterface.register(PACKED, packed_attention)
    try:
        model.set_attn_implementation("flash_attention_2" if flash else PACKED)
        packed = model.base_model(input_ids=ids[None], position_ids=places, use_cache=False).last_hidden_state[0]
        tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
        agrees = bool((packed - wanted).float().abs().max() <= tolerance * wanted.float().abs().max())
    except Exception:  # its attention takes something else, and fails in any of the ways that code can
        agrees = False
    if not agrees:
        model.set_attn_implementation(before)
    return agrees
