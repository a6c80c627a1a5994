"""Gemma 3's text models: norms before and after each layer, five layers with a sliding window to one without, which has
rotary positions of its own, and embeddings times the square root of the width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import (
    MODERN_FIELDS,
    Rope,
    activation_to_hf,
    gated_activation,
    layer_types,
    rope_from_hf,
    rope_to_hf,
    shared_from_hf,
    shared_to_hf,
    windows_from_types,
)
from gptsmith.formats.hf_weights import llama_mappings
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **{key: MODERN_FIELDS[key] for key in ("initializer_range", "rms_norm_eps", "rope_parameters")},
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_THETA, _LOCAL_THETA = 1e6, 1e4
_ROPE_TYPES = ("default", "linear", "llama3")


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    scalar = c.head_dim if c.attention_scale is None else max(1, round(c.attention_scale**-2))
    if c.attention_scale not in (None, scalar**-0.5):
        raise CheckpointError(
            f"the gemma3_text layout supports no attention_scale but 1/sqrt(an integer), not {c.attention_scale}."
        )
    if not c.qk_norm:
        raise CheckpointError("the gemma3_text layout requires norms of queries and keys (qk_norm).")
    rope, local = rope_to_hf(c), c.local_rope_theta or _LOCAL_THETA
    return {
        **shared_to_hf(c, "Gemma3ForCausalLM"),
        "head_dim": c.head_dim,
        "hidden_activation": activation_to_hf(c, gated=True),
        "attention_bias": c.attention_bias,
        "query_pre_attn_scalar": scalar,
        "sliding_window": c.sliding_window or FIELDS["sliding_window"],  # required, though no layer may have it
        "layer_types": layer_types(c),
        # Both spellings: transformers 4 reads the first three, transformers 5 the last.
        "rope_theta": c.rope_theta,
        "rope_local_base_freq": local,
        "rope_scaling": None if c.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if hf[key]:
            raise CheckpointError(f"config.json has {key}={hf[key]!r}, which is not supported.")
    shared = shared_from_hf(hf)
    layers, period = shared["num_hidden_layers"], hf.get("sliding_window_pattern", 6)
    window, pattern = windows_from_types(hf, [(i + 1) % period != 0 for i in range(layers)])
    (rope, local), scalar = _ropes(hf), hf["query_pre_attn_scalar"]
    return families.gemma3(
        **shared
        | {
            "head_dim": hf["head_dim"],
            "rope_theta": rope.theta,
            "rope_scaling": rope.scaling,
            "local_rope_theta": local.theta if pattern else None,
            "mlp": gated_activation(hf["hidden_activation"]),
            "attention_bias": bool(hf["attention_bias"]),
            "attention_scale": None if scalar == hf["head_dim"] else float(scalar) ** -0.5,
            "sliding_window": window,
            "window_pattern": pattern,
        }
    )


def _ropes(hf: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """Return the rotary positions of layers without a window, and of those with one."""
    given = hf["rope_parameters"] or {}
    kinds = ("full_attention", "sliding_attention")
    if unknown := sorted(given.keys() - set(kinds)):
        raise CheckpointError(f"config.json has the RoPE options {', '.join(unknown)}, which are not supported.")
    full, sliding = (given.get(kind) or {} for kind in kinds)
    full = {**full, **(hf.get("rope_scaling") or {})}
    context = {"max_position_embeddings": hf["max_position_embeddings"]}
    rope = rope_from_hf(
        {"rope_parameters": full, "rope_theta": hf.get("rope_theta"), **context}, theta=_THETA, kinds=_ROPE_TYPES
    )
    local = rope_from_hf(
        {"rope_parameters": sliding, "rope_theta": hf.get("rope_local_base_freq"), **context},
        theta=_LOCAL_THETA,
        kinds=("default",),
    )
    return rope, local


LAYOUT = Layout(llama_mappings, config_to_hf, config_from_hf, r".*\.rotary_emb\.inv_freq", "model.", FIELDS)
