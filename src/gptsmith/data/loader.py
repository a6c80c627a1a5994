"""Batches of token windows, as a pure function of the seed and of the number of sequences taken before.

An epoch divides the split into N windows of T tokens that do not overlap, shifted by a random offset, and visits them
in a random order, so every window is seen once before any is seen again. Offset and order are computed, not stored: the
order is a Feistel network over [0, N) (M. Luby and C. Rackoff, "How to construct pseudorandom permutations", 1988) with
cycle walking (J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002). Every batch of every epoch costs
the same, the position is the only state, and the order does not depend on the number of ranks.

Axes: B batch, T time, N windows of an epoch.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.shards import TokenSplit
from gptsmith.errors import CheckpointError, DataError, UsageError
from gptsmith.model.config import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptsmith.model.vision import Images

ROUNDS = 12  # fewer rounds do not look random for ranges of a few dozen

B = TypeVar("B")

_U64 = np.uint64
_STEP = _U64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio
_MASK = (1 << 64) - 1


class TokenBatch(NamedTuple):
    """A batch of token windows.

    ids: (B, T) int64. targets: (B, T) int64, the id that follows each token, or -100 where there is no loss.
    document_ids: (B, T) int32, equal within a row exactly where two tokens belong to the same document, or None.
    images: the pictures of the rows, or None.
    The loader makes CPU tensors; the fields can be unpacked into a loss function: `loss(model, *batch)`.
    """

    ids: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    images: Images | None = None

    @property
    def num_rows(self) -> int:
        """B, the number of sequences."""
        return self.ids.shape[0]

    @property
    def num_targets(self) -> int:
        """The number of targets that count in the loss."""
        return int((self.targets != IGNORED).sum())

    def slice(self, start: int, stop: int) -> TokenBatch:
        """Return rows [start, stop), without copying."""
        images = None if self.images is None else self.images.slice(start, stop)
        return self._map(lambda tensor: tensor[start:stop])._replace(images=images)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on `device`. A copy to a GPU goes through pinned memory and does not wait."""
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)  # noqa: E731
        if device.type == "cuda" and self.ids.device.type == "cpu":
            move = lambda tensor: tensor.pin_memory().to(device, non_blocking=True)  # noqa: E731
        images = None if self.images is None else self.images._replace(pixels=move(self.images.pixels))
        return self._map(move)._replace(images=images)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        documents = None if self.document_ids is None else change(self.document_ids)
        return TokenBatch(change(self.ids), change(self.targets), documents)


class TokenLoader:
    """Endless training batches, sampled without replacement within an epoch.

    `position` counts the sequences taken by all ranks together. Rank r of w takes sequences
    [position + r*B, position + (r + 1)*B) of one global order, so w ranks with batches of B together see the same
    sequences as one rank with batches of w*B.

    batch_size: B, sequences per rank. seq_len: T. mask_documents: return document ids, and ignore targets that belong
    to another document than their token.
    Raises DataError if the split has fewer than T + 1 tokens.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
    ) -> None:
        _check_shape(batch_size, seq_len, rank, world_size)
        if len(split) < seq_len + 1:
            raise DataError(
                f"the training text is too short: it has {len(split):,} tokens, and a context of {seq_len:,} needs at "
                f"least {seq_len + 1:,}. Use a shorter context, more text, or a smaller validation fraction."
            )
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed
        self.rank, self.world_size, self.mask_documents = rank, world_size, mask_documents
        self.position = 0
        # N is the same for every offset, so all epochs have the same length. There are T to 2T - 1 offsets (fewer for
        # the shortest texts), which is enough for every token to be seen and for every alignment of windows.
        self.windows_per_epoch = max(1, (len(split) - seq_len) // seq_len)
        self._offsets = len(split) - self.windows_per_epoch * seq_len
        self._key = seed_key(seed)

    @property
    def epoch(self) -> float:
        """The number of passes over the split so far, as a fraction."""
        return self.position / self.windows_per_epoch

    def window_starts(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the split the given sequences of the global order begin: (B,) int64, as `sequences`."""
        epoch, index = np.divmod(sequences.astype(_U64), _U64(self.windows_per_epoch))
        key = self._key(epoch)
        offset = _mix(~key) % _U64(self._offsets)
        order = permuted(index, self.windows_per_epoch, key)
        return (offset + order * _U64(self.seq_len)).astype(np.int64)

    def batch_at(self, position: int) -> TokenBatch:
        """Return this rank's batch after all ranks have taken `position` sequences. Pure."""
        first = position + self.rank * self.batch_size
        starts = self.window_starts(np.arange(first, first + self.batch_size))
        window = self.split.windows(starts, self.seq_len + 1)
        ids, targets = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
        return _batch(self.split, ids, targets, starts, self.mask_documents)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch = self.batch_at(self.position)
        self.position += self.world_size * self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with the data and options that it is valid for."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        The number of ranks may change as long as the global batch stays the same. Raises CheckpointError if the state
        belongs to other data, or to another seed, batch size or context length.
        """
        for name, value in self._identity().items():
            if name not in state:
                raise CheckpointError(f"the checkpoint's data position has no {name!r}; it cannot be resumed.")
            if state[name] != value:
                raise CheckpointError(_mismatch(name, state[name], value))
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise CheckpointError(f"the checkpoint's data position is {position!r}; it cannot be resumed.")
        self.position = position

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.split.fingerprint,
            "tokens": len(self.split),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "global_batch": self.batch_size * self.world_size,
            "mask_documents": self.mask_documents,
        }


class RowLoader(abc.ABC, Generic[B]):
    """Endless batches of rows that are in memory: each row once in an epoch, in an order that depends on the seed.

    `position` counts the rows taken; it is the only state. batch_size: rows of a batch. A subclass makes the batches
    (`batch_of`) and says what a position is valid for (`_identity`).
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}.")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.position = 0
        self._key = seed_key(seed)

    @abc.abstractmethod
    def batch_of(self, rows: Sequence[int]) -> B:
        """Return the rows with these indices as a batch."""

    @abc.abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return the data and options that a position is valid for."""

    @property
    def epoch(self) -> float:
        """The number of passes over the data so far, as a fraction."""
        return self.position / self.num_rows

    def order_at(self, position: int) -> list[int]:
        """Return which rows the batch has after `position` rows were taken. Pure."""
        sequence = np.arange(position, position + self.batch_size, dtype=np.uint64)
        epoch, index = np.divmod(sequence, np.uint64(self.num_rows))
        if self.num_rows > 1:
            index = permuted(index, self.num_rows, self._key(epoch))
        return [int(i) for i in index]

    def batch_at(self, position: int) -> B:
        """Return the batch after `position` rows were taken. Pure."""
        return self.batch_of(self.order_at(position))

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        batch = self.batch_at(self.position)
        self.position += self.batch_size
        return batch

    def whole(self, batch_size: int) -> Iterator[B]:
        """Yield every row once, in order. The last batch may be smaller."""
        for start in range(0, self.num_rows, batch_size):
            yield self.batch_of(range(start, min(start + batch_size, self.num_rows)))

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


def whole_split_batches(
    split: TokenSplit,
    *,
    batch_size: int,
    seq_len: int,
    mask_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenBatch]:
    """Return consecutive windows in which every token of the split except the first is a target exactly once.

    All batches have the shape (B, T), with target -100 past the end of the split. Ranks take turns and get the same
    number of batches, of which the last may have no targets. With `mask_documents`, the first token of a document is
    not a target. Raises DataError for a split of fewer than 2 tokens, where there is nothing to predict.
    """
    _check_shape(batch_size, seq_len, rank, world_size)
    if len(split) < 2:
        raise DataError(
            f"the validation text is too short: it has {len(split):,} tokens, and at least 2 are needed. "
            "Use more text, or a larger validation fraction."
        )
    return _whole_split(split, batch_size, seq_len, mask_documents, rank, world_size)


def _whole_split(
    split: TokenSplit, batch_size: int, seq_len: int, mask_documents: bool, rank: int, world_size: int
) -> Iterator[TokenBatch]:
    targets_left = len(split) - 1
    per_batch = batch_size * seq_len
    rounds = math.ceil(targets_left / (per_batch * world_size))
    for first in range(rank * per_batch, rounds * world_size * per_batch, world_size * per_batch):
        low, high = min(first, targets_left), min(first + per_batch, targets_left)
        ids = np.zeros(per_batch, np.int64)
        targets = np.full(per_batch, IGNORED, np.int64)
        if high > low:
            tokens = split.tokens(low, high + 1)
            ids[: high - low], targets[: high - low] = tokens[:-1], tokens[1:]
        shape = (batch_size, seq_len)
        starts = first + seq_len * np.arange(batch_size)
        yield _batch(split, ids.reshape(shape), targets.reshape(shape), starts, mask_documents)


def seed_key(seed: int) -> Callable[[NDArray[np.uint64]], NDArray[np.uint64]]:
    """Return a function from epochs (B,) to keys for `permuted`, (B,) uint64, which depends on the seed."""
    base = _mix(np.array([seed & _MASK], dtype=_U64) + _STEP)
    return lambda epoch: _mix(epoch * _STEP + base)


def permuted(index: NDArray[np.uint64], n: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the image of `index` under a random permutation of [0, n) that is chosen by `key`, elementwise.

    index: (B,) uint64 below n. key: (B,) uint64, well mixed. Pure, in constant memory.

    The number is split into left + a * right with a * b >= n. Each round adds to one half a hash of the other, which
    is a bijection of [0, a*b). Results outside [0, n) are permuted again, which makes it a bijection of [0, n).
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    found = _feistel(index, key, _U64(a), _U64(b))
    outside = found >= _U64(n)
    while outside.any():
        found[outside] = _feistel(found[outside], key[outside], _U64(a), _U64(b))
        outside = found >= _U64(n)
    return found


def _feistel(x: NDArray[np.uint64], key: NDArray[np.uint64], a: np.uint64, b: np.uint64) -> NDArray[np.uint64]:
    right, left = np.divmod(x, a)
    for round_number in range(ROUNDS):
        key = key + _STEP
        if round_number % 2 == 0:
            left = (left + _half_mix(right + key)) % a
        else:
            right = (right + _half_mix(left + key)) % b
    return left + a * right


def _half_mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64 bits to 32 bits, more cheaply than `_mix`. Overwrites `x`."""
    x *= _U64(0xBF58476D1CE4E5B9)
    x ^= x >> _U64(32)
    x *= _U64(0x94D049BB133111EB)
    x >>= _U64(32)
    return x


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64 bits to 64 bits with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _batch(
    split: TokenSplit,
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    starts: NDArray[np.int64],
    mask_documents: bool,
) -> TokenBatch:
    import torch  # here, so that commands that only prepare data start quickly

    if not mask_documents:
        return TokenBatch(torch.from_numpy(ids), torch.from_numpy(targets))
    steps = np.arange(ids.shape[1] + 1)
    documents = split.documents_at(starts[:, None] + steps)
    targets[documents[:, :-1] != documents[:, 1:]] = IGNORED  # a document says nothing about the next one
    document_ids = (documents[:, :-1] - documents[:, :1]).astype(np.int32)
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(document_ids))


def _check_shape(batch_size: int, seq_len: int, rank: int, world_size: int) -> None:
    for name, value in (("batch size", batch_size), ("context length", seq_len), ("number of ranks", world_size)):
        if value < 1:
            raise UsageError(f"the {name} must be at least 1, not {value}.")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is not one of the {world_size} ranks 0..{world_size - 1}.")


def _mismatch(name: str, saved: Any, now: Any) -> str:
    what = {
        "data": "the training text or its tokenizer",
        "tokens": "the number of training tokens",
        "seq_len": "the context length",
        "seed": "the seed",
        "global_batch": "the number of sequences per step",
        "mask_documents": "the masking across documents",
    }[name]
    return f"cannot resume: {what} has changed (checkpoint: {saved}, now: {now}). Restore it, or start a new run."
