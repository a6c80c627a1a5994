"""Mean loss over a split of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.model.loss import LossFunction, token_loss_sum
from gptsmith.model.transformer import Transformer


@torch.no_grad()
def split_loss(
    model: Transformer,
    batches: Iterable[TokenBatch],
    *,
    loss: LossFunction = token_loss_sum,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the mean loss over all targets in `batches`, in nats per token; NaN if there are none.

    loss: returns the sum over one batch. should_stop: called before each batch; the result is None once it is true.
    The model is in eval mode meanwhile, and its mode is restored.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            if should_stop():
                return None
            total += float(loss(model, *batch.to(device)))
            count += batch.num_targets
    finally:
        model.train(was_training)
    return total / count if count else math.nan
