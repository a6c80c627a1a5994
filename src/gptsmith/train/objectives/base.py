"""What the trainer needs of a training task: batches, and a loss as a sum with its count.

A new task is a subclass of `Objective` with at least `next_batch`, `loss` and `example_batch`. The trainer owns
everything else: accumulation, clipping, schedules, precision, logging, saving, resuming, signals and budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from gptsmith.checkpoint import TrainState
from gptsmith.model.config import ModelConfig
from gptsmith.model.heads import SequenceClassifier
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Selection

__all__ = ["Batch", "LossHistory", "LossOutput", "Models", "Objective", "Rehearsal", "Selection", "Sum", "TrainState"]


class Batch(Protocol):
    """The rows of one update. The trainer cuts it into micro-batches and moves them to the device."""

    @property
    def num_rows(self) -> int: ...

    def slice(self, start: int, stop: int) -> Self:
        """Return rows [start, stop); `stop` may lie beyond the end."""

    def to(self, device: torch.device) -> Self: ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Sum:
    """A metric that adds up over micro-batches and steps; `total / count` is what is logged.

    Leave `total` on the device: reading it there would make the GPU wait at every micro-batch.
    """

    total: Tensor
    count: Tensor | float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch, not yet averaged: the trainer divides by the count of the whole batch."""

    loss_sum: Tensor
    """Scalar, in nats, summed over what is counted (tokens, pairs)."""
    metrics: Mapping[str, Sum] = field(default_factory=dict)
    """What else to log."""


@dataclass
class Models:
    """The models that an objective works with. Those with parameters that require gradients are trained."""

    policy: Transformer
    """The model that is trained, saved and served."""
    reference: Transformer | None = None
    value: nn.Module | None = None
    reward: nn.Module | None = None

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the models that are there, with the prefix of their parameters' names; the policy has none."""
        yield "", self.policy
        for name in ("reference", "value", "reward"):
            module = getattr(self, name)
            if module is not None:
                yield f"{name}.", module

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device


@dataclass
class LossHistory:
    """The loss over a run, for `Objective.diverged`."""

    first: float | None = None
    """Loss of the first update."""
    recent: float = float("nan")
    """Exponential average over about 20 updates."""

    def add(self, loss: float) -> None:
        if self.first is None:
            self.first = self.recent = loss
        self.recent += (loss - self.recent) / 20


@dataclass(frozen=True)
class Rehearsal:
    """Seconds that an objective takes besides updates."""

    policy: float
    """For each batch, by the policy."""
    others: float
    """For each batch, by other models."""
    evaluation: float
    """For one evaluation, by the policy."""


class Objective(Generic[B]):
    """A training task. Subclass it; the methods with a body have sensible defaults.

    `next_batch` and `loss` must be functions of the models, the random-number state and what `state` returns: then a
    run that was killed and resumed computes what it would have computed without the interruption. Where several
    processes share a run, each calls `next_batch` and `normalizer` for the whole batch, and `loss` for its own rows.
    """

    selection: Selection = Selection("val_loss", "min")
    """The evaluation metric that chooses the best checkpoint."""
    shares_evaluation: bool = False
    """Whether all processes of a run call `evaluate` and share its work; otherwise the first one does it alone."""

    evaluates_start: bool = False
    """Whether to evaluate before the first update, too: what training changes is then in the metrics."""

    fixed_shapes: bool = True
    """Whether all batches have rows of one length. Otherwise nothing is compiled: the code would depend on the lengths
    that a process has seen, and a resumed run could differ from one that never stopped."""

    has_reference_pass: bool = False
    """Whether a reference reads all data once, before the first update."""

    can_divide: bool = True
    """Whether the models can be divided among processes. Then all run each forward pass together, with equally many."""

    restores_policy: bool = False
    """Whether checkpoints hold the trained parameters of all models in the training state. Needed where `saved` is
    something else than the policy, from which it cannot be restored."""

    def saved(self, models: Models) -> Transformer | SequenceClassifier:
        """Return what a checkpoint's model is: by default the policy."""
        return models.policy

    def models(self, policy: Transformer) -> Models:
        """Return the models to work with. Called once, after the policy has its starting weights."""
        return Models(policy)

    def next_batch(self, models: Models, step: int) -> B:
        """Return the batch of update `step`, with any number of rows. It may generate with the models.

        A batch without rows, or with a count of 0, is passed over and the next one asked for. Return one without rows,
        and change no state, where it takes long and the run is asked to stop.
        """
        raise NotImplementedError

    def normalizer(self, batch: B) -> tuple[float, int]:
        """Return what the loss sum of `batch` is divided by, and how many tokens were processed (for throughput)."""
        return float(batch.num_rows), batch.num_rows

    def loss(self, models: Models, batch: B) -> LossOutput:
        """Return the loss of a micro-batch, which is on the device, as a sum."""
        raise NotImplementedError

    def diverged(self, history: LossHistory) -> str | None:
        """Return how the loss shows that training has diverged ("has risen to …"), or None. NaN is found without it."""
        if history.first is not None and history.recent > history.first + 1.0:
            return f"has risen to {history.recent:.2f}, from {history.first:.2f}"
        return None

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return metrics, `selection.metric` among them; None where there is nothing to evaluate on, or on a stop.

        rows: micro-batch size that is known to fit into memory for training.
        """
        return None

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]] | None:
        """Return what samples continue: prompts as text and as ids. None: the text of --sample-prompt."""
        return None

    def example_batch(self, rows: int) -> B:
        """Return a batch of `rows` rows of the usual length and arbitrary content, for forecasts and timing."""
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """The memory of models that it holds throughout besides those of `models`: reward models. For forecasts."""
        return 0

    def other_moments(self, model: ModelConfig) -> Mapping[str, Mapping[str, float]]:
        """Return what it does besides updates and evaluations, and the bytes that each takes beyond weights, optimizer
        state and the activations of an evaluation: cache, weights. For forecasts.

        model: the configuration of the policy, which can have fewer layers than the one of the run.
        """
        return {}

    def rehearse(self, models: Models, seconds: float) -> Rehearsal | None:
        """Return how long `next_batch` and `evaluate` take, from a rehearsal of about `seconds`; None where that is no
        more than a forward pass over the data. The policy can be a smaller one. For forecasts."""
        return None

    def state(self) -> TrainState:
        """Return what must be saved to continue: cursors, buffers, weights of a value model."""
        return TrainState({}, {})

    def load_state(self, state: TrainState) -> None:
        """Restore what `state` returned."""
