"""Scaling laws: a power law of loss against compute through a ladder of runs (Kaplan et al. 2020, 2001.08361)."""

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
    """Fit the law with that floor, by least squares of log(loss - floor) over log(flops).

    Raises UsageError for fewer than two different amounts of compute, or losses at or below the floor.
    """
    if len(set(flops)) < 2:
        raise UsageError("a scaling law needs runs of at least two different sizes.")
    if min(losses) <= floor:
        raise UsageError(f"a loss of {min(losses):.4f} is not above the floor of {floor:.4f}.")
    slope, intercept = np.polyfit(np.log(flops), np.log(np.subtract(losses, floor)), 1)
    law = PowerLaw(floor, float(np.exp(intercept)), float(-slope), 0.0)
    residuals = [law(c) - loss for c, loss in zip(flops, losses, strict=True)]
    return PowerLaw(law.floor, law.scale, law.exponent, math.sqrt(sum(r * r for r in residuals) / len(residuals)))


def fit_with_floor(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit the law with the best of 200 floors between 0 and nine tenths of the lowest loss.

    With four points and three unknowns it is one end of a range of predictions, not a measurement.
    """
    candidates = [fit(flops, losses, floor) for floor in np.linspace(0, 0.9 * min(losses), 200)]
    return min(candidates, key=lambda law: law.error)
