"""`gptsmith align demo`: what it refuses, and the whole pipeline within its budget (slow)."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptsmith
from gptsmith.align import LEAST, QUESTIONS, align_demo
from gptsmith.errors import BudgetError, UsageError


@pytest.mark.parametrize(
    ("budget", "message"), [("1e15flop", "give a time"), ("1m", "too short for four models"), ("soon", "not a budget")]
)
def test_budgets_that_are_refused(budget: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        align_demo(tmp_path / "out", budget=budget)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty directory"):
        align_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.report
def test_from_text_to_an_aligned_model_within_the_budget(tmp_path: Path) -> None:
    began = time.monotonic()
    out = align_demo(tmp_path / "align", budget=f"{1.5 * LEAST:.0f}s")
    assert time.monotonic() - began < 1.05 * 1.5 * LEAST
    page = (out / "report.html").read_text()
    assert all(question in page for question in QUESTIONS)
    assert {run.directory.name: run.status for run in gptsmith.runs(out)} == dict.fromkeys(
        ("base", "chat", "reward", "aligned"), "finished"
    )


def test_a_busy_machine_makes_fewer_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage without the time for what is sensible makes what there is time for, and one at least."""
    made: list[tuple[str, dict[str, Any]]] = []

    def stage(name: str, steps: int) -> Any:
        def train(*arguments: Any, **options: Any) -> SimpleNamespace:
            if "steps" not in options:
                raise BudgetError("too short", steps=steps)
            made.append((name, options))
            return SimpleNamespace(directory=tmp_path)

        return train

    for name, steps in (("pretrain", 7), ("sft", 0), ("reward", 3), ("ppo", 0)):
        monkeypatch.setattr(f"gptsmith.align.{name}", stage(name, steps))
    monkeypatch.setattr("gptsmith.align.write_data", lambda folder, seed, characters: folder)
    monkeypatch.setattr("gptsmith.align.write_comparison", lambda *arguments: None)
    align_demo(tmp_path / "out", budget=f"{LEAST:.0f}s")
    assert [(name, options["steps"], "budget" in options) for name, options in made] == [
        ("pretrain", 3, False),
        ("sft", 1, False),
        ("reward", 1, False),
        ("ppo", 1, False),
    ]
    assert "makes few updates: 3" in capsys.readouterr().err
