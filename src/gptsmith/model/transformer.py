"""The whole GPT. Read this file from top to bottom and you have read the model.

Axis letters: B batch · T time (new tokens) · S time (all tokens attended to) · C hidden · H heads · K key/value heads ·
D head_dim · F feed-forward width · E experts · V vocabulary · L layers.

Papers: attention, Vaswani et al. 2017 (1706.03762); GPT-2, Radford et al. 2019; RMSNorm, Zhang & Sennrich 2019
(1910.07467); SwiGLU, Shazeer 2020 (2002.05202); RoPE, Su et al. 2021 (2104.09864); grouped queries, Ainslie et al. 2023
(2305.13245); query-key norm, Dehghani et al. 2023 (2302.05442).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptsmith.errors import UsageError
from gptsmith.model.activations import FUNCTIONS
from gptsmith.model.attention import attend, causal_mask
from gptsmith.model.cache import Cache
from gptsmith.model.config import ModelConfig
from gptsmith.model.documents import Documents
from gptsmith.model.dropout import dropout
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.parameters import annotate, parameter_info
from gptsmith.model.rope import extend_context, rope_tables
from gptsmith.model.vision import Projector, VisionTower, replace_placeholders


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, computed in float32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    return (RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(width, eps=config.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to x: (B, H, T, D); cos, sin: (T, D/2). Pairs are (i, i + D/2), as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Return softmax(q kᵀ · scale + mask), written out: how much each query attends to each key, (B, H, T, S).

    q: (B, H, T, D); k: (B, K, S, D). mask: bool, broadcast to (B, H, T, S): True where a query may see a key. False
    adds -∞ to the score, which makes the weight 0. scale: None: 1/√D.
    This is the definition of attention. `attend` computes the same weights times v without storing them.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, S, D): H/K queries share a key
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)  # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)


@dataclass
class AttentionInputs:
    """What the attention of every layer takes besides the hidden states.

    rope: cosines and sines of the rotary angles, two (T, D/2). documents: tokens attend only within their own.
    cache: keys and values of earlier tokens. weights: a list to which every layer appends its `attention_weights`.
    """

    rope: tuple[Tensor, Tensor] | None = None
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
        self.window = config.window_of(layer)
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, q_rows + 2 * kv_rows, bias=config.attention_bias)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(q_rows, config.hidden_size, bias=output_bias)
        for part in ("weight", "bias"):
            annotate(self, f"qkv_proj.{part}", split_sizes=(q_rows, kv_rows, kv_rows))
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        B, T, _ = x.shape  # (B, T, C)
        qkv = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)  # (B, T, H + 2K, D)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if inputs.rope is not None:
            q, k = rotate(q, *inputs.rope), rotate(k, *inputs.rope)
        if inputs.weights is not None:
            inputs.weights.append(attention_weights(q, k, self._mask(q, inputs.documents), self.scale))
        # y = attention_weights(q, k, mask) @ v: (B, H, T, D)
        if inputs.cache is not None:
            y = inputs.cache.attend(self.layer, q, k, v, self.window, self.scale)
        else:
            y = attend(
                q,
                k,
                v,
                window=self.window,
                documents=inputs.documents,
                dropout=self.weight_dropout if self.training else 0.0,
                scale=self.scale,
            )
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H·D)
        return dropout(self.o_proj(y), self.dropout, self.training)  # (B, T, C)

    def _mask(self, q: Tensor, documents: Documents | None) -> Tensor:
        if documents is not None:
            return documents.mask(self.window)
        return causal_mask(q.shape[2], q.shape[2], self.window, q.device)


class MLP(nn.Module):
    """The feed-forward layer: down(activation(up(x))), or with a gate down(activation(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.gated, self.activation, self.dropout = config.gated_mlp, FUNCTIONS[config.activation], dropout
        expanded = config.intermediate_size * (2 if self.gated else 1)
        self.up_proj = nn.Linear(config.hidden_size, expanded, bias=config.mlp_bias)  # rows of the gate, then of up
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        if self.gated:
            for part in ("weight", "bias"):
                annotate(self, f"up_proj.{part}", split_sizes=(config.intermediate_size,) * 2)

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        h = self.up_proj(x)  # (B, T, F), with a gate (B, T, 2F)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = self.activation(gate) * up  # (B, T, F)
        else:
            h = self.activation(h)
        return dropout(self.down_proj(h), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post-norm norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, layer, dropout)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = MixtureOfExperts(config) if config.num_experts else MLP(config, dropout)

    def forward(self, x: Tensor, inputs: AttentionInputs, router_logits: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). router_logits: a list to which a mixture of experts appends its own."""
        y: Tensor
        if self.post_norm:
            y = self.attention_norm(x + self.attention(x, inputs))
            y = self.mlp_norm(y + self.mlp(y, router_logits))
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
    initialize: draw random initial weights; otherwise they are undefined until they are loaded.
    activation_checkpointing (an attribute): compute the activations of each layer again in the backward pass instead of
        keeping them (Chen et al. 2016, 1604.06174). Loss and gradients stay the same.
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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size) if config.norm_position == "pre" else nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        if initialize:
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw weights from N(0, initializer_range²) and set biases to 0; see `ModelConfig.residual_init`."""
        std = self.config.initializer_range
        residual_std = std
        if self.config.residual_init == "scaled":
            residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(0.0, residual_std if into_residual else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, MixtureOfExperts):
                module.up_proj.normal_(0.0, std)
                module.down_proj.normal_(0.0, residual_std)
        if self.config.vision is not None:
            self.vision.initialize(std)

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

        inputs_embeds: (B, T, C), token embeddings in place of ids. Positions are added to them, too.
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
        """Return the input of `lm_head`: the output of the final norm, (B, T, C). Arguments as in `forward`."""
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("the model takes either token ids or inputs_embeds: exactly one of them.")
        x: Tensor = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if pixels is not None:
            if ids is None or self.config.image_token_id is None:
                raise ValueError("pictures need token ids, and a model that reads pictures.")
            x = replace_placeholders(x, ids, self.image_features(pixels), self.config.image_token_id)
        T = x.shape[1]
        if self.config.max_position_embeddings < T and cache is None:
            raise IndexError(f"{T} tokens are more than the context of {self.config.max_position_embeddings}")
        positions = slice(0, T) if cache is None else cache.positions(T)
        documents = None if document_ids is None else Documents(document_ids)
        rope = None
        if self.config.position == "rope":
            rope = (self.rope_cos[positions], self.rope_sin[positions])  # (T, D/2) each
        elif documents is not None:
            x = x + self.embed_positions(documents.positions())
        else:
            x = x + self.embed_positions.weight[positions]
        x = dropout(x, self.dropout, self.training)

        inputs = AttentionInputs(rope, documents, cache, weights)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None and weights is None
        if residuals is not None:
            residuals.append(x)
        for layer in self.layers:
            if recompute:
                x = checkpointed(layer, x, inputs, router_logits)
            else:
                x = layer(x, inputs, router_logits)  # (B, T, C)
            if residuals is not None:
                residuals.append(x)
        if cache is not None:
            cache.advance(T)
        hidden: Tensor = self.norm(x)
        return hidden

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

    def split_sizes(self, name: str) -> tuple[int, ...]:
        """Return how many rows each of the matrices fused into parameter `name` has (q, k, v; gate, up; experts)."""
        return parameter_info(self, name).split_sizes or (self.get_parameter(name).shape[0],)

    def num_parameters(self, *, trainable_only: bool = True) -> int:
        """Return the number of parameters, tied weights counted once; frozen ones only on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)
