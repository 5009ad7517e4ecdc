"""Adapters as directions: PEFT folders in and out, effects and norms. Their names are in `addresses`.

Shapes: N = directions (columns), R = rank of one module, I = input width, O = output width.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from lorascope.addresses import (
    GROUPS,
    address_of,
    group_of,
    in_columns,
    locate_modules,
    parse_layers,
    rank_addresses,
    select,
)
from lorascope.decoders import linear_modules, linear_sizes, not_linear
from lorascope.errors import BadInput
from lorascope.peft_files import PREFIX, read_config, read_vectors

OTHER_TOWER = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|multi_?modal)[^.]*\.")


@dataclass(frozen=True)
class AdaptedModule:
    """The directions of one adapted matrix: it becomes `W + scale · b_OR · a_RI`."""

    path: str
    """Module path in the transformers model, e.g. `model.layers.12.mlp.gate_proj`."""
    layer: int | None
    type: str
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    columns: slice
    """Where this module's directions stand among all N columns."""

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.a_RI.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as directions in column order (`addresses.sort_key`, rank index). Weights are fp32."""

    modules: tuple[AdaptedModule, ...]
    config: dict[str, Any]
    """The PEFT configuration it came from, or that it is saved with."""

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Read a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors`).

        Raises:
            BadInput: files are missing or damaged, or the adapter is of a kind that directions cannot express.
        """
        folder = Path(folder)
        config = read_config(folder)
        weights = {
            path: (torch.from_numpy(a_RI), torch.from_numpy(b_OR), scale)
            for path, (a_RI, b_OR, scale) in read_vectors(folder, config).items()
        }
        return build_adapter(weights, config)

    def save(self, folder: str | Path) -> None:
        """Write a PEFT folder that PEFT, vLLM and lm-eval load. Scales are carried by alpha and alpha_pattern.

        Over another adapter: a crash leaves the old one, the new one, or weights without a configuration, which
        nobody reads; never the one's weights with the other's configuration.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for module in self.modules:
            tensors[f"{PREFIX}{module.path}.lora_A.weight"] = module.a_RI.detach().float().contiguous().cpu()
            tensors[f"{PREFIX}{module.path}.lora_B.weight"] = module.b_OR.detach().float().contiguous().cpu()
        names = ("adapter_model.safetensors", "adapter_config.json")
        new_weights, new_config = (folder / f".{name}.tmp" for name in names)
        try:
            new_config.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(tensors, new_weights, metadata={"format": "pt"})
            (folder / names[1]).unlink(missing_ok=True)
            os.replace(new_weights, folder / names[0])
            os.replace(new_config, folder / names[1])
        finally:
            new_weights.unlink(missing_ok=True)
            new_config.unlink(missing_ok=True)

    @cached_property
    def addresses(self) -> list[str]:
        """The N addresses in column order, e.g. `L12.gate`, or `L12.gate#1` at rank above 1."""
        return [name for m in self.modules for name in rank_addresses(m.layer, m.type, m.rank)]

    @cached_property
    def module_addresses(self) -> list[str]:
        """One address per module, without rank index."""
        return [address_of(module.layer, module.type) for module in self.modules]

    @property
    def basis_dependent(self) -> bool:
        """Whether some matrix has several directions, whose single rows depend on the basis (see `to_svd_basis`)."""
        return any(module.rank > 1 for module in self.modules)

    @cached_property
    def read_norms(self) -> NDArray[np.float32]:
        """‖a‖ of each direction, float32 [N]."""
        return np.concatenate([m.a_RI.norm(dim=1).numpy() for m in self.modules]).astype(np.float32)

    @cached_property
    def write_norms(self) -> NDArray[np.float32]:
        """‖b‖ of each direction, float32 [N]."""
        return np.concatenate([m.b_OR.norm(dim=0).numpy() for m in self.modules]).astype(np.float32)

    @cached_property
    def effect_per_scalar(self) -> NDArray[np.float32]:
        """s·‖b‖ of each direction, float32 [N]: effect = this × scalar."""
        scales = np.concatenate([np.full(m.rank, m.scale) for m in self.modules])
        return (scales * self.write_norms).astype(np.float32)

    def text_only(self) -> "Adapter":
        """The same without the modules of a multimodal model's vision or audio tower, which text gives no scalars.

        Raises:
            BadInput: nothing is left.
        """
        kept = {m.path: (m.a_RI, m.b_OR, m.scale) for m in self.modules if not OTHER_TOWER.search(m.path)}
        if not kept:
            raise BadInput("The adapter adapts no part that text runs through, only that for images or sound.")
        return (
            self if len(kept) == len(self.modules) else build_adapter(kept, {**self.config, "target_modules": [*kept]})
        )

    def to_svd_basis(self) -> "Adapter":
        """The same weight change in its singular basis: each read vector of length 1, directions by singular value.

        `s·b·a = U·S·Vᵀ` becomes a = Vᵀ, b = U·S / s. Signs are fixed by the largest entry of each read vector.
        """
        return replace(self, modules=tuple(svd_module(m) for m in self.modules))


def svd_module(module: AdaptedModule) -> AdaptedModule:
    """One module in its singular basis; the product b·a is unchanged."""
    qb_OR, rb = torch.linalg.qr(module.b_OR.double())
    qa_IR, ra = torch.linalg.qr(module.a_RI.double().T)
    u, s_R, vt = torch.linalg.svd(rb @ ra.T)
    a_RI, b_OR = vt @ qa_IR.T, (qb_OR @ u) * s_R
    peaks = a_RI.abs().argmax(dim=1, keepdim=True)
    sign_R = torch.where(a_RI.gather(1, peaks) < 0, -1.0, 1.0)
    return replace(module, a_RI=(a_RI * sign_R).float(), b_OR=(b_OR * sign_R.T).float())


def build_adapter(weights: dict[str, tuple[Tensor, Tensor, float]], config: dict[str, Any]) -> Adapter:
    """An adapter from `{module path: (a [R, I], b [O, R], scale)}`, put into column order."""
    modules = []
    for place in in_columns({path: a_RI.shape[0] for path, (a_RI, _, _) in weights.items()}):
        a_RI, b_OR, scale = weights[place.path]
        where = (place.path, place.layer, place.type)
        modules.append(AdaptedModule(*where, a_RI.detach().float(), b_OR.detach().float(), scale, place.columns))
    return Adapter(tuple(modules), config)


def initial_adapter(
    model: nn.Module,
    *,
    patterns: str | Sequence[str] = "attn,mlp",
    layers: str = "*",
    rank: int = 1,
    alpha: float = 16.0,
    rslora: bool = True,
    seed: int = 0,
    base_name: str = "",
) -> Adapter:
    """An untrained adapter on a model: read vectors uniform in ±1/√I as in PEFT, write vectors zero.

    Args:
        patterns: which module types or addresses to adapt.
        layers: a layer `12`, a range `0-9`, a stride `0-29:3`, a pattern `*` or `2[0-9]`, or a comma list of these.

    Raises:
        BadInput: nothing matches.
    """
    modules = linear_modules(model)
    located = locate_modules(modules)
    addresses = {path: address_of(*place) for path, place in located.items()}
    given = patterns.split(",") if isinstance(patterns, str) else patterns
    present = {group_of(type_) for _, type_ in located.values()}
    for group in (pattern.strip() for pattern in given):
        if group in GROUPS and group not in present:
            others = ", ".join(not_linear(model)) or "none"
            raise BadInput(
                f"{type(model).__name__} has no linear map in the group {group!r} (weights that are none: {others}); "
                f"choose others, such as --modules {next((g for g in GROUPS if g in present), '*')!r}."
            )
    chosen = select(list(addresses.values()), patterns)
    numbers = parse_layers(layers, 1 + max((layer for layer, _ in located.values() if layer is not None), default=0))
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, tuple[Tensor, Tensor, float]] = {}
    for (path, _), hit in zip(addresses.items(), chosen, strict=True):
        if not hit or located[path][0] not in numbers:
            continue
        width, height = linear_sizes(modules[path]) or (0, 0)
        a_RI = (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
        weights[path] = (a_RI, torch.zeros(height, rank), alpha / (math.sqrt(rank) if rslora else rank))
    if not weights:
        raise BadInput(f"No module matches {patterns!r} in layers {layers!r}.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(hasattr(modules[path], "nx") for path in weights),  # PEFT's word for Conv1D
        "inference_mode": True,
    }
    elsewhere = [path for path, module in model.named_modules() if path not in located and linear_sizes(module)]
    return build_adapter(weights, config | target_config(weights, located, elsewhere))


def target_config(
    weights: Iterable[str], located: dict[str, tuple[int | None, str]], elsewhere: Iterable[str] = ()
) -> dict[str, Any]:
    """PEFT's `target_modules`: bare names (and layers) where they say it all, else full paths.

    Args:
        located: the linear maps of the decoder's layers.
        elsewhere: those of the rest of the model, which bare names would match too.
    """
    chosen = set(weights)
    names = sorted({path.rsplit(".", 1)[-1] for path in chosen})
    layers = sorted({layer for path in chosen if (layer := located[path][0]) is not None})
    by_name = {path for path in located if path.rsplit(".", 1)[-1] in names and located[path][0] in layers}
    if by_name != chosen or any(path.rsplit(".", 1)[-1] in names for path in elsewhere):
        return {"target_modules": sorted(chosen)}
    every = {place[0] for place in located.values()}
    return {"target_modules": names} | ({} if set(layers) == every else {"layers_to_transform": layers})
