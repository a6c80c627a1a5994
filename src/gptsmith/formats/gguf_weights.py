"""Architectures of llama.cpp and their tensors: which GGUF tensor holds which Hugging Face tensor, and in what form.

These things differ between the two. llama.cpp's `llama` and `smollm3` rotate neighboring numbers (2i, 2i + 1) where
Hugging Face rotates halves (i, i + D/2), so the rows of query and key weights are in another order. All experts of a
layer are one tensor; so are the norms of its heads. GPT-2's projections are transposed. GPT-NeoX has queries, keys
and values head by head, gpt-oss gate and up row by row. Gemma's norms are stored plus 1. Of latent attention, the
matrices that make keys and those that make values are two tensors, the former transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gptsmith.formats.hf_weights import NORMS, Interleaved


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face `model_type` and the llama.cpp architecture that runs it."""

    gguf: str
    hf: str
    hf_class: str
    experts: str = ""
    """Prefix of the mixture of experts in a layer's Hugging Face names, if it has one."""
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    permuted: bool = False
    """RoPE pairs are neighbors instead of halves."""
    qk_norm: bool = False
    qkv_bias: bool = False
    requires_output: bool = False
    """llama.cpp requires an output matrix even where it equals the embeddings."""


ARCHITECTURES = {
    each.hf: each
    for each in (
        Architecture("llama", "llama", "LlamaForCausalLM", permuted=True),
        Architecture("llama", "mistral", "MistralForCausalLM", permuted=True),
        Architecture("llama", "mixtral", "MixtralForCausalLM", "block_sparse_moe.", ("w1", "w3", "w2"), permuted=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm=True),
        Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", "mlp.", qkv_bias=True, requires_output=True),
        Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", "mlp.", qk_norm=True),
        Architecture("gpt2", "gpt2", "GPT2LMHeadModel"),
        Architecture("gptneox", "gpt_neox", "GPTNeoXForCausalLM"),
        Architecture("phi3", "phi3", "Phi3ForCausalLM"),
        Architecture("olmo2", "olmo2", "Olmo2ForCausalLM"),
        Architecture("stablelm", "stablelm", "StableLmForCausalLM"),
        Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", permuted=True),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", qk_norm=True),
        Architecture("gpt-oss", "gpt_oss", "GptOssForCausalLM", "mlp.experts."),
        Architecture("deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM", "mlp.", requires_output=True),
    )
}


@dataclass(frozen=True)
class HeadRows:
    """A part of the rows of each head of a matrix: `start` to `stop`."""

    heads: int
    start: int
    stop: int

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return these rows of each head: (R, K) -> (heads, stop - start, K)."""
        return rows.reshape(self.heads, -1, rows.shape[-1])[:, self.start : self.stop]


@dataclass(frozen=True)
class TensorMapping:
    """A Hugging Face tensor and where a GGUF file stores it."""

    hf: str
    gguf: str
    shape: tuple[int, ...]
    """Of the Hugging Face tensor."""
    expert: int | None = None
    """Its index in a tensor of all experts, or of all heads."""
    reordered: Interleaved | None = None
    """The order of its rows in Hugging Face, where that differs from the file's."""
    offset: float = 0.0
    """What the file's numbers are larger by."""
    part: int | None = None
    """Of all experts' gate (0) and up (1), which Hugging Face stores as the alternating columns of one tensor."""
    head_rows: HeadRows | None = None
    """The rows that the file's tensor has, as a matrix for each head, where several tensors are one in Hugging Face."""
    transposed: bool = False
    permuted_heads: int = 0
    """Number of heads whose rows llama.cpp reorders; 0: none."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the file: transposed, and for a gate of one row without that dimension."""
        shape, rows = self.shape, self.head_rows
        if rows is not None:
            shape = (rows.heads, rows.stop - rows.start, shape[1])
        if self.transposed:
            shape = (*shape[:-2], *shape[:-3:-1])
        if self.part is not None:
            shape = (shape[0], shape[1] // 2, *shape[2:])
        return shape[1:] if self.gguf.endswith("ffn_gate_inp_shexp.weight") else shape


def tensor_mappings(config: Mapping[str, Any], *, joined_kv: bool = False) -> Iterator[TensorMapping]:
    """Yield the mapping of every tensor of a model with this Hugging Face configuration.

    joined_kv: the matrices of keys and values of latent attention are one tensor, as in files before April 2025.
    """
    others: dict[str, Callable[[Mapping[str, Any]], Iterator[TensorMapping]]] = {
        "gpt2": _gpt2_mappings,
        "gpt_neox": _gpt_neox_mappings,
        "phi3": _phi3_mappings,
        "gpt_oss": _gpt_oss_mappings,
        "deepseek_v3": partial(_deepseek_mappings, joined_kv=joined_kv),
    }
    yield from others.get(config["model_type"], _llama_mappings)(config)
    if not config["tie_word_embeddings"]:
        width = config.get("hidden_size") or config["n_embd"]
        head = "embed_out.weight" if config["model_type"] == "gpt_neox" else "lm_head.weight"
        yield TensorMapping(head, "output.weight", (config["vocab_size"], width))


def _llama_mappings(c: Mapping[str, Any]) -> Iterator[TensorMapping]:
    arch = ARCHITECTURES[c["model_type"]]
    width, inner, head_dim = c["hidden_size"], c["intermediate_size"], head_dim_of(c)
    heads, kv_heads, kind = c["num_attention_heads"], c["num_key_value_heads"], c["model_type"]
    offset = 1.0 if kind == "gemma3_text" else 0.0
    norm_parts = ("weight", "bias") if kind == "stablelm" else ("weight",)
    position = {"olmo2": "reordered", "gemma3_text": "sandwich"}.get(kind, "pre")
    qkv_bias = arch.qkv_bias or c.get("attention_bias") or c.get("use_qkv_bias")
    yield TensorMapping("model.embed_tokens.weight", "token_embd.weight", (c["vocab_size"], width))
    for part in norm_parts:
        yield TensorMapping(f"model.norm.{part}", f"output_norm.{part}", (width,), offset=offset)
    for i in range(c["num_hidden_layers"]):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        for ours, theirs in NORMS[position].items():
            if ours == "mlp_norm" and c.get("use_parallel_residual"):
                continue
            for part in norm_parts:
                name = f"{gguf}{_NORMS[position][ours]}.{part}"
                yield TensorMapping(f"{hf}{theirs}.{part}", name, (width,), offset=offset)
        for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            hf_name, gguf_name = f"{hf}self_attn.{letter}_proj.", f"{gguf}attn_{letter}."
            rows, permuted = count * head_dim, count if arch.permuted and letter != "v" else 0
            yield TensorMapping(f"{hf_name}weight", f"{gguf_name}weight", (rows, width), permuted_heads=permuted)
            if qkv_bias:
                yield TensorMapping(f"{hf_name}bias", f"{gguf_name}bias", (rows,), permuted_heads=permuted)
        yield TensorMapping(f"{hf}self_attn.o_proj.weight", f"{gguf}attn_output.weight", (width, heads * head_dim))
        if c.get("attention_bias"):
            yield TensorMapping(f"{hf}self_attn.o_proj.bias", f"{gguf}attn_output.bias", (width,))
        for letter, count in (("q", heads), ("k", kv_heads)):
            hf_name, gguf_name = f"{hf}self_attn.{letter}_norm.weight", f"{gguf}attn_{letter}_norm.weight"
            if kind == "olmo2":
                yield TensorMapping(hf_name, gguf_name, (count * head_dim,))
            elif arch.qk_norm:
                yield TensorMapping(hf_name, gguf_name, (head_dim,), offset=offset)
            elif c.get("qk_layernorm"):
                for head in range(count):
                    hf_name = f"{hf}self_attn.{letter}_layernorm.norms.{head}.weight"
                    yield TensorMapping(hf_name, gguf_name, (head_dim,), expert=head)
        if arch.experts:
            yield from _expert_mappings(c, f"{hf}{arch.experts}", gguf)
            continue
        for part in ("gate", "up", "down"):
            rows, columns = (width, inner) if part == "down" else (inner, width)
            yield TensorMapping(f"{hf}mlp.{part}_proj.weight", f"{gguf}ffn_{part}.weight", (rows, columns))
            if c.get("mlp_bias"):
                yield TensorMapping(f"{hf}mlp.{part}_proj.bias", f"{gguf}ffn_{part}.bias", (rows,))


def _expert_mappings(c: Mapping[str, Any], hf: str, gguf: str) -> Iterator[TensorMapping]:
    """The mixture of experts of one layer; hf, gguf: the prefixes of its names."""
    arch, width = ARCHITECTURES[c["model_type"]], c["hidden_size"]
    experts = c.get("num_local_experts") or c.get("n_routed_experts") or c["num_experts"]
    inner = c.get("moe_intermediate_size") or c["intermediate_size"]
    yield TensorMapping(f"{hf}gate.weight", f"{gguf}ffn_gate_inp.weight", (experts, width))
    for expert in range(experts):
        for hf_part, part in zip(arch.expert_parts, ("gate", "up", "down"), strict=True):
            shape = (width, inner) if part == "down" else (inner, width)
            hf_name = f"{hf}experts.{expert}.{hf_part}.weight"
            yield TensorMapping(hf_name, f"{gguf}ffn_{part}_exps.weight", shape, expert=expert)
    if shared := c.get("shared_expert_intermediate_size"):
        yield TensorMapping(f"{hf}shared_expert_gate.weight", f"{gguf}ffn_gate_inp_shexp.weight", (1, width))
        for part in ("gate", "up", "down"):
            shape = (width, shared) if part == "down" else (shared, width)
            yield TensorMapping(f"{hf}shared_expert.{part}_proj.weight", f"{gguf}ffn_{part}_shexp.weight", shape)


_NORMS = {
    "pre": {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    "reordered": {"attention_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"},
    "sandwich": {
        "attention_norm": "attn_norm",
        "attention_output_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "mlp_output_norm": "post_ffw_norm",
    },
}
"""llama.cpp's names of the norms in `hf_weights.NORMS`."""


def head_dim_of(c: Mapping[str, Any]) -> int:
    """Return the width of a head in a Hugging Face configuration."""
    width: int = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return width


def _gpt_neox_mappings(c: Mapping[str, Any]) -> Iterator[TensorMapping]:
    width, inner = c["hidden_size"], c["intermediate_size"]
    yield TensorMapping("gpt_neox.embed_in.weight", "token_embd.weight", (c["vocab_size"], width))
    qkv = Interleaved(3, head_dim_of(c))
    for i in range(c["num_hidden_layers"]):
        hf, gguf = f"gpt_neox.layers.{i}.", f"blk.{i}."
        for hf_name, gguf_name, shape, order in (
            ("attention.query_key_value", "attn_qkv", (3 * width, width), qkv),
            ("attention.dense", "attn_output", (width, width), None),
            ("mlp.dense_h_to_4h", "ffn_up", (inner, width), None),
            ("mlp.dense_4h_to_h", "ffn_down", (width, inner), None),
        ):
            yield TensorMapping(f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape, reordered=order)
            yield TensorMapping(f"{hf}{hf_name}.bias", f"{gguf}{gguf_name}.bias", shape[:1], reordered=order)
        for hf_name, gguf_name in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            for part in ("weight", "bias"):
                yield TensorMapping(f"{hf}{hf_name}.{part}", f"{gguf}{gguf_name}.{part}", (width,))
    for part in ("weight", "bias"):
        yield TensorMapping(f"gpt_neox.final_layer_norm.{part}", f"output_norm.{part}", (width,))


def _phi3_mappings(c: Mapping[str, Any]) -> Iterator[TensorMapping]:
    width, inner, head_dim = c["hidden_size"], c["intermediate_size"], head_dim_of(c)
    q_rows = c["num_attention_heads"] * head_dim
    yield TensorMapping("model.embed_tokens.weight", "token_embd.weight", (c["vocab_size"], width))
    yield TensorMapping("model.norm.weight", "output_norm.weight", (width,))
    for i in range(c["num_hidden_layers"]):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        for hf_name, gguf_name, shape in (
            ("input_layernorm", "attn_norm", (width,)),
            ("self_attn.qkv_proj", "attn_qkv", (q_rows + 2 * c["num_key_value_heads"] * head_dim, width)),
            ("self_attn.o_proj", "attn_output", (width, q_rows)),
            ("post_attention_layernorm", "ffn_norm", (width,)),
            ("mlp.gate_up_proj", "ffn_up", (2 * inner, width)),
            ("mlp.down_proj", "ffn_down", (width, inner)),
        ):
            yield TensorMapping(f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape)


def _gpt_oss_mappings(c: Mapping[str, Any]) -> Iterator[TensorMapping]:
    width, inner, head_dim, experts = c["hidden_size"], c["intermediate_size"], c["head_dim"], c["num_local_experts"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    yield TensorMapping("model.embed_tokens.weight", "token_embd.weight", (c["vocab_size"], width))
    yield TensorMapping("model.norm.weight", "output_norm.weight", (width,))
    for i in range(c["num_hidden_layers"]):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        projections = [
            *(
                (f"self_attn.{letter}_proj", f"attn_{letter}", (n * head_dim, width))
                for letter, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            ),
            ("self_attn.o_proj", "attn_output", (width, heads * head_dim)),
            ("mlp.router", "ffn_gate_inp", (experts, width)),
        ]
        for hf_name, gguf_name, shape in projections:
            yield TensorMapping(f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape)
            if c["attention_bias"] or hf_name == "mlp.router":
                yield TensorMapping(f"{hf}{hf_name}.bias", f"{gguf}{gguf_name}.bias", shape[:1])
        for hf_name, gguf_name, length in (
            ("input_layernorm.weight", "attn_norm.weight", width),
            ("post_attention_layernorm.weight", "post_attention_norm.weight", width),
            ("self_attn.sinks", "attn_sinks.weight", heads),
        ):
            yield TensorMapping(f"{hf}{hf_name}", f"{gguf}{gguf_name}", (length,))
        for part, name in enumerate(("gate", "up")):
            both, gguf_name = f"{hf}mlp.experts.gate_up_proj", f"{gguf}ffn_{name}_exps"
            fused = (experts, width, 2 * inner)
            yield TensorMapping(both, f"{gguf_name}.weight", fused, transposed=True, part=part)
            yield TensorMapping(f"{both}_bias", f"{gguf_name}.bias", (experts, 2 * inner), part=part)
        down, gguf_name = f"{hf}mlp.experts.down_proj", f"{gguf}ffn_down_exps"
        yield TensorMapping(down, f"{gguf_name}.weight", (experts, inner, width), transposed=True)
        yield TensorMapping(f"{down}_bias", f"{gguf_name}.bias", (experts, width))


def _deepseek_mappings(c: Mapping[str, Any], *, joined_kv: bool) -> Iterator[TensorMapping]:
    width, heads, value_dim = c["hidden_size"], c["num_attention_heads"], c["v_head_dim"]
    plain_dim, rotary, rank, q_rank = (
        c[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank")
    )
    q_rows = heads * (plain_dim + rotary)
    yield TensorMapping("model.embed_tokens.weight", "token_embd.weight", (c["vocab_size"], width))
    yield TensorMapping("model.norm.weight", "output_norm.weight", (width,))
    if q_rank is None:
        queries: list[tuple[str, str, tuple[int, ...]]] = [("q_proj", "attn_q", (q_rows, width))]
    else:
        queries = [
            ("q_a_proj", "attn_q_a", (q_rank, width)),
            ("q_a_layernorm", "attn_q_a_norm", (q_rank,)),
            ("q_b_proj", "attn_q_b", (q_rows, q_rank)),
        ]
    kv_b = (heads * (plain_dim + value_dim), rank)
    for i in range(c["num_hidden_layers"]):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        for hf_name, gguf_name, shape in (
            ("input_layernorm", "attn_norm", (width,)),
            ("post_attention_layernorm", "ffn_norm", (width,)),
            *((f"self_attn.{hf_name}", gguf_name, shape) for hf_name, gguf_name, shape in queries),
            ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", (rank + rotary, width)),
            ("self_attn.kv_a_layernorm", "attn_kv_a_norm", (rank,)),
            ("self_attn.o_proj", "attn_output", (width, heads * value_dim)),
        ):
            yield TensorMapping(f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape)
        name = f"{hf}self_attn.kv_b_proj.weight"
        if joined_kv:
            yield TensorMapping(name, f"{gguf}attn_kv_b.weight", kv_b)
        else:
            keys, values = HeadRows(heads, 0, plain_dim), HeadRows(heads, plain_dim, plain_dim + value_dim)
            yield TensorMapping(name, f"{gguf}attn_k_b.weight", kv_b, head_rows=keys, transposed=True)
            yield TensorMapping(name, f"{gguf}attn_v_b.weight", kv_b, head_rows=values)
        experts = i >= c["first_k_dense_replace"]
        if experts:
            yield from _expert_mappings(c, f"{hf}mlp.", gguf)
            bias = f"{hf}mlp.gate.e_score_correction_bias"
            yield TensorMapping(bias, f"{gguf}exp_probs_b.bias", (c["n_routed_experts"],))
        inner = c["n_shared_experts"] * c["moe_intermediate_size"] if experts else c["intermediate_size"]
        hf, suffix = (f"{hf}mlp.shared_experts.", "_shexp") if experts else (f"{hf}mlp.", "")
        for part in ("gate", "up", "down"):
            shape = (width, inner) if part == "down" else (inner, width)
            yield TensorMapping(f"{hf}{part}_proj.weight", f"{gguf}ffn_{part}{suffix}.weight", shape)


def _gpt2_mappings(c: Mapping[str, Any]) -> Iterator[TensorMapping]:
    width, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    yield TensorMapping("transformer.wte.weight", "token_embd.weight", (c["vocab_size"], width))
    yield TensorMapping("transformer.wpe.weight", "position_embd.weight", (c["n_positions"], width))
    for i in range(c["n_layer"]):
        hf, gguf = f"transformer.h.{i}.", f"blk.{i}."
        for hf_name, gguf_name, shape in (
            ("attn.c_attn", "attn_qkv", (width, 3 * width)),
            ("attn.c_proj", "attn_output", (width, width)),
            ("mlp.c_fc", "ffn_up", (width, inner)),
            ("mlp.c_proj", "ffn_down", (inner, width)),
        ):
            yield TensorMapping(f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape, transposed=True)
            yield TensorMapping(f"{hf}{hf_name}.bias", f"{gguf}{gguf_name}.bias", shape[1:])
        for hf_name, gguf_name in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            for part in ("weight", "bias"):
                yield TensorMapping(f"{hf}{hf_name}.{part}", f"{gguf}{gguf_name}.{part}", (width,))
    for part in ("weight", "bias"):
        yield TensorMapping(f"transformer.ln_f.{part}", f"output_norm.{part}", (width,))


def neighbors_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of `heads` heads from llama.cpp's RoPE pairs (neighbors) to Hugging Face's (halves)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halves_to_neighbors(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `neighbors_to_halves`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
