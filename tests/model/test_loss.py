from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.model import loss as module
from gptsmith.model.config import IGNORED
from gptsmith.model.families import FAMILIES
from gptsmith.model.loss import (
    cross_entropy_sum,
    linear_cross_entropy_sum,
    token_logprobs,
    token_loss_sum,
    training_loss_sum,
)
from gptsmith.model.moe import load_balancing_loss, router_z_loss
from gptsmith.model.quantized import quantize
from tests.factories import tiny_model


def parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(13, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 13, (3, 7))
    targets[0, :3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("most", [1, 13, 40, 10_000])
def test_chunks_do_not_change_the_loss_or_its_gradients(most: int) -> None:
    hidden, weight, targets = parts(torch.float64)
    expected = cross_entropy_sum_double(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(expected * 0.7, (hidden, weight))
    found = linear_cross_entropy_sum(hidden, weight, targets, most)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found * 0.7, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def cross_entropy_sum_double(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_autocast_computes_products_in_bfloat16_and_gradients_in_fp32() -> None:
    hidden, weight, targets = parts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy_sum(hidden, weight, targets, 40)
        expected = cross_entropy_sum(torch.nn.functional.linear(hidden, weight), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    found.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_gradients_are_computed_without_autograd() -> None:
    hidden, weight, targets = parts()
    with torch.no_grad():
        found = linear_cross_entropy_sum(hidden, weight, targets, 40)
    torch.testing.assert_close(found, cross_entropy_sum(hidden @ weight.T, targets).detach())


def test_a_large_vocabulary_never_has_all_logits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(module, "MAX_LOGITS", 100)
    found = token_loss_sum(model, ids, ids, None)
    assert 0 < largest <= 100
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- log-probabilities of tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_logits", [1, 200, 1 << 25])
def test_token_logprobs_equal_log_softmax_of_the_logits(
    family: str, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and gradients for any upstream gradient per token, however the tokens are divided into chunks."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "MAX_LOGITS", max_logits)
    model = tiny_model(family, vocab_size=40)
    ids, targets = torch.randint(0, 40, (2, 12)), torch.randint(0, 40, (2, 12))
    targets[1, 4:7] = IGNORED
    document_ids = torch.arange(12).expand(2, 12) // 5
    upstream, temperature = torch.randn(2, 12), 0.7

    logits = model(ids, document_ids=document_ids) / temperature
    expected = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0)
    found = token_logprobs(model, ids, targets, document_ids=document_ids, temperature=temperature)
    assert (found.dtype, found.shape) == (torch.float32, targets.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters, upstream) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_sum_of_the_log_probabilities() -> None:
    model, ids = tiny_model(vocab_size=40), torch.randint(0, 40, (2, 12))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    torch.testing.assert_close(-token_logprobs(model, ids, targets).sum(), token_loss_sum(model, ids, targets))


def test_log_probabilities_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOGITS", 200)
    model, ids, sizes = tiny_model(vocab_size=40), torch.randint(0, 40, (2, 12)), []
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))
    token_logprobs(model, ids, ids).sum().backward()
    assert max(sizes) <= 200
    assert sum(sizes) == 2 * 24 * 40  # computed again in the backward pass
    sizes.clear()
    with torch.no_grad():
        token_logprobs(model, ids, ids)
    assert sum(sizes) == 24 * 40


def test_log_probabilities_under_autocast() -> None:
    model, ids = tiny_model(vocab_size=40), torch.randint(0, 40, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logprobs(model, ids, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_logprobs(model, ids, ids), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("max_logits", [100, 1 << 25])
def test_loss_of_a_quantized_model(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small vocabulary, and with one that is computed in chunks."""
    model, ids = quantize(tiny_model(hidden_size=32, vocab_size=40), 8), torch.randint(0, 40, (2, 12))
    monkeypatch.setattr(module, "MAX_LOGITS", max_logits)
    with torch.no_grad():
        expected = cross_entropy_sum(model(ids), ids)
        torch.testing.assert_close(token_loss_sum(model, ids, ids), expected, rtol=1e-3, atol=0)


# -- the loss of training ----------------------------------------------------------------------------------------------


def test_training_loss_of_a_dense_model_is_the_cross_entropy() -> None:
    model, ids = tiny_model(vocab_size=40), torch.randint(0, 40, (2, 12))
    loss, metrics = training_loss_sum(model, ids, ids)
    assert torch.equal(loss, token_loss_sum(model, ids, ids))
    assert metrics == {}


def test_training_loss_of_experts_adds_the_router_losses_for_every_target() -> None:
    model = tiny_model("qwen3_moe", vocab_size=40, router_aux_loss_coef=0.1, router_z_loss_coef=0.01)
    ids, targets = torch.randint(0, 40, (2, 12)), torch.randint(0, 40, (2, 12))
    targets[0, :5] = IGNORED
    routers: list[torch.Tensor] = []
    cross_entropy = token_loss_sum(model, ids, targets, router_logits=routers)
    loss, metrics = training_loss_sum(model, ids, targets)
    balance = load_balancing_loss(routers, 2)
    expected = cross_entropy + 19 * (0.1 * balance + 0.01 * router_z_loss(routers))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["balance_loss"], balance)
    assert not metrics["balance_loss"].requires_grad
    assert metrics["expert_load_max"] >= 1 >= metrics["expert_load_min"]
