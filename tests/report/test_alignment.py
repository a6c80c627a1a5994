"""The report of runs that learn from rewards."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptsmith.report import write_report
from gptsmith.report.curves import alignment_figure, frontier_figure
from gptsmith.run_directory import read_run
from tests.report.test_page import EVIL, Page, make_run

GOLD = {"metric": "val_gold", "mode": "max"}


def rows(steps: int = 40) -> list[dict[str, Any]]:
    """Return metrics of a run whose gold reward rises until step 20, and falls while the reward goes on rising."""
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            found.append(
                {"step": step, "time": step, "loss": -0.01, "lr": 1e-5, "grad_norm": 1.0, "tokens": step * 100}
                | {"tokens_per_second": 100.0, "reward": step / 10, "reward_std": 1.0, "kl": step / 5, "entropy": 3.0}
                | {"length": 30 + step, "ended": 0.9, "dead_groups": 0.25, "clipped": 0.01, "gap": 1e-6}
                | {"reward/brevity": -step / 10, "reward/<sentiment>": step / 5}
            )
        if step % 10 == 0:
            found.append(
                {"step": step, "time": step, "val_reward": step / 10 - 0.1, "val_kl": step / 4}
                | {"val_gold": (1 - (step - 20) ** 2 / 400) if step else 0.0, "val_length": 40.0}
            )
    return found


def samples() -> list[dict[str, Any]]:
    return [
        {"step": step, "temperature": 0.2, "prompt": prompt, "text": f"{prompt} at {step} {EVIL}", "final": step == 40}
        for step in (0, 10, 20, 30, 40)
        for prompt in (("one", "two") if step in (0, 40) else ("one",))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_run(
        tmp_path_factory.mktemp("runs") / "ppo", metrics=rows(), samples=samples(), selection=GOLD, schema=2, config={}
    )
    evaluations = [
        {"step": step, "reward": [1.0], "gold": [1.0], "alarm": f"gold fell {EVIL}" if step == 30 else None}
        for step in (10, 20, 30, 30, 40)
    ]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    return directory


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def test_the_section_shows_rewards_instead_of_a_loss(page: Page) -> None:
    ids = [attributes["id"] for attributes in page.all("section")]
    assert ids[:3] == ["results", "reward", "samples"]
    text = page.text("reward")
    assert "The best checkpoint is that with the highest val_gold: 1 at step 20." in text
    for title in ("Divergence from the start", "Entropy", "Length", "Answers that ended", "Dead groups", "brevity"):
        assert title in text, title
    alts = [attributes["aria-label"] or "" for attributes in page.all("svg")]
    assert any("training from 0.1 to 4, at most 4; held-out prompts from -0.1 to 3.9" in alt for alt in alts)
    assert any("Dead groups by step: training from 0.25 to 0.25" in alt for alt in alts)
    assert EVIL not in page.source
    assert "<sentiment>" not in page.source
    assert not re.search(r'(?:src|href)="(?!#|data:)', page.source)


def test_results_name_the_best_gold_checkpoint_and_the_alarm(page: Page) -> None:
    text = page.text("results")
    assert "Best val_gold1.0000at step 20" in text
    assert "Reward4of the last answers in training; 0.1 at first" in text
    assert "Divergence10KL from the start, nats per answer" in text
    assert "Alarm at step 30: gold fell" in text
    assert text.count("Alarm at step") == 1
    assert "training loss" not in text.lower()
    assert "val_gold 1.0000 at best" in page.text("")


def test_samples_of_one_prompt_are_shown_over_time(page: Page) -> None:
    text = page.text("reward")
    places = [text.index(f"one at {step}") for step in (0, 10, 20, 30, 40)]
    assert places == sorted(places)
    assert "two at" not in text


def test_evaluations_are_a_table(page: Page) -> None:
    assert "steptimerewardkl" in page.text("reward").replace(" ", "")
    assert page.text("reward").count("10 s") == 1


def test_a_run_without_gold_or_evaluations(tmp_path: Path) -> None:
    training = [row for row in rows() if "reward" in row]
    young = Page(write_report(make_run(tmp_path / "young", metrics=training[:1], samples=[], selection=GOLD)))
    assert "Gold" not in young.text("reward")
    assert "One prompt over training" not in young.text("reward")
    assert "not evaluated yet" in young.text("")
    broken = [{**row, "reward": math.nan, "kl": None, "entropy": "high"} for row in training]
    write_report(make_run(tmp_path / "broken", metrics=broken, samples=[], selection=GOLD))


def test_alarms_are_read_from_both_places_and_once(run: Path, tmp_path: Path) -> None:
    assert [alarm["step"] for alarm in read_run(run).alarms] == [30]
    other = make_run(tmp_path / "other", alarms=[{"step": 5, "message": "x"}, {"step": 6}, "no alarm"])
    assert read_run(other).alarms == [{"step": 5, "message": "x"}]
    assert read_run(make_run(tmp_path / "none", alarms=None)).alarms == []


def test_figures_name_both_axes_and_mark_what_matters() -> None:
    metrics = rows()
    best = next(row for row in metrics if row.get("val_gold") == 1.0)
    (axes,) = alignment_figure(metrics, [("val_gold", "gold")], "gold reward", alarms=[30], best=best).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "gold reward")
    curve, alarm, ring = axes.get_lines()
    assert np.asarray(curve.get_xdata()).tolist() == [0, 10, 20, 30, 40]
    assert np.asarray(alarm.get_xdata()).tolist() == [30, 30]
    assert (np.asarray(ring.get_xdata()).tolist(), np.asarray(ring.get_ydata()).tolist()) == ([20], [1.0])
    (axes,) = frontier_figure(metrics).axes
    reward, gold = axes.get_lines()
    assert np.asarray(reward.get_xdata()).tolist() == [math.sqrt(step / 4) for step in (0, 10, 20, 30, 40)]
    assert np.asarray(gold.get_ydata()).max() == 1.0
    assert "√KL" in axes.get_xlabel()
    assert axes.get_ylabel() == "reward"
