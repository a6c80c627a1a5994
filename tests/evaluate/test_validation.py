"""Mean losses and perplexity against their definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptsmith.data.loader import TokenBatch
from gptsmith.errors import UsageError
from gptsmith.evaluate.text import perplexity
from gptsmith.evaluate.validation import split_loss
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model


def batch(rows: int, length: int, seed: int, ignored: int = 0) -> TokenBatch:
    """Random tokens; the first `ignored` targets of each row do not count."""
    ids = torch.randint(0, 30, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, :ignored] = -100
    return TokenBatch(ids[:, :-1], targets)


@torch.no_grad()
def losses(model: Transformer, ids: Tensor) -> Tensor:
    """The loss of each token but the first, one sequence (T,) at a time."""
    return -torch.log_softmax(model(ids[None, :-1])[0], dim=-1).gather(1, ids[1:, None])[:, 0]


def test_split_loss_is_the_mean_over_the_targets_of_all_batches() -> None:
    model = tiny_model()
    batches = [batch(3, 7, seed=1), batch(1, 20, seed=2), batch(2, 5, seed=3, ignored=2)]
    expected = []
    for ids, targets, *_ in batches:
        for row, row_targets in zip(ids, targets, strict=True):
            every = losses(model, torch.cat([row, row_targets[-1:]]))
            expected.append(every[row_targets != -100])
    assert split_loss(model, batches) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


def test_split_loss_without_targets_is_nan() -> None:
    loss = split_loss(tiny_model(), [batch(2, 4, seed=1, ignored=4)])
    assert loss is not None
    assert math.isnan(loss)


def test_split_loss_stops_when_asked() -> None:
    seen = []

    def batches() -> Iterator[TokenBatch]:
        for i in range(9):
            seen.append(i)
            yield batch(1, 4, seed=i)

    assert split_loss(tiny_model(), batches(), should_stop=lambda: len(seen) == 3) is None
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored(training: bool) -> None:
    model = tiny_model().train(training)

    def failing(*args: object) -> Tensor:
        assert not model.training
        raise RuntimeError

    with pytest.raises(RuntimeError):
        split_loss(model, [batch(1, 4, seed=0)], loss=failing)
    assert model.training == training


@pytest.mark.parametrize(("length", "window"), [(60, 512), (60, 10), (61, 10), (2, 512), (24, 24)])
def test_perplexity_is_exp_of_the_mean_loss_over_windows(length: int, window: int) -> None:
    model = tiny_model()  # its context has 24 tokens
    ids = torch.randint(0, 30, (length,), generator=torch.Generator().manual_seed(0))
    windows = [part for part in torch.split(ids, min(window, 24)) if len(part) > 1]
    expected = torch.cat([losses(model, part) for part in windows]).mean().exp()
    assert perplexity(model, ids.tolist(), window=window) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("ids", [[], [1]])
def test_perplexity_needs_two_tokens(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="fewer than two tokens"):
        perplexity(tiny_model(), ids)
