"""OpenAI's gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, a sliding window in every other layer.

All experts of a layer are one tensor, transposed, whose columns alternate between gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    layer_types,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
    whole_heads,
    windows_from_types,
)
from gptsmith.formats.hf_weights import Interleaved, WeightMapping, weight_and_bias
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **MODERN_FIELDS,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "router_aux_loss_coef": 0.001,
    "layer_types": None,
    "attention_bias": True,
}
_ROPE = {  # of a configuration without any
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def mappings(c: ModelConfig) -> list[WeightMapping]:
    result = [WeightMapping("embed_tokens.weight", ("model.embed_tokens.weight",))]
    gate_up = Interleaved(2, axis=-1)
    for i in range(c.num_hidden_layers):
        local, hf = f"layers.{i}.", f"model.layers.{i}."
        attention, experts = f"{hf}self_attn.", f"{hf}mlp.experts."
        for part in ("weight", "bias") if c.attention_bias else ("weight",):
            qkv = tuple(f"{attention}{letter}_proj.{part}" for letter in "qkv")
            result.append(WeightMapping(f"{local}attention.qkv_proj.{part}", qkv))
        result += [
            *weight_and_bias(f"{local}attention.o_proj", f"{attention}o_proj", bias=c.attention_bias),
            WeightMapping(f"{local}attention.sinks", (f"{attention}sinks",)),
            *weight_and_bias(f"{local}mlp.router", f"{hf}mlp.router"),
            WeightMapping(f"{local}mlp.up_proj", (f"{experts}gate_up_proj",), transposed=True, reordered=gate_up),
            WeightMapping(f"{local}mlp.up_bias", (f"{experts}gate_up_proj_bias",), reordered=gate_up),
            WeightMapping(f"{local}mlp.down_proj", (f"{experts}down_proj",), transposed=True),
            WeightMapping(f"{local}mlp.down_bias", (f"{experts}down_proj_bias",)),
            WeightMapping(f"{local}attention_norm.weight", (f"{hf}input_layernorm.weight",)),
            WeightMapping(f"{local}mlp_norm.weight", (f"{hf}post_attention_layernorm.weight",)),
        ]
    return [*result, WeightMapping("norm.weight", ("model.norm.weight",))]


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    if not c.num_experts or c.qk_norm:
        raise CheckpointError("the gpt_oss layout requires experts, and supports no qk_norm.")
    return {
        **shared_to_hf(c, "GptOssForCausalLM"),
        **rope_keys_to_hf(c),
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "experts_per_token": c.num_experts_per_tok,  # for vLLM
        "router_aux_loss_coef": c.router_aux_loss_coef,
        "output_router_logits": False,
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_limit": c.swiglu_limit,
        "sliding_window": c.sliding_window or FIELDS["sliding_window"],  # required, though no layer may have it
        "layer_types": layer_types(c),
        "attention_bias": c.attention_bias,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    if hf["rope_parameters"] is None:
        hf = {**hf, "rope_parameters": _ROPE}
    shared = shared_from_hf(hf)
    head_dim = hf["head_dim"] or shared["head_dim"]
    rope = whole_heads(rope_from_hf(hf, theta=150000.0), head_dim)
    window, pattern = windows_from_types(hf, [i % 2 == 0 for i in range(shared["num_hidden_layers"])])
    if not hf["num_local_experts"]:
        raise CheckpointError("config.json describes a gpt_oss model without experts, which is not supported.")
    return families.gpt_oss(
        **shared
        | {
            "head_dim": head_dim,
            **rope.fields(hf["max_position_embeddings"]),
            "num_experts": hf["num_local_experts"],
            "num_experts_per_tok": hf["num_experts_per_tok"],
            "router_aux_loss_coef": hf["router_aux_loss_coef"],
            "swiglu_alpha": float(hf["swiglu_alpha"]),
            "swiglu_limit": float(hf["swiglu_limit"]),
            "sliding_window": window,
            "window_pattern": pattern,
            "attention_bias": bool(hf["attention_bias"]),
        }
    )


LAYOUT = Layout(
    mappings,
    config_to_hf,
    config_from_hf,
    r".*\.rotary_emb\.inv_freq",
    "model.",
    FIELDS,
    {"num_experts": "num_local_experts"},
    stacked_experts=True,
)
