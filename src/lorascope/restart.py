"""Forward passes that begin at an inner layer, from hidden states kept of an earlier pass.

Shapes: B = sequences, T = tokens, D = model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorascope.errors import BadInput


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's list of decoder layers, found by its length.

    Raises:
        BadInput: there is no such list, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise BadInput(f"The decoder layers of {type(model).__name__} were not found; this stage cannot use it.")
    return found[0]


@contextmanager
def keep_hidden(model: Any) -> Iterator[list[Tensor]]:
    """Collect the output [B, T, D] of every layer in the one forward pass inside."""
    kept: list[Tensor] = []

    def keep(_: object, __: object, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def start_at(model: Any, layer: int, hidden_BTD: Tensor) -> Iterator[None]:
    """Inside, forward passes skip the layers before `layer`; it gets `hidden_BTD` as its input."""
    skipped = list(decoder_layers(model))[:layer]
    try:
        for module in skipped:
            module.forward = partial(pass_on, hidden_BTD)
        yield
    finally:
        for module in skipped:
            module.__dict__.pop("forward", None)


def pass_on(hidden_BTD: Tensor, *_: object, **__: object) -> Tensor:
    """What a skipped layer does."""
    return hidden_BTD
