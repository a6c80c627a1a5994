"""Forecasts of fine-tuning, distillation, alignment and task heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.train.forecast import timing
from tests.factories import tiny_run_config

LETTERS = "abcdefghijklmnopqrstuvwxyz .?ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIMED_SECONDS", 0.05)


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


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "preferences.jsonl"
    rows = ({"prompt": f"Where is the cat {i}?", "chosen": "The cat is here.", "rejected": "cat"} for i in "abcdefgh")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Where is the cat {i}?\n" for i in "abcdefghijklmnop"))
    return path


FULL = ("--lora", "off", "--optim.name", "adamw", "--batch-size", 4)


def test_the_models_of_alignment_count(
    base: Path, preferences: Path, prompts: Path, tmp_path: Path, run_cli: Any
) -> None:
    """The policy alone; with a reference; with a reference and a value model that is trained, too."""
    (tmp_path / "rewards.py").write_text("def never(prompts, completions, **columns):\n    raise RuntimeError\n")
    rewards = ("--reward", f"{tmp_path / 'rewards.py'}:never", "--answer-tokens", 16)  # a forecast does not call it
    alone = forecast(run_cli, "grpo", base, prompts, *rewards, *FULL, "--group-size", 4)
    compared = forecast(run_cli, "grpo", base, prompts, *rewards, *FULL, "--group-size", 4, "--kl", 0.1)
    ppo = forecast(run_cli, "ppo", base, prompts, *rewards, *FULL)
    weights, optimizer = (
        [each["memory"][part] for each in (alone, compared, ppo)] for part in ("weights", "optimizer")
    )
    assert weights[1] == pytest.approx(2 * weights[0], rel=0.02)
    assert weights[2] == pytest.approx(3 * weights[0], rel=0.05)
    assert optimizer[1] == optimizer[0]
    assert optimizer[2] == pytest.approx(2 * optimizer[0], rel=0.05)
    assert 0 < alone["times"]["rollout"] < alone["times"]["update"]

    plain = forecast(run_cli, "dpo", base, preferences, *FULL)
    assert plain["times"]["reference"] > 0
    assert plain["times"]["rollout"] == 0
    assert forecast(run_cli, "dpo", base, preferences, *FULL, "--loss", "simpo")["times"]["reference"] == 0


def test_a_reward_model_counts(base: Path, preferences: Path, prompts: Path, tmp_path: Path, run_cli: Any) -> None:
    options = (*FULL, "--steps", 1, "--context", 64, "--device", "cpu", "--compile", "off")
    code, _, err = run_cli("reward", base, preferences, *options, "--out", tmp_path / "judge")
    assert code == 0, err
    (tmp_path / "rewards.py").write_text("def length(prompts, completions, **columns):\n    return [0.0]\n")
    common = ("grpo", base, prompts, *FULL, "--group-size", 4, "--answer-tokens", 16, "--reward")
    function = forecast(run_cli, *common, f"{tmp_path / 'rewards.py'}:length")
    model = forecast(run_cli, *common, tmp_path / "judge")
    assert model["memory"]["weights"] == pytest.approx(2 * function["memory"]["weights"], rel=0.05)


def test_task_heads_are_planned(base: Path, tmp_path: Path, run_cli: Any) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": "cat " * i, "label": "ab"[i % 2]}) + "\n" for i in range(1, 25)))
    found = forecast(run_cli, "classify", base, path, "--batch-size", 4)
    assert found["fits"]
    assert found["seconds"] > 0
    code, _, err = run_cli("plan", "classify", base, "--predict", path)
    assert code == 2
    assert "--predict" in err


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
        (
            ("ppo", "no model", chats),
            "No reward given. Use: gptsmith plan ppo MODEL PROMPTS --reward",
        ),  # before loading
        (("grpo", base), "Use: gptsmith plan grpo MODEL DATA"),
        (("sft", base, chats, "--budget", "nonsense"), "nonsense"),
        (("sft", base, chats, "--price-per-hour", -1), "--price-per-hour"),
        (("sft", "--resume", base), "--resume"),
    ):
        code, _, err = run_cli("plan", *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err
