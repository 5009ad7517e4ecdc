"""Linear maps whose weight is laid out once for a CPU's products, for weights that many forward passes use.

torch multiplies fp32 matrices by MKL, which arranges the weight anew in each product; oneDNN, which torch has too, can
keep it arranged. On an AMD CPU that takes 8 to 12% less time at a thousand rows and half the time at 24 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.fused import forwards
from lorascope.memory import SHARE, free_memory
from lorascope.rank1 import Forward


@contextmanager
def prepacked_maps(model: nn.Module) -> Iterator[int]:
    """Inside, the model's plain fp32 maps on a CPU multiply by prepacked weights; gives the number of these maps.

    An adapter that is attached inside stands on them. Weights must not change inside. Where a gradient is wanted, and
    where a share of the free memory does not hold the copies, the maps run as they are.
    """
    forms = prepacked_forms(model, keep=True) if has_room(model) else {}
    with forwards(forms):
        yield len(forms)


def prepacked_forms(model: nn.Module, *, keep: bool) -> dict[nn.Module, Forward]:
    """Forwards of a model's plain maps by weights that are packed at the first use, or, not kept, at every use."""
    forms: dict[nn.Module, Forward] = {}
    for module in model.modules():
        if prepackable(module):
            pack = partial(prepacked, module.weight, module.bias)
            forms[module] = partial(run_prepacked, module.weight, module.bias, cache(pack) if keep else pack)
    return forms


def prepackable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear map, in fp32 on a CPU, that nobody gave another forward."""
    return type(module) is nn.Linear and "forward" not in module.__dict__ and gains(module.weight)


def has_room(model: nn.Module) -> bool:
    """Whether a share of the free memory holds copies of all of a model's linear maps."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return not weights or sum(weight.nbytes for weight in weights) <= free_memory(weights[0].device) // SHARE


def run_prepacked(weight_OI: Tensor, bias_O: Tensor | None, packed: Callable[[], Forward], x: Tensor) -> Tensor:
    """A linear map by its prepacked form; as it is where a gradient is wanted."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        return F.linear(x, weight_OI, bias_O)
    return packed()(x)


def prepacked(weight_OI: Tensor, bias_O: Tensor | None = None) -> Forward:
    """`W·x + bias` [..., O] of x [..., I], without gradients; W and the bias must not change while it is used.

    Other devices and precisions than a CPU's fp32, and builds of torch that cannot do it, run `F.linear`.
    """
    if not gains(weight_OI):
        return partial(F.linear, weight=weight_OI, bias=bias_O)
    return partial(product, packed=arranged(weight_OI), bias_O=None if bias_O is None else bias_O.contiguous())


def gains(weight_OI: Tensor) -> bool:
    """Whether a weight is one that packing is for."""
    return weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and packs()


def arranged(weight_OI: Tensor) -> Tensor:
    """A copy of a weight in the layout that oneDNN chooses."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
    return result


def product(x: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    """`W·x + bias` by oneDNN.

    Raises:
        RuntimeError: x wants a gradient, which would be lost.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("Prepacked weights pass no gradient; run them under torch.no_grad().")
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")
    return result


@cache
@torch.no_grad()
def packs() -> bool:
    """Whether this build of torch has the operators, which its compiler uses and nobody promises, and they agree."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 24), (40, 24), (40,))
    x, weight_OI, bias_O = (torch.randn(*shape, generator=generator, device="cpu") for shape in shapes)
    try:
        got, wanted = product(x, arranged(weight_OI), bias_O), F.linear(x, weight_OI, bias_O)
        return bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())
    except Exception:  # a build without it, or with another signature, fails in any of the ways that code can
        return False
