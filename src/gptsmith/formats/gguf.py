"""GGUF, llama.cpp's format of one file: its names, shapes and settings to Hugging Face's and back.

    gguf = read_gguf(path)      gguf.hf_config, gguf.tensors, gguf.metadata, gguf.chat_template
    write_gguf(model, tokenizer_to_gguf(tokenizer, model.config.vocab_size), path, "q8_0")

Reading gives what `model.hf` takes: a Hugging Face configuration and a mapping from Hugging Face names to tensors, each
dequantised when it is asked for. The tokenizer in the same file is `gptsmith.formats.gguf_tokenizer`'s.

What differs between the two worlds, and is undone here: llama.cpp rotates neighbouring numbers (2i, 2i + 1) in its
`llama` architecture where Hugging Face rotates halves (i, i + D/2), so the rows of the query and key weights lie in
another order; all experts of a layer are one tensor; GPT-2's projections are transposed; Llama 3's RoPE scaling is a
tensor of D/2 divisors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.gguf_file import TYPES_BY_NAME, GgufFile, PlannedTensor, TensorType, open_gguf, write_gguf_file
from gptsmith.formats.hf import config_to_hf, weights_to_hf
from gptsmith.model.quantized import Codes
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

GgufType = Literal["f32", "f16", "q8_0", "q4_0"]
GGUF_TYPES: dict[GgufType, int] = {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2}  # with llama.cpp's `general.file_type`

_MAX_CONTEXT = 1 << 24  # a model's tables of angles are as long as its context


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp as a Hugging Face `model_type`."""

    gguf: str
    hf: str
    hf_class: str
    experts: str = ""  # prefix of the mixture in a layer's Hugging Face names, if it has one
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    permuted: bool = False  # rotary pairs are neighbours, not halves
    qk_norm: bool = False
    qkv_bias: bool = False
    own_output: bool = False  # llama.cpp looks for an output matrix even where it is that of the embeddings


ARCHITECTURES = {
    each.hf: each
    for each in (
        Architecture("llama", "llama", "LlamaForCausalLM", permuted=True),
        Architecture("llama", "mistral", "MistralForCausalLM", permuted=True),
        Architecture("llama", "mixtral", "MixtralForCausalLM", "block_sparse_moe.", ("w1", "w3", "w2"), permuted=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", "mlp.", qkv_bias=True, own_output=True),
        Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", "mlp.", qk_norm=True),
        Architecture("gpt2", "gpt2", "GPT2LMHeadModel"),
    )
}


@dataclass(frozen=True)
class Slot:
    """A Hugging Face tensor and its place in a GGUF file."""

    hf: str
    gguf: str
    shape: tuple[int, ...]  # of the Hugging Face tensor
    expert: int | None = None  # its index in a tensor of all experts
    transposed: bool = False
    permuted_heads: int = 0  # 0: in Hugging Face's order

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of what the file holds of it: transposed, and without the one row of a gate."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape[1:] if self.gguf.endswith("ffn_gate_inp_shexp.weight") else shape


def slots(config: Mapping[str, Any]) -> Iterator[Slot]:
    """Every tensor of a model with this Hugging Face configuration."""
    yield from _gpt2_slots(config) if config["model_type"] == "gpt2" else _llama_slots(config)
    if not config["tie_word_embeddings"]:
        width = config.get("hidden_size") or config["n_embd"]
        yield Slot("lm_head.weight", "output.weight", (config["vocab_size"], width))


def _llama_slots(c: Mapping[str, Any]) -> Iterator[Slot]:
    arch = ARCHITECTURES[c["model_type"]]
    width, wide, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    yield Slot("model.embed_tokens.weight", "token_embd.weight", (c["vocab_size"], width))
    yield Slot("model.norm.weight", "output_norm.weight", (width,))
    for i in range(c["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"blk.{i}."
        yield Slot(f"{theirs}input_layernorm.weight", f"{ours}attn_norm.weight", (width,))
        yield Slot(f"{theirs}post_attention_layernorm.weight", f"{ours}ffn_norm.weight", (width,))
        for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            name, place = f"{theirs}self_attn.{letter}_proj.", f"{ours}attn_{letter}."
            permuted = count if arch.permuted and letter != "v" else 0
            yield Slot(f"{name}weight", f"{place}weight", (count * head, width), permuted_heads=permuted)
            if arch.qkv_bias or c.get("attention_bias"):
                yield Slot(f"{name}bias", f"{place}bias", (count * head,), permuted_heads=permuted)
        yield Slot(f"{theirs}self_attn.o_proj.weight", f"{ours}attn_output.weight", (width, heads * head))
        if c.get("attention_bias"):
            yield Slot(f"{theirs}self_attn.o_proj.bias", f"{ours}attn_output.bias", (width,))
        if arch.qk_norm:
            for letter in "qk":
                name, place = f"{theirs}self_attn.{letter}_norm.weight", f"{ours}attn_{letter}_norm.weight"
                yield Slot(name, place, (head,))
        if arch.experts:
            experts = c.get("num_local_experts") or c["num_experts"]
            yield Slot(f"{theirs}{arch.experts}gate.weight", f"{ours}ffn_gate_inp.weight", (experts, width))
            wide = c.get("moe_intermediate_size") or c["intermediate_size"]
            for expert in range(experts):
                for part, place in zip(arch.expert_parts, ("gate", "up", "down"), strict=True):
                    shape = (width, wide) if place == "down" else (wide, width)
                    name = f"{theirs}{arch.experts}experts.{expert}.{part}.weight"
                    yield Slot(name, f"{ours}ffn_{place}_exps.weight", shape, expert=expert)
            if shared := c.get("shared_expert_intermediate_size"):
                yield Slot(f"{theirs}mlp.shared_expert_gate.weight", f"{ours}ffn_gate_inp_shexp.weight", (1, width))
                for place in ("gate", "up", "down"):
                    shape = (width, shared) if place == "down" else (shared, width)
                    name = f"{theirs}mlp.shared_expert.{place}_proj.weight"
                    yield Slot(name, f"{ours}ffn_{place}_shexp.weight", shape)
            continue
        for place in ("gate", "up", "down"):
            name = f"{theirs}mlp.{place}_proj."
            rows, columns = (width, wide) if place == "down" else (wide, width)
            yield Slot(f"{name}weight", f"{ours}ffn_{place}.weight", (rows, columns))
            if c.get("mlp_bias"):
                yield Slot(f"{name}bias", f"{ours}ffn_{place}.bias", (rows,))


def _gpt2_slots(c: Mapping[str, Any]) -> Iterator[Slot]:
    width, wide = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    yield Slot("transformer.wte.weight", "token_embd.weight", (c["vocab_size"], width))
    yield Slot("transformer.wpe.weight", "position_embd.weight", (c["n_positions"], width))
    for i in range(c["n_layer"]):
        theirs, ours = f"transformer.h.{i}.", f"blk.{i}."
        for name, place, shape in (
            ("attn.c_attn", "attn_qkv", (width, 3 * width)),
            ("attn.c_proj", "attn_output", (width, width)),
            ("mlp.c_fc", "ffn_up", (width, wide)),
            ("mlp.c_proj", "ffn_down", (wide, width)),
        ):
            yield Slot(f"{theirs}{name}.weight", f"{ours}{place}.weight", shape, transposed=True)
            yield Slot(f"{theirs}{name}.bias", f"{ours}{place}.bias", shape[1:])
        for name, place in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            for part in ("weight", "bias"):
                yield Slot(f"{theirs}{name}.{part}", f"{ours}{place}.{part}", (width,))
    for part in ("weight", "bias"):
        yield Slot(f"transformer.ln_f.{part}", f"output_norm.{part}", (width,))


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of `heads` heads from llama.cpp's order (pairs of neighbours) to Hugging Face's (two halves)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_to_halves`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# reading


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds. metadata: its key-value pairs, the tokenizer among them."""

    path: Path
    hf_config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]

    @property
    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


class _LazyTensors(Mapping[str, Tensor]):
    """Hugging Face name -> float32 tensor, read and dequantised anew each time it is asked for."""

    def __init__(self, file: GgufFile, places: Mapping[str, Slot]) -> None:
        self._file, self._places = file, places

    def __contains__(self, name: object) -> bool:  # Mapping's own would dequantise to find out
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        slot = self._places[name]
        numbers = self._file.read(slot.gguf, slot.expert)
        if slot.permuted_heads:
            numbers = _to_halves(numbers, slot.permuted_heads)
        tensor = torch.from_numpy(numbers)
        return tensor.mT if slot.transposed else tensor.view(slot.shape)

    def is_quantized(self, name: str) -> bool:
        """Whether the file has it in blocks of few bits, of whatever kind."""
        return self._file.tensors[self._places[name].gguf].type.block_size > 1

    def codes(self, name: str) -> Codes | None:
        """The matrix in few bits, in the file's orientation; None if it is not there in such bits."""
        slot = self._places[name]
        codes = self._file.codes(slot.gguf, slot.expert)
        if codes is None or not slot.permuted_heads:
            return codes
        order = torch.from_numpy(_to_halves(np.arange(len(codes.codes)), slot.permuted_heads))
        least = None if codes.least is None else codes.least[order]
        return Codes(codes.bits, codes.codes[order], codes.scales[order], least)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors' shapes; nothing is read."""
        return {name: slot.shape for name, slot in self._places.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_gguf(path: Path) -> GgufModel:
    """The model in a GGUF file. Tensors are checked for presence and shape now, and read when they are asked for.

    Raises CheckpointError, naming the file, for one that is damaged, of an unknown architecture, without all of its
    tensors, or (when a tensor is asked for) with numbers that are not finite.
    """
    file = open_gguf(path)
    config = _Settings(file).hf_config()
    wanted = list(slots(config))
    present = file.tensors
    missing = sorted({slot.gguf for slot in wanted} - present.keys())
    known = {slot.gguf for slot in wanted} | {"rope_freqs.weight", "output.weight"}
    extra = sorted(present.keys() - known)
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    wrong = []
    for slot in wanted:
        if slot.gguf in present and not slot.expert:
            shape = slot.stored_shape
            shape = shape if slot.expert is None else (experts, *shape)
            if present[slot.gguf].shape != shape:
                wrong.append(f"{slot.gguf} is {list(present[slot.gguf].shape)}, expected {list(shape)}")
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit its architecture; {'; '.join(problems)}.")
    return GgufModel(file.path, config, _LazyTensors(file, {slot.hf: slot for slot in wanted}), file.metadata)


class _Settings:
    """A file's metadata as a Hugging Face configuration."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.tensors = file, file.tensors
        self.arch = str(file.metadata.get("general.architecture"))

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {problem}.")

    def get(self, key: str, kind: type[Any] = int, default: Any = None) -> Any:
        """A setting of the architecture. A number given for each layer is taken if it is the same in all."""
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.fail(f"the setting {self.arch}.{key} is missing")
        if isinstance(value, np.ndarray):
            distinct = set(value.tolist())
            if len(distinct) != 1:
                raise self.fail(f"the setting {self.arch}.{key} differs between layers, which is not supported")
            (value,) = distinct
        if kind is float and type(value) in (int, float):
            value = _shortest(float(value))
            if not (math.isfinite(value) and value > 0):
                raise self.fail(f"the setting {self.arch}.{key} is {value}, not a positive number")
        elif type(value) is not kind or (kind is int and not 0 < value < 1 << 31):
            raise self.fail(f"the setting {self.arch}.{key} is {value!r:.80}, not a {kind.__name__} of use")
        return value

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.fail(f"the tensor {name} is missing")
        shape = self.tensors[name].shape
        if len(shape) != dimensions:
            raise self.fail(f"the tensor {name} has {len(shape)} dimensions, expected {dimensions}")
        return shape

    def hf_config(self) -> dict[str, Any]:
        known = sorted({each.gguf for each in ARCHITECTURES.values()})
        if self.arch not in known:
            raise self.fail(f"unknown architecture {self.arch!r:.80}. Supported: {', '.join(known)}")
        mixture = self.file.metadata.get(f"{self.arch}.expert_count", 0) != 0
        candidates = [a for a in ARCHITECTURES.values() if a.gguf == self.arch and bool(a.experts) == mixture]
        if not candidates:
            raise self.fail(f"a {self.arch} model {'with' if mixture else 'without'} experts is not supported")
        arch = candidates[0]
        vocab_size, hidden_size = self.shape("token_embd.weight", 2)
        layers = self.get("block_count")
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if layers != len(blocks):
            raise self.fail(f"it says it has {layers:,} layers, but holds tensors of {len(blocks):,}")
        context = self.get("context_length")
        if context > _MAX_CONTEXT:
            raise self.fail(f"a context of {context:,} tokens is more than the {_MAX_CONTEXT:,} supported")
        heads = self.get("attention.head_count")
        if self.get("embedding_length") != hidden_size:
            raise self.fail(f"{self.arch}.embedding_length does not fit token_embd.weight, which is {hidden_size} wide")
        common = {
            "architectures": [arch.hf_class],
            "model_type": arch.hf,
            "vocab_size": vocab_size,
            "tie_word_embeddings": self.tied(),
            "initializer_range": 0.02,
            "bos_token_id": self.token_id("bos"),
            "eos_token_id": self.token_id("eos"),
            "dtype": "float32",
        }
        if arch.hf == "gpt2":
            if hidden_size % heads:
                raise self.fail(f"{hidden_size} numbers do not divide into {heads} heads")
            return common | {
                "n_positions": context,
                "n_embd": hidden_size,
                "n_layer": layers,
                "n_head": heads,
                "n_inner": self.shape("blk.0.ffn_up.weight", 2)[0],
                "activation_function": "gelu_new",
                "layer_norm_epsilon": self.get("attention.layer_norm_epsilon", float),
            }

        key_value_heads = self.get("attention.head_count_kv", default=heads)
        head_dim = self.get("attention.key_length", default=max(1, hidden_size // heads))
        if self.get("attention.value_length", default=head_dim) != head_dim:
            raise self.fail("keys and values of different widths are not supported")
        if self.get("rope.dimension_count", default=head_dim) != head_dim or head_dim % 2:
            raise self.fail(f"rotary positions over a part of a head (or an odd one, of {head_dim}) are not supported")
        if heads % key_value_heads:
            raise self.fail(f"{heads} heads cannot share {key_value_heads} key-value heads evenly")
        theta = self.get("rope.freq_base", float, 10000.0)
        rope = self.rope_scaling(theta, head_dim)
        config = common | {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
            "intermediate_size": self.get("feed_forward_length", default=1 if mixture else None),
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": self.get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, **rope},
        }
        if rope["rope_type"] != "default":
            config["rope_scaling"] = rope
        if arch.hf == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        elif arch.hf == "qwen2":
            config["use_sliding_window"] = False
        elif arch.hf == "qwen3":
            config |= {"attention_bias": False, "use_sliding_window": False}
        elif mixture:
            experts, used = self.get("expert_count"), self.get("expert_used_count")
            if used > experts:
                raise self.fail(f"it uses {used} of {experts} experts")
            if experts != self.shape("blk.0.ffn_gate_exps.weight", 3)[0]:
                raise self.fail(f"it says it has {experts} experts, but blk.0.ffn_gate_exps.weight does not")
            config["num_experts_per_tok"] = used
            if arch.hf == "mixtral":
                config |= {"num_local_experts": experts, "sliding_window": None}
            else:
                config |= {
                    "num_experts": experts,
                    "moe_intermediate_size": self.shape("blk.0.ffn_gate_exps.weight", 3)[1],
                    "norm_topk_prob": arch.hf == "qwen3_moe",  # as llama.cpp computes it
                    "decoder_sparse_step": 1,
                    "mlp_only_layers": [],
                    "attention_bias": False,
                    "use_sliding_window": False,
                }
            if arch.hf == "qwen2_moe":
                shared = self.shape("blk.0.ffn_gate_shexp.weight", 2)[0]
                config |= {"qkv_bias": True, "shared_expert_intermediate_size": shared}
        return config

    def tied(self) -> bool:
        """No output matrix, or (as some writers do) the embeddings once more."""
        if "output.weight" not in self.tensors:
            return True
        a, b = self.tensors["output.weight"], self.tensors["token_embd.weight"]
        if (a.type, a.shape) != (b.type, b.shape):
            return False
        data = np.frombuffer(self.file.data, dtype=np.uint8)
        begin = min(a.num_bytes, 1 << 16)  # where they differ, they nearly always differ soon
        return all(
            np.array_equal(data[a.offset : a.offset + size], data[b.offset : b.offset + size])
            for size in (begin, a.num_bytes)
        )

    def token_id(self, name: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Hugging Face's `rope_parameters` without the base."""
        if "rope_freqs.weight" in self.tensors:
            return self.llama3_scaling(theta, head_dim)
        metadata = self.file.metadata
        kind = metadata.get(f"{self.arch}.rope.scaling.type", "none")
        if kind == "none" and f"{self.arch}.rope.scale_linear" in metadata:  # older files
            kind, factor = "linear", self.get("rope.scale_linear", float)
        elif kind in ("linear", "yarn"):
            factor = self.get("rope.scaling.factor", float)
        elif kind == "none":
            factor = 1.0
        else:
            raise self.fail(f"RoPE scaling of type {kind!r:.80} is not supported")
        if kind == "linear" and factor > 1:
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self.get("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "default"}

    def llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3.1's settings, recovered from the divisors that follow from them (usually 1, 4 and 8192)."""
        if self.shape("rope_freqs.weight", 1) != (head_dim // 2,):
            raise self.fail("the tensor rope_freqs.weight does not have a number for each pair of a head")
        divisors = self.file.read("rope_freqs.weight")
        factor = _shortest(float(divisors.max()))
        if factor == 1.0 and (divisors == 1).all():
            return {"rope_type": "default"}
        original = self.get("rope.scaling.original_context_length", default=8192)
        settings = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        for context in (original, 8192):
            settings["original_max_position_embeddings"] = context
            if factor > 1 and np.allclose(divisors, llama3_divisors(theta, head_dim, settings), rtol=1e-3):
                return settings
        raise self.fail("the RoPE divisors in rope_freqs.weight are not those of Llama 3's scaling; not supported")


def llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """By what each pair's frequency is divided, (D/2,) float32: 1 for short wavelengths, `factor` for long ones."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    divisors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors.astype(np.float32)


def _shortest(value: float) -> float:
    """The shortest decimal number that float32 rounds to the same: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if abs(value) < 3e38 else value


# writing


def write_gguf(model: Transformer, vocabulary: Mapping[str, Any], path: Path, dtype: GgufType = "f16") -> None:
    """Write `model` as one GGUF file that llama.cpp loads, atomically.

    vocabulary: `gptsmith.formats.gguf_tokenizer.tokenizer_to_gguf(tokenizer, model.config.vocab_size)`.
    dtype: of the matrices. Norms, biases, routers and position embeddings stay float32; embeddings and output matrix
    are q8_0 in a q4_0 file; matrices whose rows do not divide into blocks of 32 stay float32.
    Raises UsageError for a model that llama.cpp would compute differently.
    """
    if dtype not in GGUF_TYPES:
        raise UsageError(f"GGUF type {dtype!r} is not one that is written. Choose from {', '.join(GGUF_TYPES)}.")
    if model.config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"GGUF has no architecture for a {model.config.model_type} model. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    config = config_to_hf(model.config)
    metadata = _gguf_metadata(config)  # refuses first
    weights = weights_to_hf(model)
    tensors = []
    grouped: dict[str, list[Slot]] = {}
    for slot in slots(config):
        grouped.setdefault(slot.gguf, []).append(slot)
    for name, group in grouped.items():
        shape = group[0].stored_shape
        shape = shape if group[0].expert is None else (len(group), *shape)
        numbers = partial(_gguf_numbers, group, weights)
        tensors.append(PlannedTensor(name, shape, _stored_type(name, shape, dtype), numbers))
    if ARCHITECTURES[config["model_type"]].own_output and config["tie_word_embeddings"]:
        embeddings = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(replace(embeddings, name="output.weight"))
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        divisors = llama3_divisors(rope["rope_theta"], config["head_dim"], rope)
        tensors.append(PlannedTensor("rope_freqs.weight", divisors.shape, TYPES_BY_NAME["F32"], lambda: divisors))
    header = {
        "general.architecture": ARCHITECTURES[config["model_type"]].gguf,
        "general.type": "model",
        "general.name": Path(path).stem,
        "general.file_type": GGUF_TYPES[dtype],
        "general.quantization_version": 2,
        **metadata,
        **vocabulary,
    }
    with atomic_file(Path(path)) as file:
        write_gguf_file(file, header, tensors)


def _gguf_numbers(group: list[Slot], weights: Mapping[str, Tensor]) -> np.ndarray:
    """The Hugging Face tensors of one GGUF tensor, as it holds them."""
    parts = []
    for slot in group:
        numbers = weights[slot.hf].float().numpy()
        numbers = numbers.T if slot.transposed else numbers.reshape(slot.stored_shape)
        parts.append(_to_neighbours(numbers, slot.permuted_heads) if slot.permuted_heads else numbers)
    return parts[0] if group[0].expert is None else np.stack(parts)


def _stored_type(name: str, shape: tuple[int, ...], dtype: GgufType) -> TensorType:
    if len(shape) == 1 or name == "position_embd.weight" or name.endswith("ffn_gate_inp.weight"):
        return TYPES_BY_NAME["F32"]
    if dtype == "q4_0" and name in ("token_embd.weight", "output.weight"):
        dtype = "q8_0"
    whole = shape[-1] % 32 == 0  # llama.cpp's kernels for some processors read float16 rows, too, by 32
    return TYPES_BY_NAME[dtype.upper() if whole else "F32"]


def _gguf_metadata(c: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's settings. UsageError for what llama.cpp does not compute."""
    arch = ARCHITECTURES[c["model_type"]]
    if arch.hf == "gpt2":
        if c["activation_function"] not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UsageError("llama.cpp's gpt2 has the tanh form of GELU; this model has the exact one.")
        settings: dict[str, Any] = {
            "context_length": c["n_positions"],
            "embedding_length": c["n_embd"],
            "feed_forward_length": c.get("n_inner") or 4 * c["n_embd"],
            "block_count": c["n_layer"],
            "attention.head_count": c["n_head"],
            "attention.head_count_kv": c["n_head"],
            "attention.layer_norm_epsilon": float(c["layer_norm_epsilon"]),
        }
        return {f"{arch.gguf}.{key}": value for key, value in settings.items()}

    if c.get("attention_bias") and arch.gguf != "llama":
        raise UsageError(f"llama.cpp's {arch.gguf} has no attention biases; this model has them.")
    if (arch.qkv_bias or c.get("attention_bias")) and c["num_attention_heads"] * c["head_dim"] != c["hidden_size"]:
        raise UsageError("llama.cpp has biases of the queries only where heads x head_dim is the hidden size.")
    if arch.hf == "qwen3_moe" and not c["norm_topk_prob"]:
        raise UsageError("llama.cpp's qwen3moe makes the chosen experts' weights add up to 1 (norm_topk_prob).")
    if arch.hf == "qwen2_moe" and c["norm_topk_prob"]:
        raise UsageError("llama.cpp's qwen2moe does not make the chosen experts' weights add up to 1 (norm_topk_prob).")
    if arch.hf == "qwen2_moe" and not c["qkv_bias"]:
        raise UsageError("llama.cpp's qwen2moe has biases of queries, keys and values; this model has none.")
    context, window = c["max_position_embeddings"], c.get("sliding_window")
    if window and c.get("use_sliding_window", True):
        context = min(context, window)  # up to there both see the same; llama.cpp has no window in this architecture
    settings = {
        "vocab_size": c["vocab_size"],
        "context_length": context,
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "block_count": c["num_hidden_layers"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.dimension_count": c["head_dim"],
        "rope.freq_base": float(c["rope_theta"]),
        **_rope_metadata(c.get("rope_parameters") or {}),
    }
    if arch.experts:
        settings["expert_count"] = c.get("num_local_experts") or c["num_experts"]
        settings["expert_used_count"] = c["num_experts_per_tok"]
        if "moe_intermediate_size" in c:
            settings["expert_feed_forward_length"] = c["moe_intermediate_size"]
        if "shared_expert_intermediate_size" in c:
            settings["expert_shared_feed_forward_length"] = c["shared_expert_intermediate_size"]
    return {f"{arch.gguf}.{key}": value for key, value in settings.items()}


def _rope_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings")
    if kind == "llama3":
        return {"rope.scaling.original_context_length": original}
    if kind == "yarn":
        usual = 0.1 * math.log(rope["factor"]) + 1
        if (
            not math.isclose(rope.get("attention_factor") or usual, usual, rel_tol=1e-6)
            or rope.get("beta_fast") not in (None, 32)
            or rope.get("beta_slow") not in (None, 1)
        ):
            raise UsageError("llama.cpp's YaRN has beta_fast 32, beta_slow 1 and the attention factor of the paper.")
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }
    raise UsageError(f"GGUF has no RoPE scaling of kind {kind!r}.")
