"""A GGUF file's metadata as the Hugging Face configuration of its model, and back.

The settings are named `{architecture}.{key}`; llama.cpp's src/llama-arch.cpp lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.gguf_file import GgufFile
from gptsmith.formats.gguf_weights import ARCHITECTURES, head_dim_of
from gptsmith.log import note

_MAX_CONTEXT = 1 << 24  # tokens; RoPE tables are as long as the context

# Settings that change what llama.cpp computes; with these values they change nothing, and no others are supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}
_READ = {  # of these, what is read of an architecture
    "gptneox": ("use_parallel_residual",),
    "stablelm": ("use_parallel_residual",),
    "phi3": ("rope.scaling.attn_factor",),
    "deepseek2": ("expert_weights_scale", "rope.scaling.yarn_log_multiplier"),
}
_NEUTRAL_YARN: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


# Reading --------------------------------------------------------------------------------------------------------------


def metadata_to_config(file: GgufFile) -> dict[str, Any]:
    """Return the Hugging Face configuration of the model in a GGUF file.

    Raises CheckpointError for an unknown architecture and for settings that are missing, damaged or not supported.
    """
    return _ConfigReader(file).read()


class _ConfigReader:
    def __init__(self, file: GgufFile) -> None:
        self.file, self.tensors = file, file.tensors
        self.arch = str(file.metadata.get("general.architecture"))

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {problem}.")

    def get(self, key: str, kind: type[int] | type[float] = int, default: Any = None) -> Any:
        """Return a setting of the architecture; of one given per layer, the value that all layers share."""
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.fail(f"the setting {self.arch}.{key} is missing")
        if isinstance(value, np.ndarray):
            distinct = set(value.tolist())
            if len(distinct) != 1:
                raise self.fail(f"the setting {self.arch}.{key} differs between layers, which is not supported")
            (value,) = distinct
        if kind is float and type(value) in (int, float):
            value = _shortest_decimal(float(value))
            if not (math.isfinite(value) and value > 0):
                raise self.fail(f"the setting {self.arch}.{key} is {value}, not a positive number")
        elif type(value) is not kind or not 0 < value < 1 << 31:
            raise self.fail(f"the setting {self.arch}.{key} is {value!r:.80}, not a positive integer")
        return value

    def whole(self, key: str) -> int:
        """Return a setting that is a number of at least 0, and 0 if it is missing."""
        return self.get(key) if self.file.metadata.get(f"{self.arch}.{key}", 0) != 0 else 0

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must exist."""
        if name not in self.tensors:
            raise self.fail(f"the tensor {name} is missing")
        shape = self.tensors[name].shape
        if len(shape) != dimensions:
            raise self.fail(f"the tensor {name} has {len(shape)} dimensions, expected {dimensions}")
        return shape

    def token_id(self, name: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def read(self) -> dict[str, Any]:
        known = sorted({each.gguf for each in ARCHITECTURES.values()})
        if self.arch == "clip":
            raise self.fail(
                "it holds a vision tower and a projector (mmproj); the text model is in a GGUF file of its own"
            )
        if self.arch not in known:
            raise self.fail(f"unknown architecture {self.arch!r:.80}. Supported: {', '.join(known)}")
        self.check_neutral(_NEUTRAL)
        has_experts = self.file.metadata.get(f"{self.arch}.expert_count", 0) != 0
        candidates = [a for a in ARCHITECTURES.values() if a.gguf == self.arch and bool(a.experts) == has_experts]
        if not candidates:
            raise self.fail(f"a {self.arch} model {'with' if has_experts else 'without'} experts is not supported")
        arch = candidates[0]
        vocab_size, hidden_size = self.shape("token_embd.weight", 2)
        layers = self.get("block_count")
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if layers != len(blocks):
            raise self.fail(f"block_count is {layers:,}, but the file has tensors of {len(blocks):,} layers")
        context = self.get("context_length")
        if context > _MAX_CONTEXT:
            raise self.fail(f"a context of {context:,} tokens is more than the supported {_MAX_CONTEXT:,}")
        if self.get("embedding_length") != hidden_size:
            raise self.fail(f"{self.arch}.embedding_length is not {hidden_size}, the width of token_embd.weight")
        common = {
            "architectures": [arch.hf_class],
            "model_type": arch.hf,
            "vocab_size": vocab_size,
            "tie_word_embeddings": self.embeddings_are_tied(),
            "initializer_range": 0.02,
            "bos_token_id": self.token_id("bos"),
            "eos_token_id": self.token_id("eos"),
            "dtype": "float32",
        }
        if arch.hf == "gpt2":
            return common | self.gpt2_config(hidden_size, layers, context)
        if arch.hf == "gpt_neox":
            return common | self.gpt_neox_config(hidden_size, layers, context)
        if arch.hf == "deepseek_v3":
            return common | self.deepseek_config(hidden_size, layers, context)
        return common | self.llama_config(arch.hf, has_experts, hidden_size, layers, context)

    def check_neutral(self, settings: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise CheckpointError for a setting that is not read and has another value than those that change nothing."""
        for key, neutral in settings.items():
            if key in _READ.get(self.arch, ()):
                continue
            value = self.file.metadata.get(f"{self.arch}.{key}", neutral[0])
            if isinstance(value, np.ndarray) or value not in neutral:
                raise self.fail(f"the setting {self.arch}.{key} is {value!r:.80}, which is not supported")

    def embeddings_are_tied(self) -> bool:
        """Return whether there is no output matrix, or only a copy of the embeddings, as some writers store it."""
        if "output.weight" not in self.tensors:
            return True
        a, b = self.tensors["output.weight"], self.tensors["token_embd.weight"]
        if (a.type, a.shape) != (b.type, b.shape):
            return False
        start = min(a.num_bytes, 1 << 16)  # matrices that differ nearly always differ in the first bytes
        return all(
            np.array_equal(self.file.bytes_of(a.name, size), self.file.bytes_of(b.name, size))
            for size in (start, a.num_bytes)
        )

    def gpt2_config(self, hidden_size: int, layers: int, context: int) -> dict[str, Any]:
        heads = self.get("attention.head_count")
        if hidden_size % heads:
            raise self.fail(f"the hidden size {hidden_size} is not a multiple of the number of heads, {heads}")
        return {
            "n_positions": context,
            "n_embd": hidden_size,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": self.shape("blk.0.ffn_up.weight", 2)[0],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": self.get("attention.layer_norm_epsilon", float),
        }

    def llama_config(
        self, model_type: str, has_experts: bool, hidden_size: int, layers: int, context: int
    ) -> dict[str, Any]:
        heads = self.get("attention.head_count")
        kv_heads = self.get("attention.head_count_kv", default=heads)
        head_dim = self.get("attention.key_length", default=max(1, hidden_size // heads))
        if self.get("attention.value_length", default=head_dim) != head_dim:
            raise self.fail("keys and values of different widths are not supported")
        rotary = self.get("rope.dimension_count", default=head_dim)
        partial = model_type in ("phi3", "stablelm")
        if (rotary != head_dim and not (partial and rotary < head_dim)) or rotary % 2:
            raise self.fail(f"RoPE over {rotary} of the {head_dim} numbers of a head is not supported")
        if heads % kv_heads:
            raise self.fail(f"{heads} heads cannot share {kv_heads} key-value heads evenly")
        theta = self.get("rope.freq_base", float, 10000.0)
        rope = self.rope_scaling(theta, rotary)
        config = {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": self.get("feed_forward_length", default=1 if has_experts else None),
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, **rope},
        }
        if rope["rope_type"] != "default":
            config["rope_scaling"] = rope
        if model_type == "stablelm":
            config["layer_norm_eps"] = self.get("attention.layer_norm_epsilon", float)
        else:
            config["rms_norm_eps"] = self.get("attention.layer_norm_rms_epsilon", float)
        if partial:
            config["partial_rotary_factor"] = rotary / head_dim
        if model_type in _LATER:
            config |= self.later_config(model_type, head_dim, rope)
        elif model_type == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        elif model_type == "qwen2":
            config["use_sliding_window"] = False
        elif model_type == "qwen3":
            config |= {"attention_bias": False, "use_sliding_window": False}
        elif has_experts:
            config |= self.expert_config(model_type)
        return config

    def gpt_neox_config(self, hidden_size: int, layers: int, context: int) -> dict[str, Any]:
        heads = self.get("attention.head_count")
        if hidden_size % heads:
            raise self.fail(f"the hidden size {hidden_size} is not a multiple of the number of heads, {heads}")
        theta = self.get("rope.freq_base", float, 10000.0)
        head_dim = hidden_size // heads
        rope = self.rope_scaling(theta, self.get("rope.dimension_count", default=head_dim))
        parallel = self.file.metadata.get(f"{self.arch}.use_parallel_residual", True)
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": self.get("feed_forward_length"),
            "hidden_act": "gelu",
            "max_position_embeddings": context,
            "layer_norm_eps": self.get("attention.layer_norm_epsilon", float),
            "rotary_emb_base": theta,
            "rotary_pct": self.get("rope.dimension_count", default=head_dim) / head_dim,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "use_parallel_residual": bool(parallel),
            "pad_token_id": None,
        }

    def deepseek_config(self, hidden_size: int, layers: int, context: int) -> dict[str, Any]:
        scoring = self.file.metadata.get(f"{self.arch}.expert_gating_func", _SOFTMAX)
        if scoring != _SIGMOID:
            raise self.fail(
                f"experts are not chosen by sigmoid scores (expert_gating_func is {scoring!r:.80}, not {_SIGMOID}), as "
                "in DeepSeek-V2, which is not supported"
            )
        heads = self.get("attention.head_count")
        # Older files have the widths of heads under these names, as if it were plain attention.
        ending = "" if "blk.0.attn_kv_b.weight" in self.tensors else "_mla"
        head_dim, value_dim = (self.get(f"attention.{part}_length{ending}") for part in ("key", "value"))
        rotary, theta = self.get("rope.dimension_count"), self.get("rope.freq_base", float, 10000.0)
        if rotary >= head_dim:
            raise self.fail(f"RoPE over {rotary} of the {head_dim} numbers of a head is not supported")
        rope = self.rope_scaling(theta, rotary)
        sharper = self.file.metadata.get(f"{self.arch}.rope.scaling.yarn_log_multiplier", 0.0)
        if rope["rope_type"] == "yarn" and sharper != 0:
            scale = _shortest_decimal(10 * self.get("rope.scaling.yarn_log_multiplier", float))
            rope |= {"mscale": scale, "mscale_all_dim": scale}
        experts, used = self.get("expert_count"), self.get("expert_used_count")
        if used > experts:
            raise self.fail(f"expert_used_count is {used}, more than the {experts} experts")
        groups = self.get("expert_group_count", default=1)
        if f"{self.arch}.expert_group_count" not in self.file.metadata:
            note(
                f"note: {self.file.path} does not tell the groups of experts (expert_group_count), as older files. A "
                "token's experts are chosen among all of them, as llama.cpp does."
            )
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "qk_nope_head_dim": head_dim - rotary,
            "qk_rope_head_dim": rotary,
            "v_head_dim": value_dim,
            "kv_lora_rank": self.get("attention.kv_lora_rank"),
            "q_lora_rank": None if "blk.0.attn_q.weight" in self.tensors else self.get("attention.q_lora_rank"),
            "hidden_act": "silu",
            "intermediate_size": self.get("feed_forward_length"),
            "moe_intermediate_size": self.get("expert_feed_forward_length"),
            "n_shared_experts": self.get("expert_shared_count"),
            "n_routed_experts": experts,
            "num_experts_per_tok": used,
            "first_k_dense_replace": self.whole("leading_dense_block_count"),
            "norm_topk_prob": bool(self.file.metadata.get(f"{self.arch}.expert_weights_norm", False)),
            "routed_scaling_factor": self.get("expert_weights_scale", float) if self.scales_experts() else 1.0,
            "n_group": groups,
            "topk_group": self.get("expert_group_used_count", default=1) if groups > 1 else 1,
            "max_position_embeddings": context,
            "rms_norm_eps": self.get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, **rope},
            "attention_bias": False,
            "pad_token_id": None,
        }

    def scales_experts(self) -> bool:
        """Return whether the weights of experts are multiplied by a number; 0 stands for none."""
        return bool(self.file.metadata.get(f"{self.arch}.expert_weights_scale", 0.0) != 0)

    def later_config(self, model_type: str, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
        """Return what a family has beyond Llama's settings. Some of it is fixed per architecture in llama.cpp."""
        config: dict[str, Any] = {"pad_token_id": None}
        if model_type == "phi3":
            original = rope.get("original_max_position_embeddings", self.get("context_length"))
            return config | {"sliding_window": None, "original_max_position_embeddings": original}
        if model_type == "stablelm":
            return config | {
                "use_qkv_bias": "blk.0.attn_q.bias" in self.tensors,
                "qk_layernorm": "blk.0.attn_q_norm.weight" in self.tensors,
                "use_parallel_residual": "blk.0.ffn_norm.weight" not in self.tensors,
            }
        if model_type == "olmo2":
            return config | {"attention_bias": False}
        if model_type == "smollm3":
            return config | {"attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4}
        window = self.get("attention.sliding_window")
        if model_type == "gemma3_text":
            heads, layers = self.get("attention.head_count"), self.get("block_count")
            scalar = self.get("embedding_length") // heads if layers == _GEMMA_27B_LAYERS else head_dim
            local = self.get("rope.freq_base_swa", float, 10000.0)
            return config | {
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": scalar,
                "sliding_window": window,
                "sliding_window_pattern": 6,
                "rope_local_base_freq": local,
                "rope_parameters": None,
                "attention_bias": False,
            }
        experts, used = self.get("expert_count"), self.get("expert_used_count")
        if used > experts:
            raise self.fail(f"expert_used_count is {used}, more than the {experts} experts")
        if rope["rope_type"] == "yarn":
            rope["truncate"] = False  # as it was trained; llama.cpp rounds
        return config | {
            "intermediate_size": self.get("expert_feed_forward_length"),
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": window,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "rope_parameters": {"rope_theta": self.get("rope.freq_base", float, 150000.0), **rope},
        }

    def expert_config(self, model_type: str) -> dict[str, Any]:
        experts, used = self.get("expert_count"), self.get("expert_used_count")
        if used > experts:
            raise self.fail(f"expert_used_count is {used}, more than the {experts} experts")
        stacked, inner, _ = self.shape("blk.0.ffn_gate_exps.weight", 3)
        if experts != stacked:
            raise self.fail(f"expert_count is {experts}, but blk.0.ffn_gate_exps.weight has {stacked} experts")
        config: dict[str, Any] = {"num_experts_per_tok": used}
        if model_type == "mixtral":
            return config | {"num_local_experts": experts, "sliding_window": None}
        config |= {
            "num_experts": experts,
            "moe_intermediate_size": inner,
            "norm_topk_prob": model_type == "qwen3_moe",  # fixed per architecture in llama.cpp
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "use_sliding_window": False,
        }
        if model_type == "qwen2_moe":
            shared = self.shape("blk.0.ffn_gate_shexp.weight", 2)[0]
            config |= {"qkv_bias": True, "shared_expert_intermediate_size": shared}
        return config

    def rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Return Hugging Face's `rope_parameters` without the base."""
        if "rope_freqs.weight" in self.tensors:
            return self.llama3_scaling(theta, head_dim)
        if "rope_factors_short.weight" in self.tensors:
            factors = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
            return {
                "rope_type": "longrope",
                **{key: [float(x) for x in self.read_factors(name, head_dim)] for key, name in factors.items()},
                "original_max_position_embeddings": self.get("rope.scaling.original_context_length"),
                "attention_factor": self.get("rope.scaling.attn_factor", float, 1.0),
            }
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
        if kind == "linear" and factor != 1:
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            self.check_neutral(_NEUTRAL_YARN)
            original = self.get("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "default"}

    def read_factors(self, name: str, rotary: int) -> np.ndarray:
        if self.shape(name, 1) != (rotary // 2,):
            raise self.fail(f"the tensor {name} does not have {rotary // 2} numbers, one per RoPE pair")
        return self.file.read(name)

    def llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Recover Llama 3.1's settings from the divisors that were computed from them (usually 1, 4 and 8192)."""
        if self.shape("rope_freqs.weight", 1) != (head_dim // 2,):
            raise self.fail(f"the tensor rope_freqs.weight does not have {head_dim // 2} numbers, one per RoPE pair")
        divisors = self.file.read("rope_freqs.weight")
        factor = _shortest_decimal(float(divisors.max()))
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
    """Return what each RoPE pair's frequency is divided by: 1 for short wavelengths, up to `factor` for long ones.

    (D/2,) float32. Llama 3's scaling is stored in GGUF as this tensor.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    divisors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors.astype(np.float32)


_SAMPLING = {  # llama.cpp's keys, by those of generation_config.json
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def sampling_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling defaults in a GGUF file, as generation_config.json has them."""
    values = {name: metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
    found = {name: _shortest_decimal(x) if type(x) is float else x for name, x in values.items() if x is not None}
    return {"do_sample": True, **found} if found else {}


def sampling_to_metadata(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata for the sampling defaults of a generation_config.json."""
    values: dict[str, Any] = {key: generation_config.get(name) for name, key in _SAMPLING.items()}
    return {
        f"general.sampling.{key}": int(value) if key == "top_k" else float(value)
        for key, value in values.items()
        if type(value) in (int, float) and value >= 0
    }


def _shortest_decimal(value: float) -> float:
    """Return the shortest decimal number that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if abs(value) < 3e38 else value


# Writing --------------------------------------------------------------------------------------------------------------


def config_to_metadata(c: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for a Hugging Face configuration. Raise UsageError for what llama.cpp does not compute."""
    arch = ARCHITECTURES[c["model_type"]]
    if arch.hf == "gpt2":
        if c["activation_function"] not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UsageError(f"llama.cpp's gpt2 uses tanh GELU; this model uses {c['activation_function']}.")
        for key, supported in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if c.get(key, supported) != supported:
                raise UsageError(f"llama.cpp's gpt2 has no setting for {key}={c[key]}.")
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

    if arch.hf == "deepseek_v3":
        return {f"{arch.gguf}.{key}": value for key, value in _deepseek_metadata(c).items()}
    if arch.hf in ("gpt_neox", *_LATER):
        return {f"{arch.gguf}.{key}": value for key, value in _later_metadata(arch.hf, c).items()}
    if c["hidden_act"] not in ("silu", "swish"):
        raise UsageError(
            f"llama.cpp's {arch.gguf} uses SwiGLU; this model's feed-forward layers use {c['hidden_act']}."
        )
    if c.get("attention_bias") and arch.gguf != "llama":
        raise UsageError(f"llama.cpp's {arch.gguf} has no attention biases; this model has them.")
    if (arch.qkv_bias or c.get("attention_bias")) and c["num_attention_heads"] * c["head_dim"] != c["hidden_size"]:
        raise UsageError("llama.cpp supports query biases only if heads x head_dim equals the hidden size.")
    if arch.hf == "qwen3_moe" and not c["norm_topk_prob"]:
        raise UsageError("llama.cpp's qwen3moe normalizes the weights of the chosen experts; norm_topk_prob is false.")
    if arch.hf == "qwen2_moe" and c["norm_topk_prob"]:
        raise UsageError("llama.cpp's qwen2moe does not normalize the chosen experts' weights; norm_topk_prob is true.")
    if arch.hf == "qwen2_moe" and not c["qkv_bias"]:
        raise UsageError("llama.cpp's qwen2moe requires biases of queries, keys and values; this model has none.")
    context, window = c["max_position_embeddings"], c.get("sliding_window")
    if window and c.get("use_sliding_window", True):
        # llama.cpp has no sliding window in these architectures; within one window both compute the same.
        context = min(context, window)
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


_LATER = ("phi3", "olmo2", "stablelm", "smollm3", "gemma3_text", "gpt_oss")
_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's `expert_gating_func`
_GEMMA_27B_LAYERS = 62  # by which llama.cpp recognizes the model with another scale of the scores


def _refuse(what: str, values: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise UsageError for a setting of a configuration with another value than llama.cpp's."""
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise UsageError(f"llama.cpp's {what} has {key}={value}; this model has {values[key]!r:.80}.")


def _later_metadata(kind: str, c: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a family whose layout is in `formats.layouts`."""
    arch, layers = ARCHITECTURES[kind].gguf, c["num_hidden_layers"]
    activation = c.get("hidden_activation") or c["hidden_act"]
    expected = {"gpt_neox": ("gelu", "gelu_new"), "gemma3_text": ("gelu_new", "gelu_pytorch_tanh")}
    if activation not in expected.get(kind, ("silu", "swish")):
        raise UsageError(f"llama.cpp's {arch} has another activation than this model's {activation}.")
    head_dim = head_dim_of(c)
    heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    rope = c.get("rope_parameters") or {}
    if kind == "gemma3_text":
        rope = rope["full_attention"]
    scaling = rope.get("rope_type", "default")
    if scaling == "llama3" or (kind == "gemma3_text" and scaling not in ("default", "linear")):
        raise UsageError(f"llama.cpp's {arch} has no RoPE scaling of type {scaling!r}.")
    if kind == "gpt_oss" and scaling == "yarn" and rope.get("truncate", True):
        raise UsageError("GGUF files of gpt-oss are read with YaRN that does not round (truncate=false).")
    if scaling == "longrope" and rope.get("attention_factor", 1.0) <= 0:
        raise UsageError("llama.cpp needs an attention_factor of longrope above 0.")
    part = rope.get("partial_rotary_factor", 1.0) if rope.get("rope_type") != "proportional" else 1.0
    settings: dict[str, Any] = {
        "vocab_size": c["vocab_size"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "rope.dimension_count": int(head_dim * part),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind not in ("gpt_neox", "stablelm"):
        settings |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    eps = c.get("layer_norm_eps")
    name = "attention.layer_norm_rms_epsilon" if eps is None else "attention.layer_norm_epsilon"
    settings[name] = float(c["rms_norm_eps"] if eps is None else eps)
    if rope.get("rope_type") == "longrope":
        factor = rope["factor"]
        original = rope["original_max_position_embeddings"]
        sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        settings["rope.scaling.original_context_length"] = original
        settings["rope.scaling.attn_factor"] = float(rope.get("attention_factor", sharper))
    else:
        settings |= _rope_metadata({**rope, "truncate": True} if kind == "gpt_oss" else rope)
    if kind == "gpt_neox":
        _refuse(arch, c, {"attention_bias": True})
        settings["use_parallel_residual"] = c["use_parallel_residual"]
    elif kind == "stablelm":
        settings["use_parallel_residual"] = c["use_parallel_residual"]
    elif kind == "phi3":
        if c["sliding_window"]:  # which llama.cpp has switched off
            settings["context_length"] = min(settings["context_length"], c["sliding_window"])
    elif kind == "olmo2":
        _refuse(arch, c, {"attention_bias": False})
    elif kind == "smollm3":
        rotary = [int((i + 1) % 4 != 0) for i in range(layers)]
        _refuse(arch, c, {"attention_bias": False, "mlp_bias": False, "no_rope_layers": rotary})
        if c["sliding_window"]:
            settings["context_length"] = min(settings["context_length"], c["sliding_window"])
    elif kind == "gemma3_text":
        scalar = c["hidden_size"] // heads if layers == _GEMMA_27B_LAYERS else head_dim
        types = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)]
        _refuse(arch, c, {"attention_bias": False, "query_pre_attn_scalar": scalar, "layer_types": types})
        settings["attention.sliding_window"] = c["sliding_window"]
        settings["rope.freq_base_swa"] = float(c["rope_local_base_freq"])
    else:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        _refuse(arch, c, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True, "layer_types": types})
        settings |= {
            "attention.sliding_window": c["sliding_window"],
            "expert_count": c["num_local_experts"],
            "expert_used_count": c["num_experts_per_tok"],
            "expert_feed_forward_length": c["intermediate_size"],
        }
    return settings


def _deepseek_metadata(c: Mapping[str, Any]) -> dict[str, Any]:
    if c["hidden_act"] not in ("silu", "swish"):
        raise UsageError(f"llama.cpp's deepseek2 has another activation than this model's {c['hidden_act']}.")
    # llama.cpp normalizes the latent vectors with the model's epsilon, transformers always with this one.
    _refuse("deepseek2", c, {"attention_bias": False, "rms_norm_eps": 1e-6})
    layers, q_rank, kv_rank = c["num_hidden_layers"], c["q_lora_rank"], c["kv_lora_rank"]
    lite = layers in (26, 27) or (layers == 48 and c["vocab_size"] == 128256)
    if lite is not (q_rank is None):
        wanted, found = ("no q_lora_rank", q_rank) if lite else ("a q_lora_rank", "none")
        raise UsageError(f"llama.cpp's deepseek2 wants {wanted} in a model of {layers} layers; this one has {found}.")
    rope = c["rope_parameters"]
    scaling = _rope_metadata({key: value for key, value in rope.items() if key != "attention_factor"})
    if rope["rope_type"] == "yarn":
        # llama.cpp has one number for `mscale` and `mscale_all_dim`, which leaves cosines and sines as they are.
        sharper = rope.get("mscale_all_dim", 0.0)
        if rope["factor"] > 1 and (not sharper or rope.get("attention_factor") != 1):
            raise UsageError(
                "llama.cpp's deepseek2 computes YaRN only with an attention_factor of 1 and an mscale_all_dim, as of a "
                "config.json in which mscale and mscale_all_dim are equal."
            )
        scaling["rope.scaling.yarn_log_multiplier"] = 0.1 * float(sharper)
    elif rope["rope_type"] != "default":
        raise UsageError(f"llama.cpp's deepseek2 has no RoPE scaling of type {rope['rope_type']!r}.")
    rotary, groups = c["qk_rope_head_dim"], c["n_group"]
    if c["topk_group"] == groups:  # llama.cpp rejects it; to choose among all groups is to have none
        groups = 1
    return {
        "vocab_size": c["vocab_size"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "block_count": layers,
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1,  # of latent vectors, as they are in the cache
        "attention.key_length": kv_rank + rotary,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": c["qk_nope_head_dim"] + rotary,
        "attention.value_length_mla": c["v_head_dim"],
        "attention.kv_lora_rank": kv_rank,
        **({} if q_rank is None else {"attention.q_lora_rank": q_rank}),
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope["rope_theta"]),
        **scaling,
        "leading_dense_block_count": c["first_k_dense_replace"],
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_gating_func": _SIGMOID,
        "expert_weights_norm": bool(c["norm_topk_prob"]),
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_group_count": groups,
        "expert_group_used_count": 1 if groups == 1 else c["topk_group"],
    }


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
        default = 0.1 * math.log(max(1.0, rope["factor"])) + 1
        if (
            not math.isclose(rope.get("attention_factor", default), default, rel_tol=1e-6)
            or rope.get("beta_fast") not in (None, 32)
            or rope.get("beta_slow") not in (None, 1)
            or not rope.get("truncate", True)
            or rope["factor"] < 1
        ):
            raise UsageError(
                "llama.cpp's YaRN supports only beta_fast=32, beta_slow=1, truncate=true, the default attention_factor "
                "and a factor of at least 1."
            )
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }
    raise UsageError(f"GGUF has no RoPE scaling of type {kind!r}.")
