"""SmolLM3: Llama with no positions in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    activation_to_hf,
    gated_activation,
    layer_types,
    rope_from_hf,
    rope_keys_to_hf,
    shared_from_hf,
    shared_to_hf,
    shortest_pattern,
    whole_heads,
    windows_from_types,
)
from gptsmith.formats.hf_weights import llama_mappings
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **MODERN_FIELDS,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    types = layer_types(c)
    return {
        **shared_to_hf(c, "SmolLM3ForCausalLM"),
        **rope_keys_to_hf(c),
        "head_dim": c.head_dim,
        "hidden_act": activation_to_hf(c, gated=True),
        "no_rope_layers": [int(c.rope_of(i) != "none") for i in range(c.num_hidden_layers)],  # 1: with positions
        "layer_types": types,
        "use_sliding_window": "sliding_attention" in types,
        "sliding_window": c.sliding_window if "sliding_attention" in types else None,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    shared = shared_from_hf(hf)
    layers, head_dim = shared["num_hidden_layers"], hf.get("head_dim") or shared["head_dim"]
    rope = whole_heads(rope_from_hf(hf, theta=2000000.0), head_dim)
    interval, rotary = hf["no_rope_layer_interval"], hf["no_rope_layers"]
    if rotary is None:
        rotary = [(i + 1) % interval != 0 for i in range(layers)]
    elif len(rotary) < layers:
        raise CheckpointError(f"config.json has {len(rotary)} no_rope_layers, but num_hidden_layers={layers}.")
    rotary = [bool(each) for each in rotary[:layers]]
    in_use = hf["use_sliding_window"] and hf["sliding_window"] is not None
    window, window_pattern = windows_from_types(hf, [in_use and not each for each in rotary])
    return families.smollm3(
        **shared
        | {
            "head_dim": head_dim,
            **rope.fields(hf["max_position_embeddings"]),
            "rope_pattern": () if all(rotary) else shortest_pattern(rotary),
            "mlp": gated_activation(hf["hidden_act"]),
            "sliding_window": window,
            "window_pattern": window_pattern,
            "attention_bias": bool(hf["attention_bias"]),
            "mlp_bias": bool(hf["mlp_bias"]),
        }
    )


LAYOUT = Layout(llama_mappings, config_to_hf, config_from_hf, r".*\.rotary_emb\.inv_freq", "model.", FIELDS)
