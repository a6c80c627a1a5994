"""Mean loss over a split of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

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
    values: list[float] = []
    total, count, stopped = 0.0, 0, False
    failed: Exception | None = None
    try:
        for batch, counts in _together(batches, ranks):
            if stopped := ranks.any(should_stop()) if ranks.layout.divides_model else should_stop():
                break
            value = float(loss(model, *batch.to(device)))
            if counts:
                total += value
                values.append(value)
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
    if ranks.exact:  # correctly rounded, so in any order
        everyone = ranks.gather((values, count))
        total, targets = math.fsum(x for each, _ in everyone for x in each), float(sum(n for _, n in everyone))
    else:
        sums = torch.tensor([total, count], dtype=torch.float64)
        ranks.sum(sums)
        total, targets = sums.tolist()
    return total / targets if targets else math.nan


def _together(batches: Iterable[TokenBatch], ranks: DistributedContext) -> Iterator[tuple[TokenBatch, bool]]:
    """Yield the batches, and whether they count. Where processes run each forward pass together, all get equally many:
    those without another take part with one that does not count."""
    if not ranks.layout.divides_model:
        yield from ((batch, True) for batch in batches)
        return
    iterator, stand_in = iter(batches), None
    while True:
        batch = next(iterator, None)
        if not ranks.any(batch is not None):
            return
        if stand_in is None:  # of the first process: where another has one, it has one, too
            stand_in = ranks.broadcast(batch)
        assert stand_in is not None
        yield (stand_in, False) if batch is None else (batch, True)
