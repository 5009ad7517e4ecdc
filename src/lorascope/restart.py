"""Forward passes that begin at an inner layer, from hidden states kept of an earlier pass.

Shapes: B = sequences, T = tokens, D = model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """What one layer gave."""

    hidden_BTD: Tensor
    entries: int | None = None
    """Length of the tuple that began with the hidden states (Bloom, Falcon, MPT, GPT-Neo); None where it was none."""

    def repeat(self, copies: int) -> "Kept":
        """The same for a batch of so many copies of the sequences."""
        return replace(self, hidden_BTD=self.hidden_BTD.repeat(copies, 1, 1))


@contextmanager
def keep_hidden(layers: nn.ModuleList) -> Iterator[list[Kept]]:
    """Collect the output of every layer in the one forward pass inside."""
    kept: list[Kept] = []

    def keep(_: object, __: object, output: Any) -> None:
        kept.append(Kept(output) if isinstance(output, Tensor) else Kept(output[0], len(output)))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def start_at(layers: nn.ModuleList, layer: int, kept: Kept) -> Iterator[None]:
    """Inside, forward passes skip the layers before `layer`; it gets the hidden states in `kept` as its input."""
    hidden_BTD, entries = kept.hidden_BTD, kept.entries
    output = hidden_BTD if entries is None else (hidden_BTD, *[None] * (entries - 1))
    skipped = list(layers)[:layer]
    try:
        for module in skipped:
            module.forward = partial(pass_on, output)
        yield
    finally:
        for module in skipped:
            module.__dict__.pop("forward", None)


def pass_on(output: Any, *_: object, **__: object) -> Any:
    """What a skipped layer does."""
    return output
