"""Weight names of the Hugging Face layouts: which of their tensors make up each of our parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig

HEAD = "lm_head.weight"
"""The name of the output matrix, in nearly every layout."""


@dataclass(frozen=True)
class Interleaved:
    """Rows that Hugging Face stores in another order: the i-th unit of each of `parts` equal parts, `unit` rows each.

    Ours is (parts, n, unit), theirs (n, parts, unit). In GPT-NeoX the parts are queries, keys and values, and a unit is
    a head. axis: of Hugging Face's tensor.
    """

    parts: int
    unit: int = 1
    axis: int = 0

    def order(self, rows: int) -> Tensor:
        """Return for each row of Hugging Face the index of ours: (rows,) int64."""
        return torch.arange(rows).view(self.parts, -1, self.unit).transpose(0, 1).flatten()


@dataclass(frozen=True)
class RotaryPairs:
    """Rows that Hugging Face stores in another order: the rotated ones, the last `rotary` of every `unit` rows.

    There pairs are neighbors, (2i, 2i + 1); ours are halves, (i, i + rotary/2).
    """

    unit: int
    rotary: int
    axis: int = 0

    def order(self, rows: int) -> Tensor:
        """Return for each row of Hugging Face the index of ours: (rows,) int64."""
        order = torch.arange(rows).view(-1, self.unit)
        pairs = order[:, -self.rotary :].reshape(len(order), 2, -1).transpose(1, 2).flatten(1)
        return torch.cat((order[:, : -self.rotary], pairs), dim=1).flatten()


@dataclass(frozen=True)
class WeightMapping:
    """One parameter of our model, and the Hugging Face tensors whose rows, stacked in this order, are it."""

    local: str
    hf: tuple[str, ...]
    transposed: bool = False
    """Hugging Face stores the matrix as (in, out), as GPT-1 and GPT-2 do."""
    scale: float = 1.0
    """The first Hugging Face tensor is multiplied by this when it is loaded."""
    reordered: Interleaved | RotaryPairs | None = None
    """The rows have another order in Hugging Face, which stores them as a single tensor."""


def openai_mappings(config: ModelConfig) -> list[WeightMapping]:
    """GPT-1 and GPT-2: the same blocks; the embeddings are named differently, and GPT-1 has no final norm."""
    is_gpt1 = config.model_type == "openai-gpt"
    tokens, positions = ("tokens_embed", "positions_embed") if is_gpt1 else ("wte", "wpe")
    mappings = [
        WeightMapping("embed_tokens.weight", (f"transformer.{tokens}.weight",)),
        WeightMapping("embed_positions.weight", (f"transformer.{positions}.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        local, hf = f"layers.{i}.", f"transformer.h.{i}."
        mappings += weight_and_bias(f"{local}attention_norm", f"{hf}ln_1")
        mappings += weight_and_bias(f"{local}attention.qkv_proj", f"{hf}attn.c_attn", transposed=True)
        mappings += weight_and_bias(f"{local}attention.o_proj", f"{hf}attn.c_proj", transposed=True)
        mappings += weight_and_bias(f"{local}mlp_norm", f"{hf}ln_2")
        mappings += weight_and_bias(f"{local}mlp.up_proj", f"{hf}mlp.c_fc", transposed=True)
        mappings += weight_and_bias(f"{local}mlp.down_proj", f"{hf}mlp.c_proj", transposed=True)
    return mappings if is_gpt1 else mappings + weight_and_bias("norm", "transformer.ln_f")


def gpt_neo_mappings(config: ModelConfig) -> list[WeightMapping]:
    """GPT-Neo does not scale attention scores; the stored queries include our scale, a power of two.

    See `families.gpt3`.
    """
    assert config.attention_scale is not None
    mappings = [
        WeightMapping("embed_tokens.weight", ("transformer.wte.weight",)),
        WeightMapping("embed_positions.weight", ("transformer.wpe.weight",)),
    ]
    for i in range(config.num_hidden_layers):
        local, hf = f"layers.{i}.", f"transformer.h.{i}."
        qkv = tuple(f"{hf}attn.attention.{name}_proj.weight" for name in "qkv")
        mappings.append(WeightMapping(f"{local}attention.qkv_proj.weight", qkv, scale=1 / config.attention_scale))
        mappings += weight_and_bias(f"{local}attention_norm", f"{hf}ln_1")
        mappings += weight_and_bias(f"{local}attention.o_proj", f"{hf}attn.attention.out_proj")
        mappings += weight_and_bias(f"{local}mlp_norm", f"{hf}ln_2")
        mappings += weight_and_bias(f"{local}mlp.up_proj", f"{hf}mlp.c_fc")
        mappings += weight_and_bias(f"{local}mlp.down_proj", f"{hf}mlp.c_proj")
    return mappings + weight_and_bias("norm", "transformer.ln_f")


NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "reordered": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
"""The norms of a layer, and what current layouts call them, by their position."""


def llama_mappings(config: ModelConfig) -> list[WeightMapping]:
    """Llama and the layouts with its names: biases, norms and experts as the configuration says."""
    output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
    mappings = [WeightMapping("embed_tokens.weight", ("model.embed_tokens.weight",))]
    for i in range(config.num_hidden_layers):
        local, hf = f"layers.{i}.", f"model.layers.{i}."
        for part in ("weight", "bias"):
            if part == "weight" or config.attention_bias:
                qkv = tuple(f"{hf}self_attn.{name}_proj.{part}" for name in "qkv")
                mappings.append(WeightMapping(f"{local}attention.qkv_proj.{part}", qkv))
            if part == "weight" or output_bias:
                mappings.append(WeightMapping(f"{local}attention.o_proj.{part}", (f"{hf}self_attn.o_proj.{part}",)))
            if (part == "weight" or config.mlp_bias) and not config.num_experts:
                up = (f"{hf}mlp.gate_proj.{part}", f"{hf}mlp.up_proj.{part}")
                mappings.append(WeightMapping(f"{local}mlp.up_proj.{part}", up))
                mappings.append(WeightMapping(f"{local}mlp.down_proj.{part}", (f"{hf}mlp.down_proj.{part}",)))
        if config.num_experts:
            mappings += _expert_mappings(config, f"{local}mlp", hf)
        if config.qk_norm and config.qk_norm_scope == "heads":
            for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                each = tuple(f"{hf}self_attn.{letter}_layernorm.norms.{head}.weight" for head in range(heads))
                mappings.append(WeightMapping(f"{local}attention.{letter}_norm.weight", each))
        elif config.qk_norm:
            norms = ("q_norm.weight", "k_norm.weight")
            mappings += [WeightMapping(f"{local}attention.{name}", (f"{hf}self_attn.{name}",)) for name in norms]
        for ours, theirs in NORMS[config.norm_position].items():
            if not (config.shared_norm and ours == "mlp_norm"):
                mappings += weight_and_bias(f"{local}{ours}", f"{hf}{theirs}", bias=config.norm == "layernorm")
    return mappings + weight_and_bias("norm", "model.norm", bias=config.norm == "layernorm")


def _expert_mappings(config: ModelConfig, local: str, hf: str) -> list[WeightMapping]:
    if config.model_type == "mixtral":
        moe, gate, up, down = f"{hf}block_sparse_moe", "w1", "w3", "w2"
    else:
        moe, gate, up, down = f"{hf}mlp", "gate_proj", "up_proj", "down_proj"
    experts = [f"{moe}.experts.{i}" for i in range(config.num_experts)]
    mappings = [
        WeightMapping(f"{local}.router.weight", (f"{moe}.gate.weight",)),
        WeightMapping(f"{local}.up_proj", tuple(f"{e}.{name}.weight" for e in experts for name in (gate, up))),
        WeightMapping(f"{local}.down_proj", tuple(f"{e}.{down}.weight" for e in experts)),
    ]
    if config.shared_expert_intermediate_size:
        shared = f"{moe}.shared_expert"
        mappings += [
            WeightMapping(f"{local}.shared_up_proj.weight", tuple(f"{shared}.{name}.weight" for name in (gate, up))),
            WeightMapping(f"{local}.shared_down_proj.weight", (f"{shared}.{down}.weight",)),
            WeightMapping(f"{local}.shared_gate.weight", (f"{moe}.shared_expert_gate.weight",)),
        ]
    return mappings


def weight_and_bias(
    local: str,
    hf: str,
    *,
    transposed: bool = False,
    bias: bool = True,
    reordered: Interleaved | RotaryPairs | None = None,
) -> list[WeightMapping]:
    """Return the mappings of a module's weight and, if it has one, its bias."""
    mappings = [WeightMapping(f"{local}.weight", (f"{hf}.weight",), transposed, reordered=reordered)]
    if bias:
        mappings.append(WeightMapping(f"{local}.bias", (f"{hf}.bias",), reordered=reordered))
    return mappings
