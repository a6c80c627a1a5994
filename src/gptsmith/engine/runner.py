"""Runs the model: token ids and block tables in, logits out. Only this module and its subclasses know the model.

Axis letters: N new tokens of all sequences · R rows of logits · C hidden · V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptsmith.engine.image_features import ImageFeatures, place
from gptsmith.engine.prompt import overlapping
from gptsmith.engine.scheduler import Scheduled
from gptsmith.model.cache import Chunk, PagedBatch, PagedCache
from gptsmith.model.lora import Adapter, applied
from gptsmith.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows of the logits (N, V) of a step: those from `start` up to `stop`.

    Numbers, not a tensor for each sequence: with small models, slicing and joining tensors takes longer than the model.
    """

    logits: Tensor
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def tensor(self) -> Tensor:
        """Return the rows: (R, V)."""
        return self.logits[self.start : self.stop]

    def first(self) -> LogitRows:
        """Return the first row."""
        return LogitRows(self.logits, self.start, self.start + 1)

    def last(self, count: int) -> LogitRows:
        """Return the last `count` rows."""
        return LogitRows(self.logits, self.stop - count, self.stop)


def joined(parts: Items[LogitRows]) -> Tensor:
    """Return all rows of all parts, in order: (R, V)."""
    logits = parts[0].logits
    if len(parts) == 1:
        return parts[0].tensor()
    if any(part.logits is not logits for part in parts):
        return torch.cat([part.tensor() for part in parts])
    rows = [row for part in parts for row in range(part.start, part.stop)]
    if rows == list(range(len(logits))):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


@dataclass(frozen=True, slots=True)
class SequenceLogits:
    """The logits of a scheduled sequence: R rows, float32, after each of the last R tokens that were computed.

    R is 0 while the prompt is not computed to its end, unless the prompt's log-probabilities are asked for.
    finite: whether all logits are.
    """

    scheduled: Scheduled
    logits: LogitRows
    finite: bool


@dataclass(slots=True)
class StepInputs:
    """What the model computes in a step. Positions are those of a token among all N tokens of the step.

    ids: of the tokens, sequence after sequence; chunks: of which sequence and cache they are, one for each. rows: the
    positions after which logits are needed. features: what stands in place of token embeddings from a position on.
    adapted: adapters, each with the positions of its tokens.
    """

    ids: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    features: list[tuple[int, Tensor]] = field(default_factory=list)
    adapted: Items[tuple[Adapter, list[int]]] = ()


class Runner:
    """Runs the model's own forward. vocab_size: logits are of the ids below it, without a padded vocabulary's rest."""

    def __init__(self, model: Transformer, cache: PagedCache, vocab_size: int) -> None:
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.context = model.config.max_position_embeddings
        self.features = ImageFeatures(model)

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> list[SequenceLogits]:
        """Compute the keys and values of the scheduled tokens, and the logits that are needed."""
        inputs = StepInputs()
        ids, rows = inputs.ids, inputs.rows
        num_rows: list[int] = []
        adapted: dict[int, tuple[Adapter, list[int]]] = {}
        for each in batch:
            s = each.sequence
            first = s.start + s.computed
            if s.request.images:
                inputs.features += self._features_of(each, len(ids))
            if each.count == 1:
                ids.append(s.tokens[first])
            else:
                ids += [*s.tokens[first : first + each.count], *s.drafts][: each.count]
            inputs.chunks.append(Chunk(s.computed, each.count, s.tables))
            if s.request.reads_prompt:
                count = each.count
            else:
                drafts = len(s.drafts)
                count = 1 + drafts if each.count == s.remaining + drafts else 0
            num_rows.append(count)
            if count == 1:
                rows.append(len(ids) - 1)
            else:
                rows += range(len(ids) - count, len(ids))
            adapter = s.request.adapter
            if adapter is not None:
                adapted.setdefault(id(adapter), (adapter, []))[1].extend(range(len(ids) - each.count, len(ids)))
        inputs.adapted = list(adapted.values())
        logits = self._logits(inputs)
        finite: list[bool] = logits.sum(dim=-1).isfinite().tolist()  # a sum is finite only if all its terms are
        all_finite, outputs, start = all(finite), [], 0
        for each, count in zip(batch, num_rows, strict=True):
            stop = start + count
            are_finite = all_finite or all(finite[start:stop])
            outputs.append(SequenceLogits(each, LogitRows(logits, start, stop), are_finite))
            start = stop
        return outputs

    def _features_of(self, scheduled: Scheduled, row: int) -> list[tuple[int, Tensor]]:
        """Return the features of the pictures' tokens that a sequence computes, each with the row of the first.

        row: of the sequence's first token in the step.
        """
        s, found = scheduled.sequence, []
        first = s.start + s.computed
        for image, start, stop in overlapping(s.request.images, first, first + scheduled.count):
            with self._evaluating():
                features = self.features.of(image, s.request.adapter, s.salt)
            found.append((row + start - first, features[start - image.start : stop - image.start]))
        return found

    def _logits(self, inputs: StepInputs) -> Tensor:
        """Return the logits (R, V) float32 after the tokens at the positions `inputs.rows`."""
        device = self.cache.keys[0].device
        paged = PagedBatch(self.cache, inputs.chunks, self.context)
        tokens = torch.tensor([inputs.ids], device=device)
        adapters = applied(self.model, inputs.adapted) if inputs.adapted else contextlib.nullcontext()
        with self._evaluating(), adapters:
            if inputs.features:
                embeddings = place(self.model.embed(tokens)[0], inputs.features)[None]  # (1, N, C)
                hidden = self.model.hidden_states(inputs_embeds=embeddings, cache=paged)[0]  # (N, C)
            else:
                hidden = self.model.hidden_states(tokens, cache=paged)[0]  # (N, C)
            if len(inputs.rows) < len(inputs.ids):
                hidden = hidden[torch.tensor(inputs.rows, dtype=torch.int64, device=device)]  # (R, C)
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
