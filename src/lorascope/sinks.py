"""Attention sinks: tokens whose hidden state is far longer than their trace's others.

Shape legend: B traces of a batch, T tokens, D hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SINK_RATIO = 10.0
"""A token is an attention sink when its hidden state entering the middle decoder layer is this many times longer
than its trace's median. Massive activations stand far off: 90 to 170 times on the default model, where every
other token stays below 2 (docs/log.md)."""


def is_sink(norms_T: Any) -> Any:
    """Which tokens of one trace are attention sinks, bool [T]."""
    return norms_T > SINK_RATIO * np.median(norms_T)


@contextmanager
def middle_norms(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collect the norms [B, T] fp32 of the hidden states that enter the middle decoder layer."""
    norms: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        norms.append(torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32))

    handle = layers[len(layers) // 2].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield norms
    finally:
        handle.remove()
