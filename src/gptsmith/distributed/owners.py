"""Whole matrices of parameters that are divided or copied: each belongs to one process, which computes its update.

Newton–Schulz iteration of a part of a matrix is another function than that of the whole. So the parts of each matrix
are sent to its owner, and the parts of the result back: two exchanges for all matrices together. Owners take turns by
the work that their matrices make (as in Moonlight, 2502.16982, and nanochat).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptsmith.distributed.layout import Layout
from gptsmith.distributed.sharding import Sharding, numel, sharding_of


class Owners:
    """The owners of matrices among the processes of a run. All call both methods with the same parameters."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.rank, self.places = rank, [layout.coordinates(rank) for rank in range(layout.size)]
        self._known: dict[tuple[int, ...], list[int]] = {}

    def owners_of(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Return the owner of each: the one with the least work so far, the largest matrices first."""
        key = tuple(map(id, parameters))
        if key not in self._known:
            shapes = [sharding_of(p).shape for p in parameters]
            work = [numel(shape) * min(shape[-2:]) for shape in shapes]
            load, owners = [0] * len(self.places), [0] * len(shapes)
            for i in sorted(range(len(shapes)), key=lambda i: -work[i]):
                owners[i] = load.index(min(load))
                load[owners[i]] += work[i]
            self._known[key] = owners
        return self._known[key]

    def collect(self, parameters: Sequence[nn.Parameter], parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the whole matrices that this process owns, by their index. parts: what it has of each."""
        owners, shardings = self.owners_of(parameters), [sharding_of(p) for p in parameters]
        outgoing: list[list[Tensor]] = [[] for _ in self.places]
        for part, owner, sharding in zip(parts, owners, shardings, strict=True):
            if self._serves(self.rank, owner, sharding):
                outgoing[owner].append(part)
        mine = [i for i, owner in enumerate(owners) if owner == self.rank]
        expected = [
            [shardings[i].block_shape(place) if self._serves(rank, self.rank, shardings[i]) else None for i in mine]
            for rank, place in enumerate(self.places)
        ]
        incoming = self._exchange(outgoing, [[shape for shape in row if shape] for row in expected], parts)
        blocks: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for rank, row in enumerate(expected):
            arrived = iter(incoming[rank])
            for i, shape in zip(mine, row, strict=True):
                if shape:
                    blocks[i, tuple(self.places[rank][axis] for axis in shardings[i].axes)] = next(arrived)
        return {i: shardings[i].whole(lambda at, i=i: blocks[i, tuple(at.values())]) for i in mine}  # type: ignore[misc]

    def spread(self, parameters: Sequence[nn.Parameter], wholes: dict[int, Tensor]) -> list[Tensor]:
        """Return this process's part of each matrix. wholes: those that it owns."""
        owners, shardings = self.owners_of(parameters), [sharding_of(p) for p in parameters]
        outgoing = [[shardings[i].block(whole, place) for i, whole in wholes.items()] for place in self.places]
        here = self.places[self.rank]
        expected: list[list[tuple[int, ...]]] = [[] for _ in self.places]
        for owner, sharding in zip(owners, shardings, strict=True):
            expected[owner].append(sharding.block_shape(here))
        incoming = [iter(row) for row in self._exchange(outgoing, expected, list(parameters))]
        return [next(incoming[owner]) for owner in owners]

    def _serves(self, rank: int, owner: int, sharding: Sharding) -> bool:
        """Return whether process `rank` sends its part to `owner`: of those with the same part, one does."""
        here, there = self.places[rank], self.places[owner]
        return all(here[axis] == there[axis] for axis in here if axis not in sharding.axes)

    def _exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        expected: Sequence[Sequence[tuple[int, ...]]],
        like: Sequence[Tensor],
    ) -> list[list[Tensor]]:
        """Send tensors to each process, and return those that each sends. expected: their shapes."""
        import torch.distributed as dist

        flat = [tensor.reshape(-1) for row in outgoing for tensor in row]
        sent = torch.cat(flat) if flat else like[0].new_empty(0)
        sizes = [[numel(shape) for shape in row] for row in expected]
        received = sent.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            received, sent, [sum(row) for row in sizes], [sum(tensor.numel() for tensor in row) for row in outgoing]
        )
        found = []
        for row, shapes, part in zip(sizes, expected, torch.split(received, [sum(row) for row in sizes]), strict=True):
            found.append([piece.view(shape) for piece, shape in zip(torch.split(part, row), shapes, strict=True)])
        return found
