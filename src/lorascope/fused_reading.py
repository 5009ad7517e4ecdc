"""Reading forms of a decoder's parts: forward passes without gradients that are fast and still give every scalar.

Adapted maps run merged where the base is fp32, and scalars of modules that share an input come from one small GEMM. As
in training (`lorascope.fused`), what is not recognised runs as it is.

Shapes: B = sequences, T = tokens, D = model width, I = input width, R = directions of a module, G = of a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import Attached, find_module
from lorascope.decoders import text_decoder
from lorascope.fused import agrees, forwards, gated_parts, norm_form
from lorascope.prepacked import has_room, prepacked, prepacked_forms
from lorascope.rank1 import Forward, Linear


class SharedInput:
    """The scalars of modules that read the same tensor, from one small GEMM at the first of them."""

    def __init__(self, members: list[AdaptedModule]) -> None:
        self.a_GI = torch.cat([part.a_RI for part in members])
        if len(self.a_GI) == 1:  # two rows take half as long as one, which is no GEMM (docs/log.md)
            self.a_GI = F.pad(self.a_GI, (0, 0, 0, 1))
        self.size, self.served = len(members), 0
        self.x: weakref.ref[Tensor] | None = None  # an edited member never asks, and the others would wait for it
        self.z: Tensor

    def scalars(self, x: Tensor, rows: slice) -> Tensor:
        """Scalars [..., R] of one member, whose read vectors are `rows` of all of the group's."""
        if self.x is None or self.x() is not x:
            self.x, self.z, self.served = weakref.ref(x), x.float() @ self.a_GI.T, 0
        self.served += 1
        if self.served == self.size:
            self.x = None  # whoever comes next is of another forward pass
        return self.z[..., rows]


def shared_inputs(adapter: Adapter) -> list[tuple[SharedInput, slice]]:
    """For each module of an adapter the group that it shares its input with, and its rows in it.

    Queries, keys and values of a layer share theirs, and gate and up; whether they do is seen at every call.
    """
    together = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    groups: dict[tuple[str, str], list[AdaptedModule]] = {}
    keys = []
    for part in adapter.modules:
        parent, _, name = part.path.rpartition(".")
        key = (parent, next((min(names) for names in together if name in names), name))
        keys.append(key)
        groups.setdefault(key, []).append(part)
    shared = {key: SharedInput(members) for key, members in groups.items()}
    found, used = [], dict.fromkeys(groups, 0)
    for part, key in zip(adapter.modules, keys, strict=True):
        found.append((shared[key], slice(used[key], used[key] + len(part.a_RI))))
        used[key] += len(part.a_RI)
    return found


@contextmanager
def fused_reading(attached: Attached) -> Iterator[int]:
    """Inside, forward passes without gradients are fast and still give every scalar; gives the number of parts.

    Adapted maps of an fp32 base run merged, in one GEMM; those of other bases add the directions' term in fp32. Scalars
    of modules that share an input are computed together, with an fp32 base only where they are read. In
    `attached.as_base` the maps run alone. Edited maps, and parts that are not recognised, run in the forms of `attach`.
    On a CPU the maps multiply by prepacked weights. Where a share of the free memory holds merged and packed weights
    they are made once, else in every pass: memory decides what scalars cost and not what they are.
    """
    model, adapter = attached.model, beside_weights(attached.model, attached.adapter)
    keep = has_room(model)
    # Of unadapted maps only: attach gave the others a forward. A head packed for every few positions would be slow.
    forms: dict[nn.Module, Forward] = prepacked_forms(model if keep else text_decoder(model), keep=keep)
    for index, (part, (shared, rows)) in enumerate(zip(adapter.modules, shared_inputs(adapter), strict=True)):
        module = find_module(model, part)
        if type(module) is nn.Linear:
            linear = Linear(module.weight, module.bias, part.a_RI, part.b_OR, part.scale)
            merge = partial(merged_form, linear)
            merged = cache(merge) if keep else merge
            forms[module] = partial(read_linear, attached, index, linear, merged, shared, rows, module.forward)
    for module in model.modules():
        form = norm_form(module) or (partial(read_mlp, module) if gated_parts(module) else None)
        if form is not None and agrees(module, form):
            forms[module] = form
    with forwards(forms):
        yield len(forms)


def beside_weights(model: Any, adapter: Adapter) -> Adapter:
    """The adapter with each module's directions on the device of the weight that they are added to."""
    devices = [next(find_module(model, part).parameters()).device for part in adapter.modules]
    modules = [
        replace(part, a_RI=part.a_RI.to(device), b_OR=part.b_OR.to(device))
        for part, device in zip(adapter.modules, devices, strict=True)
    ]
    return replace(adapter, modules=tuple(modules))


def merged_form(linear: Linear) -> Forward:
    """An fp32 map with its directions added to the weight."""
    return prepacked(linear.merged(), linear.bias_O)


def read_mlp(module: Any, x: Tensor) -> Tensor:
    """A gated MLP without gradients, its products formed in place."""
    inner: Tensor = F.silu(module.gate_proj(x), inplace=True).mul_(module.up_proj(x))
    result: Tensor = module.down_proj(inner)
    return result


def read_linear(
    attached: Attached,
    index: int,
    linear: Linear,
    merged: Callable[[], Forward],
    shared: SharedInput,
    rows: slice,
    edited: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """An adapted map; its scalars go to who reads them. `edited` is what runs where an edit touches it."""
    if any(active.local[index] is not None for active in attached.edits):
        return edited(x)
    if attached.readings or not (linear.merges or attached.base_run):
        z = attached._pass_scalars(index, shared.scalars(x, rows))
    if attached.base_run:
        return F.linear(x, linear.W_OI, linear.bias_O)
    if linear.merges:
        return merged()(x)
    assert linear.b_OR is not None
    y = F.linear(x, linear.W_OI, linear.bias_O)
    return (y.float() + F.linear(z * linear.scale, linear.b_OR)).to(y.dtype)
