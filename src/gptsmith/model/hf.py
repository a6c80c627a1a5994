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
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the tensors of theirs that, stacked along dim 0, make it."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # GPT-2 keeps its projections as (in, out)


def gpt2_entries(config: ModelConfig) -> list[Entry]:
    entries = [
        Entry("embed_tokens.weight", ("transformer.wte.weight",)),
        Entry("embed_positions.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"transformer.h.{i}."
        for part in ("weight", "bias"):
            transposed = part == "weight"
            entries += [
                Entry(f"{ours}attention_norm.{part}", (f"{theirs}ln_1.{part}",)),
                Entry(f"{ours}attention.qkv_proj.{part}", (f"{theirs}attn.c_attn.{part}",), transposed),
                Entry(f"{ours}attention.o_proj.{part}", (f"{theirs}attn.c_proj.{part}",), transposed),
                Entry(f"{ours}mlp_norm.{part}", (f"{theirs}ln_2.{part}",)),
                Entry(f"{ours}mlp.up_proj.{part}", (f"{theirs}mlp.c_fc.{part}",), transposed),
                Entry(f"{ours}mlp.down_proj.{part}", (f"{theirs}mlp.c_proj.{part}",), transposed),
            ]
    return [*entries, *(Entry(f"norm.{part}", (f"transformer.ln_f.{part}",)) for part in ("weight", "bias"))]


def qwen3_entries(config: ModelConfig) -> list[Entry]:
    entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        parts = ("weight", "bias") if config.attention_bias else ("weight",)
        for part in parts:
            qkv = tuple(f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv")
            entries += [
                Entry(f"{ours}attention.qkv_proj.{part}", qkv),
                Entry(f"{ours}attention.o_proj.{part}", (f"{theirs}self_attn.o_proj.{part}",)),
            ]
        up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        entries += [
            Entry(f"{ours}attention.q_norm.weight", (f"{theirs}self_attn.q_norm.weight",)),
            Entry(f"{ours}attention.k_norm.weight", (f"{theirs}self_attn.k_norm.weight",)),
            Entry(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",)),
            Entry(f"{ours}mlp_norm.weight", (f"{theirs}post_attention_layernorm.weight",)),
            Entry(f"{ours}mlp.up_proj.weight", up),
            Entry(f"{ours}mlp.down_proj.weight", (f"{theirs}mlp.down_proj.weight",)),
        ]
    return [*entries, Entry("norm.weight", ("model.norm.weight",))]


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
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
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
        mlp=_choice(h.get("activation_function", "gelu_new"), activations, "activation_function"),
        norm_eps=h.get("layer_norm_epsilon", 1e-5),
        initializer_range=h.get("initializer_range", 0.02),
        tie_word_embeddings=h.get("tie_word_embeddings", True),
    )


def qwen3_config_to_hf(c: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
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
        # Both spellings: transformers 4 reads rope_theta, transformers 5 rope_parameters.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def qwen3_config_from_hf(h: Mapping[str, Any]) -> ModelConfig:
    rope = h.get("rope_parameters") or h.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json asks for rope scaling {kind!r}, which is not supported.")
    if h.get("use_sliding_window"):
        raise CheckpointError("config.json asks for use_sliding_window, which is not supported.")
    _choice(h.get("hidden_act", "silu"), {"silu": "swiglu", "swish": "swiglu"}, "hidden_act")
    return families.qwen3(
        vocab_size=h["vocab_size"],
        hidden_size=h["hidden_size"],
        num_hidden_layers=h["num_hidden_layers"],
        num_attention_heads=h["num_attention_heads"],
        num_key_value_heads=h.get("num_key_value_heads") or h["num_attention_heads"],
        head_dim=h.get("head_dim") or 128,
        intermediate_size=h["intermediate_size"],
        max_position_embeddings=h["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or h.get("rope_theta") or 10000.0),
        norm_eps=h.get("rms_norm_eps", 1e-6),
        attention_bias=h.get("attention_bias", False),
        initializer_range=h.get("initializer_range", 0.02),
        tie_word_embeddings=h.get("tie_word_embeddings", False),
    )


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


LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(gpt2_entries, gpt2_config_to_hf, gpt2_config_from_hf, r".*\.attn\.(bias|masked_bias)"),
    "qwen3": Layout(qwen3_entries, qwen3_config_to_hf, qwen3_config_from_hf, r".*\.rotary_emb\.inv_freq"),
}


def _layout(model_type: Any, where: str) -> Layout:
    if model_type not in LAYOUTS:
        raise CheckpointError(f"{where}: unknown model_type {model_type!r}. Supported: {', '.join(sorted(LAYOUTS))}.")
    return LAYOUTS[model_type]


def _entries(config: ModelConfig) -> list[Entry]:
    entries = LAYOUTS[config.model_type].entries(config)
    if not config.tie_word_embeddings:
        entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
    return entries


def config_to_hf(config: ModelConfig, *, eos_token_id: int | None = None) -> dict[str, Any]:
    """The contents of `config.json`."""
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
    try:
        return _layout(values.get("model_type"), str(path)).from_hf(values)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} has a value of the wrong type: {error}.") from None
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None


def weights_to_hf(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under their Hugging Face names, contiguous, on the CPU."""
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for entry in _entries(model.config):
        tensor = state[entry.ours].detach().cpu()
        tensor = tensor.mT if entry.transposed else tensor
        sizes = _split_sizes(model, entry)
        for name, part in zip(entry.theirs, tensor.split(sizes) if sizes else (tensor,), strict=True):
            result[name] = part.contiguous()
    return result


def load_weights(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights with Hugging Face names into `model`; CheckpointError lists missing, extra and misshapen ones."""
    if model.config.model_type == "gpt2" and not any(name.startswith("transformer.") for name in tensors):
        tensors = {("" if name.startswith("lm_head") else "transformer.") + name: t for name, t in tensors.items()}
    entries = _entries(model.config)
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
            if any(name in missing for name in entry.theirs):
                continue
            parts = [tensors[name] for name in entry.theirs]
            sizes = _split_sizes(model, entry)
            target = state[entry.ours].mT if entry.transposed else state[entry.ours]
            shapes = [tuple(t.shape) for t in (target.split(sizes) if sizes else (target,))]
            bad = [
                f"{name} is {list(part.shape)}, expected {list(shape)}"
                for name, part, shape in zip(entry.theirs, parts, shapes, strict=True)
                if tuple(part.shape) != shape
            ]
            wrong += bad
            if not bad:
                target.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])
    problems = [
        f"{what}: {', '.join(names[:8])}{' and ' + str(len(names) - 8) + ' more' if len(names) > 8 else ''}"
        for what, names in (("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit its config.json; " + "; ".join(problems) + ".")


def _split_sizes(model: Transformer, entry: Entry) -> tuple[int, ...] | None:
    return model.fused_rows(entry.ours) if len(entry.theirs) > 1 else None


def save_model(model: Transformer, directory: Path, *, eos_token_id: int | None = None) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into an existing directory."""
    from safetensors.torch import save

    directory = Path(directory)
    config = config_to_hf(model.config, eos_token_id=eos_token_id)
    generation = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "do_sample": True, "temperature": 0.8}
    for name, values in ((CONFIG_FILE, config), ("generation_config.json", generation)):
        with atomic_file(directory / name, "w") as file:
            json.dump(values, file, indent=2)
            file.write("\n")
    with atomic_file(directory / WEIGHTS_FILE) as file:
        file.write(save(weights_to_hf(model), metadata={"format": "pt"}))


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
