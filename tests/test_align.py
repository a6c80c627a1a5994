"""`gptsmith align demo`: what it refuses, and the whole pipeline within its budget (slow)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import gptsmith
from gptsmith.align import LEAST, QUESTIONS, align_demo
from gptsmith.errors import UsageError


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
def test_from_text_to_an_aligned_model_within_the_budget(tmp_path: Path) -> None:
    began = time.monotonic()
    out = align_demo(tmp_path / "align", budget=f"{1.5 * LEAST:.0f}s")
    assert time.monotonic() - began < 1.05 * 1.5 * LEAST
    page = (out / "report.html").read_text()
    assert all(question in page for question in QUESTIONS)
    assert {run.directory.name: run.status for run in gptsmith.runs(out)} == dict.fromkeys(
        ("base", "chat", "reward", "aligned"), "finished"
    )
