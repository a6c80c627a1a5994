"""Pretraining: predict every next token of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.data.loader import TokenBatch, TokenLoader, whole_split_batches
from gptsmith.data.shards import Dataset
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.errors import CheckpointError, DataError
from gptsmith.evaluate.validation import split_loss
from gptsmith.model.loss import training_loss_sum
from gptsmith.runtime import out_of_memory
from gptsmith.train.objectives.base import LossOutput, Models, Objective, Sum

EVAL_TOKENS_AT_ONCE = 8192
LARGEST_EXAMPLE_ID = 1 << 15  # of example batches: forecasts time models whose vocabulary is cut to so many tokens


def evaluation_rows(micro_batch_size: int, seq_len: int) -> int:
    """Return the sequences per forward pass of an evaluation: many, within the memory that training takes."""
    return max(1, min(4 * micro_batch_size, EVAL_TOKENS_AT_ONCE // seq_len))


class NextToken(Objective[TokenBatch]):
    """The loss of next-token prediction, whatever the batches come from.

    seq_len: tokens per row. mask_documents: tokens attend only within their own document.
    """

    def __init__(self, *, seq_len: int, vocab_size: int, mask_documents: bool = False) -> None:
        self.seq_len, self.vocab_size, self.mask_documents = seq_len, vocab_size, mask_documents

    def normalizer(self, batch: TokenBatch) -> tuple[float, int]:
        return float(batch.num_targets), batch.num_targets

    def loss(self, models: Models, batch: TokenBatch) -> LossOutput:
        loss, metrics = training_loss_sum(models.policy, *batch)
        return LossOutput(loss, {name: Sum(value) for name, value in metrics.items()})

    def example_batch(self, rows: int) -> TokenBatch:
        ids = torch.randint(min(self.vocab_size, LARGEST_EXAMPLE_ID), (rows, self.seq_len))
        documents = torch.zeros_like(ids, dtype=torch.int32) if self.mask_documents else None
        return TokenBatch(ids, ids, documents)


class Pretrain(NextToken):
    """Next-token prediction over a prepared dataset."""

    shares_evaluation = True

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        vocab_size: int,
        mask_documents: bool = False,
        eval_tokens: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: DistributedContext = ALONE,
    ) -> None:
        super().__init__(seq_len=seq_len, vocab_size=vocab_size, mask_documents=mask_documents)
        self.dataset, self.eval_tokens, self.should_stop, self.ranks = dataset, eval_tokens, should_stop, ranks
        self.loader = TokenLoader(
            dataset.train, batch_size=batch_size, seq_len=seq_len, seed=seed, mask_documents=mask_documents
        )
        if self.has_validation:
            next(self._validation_batches(1))  # a split that is too short is reported now, not after an hour

    @property
    def has_validation(self) -> bool:
        return len(self.dataset.val) > 0

    def next_batch(self, models: Models, step: int) -> TokenBatch:
        return next(self.loader)

    def _validation_batches(self, size: int) -> Iterator[TokenBatch]:
        """Return this process's batches: every one whose number is its rank, modulo the number of processes."""
        rank, world_size = self.ranks.data_rank, self.ranks.data_size
        batches = whole_split_batches(
            self.dataset.val,
            batch_size=size,
            seq_len=self.seq_len,
            mask_documents=self.mask_documents,
            rank=rank,
            world_size=world_size,
        )
        if self.eval_tokens is None:
            return iter(batches)
        all_ranks = max(1, self.eval_tokens // (size * self.seq_len))
        return islice(batches, len(range(rank, all_ranks, world_size)))

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return `val_loss`: mean nats per token over the validation split."""
        if not self.has_validation:
            return None
        size = evaluation_rows(rows, self.seq_len)
        while True:
            try:
                value = split_loss(
                    models.policy, self._validation_batches(size), should_stop=self.should_stop, ranks=self.ranks
                )
                return None if value is None else {"val_loss": value}
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
            size //= 2

    def state(self) -> TrainState:
        return TrainState(self.loader.state_dict(), {})

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values)


class BatchStream(NextToken):
    """Next-token prediction over batches from any iterable; there is no validation.

    batches: `TokenBatch`es, or pairs (ids, targets) of (B, T) integer arrays or tensors. To resume, give an
        iterable that yields the same batches from its beginning: those already taken are skipped.
    """

    def __init__(self, batches: Iterable[Any], *, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len=seq_len, vocab_size=vocab_size)
        self._batches, self.taken = iter(batches), 0

    def next_batch(self, models: Models, step: int) -> TokenBatch:
        for batch in self._batches:
            self.taken += 1
            if isinstance(batch, TokenBatch):
                return batch
            ids, targets = map(_as_ids, batch)
            return TokenBatch(ids, targets)
        raise DataError(f"the iterable of batches ended after {self.taken}. Give one for every step, or fewer --steps.")

    def state(self) -> TrainState:
        return TrainState({"taken": self.taken}, {})

    def load_state(self, state: TrainState) -> None:
        skipped = sum(1 for _ in islice(self._batches, state.values["taken"] - self.taken))
        self.taken += skipped
        if self.taken != state.values["taken"]:
            raise CheckpointError(
                f"the batches end after {self.taken}, before the checkpoint's {state.values['taken']}. To resume, give "
                "an iterable that yields the same batches from its beginning."
            )


def _as_ids(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)
