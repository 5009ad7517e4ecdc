"""The adapted linear map itself: the base map plus the directions' term, whose scalars pass through a tap.

Shapes: I = input width, O = output width, R = directions of this module; leading dimensions are free.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
Tap = Callable[[Tensor], Tensor]


def adapted_forward(x: Tensor, base: Forward, a_RI: Tensor, b_OR: Tensor, scale: float, tap: Tap) -> Tensor:
    """`W·x + s·b·z` with `z = tap(a·x)`; the second term is computed and added in fp32, whatever W's precision.

    A merged low-precision weight would lose the term to rounding (DESIGN, section 3). With z = 0 the result is
    `W·x` bit for bit.

    Args:
        x: [..., I], the true input of the module.
        base: the module's own forward.
        a_RI, b_OR: fp32.
        tap: sees the scalars [..., R] in fp32 and returns those to use.
    """
    y = base(x)
    with torch.autocast(x.device.type, enabled=False):
        z = tap(F.linear(x.float(), a_RI))
        term = F.linear(z * scale, b_OR)
        return (y.float() + term).to(y.dtype)
