"""Forecasts of fine-tuning and distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from tests.factories import tiny_run_config

LETTERS = "abcdefghijklmnopqrstuvwxyz .?ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    (place / "text.txt").write_text((LETTERS + "Where is the cat? The cat is here.\n") * 60)
    return gptsmith.fit(place / "text.txt", tiny_run_config(steps=2, context=128), out=place / "run").directory


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    row = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "The cat is here."}]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": row}) + "\n") * 24)
    return path


def forecast(run_cli: Any, *arguments: Any) -> dict[str, Any]:
    code, out, err = run_cli("plan", *arguments, "--json", "--compile", "off", "--device", "cpu")
    assert code == 0, err
    return dict(json.loads(out))


def test_adapters_and_teachers_count(base: Path, chats: Path, run_cli: Any) -> None:
    full = forecast(run_cli, "sft", base, chats, "--lora", "off", "--optim.name", "adamw")
    adapter = forecast(run_cli, "sft", base, chats, "--lora.rank", 2)
    assert adapter["memory"]["optimizer"] < full["memory"]["optimizer"] / 2
    assert full["text"]["val_tokens"] > 0
    assert full["seconds"] > 0

    taught = forecast(run_cli, "distill", base, chats, "--teacher", base, "--optim.name", "adamw")
    assert taught["memory"]["weights"] > 1.8 * full["memory"]["weights"]


def test_a_budget_is_planned_as_the_command_does(base: Path, chats: Path, run_cli: Any) -> None:
    code, out, err = run_cli(
        "plan", "sft", base, chats, "--budget", "20ktok", "--compile", "off", "--price-per-hour", 2
    )
    assert code == 0, err
    assert "trains all weights, chosen for a model that muon pretrained" in err
    assert "steps of" in err
    assert "cost" in out


def test_mistakes_are_explained(base: Path, chats: Path, run_cli: Any) -> None:
    for arguments, message in (
        (("sft",), "No model and no data given. Use: gptsmith plan sft MODEL DATA"),
        (("distill", base, chats), "No teacher given"),
        (("sft", base, chats, "--budget", "nonsense"), "nonsense"),
        (("sft", base, chats, "--price-per-hour", -1), "--price-per-hour"),
        (("sft", "--resume", base), "--resume"),
    ):
        code, _, err = run_cli("plan", *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
