"""Runs passes: token ids and block tables in, logits out. All that the engine knows of the model is here.

Axis letters: N new tokens of all sequences · R rows of logits · C hidden · V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.engine.scheduler import Scheduled
from gptsmith.model.cache import Chunk, PagedBatch, PagedCache
from gptsmith.model.lora import Adapter, applied
from gptsmith.model.transformer import Transformer


@dataclass(frozen=True)
class Rows:
    """A scheduled sequence's logits, of the last tokens it computed: (R, V) float32; none while its prompt is not read
    to the end, unless the prompt's are wanted too. finite: whether all are."""

    scheduled: Scheduled
    logits: Tensor
    finite: bool


class Runner:
    """vocab_size: logits are of the ids below it; a model's vocabulary is often padded beyond its tokenizer's."""

    def __init__(self, model: Transformer, cache: PagedCache, vocab_size: int) -> None:
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.context = model.config.max_position_embeddings

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> list[Rows]:
        """Compute these tokens' keys and values, and the logits that are wanted."""
        ids: list[int] = []
        chunks: list[Chunk] = []
        rows: list[int] = []
        wanted: list[int] = []
        adapted: dict[int, tuple[Adapter, list[int]]] = {}
        for each in batch:
            s = each.sequence
            begin = s.start + s.computed
            new = [*s.tokens[begin : begin + each.count], *s.drafts][: each.count]
            ids += new
            chunks.append(Chunk(s.computed, each.count, s.tables))
            if s.request.reads_prompt:
                count = each.count
            else:
                count = 1 + len(s.drafts) if each.count == s.remaining + len(s.drafts) else 0
            wanted.append(count)
            rows += range(len(ids) - count, len(ids))
            adapter = s.request.adapter
            if adapter is not None:
                adapted.setdefault(id(adapter), (adapter, []))[1].extend(range(len(ids) - each.count, len(ids)))
        if adapted:
            with applied(self.model, list(adapted.values())):
                logits = Runner._logits(self, ids, chunks, rows)
        else:
            logits = self._logits(ids, chunks, rows)
        finite = torch.split(logits.sum(dim=-1).isfinite(), wanted)  # a sum of what is not finite is not
        parts = zip(batch, torch.split(logits, wanted), finite, strict=True)
        return [Rows(each, part, bool(sound.all())) for each, part, sound in parts]

    def _logits(self, ids: list[int], chunks: list[Chunk], rows: list[int]) -> Tensor:
        """Logits (R, V) float32 after those of the ids that `rows` tells."""
        device = self.cache.keys[0].device
        paged = PagedBatch(self.cache, chunks, self.context)
        with self._evaluating():
            hidden = self.model.hidden_states(torch.tensor([ids], device=device), cache=paged)[0]
            if len(rows) < len(ids):
                hidden = hidden[torch.tensor(rows, dtype=torch.int64, device=device)]
            logits: Tensor = self.model.lm_head(hidden).float()[:, : self.vocab_size]
        return logits

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            yield
        finally:
            if was_training:
                self.model.train()
