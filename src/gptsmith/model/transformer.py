"""The GPT, whole. Read this file from top to bottom and you have read the model.

Axis letters: B batch · T time (new tokens) · S time (all tokens attended to) · C hidden · H heads · K key/value heads ·
D head_dim · F feed-forward width · V vocabulary · L layers.

Papers: attention, Vaswani et al. 2017 (1706.03762); GPT-2, Radford et al. 2019; RMSNorm, Zhang & Sennrich 2019
(1910.07467); SwiGLU, Shazeer 2020 (2002.05202); RoPE, Su et al. 2021 (2104.09864); grouped queries, Ainslie et al. 2023
(2305.13245); query-key norm, Dehghani et al. 2023 (2302.05442).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import UsageError
from gptsmith.model.attention import attend, attention_weights
from gptsmith.model.cache import Cache
from gptsmith.model.config import ModelConfig
from gptsmith.model.dropout import dropout
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.parameters import annotate, parameter_info
from gptsmith.model.rope import extend_context, rope_tables


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, computed in float32 whatever the type of x."""

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
    """Rotary position embedding of x: (B, H, T, D) by angles (T, D/2); pairs are (i, i + D/2), as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Each token's distance from the start of its document; document_ids: (B, T), runs of equal numbers."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class Attention(nn.Module):
    """Masked multi-head self-attention: each token looks at itself and at the past."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        # GPT-1 to 3 drop attention weights, too; models since do not, and without it attention stays one fused product
        self.weight_dropout = dropout if config.position == "learned" else 0.0
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.qkv_proj = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=config.attention_bias
        )
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=output_bias)
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for part in ("weight", "bias"):
            annotate(self, f"qkv_proj.{part}", split_sizes=(q_rows, kv_rows, kv_rows))
        self.window, self.scale = config.window_of(layer), config.attention_scale
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
        weights: list[Tensor] | None,
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, H|K, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, self.window, self.scale)
        else:
            y = attend(q, k, v, mask, self.window, self.weight_dropout if self.training else 0.0, self.scale)
        if weights is not None:
            weights.append(attention_weights(q, k, mask, self.window, self.scale))
        return dropout(self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer: expand, bend, contract; SwiGLU gates one half by the other."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.kind, self.dropout = config.mlp, dropout
        expanded = config.intermediate_size * (2 if config.mlp == "swiglu" else 1)
        self.up_proj = nn.Linear(config.hidden_size, expanded, bias=config.mlp_bias)  # SwiGLU: gate, then up
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        if config.mlp == "swiglu":
            for part in ("weight", "bias"):
                annotate(self, f"up_proj.{part}", split_sizes=(config.intermediate_size,) * 2)

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        h = self.up_proj(x)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = gelu_tanh(h) if self.kind == "gelu_tanh" else F.gelu(h)
        return dropout(self.down_proj(h), self.dropout, self.training)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016, 1606.08415). 1 + tanh(y) = 2·sigmoid(2y), and on a CPU a
    compiled sigmoid takes half the time of a compiled tanh."""
    if torch.compiler.is_compiling() and x.is_cpu:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post-norm norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, layer, dropout)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = MixtureOfExperts(config) if config.num_experts else MLP(config, dropout)

    def forward(self, x: Tensor, router_logits: list[Tensor] | None, *attention_inputs: Any) -> Tensor:
        y: Tensor
        if self.post_norm:
            y = self.attention_norm(x + self.attention(x, *attention_inputs))
            y = self.mlp_norm(y + self.mlp(y, router_logits))
        else:
            y = x + self.attention(self.attention_norm(x), *attention_inputs)
            y = y + self.mlp(self.mlp_norm(y), router_logits)
        return y


class Transformer(nn.Module):
    """A decoder-only transformer. `model(ids)`: (B, T) int64 -> logits (B, T, V), natural-log units before softmax.

    dropout: probability of zeroing, in [0, 1), after embeddings, attention and MLP, and of attention weights in
        models with learned positions; training only.
    initialize: draw the starting weights; leave them as they come where others are to be loaded.
    """

    def __init__(self, config: ModelConfig, *, dropout: float = 0.0, initialize: bool = True) -> None:
        super().__init__()
        self.activation_checkpointing = False
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}.")
        self.config, self.dropout = config, dropout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size) if config.norm_position == "pre" else nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        annotate(self, "lm_head.weight", kind="head")
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
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
        """Weights from N(0, initializer_range²), biases 0, norms 1; see `ModelConfig.residual_init`."""
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

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        weights: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for the token after each of ids: (B, T) int64.

        inputs_embeds: (B, T, C) token embeddings in place of ids. Positions are added to them, too.
        cache: keys and values of the tokens before these; it is extended. Without document_ids and weights.
        document_ids: (B, T) int; tokens attend only within their own document, whose learned positions start at 0
            (rotary positions are relative: nothing to restart). Padding, left or right, is a document of its own: a
            mask of 1 for real and 0 for padding tokens will do.
        weights: if a list, each layer's attention weights (B, H, T, S) are appended to it.
        router_logits: if a list, each layer's expert logits (B·T, E) are appended to it.
        residuals: if a list, the L + 1 states of the residual stream, (B, T, C), are appended to it: the embeddings,
            then what each layer makes of them. `lm_head(norm(x))` of the last is the logits.
        Raises IndexError where the tokens would go beyond the context.
        """
        logits: Tensor = self.lm_head(
            self.hidden_states(
                ids,
                inputs_embeds=inputs_embeds,
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
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
        weights: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """What `lm_head` reads: the final norm's output, (B, T, C). Arguments as in `forward`."""
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("give either token ids or inputs_embeds to the model, not both and not neither.")
        x: Tensor = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T, mask = x.shape[1], None
        if self.config.max_position_embeddings < T and cache is None:
            raise IndexError(f"{T} tokens are more than the context of {self.config.max_position_embeddings}")
        positions = slice(0, T) if cache is None else cache.positions(T)
        if document_ids is not None:
            same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
            mask = same & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()

        rope = None
        if self.config.position == "learned":
            if document_ids is not None:
                x = x + self.embed_positions(positions_in_documents(document_ids))
            else:
                x = x + self.embed_positions.weight[positions]
        else:
            rope = (self.rope_cos[positions], self.rope_sin[positions])
        x = dropout(x, self.dropout, self.training)
        if residuals is not None:
            residuals.append(x)
        for layer in self.layers:
            x = layer(x, router_logits, rope, mask, cache, weights)
            if residuals is not None:
                residuals.append(x)
        if cache is not None:
            cache.advance(T)
        hidden: Tensor = self.norm(x)
        return hidden

    def extend_context(self, context: int, method: Literal["linear", "ntk", "yarn", "llama3"] = "yarn") -> None:
        """Read up to `context` tokens from now on, with the weights as they are; see `rope.extend_context`."""
        self.config = extend_context(self.config, context, method)
        self.rope_cos, self.rope_sin = rope_tables(self.config, self.rope_cos.device)

    def split_sizes(self, name: str) -> tuple[int, ...]:
        """Return how many rows each of the matrices fused into parameter `name` has (q, k, v; gate, up; experts)."""
        return parameter_info(self, name).split_sizes or (self.get_parameter(name).shape[0],)

    def num_parameters(self, *, trainable_only: bool = True) -> int:
        """Return the number of parameters, tied weights counted once; frozen ones only on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)
