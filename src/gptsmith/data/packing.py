"""Examples with masks, packed into rows: each attends to itself only, and nothing is cut off.

    rows = pack([len(ids) - 1 for ids in examples], seq_len)     # which examples share a row
    loader = PackedLoader(examples, batch_size=8, seq_len=512, seed=0)
    batch = next(loader)                                         # TokenBatch(ids, targets, document_ids)

Best-fit decreasing (Johnson 1973; for language models Ding et al. 2024, 2404.10830): the longest example first, each
into the fullest row that still has room.

Axis letters: B rows · T tokens per row.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.conversations import Example
from gptsmith.data.loader import TokenBatch, permuted, seed_key
from gptsmith.errors import CheckpointError, DataError, UsageError
from gptsmith.model.config import IGNORED

_WIDTH_STEP = 64  # rows of a single example are padded to a multiple of this


class Examples(Sequence[Example]):
    """Examples in three flat arrays: a million short ones take some hundred MB. Only whole examples are kept."""

    def __init__(self, examples: Iterable[Example]) -> None:
        ids: list[NDArray[np.int32]] = []
        trained: list[NDArray[np.bool_]] = []
        for example in examples:
            ids.append(np.array(example.ids, dtype=np.int32))
            trained.append(np.array(example.trained, dtype=np.bool_))
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        self.starts: NDArray[np.int64] = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.trained = np.concatenate(trained) if trained else np.zeros(0, np.bool_)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids[part].tolist(), self.trained[part].tolist())

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def num_trained(self) -> int:
        """The number of tokens that are trained on."""
        return int(self.trained.sum())

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of ids, mask and lengths."""
        digest = hashlib.sha256(b"examples\n")
        for array in (self.ids, self.trained, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def pack(lengths: Sequence[int] | NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Return rows of indices, each with a total length of at most `seq_len`, by best-fit decreasing.

    Deterministic. Raises UsageError for a length beyond `seq_len`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    if order and lengths[order[0]] > seq_len:
        raise UsageError(f"an example of {lengths[order[0]]:,} tokens does not fit into a row of {seq_len:,}.")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows with that much room
    rooms: list[int] = []  # those that have a row, ascending
    for index in order:
        length = int(lengths[index])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        rows[row].append(index)
        left = room - length
        if left > 0:
            if not by_room[left]:
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows


class PackedLoader:
    """Endless batches of packed examples: every row once in each epoch, in an order that depends on the seed.

    `position` counts the rows taken; it is the only state. batch_size: B. seq_len: T, what an example without its last
    token must fit into. packing: False: one example per row, and rows as wide as the longest of a batch.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seq_len: int, seed: int, packing: bool = True) -> None:
        if not len(examples):
            raise DataError("there is no example to train on.")
        self.examples, self.batch_size, self.seq_len, self.seed = examples, batch_size, seq_len, seed
        self.packing = packing
        lengths = examples.lengths - 1
        self.rows = pack(lengths, seq_len) if packing else [[i] for i in range(len(examples))]
        self.position = 0
        self._key = seed_key(seed)

    @property
    def epoch(self) -> float:
        """The number of passes over the data so far, as a fraction."""
        return self.position / len(self.rows)

    @property
    def fill(self) -> float:
        """The share of the rows' positions that hold a token."""
        return float((self.examples.lengths - 1).sum()) / (len(self.rows) * self.seq_len)

    def batch_at(self, position: int) -> TokenBatch:
        """Return the batch after `position` rows were taken. Pure."""
        return self.batch_of([self.rows[i] for i in self.order_at(position)])

    def order_at(self, position: int) -> list[int]:
        """Return which rows the batch has after `position` rows were taken. Pure."""
        sequence = np.arange(position, position + self.batch_size, dtype=np.uint64)
        n = len(self.rows)
        epoch, index = np.divmod(sequence, np.uint64(n))
        return [int(i) for i in (permuted(index, n, self._key(epoch)) if n > 1 else index)]

    def batch_of(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        """Return these rows, each a list of examples, as a batch."""
        width = self.seq_len
        if not self.packing:
            longest = max(int(self.examples.lengths[i]) - 1 for row in rows for i in row)
            width = min(self.seq_len, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
        return packed_batch(self.examples, rows, width)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch = self.batch_at(self.position)
        self.position += self.batch_size
        return batch

    def whole(self, batch_size: int) -> Iterator[TokenBatch]:
        """Yield every row once, in order."""
        for start in range(0, len(self.rows), batch_size):
            yield self.batch_of(self.rows[start : start + batch_size])

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with the data and options that it is valid for."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raise CheckpointError if it belongs to other data or options."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"cannot resume: {name} of the data is {value}, and was {state.get(name)} in the checkpoint. "
                    "Restore it, or start a new run."
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": self.examples.fingerprint(),
            "rows": len(self.rows),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "packing": self.packing,
        }


def packed_batch(examples: Examples, rows: Sequence[Sequence[int]], width: int) -> TokenBatch:
    """Return rows of examples as a batch (B, width). Padding is a document of its own, -1, without targets."""
    import torch

    ids = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORED, np.int64)
    documents = np.full((len(rows), width), -1, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, index in enumerate(row):
            part = slice(examples.starts[index], examples.starts[index + 1])
            tokens, trained = examples.ids[part], examples.trained[part]
            end = at + len(tokens) - 1
            ids[r, at:end] = tokens[:-1]
            targets[r, at:end] = np.where(trained[1:], tokens[1:], IGNORED)
            documents[r, at:end] = number
            at = end
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(documents))
