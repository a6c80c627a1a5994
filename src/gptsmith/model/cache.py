"""Caches of the keys and values of earlier tokens. A cache is an argument of `forward`, not a part of the model.

`KVCache` is a contiguous tensor with the same number of tokens for each sequence of a batch. `PagedCache` is divided
into blocks that sequences of any length share (Kwon et al. 2023, 2309.06180); a `PagedBatch` is the view of it that a
forward pass over several sequences reads and writes. The transformer uses both through the protocol `Cache`.

Axis letters: L layers · B sequences · N new tokens of all sequences · T new tokens of each · S all tokens attended to ·
H heads · K key/value heads · D head_dim · Z tokens per block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.model.attention import attend, attend_with_sinks
from gptsmith.model.config import ModelConfig


class Scoring(NamedTuple):
    """How a layer scores keys; see `attention.attend`."""

    window: int | None = None
    scale: float | None = None
    sinks: Tensor | None = None


class Cache(Protocol):
    """What a forward pass needs of a cache."""

    def positions(self, T: int) -> slice | Tensor:
        """Return the positions of the T new tokens. Raises IndexError beyond the context or the capacity."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """Store the new k and v: (B, K, T, D), and return the attention of q over all tokens so far: (B, H, T, D)."""

    def advance(self, T: int) -> None:
        """Count the T new tokens as cached. Called at the end of a forward pass."""


class KVCache:
    """Keys and values (L, B, K, capacity, D) of `batch` sequences, of which `length` tokens are filled.

    In latent attention values are the first numbers of keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.cached_heads, capacity, config.cached_key_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        latent = config.kv_lora_rank
        self.values = torch.empty_like(self.keys) if latent is None else self.keys[..., :latent]
        self.capacity, self.context = capacity, config.max_position_embeddings
        self.length = 0

    def positions(self, T: int) -> slice:
        end = self.length + T
        if end > self.context:
            raise IndexError(f"{end} tokens are more than the context of {self.context}")
        if end > self.capacity:
            raise IndexError(f"{end} tokens are more than the cache's capacity of {self.capacity}")
        return slice(self.length, end)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return attend(q, keys, values, **scoring._asdict())

    def advance(self, T: int) -> None:
        self.length += T


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in a forward pass: `size` of them, after `past` cached ones.

    tables: for each group of layers, the indices of the blocks that hold the sequence's tokens, in order. The index of
        a block that is entirely outside the sliding window can be anything.
    """

    past: int
    size: int
    tables: Sequence[Sequence[int]]


class PagedCache:
    """Keys and values in blocks of `block_size` tokens, (blocks, Z, K, D) for each layer.

    Layers with the same sliding window form a group. Each group has its own pool of blocks, so that layers with a
    window need not keep more tokens than that.
    windows: the window of each group; None: no window. num_blocks: the size of each group's pool.
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
        self.block_size, self.heads = block_size, config.cached_heads
        self.group_of = [self.windows.index(config.window_of(layer)) for layer in range(config.num_hidden_layers)]
        # Zeros, not `empty`: values read as padding are masked, but 0 · NaN is NaN.
        shape = (block_size, config.cached_heads, config.cached_key_dim)

        def pools() -> list[Tensor]:
            return [_zeros((num_blocks[g], *shape), torch.device(device), dtype) for g in self.group_of]

        self.keys, self.latent = pools(), config.kv_lora_rank
        self.values = pools() if self.latent is None else [keys[..., : self.latent] for keys in self.keys]

    def store(self, layer: int, slots: Sequence[Tensor] | Tensor, k: Tensor, v: Tensor) -> tuple[int, Tensor, Tensor]:
        """Store k and v: (1, K, N, D) in a layer. Return its group, and its pools of keys and values.

        slots: for each group, where the N tokens are to be: block · Z + place in the block.
        """
        group, keys, values = self.group_of[layer], self.keys[layer], self.values[layer]
        keys.flatten(0, 1)[slots[group]] = k[0].transpose(0, 1)
        values.flatten(0, 1)[slots[group]] = v[0].transpose(0, 1)
        return group, keys, values

    def bytes(self) -> int:
        """Return the size of all blocks together."""
        return sum(tensor.nbytes for tensor in (*self.keys, *(self.values if self.latent is None else ())))

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy block `source` of a group's pool to block `target`."""
        for layer, g in enumerate(self.group_of):
            if g == group:
                self.keys[layer][target] = self.keys[layer][source]
                self.values[layer][target] = self.values[layer][source]

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Set blocks to zero, so that no NaN or infinity is read from them as padding."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for layer, g in enumerate(self.group_of):
            if g == group:
                self.keys[layer][index] = 0
                self.values[layer][index] = 0


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros. On a CPU the pages are allocated when they are first written, which `torch.zeros` does at once."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size() * math.prod(shape)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def windows_of(config: ModelConfig) -> list[int | None]:
    """Return the different sliding windows of the layers, in order; None (no window) comes first."""
    widths = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
    return sorted(widths, key=lambda w: (w is not None, w or 0))


def attend_single_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Return the attention of one token of each of B sequences: q (1, H, B, D) over k, v: (B, K, S, D): (1, H, B, D).

    mask: (B, 1, 1, S) bool; None: all keys are seen. The window of `scoring` is in the mask.
    """
    (B, K), (_, H, _, D) = k.shape[:2], q.shape
    grouped = q[0].transpose(0, 1).reshape(B, K, H // K, D)  # the H/K queries of a key head, as tokens of one head
    if scoring.sinks is None:
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scoring.scale)
    else:
        y = attend_with_sinks(grouped, k, v, scoring.sinks.view(K, H // K, 1), mask, scale=scoring.scale)
    return y.reshape(B, H, -1).transpose(0, 1)[None]


@dataclass(frozen=True)
class _Read:
    """How the layers of a group read the cached tokens of B sequences with the same number of new tokens.

    rows: the positions of their tokens among the N new ones. blocks: (B, blocks per sequence), or a slice if they are
    contiguous. first, last: the range of tokens within the blocks that is used. mask: (B, 1, 1, S), if lengths differ.
    """

    rows: Tensor | slice
    blocks: Tensor | slice
    first: int
    last: int
    mask: Tensor | None


class PagedBatch:
    """The cache of a forward pass over chunks of several sequences, concatenated: ids are (1, N).

    Sequences with a single new token are attended to together, padded to the longest; the others one by one.
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
        self.reads = [
            self._read_single_tokens(g, [chunks[i] for i in single], [starts[i] for i in single])
            + [self._read_chunk(g, c, starts[i]) for i, c in enumerate(chunks) if c.size > 1]
            for g in range(len(cache.windows))
        ]

    def positions(self, T: int) -> Tensor:
        if self._longest > self.context:
            raise IndexError(f"{self._longest} tokens are more than the context of {self.context}")
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        group, keys, values = self.cache.store(layer, self.slots, k, v)
        reads = self.reads[group]
        if len(reads) == 1:
            return self._read(reads[0], q, keys, values, scoring)
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        for read in reads:
            y[:, :, read.rows] = self._read(read, q[:, :, read.rows], keys, values, scoring)
        return y

    def advance(self, T: int) -> None:
        """Do nothing: the engine keeps track of the sequences' lengths."""

    def _read(self, read: _Read, q: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention of q: (1, H, B, D), one token of each of B sequences, or (1, H, T, D), T of one."""
        if isinstance(read.blocks, slice):
            k, v = keys[read.blocks].flatten(0, 1)[None], values[read.blocks].flatten(0, 1)[None]
        else:
            B, _ = read.blocks.shape
            flat = read.blocks.flatten()
            k = keys.index_select(0, flat).view(B, -1, *keys.shape[2:])
            v = values.index_select(0, flat).view(B, -1, *values.shape[2:])
        k = k[:, read.first : read.last].transpose(1, 2)  # (B, K, S, D)
        v = v[:, read.first : read.last].transpose(1, 2)
        if k.shape[0] == 1 and q.shape[2] > 1:
            return attend(q, k, v, **scoring._asdict())
        return attend_single_tokens(q, k, v, read.mask, scoring)

    def _read_chunk(self, group: int, chunk: Chunk, start: int) -> _Read:
        window, Z = self.cache.windows[group], self.cache.block_size
        end = chunk.past + chunk.size
        seen = 0 if window is None else max(0, chunk.past - window + 1)  # the first token that the first new one sees
        blocks = self._index([list(chunk.tables[group][seen // Z : -(-end // Z)])])
        offset = seen // Z * Z
        return _Read(slice(start, start + chunk.size), blocks, seen - offset, end - offset, None)

    def _read_single_tokens(self, group: int, chunks: Sequence[Chunk], starts: Sequence[int]) -> list[_Read]:
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
            return [_Read(rows, self._index(tables), firsts[0], lasts[0], None)]
        width = max(map(len, tables))
        blocks = torch.tensor([table + [0] * (width - len(table)) for table in tables], device=device)
        position = torch.arange(max(lasts), device=device)
        begin, end = (torch.tensor(each, device=device)[:, None] for each in (firsts, lasts))
        mask = (position >= begin) & (position < end)
        return [_Read(rows, blocks, 0, max(lasts), mask[:, None, None])]

    def _index(self, tables: list[list[int]]) -> Tensor | slice:
        """Return tables of equal length as a tensor, or a single one with contiguous blocks as a slice (no copy)."""
        (table, *others) = tables
        if not others and table == list(range(table[0], table[0] + len(table))):
            return slice(table[0], table[0] + len(table))
        return torch.tensor(tables, device=self._positions.device)
