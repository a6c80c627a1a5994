from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.optim.schedule import learning_rate_factor


@given(
    steps=st.integers(1, 500),
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 50),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_stays_between_zero_and_one(
    steps: int, kind: Literal["cosine", "wsd", "constant"], warmup: int, decay: float, final: float
) -> None:
    for step in range(steps):
        factor = learning_rate_factor(
            step, steps=steps, kind=kind, warmup_steps=warmup, decay_fraction=decay, final_factor=final
        )
        assert 0 <= factor <= 1


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    for step in range(100):
        ours = learning_rate_factor(step, steps=100, kind="cosine", warmup_steps=0, decay_fraction=1, final_factor=0.1)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        reference.step()


def test_wsd_is_flat_then_linear() -> None:
    factors = [
        learning_rate_factor(s, steps=100, kind="wsd", warmup_steps=4, decay_fraction=0.2, final_factor=0.0)
        for s in range(100)
    ]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert set(factors[4:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
