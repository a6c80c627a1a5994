"""OLMo 2: norms of what attention and feed-forward layers return, and of all heads of queries and keys together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    activation_to_hf,
    gated_activation,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
    whole_heads,
)
from gptsmith.formats.hf_weights import llama_mappings
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **MODERN_FIELDS,
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    return {
        **shared_to_hf(c, "Olmo2ForCausalLM"),
        **rope_keys_to_hf(c),
        "head_dim": c.head_dim,
        "hidden_act": activation_to_hf(c, gated=True),
        "attention_bias": c.attention_bias,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    shared = shared_from_hf(hf)
    head_dim = hf.get("head_dim") or shared["head_dim"]
    rope = whole_heads(rope_from_hf(hf), head_dim)
    return families.olmo2(
        **shared
        | {
            "head_dim": head_dim,
            **rope.fields(hf["max_position_embeddings"]),
            "mlp": gated_activation(hf["hidden_act"]),
            "attention_bias": bool(hf["attention_bias"]),
        }
    )


LAYOUT = Layout(llama_mappings, config_to_hf, config_from_hf, r".*\.rotary_emb\.inv_freq", "model.", FIELDS)
