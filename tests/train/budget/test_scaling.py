from __future__ import annotations

import numpy as np
import pytest

from gptsmith.errors import UsageError
from gptsmith.train.budget.scaling import fit, fit_with_floor

FLOPS = [1e12, 2e12, 4e12, 8e12]


def test_finds_the_law_that_made_the_points() -> None:
    law = fit(FLOPS, [30 * c**-0.1 for c in FLOPS])
    assert (law.floor, law.scale, law.exponent) == pytest.approx((0, 30, 0.1))
    assert law.error == pytest.approx(0, abs=1e-9)
    assert law(1e14) == pytest.approx(30 * 1e14**-0.1)


def test_finds_the_floor_too() -> None:
    law = fit_with_floor(FLOPS, [1.2 + 5000 * c**-0.3 for c in FLOPS])
    assert law.floor == pytest.approx(1.2, abs=0.02)
    assert law.exponent == pytest.approx(0.3, abs=0.02)


def test_a_floor_never_predicts_less_than_the_straight_line_does_far_out() -> None:
    rng = np.random.default_rng(0)
    losses = [1.3 + 500 * c**-0.2 + rng.normal(0, 0.002) for c in FLOPS]
    assert fit_with_floor(FLOPS, losses)(1e16) >= fit(FLOPS, losses)(1e16) - 0.02


def test_one_point_makes_no_line() -> None:
    with pytest.raises(UsageError, match="two different sizes"):
        fit([1e12, 1e12], [2.0, 2.1])
    with pytest.raises(UsageError, match="floor"):
        fit(FLOPS, [2.0, 1.9, 1.8, 1.7], floor=1.75)
