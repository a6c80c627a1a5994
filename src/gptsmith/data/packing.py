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
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.conversations import Example
from gptsmith.data.loader import RowLoader, TokenBatch
from gptsmith.data.pictures import Picture, PictureReader
from gptsmith.errors import DataError, UsageError
from gptsmith.model.config import IGNORED

if TYPE_CHECKING:
    from gptsmith.model.vision import Images

_WIDTH_STEP = 64  # rows of a single example are padded to a multiple of this


class Examples(Sequence[Example]):
    """Examples in three flat arrays: a million short ones take some hundred MB. Only whole examples are kept."""

    def __init__(self, examples: Iterable[Example]) -> None:
        ids: list[NDArray[np.int32]] = []
        trained: list[NDArray[np.bool_]] = []
        self.images: list[tuple[Picture, ...]] = []
        for example in examples:
            self.images.append(example.images)
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
        return Example(self.ids[part].tolist(), self.trained[part].tolist(), self.images[index])

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
        for index, pictures in enumerate(self.images):
            for picture in pictures:
                digest.update(f"{index} {picture.key}\n".encode())
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


class PackedLoader(RowLoader[TokenBatch]):
    """Endless batches of packed examples: every row once in each epoch, in an order that depends on the seed.

    batch_size: B. seq_len: T, what an example without its last
    token must fit into. packing: False: one example per row, and rows as wide as the longest of a batch.
    picture_reader: how pictures are read. augment: vary them from epoch to epoch, as a function of seed and position.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        packing: bool = True,
        picture_reader: PictureReader | None = None,
        augment: bool = False,
    ) -> None:
        if not len(examples):
            raise DataError("there is no example to train on.")
        self.examples, self.seq_len, self.packing = examples, seq_len, packing
        self.picture_reader, self.augment = picture_reader, augment
        self.rows = pack(examples.lengths - 1, seq_len) if packing else [[i] for i in range(len(examples))]
        super().__init__(len(self.rows), batch_size=batch_size, seed=seed)

    @property
    def fill(self) -> float:
        """The share of the rows' positions that hold a token."""
        return float((self.examples.lengths - 1).sum()) / (len(self.rows) * self.seq_len)

    def batch_at(self, position: int) -> TokenBatch:
        return self._batch(self.order_at(position), (self.seed, position) if self.augment else None)

    def batch_of(self, rows: Sequence[int]) -> TokenBatch:
        return self._batch(rows, None)

    def _batch(self, rows: Sequence[int], variation: tuple[int, int] | None) -> TokenBatch:
        chosen = [self.rows[i] for i in rows]
        width = self.seq_len
        if not self.packing:
            longest = max(int(self.examples.lengths[i]) - 1 for row in chosen for i in row)
            width = min(self.seq_len, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
        return packed_batch(self.examples, chosen, width, self.picture_reader, variation)

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": self.examples.fingerprint(),
            "rows": len(self.rows),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "packing": self.packing,
            **({"augment": True} if self.augment else {}),
        }


def packed_batch(
    examples: Examples,
    rows: Sequence[Sequence[int]],
    width: int,
    picture_reader: PictureReader | None = None,
    variation: tuple[int, int] | None = None,
) -> TokenBatch:
    """Return rows of examples as a batch (B, width). Padding is a document of its own, -1, without targets.

    picture_reader: of the pictures of the examples. variation: numbers that augmentation follows from; None: none.
    Raises DataError where a row's image tokens are not those of its pictures.
    """
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
    images = _images_of(examples, rows, ids, picture_reader, variation)
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(documents), images)


def _images_of(
    examples: Examples,
    rows: Sequence[Sequence[int]],
    ids: NDArray[np.int64],
    picture_reader: PictureReader | None,
    variation: tuple[int, int] | None,
) -> Images | None:
    """Return the pictures of packed rows, whose number must be that of their tokens in ids (B, T)."""
    pictures = [[picture for index in row for picture in examples.images[index]] for row in rows]
    if picture_reader is None:
        if any(pictures):
            raise DataError("the examples have pictures, and this model reads none.")
        return None
    for row, found in zip(ids, pictures, strict=True):
        tokens, expected = int((row == picture_reader.token_id).sum()), len(found) * picture_reader.processor.tokens
        if tokens != expected:
            raise DataError(f"a row has {tokens:,} image tokens for {len(found)} pictures, which need {expected:,}.")
    if not any(pictures):
        return None

    from gptsmith.model.vision import Images

    numbers = tuple(row for row, found in enumerate(pictures) for _ in found)
    return Images(picture_reader.pixels([picture for found in pictures for picture in found], variation), numbers)
