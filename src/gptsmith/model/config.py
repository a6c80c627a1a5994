"""The shape of a model: plain data, named as Hugging Face names it, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptsmith.errors import UsageError


@dataclass(frozen=True)
class ModelConfig:
    """Every choice that makes one GPT differ from another.

    A model *family* (`gptsmith.model.families`) fills these in; the transformer reads them once, when it is built.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """The context: the largest number of tokens that attend to one another."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    position: Literal["learned", "rope"]
    rope_theta: float | None
    mlp: Literal["gelu", "gelu_tanh", "swiglu"]
    qk_norm: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    residual_init: Literal["normal", "scaled"]
    """`scaled`: projections into the residual stream start 1/sqrt(2·layers) smaller (GPT-2, section 2.3)."""
    model_type: str
    """The Hugging Face layout it is saved in (`gpt2`, `qwen3`)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.position == "rope" and (self.head_dim % 2 or self.rope_theta is None):
            raise UsageError(f"rotary positions need an even head_dim (it is {self.head_dim}) and a rope_theta.")
