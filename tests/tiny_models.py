"""Tiny random decoders and adapters for equality tests."""

from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorascope.adapter import Adapter, initial_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "falcon": (FalconConfig, FalconForCausalLM),
    "bloom": (BloomConfig, BloomForCausalLM),
}


def tiny_model(kind: str = "llama", **changes: Any) -> Any:
    """A random fp32 model in eval mode, large enough weights that every part matters."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config(**SIZES | {"initializer_range": 0.2} | changes)).eval()


def random_adapter(model: Any, rank: int = 1, seed: int = 1, **choice: Any) -> Adapter:
    """An adapter whose write vectors are random too, strong enough to change the logits visibly."""
    adapter = initial_adapter(model, rank=rank, seed=seed, **choice)
    generator = torch.Generator().manual_seed(seed)
    for module in adapter.modules:
        module.a_RI.mul_(5)
        module.b_OR.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.05)
    return adapter
