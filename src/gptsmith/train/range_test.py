"""The learning-rate range test: one short run whose rate rises until the loss explodes.

Smith 2015 (1506.01186), section 3.3, with the exponential rise that became usual after it.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gptsmith.data.shards import Dataset
from gptsmith.errors import DivergedError, UsageError
from gptsmith.run_directory import Run
from gptsmith.runtime import choose_precision
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import RunConfig
from gptsmith.train.init import Init, make_model
from gptsmith.train.objectives.registry import ObjectiveContext, pretrain
from gptsmith.train.session import Session

SMOOTH = 2.5  # updates: standard deviation of the weights that losses are averaged with
EXPLODED = 0.5  # nats above the best so far


@dataclass(frozen=True)
class RangeTest:
    """Losses of the updates, by the factor that all configured learning rates were multiplied with."""

    factors: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def smoothed(self) -> NDArray[np.float64]:
        """Each loss averaged with its neighbors on both sides, which does not shift slopes to higher rates."""
        at = np.arange(len(self.losses))
        weights = np.exp(-0.5 * ((at[:, None] - at) / SMOOTH) ** 2)
        averaged: NDArray[np.float64] = weights @ self.losses / weights.sum(axis=1)
        return averaged

    @property
    def lowest(self) -> int:
        """The update with the lowest smoothed loss."""
        return int(np.argmin(self.smoothed))

    @property
    def steepest(self) -> float:
        """The factor at which the smoothed loss falls fastest per decade of the rate, before its minimum."""
        fall = np.gradient(self.smoothed, np.log(self.factors))[: self.lowest + 1]
        return float(self.factors[int(np.argmin(fall))])

    @property
    def tenth_of_lowest(self) -> float:
        """A tenth of the factor at the lowest smoothed loss: a safer rule for long runs."""
        return float(self.factors[self.lowest]) / 10

    @property
    def is_conclusive(self) -> bool:
        """Whether the loss fell by clearly more than its noise."""
        noise = float(np.std(self.losses - self.smoothed))
        return float(self.smoothed[0] - self.smoothed[self.lowest]) > 3 * noise


def range_test(
    config: RunConfig,
    tokenizer: Tokenizer,
    dataset: Dataset,
    device: torch.device,
    *,
    init: Init | None = None,
    updates: int = 100,
    lowest: float = 1e-5,
    highest: float = 1e2,
    on_update: Callable[[float], object] = lambda loss: None,
) -> RangeTest:
    """Train for `updates`, all learning rates times a factor that rises from `lowest` to `highest`.

    init: the model to start from. Ends early where the loss explodes; leaves nothing on the disk.
    Raises UsageError for fewer than 10 updates or an empty range.
    """
    if updates < 10 or not 0 < lowest < highest < math.inf:
        raise UsageError("a range test needs at least 10 updates, and --lowest above 0 and below --highest.")
    config = config.replace(steps=updates, compile="off", sample_tokens=0, budget=None, depth=None)
    factors = np.geomspace(lowest, highest, updates)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        run = Run(Path(directory), {"precision": choose_precision(config.loop.precision, device)})
        model_config = init.config if init else config.model.build(tokenizer.vocab_size, config.loop.context)
        trainer = Session(
            run,
            config,
            tokenizer,
            model_config,
            functools.partial(make_model, model_config, config, None, init),
            pretrain(ObjectiveContext(config, tokenizer, dataset)),
            device,
        ).trainer
        best = math.inf
        for factor in factors:
            try:
                trainer.update(float(factor))
            except DivergedError:
                break
            loss = float(trainer.pending[-1][0])
            losses.append(loss)
            on_update(loss)
            recent = sum(losses[-5:]) / len(losses[-5:])
            best = min(best, recent)
            if not math.isfinite(loss) or recent > best + EXPLODED:
                break
    kept = [loss for loss in losses if math.isfinite(loss)]
    if len(kept) < 10:
        raise UsageError("the loss exploded at once: start from lower learning rates (--lowest).")
    return RangeTest(factors[: len(kept)], np.array(kept))
