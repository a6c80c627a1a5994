"""DeepSeek-V3 and R1: latent attention, and experts chosen by sigmoid scores within groups, beside a shared one.

The rotated rows of queries and keys are stored as neighboring pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from gptsmith.formats.hf_weights import RotaryPairs, WeightMapping, weight_and_bias
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    **MODERN_FIELDS,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
    "attention_bias": False,
}
_PARTS = ("gate_proj", "up_proj")


def mappings(c: ModelConfig) -> list[WeightMapping]:
    assert c.kv_lora_rank is not None
    result = [WeightMapping("embed_tokens.weight", ("model.embed_tokens.weight",))]
    heads = RotaryPairs(c.head_dim, c.qk_rope_head_dim)
    latent = RotaryPairs(c.kv_lora_rank + c.qk_rope_head_dim, c.qk_rope_head_dim)
    for i in range(c.num_hidden_layers):
        local, hf = f"layers.{i}.", f"model.layers.{i}."
        ours, theirs, bias = f"{local}attention.", f"{hf}self_attn.", c.attention_bias
        if c.q_lora_rank is None:
            result += weight_and_bias(f"{ours}q_proj", f"{theirs}q_proj", bias=False, reordered=heads)
        else:
            result += [
                *weight_and_bias(f"{ours}q_a_proj", f"{theirs}q_a_proj", bias=bias),
                *weight_and_bias(f"{ours}q_a_norm", f"{theirs}q_a_layernorm", bias=False),
                *weight_and_bias(f"{ours}q_b_proj", f"{theirs}q_b_proj", bias=False, reordered=heads),
            ]
        result += [
            *weight_and_bias(f"{ours}kv_a_proj", f"{theirs}kv_a_proj_with_mqa", bias=bias, reordered=latent),
            *weight_and_bias(f"{ours}kv_a_norm", f"{theirs}kv_a_layernorm", bias=False),
            *weight_and_bias(f"{ours}kv_b_proj", f"{theirs}kv_b_proj", bias=False),
            *weight_and_bias(f"{ours}o_proj", f"{theirs}o_proj", bias=bias),
            WeightMapping(f"{local}attention_norm.weight", (f"{hf}input_layernorm.weight",)),
            WeightMapping(f"{local}mlp_norm.weight", (f"{hf}post_attention_layernorm.weight",)),
            *(_expert_mappings if c.has_experts(i) else _dense_mappings)(c, f"{local}mlp.", f"{hf}mlp."),
        ]
    return [*result, WeightMapping("norm.weight", ("model.norm.weight",))]


def _dense_mappings(c: ModelConfig, ours: str, theirs: str) -> list[WeightMapping]:
    return [
        WeightMapping(f"{ours}up_proj.weight", tuple(f"{theirs}{part}.weight" for part in _PARTS)),
        WeightMapping(f"{ours}down_proj.weight", (f"{theirs}down_proj.weight",)),
    ]


def _expert_mappings(c: ModelConfig, ours: str, theirs: str) -> list[WeightMapping]:
    experts = [f"{theirs}experts.{e}." for e in range(c.num_experts)]
    shared = f"{theirs}shared_experts."
    return [
        WeightMapping(f"{ours}router.weight", (f"{theirs}gate.weight",)),
        WeightMapping(f"{ours}score_correction_bias", (f"{theirs}gate.e_score_correction_bias",)),
        WeightMapping(f"{ours}up_proj", tuple(f"{expert}{part}.weight" for expert in experts for part in _PARTS)),
        WeightMapping(f"{ours}down_proj", tuple(f"{expert}down_proj.weight" for expert in experts)),
        WeightMapping(f"{ours}shared_up_proj.weight", tuple(f"{shared}{part}.weight" for part in _PARTS)),
        WeightMapping(f"{ours}shared_down_proj.weight", (f"{shared}down_proj.weight",)),
    ]


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.kv_lora_rank is None or not c.num_experts:
        raise CheckpointError("the deepseek_v3 layout requires latent attention and experts.")
    if c.shared_expert_intermediate_size % c.intermediate_size or not c.shared_expert_intermediate_size:
        raise CheckpointError(
            "the deepseek_v3 layout requires a shared expert whose width is a multiple of that of an expert, "
            f"{c.intermediate_size}."
        )
    return {
        **shared_to_hf(c, "DeepseekV3ForCausalLM"),
        **rope_keys_to_hf(c),
        "hidden_act": activation_to_hf(c, gated=True),
        "intermediate_size": c.dense_intermediate_size or c.intermediate_size,
        "moe_intermediate_size": c.intermediate_size,
        "n_shared_experts": c.shared_expert_intermediate_size // c.intermediate_size,
        "n_routed_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "first_k_dense_replace": c.first_k_dense_replace,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": c.norm_topk_prob,
        "routed_scaling_factor": c.routed_scaling_factor,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "kv_lora_rank": c.kv_lora_rank,
        "q_lora_rank": c.q_lora_rank,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "qk_nope_head_dim": c.head_dim - c.qk_rope_head_dim,
        "v_head_dim": c.value_dim,
        "rope_interleave": True,
        "attention_bias": c.attention_bias,
        "num_nextn_predict_layers": 0,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    rope = rope_from_hf(hf, kinds=("default", "yarn"))
    given = hf.get("rope_scaling") or hf["rope_parameters"] or {}
    scaling = rope.scaling
    if scaling is not None and given.get("mscale_all_dim"):
        scaling = replace(scaling, mscale_all_dim=float(given["mscale_all_dim"]))
    for key, supported in (("rope_interleave", True), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1)):
        if hf.get(key, supported) != supported:
            raise CheckpointError(f"config.json has {key}={hf[key]!r}, which is not supported.")
    shared = shared_from_hf(hf)
    if hf["num_key_value_heads"] not in (None, hf["num_attention_heads"]):
        raise CheckpointError(
            f"config.json has num_key_value_heads={hf['num_key_value_heads']}, but latent attention has as many as "
            f"num_attention_heads={hf['num_attention_heads']}."
        )
    if not hf["n_routed_experts"] or not hf["n_shared_experts"]:
        raise CheckpointError("config.json describes a deepseek_v3 model without routed or shared experts.")
    width = hf["moe_intermediate_size"]
    return families.deepseek_v3(
        **shared
        | {
            "head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
            "qk_rope_head_dim": hf["qk_rope_head_dim"],
            "v_head_dim": hf["v_head_dim"],
            "kv_lora_rank": hf["kv_lora_rank"],
            "q_lora_rank": hf["q_lora_rank"],
            "max_position_embeddings": rope.context(hf["max_position_embeddings"]),
            "rope_theta": rope.theta,
            "rope_scaling": scaling,
            "mlp": gated_activation(hf["hidden_act"]),
            "intermediate_size": width,
            "dense_intermediate_size": hf["intermediate_size"],
            "shared_expert_intermediate_size": hf["n_shared_experts"] * width,
            "num_experts": hf["n_routed_experts"],
            "num_experts_per_tok": hf["num_experts_per_tok"],
            "first_k_dense_replace": hf["first_k_dense_replace"],
            "norm_topk_prob": bool(hf["norm_topk_prob"]),
            "routed_scaling_factor": float(hf["routed_scaling_factor"]),
            "n_group": hf["n_group"],
            "topk_group": hf["topk_group"],
            "attention_bias": bool(hf["attention_bias"]),
        }
    )


LAYOUT = Layout(
    mappings,
    config_to_hf,
    config_from_hf,
    r".*\.rotary_emb\.inv_freq|model\.layers\.LAYERS\..*",  # the layer after the last predicts one token more
    "model.",
    FIELDS,
    {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)
