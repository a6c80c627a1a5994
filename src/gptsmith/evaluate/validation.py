"""Mean loss over a split of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.model.loss import LossFunction, token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import out_of_memory


@torch.no_grad()
def split_loss(
    model: Transformer,
    batches: Iterable[TokenBatch],
    *,
    loss: LossFunction = token_loss_sum,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: DistributedContext = ALONE,
) -> float | None:
    """Return the mean loss over all targets in `batches`, in nats per token; NaN if there are none.

    loss: returns the sum over one batch. should_stop: called before each batch; the result is None once it is true.
    ranks: the processes that evaluate, each its own batches; all get the same result, or run out of memory together.
    The model is in eval mode meanwhile, and its mode is restored.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, stopped = 0.0, 0, False
    failed: Exception | None = None
    try:
        for batch in batches:
            if stopped := should_stop():
                break
            total += float(loss(model, *batch.to(device)))
            count += batch.num_targets
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = error
    finally:
        model.train(was_training)
    if ranks.any(failed is not None):
        raise failed or torch.OutOfMemoryError("memory ran out in another process")
    if ranks.any(stopped):
        return None
    sums = torch.tensor([total, count], dtype=torch.float64)
    ranks.sum(sums)
    total, count = sums.tolist()
    return total / count if count else math.nan
