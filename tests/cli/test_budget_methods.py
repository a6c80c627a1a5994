"""Budgets of the methods that start from a model: tokens and seconds are spent, and no more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith.run_directory import read_run
from tests.factories import tiny_run_config

LETTERS = "abcdefghijklmnopqrstuvwxyz .?ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
METHODS = ("sft", "classify", "reward", "dpo", "ppo", "grpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    (place / "text.txt").write_text((LETTERS + "Where is the cat? The cat is here.\n") * 60)
    return gptsmith.fit(place / "text.txt", tiny_run_config(steps=2, context=128), out=place / "run").directory


def options_of(method: str, base: Path, place: Path) -> list[Any]:
    """Write the data of a method; return its command but for --out and the budget."""
    questions = [f"Where is the cat {one}{other}?" for one in "abcdefgh" for other in "abcdefgh"]
    rows: dict[str, Any] = {
        "sft": ({"prompt": question, "completion": "The cat is here."} for question in questions),
        "classify": (
            {"text": f"{question} {'good' if at % 2 else 'bad'}", "label": "yes" if at % 2 else "no"}
            for at, question in enumerate(questions)
        ),
        "reward": ({"prompt": question, "chosen": "The cat is here.", "rejected": "cat"} for question in questions),
        "ppo": ({"prompt": question} for question in questions),
    }
    rows["dpo"], rows["grpo"] = rows["reward"], rows["ppo"]
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[method]))
    command = [method, base, data, "--batch-size", 8, "--compile", "off", "--device", "cpu", "--sample-tokens", 0]
    if method in ("ppo", "grpo"):
        (place / "scores.py").write_text(
            "def vowels(prompts, completions, **_):\n"
            "    return [sum(letter in 'aeiou' for letter in text) for text in completions]\n"
        )
        command += ["--reward", f"{place / 'scores.py'}:vowels", "--answer-tokens", 8, "--no-check-rewards"]
    return command


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_tokens_is_spent(method: str, base: Path, tmp_path: Path, run_cli: Any) -> None:
    out = tmp_path / "run"
    code, _, err = run_cli(*options_of(method, base, tmp_path), "--budget", "6ktok", "--out", out)
    assert code == 0, err
    run = read_run(out)
    assert run.status == "finished"
    spent = [row["tokens"] for row in run.metrics if "tokens" in row][-1]
    assert 1000 < spent < 9000


@pytest.mark.slow
@pytest.mark.report
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_time_is_met(method: str, base: Path, tmp_path: Path, run_cli: Any) -> None:
    out, began = tmp_path / "run", time.monotonic()
    code, _, err = run_cli(*options_of(method, base, tmp_path), "--budget", "20s", "--out", out)
    assert code == 0, err
    assert read_run(out).status == "finished"
    assert time.monotonic() - began < 24
