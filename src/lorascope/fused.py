"""Training forms of a decoder's parts: RMS norms, gated MLPs, adapted linear maps and the loss at the LM head.

Each computes what the module it stands for computes, with its gradient written out: fewer passes over memory, and
only what cannot be had again cheaply is kept for the backward pass. Parts are found by structure and replaced only
where a probe shows that they agree with the module's own forward; whatever is not recognised runs as it is.

Shapes: T = tokens (leading dimensions flattened), D = model width, I = inner width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import MISSING, find_module, wide_linear
from lorascope.rank1 import Linear, apply_linear, backward_linear, forward_linear, unflattened

HEAD_CHUNK = 512
"""Positions whose logits exist at once: 512 x 49,152 fp32 logits are 100 MB; with fewer the products are slower."""


class NormFunction(torch.autograd.Function):
    """`w · x / rms(x)` over the last dimension, computed in fp32; w's gradient only where it is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Output like x."""
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight_D)
        return (wide * inverse).to(x.dtype) * weight_D

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """dx = r·(g - x·r²·mean(g·x)) with g = w·slope and r = 1/rms."""
        x, inverse, weight_D = ctx.saved_tensors
        wide = x.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (slope.float() * wide * inverse).flatten(0, -2).sum(0).to(weight_D.dtype)
        g = slope.float() * weight_D.float()
        mean = torch.linalg.vecdot(g, wide)[..., None] / x.shape[-1]
        grad = g.mul_(inverse).addcmul_(wide, mean * inverse.pow(3), value=-1)
        return grad.to(x.dtype), grad_weight, None


class GatedMLPFunction(torch.autograd.Function):
    """`down(silu(gate(x)) · up(x))`; keeps x and the outputs of gate and up, and forms the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, float, float], *weights: Tensor | None) -> Tensor:
        """Output like x; `weights` are the four tensors of each of the gate's, up's and down's `Linear`."""
        gate, up, down = three_linears(scales, weights)
        x_TD = x.reshape(-1, x.shape[-1])
        gate_TI, z_gate = forward_linear(x_TD, gate)
        up_TI, z_up = forward_linear(x_TD, up)
        y_TD, z_down = forward_linear(F.silu(gate_TI).mul_(up_TI), down)
        ctx.save_for_backward(x_TD, gate_TI, up_TI, z_gate, z_up, z_down, *weights)
        ctx.scales, ctx.shape = scales, x.shape
        return unflattened(y_TD, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Gradients of (x, scales, weights)."""
        x_TD, gate_TI, up_TI, z_gate, z_up, z_down, *weights = ctx.saved_tensors
        gate, up, down = three_linears(ctx.scales, weights)
        to_x, to_W = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        slope_TD = slope.reshape(-1, slope.shape[-1])
        silu_TI = F.silu(gate_TI)
        from_down = backward_linear(slope_TD, silu_TI * up_TI, z_down, down, to_W=to_W)
        slope_TI = from_down.x_TI
        assert slope_TI is not None
        from_up = backward_linear(silu_TI.mul_(slope_TI), x_TD, z_up, up, to_x=to_x, to_W=to_W)
        slope_gate = torch.ops.aten.silu_backward(slope_TI.mul_(up_TI), gate_TI)
        from_gate = backward_linear(slope_gate, x_TD, z_gate, gate, to_x=to_x, to_W=to_W)
        x = None
        if from_gate.x_TI is not None and from_up.x_TI is not None:
            x = from_gate.x_TI.add_(from_up.x_TI).reshape(ctx.shape)
        return x, None, *from_gate[1:], *from_up[1:], *from_down[1:]


def three_linears(scales: tuple[float, float, float], weights: Any) -> list[Linear]:
    """The gate, up and down maps from their flat tensors."""
    return [Linear(*weights[4 * i : 4 * i + 4])._replace(scale=scale) for i, scale in enumerate(scales)]


class HeadLossFunction(torch.autograd.Function):
    """Summed negative log-likelihood of targets, with its gradients formed in the forward pass, chunk by chunk.

    So that no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
        """The sum, fp32, nats."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        slopes = []
        slope_VD = torch.zeros_like(weight_VD) if needs_weight else None
        # Logits rounded to bfloat16 are off by more than what a single direction does to them.
        wide_VD = weight_VD.float()
        for hidden, targets in zip(hidden_MD.split(HEAD_CHUNK), targets_M.split(HEAD_CHUNK), strict=True):
            scores = wide_linear(hidden, wide_VD)
            wanted = scores.gather(1, targets[:, None])
            largest = scores.amax(dim=1, keepdim=True)
            total = scores.sub_(largest).exp_().sum(dim=1, keepdim=True)
            loss = loss + (total.log() + largest - wanted).sum()
            if not (needs_hidden or needs_weight):
                continue
            # Formed whole in fp32: of a token that the model is sure of, p - 1 is less than the rounding of p.
            slope = scores.div_(total).scatter_add_(1, targets[:, None], torch.full_like(total, -1)).to(weight_VD.dtype)
            if needs_hidden:
                slopes.append((slope @ weight_VD).to(hidden.dtype))
            if slope_VD is not None:
                slope_VD.addmm_(slope.T, hidden.to(weight_VD.dtype))
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, slope_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        """The kept gradients, times what comes from above."""
        slope_MD, slope_VD = ctx.saved_tensors
        return (
            None if slope_MD is None else slope_MD * scale.to(slope_MD.dtype),
            None if slope_VD is None else slope_VD.mul_(scale),
            None,
        )


def head_loss(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Summed negative log-likelihood, nats fp32, of `targets_M` under logits `hidden·weightᵀ`."""
    if not torch.is_grad_enabled():  # a trainable weight would still be taken to want its gradient
        hidden_MD, weight_VD = hidden_MD.detach(), weight_VD.detach()
    result: Tensor = HeadLossFunction.apply(hidden_MD, weight_VD, targets_M)
    return result


def plain_head(model: Any) -> Tensor | None:
    """The LM head's weight [V, D] where logits are nothing but its product with the hidden state, else None."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scaled = any(getattr(config, name, 1.0) not in (None, 1.0) for name in ("logit_scale", "logits_scaling"))
    if type(head) is not nn.Linear or head.bias is not None or scaled:
        return None
    return None if getattr(config, "final_logit_softcapping", None) else head.weight


def norm_form(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The training form of an RMS norm, None for other modules."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)  # Gemma 3n and 4 have norms without one
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    return lambda x: NormFunction.apply(x, module.weight, eps)


def mlp_form(module: nn.Module, parts: dict[int, AdaptedModule]) -> Callable[[Tensor], Tensor] | None:
    """The training form of a gated MLP of three plain linear maps with SiLU, None for other modules."""
    inner = gated_parts(module)
    if not inner:
        return None
    linears = [as_linear(linear, parts) for linear in inner]
    scales = tuple(linear.scale for linear in linears)
    weights = [weight for linear in linears for weight in linear[:4]]
    return lambda x: GatedMLPFunction.apply(x, scales, *weights)


def gated_parts(module: nn.Module) -> list[nn.Linear]:
    """The gate, up and down maps of a gated MLP with SiLU, all plain; nothing for other modules."""
    inner = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = [linear for linear in inner if type(linear) is nn.Linear]
    return plain if len(plain) == 3 and "SiLU" in type(getattr(module, "act_fn", None)).__name__ else []


def linear_form(module: nn.Module, parts: dict[int, AdaptedModule]) -> Callable[[Tensor], Tensor] | None:
    """The training form of an adapted plain linear map, None for other modules."""
    if id(module) not in parts or type(module) is not nn.Linear:
        return None
    return partial(apply_linear, linear=as_linear(module, parts))


def as_linear(module: nn.Linear, parts: dict[int, AdaptedModule]) -> Linear:
    """A module's weights with the adapter's directions on it, if any."""
    part = parts.get(id(module))
    if part is None:
        return Linear(module.weight, module.bias)
    return Linear(module.weight, module.bias, part.a_RI, part.b_OR, part.scale)


@torch.no_grad()
def agrees(module: Any, form: Callable[[Tensor], Tensor]) -> bool:
    """Whether a form gives what the module's own forward gives for random inputs; not where either fails."""
    # An RMS norm has a vector of its input's width, a linear map [out, in]; a gated MLP begins with its gate's.
    weight = getattr(module, "gate_proj", module).weight
    width = weight.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator).to(weight.device, weight.dtype)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
    try:
        wanted, got = module(x).float(), form(x).float()
        return bool((wanted - got).abs().max() <= tolerance * wanted.abs().max())
    except Exception:  # its forward takes or gives something else, and fails in any of the ways that code can
        return False


@contextmanager
def fused(model: Any, adapter: Adapter | None) -> Iterator[int]:
    """Inside, the recognised parts of the model run in their training forms; gives the number of these parts.

    Use it inside `attach(model, adapter)`, whose forms stay where a part is not recognised. Scalars are not read and
    edits do not act in a training form.
    """
    parts = {id(find_module(model, part)): part for part in adapter.modules} if adapter else {}
    forms: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        form = norm_form(module) or mlp_form(module, parts) or linear_form(module, parts)
        if form is not None and agrees(module, form):
            forms[module] = form
            inside |= set(module.children())
    with forwards(forms):
        yield len(forms)


@contextmanager
def forwards(forms: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, modules run the given forwards; afterwards what they ran before."""
    before = {module: module.__dict__.get("forward", MISSING) for module in forms}
    try:
        for module, form in forms.items():
            module.__dict__["forward"] = form
        yield
    finally:
        for module, forward in before.items():
            if forward is MISSING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
