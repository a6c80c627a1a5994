"""`gptsmith plan` through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gptsmith.train.forecast import timing as calibrate

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TIMED_SECONDS", 0.05)
    monkeypatch.setattr(calibrate, "PASS_SECONDS", 0.1)


def test_the_printed_forecast(run_cli: Cli, text_file: Path, tiny: list[str], tmp_path: Path) -> None:
    code, out, _ = run_cli("plan", text_file, *tiny, "--price-per-hour", "3.6", "--eval.tasks", "arithmetic")
    assert code == 0
    for word in ("parameters", "FLOP per token", "weights", "activations", "available", "tokens/s", "per evaluation"):
        assert word in out
    assert "largest micro-batch that fits: 4" in out
    assert "at 3.60 per hour" in out
    assert "without the tasks of --eval.tasks" in out
    assert not (tmp_path / "runs").exists()


def test_json_agrees_with_training(run_cli: Cli, text_file: Path, tiny: list[str], finished: Path) -> None:
    code, out, _ = run_cli("plan", text_file, *tiny, "--json", "--price-per-hour", "2")
    assert code == 0
    plan = json.loads(out)
    record = json.loads((finished / "run.json").read_text())
    assert plan["parameters"]["total"] == record["parameters"]
    assert plan["model"] == record["model"]
    assert plan["text"]["train_tokens"] == record["data"]["train_tokens"]
    assert plan["tokens"] == 20 * 4 * 32
    assert plan["fits"]
    assert plan["micro_batch_size"] == 4
    assert plan["cost"] == pytest.approx(2 * plan["seconds"] / 3600)
    assert sum(v for k, v in plan["memory"].items() if k not in ("total", "moment")) == plan["memory"]["total"]


@pytest.mark.slow
def test_the_largest_published_model_without_data(run_cli: Cli) -> None:
    code, out, _ = run_cli("plan", "--preset", "gpt3-175b", "--tokenizer", "bpe", "--json", "--device", "cpu")
    assert code == 0
    plan = json.loads(out)
    assert 170e9 < plan["parameters"]["total"] < 180e9
    assert plan["memory"]["weights"] == pytest.approx(4 * plan["parameters"]["total"], rel=0.001)
    assert not plan["fits"]
    assert plan["largest_micro_batch"] is None
    assert plan["times"]["scale"] > 1000
    assert plan["seconds"] > 1e9


def test_budget_and_depth_choose_as_in_training(run_cli: Cli, text_file: Path) -> None:
    code, out, err = run_cli("plan", text_file, "--depth", "2", "--compile", "off", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["model"]["num_hidden_layers"] == 2
    assert "depth 2" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--price-per-hour", "-1"], "--price-per-hour must be 0 or more"),
        (["--budget", "soon"], "not a budget"),
        (["--model.hidden-size", "33"], "not a multiple"),
        (["--tokenizer", "gpt3"], "use char, bpe, gpt2, a run, a model, or a directory"),
        (["missing.txt"], "missing.txt"),
    ],
)
def test_wrong_options(run_cli: Cli, arguments: list[str], message: str) -> None:
    code, out, err = run_cli("plan", *arguments)
    assert code in (1, 2)
    assert message in err
    assert out == ""


def test_a_cluster(run_cli: Cli) -> None:
    code, out, _ = run_cli("plan", "--preset", "gpt3-175b", "--cluster", "1024xH100")
    assert code == 0
    for word in ("--parallel fsdp", "why", "gathered", "communication", "checkpoint", "goodput", "cost", "rests on"):
        assert word in out
    arguments = ["--preset", "llama3.1-8b", "--cluster", "64xA100-80", "--price-per-hour", "2", "--json"]
    code, out, _ = run_cli("plan", *arguments)
    assert code == 0
    plan = json.loads(out)
    memory, seconds = plan["memory"], plan["seconds_per_update"]
    assert sum(v for k, v in memory.items() if k not in ("total", "available")) == pytest.approx(memory["total"])
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"])
    assert plan["cost"] == pytest.approx(2 * 64 * plan["seconds"] / 3600)
    assert plan["batch_size"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "many"], "write a number and an accelerator"),
        (["--cluster", "8xB9000"], "unknown accelerator 'B9000'"),
        (["--cluster", "12xH100"], "a multiple"),
        (["--cluster", "8xH100", "--budget", "1h"], "a --budget is for this machine"),
        (["--cluster", "8xH100", "--precision", "fp32"], "leave out --precision fp32"),
        (["--cluster", "8xH100", "--device", "cpu"], "leave out --device"),
        (["--cluster", "8xH100", "--lora", "on"], "leave out --lora"),
        (["--cluster", "8xH100", "--price-per-hour", "-1"], "--price-per-hour must be 0 or more"),
    ],
)
def test_wrong_clusters(run_cli: Cli, arguments: list[str], message: str) -> None:
    code, _, err = run_cli("plan", *arguments)
    assert code == 2
    assert message in err
