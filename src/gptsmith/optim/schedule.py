"""Learning-rate schedules, as a factor of the peak learning rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "constant"]


def learning_rate_factor(
    step: int, *, steps: int, kind: Schedule, warmup_steps: int, decay_fraction: float, final_factor: float
) -> float:
    """Return the factor of the peak learning rate for step `step` (0-based) of `steps`.

    All kinds rise linearly over `warmup_steps`. Then "cosine" falls along half a cosine to `final_factor` (Loshchilov &
    Hutter 2016, 1608.03983); "wsd" (warmup, stable, decay: Hu et al. 2024, 2404.06395) stays at 1 and falls linearly
    to `final_factor` over the last `decay_fraction` of the steps; "constant" stays at 1.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    decay_steps = max(1, round(decay_fraction * steps))
    left = min(1.0, max(0.0, (steps - step) / decay_steps))
    return final_factor + (1 - final_factor) * left
