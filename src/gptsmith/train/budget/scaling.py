"""Loss against compute: a power law through a ladder of runs, and what it predicts (Kaplan et al. 2020, 2001.08361)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptsmith.errors import UsageError


@dataclass(frozen=True)
class PowerLaw:
    """loss(C) = floor + scale · C^-exponent, C in FLOP, loss in nats per token (Hoffmann et al. 2022, 2203.15556)."""

    floor: float
    scale: float
    exponent: float
    error: float
    """Root mean square of the residuals, nats per token."""

    def __call__(self, flops: float) -> float:
        return self.floor + self.scale * math.exp(-self.exponent * math.log(flops))


def fit(flops: Sequence[float], losses: Sequence[float], floor: float = 0.0) -> PowerLaw:
    """The law with that floor, by least squares in log(loss - floor) over log(flops).

    Raises UsageError for fewer than two different amounts of compute, or losses at or below the floor.
    """
    if len(set(flops)) < 2:
        raise UsageError("a law of scaling needs runs of at least two different sizes.")
    if min(losses) <= floor:
        raise UsageError(f"a loss of {min(losses):.4f} is not above the floor of {floor:.4f}.")
    slope, intercept = np.polyfit(np.log(flops), np.log(np.subtract(losses, floor)), 1)
    law = PowerLaw(floor, float(np.exp(intercept)), float(-slope), 0.0)
    residuals = [law(c) - loss for c, loss in zip(flops, losses, strict=True)]
    return PowerLaw(law.floor, law.scale, law.exponent, math.sqrt(sum(r * r for r in residuals) / len(residuals)))


def fit_with_floor(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The law with the floor that fits best, of 200 between 0 and nine tenths of the lowest loss.

    Four points and three unknowns: take it for the optimist's or the pessimist's end of a range, not for a measurement.
    """
    candidates = [fit(flops, losses, floor) for floor in np.linspace(0, 0.9 * min(losses), 200)]
    return min(candidates, key=lambda law: law.error)
