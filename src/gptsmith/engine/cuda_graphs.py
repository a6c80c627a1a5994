"""Decodes on a GPU with CUDA graphs, which start the hundreds of small kernels of a step with one call.

A graph runs the same kernels on the same memory each time, so it reads ids, positions and block tables from tensors
that stay in place (`StaticBatch`). There is a graph for each power of two of sequences and of blocks. Rows beyond the
actual sequences repeat the first one, which computes and stores the same numbers twice.

Axis letters: B sequences · W blocks of each · S = W · Z tokens · H heads · K key/value heads · D head_dim · Z tokens of
a block · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.engine.runner import Runner, StepInputs
from gptsmith.model.cache import Chunk, PagedCache, Scoring, attend_single_tokens
from gptsmith.model.transformer import Transformer

_MIN_BLOCKS = 8


class StaticBatch:
    """A `Cache` for one new token of each of B sequences with up to W blocks. Tensors are filled, never replaced."""

    def __init__(self, cache: PagedCache, batch: int, blocks: int) -> None:
        self.cache, self.batch, self.blocks = cache, batch, blocks
        groups, device = len(cache.windows), cache.keys[0].device
        self.ids = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.slots = torch.zeros(groups, batch, dtype=torch.int64, device=device)
        self.tables = torch.zeros(groups, batch, blocks, dtype=torch.int64, device=device)
        # For each group and row: the first visible position in its blocks, and one past the last.
        self.visible_range = torch.zeros(groups, 2, batch, dtype=torch.int64, device=device)
        self._at = torch.arange(blocks * cache.block_size, device=device)

    def fill(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """Set the tokens of the next step, one per sequence. Rows beyond these repeat the first."""
        Z = self.cache.block_size
        rows = [*range(len(ids)), *[0] * (self.batch - len(ids))]
        pasts = [chunks[i].past for i in rows]
        self.ids.copy_(torch.tensor([[ids[i] for i in rows]]), non_blocking=True)
        self._positions.copy_(torch.tensor(pasts), non_blocking=True)
        for g, window in enumerate(self.cache.windows):
            oldest = [0 if window is None else max(0, past + 1 - window) for past in pasts]
            tables = [list(chunks[i].tables[g]) for i in rows]
            slots = [table[past // Z] * Z + past % Z for table, past in zip(tables, pasts, strict=True)]
            parts = [table[s // Z : past // Z + 1] for table, s, past in zip(tables, oldest, pasts, strict=True)]
            self.tables[g].copy_(torch.tensor([part + [0] * (self.blocks - len(part)) for part in parts]))
            self.slots[g].copy_(torch.tensor(slots), non_blocking=True)
            first = [s % Z for s in oldest]
            last = [past + 1 - s // Z * Z for s, past in zip(oldest, pasts, strict=True)]
            self.visible_range[g].copy_(torch.tensor([first, last]), non_blocking=True)

    def positions(self, T: int) -> Tensor:
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        group, keys, values = self.cache.store(layer, self.slots, k, v)
        flat, size = self.tables[group].flatten(), (self.batch, -1, k.shape[1])
        k, v = (pool.index_select(0, flat).view(*size, pool.shape[-1]).transpose(1, 2) for pool in (keys, values))
        first, last = self.visible_range[group]
        mask = (self._at >= first[:, None]) & (self._at < last[:, None])  # (B, S)
        return attend_single_tokens(q, k, v, mask[:, None, None], scoring)

    def advance(self, T: int) -> None:
        """Do nothing: the scheduler keeps the lengths of sequences."""


class GraphRunner(Runner):
    """A `Runner` that decodes with CUDA graphs. captured: False computes the same without graphs, on any device, for
    tests."""

    def __init__(self, model: Transformer, cache: PagedCache, vocab_size: int, *, captured: bool = True) -> None:
        super().__init__(model, cache, vocab_size)
        self.captured = captured
        self._graphs: dict[tuple[int, int], tuple[StaticBatch, Any, Tensor]] = {}
        self._weights_key: Any = None
        self._pool: Any = None

    def _logits(self, inputs: StepInputs) -> Tensor:
        ids, chunks = inputs.ids, inputs.chunks
        longest = max(chunk.past + chunk.size for chunk in chunks)
        several = any(chunk.size > 1 for chunk in chunks)
        fits = not several and len(inputs.rows) == len(ids) and longest <= self.context
        if inputs.adapted or inputs.features or not fits:
            return super()._logits(inputs)
        parameters = self.model.parameters()  # torchao's tensor subclasses have no address of their own
        weights_key = tuple(p.data_ptr() if type(p) is nn.Parameter else id(p) for p in parameters)
        if weights_key != self._weights_key:  # the weights have been replaced
            self._graphs.clear()
            self._weights_key = weights_key
        Z = self.cache.block_size
        batch = 1 << (len(ids) - 1).bit_length()
        blocks = max(_MIN_BLOCKS, 1 << (-(-longest // Z) - 1).bit_length())
        known = self._graphs.get((batch, blocks))
        static = StaticBatch(self.cache, batch, blocks) if known is None else known[0]
        static.fill(ids, chunks)
        if not self.captured:
            logits = self._compute(static)
        elif known is None:
            graph, logits = self._capture(static)
            self._graphs[batch, blocks] = static, graph, logits
        else:
            _, graph, logits = known
            graph.replay()
        return logits[: len(ids)].clone()

    def _compute(self, static: StaticBatch) -> Tensor:
        with self._evaluating():
            hidden = self.model.hidden_states(static.ids, cache=static)[0]
            logits: Tensor = self.model.lm_head(hidden).float()[:, : self.vocab_size]
        return logits

    def _capture(self, static: StaticBatch) -> tuple[Any, Tensor]:
        """Capture the graph of a filled batch. Running it repeatedly stores the same keys and values."""
        side_stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):  # warm up: libraries choose kernels and allocate workspaces
                self._compute(static)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._compute(static)
        self._pool = self._pool or graph.pool()
        graph.replay()
        return graph, logits
