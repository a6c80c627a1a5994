"""Prepared text on disk: memory-mapped token shards with an index of documents.

A prepared directory holds `dataset.json` and the little-endian files it names: for each text, one or more shards of
token ids (uint16 if the vocabulary fits, else uint32) and the int64 offsets at which its documents begin. A split is a
range of the tokens of one text, so training and validation may share files but never a token.

Axes: B batch, T time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptsmith.errors import DataError
from gptsmith.storage import sha256_file

FORMAT_VERSION = 1
INDEX_FILE = "dataset.json"
START_DTYPE = np.dtype("<i8")


class TokenSplit:
    """A read-only range of token ids in one or more shards, with the documents in it.

    num_bytes, num_chars: size of its text as UTF-8 bytes and as characters (for bits per byte).
    An empty split (without validation) is falsy.
    """

    def __init__(
        self,
        shards: Sequence[NDArray[Any]],
        starts: NDArray[np.int64],
        *,
        start: int = 0,
        stop: int | None = None,
        num_bytes: int = 0,
        num_chars: int = 0,
        fingerprint: str = "",
    ) -> None:
        """Create a split of the tokens [start, stop) of all shards.

        shards: 1-D arrays of ids. starts: the offsets, over all shards, at which documents begin.
        """
        self._shards = [np.asarray(shard) for shard in shards]  # plain arrays: indexing a memmap is slow
        self._bounds = np.cumsum([0, *map(len, shards)], dtype=np.int64)
        self._starts = np.asarray(starts)
        self._start = start
        self._stop = int(self._bounds[-1]) if stop is None else stop
        if not 0 <= self._start <= self._stop <= self._bounds[-1]:
            raise ValueError(f"range [{start}, {stop}) is outside the {self._bounds[-1]} tokens of the shards")
        self.num_bytes, self.num_chars, self.fingerprint = num_bytes, num_chars, fingerprint

    @classmethod
    def from_array(cls, tokens: NDArray[Any], document_starts: Sequence[int] = (0,), **sizes: Any) -> TokenSplit:
        """Create a split over ids in memory."""
        return cls([np.asarray(tokens)], np.asarray(document_starts, dtype=np.int64), **sizes)

    def __len__(self) -> int:
        return self._stop - self._start

    def __repr__(self) -> str:
        return f"TokenSplit({len(self):,} tokens, {self.num_documents:,} documents)"

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """The offsets within this split at which documents begin: (documents,) int64, increasing, the first is 0.

        If a split begins inside a document, the rest of that document is its first one.
        """
        first, last = np.searchsorted(self._starts, (self._start, self._stop))
        starts = self._starts[first:last]
        if self._start == 0 or len(self) == 0:
            return starts
        starts = starts - self._start
        return starts if len(starts) and starts[0] == 0 else np.concatenate([np.zeros(1, np.int64), starts])

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    def tokens(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return ids [start, stop) of this split, (stop - start,) uint16 or uint32. The array may be read-only."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a split of {len(self)}")
        start, stop = start + self._start, stop + self._start
        first = max(0, int(np.searchsorted(self._bounds, start, side="right")) - 1)
        parts = []
        for shard, low in zip(self._shards[first:], self._bounds[first:].tolist(), strict=False):
            if low >= stop:
                break
            parts.append(shard[max(0, start - low) : stop - low])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """Return the ids of the B windows [s, s + length) for s in `starts`, as (B, length) of the stored type."""
        if len(starts) and (int(starts.min()) < 0 or int(starts.max()) + length > len(self)):
            raise IndexError(f"a window of {length} tokens reaches outside a split of {len(self)}")
        absolute = starts + self._start
        steps = np.arange(length)
        found: NDArray[Any]
        if len(self._shards) == 1:
            found = self._shards[0][absolute[:, None] + steps]
            return found
        found = np.empty((len(starts), length), self._shards[0].dtype)
        shard_of = np.searchsorted(self._bounds, absolute, side="right") - 1
        crosses_shards = absolute + length > self._bounds[1:][shard_of]
        for shard in np.unique(shard_of[~crosses_shards]).tolist():
            rows = np.flatnonzero((shard_of == shard) & ~crosses_shards)
            found[rows] = self._shards[shard][(absolute[rows] - self._bounds[shard])[:, None] + steps]
        for row in np.flatnonzero(crosses_shards).tolist():
            found[row] = self.tokens(int(starts[row]), int(starts[row]) + length)
        return found

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of the document at each position of this split, in the shape of `positions`."""
        return np.searchsorted(self.document_starts, positions, side="right") - 1


@dataclass(frozen=True)
class UnknownText:
    """What a tokenizer does not know of a text.

    left_out: whether the tokenizer leaves such text out, because it has no unknown token. count: the number of unknown
    tokens, or of characters that are left out. total: the number of all tokens (without separators), or of all
    characters. parts: the most frequent parts of the text that are unknown, with their counts.
    """

    count: int
    total: int
    parts: Mapping[str, int]
    left_out: bool = False

    @property
    def share(self) -> float:
        return self.count / max(1, self.total)


@dataclass(frozen=True)
class Dataset:
    """Prepared text: a training and a validation split that share no token. See `open_dataset` and `prepare`.

    unknown: what is unknown of each text ("train", "val"); a text is missing if it was prepared by a version of this
    package that did not count it. skipped_rows: what to say about rows of each text that were left out, "" for none.
    """

    directory: Path
    fingerprint: str
    vocab_size: int
    tokenizer_fingerprint: str
    train: TokenSplit
    val: TokenSplit
    unknown: Mapping[str, UnknownText] = field(default_factory=dict)
    skipped_rows: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_train(self) -> int:
        return self.train.num_bytes

    @property
    def bytes_val(self) -> int:
        return self.val.num_bytes

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""
        return {
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "train_bytes": self.bytes_train,
            "val_bytes": self.bytes_val,
        }

    def summary(self) -> str:
        """Return the sizes in words."""
        characters, total = self.train.num_chars + self.val.num_chars, len(self.train) + len(self.val)
        return f"{characters:,} characters, {total:,} tokens, {len(self.val):,} of them held out"


def open_dataset(directory: Path, *, verify: bool = False) -> Dataset:
    """Open the directory that `prepare` wrote, without reading the tokens.

    verify: also read every file and check its sha256. File sizes are always checked.
    Raises DataError if anything is missing, damaged or of another format version.
    """
    directory = Path(directory)
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        if index["format"] != FORMAT_VERSION:
            raise DataError(f"{directory} was prepared by another version of gptsmith. Prepare the text again.")
        texts = {name: _open_text(directory, text, verify) for name, text in index["texts"].items()}
        splits = {
            name: _open_split(texts, split, f"{index['fingerprint']}-{name}") for name, split in index["splits"].items()
        }
        return Dataset(
            directory=directory,
            fingerprint=index["fingerprint"],
            vocab_size=index["vocab_size"],
            tokenizer_fingerprint=index["tokenizer_fingerprint"],
            train=splits["train"],
            val=splits["val"],
            unknown={
                name: UnknownText(**text["unknown"]) for name, text in index["texts"].items() if "unknown" in text
            },
            skipped_rows={name: text.get("skipped_rows", "") for name, text in index["texts"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the prepared data in {directory} are missing or damaged ({error}). Prepare the text again."
        ) from None


def _open_text(directory: Path, text: dict[str, Any], verify: bool) -> tuple[list[NDArray[Any]], NDArray[np.int64]]:
    dtype = np.dtype(text["dtype"])
    shards = [_open_array(directory, entry, dtype, verify) for entry in text["shards"]]
    return shards, _open_array(directory, text["documents"], START_DTYPE, verify)


def _open_array(directory: Path, entry: dict[str, Any], dtype: np.dtype[Any], verify: bool) -> NDArray[Any]:
    path = directory / entry["file"]
    expected = entry["count"] * dtype.itemsize
    if (size := path.stat().st_size) != expected:
        raise DataError(f"{path} is damaged: it has {size:,} bytes, not {expected:,}. Prepare the text again.")
    if verify and sha256_file(path) != entry["sha256"]:
        raise DataError(f"{path} is damaged: its content has changed since it was written. Prepare the text again.")
    if not expected:  # an empty file cannot be memory-mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _open_split(texts: dict[str, Any], split: dict[str, Any], fingerprint: str) -> TokenSplit:
    shards, starts = texts[split["text"]]
    return TokenSplit(
        shards,
        starts,
        start=split["start"],
        stop=split["stop"],
        num_bytes=split["bytes"],
        num_chars=split["chars"],
        fingerprint=fingerprint,
    )
