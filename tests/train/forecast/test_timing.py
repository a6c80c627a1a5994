"""Times are measured where that takes seconds, and scaled where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptsmith.model.families import FAMILIES, SIZES
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.train.config import OptimConfig, RunConfig
from gptsmith.train.forecast import timing as calibrate
from gptsmith.train.forecast.timing import Times, measure
from tests.factories import tiny_run_config

CPU = torch.device("cpu")
CONFIG = tiny_run_config()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TIMED_SECONDS", 0.05)
    monkeypatch.setattr(calibrate, "PASS_SECONDS", 0.1)


def measured(config: RunConfig, **options: Any) -> Times:
    return measure(config, config.model.build(50, config.loop.context), CPU, "fp32", **options)


def test_a_small_run_is_timed_itself() -> None:
    times = measured(CONFIG, val_tokens=1000)
    assert times.scale == 1
    assert times.compile == 0
    assert 0 < times.sampled_token < times.update < 10
    assert times.evaluation > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_random_numbers_are_left_alone(optimizer: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured(CONFIG.replace(dropout=0.1, optim=OptimConfig(name=optimizer)))
    assert torch.equal(torch.rand(3), expected)


def test_accumulation_takes_its_time_and_evaluation_grows_with_the_split() -> None:
    config = CONFIG.replace(batch_size=64, micro_batch_size=8)
    for _ in range(4):  # what else the machine does can make any one of them slow
        few, many = measured(config.replace(batch_size=8)), measured(config, val_tokens=32000)
        little = measured(config, val_tokens=320)
        if many.update > 3 * few.update and many.evaluation > 5 * little.evaluation:
            break
    else:
        raise AssertionError((few, many, little))


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-13b", "mixtral-8x7b"])
def test_what_is_timed_of_a_large_model_is_of_its_kind_and_small_enough(name: str) -> None:
    family, options = SIZES[name]
    whole = FAMILIES[family](**options)
    rate = 1e11
    tried, rows = calibrate._affordable(whole, 8, 1024, rate, CPU)
    assert rows >= 1
    seconds = rows * 1024 * flops_per_token(tried, 1024) / rate
    assert seconds < 60 * calibrate.PASS_SECONDS  # one sequence of the narrowest may take longer than it should
    assert 24 * count_parameters(tried).total <= 2 << 30
    assert tried.num_hidden_layers % max(1, len(whole.window_pattern)) == 0
    for name_ in ("norm", "position", "mlp", "qk_norm", "head_dim", "window_pattern", "num_experts"):
        assert getattr(tried, name_) == getattr(whole, name_)


def test_the_optimizers_share_grows_with_what_it_works_on() -> None:
    whole = FAMILIES["qwen3"](num_hidden_layers=8, hidden_size=512, num_attention_heads=8)
    tried = replace(whole, num_hidden_layers=2)
    assert calibrate._step_scale(whole, tried, "muon") == 4
    ratio = count_parameters(whole).total / count_parameters(tried).total
    assert calibrate._step_scale(whole, tried, "adamw") == ratio


def test_the_sum_of_the_parts() -> None:
    times = Times(update=1.0, evaluation=10.0, save=100.0, sampled_token=0.5, compile=7.0, scale=1.0)
    config = CONFIG.replace(steps=25, eval_every=10, sample_tokens=4)
    # Evaluations and checkpoints at 10, 20 and 25, previews after the first two.
    assert times.training(config) == 7 + 25 + 3 * 10 + 3 * 100 + 2 * 4 * 0.5
    assert times.training(config.replace(save_every=5)) == 7 + 25 + 3 * 10 + 5 * 100 + 2 * 4 * 0.5
    assert times.training(config.replace(steps=20)) == 7 + 20 + 2 * 10 + 2 * 100 + 1 * 4 * 0.5
    assert times.command(config) > times.training(config) + 6 * 4 * 0.5
