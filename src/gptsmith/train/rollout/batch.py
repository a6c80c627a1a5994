"""Sampled answers as tensors: what an update of PPO or GRPO is computed from.

Axis letters: B answers · T tokens of prompt and answer, without the last, which is only predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.data.loader import TokenBatch
from gptsmith.model.config import IGNORED
from gptsmith.model.documents import is_fake
from gptsmith.train.rollout.rollout import Rollout

Stats = Mapping[str, tuple[float, float]]
"""Metrics of a rollout as totals and counts, by name."""


@dataclass(frozen=True)
class RolloutBatch:
    """Answers to learn from, each with its prompt, padded on the right.

    ids, targets: (B, T) int64; targets are -100 but for the answer's tokens, at the position before each.
    logprobs: (B, T), of the targets when they were sampled; 0 elsewhere, as in all that follow.
    advantages: (B, T). weights: (B, T), what each token's loss counts.
    count: what the sum of the loss over the whole batch is divided by.
    fresh: whether the policy still has the weights that it sampled with.
    values, returns: (B, T), of a value model. reference: (B, T), log-probabilities of the reference model.
    text: rows of plain text that are learned besides.
    """

    ids: Tensor
    targets: Tensor
    logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    count: float = 0.0
    fresh: bool = True
    values: Tensor | None = None
    returns: Tensor | None = None
    reference: Tensor | None = None
    text: TokenBatch | None = None
    stats: Stats = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: the tokens of the answers."""
        return self.targets != IGNORED

    def tensors(self) -> dict[str, Tensor]:
        """Return what has a row for each answer, by name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch with all tensors of answers changed."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def rows(self, index: Tensor) -> Self:
        """Return the answers of these numbers, without the columns that are padding in all of them."""
        return self.map(lambda tensor: tensor[index])._trimmed()

    def slice(self, start: int, stop: int) -> Self:
        stop = min(stop, self.num_rows)
        part = self.map(lambda tensor: tensor[start:stop])
        text = None
        if self.text is not None:  # each answer has its share of them
            rows = self.text.num_rows
            text = self.text.slice(start * rows // self.num_rows, stop * rows // self.num_rows)
        return dataclasses.replace(part, text=text, stats=self.stats if start == 0 else {})._trimmed()

    def _trimmed(self) -> Self:
        if not self.num_rows or is_fake(self.ids):  # nothing, or in a forecast
            return self
        used = int((self.targets != IGNORED).any(dim=0).nonzero().max()) + 1 if bool(self.mask.any()) else 1
        return self if used == self.ids.shape[1] else self.map(lambda tensor: tensor[:, :used])

    def to(self, device: torch.device) -> Self:
        moved = self.map(lambda tensor: tensor.to(device))
        return moved if self.text is None else dataclasses.replace(moved, text=self.text.to(device))


def padded(rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Return a batch of these answers, with advantages 0, and weights and a count that average over all tokens."""
    length = max((len(each.prompt.ids) + len(each.ids) for each in rollouts), default=2) - 1
    ids = torch.zeros(len(rollouts), length, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    logprobs = torch.zeros(len(rollouts), length)
    for row, each in enumerate(rollouts):
        whole = torch.tensor([*each.prompt.ids, *each.ids])
        first, end = len(each.prompt.ids) - 1, len(whole) - 1
        ids[row, :end] = whole[:-1]
        targets[row, first:end] = whole[first + 1 :]
        logprobs[row, first:end] = torch.tensor(each.logprobs)
    mask = (targets != IGNORED).float()
    return RolloutBatch(ids, targets, logprobs, torch.zeros_like(mask), mask, float(mask.sum()))


def joined(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Return the answers of several batches as one; their metrics are added up."""
    full = [each for each in batches if each.num_rows] or [batches[0]]
    length = max(each.ids.shape[1] for each in full)

    def whole(name: str) -> Tensor:
        fill = IGNORED if name == "targets" else 0
        parts = [each.tensors()[name] for each in full]
        return torch.cat([F.pad(part, (0, length - part.shape[1]), value=fill) for part in parts])

    stats: dict[str, tuple[float, float]] = {}
    for each in batches:
        for name, (total, count) in each.stats.items():
            before = stats.get(name, (0.0, 0.0))
            stats[name] = (before[0] + total, before[1] + count)
    tensors: dict[str, Any] = {name: whole(name) for name in full[0].tensors()}
    return RolloutBatch(**tensors, stats=stats)
