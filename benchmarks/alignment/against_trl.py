"""What the comparisons with TRL share: a random text, a small random model, and settings of TRL."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from gptsmith.formats.hf import save_model
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import train_bpe

VOCABULARY = (
    *("the", "a", "cat", "dog", "bird", "fish", "house", "tree", "runs", "sleeps", "eats", "sees", "likes"),
    *("blue", "green", "small", "large", "and", "but", "or", "why", "who"),
)
OURS: dict[str, Any] = {
    "val_fraction": 0.0,
    "lora": "off",
    "optim": {"name": "adamw", "lr": 1e-5, "warmup_steps": 0, "schedule": "constant"},
    "sample_tokens": 0,
    "device": "cpu",
}
"""Options of a run of gptsmith that match those of TRL."""


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def make_model(place: Path, width: int, layers: int, *, vocabulary: int, context: int, characters: str = "") -> Path:
    """Save a random Llama with a tokenizer that has an end-of-text token. characters: which it knows besides."""
    tokenizer = train_bpe([text(random.Random(1), 20_000) + characters], vocabulary)
    torch.manual_seed(0)
    heads = width // 32
    config = FAMILIES["llama"](
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
    )
    place.mkdir()
    save_model(Transformer(config), place, end_ids=tokenizer.end_ids)
    tokenizer.save(place)
    return place


def trl_settings(out: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Return the arguments that all configurations of TRL take."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
    }
