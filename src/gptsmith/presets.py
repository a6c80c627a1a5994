"""Named starting points for training: each a function that returns a `TrainConfig`, whose docstring is its description.

Every value can be overridden on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gptsmith.errors import UsageError, nearest
from gptsmith.train.config import ModelOptions, OptimConfig, TrainConfig


def char_small() -> TrainConfig:
    """0.8M parameters, one token a character, modern layout with Muon: minutes on a laptop CPU. The default."""
    return TrainConfig()


def shakespeare_3min() -> TrainConfig:
    """The demo: char-small over 1,200 steps, about two minutes on two CPU cores."""
    return replace(char_small(), steps=1200, eval_every=400)


def shakespeare_quick() -> TrainConfig:
    """0.2M parameters, context 64: readable Shakespeare in seconds."""
    return TrainConfig(
        model=ModelOptions(num_hidden_layers=2, hidden_size=96, num_attention_heads=3, tie_word_embeddings=False),
        context=64,
        batch_size=16,
        steps=250,
        eval_every=250,
        optim=OptimConfig(lr=0.02, embedding_lr=0.01, momentum=0.9, newton_schulz_steps=3, warmup_steps=5),
    )


def nanogpt_cpu() -> TrainConfig:
    """nanoGPT's published recipe for a CPU (GPT-2 layout, AdamW, context 64), to compare with."""
    return TrainConfig(
        model=ModelOptions(family="gpt2", num_hidden_layers=4, hidden_size=128, num_attention_heads=4),
        context=64,
        batch_size=12,
        steps=2000,
        eval_every=250,
        optim=OptimConfig(
            name="adamw",
            lr=1e-3,
            weight_decay=0.1,
            beta2=0.99,
            schedule="cosine",
            warmup_steps=100,
            final_factor=0.1,
        ),
    )


def bpe_small() -> TrainConfig:
    """12M parameters over a byte-level BPE vocabulary trained on your text (books, code, notes): hours on a CPU."""
    return TrainConfig(
        tokenizer="bpe",
        vocab_size=4096,
        model=ModelOptions(num_hidden_layers=6, hidden_size=384, num_attention_heads=6),
        context=256,
        batch_size=16,
        steps=4000,
        optim=OptimConfig(lr=0.02, embedding_lr=0.005, warmup_steps=50, weight_decay=0.01),
    )


def gpt2_124m() -> TrainConfig:
    """GPT-2 small, 124M parameters, its own vocabulary, the recipe commonly used to reproduce it: for a GPU."""
    return TrainConfig(
        tokenizer="gpt2",
        model=ModelOptions(family="gpt2", num_hidden_layers=12, hidden_size=768, num_attention_heads=12),
        context=1024,
        batch_size=480,
        micro_batch_size=12,
        steps=20000,
        eval_every=1000,
        optim=OptimConfig(
            name="adamw",
            lr=6e-4,
            weight_decay=0.1,
            beta2=0.95,
            schedule="cosine",
            warmup_steps=700,
            final_factor=0.1,
        ),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "char-small": char_small,
    "shakespeare-3min": shakespeare_3min,
    "shakespeare-quick": shakespeare_quick,
    "nanogpt-cpu": nanogpt_cpu,
    "bpe-small": bpe_small,
    "gpt2-124m": gpt2_124m,
}


def preset(name: str) -> TrainConfig:
    """The configuration of a preset. UsageError that names the nearest for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}.{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]()


def describe_presets() -> str:
    """A line for each preset."""
    return "\n".join(f"  {name:18}{(make.__doc__ or '').strip()}" for name, make in PRESETS.items())
