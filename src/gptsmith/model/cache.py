"""The keys and values of the tokens seen so far. An argument of `forward`, never hidden in the model.

`KVCache` is one piece of memory: the same number of tokens for each sequence of a batch. `PagedCache` is memory cut
into blocks that sequences of any length share (Kwon et al. 2023, 2309.06180); a `PagedBatch` is what one forward pass
over some of them reads and writes. The transformer asks both the same three questions (`Cache`).

Axis letters: L layers · B sequences · N new tokens of all sequences · T new tokens of each · S all tokens attended to ·
H heads · K key/value heads · D head_dim · Z tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.model.attention import attend
from gptsmith.model.config import ModelConfig


class Cache(Protocol):
    """What a forward pass needs of a cache."""

    def positions(self, T: int) -> slice | Tensor:
        """Where the T new tokens stand in their sequences. Raises IndexError beyond the context or the room."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Store the new k and v: (B, K, T, D); attention of q: (B, H, T, D) over them and the past: (B, H, T, D)."""

    def advance(self, T: int) -> None:
        """The pass is over: the T tokens are past."""


class KVCache:
    """Room for `capacity` tokens of `batch` sequences, `length` filled: keys and values are (L, B, K, capacity, D)."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.capacity, self.context = capacity, config.max_position_embeddings
        self.length = 0

    def positions(self, T: int) -> slice:
        end = self.length + T
        if end > self.context:
            raise IndexError(f"{end} tokens are more than the context of {self.context}")
        if end > self.capacity:
            raise IndexError(f"the cache holds {self.capacity} tokens, {end} were asked for")
        return slice(self.length, end)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return attend(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], window=window, scale=scale)

    def advance(self, T: int) -> None:
        self.length += T


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in a pass: `size` of them after `past` cached ones.

    tables: for each group of layers, the blocks of the sequence's tokens, in order; those that only tokens behind the
    window need may hold any number.
    """

    past: int
    size: int
    tables: Sequence[Sequence[int]]


class PagedCache:
    """Blocks of `block_size` tokens' keys and values, (blocks, Z, K, D) for each layer.

    Layers that see equally far back make a group: they have a pool of blocks of their own, so that banded layers need
    keep no more than their window. windows: the groups' (None: all the past). num_blocks: the size of each one's pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: Sequence[int],
        block_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.windows = windows_of(config)
        self.block_size, self.heads = block_size, config.num_key_value_heads
        self.group_of = [self.windows.index(config.window_of(layer)) for layer in range(config.num_hidden_layers)]
        # Zeros, not `empty`: what padding reads is masked, but nothing times NaN is NaN.
        shape = (block_size, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (
            [_zeros((num_blocks[g], *shape), torch.device(device), dtype) for g in self.group_of] for _ in range(2)
        )

    def bytes(self) -> int:
        """What all blocks together take."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy one block of a group's pool onto another."""
        for layer, g in enumerate(self.group_of):
            if g == group:
                self.keys[layer][target] = self.keys[layer][source]
                self.values[layer][target] = self.values[layer][source]

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Zero blocks: numbers that are not finite must not be found by who reads padding."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for layer, g in enumerate(self.group_of):
            if g == group:
                self.keys[layer][index] = 0
                self.values[layer][index] = 0


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU in memory that the system gives only when it is touched, which `torch.zeros` does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size() * math.prod(shape)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def windows_of(config: ModelConfig) -> list[int | None]:
    """How far back layers see, each width once; None (all the past) first."""
    widths = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
    return sorted(widths, key=lambda w: (w is not None, w or 0))


@dataclass(frozen=True)
class _Reading:
    """How a group's layers read the past of some sequences that bring equally many new tokens.

    rows: which of the N new tokens are theirs. blocks: (B, blocks of each), or a slice where they lie side by side.
    first, last: the cached tokens are these of the tokens read. mask: (B, 1, 1, S), where lengths differ.
    """

    rows: Tensor | slice
    blocks: Tensor | slice
    first: int
    last: int
    mask: Tensor | None


class PagedBatch:
    """One forward pass over chunks of several sequences, laid end to end: ids are (1, N).

    Sequences that bring one token each are attended together, padded to the longest; others each by itself.
    """

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk], context: int) -> None:
        self.cache, self.context = cache, context
        device = cache.keys[0].device
        positions = [p for c in chunks for p in range(c.past, c.past + c.size)]
        self._positions = torch.tensor(positions, device=device)
        self._longest = max(c.past + c.size for c in chunks)
        Z = cache.block_size
        self.slots = [
            torch.tensor(
                [c.tables[g][p // Z] * Z + p % Z for c in chunks for p in range(c.past, c.past + c.size)], device=device
            )
            for g in range(len(cache.windows))
        ]
        starts = [0]
        for c in chunks:
            starts.append(starts[-1] + c.size)
        single = [i for i, c in enumerate(chunks) if c.size == 1]
        self.readings = [
            self._together(g, [chunks[i] for i in single], [starts[i] for i in single])
            + [self._alone(g, c, starts[i]) for i, c in enumerate(chunks) if c.size > 1]
            for g in range(len(cache.windows))
        ]

    def positions(self, T: int) -> Tensor:
        if self._longest > self.context:
            raise IndexError(f"{self._longest} tokens are more than the context of {self.context}")
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
        group, keys, values = self.cache.group_of[layer], self.cache.keys[layer], self.cache.values[layer]
        keys.flatten(0, 1)[self.slots[group]] = k[0].transpose(0, 1)
        values.flatten(0, 1)[self.slots[group]] = v[0].transpose(0, 1)
        readings = self.readings[group]
        if len(readings) == 1:
            return self._read(readings[0], q, keys, values, window, scale)
        y = torch.empty_like(q)
        for reading in readings:
            y[:, :, reading.rows] = self._read(reading, q[:, :, reading.rows], keys, values, window, scale)
        return y

    def advance(self, T: int) -> None:
        """Nothing: whoever owns the sequences knows how long they are."""

    def _read(
        self, reading: _Reading, q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """Attention of q: (1, H, B, D), one token of each of B sequences, or (1, H, T, D), T of one."""
        if isinstance(reading.blocks, slice):
            k, v = keys[reading.blocks].flatten(0, 1)[None], values[reading.blocks].flatten(0, 1)[None]
        else:
            B, _ = reading.blocks.shape
            flat = reading.blocks.flatten()
            k = keys.index_select(0, flat).view(B, -1, *keys.shape[2:])
            v = values.index_select(0, flat).view(B, -1, *values.shape[2:])
        k = k[:, reading.first : reading.last].transpose(1, 2)  # (B, K, S, D)
        v = v[:, reading.first : reading.last].transpose(1, 2)
        _, H, T, D = q.shape
        B, K = k.shape[:2]
        if B == 1 and T > 1:
            return attend(q, k, v, window=window, scale=scale)
        # One token a sequence: the queries that share a key head are as many queries of one head.
        grouped = q[0].transpose(0, 1).reshape(B, K, H // K, D)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=reading.mask, scale=scale)
        return y.reshape(B, H, D).transpose(0, 1)[None]

    def _alone(self, group: int, chunk: Chunk, start: int) -> _Reading:
        window, Z = self.cache.windows[group], self.cache.block_size
        end = chunk.past + chunk.size
        seen = 0 if window is None else max(0, chunk.past - window + 1)  # the first token that the first of ours sees
        blocks = self._index([list(chunk.tables[group][seen // Z : -(-end // Z)])])
        offset = seen // Z * Z
        return _Reading(slice(start, start + chunk.size), blocks, seen - offset, end - offset, None)

    def _together(self, group: int, chunks: Sequence[Chunk], starts: Sequence[int]) -> list[_Reading]:
        if not chunks:
            return []
        window, Z = self.cache.windows[group], self.cache.block_size
        device = self._positions.device
        rows = torch.tensor(starts, device=device)
        ends = [c.past + 1 for c in chunks]
        seen = [0 if window is None else max(0, end - window) for end in ends]
        tables = [list(c.tables[group][s // Z : -(-end // Z)]) for c, s, end in zip(chunks, seen, ends, strict=True)]
        offsets = [s // Z * Z for s in seen]
        firsts = [s - offset for s, offset in zip(seen, offsets, strict=True)]
        lasts = [end - offset for end, offset in zip(ends, offsets, strict=True)]
        if len(set(zip(firsts, lasts, strict=True))) == 1:
            return [_Reading(rows, self._index(tables), firsts[0], lasts[0], None)]
        width = max(map(len, tables))
        blocks = torch.tensor([table + [0] * (width - len(table)) for table in tables], device=device)
        at = torch.arange(max(lasts), device=device)
        mask = (at >= torch.tensor(firsts, device=device)[:, None]) & (at < torch.tensor(lasts, device=device)[:, None])
        return [_Reading(rows, blocks, 0, max(lasts), mask[:, None, None])]

    def _index(self, tables: list[list[int]]) -> Tensor | slice:
        """Tables of equal length; a slice for a single one whose blocks lie side by side: it is read in place."""
        (table, *others) = tables
        if not others and table == list(range(table[0], table[0] + len(table))):
            return slice(table[0], table[0] + len(table))
        return torch.tensor(tables, device=self._positions.device)
