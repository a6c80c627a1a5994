"""Configurations of the Hugging Face layouts: our `ModelConfig` to the contents of `config.json` and back.

Each layout has a `..._config_to_hf` and a `..._config_from_hf`. `hf.config_to_hf` adds the keys that all layouts share.

Every field of transformers' configuration classes is in one of three places: in `FIELDS`, and then it is honoured or
refused by name; in `HARMLESS`, and then it has no part in the logits; or in `REFUSED`. Keys that transformers does not
know are ignored, as transformers ignores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gptsmith.errors import CheckpointError
from gptsmith.model import families
from gptsmith.model.config import ModelConfig, RopeScaling

T = TypeVar("T")

HARMLESS = frozenset(
    {
        # What only training uses: dropout and noise (`--dropout` is our own).
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout", "attention_dropout"),
        *("hidden_dropout", "dropout", "layerdrop"),
        "router_jitter_noise",
        # Special tokens, which the tokenizer and `model_end_ids` look up.
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        # What the forward pass returns, stores or slices, and in which type; not what it computes.
        *("num_mtp_layers",),  # layers that predict later tokens, for speculation
        *("use_cache", "output_hidden_states", "output_router_logits", "return_dict", "dtype", "pretraining_tp"),
        *("chunk_size_feed_forward", "reorder_and_upcast_attn", "transformers_version", "architectures", "is_decoder"),
        # Heads for other tasks.
        *("id2label", "label2id", "problem_type", "classifier_dropout", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    }
)

REFUSED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_causal": (True, None),
    "per_layer_config": (None, {}, []),
    "pruned_heads": (None, {}),
}
"""Settings of which only these values are supported."""

_OPENAI_FIELDS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
MODERN_FIELDS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
}
_WINDOW_FIELDS: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096}
_LAYER_FIELDS: dict[str, Any] = {"max_window_layers": 28, "layer_types": None}
_EXPERT_FIELDS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
FIELDS: dict[str, dict[str, Any]] = {
    "openai-gpt": {**_OPENAI_FIELDS, "vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
    "gpt2": {
        **_OPENAI_FIELDS,
        "n_inner": None,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    "gpt_neo": {
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "hidden_size": 2048,
        "num_layers": 24,
        "attention_types": None,
        "num_heads": 16,
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    "llama": {
        **MODERN_FIELDS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **MODERN_FIELDS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "head_dim": None,
        "sliding_window": 4096,
    },
    "qwen2": {**MODERN_FIELDS, **_WINDOW_FIELDS, **_LAYER_FIELDS},
    "qwen3": {**MODERN_FIELDS, **_WINDOW_FIELDS, **_LAYER_FIELDS, "head_dim": 128, "attention_bias": False},
    "mixtral": {
        **MODERN_FIELDS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "head_dim": None,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    "qwen2_moe": {
        **MODERN_FIELDS,
        **_WINDOW_FIELDS,
        **_LAYER_FIELDS,
        **_EXPERT_FIELDS,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        **MODERN_FIELDS,
        **_WINDOW_FIELDS,
        **_EXPERT_FIELDS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
}
"""The fields of transformers' configuration classes that decide the logits, and the values of missing ones."""

_OPENAI_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
ALIASES: dict[str, dict[str, str]] = {
    "openai-gpt": _OPENAI_ALIASES,
    "gpt2": _OPENAI_ALIASES,
    "gpt_neo": {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},  # transformers 5 writes the former
}
"""Other names of fields. Where a file has both, the alias counts, as in transformers."""

_CLASSES = {  # the beginning of transformers' class names
    "GPT2": "gpt2",
    "OpenAIGPT": "openai-gpt",
    "GPTNeo": "gpt_neo",
    "Llama": "llama",
    "LLaMA": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Mixtral": "mixtral",
    "Qwen2Moe": "qwen2_moe",
    "Qwen3Moe": "qwen3_moe",
    "GPTNeoX": "gpt_neox",
    "OPT": "opt",
    "Phi3": "phi3",
    "Olmo2": "olmo2",
    "StableLm": "stablelm",
    "SmolLM3": "smollm3",
    "Gemma3": "gemma3_text",
    "GptOss": "gpt_oss",
    "DeepseekV3": "deepseek_v3",
}


def model_type_of(values: Mapping[str, Any]) -> Any:
    """Return the `model_type` of a `config.json`, or if it has none the one that its `architectures` belong to."""
    if values.get("model_type") is not None:
        return values["model_type"]
    names = values.get("architectures")
    names = names if isinstance(names, list) else [names]
    found = {
        _CLASSES.get(re.sub(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$", "", name))
        for name in names
        if isinstance(name, str)
    }
    return found.pop() if len(found) == 1 else None


def settings(
    values: Mapping[str, Any], model_type: str, fields: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return a `config.json` as transformers reads it: names replaced by the fields they stand for, defaults filled in.

    fields, aliases: of the layout. Raises CheckpointError for what changes the logits and is not supported.
    """
    result = {**fields, **values, "model_type": model_type}
    for alias, name in aliases.items():
        if alias in values:
            result[name] = values[alias]
    for key, supported in REFUSED.items():
        if key in result and result[key] not in supported:
            raise CheckpointError(f"config.json has {key}={result[key]!r}, which is not supported.")
    return result


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_10": "gelu_10",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "linear": "linear",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "sqrtsoftplus": "sqrtsoftplus",
    "swish": "silu",
    "tanh": "tanh",
}
"""Transformers' names; its `prelu` and `xielu` have weights of their own."""

_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def activation_to_hf(c: ModelConfig, *, gated: bool | None = None) -> str:
    """Return transformers' name of the activation. Raise CheckpointError if the layout has none with or without a gate.

    gated: whether the layout has a gate; None: if it is one of Llama's.
    """
    if c.gated_mlp != (c.model_type in _LLAMA_CLASSES if gated is None else gated):
        kind = "without a gate" if c.gated_mlp else "with a gate"
        raise CheckpointError(f"the {c.model_type} layout supports only feed-forward layers {kind}, not {c.mlp}.")
    return "gelu_new" if c.activation == "gelu_tanh" else c.activation


def gated_activation(value: Any) -> str:
    activation = choice(value, ACTIVATIONS, "hidden_act")
    return "swiglu" if activation == "silu" else f"gated_{activation}"


def gpt1_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _GPT1_ACTIVATIONS.items() if theirs != "swish"}
    if c.intermediate_size != 4 * c.hidden_size or c.mlp not in names:
        raise CheckpointError(
            f"the openai-gpt layout supports only feed-forward layers with {', '.join(names)} and 4 times the width."
        )
    return {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_embd": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "afn": names[c.mlp],  # `gelu` is what this layout calls the tanh approximation
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def gpt1_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    return families.gpt1(
        vocab_size=hf["vocab_size"],
        mlp=choice(hf["afn"], _GPT1_ACTIVATIONS, "afn"),
        hidden_size=hf["n_embd"],
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        max_position_embeddings=hf["n_positions"],
        norm_eps=hf["layer_norm_epsilon"],
        initializer_range=hf["initializer_range"],
        tie_word_embeddings=hf["tie_word_embeddings"],
    )


def gpt2_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.attention_scale not in (None, 1.0, c.head_dim**-0.5):
        raise CheckpointError("the gpt2 layout supports no attention_scale but 1 and 1/sqrt(head_dim).")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_embd": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "n_inner": c.intermediate_size,
        "activation_function": activation_to_hf(c),
        "scale_attn_weights": c.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def gpt2_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    return families.gpt2(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        intermediate_size=hf["n_inner"] if hf["n_inner"] is not None else 4 * hf["n_embd"],
        max_position_embeddings=hf["n_positions"],
        mlp=choice(hf["activation_function"], ACTIVATIONS, "activation_function"),
        attention_scale=None if hf["scale_attn_weights"] else 1.0,
        scale_attn_by_inverse_layer_idx=bool(hf["scale_attn_by_inverse_layer_idx"]),
        norm_eps=hf["layer_norm_epsilon"],
        initializer_range=hf["initializer_range"],
        tie_word_embeddings=hf["tie_word_embeddings"],
    )


def gpt_neo_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    kinds = ["local" if c.window_of(i) else "global" for i in range(c.num_hidden_layers)]
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "intermediate_size": c.intermediate_size,
        "window_size": c.sliding_window or 256,
        "attention_types": [[[kind], 1] for kind in kinds],
        "activation_function": activation_to_hf(c),
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def gpt_neo_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_layers"]
    kinds = hf.get("attention_layers")  # if it is there, it counts, as in transformers
    if kinds is None:
        types = hf["attention_types"] or [[["global", "local"], 12]]
        if sum(times for _, times in types) > layers:  # check before expanding the list
            raise CheckpointError(f"config.json describes more attention layers than num_layers = {layers}.")
        kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    if len(kinds) != layers:
        raise CheckpointError(f"config.json describes {len(kinds)} attention layers, but num_layers = {layers}.")
    pattern = [choice(kind, {"global": False, "local": True}, "attention_types") for kind in kinds]
    if pattern == [pattern[i % 2] for i in range(len(pattern))]:
        pattern = pattern[:2]  # the shortest pattern that repeats
    return families.gpt3(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_hidden_layers=layers,
        num_attention_heads=hf["num_heads"],
        intermediate_size=hf["intermediate_size"] if hf["intermediate_size"] is not None else 4 * hf["hidden_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        sliding_window=hf["window_size"],
        window_pattern=tuple(pattern),
        mlp=choice(hf["activation_function"], ACTIVATIONS, "activation_function"),
        norm_eps=hf["layer_norm_epsilon"],
        initializer_range=hf["initializer_range"],
        tie_word_embeddings=hf["tie_word_embeddings"],
    )


_LLAMA_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}


def llama_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts share most keys."""
    rope = rope_to_hf(c)
    if bool(c.shared_expert_intermediate_size) != (c.model_type == "qwen2_moe"):
        raise CheckpointError("a shared expert is required by the qwen2_moe layout and unsupported by all others.")
    values: dict[str, Any] = {
        "architectures": [f"{_LLAMA_CLASSES[c.model_type]}ForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": activation_to_hf(c),
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "rms_norm_eps": c.norm_eps,
        # Both spellings: transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
        "rope_theta": c.rope_theta,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
    }
    if c.rope_scaling is not None:
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if c.model_type in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = c.attention_bias
    if c.num_experts:
        values["num_local_experts" if c.model_type == "mixtral" else "num_experts"] = c.num_experts
        values["num_experts_per_tok"] = c.num_experts_per_tok
        values["router_aux_loss_coef"] = c.router_aux_loss_coef
        values["output_router_logits"] = False
    if c.model_type == "qwen2_moe":
        values |= {"qkv_bias": c.attention_bias, "shared_expert_intermediate_size": c.shared_expert_intermediate_size}
    if c.model_type in ("qwen2_moe", "qwen3_moe"):
        values |= {
            "moe_intermediate_size": c.intermediate_size,
            "norm_topk_prob": c.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if c.model_type == "llama":
        values["mlp_bias"] = c.mlp_bias
    return values | _windows_to_hf(c)


def _windows_to_hf(c: ModelConfig) -> dict[str, Any]:
    sliding = [c.window_of(i) is not None for i in range(c.num_hidden_layers)]
    layer_types = ["sliding_attention" if each else "full_attention" for each in sliding]
    mixed = len(set(sliding)) > 1
    if (mixed and c.model_type in ("mixtral", "qwen3_moe")) or (any(sliding) and c.model_type == "llama"):
        raise CheckpointError(
            f"the {c.model_type} layout supports no sliding window{' in only some layers' if mixed else ''}."
        )
    values: dict[str, Any] = {}
    if c.model_type in ("mistral", "mixtral"):
        values["sliding_window"] = c.sliding_window if any(sliding) else None
        if mixed:  # transformers then takes Ministral's classes, which are Mistral's with such a list
            values["layer_types"] = layer_types
    elif c.model_type != "llama":
        values["use_sliding_window"] = any(sliding)
        if any(sliding):
            values["sliding_window"] = c.sliding_window
            if c.model_type != "qwen3_moe":
                values["layer_types"] = layer_types
    return values


def llama_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    kind = hf["model_type"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    rope = whole_heads(rope_from_hf(hf, theta=1e6 if kind == "mixtral" else 10000.0), head_dim)
    window, pattern = _windows_from_hf(hf)
    values: dict[str, Any] = {
        **shared_from_hf(hf),
        "head_dim": head_dim,
        "mlp": gated_activation(hf["hidden_act"]),
        **rope.fields(hf["max_position_embeddings"]),
        "sliding_window": window,
        "window_pattern": pattern,
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = hf["attention_bias"]
    if kind == "llama":
        values["mlp_bias"] = hf["mlp_bias"]
    if kind == "mixtral":
        values["num_experts"] = hf["num_local_experts"]
    if kind == "qwen2_moe":
        values["attention_bias"] = hf["qkv_bias"]
        values["shared_expert_intermediate_size"] = hf["shared_expert_intermediate_size"]
    if kind in ("qwen2_moe", "qwen3_moe"):
        for key, supported in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if (hf[key] or supported) != supported:
                raise CheckpointError(f"config.json has {key}={hf[key]}: dense layers among experts are not supported.")
        values |= {
            "num_experts": hf["num_experts"],
            "norm_topk_prob": hf["norm_topk_prob"],
            "intermediate_size": hf["moe_intermediate_size"],
        }
    if "num_experts" in values:
        if not values["num_experts"]:
            raise CheckpointError(f"config.json describes a {kind} model without experts, which is not supported.")
        values |= {
            "num_experts_per_tok": hf["num_experts_per_tok"],
            "router_aux_loss_coef": hf["router_aux_loss_coef"],
        }
    return families.FAMILIES[kind](**values)


_MAX_LAYERS = 1 << 12  # a larger number is a mistake or an attack: lists of that length are built


def _windows_from_hf(hf: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """Return the sliding window and the pattern of the layers that have it."""
    kind, layers, window = hf["model_type"], hf["num_hidden_layers"], hf.get("sliding_window")
    if "use_sliding_window" in FIELDS[kind] and not hf["use_sliding_window"]:
        window = None
    if kind == "llama":
        if window is not None and window < hf["max_position_embeddings"]:
            raise CheckpointError(f"config.json has sliding_window={window}, which a llama model does not support.")
        window = None
    if layers > _MAX_LAYERS:
        raise CheckpointError(f"config.json has num_hidden_layers={layers}, which is implausible.")
    if window is None:
        sliding = [False] * layers
    elif kind in ("qwen2", "qwen3"):
        sliding = [i >= hf["max_window_layers"] for i in range(layers)]
    elif kind == "qwen2_moe":
        sliding = [i % 2 == 0 and i < hf["max_window_layers"] for i in range(layers)]
    else:
        sliding = [True] * layers
    types = hf.get("layer_types")
    if types is not None:
        table = {"full_attention": False, "attention": False, "sliding_attention": True}
        given = [choice(each, table, "layer_types") for each in types]
        if len(given) != layers:
            raise CheckpointError(f"config.json has {len(given)} layer_types, but num_hidden_layers={layers}.")
        if any(given) and window is None:
            raise CheckpointError("config.json has layer_types with sliding_attention, but no sliding window.")
        if given != sliding and kind in ("mixtral", "qwen3_moe"):
            raise CheckpointError(f"config.json has layer_types, by which the layers of a {kind} model cannot differ.")
        sliding = given
    if len(set(sliding)) == 1:
        sliding = sliding[:1]
    return (window, tuple(sliding)) if any(sliding) else (None, ())


_ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
        # Ignored, as in transformers: the sections of images and videos, which text does not have, and an old mark.
        *("mrope_section", "finetuned"),
    }
)
"""The keys of RoPE dictionaries. A type ignores those of others, as in transformers."""


def rope_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    s = c.rope_scaling
    if s is not None:
        rope = {"rope_type": s.kind, "rope_theta": c.rope_theta, "factor": s.factor}
        if s.kind not in ("linear", "proportional"):
            rope["original_max_position_embeddings"] = s.original_max_position_embeddings
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
            if not s.truncate:
                rope["truncate"] = False
            if s.mscale_all_dim:
                rope["mscale_all_dim"] = s.mscale_all_dim
        if s.kind == "longrope":
            rope |= {"short_factor": list(s.short_factor), "long_factor": list(s.long_factor)}
        if s.kind == "proportional":
            rope["partial_rotary_factor"] = s.partial_rotary_factor
        if s.kind in ("yarn", "longrope") and s.attention_factor is not None:
            rope["attention_factor"] = s.attention_factor
    return rope


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a configuration."""

    theta: float
    kind: str
    """`rope_type` in transformers; "dynamic" is no scaling of ours."""
    scaling: RopeScaling | None
    part: float
    """The part of a head that is rotated."""

    def context(self, context: int) -> int:
        """Return how much of a context has the positions that `scaling` describes.

        With LongRoPE, transformers takes the long divisors for all positions of a longer sequence, so that a token more
        changes all keys. `extend_context` chooses them for good.
        """
        s = self.scaling
        if s is not None and s.short_factor != s.long_factor:
            return min(context, s.original_max_position_embeddings or context)
        return context

    def fields(self, context: int) -> dict[str, Any]:
        """Return the fields of a `ModelConfig` that describe these positions. context: that of the configuration."""
        return {
            "max_position_embeddings": self.context(context),
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
            "partial_rotary_factor": self.part,
        }


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


def rope_from_hf(
    hf: Mapping[str, Any],
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    part: float = 1.0,
    part_key: str = "partial_rotary_factor",
    kinds: Sequence[str] = ROPE_TYPES,
    renamed: Mapping[str, str] | None = None,
) -> Rope:
    """Return the rotary positions of a Hugging Face configuration, in the keys of transformers 4 or 5.

    theta, part: the layout's defaults; theta_key, part_key: the older keys that they have. kinds: the supported types
    of scaling. renamed: old names of types.
    """
    rope = hf.get("rope_scaling") or hf["rope_parameters"] or {}  # the older key counts, as in transformers
    if unknown := sorted(rope.keys() - _ROPE_KEYS):
        raise CheckpointError(f"config.json has the RoPE options {', '.join(unknown)}, which are not supported.")
    theta = float(rope.get("rope_theta") or hf.get(theta_key) or theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = (renamed or {}).get(kind, kind)
    choice(kind, dict.fromkeys(kinds), "rope_type")
    given = rope.get("partial_rotary_factor", hf.get(part_key, part))
    part = part if given is None else float(given)
    if kind == "proportional":
        scaling = RopeScaling(kind, float(rope.get("factor", 1.0)), partial_rotary_factor=part)
        return Rope(theta, kind, scaling, 1.0)
    if kind in ("default", "dynamic"):  # the latter is unscaled up to max_position_embeddings, our limit
        return Rope(theta, kind, None, part)
    return Rope(theta, kind, _scaling_from_hf(hf, rope, kind), part)


def whole_heads(rope: Rope, head_dim: int) -> Rope:
    """Return the rotary positions of a layout that rotates whole heads.

    Transformers then ignores a `partial_rotary_factor`, unless the positions are scaled, where it fails.
    """
    if rope.kind not in ("default", "proportional") and int(head_dim * rope.part) != head_dim:
        raise CheckpointError(
            f"config.json has partial_rotary_factor={rope.part} with rope_type={rope.kind!r}, which is not supported."
        )
    return replace(rope, part=1.0)


def _scaling_from_hf(hf: Mapping[str, Any], rope: Mapping[str, Any], kind: Any) -> RopeScaling:
    """Return the scaling of a RoPE dictionary of a type that scales."""
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    context = hf["max_position_embeddings"]
    original = hf.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    factor = rope.get("factor") if kind == "longrope" else rope["factor"]
    factor = context / original if factor is None else float(factor)
    options: dict[str, Any] = {}
    if kind == "llama3":
        options = {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
        return RopeScaling(kind, factor, original, **options)
    if rope.get("attention_factor") is not None:
        options["attention_factor"] = float(rope["attention_factor"])
    if kind == "longrope":
        options |= {key: tuple(float(x) for x in rope[key]) for key in ("short_factor", "long_factor")}
        return RopeScaling(kind, factor, original, **options)
    if "attention_factor" not in options and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = math.log(factor) / 10 if factor > 1 else 0.0
        options["attention_factor"] = (1 + rope["mscale"] * scale) / (1 + rope["mscale_all_dim"] * scale)
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        options[key] = float(rope.get(key) or default)
    options["truncate"] = bool(rope.get("truncate", True))
    return RopeScaling(kind, factor, original, **options)


def shared_to_hf(c: ModelConfig, name: str, *, norm_eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Return the keys that current layouts share. name: of transformers' class; norm_eps: their key for it."""
    return {
        "architectures": [name],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        norm_eps: c.norm_eps,
        "attention_dropout": 0.0,
        "pad_token_id": None,  # transformers' own would be the id of another token, whose embedding it does not train
    }


def shared_from_hf(hf: Mapping[str, Any], *, norm_eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Return the fields that current layouts store under the keys of `shared_to_hf`, and the width of heads."""
    if hf["num_hidden_layers"] > _MAX_LAYERS:
        raise CheckpointError(f"config.json has num_hidden_layers={hf['num_hidden_layers']}, which is implausible.")
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "initializer_range": hf["initializer_range"],
        "norm_eps": hf[norm_eps],
        "tie_word_embeddings": hf["tie_word_embeddings"],
    }


def require_plain_heads(c: ModelConfig) -> None:
    """Raise CheckpointError if the heads together are not as wide as the model, which the layout does not store."""
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        raise CheckpointError(
            f"the {c.model_type} layout supports no head_dim but hidden_size / num_attention_heads, not {c.head_dim}."
        )


def rope_keys_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Return the rotary positions in the keys of transformers 4 and 5, with the part of a head that is rotated."""
    rope = rope_to_hf(c)
    if c.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = c.partial_rotary_factor
    values: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_parameters": rope}
    if c.rope_scaling is not None:
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return values


def windows_from_types(hf: Mapping[str, Any], sliding: Sequence[bool]) -> tuple[int | None, tuple[bool, ...]]:
    """Return the sliding window and the pattern of the layers that have it.

    sliding: which have it if there are no `layer_types`.
    """
    types, window, layers = hf.get("layer_types"), hf.get("sliding_window"), hf["num_hidden_layers"]
    if types is not None:
        table = {"full_attention": False, "attention": False, "sliding_attention": True}
        sliding = [choice(each, table, "layer_types") for each in types]
        if len(sliding) != layers:
            raise CheckpointError(f"config.json has {len(sliding)} layer_types, but num_hidden_layers={layers}.")
    if any(sliding) and window is None:
        raise CheckpointError("config.json has layer_types with sliding_attention, but no sliding window.")
    return (window, shortest_pattern(sliding)) if any(sliding) else (None, ())


def layer_types(c: ModelConfig) -> list[str]:
    """Return transformers' name of the attention of each layer."""
    windows = (c.window_of(i) for i in range(c.num_hidden_layers))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def shortest_pattern(values: Sequence[bool]) -> tuple[bool, ...]:
    """Return the shortest pattern that, repeated, begins with `values`."""
    lengths = (n for n in range(1, len(values)) if all(values[i] == values[i % n] for i in range(n, len(values))))
    return tuple(values[: next(lengths, len(values))])


def choice(value: Any, table: Mapping[Any, T], key: str) -> T:
    """Return what `value` maps to. Raise CheckpointError, naming `key`, if it is not supported."""
    if value not in table:
        raise CheckpointError(f"config.json has {key}={value!r}; supported: {', '.join(map(str, table))}.")
    return table[value]
