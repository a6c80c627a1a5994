"""Dropout with sixteen random bits per element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptsmith.model.dropout import dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.999])
def test_zeroes_a_share_p_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1001), p, training=True)
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation + 2**-17)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))
    assert len(y.unique()) == 2


def test_elements_are_independent_of_their_neighbors() -> None:
    """Four of them come from one 64-bit number."""
    torch.manual_seed(0)
    zeroed = (dropout(torch.ones(1_000_000), 0.5, training=True) == 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8):
        together = (zeroed[distance:] * zeroed[:-distance]).mean().item()
        assert abs(together) < 5 * 0.25 / 1000


def test_gradients_have_the_same_mask() -> None:
    x = torch.randn(7, 9, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad * x, y)


def test_depends_on_the_seed_and_only_in_training() -> None:
    x = torch.ones(100)

    def drawn() -> Tensor:
        torch.manual_seed(3)
        return dropout(x, 0.5, training=True)

    assert torch.equal(drawn(), drawn())
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_nan_is_dropped_too() -> None:
    y = dropout(torch.full((1000,), torch.nan), 0.5, training=True)
    assert (y == 0).any()
    assert y.isnan().any()


@pytest.mark.slow
def test_compiled_code_draws_the_same_numbers() -> None:
    x = torch.randn(64, 33, requires_grad=True)

    def drawn(function: object) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        y = function(x, 0.25, True)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y, gradient

    for eager, compiled in zip(drawn(dropout), drawn(torch.compile(dropout)), strict=True):
        assert torch.equal(eager, compiled)
