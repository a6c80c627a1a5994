from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.model import loss as module
from gptsmith.model.loss import cross_entropy_sum, linear_cross_entropy_sum, token_loss_sum
from tests.factories import tiny_model


def parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(13, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 13, (3, 7))
    targets[0, :3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("most", [1, 13, 40, 10_000])
def test_in_stretches_it_is_the_same_loss_with_the_same_gradients(most: int) -> None:
    hidden, weight, targets = parts(torch.float64)
    expected = cross_entropy_sum_double(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(expected * 0.7, (hidden, weight))
    found = linear_cross_entropy_sum(hidden, weight, targets, most)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found * 0.7, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def cross_entropy_sum_double(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_under_autocast_products_are_in_its_type_and_gradients_in_the_weights() -> None:
    hidden, weight, targets = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy_sum(hidden, weight, targets, 40)
        expected = cross_entropy_sum(torch.nn.functional.linear(hidden, weight), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    found.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = parts()
    with torch.no_grad():
        found = linear_cross_entropy_sum(hidden, weight, targets, 40)
    torch.testing.assert_close(found, cross_entropy_sum(hidden @ weight.T, targets).detach())


def test_a_large_vocabulary_takes_the_way_that_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(
        "qwen3",
        vocab_size=40,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=12,
        initializer_range=0.02,
    )
    ids = torch.randint(0, 40, (2, 12))
    expected = token_loss_sum(model, ids, ids, None)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    largest = 0

    def watched(ctx: Any, hidden: Any, weight: Any, targets: Any, rows: int) -> Any:
        nonlocal largest
        largest = rows * weight.shape[0]
        return forward(ctx, hidden, weight, targets, rows)

    forward = module._LinearCrossEntropy.forward
    monkeypatch.setattr(module._LinearCrossEntropy, "forward", staticmethod(watched))
    monkeypatch.setattr(module, "MOST_LOGITS", 100)
    found = token_loss_sum(model, ids, ids, None)
    assert 0 < largest <= 100
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
