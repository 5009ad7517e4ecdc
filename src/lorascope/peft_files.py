"""Reading PEFT's LoRA files: what directions can express, and its rules for rank and alpha. Nothing here loads torch.

Shapes: R = rank of one module, I = input width, O = output width.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from lorascope.errors import BadInput

PREFIX = "base_model.model."
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
Vectors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32], float]]
"""`{module path: (a_RI, b_OR, scale)}`: the matrix becomes `W + scale · b_OR · a_RI`."""


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a PEFT LoRA."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise BadInput(f"{folder} is not a PEFT adapter: adapter_config.json is missing.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not valid JSON ({error}).") from error
    refuse_unknown(config, folder)
    return config


def refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    """Refuse by name what a read and a write vector per direction cannot express."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"{folder} is a {kind} adapter; lorascope reads LORA adapters only.")
    if config.get("bias", "none") not in ("none", None):
        raise BadInput(f"{folder} trains biases (bias={config['bias']!r}), which are not directions; use bias='none'.")
    refused = {
        "use_dora": "DoRA rescales the whole weight",
        "modules_to_save": "whole modules were trained beside the LoRA",
        "lora_bias": "the LoRA has biases",
        "target_parameters": "it adapts bare parameters (fused experts)",
        "trainable_token_indices": "token embeddings were trained beside the LoRA",
        "alora_invocation_tokens": "an activated LoRA is off for part of the text",
        "layer_replication": "it replicates layers of the base",
        "corda_config": "CorDA changes the base weights",
        "use_qalora": "QA-LoRA pools the input",
        "use_bdlora": "block-diagonal LoRA has no plain read vectors",
        "arrow_config": "Arrow routes between adapters",
    }
    for key, why in refused.items():
        if config.get(key):
            raise BadInput(f"{folder} cannot be read as directions: {key} is set ({why}).")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise BadInput(
            f"{folder} was initialised by {start}, which changes the base weights; convert it to a plain LoRA."
        )


def read_vectors(folder: Path, config: dict[str, Any]) -> Vectors:
    """The read and write vectors of a PEFT folder's modules, in the order of the file.

    Args:
        config: what `read_config` gave.

    Raises:
        BadInput: the file is missing or damaged, or holds what directions cannot express.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        hint = " (adapter_model.bin is a pickle and is not opened)" if (folder / "adapter_model.bin").exists() else ""
        raise BadInput(f"{folder} has no adapter_model.safetensors{hint}; save the adapter as safetensors.")
    pairs = pair_arrays(read_arrays(file), folder)
    return {path: (a_RI, b_OR, module_scale(config, path, len(a_RI))) for path, (a_RI, b_OR) in pairs.items()}


def read_arrays(file: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a safetensors file as float32, in their order there."""
    try:
        tensors = deserialize(file.read_bytes())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged ({error}); fetch or train the adapter again.") from error
    return {name: float32_of(tensor, f"{file}: {name}") for name, tensor in tensors}


def float32_of(tensor: dict[str, Any], name: str) -> NDArray[np.float32]:
    """A tensor of a file as an array. numpy has no bfloat16, which is the first half of a float32."""
    kind, data = tensor["dtype"], tensor["data"]
    if kind == "BF16":
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif kind in FLOATS:
        values = np.frombuffer(data, FLOATS[kind]).astype(np.float32)
    else:
        raise BadInput(f"{name} is of type {kind}; save the adapter in float32, bfloat16 or float16.")
    return values.reshape(tensor["shape"])


def pair_arrays(
    arrays: dict[str, NDArray[np.float32]], folder: Path
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """`{module path: (a [R, I], b [O, R])}` from PEFT's keys; any other key is refused by name."""
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, array in arrays.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if not match:
            raise BadInput(f"{folder} holds a tensor that is not a LoRA matrix: {key}.")
        if array.ndim != 2:
            raise BadInput(f"{folder}: {key} has {array.ndim} dimensions; only LoRA of linear layers is read.")
        halves.setdefault(match[1], {})[match[2]] = array
    pairs = {}
    for path, half in halves.items():
        if set(half) != {"A", "B"}:
            raise BadInput(f"{folder}: {path} has lora_{next(iter(half))} only; the file is incomplete.")
        a_RI, b_OR = half["A"], half["B"]
        if a_RI.shape[0] != b_OR.shape[1]:
            raise BadInput(f"{folder}: the ranks of lora_A and lora_B of {path} differ.")
        pairs[path] = (a_RI, b_OR)
    if not pairs:
        raise BadInput(f"{folder} holds no LoRA matrices.")
    return pairs


def module_scale(config: dict[str, Any], path: str, rank: int) -> float:
    """`alpha/r`, or `alpha/√r` for rsLoRA, with PEFT's patterns (a key matches the end of the module's path)."""
    r = pattern_value(config.get("rank_pattern"), path, config.get("r", rank))
    if r != rank:
        raise BadInput(f"adapter_config.json says rank {r} for {path}, but its matrices have rank {rank}.")
    alpha = pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def pattern_value(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that equals, or as a regex ends, the path."""
    for key, value in (patterns or {}).items():
        if key == path or re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
