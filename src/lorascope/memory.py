"""How much memory is free, and how many tokens of a forward pass fit into a share of it."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lorascope.adapter import Adapter

SHARE = 4
"""A pass may take one part in so many of the free memory: the estimate is rough, and others use the machine too."""
MOST_ON_CPU, MOST_ELSEWHERE, FEWEST = 4096, 65_536, 256
"""A CPU is busy with a few thousand tokens at once; a GPU needs more."""


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def bytes_per_token(adapter: Adapter, itemsize: int, beside: int = 0) -> int:
    """A rough upper bound of what one token of a forward pass without gradients holds at once.

    Eight vectors as wide as the widest input or output of an adapted map, one more in fp32 where the model is less
    precise, and three times all scalars in fp32: as they were read, joined by source, and joined over all sources.

    Args:
        itemsize: bytes of one number of the model.
        beside: how many columns of other sources are read in the same pass.
    """
    widest = max(max(part.a_RI.shape[1], part.b_OR.shape[0]) for part in adapter.modules)
    wide = 4 * widest if itemsize < 4 else 0
    return 8 * widest * itemsize + wide + 3 * 4 * (len(adapter.addresses) + beside)


def choose_budget(adapter: Adapter, device: torch.device, dtype: torch.dtype, beside: int = 0) -> int:
    """Padded tokens per forward pass that a share of the free memory holds, a power of two; `beside` as above.

    A power of two, so that a little more or less of free memory plans the same batches.
    """
    fit = free_memory(device) // SHARE // bytes_per_token(adapter, dtype.itemsize, beside)
    most = MOST_ON_CPU if device.type == "cpu" else MOST_ELSEWHERE
    return max(FEWEST, min(most, 1 << max(fit, 1).bit_length() - 1))


def graph_budget(model: Any, most: int) -> int:
    """Padded tokens whose activations may be held for a backward pass: at most `most`, and what the memory share holds.

    A longer sequence is a batch of its own whatever this says.

    Per token and layer a gated MLP keeps about three inner vectors, and attention, norms and residuals about six of
    the model's width (SmolLM2-135M: 1.0 MB measured, 0.97 MB by this).
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    per_token = config.num_hidden_layers * (6 * width + 3 * inner) * model.dtype.itemsize
    return int(max(1, min(most, free_memory(model.device) // SHARE // per_token)))
