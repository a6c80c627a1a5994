"""The configuration of a model: plain data with Hugging Face's field names, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gptsmith.errors import UsageError, nearest

IGNORED = -100
"""A target that does not count in a loss. It is defined here since data preparation does without torch."""

ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "tanh",
)
"""The activations of feed-forward layers; `gptsmith.model.activations` computes them."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles differ from the plain ones, mostly to extend the context beyond the one in training.

    linear: positions are divided by `factor` (Chen et al. 2023, 2306.15595). yarn: low frequencies are slowed down,
    high ones kept, and attention is sharpened (Peng et al. 2023, 2309.00071). llama3: frequencies are scaled by their
    wavelength (Llama 3.1). longrope: each frequency is divided by its own number, and attention is sharpened (Ding et
    al. 2024, 2402.13753). proportional: only the first part of the frequencies turn, divided by `factor`.
    """

    kind: Literal["linear", "yarn", "llama3", "longrope", "proportional"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What yarn and longrope multiply cosines and sines by; None: derived from `factor`."""
    truncate: bool = True
    """yarn: round the dimensions at which interpolation begins and ends to whole ones."""
    short_factor: tuple[float, ...] = ()
    """longrope: the D/2 divisors of the frequencies."""
    long_factor: tuple[float, ...] = ()
    """longrope: those for contexts beyond the original one, to which `extend_context` switches."""
    partial_rotary_factor: float = 1.0
    """proportional: the part of a head that turns."""
    mscale_all_dim: float = 0.0
    """yarn with latent attention: the scores are multiplied by (0.1 · mscale_all_dim · ln(factor) + 1)², too
    (DeepSeek-V2, 2405.04434)."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UsageError(f"a rope scaling factor must be above 0, not {self.factor}.")
        if self.kind in ("yarn", "llama3", "longrope") and (self.original_max_position_embeddings or 0) < 1:
            raise UsageError(f"rope scaling {self.kind!r} needs original_max_position_embeddings, at least 1.")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise UsageError(
                f"rope scaling 'llama3' needs a high_freq_factor ({self.high_freq_factor}) above its low_freq_factor "
                f"({self.low_freq_factor}), and both above 0."
            )
        if self.kind == "longrope" and not all(x > 0 for x in (*self.short_factor, *self.long_factor)):
            raise UsageError("rope scaling 'longrope' needs a short_factor and a long_factor of numbers above 0.")
        if not 0 <= self.partial_rotary_factor <= 1:
            raise UsageError(f"partial_rotary_factor must be between 0 and 1, not {self.partial_rotary_factor}.")


@dataclass(frozen=True)
class VisionConfig:
    """How a model reads pictures: a vision transformer (`model.vision`), a projector, and how pictures are prepared.

    The defaults are SigLIP's tower in LLaVA's layout.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    """Pixels per side of the square that every picture becomes."""
    patch_size: int
    """Pixels per side of a patch."""
    activation: str = "gelu_tanh"
    """Of the feed-forward layers, one of `ACTIVATIONS`."""
    norm_eps: float = 1e-6
    class_token: bool = False
    """CLIP's tower: a token before the patches, a norm before the first block, and patches without a bias."""
    drop_first: bool = False
    """Leave out the tower's first output, which is that of the class token (`vision_feature_select_strategy`)."""
    post_norm: bool = False
    """Whether the output goes through a norm, as in Idefics3; LLaVA takes it before."""
    pixel_shuffle: int = 1
    """So many patches per side become one token."""
    projector: Literal["mlp", "linear"] = "mlp"
    projector_activation: str = "gelu_tanh"
    projector_bias: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    center_crop: bool = False
    """Keep the proportions of a picture, and cut off what is outside the square in the middle. Otherwise stretch it."""
    image_token: str = "<image>"
    """What stands for a picture in a text."""
    model_type: Literal["llava", "idefics3", "smolvlm"] = "llava"
    """The Hugging Face layout of the whole."""

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def around(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens that transformers' processors put before those of a picture, and after them."""
        if self.model_type == "llava":
            return (), ()
        return ("<fake_token_around_image>", "<global-img>"), ("<fake_token_around_image>",)

    @property
    def num_positions(self) -> int:
        """Patches, and the class token."""
        return self.grid**2 + self.class_token

    @property
    def tokens(self) -> int:
        """Number of tokens that a picture becomes."""
        return (self.num_positions - self.drop_first) // self.pixel_shuffle**2

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        for name in (*names, "patch_size", "pixel_shuffle"):
            if getattr(self, name) < 1:
                raise UsageError(f"vision.{name} must be at least 1, not {getattr(self, name)}.")
        if self.patch_size > self.image_size:
            raise UsageError(f"a patch of {self.patch_size} pixels is larger than a picture of {self.image_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"vision.hidden_size ({self.hidden_size}) must be a multiple of vision.num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.grid % self.pixel_shuffle or (self.pixel_shuffle > 1 and (self.class_token or self.drop_first)):
            raise UsageError(
                f"{self.grid}×{self.grid} patches cannot be joined in squares of "
                f"{self.pixel_shuffle}×{self.pixel_shuffle}."
            )
        for name in ("activation", "projector_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise UsageError(f"unknown vision.{name} {getattr(self, name)!r}. Known: {', '.join(ACTIVATIONS)}.")
        if any(not value > 0 for value in self.image_std):
            raise UsageError(f"image_std must be above 0, not {self.image_std}.")


@dataclass(frozen=True)
class ModelConfig:
    """Everything in which one GPT differs from another.

    The functions of `gptsmith.model.families` return configurations; `Transformer` reads one when it is built.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """The context: the maximum number of tokens in a sequence."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    position: Literal["learned", "rope"]
    rope_theta: float | None
    mlp: str
    """The feed-forward layer: one of `ACTIVATIONS`, or for a layer with a gate `gated_` and one of them (2002.05202);
    `swiglu` is the gated `silu`. `clamped_swiglu` is gate · sigmoid(swiglu_alpha · gate) · (up + 1) with the gate below
    `swiglu_limit` and up within ± it (gpt-oss, 2508.10925)."""
    qk_norm: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    residual_init: Literal["normal", "scaled"]
    """`scaled`: initial projections into the residual stream are 1/sqrt(2·layers) times as large (GPT-2, section
    2.3)."""
    model_type: str
    """The Hugging Face layout in which the model is saved (`gpt2`, `qwen3`, ...)."""
    norm_position: Literal["pre", "post", "reordered", "sandwich"] = "pre"
    """`pre`: x + f(norm(x)), and a final norm. `post`: norm(x + f(x)), as in the original transformer and GPT-1.
    `reordered`: x + norm(f(x)), and a final norm (OLMo 2, 2501.00656). `sandwich`: x + norm(f(norm(x))), and a final
    norm (CogView, 2105.13290; Gemma 3)."""
    parallel_residual: bool = False
    """Whether attention and feed-forward layer read the same x: x + attention(norm(x)) + mlp(norm(x)) (GPT-J, PaLM)."""
    shared_norm: bool = False
    """Whether the two share one norm in a parallel block."""
    zero_centered_norm: bool = False
    """Whether norms multiply by 1 + weight (Gemma)."""
    qk_norm_scope: Literal["head", "heads", "all"] = "head"
    """What is normalized together in queries and keys. `head`: each head, with the same weights. `heads`: each head,
    with its own weights and no bias (StableLM 2). `all`: all heads together (OLMo 2)."""
    attention_output_bias: bool | None = None
    """Whether the output projection of attention has a bias; None: as `attention_bias`."""
    attention_scale: float | None = None
    """Factor of the scores q·k before the softmax; None: 1/sqrt(head_dim)."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Whether the scores of layer i = 0, 1, ... are divided by i + 1, too (Mistral's GPT-2 models)."""
    sliding_window: int | None = None
    """How many tokens a token sees in a layer with a sliding window, itself included."""
    window_pattern: tuple[bool, ...] = ()
    """Which layers have the sliding window, repeated over the depth; empty: none."""
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    """The part of each head that is rotated, its first one (GPT-NeoX, 2204.06745); the rest has no positions."""
    rope_pattern: tuple[bool, ...] = ()
    """Which layers have rotary positions, repeated over the depth; empty: all. Others have none (NoPE, 2305.19466)."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies in layers with a sliding window, which are not scaled (Gemma 3, 2503.19786);
    None: as in the others."""
    position_offset: int = 0
    """Learned positions: the row of the table that belongs to the first token (OPT: 2)."""
    scale_embeddings: bool = False
    """Whether token embeddings are multiplied by √hidden_size, as in the original transformer and Gemma."""
    embedding_size: int | None = None
    """Width of token embeddings that is projected to hidden_size, and back before the output matrix (OPT-350M; ALBERT,
    1909.11942); None: hidden_size, without projections."""
    swiglu_alpha: float = 1.702
    """Slope of the sigmoid in `clamped_swiglu`."""
    swiglu_limit: float = 7.0
    """Bound of gate and up in `clamped_swiglu`."""
    kv_lora_rank: int | None = None
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): the width of the latent vector of which keys and values of
    all heads are made, and which the cache holds; None: other attention."""
    q_lora_rank: int | None = None
    """Latent attention: the width of the latent vector of which queries are made; None: they are made of x."""
    qk_rope_head_dim: int = 0
    """Latent attention: how many numbers of each head are rotated, its last ones, of which all heads share the key."""
    v_head_dim: int | None = None
    """Latent attention: the width of a head's values; None: head_dim."""
    attention_sinks: bool = False
    """Whether each head has a learned score that takes part in the softmax without a value (gpt-oss; 2309.17453)."""
    num_experts: int = 0
    """Number of experts per layer, each `intermediate_size` wide; 0: a dense feed-forward layer."""
    num_experts_per_tok: int = 2
    """Number of experts that each token uses."""
    shared_expert_intermediate_size: int = 0
    """Width of an additional expert that every token uses, behind its own sigmoid gate; 0: none."""
    shared_expert_gate: bool = True
    """Whether the shared expert has a gate."""
    first_k_dense_replace: int = 0
    """How many layers, the first ones, have a dense feed-forward layer in place of experts."""
    dense_intermediate_size: int | None = None
    """The width of the feed-forward layer in these."""
    router_bias: bool = False
    """Whether the router has a bias."""
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become the weights of experts. `sigmoid`: each by itself (DeepSeek-V3, 2412.19437); a
    bias that is no parameter is added to them where experts are chosen."""
    n_group: int = 1
    """Number of groups of experts. A token's are of the `topk_group` groups with the best two experts."""
    topk_group: int = 1
    """Number of groups that a token uses."""
    routed_scaling_factor: float = 1.0
    """What the weights of the chosen experts are multiplied by."""
    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are normalized to add up to 1."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss in training."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss in training."""
    vision: VisionConfig | None = None
    """How the model reads pictures; None: it reads text alone."""
    image_token_id: int | None = None
    """The token in whose places pictures stand."""

    @property
    def gated_mlp(self) -> bool:
        """Whether the feed-forward layer has a gate: down(activation(gate(x)) · up(x))."""
        return self.mlp in ("swiglu", "clamped_swiglu") or self.mlp.startswith("gated_")

    @property
    def activation(self) -> str:
        """The activation of the feed-forward layer, one of `ACTIVATIONS`."""
        return "silu" if self.mlp in ("swiglu", "clamped_swiglu") else self.mlp.removeprefix("gated_")

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are rotated."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def value_dim(self) -> int:
        """The width of a head's values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def cached_heads(self) -> int:
        """How many keys and values the cache holds per token and layer."""
        return self.num_key_value_heads if self.kv_lora_rank is None else 1

    @property
    def cached_key_dim(self) -> int:
        """The width of a key in the cache. In latent attention it begins with its value, which is not stored again."""
        return self.head_dim if self.kv_lora_rank is None else self.kv_lora_rank + self.qk_rope_head_dim

    def has_experts(self, layer: int) -> bool:
        """Return whether `layer` is a mixture of experts."""
        return bool(self.num_experts) and layer >= self.first_k_dense_replace

    def rope_of(self, layer: int) -> Literal["none", "global", "local"]:
        """Return which rotary positions `layer` has."""
        if self.position != "rope" or (self.rope_pattern and not self.rope_pattern[layer % len(self.rope_pattern)]):
            return "none"
        return "local" if self.local_rope_theta is not None and self.window_of(layer) is not None else "global"

    def scale_of(self, layer: int) -> float | None:
        """Return the factor of the attention scores of `layer`; None: 1/sqrt(head_dim)."""
        s = self.rope_scaling
        if s is not None and s.mscale_all_dim and s.factor > 1:
            mscale = 0.1 * s.mscale_all_dim * math.log(s.factor) + 1
            return (self.attention_scale or self.head_dim**-0.5) * mscale * mscale
        if not self.scale_attn_by_inverse_layer_idx:
            return self.attention_scale
        return (self.attention_scale or self.head_dim**-0.5) / (layer + 1)

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of `layer`; None: it has none."""
        if self.sliding_window is None or not self.window_pattern:
            return None
        return self.sliding_window if self.window_pattern[layer % len(self.window_pattern)] else None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.activation not in ACTIVATIONS or self.mlp == "gated_silu":
            known = (
                "swiglu",
                "clamped_swiglu",
                *ACTIVATIONS,
                *(f"gated_{name}" for name in ACTIVATIONS if name != "silu"),
            )
            raise UsageError(f"unknown mlp {self.mlp!r}.{nearest(self.mlp, known)} Known: {', '.join(known)}.")
        if self.shared_norm and not self.parallel_residual:
            raise UsageError("shared_norm is for blocks with a parallel_residual.")
        if self.parallel_residual and self.norm_position != "pre":
            raise UsageError(f'a parallel_residual needs norm_position="pre", not {self.norm_position!r}.')
        if self.zero_centered_norm and self.norm != "rmsnorm":
            raise UsageError('zero_centered_norm needs norm="rmsnorm".')
        if self.embedding_size is not None and (self.embedding_size < 1 or self.embedding_size == self.hidden_size):
            raise UsageError(
                f"embedding_size must be at least 1 and differ from hidden_size, not {self.embedding_size}; None: no "
                "projections."
            )
        if self.position_offset < 0 or (self.position_offset and self.position != "learned"):
            raise UsageError("position_offset must be at least 0, and 0 without learned positions.")
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise UsageError(f"attention_scale must be above 0, not {self.attention_scale}.")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and {self.num_experts}."
            )
        if self.num_experts and not self.gated_mlp:
            raise UsageError(f'experts must be layers with a gate (mlp="swiglu"), not {self.mlp!r}.')
        if self.kv_lora_rank is not None:
            self._check_latent_attention()
        elif self.q_lora_rank is not None or self.qk_rope_head_dim or self.v_head_dim is not None:
            raise UsageError("q_lora_rank, qk_rope_head_dim and v_head_dim need a kv_lora_rank (latent attention).")
        if self.num_experts:
            self._check_routing()
        if self.router_bias and not self.num_experts:
            raise UsageError("router_bias is for models with experts.")
        if not (self.swiglu_alpha > 0 and self.swiglu_limit > 0):
            raise UsageError(
                f"swiglu_alpha ({self.swiglu_alpha}) and swiglu_limit ({self.swiglu_limit}) must be above 0."
            )
        if self.shared_expert_intermediate_size < 0 or (self.shared_expert_intermediate_size and not self.num_experts):
            raise UsageError("shared_expert_intermediate_size must be at least 0, and 0 in a model without experts.")
        if any(self.window_pattern) and (self.sliding_window or 0) < 1:
            raise UsageError(f"window_pattern needs a sliding_window of at least 1, not {self.sliding_window}.")
        if self.rope_scaling is not None and self.position != "rope":
            raise UsageError("rope_scaling needs rotary positions.")
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self.rope_scaling, name)) != self.rotary_dim // 2:
                    raise UsageError(
                        f"rope scaling 'longrope' needs a {name} of {self.rotary_dim // 2} numbers, one per pair of a "
                        f"head, not {len(getattr(self.rope_scaling, name))}."
                    )
        if (self.vision is None) is not (self.image_token_id is None):
            raise UsageError("a model that reads pictures needs both vision and image_token_id.")
        if self.image_token_id is not None and not 0 <= self.image_token_id < self.vocab_size:
            raise UsageError(f"image_token_id ({self.image_token_id}) must be below vocab_size ({self.vocab_size}).")
        odd = self.head_dim % 2 and self.kv_lora_rank is None  # latent attention rotates a part of its own width
        if self.position == "rope" and (odd or self.rope_theta is None):
            raise UsageError(f"rotary positions need an even head_dim (here {self.head_dim}) and a rope_theta.")
        if self.position == "rope" and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise UsageError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotary_dim} of {self.head_dim} "
                "numbers of a head: it must be an even number, at least 2 and at most all."
            )
        if self.position != "rope" and (self.rope_pattern or self.local_rope_theta is not None):
            raise UsageError("rope_pattern and local_rope_theta need rotary positions.")

    def _check_latent_attention(self) -> None:
        for name in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}.")
        if self.position != "rope" or self.qk_rope_head_dim >= self.head_dim:
            raise UsageError(
                f"latent attention needs rotary positions over a part of a head: qk_rope_head_dim "
                f"({self.qk_rope_head_dim}) must be below head_dim ({self.head_dim})."
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise UsageError("latent attention needs as many num_key_value_heads as num_attention_heads.")
        if self.qk_norm or self.attention_sinks or any(self.window_pattern):
            raise UsageError("latent attention has no qk_norm, attention_sinks or sliding windows.")

    def _check_routing(self) -> None:
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise UsageError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must be between 0 and the number of layers."
            )
        if self.first_k_dense_replace and (self.dense_intermediate_size or 0) < 1:
            raise UsageError("first_k_dense_replace needs a dense_intermediate_size of at least 1.")
        if self.n_group < 1 or self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise UsageError(
                f"n_group ({self.n_group}) must divide num_experts ({self.num_experts}), and topk_group "
                f"({self.topk_group}) must be between 1 and n_group."
            )
        size = self.num_experts // self.n_group
        if self.n_group > 1 and (size < 2 or self.topk_group * size < self.num_experts_per_tok):
            raise UsageError(
                f"groups of {size} experts are too small: a group needs 2, and {self.topk_group} groups "
                f"num_experts_per_tok = {self.num_experts_per_tok}."
            )
        if not self.routed_scaling_factor > 0:
            raise UsageError(f"routed_scaling_factor must be above 0, not {self.routed_scaling_factor}.")


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: A of rank r and B, with y = W x + scaling · B A x."""

    rank: int = 16
    """Rank of the update of each matrix. More learns more, takes more memory, and is rarely needed above 64."""
    alpha: float | None = None
    """The updates are multiplied by alpha / rank (default: twice the rank, so that the learning rate can stay the same
    for all ranks)."""
    dropout: float = 0.0
    """Dropout of the inputs of the updates."""
    rslora: bool = False
    """Multiply by alpha / √rank instead (rank-stabilized LoRA, 2312.03732); helps at high ranks."""
    dora: bool = False
    """Train the length of each row of the matrices, too (DoRA, 2402.09353); slower."""
    targets: tuple[str, ...] = ()
    """Layers to adapt, by their Hugging Face names or patterns of them: q_proj, *.layers.0.* (default: all linear
    layers)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"--lora.rank must be at least 1, not {self.rank}.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"--lora.alpha must be above 0, not {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--lora.dropout must be at least 0 and below 1, not {self.dropout}.")

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
