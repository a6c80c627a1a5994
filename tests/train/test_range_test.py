"""The range test's arithmetic on curves whose answer is known, and one real test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.train.config import ModelOptions, OptimConfig, run_config
from gptsmith.train.range_test import RangeTest, range_test
from gptsmith.train.text import read_text
from tests.factories import tiny_run_config


def known(noise: float = 0.0) -> RangeTest:
    """A loss that falls along a logistic curve, steepest at a factor of 0.01, and rises again after 1."""
    factors = np.geomspace(1e-5, 10, 120)
    x = np.log10(factors)
    losses = 4 - 2 / (1 + np.exp(-4 * (x + 2))) + np.where(x > 0, 3 * x**2, 0)
    return RangeTest(factors, losses + noise * np.random.default_rng(0).standard_normal(120))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_steepest_descent_and_minimum_are_found(noise: float) -> None:
    found = known(noise)
    assert np.log10(found.steepest) == pytest.approx(-2, abs=0.25)
    assert np.log10(found.tenth_of_lowest) == pytest.approx(-1, abs=0.35)
    assert found.is_conclusive


def test_smoothing_does_not_move_the_curve() -> None:
    factors = np.geomspace(1e-3, 1, 60)
    line = np.linspace(4, 1, 60)
    assert RangeTest(factors, line).smoothed[10:-10] == pytest.approx(line[10:-10], abs=1e-4)


def test_noise_says_nothing() -> None:
    losses = 4 + 0.1 * np.random.default_rng(0).standard_normal(60)
    assert not RangeTest(np.geomspace(1e-5, 1, 60), losses).is_conclusive


def test_a_real_one_ends_where_the_loss_explodes(text_file: Path) -> None:
    config = tiny_run_config(
        model=ModelOptions(num_hidden_layers=1, hidden_size=32, num_attention_heads=2),
        optim=OptimConfig(name="adamw", lr=0.01),
    )
    tokenizer, dataset = read_text(str(text_file), config)
    seen: list[float] = []
    found = range_test(
        config, tokenizer, dataset, torch.device("cpu"), updates=60, lowest=1e-3, highest=1e4, on_update=seen.append
    )
    assert 10 <= len(found.losses) < 60
    assert seen[: len(found.losses)] == found.losses.tolist()
    assert found.losses[0] == pytest.approx(3.0, abs=0.6)  # ln 20, before anything is learned
    assert found.smoothed[found.lowest] < found.losses[0] - 0.2
    assert 1e-3 < found.steepest < 10


@pytest.mark.parametrize("options", [{"updates": 5}, {"lowest": 1.0, "highest": 0.1}, {"lowest": 0.0}])
def test_impossible_ranges_are_refused(options: dict[str, float], text_file: Path) -> None:
    config = run_config(device="cpu")
    tokenizer, dataset = read_text(str(text_file), config)
    with pytest.raises(UsageError, match="at least 10 updates"):
        range_test(config, tokenizer, dataset, torch.device("cpu"), **options)  # type: ignore[arg-type]
