"""`--activation-checkpointing`: the same bits for less memory, and with `auto` only where a run would not fit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.errors import UsageError
from gptsmith.train.forecast import memory
from gptsmith.train.forecast.memory import Forecaster, fit_into_memory
from tests.factories import tiny_run_config

pytestmark = pytest.mark.usefixtures("remembered_forecasts")

CPU = torch.device("cpu")
CONFIG = tiny_run_config(
    model={"hidden_size": 64, "num_hidden_layers": 6}, context=64, batch_size=8, steps=4, eval_every=2
)
MODEL = CONFIG.model.build(50, 64)


@functools.cache
def needed(recompute: bool, rows: int) -> int:
    forecaster = Forecaster(CONFIG, MODEL, device=CPU, precision="fp32", process=0, activation_checkpointing=recompute)
    return forecaster.at(rows).total


def limit(monkeypatch: pytest.MonkeyPatch, needed: float) -> None:
    monkeypatch.setattr(memory, "process_memory", lambda: 0)
    monkeypatch.setattr(memory, "available_memory", lambda device: int(needed / memory.USABLE) + 1)


def test_the_forecast_knows_it() -> None:
    assert needed(True, 8) < 0.9 * needed(False, 8)  # what remains is the evaluation


@pytest.mark.parametrize("option", ["auto", "on", "off"])
def test_auto_recomputes_only_where_nothing_else_helps(
    option: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.replace(activation_checkpointing=option)
    options: Any = {"device": CPU, "precision": "fp32"}
    limit(monkeypatch, needed(False, 4))  # micro-batches of 4 fit
    fitted = fit_into_memory(config, MODEL, **options)
    assert fitted == ((8 if needed(True, 8) <= needed(False, 4) else 4, True) if option == "on" else (4, False))
    capsys.readouterr()
    limit(monkeypatch, (needed(False, 1) + needed(True, 1)) / 2)  # not even 1, but recomputed it does
    if option == "off":
        with pytest.raises(UsageError, match="--activation-checkpointing on"):
            fit_into_memory(config, MODEL, **options)
        return
    assert fit_into_memory(config, MODEL, **options).activation_checkpointing is True
    assert ("recomputing activations" in capsys.readouterr().err) == (option == "auto")
    limit(monkeypatch, needed(True, 1) / 2)
    with pytest.raises(UsageError, match="does not fit into memory"):
        fit_into_memory(config, MODEL, **options)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_run_ends_in_the_same_bits(family: str, text_file: Path, tmp_path: Path) -> None:
    model = {
        "family": family,
        "num_hidden_layers": 2,
        **({"num_experts": 4, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}),
    }
    config = CONFIG.replace(dropout=0.1, model=model)
    runs = [
        gptsmith.fit(text_file, config, activation_checkpointing=option, out=tmp_path / option)
        for option in ("on", "off")
    ]
    assert [run.info["activation_checkpointing"] for run in runs] == [True, False]
    first, second = ((run.directory / "last" / "model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_plan_shows_it(run_cli: Any, text_file: Path) -> None:
    options = ("--activation-checkpointing", "on", "--compile", "off", "--device", "cpu", "--steps", "10")
    code, out, err = run_cli("plan", text_file, "--json", *options)
    assert code == 0, err
    assert json.loads(out)["activation_checkpointing"] is True
