"""Tiny random models of many architectures, by name; `MODULES` has what to adapt where it is not the default."""

from typing import Any

import torch
import transformers as tf

from tiny_models import SIZES

SMALL: dict[str, Any] = SIZES | {"num_hidden_layers": 2, "initializer_range": 0.2}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = MOE | {"shared_expert_intermediate_size": 24}
NARROW: dict[str, Any] = {"head_dim": 8, "sliding_window": 64}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA4 = {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
# Special ids beyond the tiny vocabulary are warned of, or fail as the embedding's padding.
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, NARROW),
    "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, NARROW),
    "phi": (tf.PhiConfig, tf.PhiForCausalLM, {}),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {}),
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, GPT),
    "gptj": (tf.GPTJConfig, tf.GPTJForCausalLM, GPT | {"rotary_dim": 8}),
    "gpt_neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {}),
    "bloom": (tf.BloomConfig, tf.BloomForCausalLM, {"n_layer": 2, "n_head": 4}),
    "falcon": (tf.FalconConfig, tf.FalconForCausalLM, {}),
    "mpt": (tf.MptConfig, tf.MptForCausalLM, {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "opt": (tf.OPTConfig, tf.OPTForCausalLM, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "starcoder2": (tf.Starcoder2Config, tf.Starcoder2ForCausalLM, {}),
    "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM, {}),
    "cohere": (tf.CohereConfig, tf.CohereForCausalLM, {}),
    "glm4": (tf.Glm4Config, tf.Glm4ForCausalLM, {"head_dim": 8}),
    "granite": (tf.GraniteConfig, tf.GraniteForCausalLM, {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "mixtral": (tf.MixtralConfig, tf.MixtralForCausalLM, {"num_local_experts": 4}),
    "gpt_oss": (tf.GptOssConfig, tf.GptOssForCausalLM, {"head_dim": 8, "num_local_experts": 4}),
    "qwen2_moe": (tf.Qwen2MoeConfig, tf.Qwen2MoeForCausalLM, SHARED),
    "llama4": (tf.Llama4TextConfig, tf.Llama4ForCausalLM, LLAMA4),
}
MODULES = {"mixtral": "attn", "gpt_oss": "attn"}
"""Where there are no linear maps in the MLP but fused experts."""
NAMES = [*ARCHITECTURES, "gemma3_multimodal"]


def build_model(name: str, **changes: Any) -> Any:
    """A random fp32 model in eval mode, its weights without gradients."""
    torch.manual_seed(0)
    if name == "gemma3_multimodal":
        text = SMALL | NARROW | ENDS | {"num_hidden_layers": 3} | changes
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = tf.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
        model: Any = tf.AutoModelForCausalLM.from_config(config)
    else:
        configure, make, own = ARCHITECTURES[name]
        model = make(configure(**SMALL | own | ENDS | changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # norms of weight 1 could be left out unnoticed
        for path, weight in model.named_parameters():
            if weight.ndim == 1 and ("norm" in path or "ln_" in path):
                weight.add_(torch.rand(weight.shape, generator=generator) - 0.5)
    return model.eval().requires_grad_(False)
