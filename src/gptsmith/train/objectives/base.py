"""What a trainer needs of a task: batches, and a loss as a sum with its weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from gptsmith.model.transformer import Transformer


@dataclass(frozen=True)
class LossSum:
    """A loss not yet averaged: the trainer divides by the weights of all micro-batches together."""

    sum: Tensor
    """Scalar, natural-log units, summed over what it is about (tokens, pairs)."""
    weight: float
    """How many of those there are."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else to log, averaged over the steps of a log line."""


class Objective(Protocol):
    """A training task. `pretrain` is one; each further way of training is one more small file."""

    def next_batch(self) -> Any:
        """The batch of one update, `batch_size` rows. Its number of targets is `weight(batch)`."""

    def slice(self, batch: Any, start: int, stop: int) -> Any:
        """Rows [start, stop) of a batch: a micro-batch."""

    def weight(self, batch: Any) -> float: ...

    def loss(self, model: Transformer, batch: Any) -> LossSum: ...

    def evaluate(self, model: Transformer, micro_batch_size: int) -> dict[str, float] | None:
        """Metrics with `val_loss`, or None where there is nothing to evaluate on or evaluation was broken off."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
