"""The adapted linear map itself: the base map plus the directions' term, whose scalars pass through a tap.

`adapted_forward` is the reading form: scalars are seen and edited on their way. `Linear`, `forward_linear` and
`backward_linear` are the training form: the same map with its gradients written out, one GEMM each way for an fp32
base, nothing kept but the input and the scalars.

Shapes: I = input width, O = output width, R = directions of this module, T = tokens; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
Tap = Callable[[Tensor], Tensor]


def adapted_forward(x: Tensor, base: Forward, a_RI: Tensor, b_OR: Tensor, scale: float, tap: Tap) -> Tensor:
    """`W·x + s·b·z` with `z = tap(a·x)`; the second term is computed and added in fp32, whatever W's precision.

    A merged low-precision weight would lose the term to rounding. With z = 0 the result is `W·x` bit for
    bit.

    Args:
        x: [..., I], the true input of the module.
        base: the module's own forward, or one that gives the same.
        a_RI, b_OR: fp32.
        tap: sees the scalars [..., R] in fp32 and returns those to use.
    """
    y = base(x)
    with torch.autocast(x.device.type, enabled=False):
        z = tap(F.linear(x.float(), a_RI))
        term = F.linear(z * scale, b_OR)
        return (y.float() + term).to(y.dtype)


class Linear(NamedTuple):
    """A linear map `W·x + bias + s·b·(a·x)`; a and b are None where the module is not adapted."""

    W_OI: Tensor
    bias_O: Tensor | None = None
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    scale: float = 0.0

    @property
    def merges(self) -> bool:
        """Whether the directions may be added to the weight: in low precision the sum would lose them."""
        return self.a_RI is not None and self.W_OI.dtype == torch.float32

    def merged(self) -> Tensor:
        """`W + s·b·a` [O, I], fp32: a pass over the weight, so little beside the GEMM that it feeds."""
        assert self.a_RI is not None
        assert self.b_OR is not None
        if len(self.a_RI) == 1:
            return torch.addcmul(self.W_OI, self.b_OR, self.a_RI, value=self.scale)
        return torch.addmm(self.W_OI, self.b_OR, self.a_RI, alpha=self.scale)


class Gradients(NamedTuple):
    """Gradients by what a linear map was given; None where not asked for."""

    x_TI: Tensor | None
    W_OI: Tensor | None
    bias_O: Tensor | None
    a_RI: Tensor | None
    b_OR: Tensor | None


def forward_linear(x_TI: Tensor, linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Output [T, O] in x's dtype and scalars [T, R] fp32 (None where there are no directions)."""
    if linear.a_RI is None or linear.b_OR is None:
        return F.linear(x_TI, linear.W_OI, linear.bias_O), None
    z_TR = x_TI.float() @ linear.a_RI.T
    if linear.merges:
        return F.linear(x_TI, linear.merged(), linear.bias_O), z_TR
    y_TO = F.linear(x_TI, linear.W_OI, linear.bias_O)
    return torch.addmm(y_TO.float(), z_TR, linear.b_OR.T, alpha=linear.scale).to(y_TO.dtype), z_TR


def backward_linear(
    slope_TO: Tensor, x_TI: Tensor, z_TR: Tensor | None, linear: Linear, *, to_x: bool = True, to_W: bool = False
) -> Gradients:
    """Gradients of a sum whose slope at the output is given: da = s·(bᵀ·slope)ᵀ·x and db = s·slopeᵀ·z, in fp32.

    Args:
        x_TI, z_TR: as in the forward pass.
        to_x, to_W: also the gradients of the input, and of the base weight and bias.
    """
    x = W = bias = a = b = None
    if to_x:
        x = slope_TO @ (linear.merged() if linear.merges else linear.W_OI)
    if to_W:
        W = slope_TO.T @ x_TI
        bias = None if linear.bias_O is None else slope_TO.sum(0)
    if linear.a_RI is not None and linear.b_OR is not None and z_TR is not None:
        slope = slope_TO.float()
        u_TR = slope @ linear.b_OR
        a, b = (u_TR.T @ x_TI.float()).mul_(linear.scale), (slope.T @ z_TR).mul_(linear.scale)
        if x is not None and not linear.merges:
            x = torch.addmm(x.float(), u_TR, linear.a_RI, alpha=linear.scale).to(x_TI.dtype)
    return Gradients(x, W, bias, a, b)


def unflattened(y_TO: Tensor, x: Tensor) -> Tensor:
    """Outputs [..., O] of x [..., I] from those of its tokens; no view where there is nothing to unflatten.

    Autograd refuses a change in place of a view that a custom function gave, and Llama 4 adds to its shared expert's
    output in place.
    """
    return y_TO if x.ndim == 2 else y_TO.reshape(*x.shape[:-1], -1)


class LinearFunction(torch.autograd.Function):
    """`Linear` with the gradients of `backward_linear`; of the activations only x and z are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *weights: Tensor | None) -> Tensor:
        """Output [..., O]; `weights` are W, bias, a and b of a `Linear`."""
        linear = Linear(*weights)._replace(scale=scale)  # type: ignore[arg-type]
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO, z_TR = forward_linear(x_TI, linear)
        ctx.save_for_backward(x_TI, z_TR, *weights)
        ctx.scale, ctx.shape = scale, x.shape
        return unflattened(y_TO, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Gradients of (x, scale, W, bias, a, b)."""
        x_TI, z_TR, *weights = ctx.saved_tensors
        to_x, to_W = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        slope_TO = slope.reshape(-1, slope.shape[-1])
        linear = Linear(*weights)._replace(scale=ctx.scale)
        found = backward_linear(slope_TO, x_TI, z_TR, linear, to_x=to_x, to_W=to_W)
        x = None if found.x_TI is None else found.x_TI.reshape(ctx.shape)
        return x, None, *found[1:]


def apply_linear(x: Tensor, linear: Linear) -> Tensor:
    """`W·x + bias + s·b·(a·x)` [..., O], differentiable in all its tensors."""
    result: Tensor = LinearFunction.apply(x, linear.scale, *linear[:4])
    return result
