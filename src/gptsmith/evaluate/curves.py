"""k-shot curves: the score of a task against the number of solved examples in the prompt. No torch.

Axes: D draws of shots (or training seeds), K numbers of shots, N examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.errors import UsageError
from gptsmith.evaluate.scores import RESAMPLES, Floats, with_interval


@dataclass(frozen=True)
class Curve:
    """The scores of a model on a task. scores: (D, K, N). chance: the mean score of guessing, if answers are chosen."""

    model: str
    task: str
    metric: str
    chance: float | None
    shots: tuple[int, ...]
    scores: Floats

    @property
    def means(self) -> Floats:
        """(K,) the mean scores."""
        means: Floats = self.scores.mean(axis=(0, 2))
        return means

    def intervals(self) -> tuple[Floats, Floats]:
        """Return the ends of the 95% intervals of the means, (K,) each: bootstrap over draws and examples."""
        low, high = np.quantile(self._resampled(), [0.025, 0.975], axis=0)
        return low, high

    def slope(self) -> dict[str, float]:
        """Return the gain in score each time that the number of shots + 1 doubles, with its 95% interval.

        It is the slope of the straight line that fits the mean scores best, against log2(shots + 1). Raises UsageError
        for a single number of shots.
        """
        if len(self.shots) < 2:
            raise UsageError("a slope needs at least two numbers of shots.")
        x = np.log2(np.asarray(self.shots) + 1.0)
        x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        return with_interval("slope", float(self.means @ x), self._resampled() @ x)

    def _resampled(self) -> Floats:
        """Return means of scores drawn with replacement, (RESAMPLES, K): the same draws and examples for each K."""
        draws, _, examples = self.scores.shape
        rng = np.random.default_rng(0)
        chosen_draws = rng.integers(0, draws, (RESAMPLES, draws))
        chosen: NDArray[np.int64] = rng.integers(0, examples, (RESAMPLES, examples))
        return np.stack(
            [self.scores[d].mean(axis=0)[:, n].mean(axis=1) for d, n in zip(chosen_draws, chosen, strict=True)]
        )


def curves_of(record: Mapping[str, Any]) -> list[Curve]:
    """Return the curve of each task in the results of an evaluation (`Results.to_json()`).

    Without shots there is one draw, which stands for all. Tasks that were measured without shots alone have a point.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in record.get("tasks", ()):
        by_task[result["task"]].append(result)
    curves = []
    for task, results in by_task.items():
        shots = sorted({int(result["shots"]) for result in results})
        draws = {k: [r for r in results if r["shots"] == k] for k in shots}
        most = max(map(len, draws.values()))
        scores = [
            [[float(outcome["score"]) for outcome in draws[k][d % len(draws[k])]["outcomes"]] for k in shots]
            for d in range(most)
        ]
        first = results[0]
        curves.append(
            Curve(
                str(record.get("model", "")),
                task,
                str(first["metric"]),
                first["chance"],
                tuple(shots),
                np.asarray(scores, dtype=np.float64),
            )
        )
    return curves


def pooled(curves: Sequence[Curve], model: str) -> Curve:
    """Return one curve of several training runs of the same kind, whose mean scores over draws are the draws."""
    first = curves[0]
    if any((curve.task, curve.shots) != (first.task, first.shots) for curve in curves):
        raise UsageError("curves of different tasks or numbers of shots cannot be pooled.")
    scores = np.stack([curve.scores.mean(axis=0) for curve in curves])
    return Curve(model, first.task, first.metric, first.chance, first.shots, scores)
