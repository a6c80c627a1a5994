"""Presets are what their descriptions say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.model import families
from gptsmith.model.transformer import Transformer
from gptsmith.presets import OWN, RECIPES, describe_own, describe_published, preset
from gptsmith.train.config import RunConfig


def parameters(name: str, vocab_size: int) -> int:
    config = preset(name)
    with torch.device("meta"):
        return Transformer(config.model.build(vocab_size, config.loop.context)).num_parameters()


@pytest.mark.parametrize("name", OWN)
def test_each_builds_a_model(name: str) -> None:
    config = preset(name)
    assert parameters(name, config.init.vocab_size) > 0
    assert config.loop.batch_size % (config.loop.micro_batch_size or 1) == 0


def test_sizes() -> None:
    assert parameters("char-small", 65) == pytest.approx(0.81e6, rel=0.02)
    assert parameters("bpe-small", 4096) == pytest.approx(12e6, rel=0.1)


def test_the_default_is_char_small() -> None:
    assert preset("char-small") == RunConfig()


def test_nanogpts_recipe_for_a_cpu() -> None:
    """github.com/karpathy/nanoGPT, README: "I only have a macbook"."""
    config = preset("nanogpt-cpu")
    assert (config.loop.context, config.loop.batch_size, config.loop.steps, config.loop.dropout) == (64, 12, 2000, 0.0)
    assert (config.model.num_hidden_layers, config.model.num_attention_heads, config.model.hidden_size) == (4, 4, 128)
    assert (config.optim.name, config.optim.lr, config.optim.schedule) == ("adamw", 1e-3, "cosine")
    assert config.optim.lr * config.optim.final_factor == pytest.approx(1e-4)


def test_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no preset 'char-smal'. Did you mean 'char-small'?"):
        preset("char-smal")


def test_each_preset_is_described() -> None:
    for name, (described, text) in zip(OWN, describe_own(), strict=True):
        assert described == name
        assert len(text) > 40
    names = " ".join(names for _, names in describe_published())
    assert names.replace("*", "").split() == list(RECIPES)
    assert [family for family, _ in describe_published()] == list(families.FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_published_size_is_a_preset(name: str) -> None:
    """What it trains has the shape of the published model, but for what is done after training."""
    family, options = families.SIZES[name]
    published, chosen = families.FAMILIES[family](**options), preset(name)
    built = chosen.model.build(chosen.init.vocab_size, chosen.loop.context)
    later: dict[str, Any] = {
        "max_position_embeddings": chosen.loop.context,
        "rope_scaling": None,
        "norm_eps": built.norm_eps,
    }
    assert built == replace(published, **later)
    assert chosen.loop.batch_size % (chosen.loop.micro_batch_size or 1) == 0
    tokens = chosen.loop.steps * chosen.loop.batch_size * chosen.loop.context
    assert tokens == pytest.approx(RECIPES[name].tokens, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("gpt3-125m", 0.5e6, 6.0e-4),
        ("gpt3-350m", 0.5e6, 3.0e-4),
        ("gpt3-760m", 0.5e6, 2.5e-4),
        ("gpt3-1.3b", 1e6, 2.0e-4),
        ("gpt3-2.7b", 1e6, 1.6e-4),
        ("gpt3-6.7b", 2e6, 1.2e-4),
        ("gpt3-13b", 2e6, 1.0e-4),
        ("gpt3-175b", 3.2e6, 0.6e-4),
    ],
)
def test_table_2_1_of_gpt3(name: str, batch: float, rate: float) -> None:
    config = preset(name)
    tokens = config.loop.batch_size * config.loop.context
    assert tokens == pytest.approx(batch, rel=0.05)
    assert config.optim.warmup_steps * tokens == pytest.approx(375e6, rel=0.01)
    assert (config.optim.lr, config.optim.beta2, config.optim.clip, config.loop.context) == (rate, 0.95, 1.0, 2048)


def test_gpt1_has_a_byte_pair_vocabulary_of_its_own_size() -> None:
    config = preset("gpt1-117m")
    assert (config.init.tokenizer, config.init.vocab_size, config.loop.context, config.loop.batch_size) == (
        "bpe",
        40478,
        512,
        64,
    )
    assert parameters("gpt1-117m", config.init.vocab_size) == 116_534_784
