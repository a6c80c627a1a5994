"""GPT-NeoX and Pythia: parallel blocks, rotary positions over a quarter of each head.

Queries, keys and values are one matrix, a head's three below each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.formats.hf_config import (
    ACTIVATIONS,
    MODERN_FIELDS,
    activation_to_hf,
    choice,
    require_plain_heads,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
)
from gptsmith.formats.hf_weights import Interleaved, WeightMapping, weight_and_bias
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **{key: MODERN_FIELDS[key] for key in ("initializer_range", "tie_word_embeddings", "rope_parameters")},
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
}


def mappings(c: ModelConfig) -> list[WeightMapping]:
    result = [WeightMapping("embed_tokens.weight", ("gpt_neox.embed_in.weight",))]
    for i in range(c.num_hidden_layers):
        local, hf = f"layers.{i}.", f"gpt_neox.layers.{i}."
        qkv = Interleaved(3, c.head_dim)
        result += [
            *weight_and_bias(f"{local}attention_norm", f"{hf}input_layernorm"),
            *weight_and_bias(
                f"{local}attention.qkv_proj", f"{hf}attention.query_key_value", bias=c.attention_bias, reordered=qkv
            ),
            *weight_and_bias(f"{local}attention.o_proj", f"{hf}attention.dense", bias=c.attention_bias),
            *weight_and_bias(f"{local}mlp_norm", f"{hf}post_attention_layernorm"),
            *weight_and_bias(f"{local}mlp.up_proj", f"{hf}mlp.dense_h_to_4h"),
            *weight_and_bias(f"{local}mlp.down_proj", f"{hf}mlp.dense_4h_to_h"),
        ]
    return result + weight_and_bias("norm", "gpt_neox.final_layer_norm")


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    require_plain_heads(c)
    rope = rope_keys_to_hf(c)
    values = shared_to_hf(c, "GPTNeoXForCausalLM", norm_eps="layer_norm_eps")
    del values["num_key_value_heads"]
    return values | {
        "hidden_act": activation_to_hf(c, gated=False),
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": c.attention_bias,
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": c.partial_rotary_factor,
        "rope_parameters": rope["rope_parameters"],
        **({"rope_scaling": rope["rope_scaling"]} if c.rope_scaling is not None else {}),
        "hidden_dropout": 0.0,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    rope = rope_from_hf(hf, theta_key="rotary_emb_base", part=0.25, part_key="rotary_pct")
    shared = shared_from_hf({**hf, "num_key_value_heads": None}, norm_eps="layer_norm_eps")
    return families.gpt_neox(
        **shared
        | {
            **rope.fields(hf["max_position_embeddings"]),
            "mlp": choice(hf["hidden_act"], ACTIVATIONS, "hidden_act"),
            "parallel_residual": bool(hf["use_parallel_residual"]),
            "attention_bias": bool(hf["attention_bias"]),
        }
    )


LAYOUT = Layout(
    mappings,
    config_to_hf,
    config_from_hf,
    r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    "gpt_neox.",
    FIELDS,
    head="embed_out.weight",
)
