"""Presets: named configurations to start from. Options on the command line override their values.

Presets of our own are functions whose docstrings describe them. Presets of published sizes come from two tables,
`families.SIZES` and `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from gptsmith.errors import UsageError, nearest
from gptsmith.model import families
from gptsmith.train.config import ModelOptions, OptimConfig, RunConfig, run_config


def char_small() -> RunConfig:
    """The default: 0.8M parameters, one token per character, a modern layout, Muon. Minutes on a laptop CPU."""
    return RunConfig()


def shakespeare_3min() -> RunConfig:
    """The demo: char-small for 1,200 steps. About two minutes on two CPU cores."""
    return char_small().replace(steps=1200, eval_every=400)


def shakespeare_quick() -> RunConfig:
    """0.2M parameters, context 64. Readable Shakespeare in seconds."""
    return run_config(
        model=ModelOptions(num_hidden_layers=2, hidden_size=96, num_attention_heads=3, tie_word_embeddings=False),
        context=64,
        batch_size=16,
        steps=250,
        eval_every=250,
        optim=OptimConfig(lr=0.02, embedding_lr=0.01, newton_schulz_steps=3, warmup_steps=5),
    )


def nanogpt_cpu() -> RunConfig:
    """nanoGPT's published recipe for a CPU, for comparison: GPT-2 layout, AdamW, context 64."""
    return run_config(
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


def bpe_small() -> RunConfig:
    """12M parameters, a byte-level BPE tokenizer trained on your text (books, code, notes). Hours on a CPU."""
    return run_config(
        tokenizer="bpe",
        vocab_size=4096,
        model=ModelOptions(num_hidden_layers=6, hidden_size=384, num_attention_heads=6),
        context=256,
        batch_size=16,
        steps=4000,
        optim=OptimConfig(lr=0.02, embedding_lr=0.005, warmup_steps=50, weight_decay=0.01),
    )


@dataclass(frozen=True)
class Recipe:
    """How to train a model of a published size."""

    lr: float
    batch_size: int  # sequences of `context`
    context: int
    tokens: float  # in all steps together
    warmup_steps: int
    published: bool = True  # False if the paper does not state the learning rate


# GPT-1: section 4.1 of the paper; 100 epochs of BooksCorpus, which has about a billion tokens. GPT-2: the batch size is
# from the paper, learning rates are those of GPT-3 for the same sizes, tokens those of common reproductions. GPT-3:
# table 2.1 and appendix B of 2005.14165. Llama: 2302.13971, table 2. Llama 3.1: 2407.21783, table 3 and section 3.4.1
# (its first stage). Pythia: 2304.01373, table 1 and section 2.2. GPT-NeoX: 2204.06745, appendix. OPT: 2205.01068, table
# 1. DeepSeek-V3: 2412.19437, section 4.2. OLMo 2: 2501.00656, table 3. SmolLM3: its report. The others publish tokens
# and contexts at most; learning rates and batch sizes are Llama's.
RECIPES: dict[str, Recipe] = {
    "gpt1-117m": Recipe(2.5e-4, 64, 512, 100e9, 2000),
    "gpt2-124m": Recipe(6e-4, 512, 1024, 10.5e9, 700, published=False),
    "gpt2-355m": Recipe(3e-4, 512, 1024, 10.5e9, 700, published=False),
    "gpt2-774m": Recipe(2.5e-4, 512, 1024, 10.5e9, 700, published=False),
    "gpt2-1.5b": Recipe(2e-4, 512, 1024, 10.5e9, 700, published=False),
    "gpt3-125m": Recipe(6e-4, 256, 2048, 300e9, 715),
    "gpt3-350m": Recipe(3e-4, 256, 2048, 300e9, 715),
    "gpt3-760m": Recipe(2.5e-4, 256, 2048, 300e9, 715),
    "gpt3-1.3b": Recipe(2e-4, 512, 2048, 300e9, 358),
    "gpt3-2.7b": Recipe(1.6e-4, 512, 2048, 300e9, 358),
    "gpt3-6.7b": Recipe(1.2e-4, 1024, 2048, 300e9, 179),
    "gpt3-13b": Recipe(1e-4, 1024, 2048, 300e9, 179),
    "gpt3-175b": Recipe(0.6e-4, 1600, 2048, 300e9, 114),
    "llama-7b": Recipe(3e-4, 2048, 2048, 1e12, 2000),
    "llama3.1-8b": Recipe(3e-4, 512, 8192, 15e12, 8000),
    "llama3.2-1b": Recipe(3e-4, 512, 8192, 9e12, 2000, published=False),
    "llama3.2-3b": Recipe(3e-4, 512, 8192, 9e12, 2000, published=False),
    "mistral-7b": Recipe(3e-4, 512, 8192, 1e12, 2000, published=False),
    "qwen2-0.5b": Recipe(3e-4, 1024, 4096, 12e12, 2000, published=False),
    "qwen2-1.5b": Recipe(3e-4, 1024, 4096, 7e12, 2000, published=False),
    "qwen2-7b": Recipe(3e-4, 1024, 4096, 7e12, 2000, published=False),
    "qwen3-0.6b": Recipe(3e-4, 1024, 4096, 36e12, 2000, published=False),
    "qwen3-1.7b": Recipe(3e-4, 1024, 4096, 36e12, 2000, published=False),
    "qwen3-4b": Recipe(3e-4, 1024, 4096, 36e12, 2000, published=False),
    "qwen3-8b": Recipe(3e-4, 1024, 4096, 36e12, 2000, published=False),
    "mixtral-8x7b": Recipe(3e-4, 128, 32768, 1e12, 2000, published=False),
    "qwen1.5-moe-a2.7b": Recipe(3e-4, 512, 8192, 1e12, 2000, published=False),
    "qwen2-57b-a14b": Recipe(3e-4, 1024, 4096, 4.5e12, 2000, published=False),
    "qwen3-30b-a3b": Recipe(3e-4, 1024, 4096, 36e12, 2000, published=False),
    "pythia-14m": Recipe(1e-3, 1024, 2048, 300e9, 1430),
    "pythia-31m": Recipe(1e-3, 1024, 2048, 300e9, 1430),
    "pythia-70m": Recipe(1e-3, 1024, 2048, 300e9, 1430),
    "pythia-160m": Recipe(6e-4, 1024, 2048, 300e9, 1430),
    "pythia-410m": Recipe(3e-4, 1024, 2048, 300e9, 1430),
    "pythia-1b": Recipe(3e-4, 1024, 2048, 300e9, 1430),
    "pythia-1.4b": Recipe(2e-4, 1024, 2048, 300e9, 1430),
    "pythia-2.8b": Recipe(1.6e-4, 1024, 2048, 300e9, 1430),
    "pythia-6.9b": Recipe(1.2e-4, 1024, 2048, 300e9, 1430),
    "pythia-12b": Recipe(1.2e-4, 1024, 2048, 300e9, 1430),
    "gpt-neox-20b": Recipe(0.97e-4, 1536, 2048, 472e9, 1500),
    "opt-125m": Recipe(6e-4, 256, 2048, 300e9, 715),
    "opt-1.3b": Recipe(2e-4, 512, 2048, 300e9, 358),
    "opt-2.7b": Recipe(1.6e-4, 512, 2048, 300e9, 358),
    "opt-6.7b": Recipe(1.2e-4, 1024, 2048, 300e9, 179),
    "opt-13b": Recipe(1e-4, 2048, 2048, 300e9, 90),
    "opt-30b": Recipe(1e-4, 2048, 2048, 300e9, 90),
    "opt-66b": Recipe(0.8e-4, 1024, 2048, 300e9, 179),
    "phi3-mini": Recipe(3e-4, 1024, 4096, 3.3e12, 2000, published=False),
    "phi3-medium": Recipe(3e-4, 1024, 4096, 4.8e12, 2000, published=False),
    "olmo2-1b": Recipe(4e-4, 512, 4096, 4e12, 2000),
    "olmo2-7b": Recipe(3e-4, 1024, 4096, 4e12, 2000),
    "olmo2-13b": Recipe(9e-4, 2048, 4096, 5e12, 2000),
    "olmo2-32b": Recipe(6e-4, 2048, 4096, 6e12, 2000),
    "stablelm2-1.6b": Recipe(1e-3, 1024, 4096, 2e12, 2000, published=False),
    "smollm3-3b": Recipe(2e-4, 576, 4096, 11.2e12, 2000),
    "gemma3-270m": Recipe(3e-4, 1024, 4096, 6e12, 2000, published=False),
    "gemma3-1b": Recipe(3e-4, 1024, 4096, 2e12, 2000, published=False),
    "gemma3-4b": Recipe(3e-4, 1024, 4096, 4e12, 2000, published=False),
    "gemma3-12b": Recipe(3e-4, 1024, 4096, 12e12, 2000, published=False),
    "gpt-oss-20b": Recipe(3e-4, 1024, 4096, 10e12, 2000, published=False),
    "gpt-oss-120b": Recipe(3e-4, 1024, 4096, 10e12, 2000, published=False),
    "deepseek-v3": Recipe(2.2e-4, 15360, 4096, 14.8e12, 2000),
}
"""By the name of a size. Sizes with a shape that options cannot describe (OPT-350M's narrow embeddings, for example)
have none."""


def published_size(name: str) -> RunConfig:
    """Return the configuration that trains a model of `families.SIZES` from new weights by its `Recipe`.

    The optimizer is AdamW with a cosine schedule. GPT-2 and GPT-3 use GPT-2's tokenizer. For the others, a BPE
    tokenizer of the published size is trained on the data, since their own was trained on other data. Rotary positions
    are scaled to longer contexts after training (`gptsmith export --context`).
    """
    family, options = families.SIZES[name]
    c, recipe = families.FAMILIES[family](**options), RECIPES[name]
    first = family == "gpt1"
    return run_config(
        tokenizer="gpt2" if family in ("gpt2", "gpt3") else "bpe",
        vocab_size=c.vocab_size,
        model=ModelOptions(
            family=cast(Any, family),
            num_hidden_layers=c.num_hidden_layers,
            hidden_size=c.hidden_size,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            intermediate_size=c.intermediate_size,
            rope_theta=c.rope_theta,
            tie_word_embeddings=c.tie_word_embeddings,
            sliding_window=c.sliding_window,
            num_experts=c.num_experts or None,
            num_experts_per_tok=c.num_experts_per_tok if c.num_experts else None,
            shared_expert_intermediate_size=c.shared_expert_intermediate_size or None,
        ),
        context=recipe.context,
        dropout=0.1 if first else 0.0,
        steps=100 * round(recipe.tokens / (100 * recipe.batch_size * recipe.context)),
        batch_size=recipe.batch_size,
        micro_batch_size=max(1, 16384 // recipe.context),
        val_fraction=0.005,
        eval_tokens=4_000_000,
        eval_every=1000,
        optim=OptimConfig(
            name="adamw",
            lr=recipe.lr,
            weight_decay=0.01 if first else 0.1,
            beta2=0.999 if first else 0.95,
            schedule="cosine",
            warmup_steps=recipe.warmup_steps,
            final_factor=0.0 if first else 0.1,
        ),
    )


OWN: dict[str, Callable[[], RunConfig]] = {
    "char-small": char_small,
    "shakespeare-3min": shakespeare_3min,
    "shakespeare-quick": shakespeare_quick,
    "nanogpt-cpu": nanogpt_cpu,
    "bpe-small": bpe_small,
}
PRESETS: dict[str, Callable[[], RunConfig]] = OWN | {name: partial(published_size, name) for name in RECIPES}


def preset(name: str) -> RunConfig:
    """Return the configuration of a preset. Raise UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}.{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]()


def describe_own() -> list[tuple[str, str]]:
    """Return the name and the description of each preset of our own."""
    return [(name, (make.__doc__ or "").strip()) for name, make in OWN.items()]


def describe_published() -> list[tuple[str, str]]:
    """Return each family with its published sizes. A * marks those with the training settings of the paper."""
    sizes = {family: [name for name in RECIPES if families.SIZES[name][0] == family] for family in families.FAMILIES}
    return [
        (family, " ".join(name + "*" * RECIPES[name].published for name in names))
        for family, names in sizes.items()
        if names
    ]
