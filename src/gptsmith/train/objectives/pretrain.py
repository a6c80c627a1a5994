"""Pretraining: predict every next token of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gptsmith.data.loader import TokenBatch, TokenLoader, whole_split_batches
from gptsmith.data.shards import Dataset
from gptsmith.evaluate.validation import split_loss
from gptsmith.model.loss import LossFunction, token_loss_sum
from gptsmith.model.moe import expert_load, load_balancing_loss, router_z_loss
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import out_of_memory
from gptsmith.train.objectives.base import LossSum

EVAL_TOKENS_AT_ONCE = 8192


def evaluation_rows(micro_batch_size: int, seq_len: int) -> int:
    """Sequences of an evaluation's forward pass: many, but no more than take about as much memory as training does."""
    return max(1, min(4 * micro_batch_size, EVAL_TOKENS_AT_ONCE // seq_len))


class Pretrain:
    """The pretraining objective over a prepared dataset."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        device: torch.device,
        mask_documents: bool = False,
        eval_tokens: int | None = None,
        loss: LossFunction = token_loss_sum,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.dataset, self.seq_len, self.device = dataset, seq_len, device
        self.mask_documents, self.eval_tokens = mask_documents, eval_tokens
        self.token_loss, self.should_stop = loss, should_stop
        self.loader = TokenLoader(
            dataset.train, batch_size=batch_size, seq_len=seq_len, seed=seed, mask_documents=mask_documents
        )
        if self.has_validation:
            next(self._validation_batches(1))  # a split that is too short is told now, not after an hour

    @property
    def has_validation(self) -> bool:
        return len(self.dataset.val) > 0

    def next_batch(self) -> TokenBatch:
        return next(self.loader)

    def slice(self, batch: TokenBatch, start: int, stop: int) -> TokenBatch:
        return batch.slice(start, stop)

    def weight(self, batch: TokenBatch) -> float:
        return float(batch.num_targets)

    def loss(self, model: Transformer, batch: TokenBatch) -> LossSum:
        weight, inputs = self.weight(batch), batch.to(self.device)
        if not model.config.num_experts:
            return LossSum(self.token_loss(model, *inputs), weight)
        return self._loss_with_experts(model, *inputs, weight)

    def _loss_with_experts(
        self, model: Transformer, ids: Tensor, targets: Tensor, document_ids: Tensor | None, weight: float
    ) -> LossSum:
        """Cross-entropy plus what keeps routers balanced and their logits small; the spread of the load is logged."""
        config, routers = model.config, list[Tensor]()
        loss = token_loss_sum(model, ids, targets, document_ids, routers)
        load = expert_load(routers, config.num_experts_per_tok)
        balance = load_balancing_loss(routers, config.num_experts_per_tok, load)
        extra = config.router_aux_loss_coef * balance
        if config.router_z_loss_coef:
            extra = extra + config.router_z_loss_coef * router_z_loss(routers)
        metrics = {
            "balance_loss": float(balance.detach()),
            "expert_load_max": float(load.max()) * config.num_experts,  # 1: as much as every other
            "expert_load_min": float(load.min()) * config.num_experts,
        }
        return LossSum(loss + weight * extra, weight, metrics)

    def _validation_batches(self, size: int) -> Iterator[TokenBatch]:
        batches = whole_split_batches(
            self.dataset.val, batch_size=size, seq_len=self.seq_len, mask_documents=self.mask_documents
        )
        if self.eval_tokens is None:
            return iter(batches)
        return islice(batches, max(1, self.eval_tokens // (size * self.seq_len)))

    def evaluate(self, model: Transformer, micro_batch_size: int) -> dict[str, float] | None:
        """`val_loss`: mean nats per token over the validation split."""
        if not self.has_validation:
            return None
        size = evaluation_rows(micro_batch_size, self.seq_len)
        while True:
            try:
                value = split_loss(model, self._validation_batches(size), should_stop=self.should_stop)
                return None if value is None else {"val_loss": value}
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
            size //= 2

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
