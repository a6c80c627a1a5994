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
    up_matrices = 2 if c.gated_mlp else 1
    attention, attention_small = _attention_size(c, norm)
    norms = 4 if c.norm_position == "sandwich" else 1 if c.shared_norm else 2
    small = attention_small + norms * norm * c.hidden_size

    def feed_forward(width: int) -> tuple[int, int]:  # matrices, biases
        biases = (up_matrices * width + c.hidden_size) * c.mlp_bias
        return (up_matrices + 1) * c.hidden_size * width, biases

    dense_layers = c.first_k_dense_replace if c.num_experts else c.num_hidden_layers
    sparse_layers = c.num_hidden_layers - dense_layers
    dense, dense_biases = feed_forward(c.dense_intermediate_size or c.intermediate_size)
    expert, expert_biases = feed_forward(c.intermediate_size)
    router = c.hidden_size * c.num_experts
    if c.shared_expert_intermediate_size:  # every token uses it, maybe behind a gate of one row
        router += c.hidden_size * (3 * c.shared_expert_intermediate_size + c.shared_expert_gate)
    table = c.vocab_size * (c.embedding_size or c.hidden_size)
    projections = 2 * c.hidden_size * (c.embedding_size or 0)
    outside = table * (1 if c.tie_word_embeddings else 2) + projections
    outside += (c.position_offset + c.max_position_embeddings) * c.hidden_size * (c.position == "learned")
    outside += norm * c.hidden_size * (c.norm_position != "post")
    if c.vision is not None:
        outside += vision_parameters(c.vision, c.hidden_size)
    total = c.num_hidden_layers * (attention + small) + outside
    total += dense_layers * (dense + dense_biases)
    total += sparse_layers * (c.num_experts * (expert + expert_biases + c.router_bias) + router)
    used = c.num_hidden_layers * attention + dense_layers * dense
    used += sparse_layers * (c.num_experts_per_tok * expert + router)
    return Size(total, used + table + projections)


def _attention_size(c: ModelConfig, norm: int) -> tuple[int, int]:
    """Return the numbers of parameters in the matrices of a layer's attention, and in its biases, norms and sinks."""
    if c.kv_lora_rank is not None:
        q_rows, kv_a = c.num_attention_heads * c.head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        values = c.num_attention_heads * c.value_dim
        kv_b = c.kv_lora_rank * (c.num_attention_heads * (c.head_dim - c.qk_rope_head_dim) + values)
        matrices = c.hidden_size * (kv_a + values) + kv_b
        biases = kv_a + c.hidden_size
        if c.q_lora_rank is None:
            return matrices + c.hidden_size * q_rows, c.kv_lora_rank + biases * c.attention_bias
        matrices += (c.hidden_size + q_rows) * c.q_lora_rank
        return matrices, c.q_lora_rank + c.kv_lora_rank + (biases + c.q_lora_rank) * c.attention_bias
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    output_bias = c.attention_bias if c.attention_output_bias is None else c.attention_output_bias
    small = (q + 2 * kv) * c.attention_bias + c.hidden_size * output_bias + c.num_attention_heads * c.attention_sinks
    if c.qk_norm:
        small += {"head": 2 * norm * c.head_dim, "heads": q + kv, "all": norm * (q + kv)}[c.qk_norm_scope]
    return c.hidden_size * (q + 2 * kv) + q * c.hidden_size, small


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
    width = config.num_attention_heads * (config.head_dim + config.value_dim) / 2
    seen = sum(
        min(config.window_of(i) or context, context) if full_attention else attended(config, i, context)
        for i in range(config.num_hidden_layers)
    )
    forward = 2 * count_parameters(config).multiplied + 4 * width * seen  # q·k and p·v: 2 each
    return (3 if training else 1) * float(forward)
