"""Parameters and floating-point operations of a model, from its configuration alone (without torch).

Axis letters as in `transformer`, and N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.model.config import ModelConfig, VisionConfig


@dataclass(frozen=True)
class Size:
    """Numbers of parameters; tied weights are counted once."""

    total: int
    multiplied: int
    """Parameters in the matrices that a token is multiplied with: the output head, also if it is tied, and of the
    experts only those that a token uses; not the embedding tables, which are looked up."""


def count_parameters(config: ModelConfig) -> Size:
    """Return the size of a model; `total` equals `Transformer(config).num_parameters()`."""
    c = config
    norm = 2 if c.norm == "layernorm" else 1
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    output_bias = c.attention_bias if c.attention_output_bias is None else c.attention_output_bias
    attention = c.hidden_size * (q + 2 * kv) + q * c.hidden_size
    small = (q + 2 * kv) * c.attention_bias + c.hidden_size * output_bias + 2 * norm * c.hidden_size
    small += 2 * norm * c.head_dim * c.qk_norm
    up_matrices = 2 if c.gated_mlp else 1
    expert = (up_matrices + 1) * c.hidden_size * c.intermediate_size
    small += (up_matrices * c.intermediate_size + c.hidden_size) * c.mlp_bias
    router = c.hidden_size * c.num_experts
    if c.shared_expert_intermediate_size:  # every token uses it, behind a gate of one row
        router += c.hidden_size * (3 * c.shared_expert_intermediate_size + 1)
    stored, used = (c.num_experts, c.num_experts_per_tok) if c.num_experts else (1, 1)
    layer_stored = attention + small + stored * expert + router
    layer_used = attention + used * expert + router
    table = c.vocab_size * c.hidden_size
    outside = table * (1 if c.tie_word_embeddings else 2)
    outside += c.max_position_embeddings * c.hidden_size * (c.position == "learned")
    outside += norm * c.hidden_size * (c.norm_position == "pre")
    if c.vision is not None:
        outside += vision_parameters(c.vision, c.hidden_size)
    layers = c.num_hidden_layers
    return Size(layers * layer_stored + outside, layers * layer_used + table)


def vision_parameters(c: VisionConfig, hidden_size: int) -> int:
    """Return the number of parameters of a vision tower and of the projector to a text model of `hidden_size`."""
    width, norm = c.hidden_size, 2 * c.hidden_size
    block = 4 * width * (width + 1) + 2 * norm + (width + 1) * c.intermediate_size + (c.intermediate_size + 1) * width
    patches = 3 * c.patch_size**2 * width + width * (not c.class_token) + c.num_positions * width
    tower = patches + (width + norm) * c.class_token + c.num_hidden_layers * block + norm * c.post_norm
    bias = int(c.projector_bias)
    projector = (width * c.pixel_shuffle**2 + bias) * hidden_size
    return tower + projector + (hidden_size + bias) * hidden_size * (c.projector == "mlp")


def attended(config: ModelConfig, layer: int, context: int) -> float:
    """Return how many tokens a token of `layer` attends to, averaged over a context."""
    window = min(config.window_of(layer) or context, context)
    return window - (window - 1) * window / (2 * context)


def flops_per_token(config: ModelConfig, context: int, *, training: bool = True, full_attention: bool = True) -> float:
    """Return the floating-point operations per token: 2 per multiplied parameter in the forward pass, twice that in the
    backward pass, plus attention.

    full_attention: count the scores of the whole context, masked ones included (the usual convention: Chowdhery et al.
        2022, 2204.02311, appendix B; nanoGPT); otherwise only those that a kernel must compute.
    """
    width = config.num_attention_heads * config.head_dim
    seen = sum(
        min(config.window_of(i) or context, context) if full_attention else attended(config, i, context)
        for i in range(config.num_hidden_layers)
    )
    forward = 2 * count_parameters(config).multiplied + 4 * width * seen  # q·k and p·v: 2 each
    return (3 if training else 1) * float(forward)
