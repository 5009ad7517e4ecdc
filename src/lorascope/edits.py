"""What can be done to scalars. An edit is a function of the scalars where they pass; `attached.edit` applies it.

Shapes: B = sequences, T = tokens, N = all directions, n = the directions of one module that an edit selects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# (z_BTn, their columns among all N) -> new z_BTn
Change = Callable[[Tensor, Tensor], Tensor]
PerDirection = float | Tensor | NDArray[np.floating]


@dataclass(frozen=True)
class Edit:
    """A change of the scalars of the directions that match `patterns`, at the positions in `where`."""

    patterns: str | Sequence[str]
    change: Change
    where: str = "all"
    """`all` positions, or only `generated` tokens (while text is generated)."""
    mask_BT: Tensor | None = None
    """Restricts the edit to these positions of the batch."""
    per_sequence: bool = False
    """Whether the change differs by row, so that it fits one batch alone."""


def off(patterns: str | Sequence[str] = "*", to: PerDirection = 0.0, where: str = "all") -> Edit:
    """Set scalars to zero, or `to` a value or one value per direction ([N], e.g. their means)."""
    return Edit(patterns, lambda z, columns: per_direction(to, z, columns).expand_as(z), where)


def scale(patterns: str | Sequence[str], factor: PerDirection, where: str = "all") -> Edit:
    """Multiply scalars by a factor, or by one factor per direction [N]."""
    return Edit(patterns, lambda z, columns: z * per_direction(factor, z, columns), where)


def clamp(
    patterns: str | Sequence[str], low: float | None = None, high: float | None = None, where: str = "all"
) -> Edit:
    """Keep scalars within [low, high]; raw scalar units."""
    return Edit(patterns, lambda z, columns: z.clamp(low, high), where)


def add(patterns: str | Sequence[str], amount: PerDirection, where: str = "all") -> Edit:
    """Add to scalars, in raw units: it writes through the adapter's own s·b."""
    return Edit(patterns, lambda z, columns: z + per_direction(amount, z, columns), where)


def replace(values_BTN: Tensor, patterns: str | Sequence[str] = "*", mask_BT: Tensor | None = None) -> Edit:
    """Put other scalars in the place of these, for one forward over a batch [B, T], where `mask_BT` is true."""

    def change(z: Tensor, columns: Tensor) -> Tensor:
        return values_BTN[..., columns.to(values_BTN.device)].to(z)

    return Edit(patterns, change, mask_BT=mask_BT, per_sequence=True)


def gate(gates_BN: Tensor, patterns: str | Sequence[str] = "*", to: PerDirection = 0.0) -> Edit:
    """Give every sequence its own gates: 1 as trained, 0 off (or at `to`). Differentiable in the gates."""

    def change(z: Tensor, columns: Tensor) -> Tensor:
        gates = gates_BN[:, None, columns.to(gates_BN.device)].to(z.device)
        return z * gates + per_direction(to, z, columns) * (1 - gates)

    return Edit(patterns, change, per_sequence=True)


def per_direction(value: PerDirection, z: Tensor, columns: Tensor) -> Tensor:
    """A number, or the entries of a per-direction [N] array for these columns, on z's device and dtype."""
    value = torch.as_tensor(value).to(z)
    return value if value.ndim == 0 else value[columns]
