"""Presets are what their descriptions say."""

from __future__ import annotations

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.model.transformer import Transformer
from gptsmith.presets import PRESETS, describe_presets, preset
from gptsmith.train.config import TrainConfig


def parameters(name: str, vocab_size: int) -> int:
    config = preset(name)
    with torch.device("meta"):
        return Transformer(config.model.build(vocab_size, config.context)).num_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_each_builds_a_model(name: str) -> None:
    config = preset(name)
    assert parameters(name, config.vocab_size) > 0
    assert config.batch_size % (config.micro_batch_size or 1) == 0


def test_sizes() -> None:
    assert parameters("gpt2-124m", 50257) == 124_439_808  # as the published GPT-2 small
    assert parameters("char-small", 65) == pytest.approx(0.81e6, rel=0.02)
    assert parameters("bpe-small", 4096) == pytest.approx(12e6, rel=0.1)


def test_the_default_is_char_small() -> None:
    assert preset("char-small") == TrainConfig()


def test_nanogpts_recipe_for_a_cpu() -> None:
    """github.com/karpathy/nanoGPT, README: "I only have a macbook"."""
    config = preset("nanogpt-cpu")
    assert (config.context, config.batch_size, config.steps, config.dropout) == (64, 12, 2000, 0.0)
    assert (config.model.num_hidden_layers, config.model.num_attention_heads, config.model.hidden_size) == (4, 4, 128)
    assert (config.optim.name, config.optim.lr, config.optim.schedule) == ("adamw", 1e-3, "cosine")
    assert config.optim.lr * config.optim.final_factor == pytest.approx(1e-4)


def test_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="no preset 'char-smal'. Did you mean 'char-small'?"):
        preset("char-smal")


def test_each_is_described_in_a_line() -> None:
    lines = describe_presets().splitlines()
    assert len(lines) == len(PRESETS)
    assert all(line.split(maxsplit=1)[0] == name and len(line) > 40 for name, line in zip(PRESETS, lines, strict=True))
