"""The whole GPT. Read this file from top to bottom and you have read the model.

Axis letters: B batch · T time (new tokens) · S time (all tokens attended to) · C hidden · H heads · K key/value heads ·
D head_dim · F feed-forward width · E experts · V vocabulary · L layers.

Papers: attention, Vaswani et al. 2017 (1706.03762); GPT-2, Radford et al. 2019; RMSNorm, Zhang & Sennrich 2019
(1910.07467); SwiGLU, Shazeer 2020 (2002.05202); RoPE, Su et al. 2021 (2104.09864); grouped queries, Ainslie et al. 2023
(2305.13245); query-key norm, Dehghani et al. 2023 (2302.05442); parallel blocks, GPT-J (Wang & Komatsuzaki 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptsmith.errors import UsageError
from gptsmith.model.activations import FUNCTIONS, gate_function
from gptsmith.model.attention import attend, causal_mask
from gptsmith.model.cache import Cache, Scoring
from gptsmith.model.config import ModelConfig
from gptsmith.model.documents import Documents
from gptsmith.model.dropout import dropout
from gptsmith.model.initial import WithoutDefaultDraws, draw, draw_seed
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.parameters import annotate, parameter_info
from gptsmith.model.rope import extend_context, rope_tables
from gptsmith.model.vision import Projector, VisionTower, replace_placeholders


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, computed in float32 whatever the dtype of x.

    zero_centered: multiply by 1 + weight instead.
    """

    def __init__(self, width: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.zero_centered = nn.Parameter(torch.ones(width)), eps, zero_centered
        if zero_centered:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight if self.zero_centered else self.weight)).to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.zero_centered_norm)


class HeadsNorm(nn.Module):
    """The norm of each head with weights of its own, without bias: x (..., H, D), weight (H·D,)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads * config.head_dim)), config.norm_eps
        self.centered = config.norm == "layernorm"
        annotate(self, "weight", split_sizes=(config.head_dim,) * heads)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.centered:
            y = y - y.mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * self.weight.view(x.shape[-2:])).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to x: (B, H, T, D); cos, sin: (T, R/2), of the first R of the D numbers.

    Pairs are (i, i + R/2), as in Llama.
    """
    R = 2 * cos.shape[-1]
    a, b = x[..., :R].chunk(2, dim=-1)
    parts = (a * cos - b * sin, b * cos + a * sin, *([x[..., R:]] if x.shape[-1] > R else []))
    return torch.cat(parts, dim=-1)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Return softmax(q kᵀ · scale + mask), written out: how much each query attends to each key, (B, H, T, S).

    q: (B, H, T, D); k: (B, K, S, D). mask: bool, broadcast to (B, H, T, S): True where a query may see a key. False
    adds -∞ to the score, which makes the weight 0. scale: None: 1/√D. sinks: (H,), a score of each head that takes its
    share of the weights without a value, so that those of the keys add up to less than 1.
    This is the definition of attention. `attend` computes the same weights times v without storing them.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, S, D): H/K queries share a key
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


@dataclass
class AttentionInputs:
    """What the attention of every layer takes besides the hidden states.

    rope: cosines and sines of the rotary angles, two (T, D/2); local_rope: those of layers with their own.
    documents: tokens attend only within their own. cache: keys and values of earlier tokens. weights: a list to which
    every layer appends its `attention_weights`.
    """

    rope: tuple[Tensor, Tensor] | None = None
    local_rope: tuple[Tensor, Tensor] | None = None
    documents: Documents | None = None
    cache: Cache | None = None
    weights: list[Tensor] | None = None


class Attention(nn.Module):
    """Causal multi-head self-attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        # GPT-1 to 3 drop attention weights, too. Later models do not, which keeps attention a single fused kernel.
        self.weight_dropout = dropout if config.position == "learned" else 0.0
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = config.head_dim, config.scale_of(layer)
        self.window, self.rope = config.window_of(layer), config.rope_of(layer)
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, q_rows + 2 * kv_rows, bias=config.attention_bias)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(q_rows, config.hidden_size, bias=output_bias)
        for part in ("weight", "bias"):
            annotate(self, f"qkv_proj.{part}", split_sizes=(q_rows, kv_rows, kv_rows))
        self.q_norm, self.k_norm = (self._qk_norm(config, heads) for heads in (self.heads, self.kv_heads))
        self.normalizes_all_heads = config.qk_norm and config.qk_norm_scope == "all"
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.attention_sinks else None

    @staticmethod
    def _qk_norm(config: ModelConfig, heads: int) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        if config.qk_norm_scope == "heads":
            return HeadsNorm(config, heads)
        return make_norm(config, config.head_dim * (heads if config.qk_norm_scope == "all" else 1))

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        B, T, _ = x.shape  # (B, T, C)
        qkv = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)  # (B, T, H + 2K, D)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.normalizes_all_heads:
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        rope = {"none": None, "global": inputs.rope, "local": inputs.local_rope}[self.rope]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
            if v.requires_grad:
                v = v.clone()  # a view would keep q and k before rotation, too, for the backward pass
        if inputs.weights is not None:
            inputs.weights.append(attention_weights(q, k, self._mask(q, inputs.documents), self.scale, self.sinks))
        # y = attention_weights(q, k, mask) @ v: (B, H, T, D)
        if inputs.cache is not None:
            y = inputs.cache.attend(self.layer, q, k, v, Scoring(self.window, self.scale, self.sinks))
        else:
            y = attend(
                q,
                k,
                v,
                window=self.window,
                documents=inputs.documents,
                dropout=self.weight_dropout if self.training else 0.0,
                scale=self.scale,
                sinks=self.sinks,
            )
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H·D)
        return dropout(self.o_proj(y), self.dropout, self.training)  # (B, T, C)

    def _mask(self, q: Tensor, documents: Documents | None) -> Tensor:
        if documents is not None:
            return documents.mask(self.window)
        return causal_mask(q.shape[2], q.shape[2], self.window, q.device)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values of all heads are made of one short vector.

    The cache holds that vector, c, and the rotated part of the key, r, that all heads share. There a head's query q,
    with the matrices W of its keys and U of its values, attends as q W to c itself, since q·(W c) = (q W)·c, and U is
    applied to the result: attention with a single key head.
    """

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.layer, self.dropout, self.scale = layer, dropout, config.scale_of(layer)
        self.heads, self.head_dim, self.value_dim = config.num_attention_heads, config.head_dim, config.value_dim
        self.rank, self.rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        C, q_rows, bias = config.hidden_size, self.heads * self.head_dim, config.attention_bias
        self.q_rank = config.q_lora_rank
        if self.q_rank is None:
            self.q_proj = nn.Linear(C, q_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(C, self.q_rank, bias=bias)
            self.q_a_norm = RMSNorm(self.q_rank, _LATENT_EPS)
            self.q_b_proj = nn.Linear(self.q_rank, q_rows, bias=False)
        self.kv_a_proj = nn.Linear(C, self.rank + self.rope_dim, bias=bias)
        self.kv_a_norm = RMSNorm(self.rank, _LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.head_dim - self.rope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, C, bias=bias)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        B, T, _ = x.shape  # (B, T, C)
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        q, q_rope = q.split((self.head_dim - self.rope_dim, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_a_proj(x).split((self.rank, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_a_norm(latent), k_rope[:, None]  # (B, T, rank), (B, 1, T, R)
        assert inputs.rope is not None
        q_rope, k_rope = rotate(q_rope, *inputs.rope), rotate(k_rope, *inputs.rope)
        if inputs.cache is not None:
            keys, values = self._latent_matrices()  # (H, D - R, rank), (H, V, rank)
            q = torch.cat((q @ keys.to(q.dtype), q_rope), dim=-1)  # (B, H, T, rank + R)
            k = torch.cat((latent[:, None], k_rope), dim=-1)  # (B, 1, T, rank + R)
            y = inputs.cache.attend(self.layer, q, k, latent[:, None], Scoring(scale=self.scale or self.head_dim**-0.5))
            y = y @ values.to(y.dtype).mT  # (B, H, T, V)
        else:
            kv = self.kv_b_proj(latent).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D - R + V)
            k, v = kv.split((self.head_dim - self.rope_dim, self.value_dim), dim=-1)
            q, k = torch.cat((q, q_rope), dim=-1), torch.cat((k, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)
            if inputs.weights is not None:
                mask = causal_mask(T, T, None, q.device) if inputs.documents is None else inputs.documents.mask()
                inputs.weights.append(attention_weights(q, k, mask, self.scale))
            y = attend(q, k, v, documents=inputs.documents, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H·V)
        return dropout(self.o_proj(y), self.dropout, self.training)  # (B, T, C)

    def _latent_matrices(self) -> tuple[Tensor, Tensor]:
        """Return the matrices that make keys and values of the latent vector, of each head: (H, D - R or V, rank)."""
        weight: Any = self.kv_b_proj.weight
        if type(self.kv_b_proj) is not nn.Linear:  # quantized, or with an adapter
            like = weight if isinstance(weight, Tensor) else self.kv_a_norm.weight
            weight = self.kv_b_proj(torch.eye(self.rank, dtype=like.dtype, device=like.device)).mT
        per_head: Tensor = (
            weight.view(self.heads, -1, self.rank)
            if weight.is_contiguous()
            else weight.reshape(self.heads, -1, self.rank)
        )
        keys, values = torch.split(per_head, [self.head_dim - self.rope_dim, self.value_dim], dim=1)
        return keys, values


_LATENT_EPS = 1e-6  # of the norms of latent vectors, whatever that of others is


class MLP(nn.Module):
    """The feed-forward layer: down(activation(up(x))), or with a gate down(activation(gate(x)) · up(x)).

    width: None: that of the configuration.
    """

    def __init__(self, config: ModelConfig, dropout: float, width: int | None = None) -> None:
        super().__init__()
        width = config.intermediate_size if width is None else width
        self.gated, self.activation, self.dropout = config.gated_mlp, FUNCTIONS[config.activation], dropout
        self.gate = gate_function(config)
        expanded = width * (2 if self.gated else 1)
        self.up_proj = nn.Linear(config.hidden_size, expanded, bias=config.mlp_bias)  # rows of the gate, then of up
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        if self.gated:
            for part in ("weight", "bias"):
                annotate(self, f"up_proj.{part}", split_sizes=(width, width))

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        h = self.up_proj(x)  # (B, T, F), with a gate (B, T, 2F)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = self.gate(gate, up)  # (B, T, F)
        else:
            h = self.activation(h)
        return dropout(self.down_proj(h), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `ModelConfig.norm_position` has the other orders.

    With a parallel residual, x + attention(norm(x)) + mlp(norm(x)).
    """

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.norm_position, self.parallel = config.norm_position, config.parallel_residual
        self.shared_norm = config.shared_norm
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = (Attention if config.kv_lora_rank is None else LatentAttention)(config, layer, dropout)
        self.mlp_norm = nn.Identity() if self.shared_norm else make_norm(config, config.hidden_size)
        dense = config.dense_intermediate_size if config.num_experts else None
        self.mlp = MixtureOfExperts(config) if config.has_experts(layer) else MLP(config, dropout, dense)
        if self.norm_position == "sandwich":
            self.attention_output_norm = make_norm(config, config.hidden_size)
            self.mlp_output_norm = make_norm(config, config.hidden_size)

    def forward(self, x: Tensor, inputs: AttentionInputs, router_logits: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). router_logits: a list to which a mixture of experts appends its own."""
        y: Tensor
        if self.parallel:
            h = self.attention_norm(x)
            y = x + self.attention(h, inputs) + self.mlp(h if self.shared_norm else self.mlp_norm(x), router_logits)
        elif self.norm_position == "post":
            y = self.attention_norm(x + self.attention(x, inputs))
            y = self.mlp_norm(y + self.mlp(y, router_logits))
        elif self.norm_position == "reordered":
            y = x + self.attention_norm(self.attention(x, inputs))
            y = y + self.mlp_norm(self.mlp(y, router_logits))
        elif self.norm_position == "sandwich":
            y = x + self.attention_output_norm(self.attention(self.attention_norm(x), inputs))
            y = y + self.mlp_output_norm(self.mlp(self.mlp_norm(y), router_logits))
        else:
            y = x + self.attention(self.attention_norm(x), inputs)
            y = y + self.mlp(self.mlp_norm(y), router_logits)
        return y


def checkpointed(layer: nn.Module, x: Tensor, inputs: AttentionInputs, router_logits: list[Tensor] | None) -> Tensor:
    """Return `layer(x, inputs, router_logits)`, computing it again in the backward pass instead of keeping
    activations."""

    def run(x: Tensor) -> tuple[Tensor, ...]:  # twice: the second time must not append to the caller's list
        own: list[Tensor] | None = None if router_logits is None else []
        y = layer(x, inputs, own)
        return (y, *(own or ()))

    y, *logits = checkpoint(run, x, use_reentrant=False)
    if router_logits is not None:
        router_logits.extend(logits)
    output: Tensor = y
    return output


class Transformer(nn.Module):
    """A decoder-only transformer. `model(ids)`: (B, T) int64 -> logits (B, T, V), in nats before the softmax.

    dropout: probability of zeroing an element, in [0, 1), after embeddings, attention and MLP, and of attention weights
        in models with learned positions; in training only.
    initialize: draw random initial weights; otherwise matrices are undefined, and take no memory, until they are
        written.
    activation_checkpointing (an attribute): compute the activations of each layer again in the backward pass instead of
        keeping them (Chen et al. 2016, 1604.06174). Loss and gradients stay the same.
    sum_over_processes (an attribute): adds a tensor up, in place, over the processes that share a batch; None: there
        are no others. A mixture's balancing loss is that of the whole batch.
    generation_config (an attribute): sampling defaults and token ids that the model came with, named as Hugging Face
        names them. They are saved with the model; `forward` does not use them.
    """

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0, initialize: bool = True) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}.")
        self.config, self.dropout = config, dropout
        self.generation_config: dict[str, Any] = {}
        self.activation_checkpointing = False
        self.sum_over_processes: Callable[[Tensor], None] | None = None
        with WithoutDefaultDraws():
            self._build(config, dropout)
        if initialize:
            self.initialize()

    def _build(self, config: ModelConfig, dropout: float) -> None:
        embedding_size = config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, embedding_size)
        if config.position == "learned":
            rows = config.position_offset + config.max_position_embeddings
            self.embed_positions = nn.Embedding(rows, config.hidden_size)
        if config.embedding_size is not None:
            self.embedding_in_proj = nn.Linear(embedding_size, config.hidden_size, bias=False)
            self.embedding_out_proj = nn.Linear(config.hidden_size, embedding_size, bias=False)
        self.layers = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = nn.Identity() if config.norm_position == "post" else make_norm(config, config.hidden_size)
        self.lm_head = nn.Linear(embedding_size, config.vocab_size, bias=False)
        annotate(self, "lm_head.weight", kind="head")
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if config.vision is not None:  # a model that reads pictures
            self.vision, self.projector = VisionTower(config.vision), Projector(config.vision, config.hidden_size)
        if config.position == "rope":
            self.rope_cos: Tensor
            self.rope_sin: Tensor
            cos, sin = rope_tables(config)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        if config.local_rope_theta is not None:
            self.local_rope_cos: Tensor
            self.local_rope_sin: Tensor
            cos, sin = rope_tables(config, local=True)
            self.register_buffer("local_rope_cos", cos, persistent=False)
            self.register_buffer("local_rope_sin", sin, persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights from N(0, initializer_range²) and set biases to 0; see `ModelConfig.residual_init`."""
        seed = draw_seed()
        for name, p in self.named_parameters():
            self.initialize_parameter(name, p, seed)

    def initialize_parameter(self, name: str, p: Tensor, seed: int) -> bool:
        """Initialize the parameter of this name, `p`, from a seed. Return False for norms and sinks: they are made with
        their initial values, 1 or 0."""
        std = self.config.initializer_range
        into_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
        if into_residual and self.config.residual_init == "scaled" and not name.startswith("vision."):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim > 1 or name.endswith("class_embedding"):
            draw(p, name, seed, partial(nn.init.normal_, std=std))
        else:
            return False
        return True

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, ids (B, T), as the first block takes them, but for positions: (B, T, C)."""
        x: Tensor = self.embed_tokens(ids)
        if self.config.embedding_size is not None:
            x = self.embedding_in_proj(x)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # rounded to the dtype, as in training
        return x

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        pixels: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        weights: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the token after each of ids: (B, T) int64.

        inputs_embeds: (B, T, C), token embeddings as from `embed` in place of ids. Positions are added to them, too.
        pixels: (N, 3, S, S), pictures in the order in which their image tokens stand in ids, row by row; of a model
            that reads pictures. Raises ValueError where the number of image tokens does not fit.
        cache: keys and values of the tokens before these; it is extended. Without document_ids and weights.
        document_ids: (B, T) int; a document is a run of equal numbers. Tokens attend only within their own document,
            and learned positions start at 0 in each (rotary positions are relative: they need not). Padding, left or
            right,
            is a document of its own: an attention mask, 1 for real and 0 for padding tokens, works as document_ids.
        weights: if a list, each layer's attention weights (B, H, T, S) are appended to it.
        router_logits: if a list, each layer's router logits (B·T, E) are appended to it.
        residuals: if a list, the L + 1 states of the residual stream, (B, T, C), are appended to it: the embeddings,
            then the output of each layer. `lm_head(norm(x))` of the last one is the logits.
        Raises IndexError for more tokens than the context, ValueError without exactly one of ids and inputs_embeds.
        """
        logits: Tensor = self.lm_head(
            self.hidden_states(
                ids,
                inputs_embeds=inputs_embeds,
                pixels=pixels,
                cache=cache,
                document_ids=document_ids,
                weights=weights,
                router_logits=router_logits,
                residuals=residuals,
            )
        )
        return logits

    def hidden_states(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        pixels: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        weights: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the input of `lm_head`: the output of the final norm, (B, T, C). Arguments as in `forward`.

        With an `embedding_size` it is as wide as that.
        """
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("the model takes either token ids or inputs_embeds: exactly one of them.")
        x = self.embed(ids) if ids is not None else inputs_embeds  # (B, T, C)
        assert x is not None
        if pixels is not None:
            if ids is None or self.config.image_token_id is None:
                raise ValueError("pictures need token ids, and a model that reads pictures.")
            x = replace_placeholders(x, ids, self.image_features(pixels), self.config.image_token_id)
        T = x.shape[1]
        if self.config.max_position_embeddings < T and cache is None:
            raise IndexError(f"{T} tokens are more than the context of {self.config.max_position_embeddings}")
        positions = slice(0, T) if cache is None else cache.positions(T)
        documents = None if document_ids is None else Documents(document_ids)
        rope = local_rope = None
        if self.config.position == "rope":
            rope = (self.rope_cos[positions], self.rope_sin[positions])  # (T, D/2) each
            if self.config.local_rope_theta is not None:
                local_rope = (self.local_rope_cos[positions], self.local_rope_sin[positions])
        elif documents is not None:
            x = x + self.embed_positions(documents.positions() + self.config.position_offset)
        else:
            x = x + self.embed_positions.weight[self.config.position_offset :][positions]
        x = dropout(x, self.dropout, self.training)

        inputs = AttentionInputs(rope, local_rope, documents, cache, weights)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None and weights is None
        if residuals is not None:
            residuals.append(x)
        for layer in self.layers:
            own: list[Tensor] | None = None if router_logits is None else []  # FSDP replaces lists that hold gradients
            if recompute:
                x = checkpointed(layer, x, inputs, own)
            else:
                x = layer(x, inputs, own)  # (B, T, C)
            if router_logits is not None:
                router_logits.extend(own or ())
            if residuals is not None:
                residuals.append(x)
        if cache is not None:
            cache.advance(T)
        return self.final_states(x)

    def final_states(self, x: Tensor) -> Tensor:
        """Return the input of `lm_head` for the output of the last layer, (B, T, C)."""
        hidden: Tensor = self.norm(x)
        return hidden if self.config.embedding_size is None else self.embedding_out_proj(hidden)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return what stands for the embeddings of pictures' tokens: (N, 3, S, S) -> (N, tokens, C).

        pixels: as `gptsmith.data.image_processor.ImageProcessor` makes them. Of a model that reads pictures.
        """
        features: Tensor = self.projector(self.vision(pixels))
        return features

    def extend_context(self, context: int, method: Literal["linear", "ntk", "yarn", "llama3"] | None = None) -> None:
        """Extend the context to `context` tokens without changing the weights; see `rope.extend_context`."""
        self.config = extend_context(self.config, context, method)
        self.rope_cos, self.rope_sin = rope_tables(self.config, self.rope_cos.device)
        if self.config.local_rope_theta is not None:
            self.local_rope_cos, self.local_rope_sin = rope_tables(self.config, self.rope_cos.device, local=True)

    def split_sizes(self, name: str) -> tuple[int, ...]:
        """Return how many rows each of the matrices fused into parameter `name` has (q, k, v; gate, up; experts)."""
        return parameter_info(self, name).split_sizes or (self.get_parameter(name).shape[0],)

    def num_parameters(self, *, trainable_only: bool = True) -> int:
        """Return the number of parameters, tied weights counted once; frozen ones only on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)
