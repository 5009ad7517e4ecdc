"""The norms between a model's residual stream and the maps that read it and write to it, found by a forward pass.

Architectures name and place their norms in many ways: before each block, after it, on both sides, one before two
parallel blocks. So nothing is read off names: a map reads through the norm whose output is its input, and writes
through the norm whose input is its output.

Shapes: K = vectors, D = width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorascope.addresses import LAYER_PATTERN, READ, WRITE, side_of
from lorascope.decoders import text_decoder
from lorascope.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from lorascope.adapter import Adapter

Passed = dict[str, tuple[Tensor, Tensor]]
"""First input and first output of modules, by path."""


@dataclass(frozen=True)
class Norm:
    """What a norm does to a vector beside dividing it by a length: subtract its mean (LayerNorm), weigh its entries."""

    gamma_D: Tensor
    """fp32, on the CPU."""
    centred: bool

    def of_write(self, vectors_KD: Tensor) -> Tensor:
        """γ ⊙ (v - mean v): what comes out where v is added to the norm's input."""
        centred_KD = vectors_KD - vectors_KD.mean(dim=-1, keepdim=True) if self.centred else vectors_KD
        return centred_KD * self.gamma_D.to(vectors_KD.device)

    def of_read(self, vectors_KD: Tensor) -> Tensor:
        """The vector that reads from the norm's input what a reads from its output, up to the length."""
        weighed_KD = vectors_KD * self.gamma_D.to(vectors_KD.device)
        return weighed_KD - weighed_KD.mean(dim=-1, keepdim=True) if self.centred else weighed_KD


@dataclass(frozen=True)
class Norms:
    """The final norm, and by module path those that reads and writes pass; None where they pass none."""

    final: Norm
    reads: dict[str, Norm | None] = field(default_factory=dict)
    writes: dict[str, Norm | None] = field(default_factory=dict)


@torch.inference_mode()
def find_norms(model: Any, adapter: Adapter) -> Norms:
    """The norms around an adapter's maps; those that neither read nor write the residual stream alone are left out.

    Raises:
        BadInput: no final norm is found, or a norm is neither an RMS norm nor a LayerNorm.
    """
    decoder, embedding_VD = text_decoder(model), model.get_input_embeddings().weight
    parts = [part for part in adapter.modules if part.layer is not None and side_of(part.type)]
    inside = set(decoder.modules())
    norms = {path: module for path, module in model.named_modules() if module in inside and is_norm(module)}
    layers = {layer_of(part.path): model.get_submodule(layer_of(part.path)) for part in parts}
    watched = norms | layers | {part.path: model.get_submodule(part.path) for part in parts}
    ids_1T = torch.tensor([[3, 1, 4, 1, 5]], device=embedding_VD.device) % len(embedding_VD)
    passed, last_1TD = watch(watched, lambda: decoder(input_ids=ids_1T, use_cache=False).last_hidden_state)
    width = embedding_VD.shape[1]
    known: dict[str, Norm] = {}

    def measured(path: str) -> Norm:
        if path not in known:
            known[path] = measure_norm(model, norms[path], width)
        return known[path]

    outer = [path for path in norms if path in passed and not LAYER_PATTERN.search(path)]
    final = next((path for path in outer if same(passed[path][1], last_1TD)), None)
    if final is None or last_1TD.shape[-1] != width:
        raise unknown_architecture(model, "a norm, as wide as the embedding, right before the LM head")
    found = Norms(measured(final))
    for part in parts:
        layer = layer_of(part.path)
        own = [path for path in norms if path in passed and path.startswith(f"{layer}.")]
        if part.path not in passed:
            continue
        seen, given = passed[part.path]
        if side_of(part.type) == WRITE and given.shape[-1] == width:
            after = next((path for path in own if same(passed[path][0], given)), None)
            found.writes[part.path] = measured(after) if after else None
        elif side_of(part.type) == READ and seen.shape[-1] == width:
            before = next((path for path in own if same(passed[path][1], seen)), None)
            if before or is_residual(seen, passed[layer][0], [passed[path][1] for path in own]):
                found.reads[part.path] = measured(before) if before else None
    return found


def watch(modules: dict[str, nn.Module], run: Callable[[], Tensor]) -> tuple[Passed, Tensor]:
    """First input and output of modules, as far as they run, and what `run` gives."""
    passed: Passed = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(result, Tensor):
                passed[path] = (given, result)

        return hook

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(keep(path), with_kwargs=True).remove)
        return passed, run()


def is_norm(module: nn.Module) -> bool:
    """Whether a module calls itself a norm."""
    return "norm" in type(module).__name__.lower()


def layer_of(path: str) -> str:
    """The path of the numbered layer that a module is in."""
    match = LAYER_PATTERN.search(path)
    return path[: match.end(1)] if match else ""


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same vectors, in any arrangement of the tokens."""
    return (
        first.numel() == second.numel() and first.shape[-1] == second.shape[-1] and first.equal(second.view_as(first))
    )


def is_residual(x: Tensor, entering: Tensor, added: Sequence[Tensor]) -> bool:
    """Whether a map's input is the residual stream itself: as it enters the layer, or after one block."""
    sums = [entering, *(entering + part.view_as(entering) for part in added if part.numel() == entering.numel())]
    return any(torch.allclose(x.view_as(entering).float(), one.float(), rtol=1e-3, atol=1e-4) for one in sums)


def measure_norm(model: Any, norm: nn.Module, width: int) -> Norm:
    """γ, whatever the norm calls or adds to it, and whether it subtracts the mean: read off what it does to vectors.

    Raises:
        BadInput: it is neither an RMS norm nor a LayerNorm.
    """
    generator = torch.Generator().manual_seed(0)
    sign_D = torch.ones(width)
    sign_D[torch.randperm(width, generator=generator)[: width // 2]] = -1  # mean 0
    weight = next(norm.parameters(), model.get_input_embeddings().weight)  # OLMo's norms have none
    device, dtype = weight.device, weight.dtype
    sign_D = sign_D.to(device)
    size = 256.0  # so large that the norm's epsilon vanishes, and exact in any precision
    other_D = (size * (torch.randn(width, generator=generator) + 0.5)).to(device, dtype).float()
    plus_D, minus_D, given_D = norm(torch.stack([size * sign_D, -size * sign_D, other_D]).to(dtype)).float()
    gamma_D, bias_D = (plus_D - minus_D) / 2 * sign_D, (plus_D + minus_D) / 2
    for centred in (False, True):
        seen_D = other_D - other_D.mean() if centred else other_D
        wanted_D = gamma_D * seen_D / seen_D.square().mean().sqrt() + bias_D
        if width % 2 == 0 and torch.allclose(given_D, wanted_D, rtol=0, atol=3e-2 * float(gamma_D.abs().max())):
            return Norm(gamma_D.cpu(), centred)
    raise unknown_architecture(model, "RMS norms or LayerNorms")


def unknown_architecture(model: Any, wanted: str) -> BadInput:
    """The one sentence for a model that the lens cannot see through."""
    return BadInput(f"The lens does not know the architecture {type(model).__name__}: it needs {wanted}.")
