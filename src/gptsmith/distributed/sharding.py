"""Which part of a parameter each process has, and the whole of it from the parts.

A parameter is divided along at most two axes: first by tensor or expert parallelism, then by FSDP what is left. Rows of
a fused matrix (q, k, v; gate, up) are divided part by part, so that a process has heads and units of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Coordinates = Mapping[str, int]  # along the axes of the mesh


@dataclass(frozen=True)
class Split:
    """A tensor cut into `size` chunks along `dim`, one for each process along `axis`.

    parts: the lengths of what is fused along `dim`; each is cut on its own.
    """

    axis: str
    dim: int
    size: int
    parts: tuple[int, ...] | None = None

    def chunks(self, whole: Tensor) -> list[Tensor]:
        """Return the chunks; as `torch.chunk` makes them, but always `size`, the last ones empty if need be."""
        if self.parts is not None:
            pieces = [part.chunk(self.size, self.dim) for part in torch.split(whole, list(self.parts), self.dim)]
            return [torch.cat([piece[i] for piece in pieces], self.dim) for i in range(self.size)]
        lengths = self.lengths(whole.shape[self.dim])
        return list(torch.split(whole, lengths, self.dim))

    def lengths(self, total: int) -> list[int]:
        """Return the length of each chunk of `total`."""
        step = -(-total // self.size)
        return [max(0, min(step, total - i * step)) for i in range(self.size)]

    def joined(self, chunks: Sequence[Tensor]) -> Tensor:
        """Return the whole of all chunks."""
        if self.parts is None:
            return torch.cat(list(chunks), self.dim)
        lengths = [part // self.size for part in self.parts]
        pieces = [torch.split(chunk, lengths, self.dim) for chunk in chunks]
        return torch.cat([piece[i] for i in range(len(lengths)) for piece in pieces], self.dim)


@dataclass(frozen=True)
class Sharding:
    """How a parameter of `shape` is divided; splits: in the order in which they are applied."""

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes along which processes have different parts."""
        return tuple(split.axis for split in self.splits)

    def block(self, whole: Tensor, at: Coordinates) -> Tensor:
        """Return the part of the process at some coordinates."""
        for split in self.splits:
            whole = split.chunks(whole)[at[split.axis]]
        return whole

    def block_shape(self, at: Coordinates) -> tuple[int, ...]:
        shape = list(self.shape)
        for split in self.splits:
            shape[split.dim] = split.lengths(shape[split.dim])[at[split.axis]]
        return tuple(shape)

    def positions(self) -> Iterator[dict[str, int]]:
        """Yield the coordinates of all parts, along the axes that divide it."""
        for numbers in itertools.product(*(range(split.size) for split in self.splits)):
            yield dict(zip(self.axes, numbers, strict=True))

    def whole(self, block_at: Callable[[dict[str, int]], Tensor]) -> Tensor:
        """Return the whole. block_at: gives the part at some coordinates."""
        return self._joined(block_at, 0, {})

    def _joined(self, block_at: Callable[[dict[str, int]], Tensor], depth: int, at: dict[str, int]) -> Tensor:
        if depth == len(self.splits):
            return block_at(at)
        split = self.splits[depth]
        return split.joined([self._joined(block_at, depth + 1, {**at, split.axis: i}) for i in range(split.size)])


def local(p: nn.Parameter) -> nn.Parameter:
    """Return the part of a parameter that this process has and updates: itself, in a model that is not divided."""
    found: nn.Parameter = getattr(p, "local_part", p)
    return found


def sharding_of(p: nn.Parameter | Tensor) -> Sharding:
    """Return how a parameter, or its local part, is divided."""
    found: Any = getattr(p, "sharding", None)
    return found if found is not None else Sharding(tuple(p.shape))


def set_sharding(p: nn.Parameter, sharding: Sharding, part: Tensor) -> None:
    """Record how `p` is divided. part: what this process has, which shares its storage."""
    values: Any = p
    if sharding.splits:
        values.local_part = nn.Parameter(part, requires_grad=p.requires_grad)
        values.local_part.sharding = sharding
    values.sharding = sharding


def numel(shape: Sequence[int]) -> int:
    return math.prod(shape)
