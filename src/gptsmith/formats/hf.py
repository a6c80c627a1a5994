"""The Hugging Face layouts: our configuration and weights to theirs and back, one table per `model_type`.

A directory of this package *is* a Hugging Face model directory (`config.json`, `model.safetensors`); there is no other
format. Weights are stored under their names, in their shapes: this module is the only place that knows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.model import families
from gptsmith.model.config import ModelConfig, RopeScaling
from gptsmith.model.quantized import bits_of, description, state
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the tensors of theirs that, stacked along dim 0, make it."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # GPT-1 and GPT-2 keep their projections as (in, out)
    scale: float = 1.0  # ours = scale · theirs, for the first of theirs


def _both(ours: str, theirs: str, *, transposed: bool = False) -> list[Entry]:
    """Weight and bias of a layer that is called the same in both."""
    return [
        Entry(f"{ours}.weight", (f"{theirs}.weight",), transposed),
        Entry(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


def openai_entries(config: ModelConfig) -> list[Entry]:
    """GPT-1 and GPT-2: the same blocks, other names for the embeddings, and no last norm in GPT-1."""
    first = config.model_type == "openai-gpt"
    tokens, positions = ("tokens_embed", "positions_embed") if first else ("wte", "wpe")
    entries = [
        Entry("embed_tokens.weight", (f"transformer.{tokens}.weight",)),
        Entry("embed_positions.weight", (f"transformer.{positions}.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        entries += _both(f"{ours}attention_norm", f"{theirs}ln_1")
        entries += _both(f"{ours}attention.qkv_proj", f"{theirs}attn.c_attn", transposed=True)
        entries += _both(f"{ours}attention.o_proj", f"{theirs}attn.c_proj", transposed=True)
        entries += _both(f"{ours}mlp_norm", f"{theirs}ln_2")
        entries += _both(f"{ours}mlp.up_proj", f"{theirs}mlp.c_fc", transposed=True)
        entries += _both(f"{ours}mlp.down_proj", f"{theirs}mlp.c_proj", transposed=True)
    return entries if first else entries + _both("norm", "transformer.ln_f")


def gpt_neo_entries(config: ModelConfig) -> list[Entry]:
    """GPT-Neo does not scale scores: its queries are ours times our scale, a power of two (see `families.gpt3`)."""
    assert config.attention_scale is not None
    entries = [
        Entry("embed_tokens.weight", ("transformer.wte.weight",)),
        Entry("embed_positions.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        qkv = tuple(f"{theirs}attn.attention.{name}_proj.weight" for name in "qkv")
        entries.append(Entry(f"{ours}attention.qkv_proj.weight", qkv, scale=1 / config.attention_scale))
        entries += _both(f"{ours}attention_norm", f"{theirs}ln_1")
        entries += _both(f"{ours}attention.o_proj", f"{theirs}attn.attention.out_proj")
        entries += _both(f"{ours}mlp_norm", f"{theirs}ln_2")
        entries += _both(f"{ours}mlp.up_proj", f"{theirs}mlp.c_fc")
        entries += _both(f"{ours}mlp.down_proj", f"{theirs}mlp.c_proj")
    return entries + _both("norm", "transformer.ln_f")


def llama_entries(config: ModelConfig) -> list[Entry]:
    """Llama, Mistral, Qwen2, Qwen3 and their kin: one naming, with what the configuration has of biases and QK-norm."""
    output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
    entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for part in ("weight", "bias"):
            if part == "weight" or config.attention_bias:
                qkv = tuple(f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv")
                entries.append(Entry(f"{ours}attention.qkv_proj.{part}", qkv))
            if part == "weight" or output_bias:
                entries.append(Entry(f"{ours}attention.o_proj.{part}", (f"{theirs}self_attn.o_proj.{part}",)))
            if (part == "weight" or config.mlp_bias) and not config.num_experts:
                up = (f"{theirs}mlp.gate_proj.{part}", f"{theirs}mlp.up_proj.{part}")
                entries.append(Entry(f"{ours}mlp.up_proj.{part}", up))
                entries.append(Entry(f"{ours}mlp.down_proj.{part}", (f"{theirs}mlp.down_proj.{part}",)))
        if config.num_experts:
            entries += _expert_entries(config, f"{ours}mlp", theirs)
        if config.qk_norm:
            norms = ("q_norm.weight", "k_norm.weight")
            entries += [Entry(f"{ours}attention.{name}", (f"{theirs}self_attn.{name}",)) for name in norms]
        entries += [
            Entry(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",)),
            Entry(f"{ours}mlp_norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
        ]
    return [*entries, Entry("norm.weight", ("model.norm.weight",))]


def _expert_entries(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    if config.model_type == "mixtral":
        moe, gate, up, down = f"{theirs}block_sparse_moe", "w1", "w3", "w2"
    else:
        moe, gate, up, down = f"{theirs}mlp", "gate_proj", "up_proj", "down_proj"
    experts = [f"{moe}.experts.{i}" for i in range(config.num_experts)]
    return [
        Entry(f"{ours}.router.weight", (f"{moe}.gate.weight",)),
        Entry(f"{ours}.up_proj", tuple(f"{e}.{name}.weight" for e in experts for name in (gate, up))),
        Entry(f"{ours}.down_proj", tuple(f"{e}.{down}.weight" for e in experts)),
    ] + (
        []
        if not config.shared_expert_intermediate_size
        else [
            Entry(f"{ours}.shared_up_proj.weight", tuple(f"{moe}.shared_expert.{name}.weight" for name in (gate, up))),
            Entry(f"{ours}.shared_down_proj.weight", (f"{moe}.shared_expert.{down}.weight",)),
            Entry(f"{ours}.shared_gate.weight", (f"{moe}.shared_expert_gate.weight",)),
        ]
    )


ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def gpt1_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    if c.intermediate_size != 4 * c.hidden_size or c.mlp != "gelu_tanh":
        raise CheckpointError("the openai-gpt layout has no other feed-forward layer than GELU (tanh) of 4x the width.")
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


def gpt1_config_from_hf(h: Mapping[str, Any]) -> ModelConfig:
    _choice(h.get("afn", "gelu"), {"gelu": "gelu_tanh"}, "afn")
    return families.gpt1(
        vocab_size=h["vocab_size"],
        hidden_size=h["n_embd"],
        num_hidden_layers=h["n_layer"],
        num_attention_heads=h["n_head"],
        max_position_embeddings=h["n_positions"],
        norm_eps=h.get("layer_norm_epsilon", 1e-5),
        initializer_range=h.get("initializer_range", 0.02),
        tie_word_embeddings=h.get("tie_word_embeddings", True),
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


def gpt2_config_from_hf(h: Mapping[str, Any]) -> ModelConfig:
    for key, only in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if h.get(key, only) != only:
            raise CheckpointError(f"config.json asks for {key}={h[key]}, which is not supported.")
    return families.gpt2(
        vocab_size=h["vocab_size"],
        hidden_size=h["n_embd"],
        num_hidden_layers=h["n_layer"],
        num_attention_heads=h["n_head"],
        intermediate_size=h.get("n_inner") or 4 * h["n_embd"],
        max_position_embeddings=h["n_positions"],
        mlp=_choice(h.get("activation_function", "gelu_new"), ACTIVATIONS, "activation_function"),
        norm_eps=h.get("layer_norm_epsilon", 1e-5),
        initializer_range=h.get("initializer_range", 0.02),
        tie_word_embeddings=h.get("tie_word_embeddings", True),
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


def gpt_neo_config_from_hf(h: Mapping[str, Any]) -> ModelConfig:
    if sum(times for _, times in h["attention_types"]) > h["num_layers"]:  # before they are unrolled
        raise CheckpointError(f"config.json describes more attention layers than the model's {h['num_layers']}.")
    kinds = [kind for pattern, times in h["attention_types"] for _ in range(times) for kind in pattern]
    if len(kinds) != h["num_layers"]:
        raise CheckpointError(f"config.json describes {len(kinds)} attention layers in a model of {h['num_layers']}.")
    banded = [_choice(kind, {"global": "", "local": "x"}, "attention_types") == "x" for kind in kinds]
    pattern = tuple(banded[:2]) if banded == [banded[i % 2] for i in range(len(banded))] else tuple(banded)
    return families.gpt3(
        vocab_size=h["vocab_size"],
        hidden_size=h["hidden_size"],
        num_hidden_layers=h["num_layers"],
        num_attention_heads=h["num_heads"],
        intermediate_size=h.get("intermediate_size") or 4 * h["hidden_size"],
        max_position_embeddings=h["max_position_embeddings"],
        sliding_window=h.get("window_size", 256),
        window_pattern=pattern,
        mlp=_choice(h.get("activation_function", "gelu_new"), ACTIVATIONS, "activation_function"),
        norm_eps=h.get("layer_norm_epsilon", 1e-5),
        initializer_range=h.get("initializer_range", 0.02),
        tie_word_embeddings=h.get("tie_word_embeddings", True),
    )


def llama_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Llama, Mistral, Qwen2 and Qwen3 share their keys; each has few of its own."""
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
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    names |= {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
    if bool(c.shared_expert_intermediate_size) != (c.model_type == "qwen2_moe"):
        raise CheckpointError("the qwen2_moe layout has a shared expert in every layer, and no other layout has one.")
    values: dict[str, Any] = {
        "architectures": [f"{names[c.model_type]}ForCausalLM"],
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
    if s is not None:
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
        banded = [c.window_of(i) is not None for i in range(c.num_hidden_layers)]
        values["use_sliding_window"] = any(banded)
        if any(banded):
            values["sliding_window"] = c.sliding_window
            values["layer_types"] = ["sliding_attention" if b else "full_attention" for b in banded]
    return values


def _rope_from_hf(h: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = h.get("rope_parameters") or {**(h.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or h.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic: plain up to max_position_embeddings, and we go no further
        return theta, None
    _choice(kind, {"linear": "", "yarn": "", "llama3": ""}, "rope_type")
    known = {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"}
    unsupported = {"mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"} & {k for k, v in rope.items() if v}
    if unsupported:
        raise CheckpointError(
            f"config.json asks for {', '.join(sorted(unsupported))} in its rope scaling: unsupported."
        )
    original = rope.get("original_max_position_embeddings") or h.get("original_max_position_embeddings")
    if kind != "linear" and original is None:
        original = h["max_position_embeddings"]
    options = {key: float(rope[key]) for key in known if rope.get(key) is not None}
    return theta, RopeScaling(kind, float(rope["factor"]), original if kind != "linear" else None, **options)


def llama_config_from_hf(h: Mapping[str, Any]) -> ModelConfig:
    kind = h["model_type"]
    theta, scaling = _rope_from_hf(h)
    _choice(h.get("hidden_act", "silu"), {"silu": "swiglu", "swish": "swiglu"}, "hidden_act")
    values: dict[str, Any] = {
        "vocab_size": h["vocab_size"],
        "hidden_size": h["hidden_size"],
        "num_hidden_layers": h["num_hidden_layers"],
        "num_attention_heads": h["num_attention_heads"],
        "num_key_value_heads": h.get("num_key_value_heads") or h["num_attention_heads"],
        "head_dim": h.get("head_dim")
        or (128 if kind in ("qwen3", "qwen3_moe") else h["hidden_size"] // h["num_attention_heads"]),
        "intermediate_size": h.get("intermediate_size"),
        "max_position_embeddings": h["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": h.get("rms_norm_eps", 1e-6),
        "initializer_range": h.get("initializer_range", 0.02),
        "tie_word_embeddings": h.get("tie_word_embeddings", False),
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        values["attention_bias"] = h.get("attention_bias", False)
    if kind == "llama":
        values["mlp_bias"] = h.get("mlp_bias", False)
    if kind == "mixtral":
        values |= {"num_experts": h["num_local_experts"], "num_experts_per_tok": h.get("num_experts_per_tok", 2)}
    if kind == "qwen2_moe":
        values["attention_bias"] = h.get("qkv_bias", True)
        values["shared_expert_intermediate_size"] = h["shared_expert_intermediate_size"]
    if kind in ("qwen2_moe", "qwen3_moe"):
        if h.get("decoder_sparse_step", 1) != 1 or h.get("mlp_only_layers") or h.get("use_sliding_window"):
            raise CheckpointError("config.json mixes dense layers or a sliding window with experts: unsupported.")
        values |= {
            "num_experts": h.get("num_experts") or h["num_local_experts"],  # transformers 5 writes the latter
            "num_experts_per_tok": h.get("num_experts_per_tok", 8 if kind == "qwen3_moe" else 4),
            "norm_topk_prob": h.get("norm_topk_prob", False),
            "intermediate_size": h["moe_intermediate_size"],
        }
    if "num_experts" in values:
        values["router_aux_loss_coef"] = h.get("router_aux_loss_coef", 0.001)
    if kind in ("mistral", "mixtral"):
        window = h.get("sliding_window")
        values |= {"sliding_window": window, "window_pattern": (True,) if window else ()}
    if kind in ("qwen2", "qwen3") and h.get("use_sliding_window") and h.get("sliding_window"):
        layers = h["num_hidden_layers"]
        first = h.get("max_window_layers", 28)  # layers below this one are dense
        kinds = h.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        values |= {
            "sliding_window": h["sliding_window"],
            "window_pattern": tuple(kind == "sliding_attention" for kind in kinds),
        }
    return families.FAMILIES[kind](**values)


def _choice(value: Any, table: Mapping[str, str], key: str) -> str:
    if value not in table:
        raise CheckpointError(f"config.json has {key}={value!r}; supported: {', '.join(table)}.")
    return table[value]


@dataclass(frozen=True)
class Layout:
    """How one `model_type` of Hugging Face is spelt."""

    entries: Callable[[ModelConfig], list[Entry]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    ignored: str  # tensors of old files that carry nothing (a regular expression)


_MASKS, _ROTARY = r".*\.attn\.(attention\.)?(bias|masked_bias)", r".*\.rotary_emb\.inv_freq"
_LLAMA = Layout(llama_entries, llama_config_to_hf, llama_config_from_hf, _ROTARY)
LAYOUTS: dict[str, Layout] = {
    "openai-gpt": Layout(
        openai_entries, gpt1_config_to_hf, gpt1_config_from_hf, _MASKS + r"|transformer\.position_ids"
    ),
    "gpt2": Layout(openai_entries, gpt2_config_to_hf, gpt2_config_from_hf, _MASKS),
    "gpt_neo": Layout(gpt_neo_entries, gpt_neo_config_to_hf, gpt_neo_config_from_hf, _MASKS),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
}


def _layout(model_type: Any, where: str) -> Layout:
    if model_type not in LAYOUTS:
        raise CheckpointError(f"{where}: unknown model_type {model_type!r}. Supported: {', '.join(sorted(LAYOUTS))}.")
    return LAYOUTS[model_type]


def entries_of(config: ModelConfig) -> list[Entry]:
    """All of a model's weights, as its layout has them."""
    entries = LAYOUTS[config.model_type].entries(config)
    if not config.tie_word_embeddings:
        entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
    return entries


def config_to_hf(config: ModelConfig, *, eos_token_id: int | None = None) -> dict[str, Any]:
    """The contents of `config.json`."""
    if config.attention_scale is not None and config.model_type != "gpt_neo":
        raise CheckpointError(f"the {config.model_type} layout has no scale of scores other than 1/sqrt(head_dim).")
    return {
        **LAYOUTS[config.model_type].to_hf(config),
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }


def read_config(directory: Path) -> ModelConfig:
    """The model configuration in a directory's `config.json`. CheckpointError if it is missing, broken or unknown."""
    path = Path(directory) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: it is not a model directory.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    return config_from_hf(values, str(path))


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The model configuration that a Hugging Face one describes; `where` it stands is named in errors."""
    try:
        return _layout(values.get("model_type"), where).from_hf(values)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error}.") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} has a value of the wrong type: {error}.") from None
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None


def weights_to_hf(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under their Hugging Face names, contiguous, on the CPU."""
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for entry in entries_of(model.config):
        tensor = _rows(state[entry.ours].detach().cpu(), entry)
        sizes = _split_sizes(model, entry)
        for name, part in zip(entry.theirs, torch.split(tensor, list(sizes)) if sizes else (tensor,), strict=True):
            result[name] = part.contiguous()
        if entry.scale != 1:
            result[entry.theirs[0]] = result[entry.theirs[0]] / entry.scale
    return result


def load_weights(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights with Hugging Face names into `model`; CheckpointError lists missing, extra and misshapen ones.

    Matrices that the model holds in few bits are left as they are.
    """
    if model.config.model_type in ("gpt2", "openai-gpt", "gpt_neo") and not any(
        name.startswith("transformer.") for name in tensors
    ):
        tensors = {("" if name.startswith("lm_head") else "transformer.") + name: t for name, t in tensors.items()}
    entries = entries_of(model.config)
    wanted = {name for entry in entries for name in entry.theirs}
    missing = sorted(wanted - tensors.keys())
    ignored = re.compile(LAYOUTS[model.config.model_type].ignored)
    extra = sorted(name for name in tensors.keys() - wanted if not ignored.fullmatch(name))
    if model.config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # some writers store a tied head twice
    wrong = []
    state = model.state_dict()
    with torch.no_grad():
        for entry in entries:
            if entry.ours not in state or any(name in missing for name in entry.theirs):
                continue
            parts = [tensors[name] for name in entry.theirs]
            sizes = _split_sizes(model, entry)
            target = _rows(state[entry.ours], entry)
            shapes = [tuple(t.shape) for t in (torch.split(target, list(sizes)) if sizes else (target,))]
            bad = [
                f"{name} is {list(part.shape)}, expected {list(shape)}"
                for name, part, shape in zip(entry.theirs, parts, shapes, strict=True)
                if tuple(part.shape) != shape
            ]
            wrong += bad
            if not bad:
                if entry.scale != 1:
                    parts[0] = parts[0].float() * entry.scale
                for part, place in zip(parts, torch.split(target, list(sizes)) if sizes else (target,), strict=True):
                    place.copy_(part)
    problems = [
        f"{what}: {', '.join(names[:8])}{' and ' + str(len(names) - 8) + ' more' if len(names) > 8 else ''}"
        for what, names in (("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit its config.json; " + "; ".join(problems) + ".")


def _rows(tensor: Tensor, entry: Entry) -> Tensor:
    """Our tensor as they see it: transposed where they transpose, a stack of experts as one matrix of all rows."""
    return tensor.mT if entry.transposed else tensor.flatten(0, -2) if tensor.ndim == 3 else tensor


def _split_sizes(model: Transformer, entry: Entry) -> tuple[int, ...] | None:
    return model.fused_rows(entry.ours) if len(entry.theirs) > 1 else None


def save_model(model: Transformer, directory: Path, *, eos_token_id: int | None = None) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into an existing directory.

    A quantized model's tensors have this package's own names and layout, and its config.json says so.
    """
    from safetensors.torch import save

    directory = Path(directory)
    config = config_to_hf(model.config, eos_token_id=eos_token_id)
    bits = bits_of(model)
    if bits is not None:
        config["quantization_config"] = description(bits)
    generation = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "do_sample": True, "temperature": 0.8}
    for name, values in ((CONFIG_FILE, config), ("generation_config.json", generation)):
        with atomic_file(directory / name, "w") as file:
            json.dump(values, file, indent=2)
            file.write("\n")
    with atomic_file(directory / WEIGHTS_FILE) as file:
        file.write(save(weights_to_hf(model) if bits is None else state(model), metadata={"format": "pt"}))


def load_model_weights(model: Transformer, directory: Path) -> None:
    """Read `model.safetensors` of a directory into `model`. CheckpointError if it is missing, cut short or misfit."""
    from safetensors import SafetensorError, safe_open

    path = Path(directory) / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}.")
    try:
        with safe_open(path, framework="pt") as file:
            load_weights(model, {name: file.get_tensor(name) for name in file.keys()}, str(path))  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
