"""k-shot curves: means, intervals that cover the truth, slopes, and what cannot be pooled."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gptsmith.errors import UsageError
from gptsmith.evaluate.curves import Curve, curves_of, pooled
from gptsmith.evaluate.harness import Outcome, Results, TaskResult
from gptsmith.evaluate.scores import Floats

SHOTS = (0, 1, 3, 7)


def curve(scores: Floats, shots: tuple[int, ...] = SHOTS, task: str = "t") -> Curve:
    return Curve("m", task, "accuracy", None, shots, scores)


def results(scores: dict[tuple[int, int], list[float]]) -> dict[str, Any]:
    """Return results as `gptsmith eval --json` writes them. scores: by shots and seed, of each example."""
    tasks = tuple(
        TaskResult("t", tuple(Outcome(i, "", "", s) for i, s in enumerate(values)), shots, seed, "accuracy", 0.5)
        for (shots, seed), values in scores.items()
    )
    return json.loads(json.dumps(Results(tasks, {"model": "m"}).to_json()))


def test_one_draw_without_shots_stands_for_all() -> None:
    (found,) = curves_of(results({(4, 0): [1, 0, 1], (4, 1): [1, 1, 1], (0, 0): [0, 0, 1]}))
    assert found.shots == (0, 4)
    assert found.scores.tolist() == [[[0, 0, 1], [1, 0, 1]], [[0, 0, 1], [1, 1, 1]]]
    assert found.means == pytest.approx([1 / 3, 5 / 6])
    assert (found.model, found.task, found.metric, found.chance) == ("m", "t", "accuracy", 0.5)


def test_slope_is_the_gain_of_a_doubling() -> None:
    rising = np.array([0.1, 0.3, 0.5, 0.7])  # log2(shots + 1) is 0, 1, 2, 3
    found = curve(np.broadcast_to(rising[:, None], (2, 4, 5))).slope()
    assert found["slope"] == pytest.approx(0.2)
    assert found["slope_low"] == pytest.approx(0.2)
    assert found["slope_high"] == pytest.approx(0.2)


def test_slope_is_that_of_least_squares() -> None:
    scores = np.random.default_rng(0).random((3, 4, 20))
    found = curve(scores)
    x = np.log2(np.array(SHOTS) + 1)
    assert found.slope()["slope"] == pytest.approx(np.polyfit(x, found.means, 1)[0])


def test_intervals_cover_the_mean_in_about_95_percent_of_samples() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        scores = (rng.random((1, 2, 80)) < 0.3).astype(float)
        low, high = curve(scores, (0, 1)).intervals()
        covered += int(low[0] <= 0.3 <= high[0])
    assert 88 <= covered <= 100


def test_draws_that_differ_widen_the_interval() -> None:
    same = np.full((4, 1, 50), 0.5)
    different = same + np.array([-0.4, -0.1, 0.1, 0.4])[:, None, None]
    assert np.ptp(curve(same, (2,)).intervals()) == 0
    low, high = curve(different, (2,)).intervals()
    assert high[0] - low[0] > 0.3


def test_runs_are_pooled_as_draws() -> None:
    one, two = (curve(np.full((3, 4, 6), value)) for value in (0.2, 0.6))
    found = pooled([one, two], "both")
    assert found.scores.shape == (2, 4, 6)
    assert found.means == pytest.approx([0.4] * 4)
    with pytest.raises(UsageError, match="cannot be pooled"):
        pooled([one, curve(np.zeros((1, 4, 6)), task="other")], "both")


def test_a_slope_needs_two_numbers_of_shots() -> None:
    with pytest.raises(UsageError, match="at least two numbers of shots"):
        curve(np.zeros((1, 1, 3)), (4,)).slope()


def test_results_without_tasks_have_no_curves() -> None:
    assert curves_of({"model": "m"}) == []
