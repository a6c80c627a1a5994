"""Phi-3 and Phi-4: Llama with queries, keys and values in one matrix, gate and up in another, and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    activation_to_hf,
    gated_activation,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
)
from gptsmith.formats.hf_weights import WeightMapping
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **MODERN_FIELDS,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_TABLE = {
    "attention_norm": "input_layernorm",
    "attention.qkv_proj": "self_attn.qkv_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def mappings(c: ModelConfig) -> list[WeightMapping]:
    layers = [
        WeightMapping(f"layers.{i}.{local}.weight", (f"model.layers.{i}.{hf}.weight",))
        for i in range(c.num_hidden_layers)
        for local, hf in _TABLE.items()
    ]
    return [
        WeightMapping("embed_tokens.weight", ("model.embed_tokens.weight",)),
        *layers,
        WeightMapping("norm.weight", ("model.norm.weight",)),
    ]


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    s = c.rope_scaling
    if s is not None and s.kind != "longrope":
        raise CheckpointError(f"the phi3 layout supports no rope scaling but longrope, not {s.kind}.")
    if c.sliding_window is not None and not all(c.window_of(i) for i in range(c.num_hidden_layers)):
        raise CheckpointError("the phi3 layout supports no sliding window in only some layers.")
    return {
        **shared_to_hf(c, "Phi3ForCausalLM"),
        **rope_keys_to_hf(c),
        "head_dim": c.head_dim,
        "hidden_act": activation_to_hf(c, gated=True),
        "partial_rotary_factor": c.partial_rotary_factor,
        "original_max_position_embeddings": (s and s.original_max_position_embeddings) or c.max_position_embeddings,
        "sliding_window": c.sliding_window,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    rope = rope_from_hf(hf, kinds=("default", "longrope"), renamed={"su": "longrope", "yarn": "longrope"})
    shared = shared_from_hf(hf)
    window = hf["sliding_window"]
    return families.phi3(
        **shared
        | {
            "head_dim": hf.get("head_dim") or shared["head_dim"],
            **rope.fields(hf["max_position_embeddings"]),
            "mlp": gated_activation(hf["hidden_act"]),
            "sliding_window": window,
            "window_pattern": () if window is None else (True,),
        }
    )


LAYOUT = Layout(mappings, config_to_hf, config_from_hf, r".*\.rotary_emb\.inv_freq", "model.", FIELDS)
