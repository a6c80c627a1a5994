"""OPT: GPT-3 as Meta published it. Positions begin at the third row of their table. The 350M model has post-norm, and
embeddings of half its width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import ACTIVATIONS, activation_to_hf, choice, require_plain_heads, shared_from_hf
from gptsmith.formats.hf_weights import WeightMapping, weight_and_bias
from gptsmith.formats.layout import Layout
from gptsmith.model import families
from gptsmith.model.config import ModelConfig

FIELDS: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "init_std": 0.02,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_NORM_EPS = 1e-5  # PyTorch's default, which the layout does not store


def mappings(c: ModelConfig) -> list[WeightMapping]:
    decoder = "model.decoder."
    result = [
        WeightMapping("embed_tokens.weight", (f"{decoder}embed_tokens.weight",)),
        WeightMapping("embed_positions.weight", (f"{decoder}embed_positions.weight",)),
    ]
    if c.embedding_size is not None:
        result += [
            WeightMapping("embedding_in_proj.weight", (f"{decoder}project_in.weight",)),
            WeightMapping("embedding_out_proj.weight", (f"{decoder}project_out.weight",)),
        ]
    for i in range(c.num_hidden_layers):
        local, hf = f"layers.{i}.", f"{decoder}layers.{i}."
        result += weight_and_bias(f"{local}attention_norm", f"{hf}self_attn_layer_norm")
        for part in ("weight", "bias") if c.attention_bias else ("weight",):
            qkv = tuple(f"{hf}self_attn.{letter}_proj.{part}" for letter in "qkv")
            result.append(WeightMapping(f"{local}attention.qkv_proj.{part}", qkv))
        result += [
            *weight_and_bias(f"{local}attention.o_proj", f"{hf}self_attn.out_proj", bias=c.attention_bias),
            *weight_and_bias(f"{local}mlp_norm", f"{hf}final_layer_norm"),
            *weight_and_bias(f"{local}mlp.up_proj", f"{hf}fc1", bias=c.mlp_bias),
            *weight_and_bias(f"{local}mlp.down_proj", f"{hf}fc2", bias=c.mlp_bias),
        ]
    return result if c.norm_position == "post" else result + weight_and_bias("norm", f"{decoder}final_layer_norm")


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    require_plain_heads(c)
    if c.norm_eps != _NORM_EPS or c.attention_bias != c.mlp_bias:
        raise CheckpointError(f"the opt layout supports only norm_eps = {_NORM_EPS}, and biases everywhere or nowhere.")
    return {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "ffn_dim": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "do_layer_norm_before": c.norm_position == "pre",
        "word_embed_proj_dim": c.embedding_size or c.hidden_size,
        "num_attention_heads": c.num_attention_heads,
        "activation_function": activation_to_hf(c, gated=False),
        "init_std": c.initializer_range,
        "enable_bias": c.attention_bias,
        "pad_token_id": None,
        "dropout": 0.0,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    for key, supported in (("_remove_final_layer_norm", False), ("layer_norm_elementwise_affine", True)):
        if hf[key] != supported:
            raise CheckpointError(f"config.json has {key}={hf[key]!r}, which is not supported.")
    embedding_size = hf["word_embed_proj_dim"]
    shared = shared_from_hf(
        {
            **hf,
            "intermediate_size": hf["ffn_dim"],
            "initializer_range": hf["init_std"],
            "norm_eps": _NORM_EPS,
            "num_key_value_heads": None,
        },
        norm_eps="norm_eps",
    )
    return families.opt(
        **shared,
        mlp=choice(hf["activation_function"], ACTIVATIONS, "activation_function"),
        norm_position="pre" if hf["do_layer_norm_before"] else "post",
        embedding_size=None if embedding_size in (None, hf["hidden_size"]) else embedding_size,
        attention_bias=bool(hf["enable_bias"]),
        mlp_bias=bool(hf["enable_bias"]),
    )


LAYOUT = Layout(mappings, config_to_hf, config_from_hf, r"(?!)", "model.", FIELDS)
