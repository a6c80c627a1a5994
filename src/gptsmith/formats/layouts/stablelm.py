"""StableLM: LayerNorm with SwiGLU, rotary positions over a quarter of each head; in the 12B model of StableLM 2,
parallel blocks and a norm for each head of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    activation_to_hf,
    gated_activation,
    require_plain_heads,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
)
from gptsmith.formats.hf_weights import llama_mappings
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **{key: value for key, value in MODERN_FIELDS.items() if key != "rms_norm_eps"},
    "vocab_size": 50304,
    "intermediate_size": 6912,
    "hidden_size": 2560,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    require_plain_heads(c)
    return {
        **shared_to_hf(c, "StableLmForCausalLM", norm_eps="layer_norm_eps"),
        **rope_keys_to_hf(c),
        "hidden_act": activation_to_hf(c, gated=True),
        "partial_rotary_factor": c.partial_rotary_factor,
        "use_qkv_bias": c.attention_bias,
        "qk_layernorm": c.qk_norm,
        "use_parallel_residual": c.parallel_residual,
        "hidden_dropout": 0.0,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    rope = rope_from_hf(hf, part=0.25)
    parallel = bool(hf["use_parallel_residual"])
    return families.stablelm(
        **shared_from_hf(hf, norm_eps="layer_norm_eps")
        | {
            **rope.fields(hf["max_position_embeddings"]),
            "mlp": gated_activation(hf["hidden_act"]),
            "attention_bias": bool(hf["use_qkv_bias"]),
            "qk_norm": bool(hf["qk_layernorm"]),
            "parallel_residual": parallel,
            "shared_norm": parallel,
        }
    )


LAYOUT = Layout(llama_mappings, config_to_hf, config_from_hf, r".*\.rotary_emb\.inv_freq", "model.", FIELDS)
