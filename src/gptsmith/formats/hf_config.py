"""Configurations of the Hugging Face layouts: our `ModelConfig` to the contents of `config.json` and back.

Each layout has a `..._config_to_hf` and a `..._config_from_hf`. `hf.config_to_hf` adds the keys that all layouts share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from gptsmith.errors import CheckpointError
from gptsmith.model import families
from gptsmith.model.config import ModelConfig, RopeScaling

T = TypeVar("T")

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def gpt1_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.intermediate_size != 4 * c.hidden_size or c.mlp != "gelu_tanh":
        raise CheckpointError(
            "the openai-gpt layout supports only feed-forward layers with tanh GELU and 4 times the width."
        )
    return {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_embd": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "afn": "gelu",  # what this layout calls the tanh approximation
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def gpt1_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    _choice(hf.get("afn", "gelu"), {"gelu": "gelu_tanh"}, "afn")
    return families.gpt1(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        max_position_embeddings=hf["n_positions"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        initializer_range=hf.get("initializer_range", 0.02),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
    )


def gpt2_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_embd": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "n_inner": c.intermediate_size,
        "activation_function": "gelu_new" if c.mlp == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def gpt2_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    for key, supported in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if hf.get(key, supported) != supported:
            raise CheckpointError(f"config.json has {key}={hf[key]}, which is not supported.")
    return families.gpt2(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["n_embd"],
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=hf["n_head"],
        intermediate_size=hf.get("n_inner") or 4 * hf["n_embd"],
        max_position_embeddings=hf["n_positions"],
        mlp=_choice(hf.get("activation_function", "gelu_new"), _ACTIVATIONS, "activation_function"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        initializer_range=hf.get("initializer_range", 0.02),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
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
        "activation_function": "gelu_new" if c.mlp == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.initializer_range,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def gpt_neo_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    if sum(times for _, times in hf["attention_types"]) > hf["num_layers"]:  # check before expanding the list
        raise CheckpointError(f"config.json describes more attention layers than num_layers = {hf['num_layers']}.")
    kinds = [kind for pattern, times in hf["attention_types"] for _ in range(times) for kind in pattern]
    if len(kinds) != hf["num_layers"]:
        raise CheckpointError(
            f"config.json describes {len(kinds)} attention layers, but num_layers = {hf['num_layers']}."
        )
    pattern = [_choice(kind, {"global": False, "local": True}, "attention_types") for kind in kinds]
    if pattern == [pattern[i % 2] for i in range(len(pattern))]:
        pattern = pattern[:2]  # the shortest pattern that repeats
    return families.gpt3(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_hidden_layers=hf["num_layers"],
        num_attention_heads=hf["num_heads"],
        intermediate_size=hf.get("intermediate_size") or 4 * hf["hidden_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        sliding_window=hf.get("window_size", 256),
        window_pattern=tuple(pattern),
        mlp=_choice(hf.get("activation_function", "gelu_new"), _ACTIVATIONS, "activation_function"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        initializer_range=hf.get("initializer_range", 0.02),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
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
    rope = _rope_to_hf(c)
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
        "hidden_act": "silu",
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
            "use_sliding_window": False,
        }
    if c.model_type == "llama":
        values["mlp_bias"] = c.mlp_bias
    if c.model_type in ("mistral", "mixtral"):
        values["sliding_window"] = c.sliding_window
    if c.model_type in ("qwen2", "qwen3"):
        sliding = [c.window_of(i) is not None for i in range(c.num_hidden_layers)]
        values["use_sliding_window"] = any(sliding)
        if any(sliding):
            values["sliding_window"] = c.sliding_window
            values["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
    return values


def llama_config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    kind = hf["model_type"]
    theta, scaling = _rope_from_hf(hf)
    _choice(hf.get("hidden_act", "silu"), {"silu": "swiglu", "swish": "swiglu"}, "hidden_act")
    values: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim")
        or (128 if kind in ("qwen3", "qwen3_moe") else hf["hidden_size"] // hf["num_attention_heads"]),
        "intermediate_size": hf.get("intermediate_size"),
        "max_position_embeddings": hf["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "initializer_range": hf.get("initializer_range", 0.02),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = hf.get("attention_bias", False)
    if kind == "llama":
        values["mlp_bias"] = hf.get("mlp_bias", False)
    if kind == "mixtral":
        values |= {"num_experts": hf["num_local_experts"], "num_experts_per_tok": hf.get("num_experts_per_tok", 2)}
    if kind == "qwen2_moe":
        values["attention_bias"] = hf.get("qkv_bias", True)
        values["shared_expert_intermediate_size"] = hf["shared_expert_intermediate_size"]
    if kind in ("qwen2_moe", "qwen3_moe"):
        if hf.get("decoder_sparse_step", 1) != 1 or hf.get("mlp_only_layers") or hf.get("use_sliding_window"):
            raise CheckpointError(
                "config.json combines experts with dense layers or a sliding window, which is not supported."
            )
        values |= {
            "num_experts": hf.get("num_experts") or hf["num_local_experts"],  # transformers 5 writes the latter
            "num_experts_per_tok": hf.get("num_experts_per_tok", 8 if kind == "qwen3_moe" else 4),
            "norm_topk_prob": hf.get("norm_topk_prob", False),
            "intermediate_size": hf["moe_intermediate_size"],
        }
    if "num_experts" in values:
        values["router_aux_loss_coef"] = hf.get("router_aux_loss_coef", 0.001)
    if kind in ("mistral", "mixtral"):
        window = hf.get("sliding_window")
        values |= {"sliding_window": window, "window_pattern": (True,) if window else ()}
    if kind in ("qwen2", "qwen3") and hf.get("use_sliding_window") and hf.get("sliding_window"):
        layers = hf["num_hidden_layers"]
        first = hf.get("max_window_layers", 28)  # layers below this one have full attention
        kinds = hf.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(layers)
        ]
        values |= {
            "sliding_window": hf["sliding_window"],
            "window_pattern": tuple(kind == "sliding_attention" for kind in kinds),
        }
    return families.FAMILIES[kind](**values)


def _rope_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    s = c.rope_scaling
    if s is not None:
        rope = {"rope_type": s.kind, "rope_theta": c.rope_theta, "factor": s.factor}
        if s.kind != "linear":
            rope["original_max_position_embeddings"] = s.original_max_position_embeddings
        if s.kind == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
            if s.attention_factor is not None:
                rope["attention_factor"] = s.attention_factor
    return rope


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return the RoPE base and scaling of a Hugging Face configuration, in the keys of transformers 4 or 5."""
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic: unscaled up to max_position_embeddings, our limit
        return theta, None
    _choice(kind, dict.fromkeys(("linear", "yarn", "llama3")), "rope_type")
    known = {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"}
    unsupported = {"mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"} & {k for k, v in rope.items() if v}
    if unsupported:
        raise CheckpointError(
            f"config.json has the RoPE scaling options {', '.join(sorted(unsupported))}, which are not supported."
        )
    original = rope.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
    if kind != "linear" and original is None:
        original = hf["max_position_embeddings"]
    options = {key: float(rope[key]) for key in known if rope.get(key) is not None}
    return theta, RopeScaling(kind, float(rope["factor"]), original if kind != "linear" else None, **options)


def _choice(value: Any, table: Mapping[Any, T], key: str) -> T:
    """Return what `value` maps to. Raise CheckpointError, naming `key`, if it is not supported."""
    if value not in table:
        raise CheckpointError(f"config.json has {key}={value!r}; supported: {', '.join(table)}.")
    return table[value]
