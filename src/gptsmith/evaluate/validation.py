"""Loss over a whole split: every token predicted once, in consecutive windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gptsmith.data.loader import Batch
from gptsmith.model.loss import LossFunction, token_loss_sum
from gptsmith.model.transformer import Transformer


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """A batch's arrays as tensors on `device`; to a GPU through pinned memory, without waiting."""

    def move(array: object) -> Tensor:
        tensor = torch.as_tensor(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    documents = None if batch.document_ids is None else move(batch.document_ids)
    return move(batch.ids), move(batch.targets), documents


@torch.no_grad()
def split_loss(
    model: Transformer,
    batches: Iterable[Batch],
    *,
    loss: LossFunction = token_loss_sum,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats per token over `batches`; None if `should_stop()` broke it off. Leaves the model's mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            if should_stop():
                return None
            total += float(loss(model, *to_device(batch, device)))
            count += int((batch.targets != -100).sum())
    finally:
        model.train(was_training)
    return total / count if count else math.nan
