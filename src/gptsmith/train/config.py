"""What a training run is asked to do. Plain data: no torch here, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.optim.schedule import Schedule
from gptsmith.runtime import Precision


@dataclass(frozen=True)
class ModelOptions:
    """The shape of the model; what is left out follows from the family and the width."""

    family: Literal[
        "gpt1", "gpt2", "gpt3", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"
    ] = "qwen3"
    """gpt1, gpt2, gpt3: as published in 2018, 2019, 2020. qwen3: today's (RoPE, RMSNorm, SwiGLU, grouped queries,
    QK-norm); llama, mistral, qwen2: its relatives; mixtral, qwen2_moe, qwen3_moe: with experts."""
    num_hidden_layers: int = 4
    """Depth: the number of blocks."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads (default: as many as query heads)."""
    head_dim: int | None = None
    """Width of a head (default: hidden size / heads)."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer (default: 4x for gpt2, about 8/3x for qwen3)."""
    rope_theta: float | None = None
    """Base of the rotary angles: larger for longer contexts (default: the family's, 10,000 or 500,000)."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input embedding and the output head."""
    sliding_window: int | None = None
    """How far back the banded layers of gpt3 and mistral see (default: as published)."""
    num_experts: int | None = None
    """Experts of each layer of mixtral, qwen2_moe and qwen3_moe, of width intermediate-size (default: as published)."""
    num_experts_per_tok: int | None = None
    """Experts that a token uses (default: as published)."""
    shared_expert_intermediate_size: int | None = None
    """Width of qwen2_moe's shared expert (default: that of a token's experts together)."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss (default: 0.001)."""
    router_z_loss_coef: float | None = None
    """Weight of the router z-loss (default: 0)."""
    residual_init: Literal["normal", "scaled"] | None = None
    """scaled: start projections into the residual stream smaller, as GPT-2 does (default: as in the family's paper)."""

    def build(self, vocab_size: int, context: int) -> ModelConfig:
        """The resolved `ModelConfig`. UsageError where sizes do not fit together."""
        from gptsmith.model.families import FAMILIES

        _check(self.num_attention_heads >= 1, "--model.num-attention-heads", self.num_attention_heads, "at least 1")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"--model.hidden-size {self.hidden_size} is not a multiple of "
                f"--model.num-attention-heads {self.num_attention_heads}."
            )
        published = FAMILIES[self.family]()
        options = {key: value for key, value in asdict(self).items() if key != "family"}
        # None: as the family has it. Sizes that follow from others are derived, not taken from the published model.
        derived = {"num_key_value_heads", "head_dim", "intermediate_size"}
        if published.shared_expert_intermediate_size:
            derived.add("shared_expert_intermediate_size")
        options = {key: value for key, value in options.items() if value is not None or key in derived}
        for what, names in _NEEDING.items():  # ignoring an option would be a silent mistake
            given = [f"--model.{name.replace('_', '-')}" for name in names if name in options]
            if given and not getattr(published, what):
                having = ", ".join(name for name, make in FAMILIES.items() if getattr(make(), what))
                raise UsageError(f"{', '.join(given)}: a {self.family} model has none. These have: {having}.")
        return FAMILIES[self.family](vocab_size=vocab_size, max_position_embeddings=context, **options)


_NEEDING = {  # options that are of use to those families only whose published model has the field
    "num_experts": ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef"),
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size",),
    "window_pattern": ("sliding_window",),
    "rope_theta": ("rope_theta",),
}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "muon"
    """muon: matrices by Muon, the rest by AdamW. adamw: everything by AdamW."""
    lr: float = 0.02
    """Peak learning rate: of the matrices with muon, of everything with adamw."""
    embedding_lr: float = 0.01
    """With muon: AdamW's peak learning rate for embeddings, head and norms."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    momentum: float = 0.9
    """Muon's momentum."""
    newton_schulz_steps: int = 5
    """Muon's iterations: fewer are faster and less exact."""
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    """Largest allowed gradient norm (0: no clipping)."""
    schedule: Schedule = "wsd"
    """How the learning rate moves: wsd (warm-up, stable, linear decay), cosine, constant."""
    warmup_steps: int = 10
    decay_fraction: float = 1.0
    """With wsd: the last share of the steps, over which the rate falls."""
    final_factor: float = 0.0
    """The rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr"):
            _check(getattr(self, name) > 0, f"--optim.{name.replace('_', '-')}", getattr(self, name), "above 0")
        for name in ("weight_decay", "clip", "warmup_steps"):
            _check(getattr(self, name) >= 0, f"--optim.{name.replace('_', '-')}", getattr(self, name), "0 or more")
        for name in ("momentum", "beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, f"--optim.{name}", getattr(self, name), "at least 0 and below 1")
        _check(self.newton_schulz_steps >= 1, "--optim.newton-schulz-steps", self.newton_schulz_steps, "at least 1")
        for name in ("decay_fraction", "final_factor"):
            _check(0 <= getattr(self, name) <= 1, f"--optim.{name.replace('_', '-')}", getattr(self, name), "in [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """A whole pretraining run: the same values and data give the same weights."""

    budget: str | None = None
    """What to spend: time (5m, 2h), arithmetic (1e15flop) or tokens (200Mtok). What you do not give yourself - size,
    context, batch, learning rates, steps - is chosen for the best loss within it."""
    depth: int | None = None
    """The size dial, instead of model.num-hidden-layers and its companions: 3 is 0.6M parameters, 12 85M. What you do
    not give yourself follows from it."""
    val: str | None = None
    """Validation text of your own: a file, folder or named corpus (default: cut from the end of the data)."""
    val_fraction: float = 0.1
    """Share of the data, from its end, held out for validation."""
    field: str = "text"
    """The field that holds the text, for JSONL and parquet."""
    tokenizer: str = "char"
    """char, bpe (trained on the data), gpt2, or a directory with tokenizer.json."""
    vocab_size: int = 4096
    """Vocabulary of a bpe tokenizer trained here."""
    unknown: bool = False
    """Give the char tokenizer a token for characters it has not seen."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    context: int = 128
    """Tokens that attend to one another: the training sequence length and the model's limit."""
    dropout: float = 0.0
    mask_documents: bool = False
    """Tokens attend only within their own document."""
    steps: int = 2000
    """Optimizer updates."""
    batch_size: int = 16
    """Sequences per update."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; fewer than the batch accumulates gradients (default: all at once)."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval_every: int = 500
    """Steps between evaluations on the validation split; a checkpoint is saved before each."""
    eval_tokens: int | None = None
    """Evaluate on the first so many validation tokens only (default: the whole split)."""
    save_every: int | None = None
    """Steps between checkpoints (default: as eval-every)."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints to keep, besides the best."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl (losses are averaged over them)."""
    sample_tokens: int = 200
    """Length of the preview printed at each evaluation (0: none)."""
    sample_prompt: str = "\n"
    """What previews and the report's samples continue."""
    seed: int = 1337
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Precision = "auto"
    """auto: fp32 on a CPU, bf16 (else fp16) on a GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: torch.compile where a compiler is present and the run is long enough to pay for it."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "context",
            "eval_every",
            "log_every",
            "keep_checkpoints",
            "vocab_size",
            "micro_batch_size",
            "eval_tokens",
            "save_every",
        ):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "at least 1")
        _check(0 <= self.val_fraction <= 0.5, "--val-fraction", self.val_fraction, "at least 0 and at most 0.5")
        _check(0 <= self.dropout < 1, "--dropout", self.dropout, "at least 0 and below 1")
        _check(self.sample_tokens >= 0, "--sample-tokens", self.sample_tokens, "0 or more")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UsageError(f"--micro-batch-size {self.micro_batch_size} must divide --batch-size {self.batch_size}.")


def _check(ok: bool, option: str, value: Any, expected: str) -> None:
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{option} must be {expected}, not {value}.")
