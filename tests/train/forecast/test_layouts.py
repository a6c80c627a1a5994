"""`--parallel auto`: the simplest layout that fits into a given memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptsmith.distributed.layout import Layout
from gptsmith.model.config import ModelConfig
from gptsmith.train.budget.machine import example_objective
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast import layouts
from gptsmith.train.forecast.memory import USABLE, Forecaster
from tests.factories import tiny_run_config

pytestmark = pytest.mark.usefixtures("remembered_forecasts")

CPU = torch.device("cpu")
CONFIG = tiny_run_config(
    batch_size=8, model={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}, optim={"name": "adamw"}
)
MODEL = CONFIG.model.build(4096, CONFIG.loop.context)


@functools.cache
def needed(parts: int) -> int:
    """Return the bytes of each process where so many divide the model."""
    forecaster = Forecaster(
        CONFIG, MODEL, device=CPU, precision="fp32", activation_checkpointing=True, model_parts=parts
    )
    return forecaster.at(1).total


def between(few: int, many: int) -> int:
    """Return the bytes for each process that are not enough for few parts of the model, but for many."""
    return round((needed(few) + needed(many)) / 2 / USABLE)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    needed(1)  # what this imports is a part of the process from now on

    def choose(
        processes: int,
        local: int,
        available: int | None,
        config: RunConfig = CONFIG,
        model: ModelConfig = MODEL,
        can_divide: bool = True,
    ) -> str:
        """available: to each process."""
        objective: Any = example_objective(config, model)
        objective.can_divide = can_divide
        monkeypatch.setattr(
            layouts, "available_memory", lambda device: None if available is None else available * local
        )
        chosen = layouts.choose_layout(
            config,
            model,
            processes=processes,
            local=local,
            device=CPU,
            precision="fp32",
            objective=objective,
        )
        return str(chosen)

    return choose


def test_the_simplest_layout_that_fits(choose: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert choose(2, 2, 1 << 40) == "dp=2"
    assert choose(2, 2, None) == "dp=2"
    assert "note" not in capsys.readouterr().err
    assert choose(2, 2, between(1, 2)) == "fsdp=2"
    message = capsys.readouterr().err
    assert "--parallel fsdp=2: in one piece the model would need" in message
    assert choose(4, 2, between(1, 2)) == "dp=2,fsdp=2"
    assert choose(4, 2, between(2, 4)) == "fsdp=4"
    assert choose(4, 4, needed(4) // 2) == "fsdp=2,tp=2"  # none fits


def test_only_what_the_run_allows(choose: Callable[..., str]) -> None:
    few = between(1, 2)
    assert choose(2, 2, few, can_divide=False) == "dp=2"
    assert choose(2, 2, few, CONFIG.replace(exact=True)) == "dp=2"
    assert choose(2, 2, few, CONFIG.replace(compile="on")) == "dp=2"
    assert choose(4, 4, needed(4) // 2, CONFIG.replace(lora="on")) == "fsdp=4"
    odd = CONFIG.model.build(4095, CONFIG.loop.context)
    assert choose(4, 4, needed(4) // 2, model=odd) == "fsdp=4"  # a vocabulary that tp cannot divide


def test_candidates_are_of_all_processes() -> None:
    for processes, local in ((1, 1), (2, 2), (6, 2), (8, 4), (16, 8), (12, 8)):
        found = list(layouts.candidates(processes, local))
        assert found[0] == Layout(dp=processes)
        assert {layout.size for layout in found} == {processes}
