"""Families of GPTs: functions that return a `ModelConfig`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptsmith.model.config import ModelConfig


def gpt2(
    *,
    vocab_size: int = 50257,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 1024,
    **overrides: Any,
) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): layer norm before each sublayer, learned positions, GELU, tied embeddings."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        head_dim=head_dim or hidden_size // num_attention_heads,
        intermediate_size=intermediate_size or 4 * hidden_size,
        max_position_embeddings=max_position_embeddings,
        **{
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
            "residual_init": "scaled",
            "model_type": "gpt2",
            **overrides,
        },
    )


def qwen3(
    *,
    vocab_size: int = 151936,
    hidden_size: int = 1024,
    num_hidden_layers: int = 28,
    num_attention_heads: int = 16,
    num_key_value_heads: int | None = 8,
    head_dim: int | None = 128,
    intermediate_size: int | None = 3072,
    max_position_embeddings: int = 40960,
    **overrides: Any,
) -> ModelConfig:
    """The modern decoder in Qwen3's layout (Yang et al. 2025, 2505.09388): RoPE, RMSNorm, SwiGLU, GQA, QK-norm."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        head_dim=head_dim or hidden_size // num_attention_heads,
        intermediate_size=intermediate_size or 32 * round(hidden_size * 8 / 3 / 32),
        max_position_embeddings=max_position_embeddings,
        **{
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "position": "rope",
            "rope_theta": 10000.0,
            "mlp": "swiglu",
            "qk_norm": True,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "residual_init": "normal",
            "model_type": "qwen3",
            **overrides,
        },
    )


FAMILIES: dict[str, Callable[..., ModelConfig]] = {"gpt2": gpt2, "qwen3": qwen3}
