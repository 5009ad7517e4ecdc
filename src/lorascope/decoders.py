"""Finding one's way in a model of any architecture: its text decoder and the linear maps of the decoder's layers."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lorascope.addresses import LAYER_PATTERN, group_of, locate_modules


def text_decoder(model: Any) -> Any:
    """The module whose forward takes token ids and gives `last_hidden_state`, without the LM head.

    In a multimodal model it is the language model alone, whose layers have the same numbers as the vision tower's. A
    module that is no transformers model is its own decoder.
    """
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Llama 4's text model, on its own, says that the decoder is the causal LM itself.
    if found is model and isinstance(inner := getattr(model, "model", None), nn.Module):
        return inner
    return found


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """(input width, output width) of a linear map, None for other modules.

    Known by attributes and not by a table of classes: `nn.Linear` and its quantised kin, and transformers' `Conv1D`.
    """
    for inner, outer in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(module, inner) and hasattr(module, outer):
            return int(getattr(module, inner)), int(getattr(module, outer))
    return None


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps inside the text decoder's numbered layers, by path: what an adapter can be trained on."""
    return {path: module for path, module in layer_modules(model) if linear_sizes(module) and not routes(module)}


def layer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules inside the text decoder's numbered layers, with their paths in the model."""
    inside = set(text_decoder(model).modules())
    for path, module in model.named_modules():
        if module in inside and LAYER_PATTERN.search(path):
            yield path, module


def routes(module: nn.Module) -> bool:
    """Whether a module chooses experts: Llama 4's is an `nn.Linear` that gives more than its product."""
    return "router" in type(module).__name__.lower()


def not_linear(model: nn.Module) -> list[str]:
    """Weights of the layers that no direction can be put on, such as fused experts: `mlp.experts.down_proj`."""
    linear = set(linear_modules(model).values())
    found: dict[str, None] = {}
    for path, module in layer_modules(model):
        for name, weight in module.named_parameters(recurse=False):
            match = LAYER_PATTERN.search(f"{path}.{name}")
            if match and weight.ndim > 1 and module not in linear:
                found[match[2].removesuffix(".weight")] = None
    return list(found)


def in_no_group(model: nn.Module) -> list[str]:
    """Types of the layers' linear maps that are neither in `attn` nor in `mlp`, such as those of a Mamba mixer."""
    types = (type_ for _, type_ in locate_modules(linear_modules(model)).values())
    return list(dict.fromkeys(type_ for type_ in types if group_of(type_) is None))
