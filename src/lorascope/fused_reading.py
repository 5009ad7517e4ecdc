"""Reading forms of a decoder's parts: forward passes without gradients that are fast and still give every scalar.

Adapted maps run merged where the base is fp32, scalars of modules that share an input come from one small GEMM, and a
gated MLP takes some rows at a time. As in training (`lorascope.fused`), what is not recognised runs as it is.

Shapes: B = sequences, T = tokens, D = model width, I = input width, R = directions of a module, G = of a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import Attached, find_module
from lorascope.fused import agrees, forwards, gated_parts, norm_form
from lorascope.memory import SHARE, free_memory
from lorascope.rank1 import Linear

PIECE = 1024
"""Tokens that a CPU takes through a gated MLP at once: what lies between its products stays near the cores, which
takes 4 to 5% from a pass over 2,000 tokens of SmolLM2 (docs/log.md)."""


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


@dataclass(frozen=True)
class ReadMap:
    """An adapted linear map in its reading form; its scalars go to who reads them.

    Attributes:
        index: number of the module in the adapter.
        merged: gives `linear`'s merged weight.
        shared, rows: the group that the module shares its input with, and its read vectors in it.
        edited: what runs where an edit touches the module.
    """

    attached: Attached
    index: int
    linear: Linear
    merged: Callable[[], Tensor]
    shared: SharedInput
    rows: slice
    edited: Callable[[Tensor], Tensor]

    @property
    def touched(self) -> bool:
        """Whether an edit acts on the module now."""
        return any(active.local[self.index] is not None for active in self.attached.edits)

    @property
    def is_product(self) -> bool:
        """Whether the output is one product now, in which no scalar has a part of its own."""
        return not self.touched and (self.linear.merges or self.attached.base_run)

    def product(self) -> Callable[[Tensor], Tensor]:
        """What gives the output where it is one product: with the base's weight in a base run, else the merged one."""
        weight_OI = self.linear.W_OI if self.attached.base_run else self.merged()
        return partial(F.linear, weight=weight_OI, bias=self.linear.bias_O)

    def scalars(self, x: Tensor) -> Tensor:
        """Scalars [..., R] fp32 of an input, not yet passed to who reads them."""
        return self.shared.scalars(x, self.rows)

    @property
    def is_read(self) -> bool:
        """Whether someone reads scalars now."""
        return bool(self.attached.readings)

    def give(self, z: Tensor) -> Tensor:
        """Pass scalars [..., R] to who reads them; gives those that act."""
        return self.attached._pass_scalars(self.index, z)

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output, like x."""
        if self.touched:
            return self.edited(x)
        if self.is_product:
            if self.is_read:
                self.give(self.scalars(x))
            return self.product()(x)
        assert self.linear.b_OR is not None
        z = self.give(self.scalars(x))
        y = F.linear(x, self.linear.W_OI, self.linear.bias_O)
        return (y.float() + F.linear(z * self.linear.scale, self.linear.b_OR)).to(y.dtype)


@contextmanager
def fused_reading(attached: Attached) -> Iterator[int]:
    """Inside, forward passes without gradients are fast and still give every scalar; gives the number of parts.

    Adapted maps of an fp32 base run merged, in one GEMM; those of other bases add the directions' term in fp32. Scalars
    of modules that share an input are computed together, with an fp32 base only where they are read. In
    `attached.as_base` the maps run alone. Edited maps, and parts that are not recognised, run in the forms of `attach`.
    Merged weights are made once where a share of the free memory holds them, else anew in every pass.
    """
    model, adapter = attached.model, beside_weights(attached.model, attached.adapter)
    forms: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    size = sum(next(find_module(model, part).parameters()).nbytes for part in adapter.modules)
    kept = size <= free_memory(model.device) // SHARE
    for index, (part, (shared, rows)) in enumerate(zip(adapter.modules, shared_inputs(adapter), strict=True)):
        module = find_module(model, part)
        if type(module) is nn.Linear:
            linear = Linear(module.weight, module.bias, part.a_RI, part.b_OR, part.scale)
            merged = cache(linear.merged) if kept else linear.merged
            forms[module] = ReadMap(attached, index, linear, merged, shared, rows, module.forward)
    for module in model.modules():
        form = norm_form(module) or (partial(read_mlp, module) if gated_parts(module) else None)
        if form is not None and agrees(module, form):
            forms[module] = form
    with forwards(forms):
        yield len(forms)


def read_mlp(module: Any, x: Tensor) -> Tensor:
    """A gated MLP [..., D] without gradients; what lies between its products is formed in place.

    On a CPU many tokens go through it in pieces, where each map is one product and nobody waits for it with a hook.
    """
    parts = [module.gate_proj, module.up_proj, module.down_proj]
    maps = [part.__dict__.get("forward", part) for part in parts]
    tokens = x.shape[:-1].numel()
    if x.device.type != "cpu" or tokens <= PIECE or not all(map(in_pieces, parts, maps)):
        whole: Tensor = module.down_proj(F.silu(module.gate_proj(x), inplace=True).mul_(module.up_proj(x)))
        return whole
    for part in maps[:2]:
        if isinstance(part, ReadMap) and part.is_read:
            part.give(part.scalars(x))
    gate, up, down = (part.product() if isinstance(part, ReadMap) else part for part in maps)
    outputs, scalars = [], []
    for piece in x.flatten(0, -2).tensor_split(-(-tokens // PIECE)):
        inner = F.silu(gate(piece), inplace=True).mul_(up(piece))
        outputs.append(down(inner))
        if isinstance(maps[2], ReadMap) and maps[2].is_read:
            scalars.append(maps[2].scalars(inner))
    if scalars:
        maps[2].give(torch.cat(scalars).unflatten(0, x.shape[:-1]))
    return torch.cat(outputs).unflatten(0, x.shape[:-1])


def in_pieces(module: nn.Module, form: Callable[[Tensor], Tensor]) -> bool:
    """Whether a map may take some tokens at a time: its output is one product, and no hook would see them apart."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (form.is_product if isinstance(form, ReadMap) else form is module)


def beside_weights(model: Any, adapter: Adapter) -> Adapter:
    """The adapter with each module's directions on the device of the weight that they are added to."""
    devices = [next(find_module(model, part).parameters()).device for part in adapter.modules]
    modules = [
        replace(part, a_RI=part.a_RI.to(device), b_OR=part.b_OR.to(device))
        for part, device in zip(adapter.modules, devices, strict=True)
    ]
    return replace(adapter, modules=tuple(modules))
