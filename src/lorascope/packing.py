"""Packed sequences: several in one row, end to end, without padding and without seeing each other.

Linear maps, norms and the loss work on one long row; only attention has to know where sequences begin, which it reads
off the position ids: they restart there. So attention runs over one sequence at a time, with a causal kernel that
needs no mask, and the work is that of the real tokens.

Shapes: B = rows, H = heads, T = tokens of a row, K = width of a head.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from lorascope.decoders import text_decoder

PACKED = "lorascope_packed"


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
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query_BHTK, key_BHTK, value_BHTK)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *piece, None, **settings)[0] for piece in pieces], dim=1), None


@lru_cache(maxsize=1)
def sequence_lengths(position_ids_1T: Tensor) -> list[int]:
    """Tokens of each sequence of a packed row, from position ids that restart at zero.

    All layers of a pass ask with the same tensor, and reading one waits for its device; so the last answer is kept.
    """
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
    decoder = text_decoder(model)
    takes_places = "position_ids" in inspect.signature(decoder.forward).parameters
    if longest > longest_unmasked(text) or not takes_places:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (24,), generator=generator).to(weight.device)
    places = torch.cat([torch.arange(10), torch.arange(14)])[None].to(weight.device)
    alone = [decoder(input_ids=own[None], use_cache=False).last_hidden_state[0] for own in ids.split([10, 14])]
    wanted = torch.cat(alone)
    half = weight.dtype != torch.float32
    flash = ["flash_attention_2"] if weight.device.type == "cuda" and is_flash_attn_2_available() and half else []
    AttentionInterface.register(PACKED, packed_attention)
    for attention in [*flash, PACKED]:
        try:
            model.set_attn_implementation(attention)
            packed = decoder(input_ids=ids[None], position_ids=places, use_cache=False).last_hidden_state[0]
            tolerance = 5e-2 if half else 1e-3
            if bool((packed - wanted).float().abs().max() <= tolerance * wanted.float().abs().max()):
                return True
        except Exception:  # its attention takes something else, and fails in any of the ways that code can
            continue
    model.set_attn_implementation(before)
    return False
