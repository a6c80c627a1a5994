"""Families of GPTs: functions that return a `ModelConfig`. A family is its defaults; any field can be overridden."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptsmith.errors import UsageError, nearest
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.registry import Registry


def _build(defaults: dict[str, Any], overrides: dict[str, Any], *, feed_forward: Callable[[int], int]) -> ModelConfig:
    """Merge defaults and overrides, and derive the fields that are None or missing from the others."""
    values = {**defaults, **overrides}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        values["head_dim"] = hidden // heads
    rotary = values["head_dim"] * values.get("partial_rotary_factor", 1.0)
    if rotary != values["head_dim"] and "partial_rotary_factor" not in overrides:  # whole pairs, at least one
        values["partial_rotary_factor"] = max(2, 2 * round(rotary / 2)) / values["head_dim"]
    if values.get("intermediate_size") is None:
        values["intermediate_size"] = feed_forward(hidden)
    if values.get("shared_expert_intermediate_size", 0) is None:  # as wide as all experts of a token together
        values["shared_expert_intermediate_size"] = values["num_experts_per_tok"] * values["intermediate_size"]
    return ModelConfig(**values)


def _four_times(hidden: int) -> int:
    return 4 * hidden


def _gated(hidden: int) -> int:
    """Return about 8/3 of the width: three such matrices cost what two of four times the width do (2002.05202)."""
    return 32 * round(hidden * 8 / 3 / 32)


_OPENAI: dict[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "rope_theta": None,
    "mlp": "gelu_tanh",
    "qk_norm": False,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

_MODERN: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rope",
    "rope_theta": 10000.0,
    "mlp": "swiglu",
    "qk_norm": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "residual_init": "normal",
}


def gpt1(**overrides: Any) -> ModelConfig:
    """GPT-1 (Radford et al. 2018): post-norm, learned positions, context 512, a BPE of 40,478 tokens."""
    defaults = {
        **_OPENAI,
        "vocab_size": 40478,
        "max_position_embeddings": 512,
        "norm_position": "post",
        "residual_init": "normal",
        "model_type": "openai-gpt",
    }
    return _build(defaults, overrides, feed_forward=_four_times)


def gpt2(**overrides: Any) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): pre-norm with LayerNorm, learned positions, GELU, tied embeddings."""
    defaults = {**_OPENAI, "residual_init": "scaled", "model_type": "gpt2"}
    return _build(defaults, overrides, feed_forward=_four_times)


def gpt3(**overrides: Any) -> ModelConfig:
    """GPT-3 (Brown et al. 2020, 2005.14165): GPT-2 with alternating dense and sliding-window layers, context 2048.

    The window is 256 tokens, as in GPT-Neo; the paper does not give it. Scores are scaled by the power of two nearest
    to 1/√head_dim: GPT-Neo's layout has no scale, so it is folded into the query weights when they are saved, and with
    a power of two that loses no bit.
    """
    defaults = {
        **_OPENAI,
        "max_position_embeddings": 2048,
        "sliding_window": 256,
        "window_pattern": (False, True),
        "attention_bias": False,
        "attention_output_bias": True,
        "residual_init": "scaled",
        "model_type": "gpt_neo",
    }
    config = _build(defaults, overrides, feed_forward=_four_times)
    if config.attention_scale is None:
        config = replace(config, attention_scale=2.0 ** -round(math.log2(config.head_dim) / 2))
    return config


def llama(**overrides: Any) -> ModelConfig:
    """Llama (Touvron et al. 2023, 2302.13971; Llama 3.2 1B's size): RoPE, RMSNorm, SwiGLU, grouped queries."""
    defaults = {
        **_MODERN,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "model_type": "llama",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def mistral(**overrides: Any) -> ModelConfig:
    """Mistral 7B (Jiang et al. 2023, 2310.06825): Llama with a sliding window in every layer."""
    defaults = {
        **_MODERN,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768,
        "norm_eps": 1e-5,
        "sliding_window": 4096,
        "window_pattern": (True,),
        "model_type": "mistral",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def qwen2(**overrides: Any) -> ModelConfig:
    """Qwen2 (Yang et al. 2024, 2407.10671; the 0.5B size): Llama with biases on queries, keys and values."""
    defaults = {
        **_MODERN,
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "attention_bias": True,
        "attention_output_bias": False,
        "tie_word_embeddings": True,
        "model_type": "qwen2",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def qwen3(**overrides: Any) -> ModelConfig:
    """The modern decoder in Qwen3's layout (Yang et al. 2025, 2505.09388; the 0.6B size): Llama with QK-norm."""
    defaults = {
        **_MODERN,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "qk_norm": True,
        "tie_word_embeddings": True,
        "model_type": "qwen3",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def mixtral(**overrides: Any) -> ModelConfig:
    """Mixtral 8x7B (Jiang et al. 2024, 2401.04088): Mistral's layers with eight experts, two per token."""
    defaults = {
        **_MODERN,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "model_type": "mixtral",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def qwen2_moe(**overrides: Any) -> ModelConfig:
    """Qwen1.5-MoE-A2.7B (Qwen team 2024; Qwen2's layout with experts, 2407.10671): 60 small experts, four per
    token, and a shared one as wide as those four."""
    defaults = {
        **_MODERN,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 1408,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "attention_bias": True,
        "attention_output_bias": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": None,
        "norm_topk_prob": False,
        "model_type": "qwen2_moe",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def qwen3_moe(**overrides: Any) -> ModelConfig:
    """Qwen3-30B-A3B (Yang et al. 2025, 2505.09388): Qwen3's layers with 128 small experts, eight per token."""
    defaults = {
        **_MODERN,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 768,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "qk_norm": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "model_type": "qwen3_moe",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def gpt_neox(**overrides: Any) -> ModelConfig:
    """Pythia (Biderman et al. 2023, 2304.01373; the 160M size) in GPT-NeoX's layout (Black et al. 2022, 2204.06745):
    LayerNorm, GELU, parallel blocks, rotary positions over a quarter of each head."""
    defaults = {
        **_OPENAI,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "position": "rope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mlp": "gelu",
        "parallel_residual": True,
        "tie_word_embeddings": False,
        "residual_init": "scaled",
        "model_type": "gpt_neox",
    }
    return _build(defaults, overrides, feed_forward=_four_times)


def opt(**overrides: Any) -> ModelConfig:
    """OPT (Zhang et al. 2022, 2205.01068; the 125M size): GPT-2's layers with ReLU, context 2048."""
    defaults = {
        **_OPENAI,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "position_offset": 2,
        "mlp": "relu",
        "initializer_range": 0.006,
        "residual_init": "scaled",
        "model_type": "opt",
    }
    return _build(defaults, overrides, feed_forward=_four_times)


def phi3(**overrides: Any) -> ModelConfig:
    """Phi-3 mini (Abdin et al. 2024, 2404.14219; context 4096): Llama with fused matrices and a sliding window."""
    defaults = {
        **_MODERN,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "sliding_window": 2047,
        "window_pattern": (True,),
        "model_type": "phi3",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def olmo2(**overrides: Any) -> ModelConfig:
    """OLMo 2 (Walsh et al. 2025, 2501.00656; the 1B size): Llama with norms after attention and feed-forward layer
    instead of before them, and a norm of all heads of queries and keys together."""
    defaults = {
        **_MODERN,
        "vocab_size": 100352,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "norm_position": "reordered",
        "qk_norm": True,
        "qk_norm_scope": "all",
        "model_type": "olmo2",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def stablelm(**overrides: Any) -> ModelConfig:
    """StableLM 2 1.6B (Bellagente et al. 2024, 2402.17834): LayerNorm, SwiGLU, biases on queries, keys and values,
    rotary positions over a quarter of each head."""
    defaults = {
        **_MODERN,
        "vocab_size": 100352,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "intermediate_size": 5632,
        "max_position_embeddings": 4096,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "attention_bias": True,
        "attention_output_bias": False,
        "qk_norm_scope": "heads",
        "model_type": "stablelm",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def smollm3(**overrides: Any) -> ModelConfig:
    """SmolLM3 3B (Hugging Face 2025): Llama without positions in every fourth layer (NoPE, 2501.18795)."""
    defaults = {
        **_MODERN,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "rope_theta": 5e6,
        "rope_pattern": (True, True, True, False),
        "tie_word_embeddings": True,
        "model_type": "smollm3",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def gemma3(**overrides: Any) -> ModelConfig:
    """Gemma 3 (Gemma team 2025, 2503.19786; the 1B size, text only): norms before and after each layer, GELU with a
    gate, QK-norm, five layers with a sliding window to one without."""
    defaults = {
        **_MODERN,
        "vocab_size": 262144,
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "norm_position": "sandwich",
        "zero_centered_norm": True,
        "rope_theta": 1e6,
        "local_rope_theta": 1e4,
        "sliding_window": 512,
        "window_pattern": (True, True, True, True, True, False),
        "mlp": "gated_gelu_tanh",
        "qk_norm": True,
        "scale_embeddings": True,
        "tie_word_embeddings": True,
        "model_type": "gemma3_text",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def gpt_oss(**overrides: Any) -> ModelConfig:
    """gpt-oss (OpenAI 2025, 2508.10925; the 20B size): 32 experts with a clamped SwiGLU, four per token, attention
    sinks, a sliding window in every other layer, biases."""
    defaults = {
        **_MODERN,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "window_pattern": (True, False),
        "attention_bias": True,
        "attention_sinks": True,
        "mlp": "clamped_swiglu",
        "mlp_bias": True,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "router_bias": True,
        "model_type": "gpt_oss",
    }
    return _build(defaults, overrides, feed_forward=_gated)


def deepseek_v3(**overrides: Any) -> ModelConfig:
    """DeepSeek-V3 (2024, 2412.19437): latent attention; after three dense layers 256 small experts, eight per token,
    and a shared one."""
    defaults = {
        **_MODERN,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "head_dim": 192,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 2048,
        "max_position_embeddings": 4096,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": None,
        "shared_expert_gate": False,
        "first_k_dense_replace": 3,
        "router_scoring": "sigmoid",
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "router_aux_loss_coef": 0.0001,
        "model_type": "deepseek_v3",
    }
    return _build_deepseek(defaults, overrides)


def _build_deepseek(defaults: dict[str, Any], overrides: dict[str, Any]) -> ModelConfig:
    """Derive what follows from other sizes in DeepSeek-V3, as far as it is not given: of a smaller model, too."""
    values = {**defaults, **overrides}
    given = {key for key, value in overrides.items() if value is not None or key == "q_lora_rank"}
    hidden, heads, experts = values["hidden_size"], values["num_attention_heads"], values["num_experts"]
    derived: dict[str, Any] = {}
    if "head_dim" in given or hidden != defaults["hidden_size"]:
        head_dim = values["head_dim"] if "head_dim" in given else max(4, hidden // heads // 2 * 2)
        derived = {
            "head_dim": head_dim,
            "qk_rope_head_dim": max(2, head_dim // 6 * 2),
            "v_head_dim": max(1, head_dim * 2 // 3),
            "kv_lora_rank": max(2, hidden // 14),
            "q_lora_rank": max(2, hidden * 3 // 14),
        }
    if values["intermediate_size"] is None:
        values["intermediate_size"] = max(1, 2 * hidden // 7)
    derived["shared_expert_intermediate_size"] = values["intermediate_size"]
    derived["dense_intermediate_size"] = 9 * values["intermediate_size"]
    derived["first_k_dense_replace"] = min(defaults["first_k_dense_replace"], values["num_hidden_layers"] // 2)
    if experts % (4 * defaults["n_group"]):
        derived |= {"n_group": 1, "topk_group": 1}
    values |= {key: value for key, value in derived.items() if key not in given}
    return _build(values, {}, feed_forward=_gated)


FAMILIES: Registry[Callable[..., ModelConfig]] = Registry(
    "model family",
    {
        "gpt1": gpt1,
        "gpt2": gpt2,
        "gpt3": gpt3,
        "llama": llama,
        "mistral": mistral,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "mixtral": mixtral,
        "qwen2_moe": qwen2_moe,
        "qwen3_moe": qwen3_moe,
        "gpt_neox": gpt_neox,
        "opt": opt,
        "phi3": phi3,
        "olmo2": olmo2,
        "stablelm": stablelm,
        "smollm3": smollm3,
        "gemma3": gemma3,
        "gpt_oss": gpt_oss,
        "deepseek_v3": deepseek_v3,
    },
)


def register_family(name: str, make: Callable[..., ModelConfig]) -> None:
    """Make a family known as `name`, to `--model.family` too.

    make: returns a configuration: the published one without arguments, else with the given fields changed, as `llama`
        and the others here do. Its `model_type` decides the Hugging Face layout in which models are saved.
    """
    FAMILIES.register(name, make)


def _size(layers: int, hidden: int, heads: int, kv_heads: int | None = None, wide: int | None = None) -> dict[str, Any]:
    """Return overrides for a size: depth, width, heads, key/value heads and feed-forward width."""
    values = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    optional = {"num_key_value_heads": kv_heads, "intermediate_size": wide}
    return values | {key: value for key, value in optional.items() if value is not None}


def _llama_128k(factor: float) -> dict[str, Any]:
    """Return how Llama 3.1 and 3.2 extend the context from 8K to 128K tokens (2407.21783, section 3.4.2)."""
    return {"max_position_embeddings": 131072, "rope_scaling": RopeScaling("llama3", factor, 8192)}


_GEMMA_128K: dict[str, Any] = {  # of the sizes that are trained with pictures, too
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": RopeScaling("linear", 8.0),
}

_GPT_OSS_128K: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rope_scaling": RopeScaling("yarn", 32.0, 4096, truncate=False),
}

# Published sizes: the family, and what differs from its defaults.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1-117m": ("gpt1", {}),
    "gpt2-124m": ("gpt2", {}),
    "gpt2-355m": ("gpt2", _size(24, 1024, 16)),
    "gpt2-774m": ("gpt2", _size(36, 1280, 20)),
    "gpt2-1.5b": ("gpt2", _size(48, 1600, 25)),
    # Table 2.1 of 2005.14165. Where width is not heads · head_dim there (1.3B, 13B), the width counts.
    "gpt3-125m": ("gpt3", _size(12, 768, 12)),
    "gpt3-350m": ("gpt3", _size(24, 1024, 16)),
    "gpt3-760m": ("gpt3", _size(24, 1536, 16)),
    "gpt3-1.3b": ("gpt3", _size(24, 2048, 16)),
    "gpt3-2.7b": ("gpt3", _size(32, 2560, 32)),
    "gpt3-6.7b": ("gpt3", _size(32, 4096, 32)),
    "gpt3-13b": ("gpt3", _size(40, 5120, 40)),
    "gpt3-175b": ("gpt3", _size(96, 12288, 96)),
    "llama-7b": (
        "llama",
        {
            **_size(32, 4096, 32, wide=11008),
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
        },
    ),
    "llama3.1-8b": ("llama", {**_size(32, 4096, 32, 8, 14336), **_llama_128k(8.0)}),
    "llama3.2-1b": ("llama", {**_size(16, 2048, 32, 8, 8192), **_llama_128k(32.0), "tie_word_embeddings": True}),
    "llama3.2-3b": ("llama", {**_size(28, 3072, 24, 8, 8192), **_llama_128k(32.0), "tie_word_embeddings": True}),
    "mistral-7b": ("mistral", _size(32, 4096, 32, 8, 14336)),
    "qwen2-0.5b": ("qwen2", _size(24, 896, 14, 2, 4864)),
    "qwen2-1.5b": ("qwen2", _size(28, 1536, 12, 2, 8960)),
    "qwen2-7b": ("qwen2", {**_size(28, 3584, 28, 4, 18944), "vocab_size": 152064, "tie_word_embeddings": False}),
    "qwen3-0.6b": ("qwen3", {"rope_theta": 1e6}),
    "qwen3-1.7b": ("qwen3", {**_size(28, 2048, 16, 8, 6144), "rope_theta": 1e6}),
    "qwen3-4b": ("qwen3", {**_size(36, 2560, 32, 8, 9728), "rope_theta": 1e6}),
    "qwen3-8b": ("qwen3", {**_size(36, 4096, 32, 8, 12288), "rope_theta": 1e6, "tie_word_embeddings": False}),
    "mixtral-8x7b": ("mixtral", {}),
    "qwen1.5-moe-a2.7b": ("qwen2_moe", {}),
    "qwen2-57b-a14b": (
        "qwen2_moe",
        {
            **_size(28, 3584, 28, 4, 2560),
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 32768,
        },
    ),
    "qwen3-30b-a3b": ("qwen3_moe", {}),
    "pythia-14m": ("gpt_neox", _size(6, 128, 4)),
    "pythia-31m": ("gpt_neox", _size(6, 256, 8)),
    "pythia-70m": ("gpt_neox", _size(6, 512, 8)),
    "pythia-160m": ("gpt_neox", _size(12, 768, 12)),
    "pythia-410m": ("gpt_neox", _size(24, 1024, 16)),
    "pythia-1b": ("gpt_neox", _size(16, 2048, 8)),
    "pythia-1.4b": ("gpt_neox", _size(24, 2048, 16)),
    "pythia-2.8b": ("gpt_neox", _size(32, 2560, 32)),
    "pythia-6.9b": ("gpt_neox", {**_size(32, 4096, 32), "vocab_size": 50432}),
    "pythia-12b": ("gpt_neox", {**_size(36, 5120, 40), "vocab_size": 50688}),
    "gpt-neox-20b": ("gpt_neox", {**_size(44, 6144, 64), "vocab_size": 50432}),
    "opt-125m": ("opt", _size(12, 768, 12)),
    "opt-350m": ("opt", {**_size(24, 1024, 16), "norm_position": "post", "embedding_size": 512}),
    "opt-1.3b": ("opt", _size(24, 2048, 32)),
    "opt-2.7b": ("opt", _size(32, 2560, 32)),
    "opt-6.7b": ("opt", _size(32, 4096, 32)),
    "opt-13b": ("opt", _size(40, 5120, 40)),
    "opt-30b": ("opt", _size(48, 7168, 56)),
    "opt-66b": ("opt", _size(64, 9216, 72)),
    "phi3-mini": ("phi3", {}),
    "phi3-medium": ("phi3", _size(40, 5120, 40, 10, 17920)),
    "phi4": (
        "phi3",
        {
            **_size(40, 5120, 40, 10, 17920),
            "vocab_size": 100352,
            "max_position_embeddings": 16384,
            "rope_theta": 250000.0,
            "sliding_window": None,
            "window_pattern": (),
        },
    ),
    "phi4-mini": (
        "phi3",
        {
            **_size(32, 3072, 24, 8, 8192),
            "vocab_size": 200064,
            "partial_rotary_factor": 0.75,
            "sliding_window": None,
            "window_pattern": (),
            "tie_word_embeddings": True,
        },
    ),
    "olmo2-1b": ("olmo2", {}),
    "olmo2-7b": ("olmo2", _size(32, 4096, 32, wide=11008)),
    "olmo2-13b": ("olmo2", _size(40, 5120, 40, wide=13824)),
    "olmo2-32b": ("olmo2", _size(64, 5120, 40, 8, 27648)),
    "stablelm-3b-4e1t": (
        "stablelm",
        {**_size(32, 2560, 32, wide=6912), "vocab_size": 50304, "attention_bias": False},
    ),
    "stablelm2-1.6b": ("stablelm", {}),
    "stablelm2-12b": (
        "stablelm",
        {
            **_size(40, 5120, 32, 8, 13824),
            "attention_bias": False,
            "qk_norm": True,
            "parallel_residual": True,
            "shared_norm": True,
        },
    ),
    "smollm3-3b": ("smollm3", {}),
    "gemma3-270m": ("gemma3", _size(18, 640, 4, 1, 2048)),
    "gemma3-1b": ("gemma3", {}),
    "gemma3-4b": ("gemma3", {**_size(34, 2560, 8, 4, 10240), **_GEMMA_128K}),
    "gemma3-12b": ("gemma3", {**_size(48, 3840, 16, 8, 15360), **_GEMMA_128K}),
    "gemma3-27b": (
        "gemma3",
        {**_size(62, 5376, 32, 16, 21504), **_GEMMA_128K, "head_dim": 128, "attention_scale": 168**-0.5},
    ),
    "gpt-oss-20b": ("gpt_oss", _GPT_OSS_128K),
    "gpt-oss-120b": ("gpt_oss", {"num_hidden_layers": 36, "num_experts": 128, **_GPT_OSS_128K}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": RopeScaling("yarn", 40.0, 4096, attention_factor=1.0, mscale_all_dim=1.0),
        },
    ),
}


DEPTH_SCALED = ("llama", "mistral", "qwen2", "qwen3")  # the families that `by_depth` has proportions for


def by_depth(depth: int, family: str = "qwen3") -> dict[str, Any]:
    """Return the size of a modern model from its depth alone, from 0.6M parameters (depth 3) to 8B (depth 35).

    The keys are num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads, head_dim and
    intermediate_size. The width is about 12.7 · depth^(5/3): 128 at 4 layers and 4,096 at 32, as in published models.
    Heads are 32 wide up to width 256, 64 up to 1,024, and 128 above. From width 2,048 on, queries share 8 key/value
    heads; their number is then a multiple of 8, so that the width of all heads can differ from the model's by a fifth
    (as in Qwen3). Raises UsageError for a depth below 1, or a family with other proportions.
    """
    if family not in DEPTH_SCALED:
        raise UsageError(
            f"depth sets the size of {', '.join(DEPTH_SCALED)}, not of {family}.{nearest(family, DEPTH_SCALED)}"
        )
    if depth < 1:
        raise UsageError(f"a depth must be at least 1, not {depth}.")
    ideal = 12.7 * depth ** (5 / 3)
    width = max(128, 64 * round(ideal / 64))
    if width > 1024:
        width = 128 * round(ideal / 128)
    head_dim = 32 if width <= 256 else 64 if width <= 1024 else 128
    heads = width // head_dim
    if width >= 2048:
        heads = 8 * ((heads + 4) // 8)
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": 8 if width >= 2048 else heads,
        "head_dim": head_dim,
        "intermediate_size": _gated(width),
    }
