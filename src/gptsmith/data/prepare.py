"""Tokenize text once, in parallel and in bounded memory, into the files that `shards` opens.

Threads do the work: the tokenizers library and numpy let go of Python's global lock while they are busy, so every core
is used without a process each (whose memory, start-up time and need for an importable main script would be the user's).
At most `workers + 2` stretches of text are in memory at once.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.shards import FORMAT_VERSION, INDEX_FILE, START_DTYPE, Dataset, open_dataset
from gptsmith.data.sources import PIECE_CHARACTERS, Piece, Source
from gptsmith.errors import DataError, GptsmithError, TokenizerError, UsageError
from gptsmith.log import note, progress
from gptsmith.runtime import available_cores, cache_directory
from gptsmith.storage import TEMPORARY_PREFIX, atomic_directory, explain_os_errors

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27  # tokens in one file: 256 MB as uint16
MOST_WORKERS = 16
LONGEST_CHARACTER = 8  # tokens looked at for the end of a character that spans several


def prepare(
    train: Source,
    tokenizer: Tokenizer,
    *,
    val: Source | None = None,
    val_fraction: float = 0.1,
    workers: int | None = None,
) -> Dataset:
    """Tokens of `train`, split into training and validation, ready to be read; from the cache if they were made before.

    val: validation text; all of `train` is then trained on, and `val_fraction` plays no part.
    val_fraction: the share of tokens, at the end, that is held out otherwise: 0 (none) to 0.5. The cut is between
        two documents if one ends near there, else between two characters.
    workers: threads; all cores by default.

    Raises UsageError for a fraction out of range, DataError for text that cannot be read or split, TokenizerError for
    text that the tokenizer cannot encode. Whatever happens, the cache holds whole datasets only.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"the number of workers must be at least 1, not {workers}.")
    if val is None and not 0 <= val_fraction <= 0.5:
        raise UsageError(f"the fraction for validation must be between 0 and 0.5, not {val_fraction}. 0.1 is usual.")
    job = _Job(train, val, tokenizer, val_fraction, workers or min(available_cores(), MOST_WORKERS))
    directory = cache_directory() / "prepared" / job.key[:40]
    if (dataset := _opened(directory)) is not None:
        return dataset
    with _alone(directory):
        if (dataset := _opened(directory)) is not None:  # another process has made it meanwhile
            return dataset
        shutil.rmtree(directory, ignore_errors=True)
        try:
            with atomic_directory(directory) as temporary:
                job.write(temporary)
        except (OSError, GptsmithError):
            if (dataset := _opened(directory)) is None:  # no lock on this file system, and another process was faster
                raise
    return open_dataset(directory)


def _opened(directory: Path) -> Dataset | None:
    """The dataset that is there, or None if there is none that can be used."""
    if not directory.exists():
        return None
    try:
        return open_dataset(directory)
    except DataError as error:
        note(f"preparing again: {error}")
        return None


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let one process at a time prepare `directory`, and remove what one that was killed has left of it.

    Uses a lock that the system drops with its process. Where there is none (Windows, some network disks) two processes
    may do the same work; the one that finishes first wins.
    """
    with explain_os_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = open(directory.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
    with lock:
        locked = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        if locked:
            for left in directory.parent.glob(f"{TEMPORARY_PREFIX}*-{directory.name}"):
                shutil.rmtree(left, ignore_errors=True)
        yield


class _Counts(NamedTuple):
    """Sizes of a stretch of text."""

    tokens: int
    bytes: int
    chars: int


NOTHING = _Counts(0, 0, 0)


@dataclass(frozen=True)
class _Encoded:
    """A tokenized stretch: (tokens,) ids with separators, and the offsets at which documents have ended, (ended,)."""

    ids: NDArray[Any]
    ends: NDArray[np.int64]
    counts: _Counts
    blank: bool


@dataclass(frozen=True)
class _Split:
    """A range of the tokens of one text."""

    text: str
    start: int
    stop: int
    bytes: int
    chars: int


class _Job:
    """One dataset to be made."""

    def __init__(self, train: Source, val: Source | None, tokenizer: Tokenizer, fraction: float, workers: int) -> None:
        self.train, self.val, self.tokenizer = train, val, tokenizer
        self.fraction = 0.0 if val is not None else fraction
        self.workers = workers
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        texts = [source.fingerprint() for source in self._sources()]
        identity = {
            "format": FORMAT_VERSION,
            "texts": texts,
            "tokenizer": tokenizer.fingerprint,
            "val_fraction": self.fraction,
        }
        if val is not None and texts[0] == texts[1]:
            note("the validation text is the training text itself: its loss says nothing about other text.")
        self._check_unchanged()
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _sources(self) -> list[Source]:
        return [self.train] if self.val is None else [self.train, self.val]

    def write(self, directory: Path) -> None:
        """Write the files and their index into the empty `directory`."""
        texts = {"train": self._write_text(directory, "train", self.train)}
        if self.val is None:
            splits = self._cut(directory, texts["train"])
        else:
            texts["val"] = self._write_text(directory, "val", self.val)
            splits = {name: text.range(NOTHING, text.total) for name, text in texts.items()}
        self._check_unchanged()
        index = {
            "format": FORMAT_VERSION,
            "fingerprint": self.key,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "sources": [source.spec for source in self._sources()],
            "texts": {name: text.index() for name, text in texts.items()},
            "splits": {name: asdict(split) for name, split in splits.items()},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _check_unchanged(self) -> None:
        for source in self._sources():
            if not source.unchanged():
                raise DataError(f"{source.spec} was changed while it was read. Try again when nothing writes to it.")

    def _write_text(self, directory: Path, name: str, source: Source) -> _Text:
        text = _Text(directory, name, self.dtype)
        blank = True
        with text, progress(source.size_bytes, f"tokenizing {source.name}", "B") as bar:
            read = _Backlog()  # text that was read is done only once it is tokenized
            stretches = ((stretch, read.taken()) for stretch in _stretches(source.pieces(read.add)))
            with contextlib.closing(_parallel(self._encode, stretches, self.workers)) as results:
                for encoded, size in results:
                    text.append(encoded)
                    blank = blank and encoded.blank
                    bar.advance(size)
        if blank:
            raise DataError(f"{source.spec} holds no text: it has nothing but white space.")
        return text

    def _encode(self, pieces: list[Piece]) -> _Encoded:
        texts = [piece.text for piece in pieces]
        ids: list[NDArray[Any]] = []
        try:
            if self.tokenizer.kind == "char":
                for text in texts:
                    ids.append(self.tokenizer.encode_array(text))  # noqa: PERF401 (a failure must tell which)
            else:
                ids = [np.asarray(each, self.dtype) for each in self.tokenizer.encode_batch(texts)]
        except TokenizerError as error:
            raise TokenizerError(f"{pieces[len(ids)].where}: {error}") from None
        eos = self.tokenizer.eos_id
        separator = np.array([] if eos is None else [eos], self.dtype)
        parts: list[NDArray[Any]] = []
        ends: list[int] = []
        total = 0
        for piece, part in zip(pieces, ids, strict=True):
            parts.append(part)
            total += len(part)
            if piece.ends_document:
                parts.append(separator)
                total += len(separator)
                ends.append(total)
        return _Encoded(
            ids=np.concatenate(parts).astype(self.dtype, copy=False),
            ends=np.array(ends, np.int64),
            counts=_Counts(total, sum(_utf8_length(text) for text in texts), sum(map(len, texts))),
            blank=all(text.isspace() for text in texts),
        )

    def _cut(self, directory: Path, text: _Text) -> dict[str, _Split]:
        """Training and validation ranges: the last `fraction` of the tokens is held out."""
        total = text.total.tokens
        if not self.fraction:
            return {"train": text.range(NOTHING, text.total), "val": text.range(text.total, text.total)}
        target = int(total * (1 - self.fraction))
        if min(target, total - target) < 2:
            raise DataError(
                f"{self.train.spec} is too short to hold out {self.fraction:g} of it: it has {total:,} tokens. "
                "Use more text, or another validation fraction."
            )
        # np.memmap, not an array: there may be more documents than fit into memory
        starts: NDArray[np.int64] = np.memmap(directory / text.documents_file, dtype=START_DTYPE, mode="r")
        after = int(np.searchsorted(starts, target))
        near = [int(start) for start in starts[max(1, after - 1) : after + 1]]
        near = [start for start in near if 0.5 <= (total - start) / (total - target) <= 1.5]
        if near:  # documents stay whole
            cut = self._counts_before(directory, text, min(near, key=lambda start: abs(start - target)))
        else:  # one text, or a few long ones
            forwards = range(target, min(target + LONGEST_CHARACTER, total))
            backwards = range(target - 1, max(target - LONGEST_CHARACTER, 0), -1)  # the text may end with the character
            cut = next(
                (
                    counts
                    for place in itertools.chain(forwards, backwards)
                    if (counts := self._exact_counts_before(directory, text, place)) is not None
                ),
                None,
            ) or self._counts_before(directory, text, target)
        return {"train": text.range(NOTHING, cut), "val": text.range(cut, text.total)}

    def _counts_before(self, directory: Path, text: _Text, place: int) -> _Counts:
        """Bytes and characters that the first `place` tokens stand for; if the tokenizer loses text, nearly."""
        exact = self._exact_counts_before(directory, text, place)
        if exact is not None:
            return exact
        before, stretch = text.stretch_at(place)
        share = (place - before.tokens) / stretch.tokens
        return _Counts(place, before.bytes + round(share * stretch.bytes), before.chars + round(share * stretch.chars))

    def _exact_counts_before(self, directory: Path, text: _Text, place: int) -> _Counts | None:
        """The same, or None if `place` is inside a character or the text cannot be had back from the tokens."""
        before, stretch = text.stretch_at(place)
        ids = text.read(directory, before.tokens, before.tokens + stretch.tokens).tolist()
        head = self.tokenizer.decode(ids[: place - before.tokens])
        tail = self.tokenizer.decode(ids[place - before.tokens :])
        whole = self.tokenizer.decode(ids)
        if head + tail != whole or (len(whole), _utf8_length(whole)) != (stretch.chars, stretch.bytes):
            return None
        return _Counts(place, before.bytes + _utf8_length(head), before.chars + len(head))


class _Text:
    """The files of one tokenized text while they are written, and what the index will say of them."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.name, self.dtype = name, dtype
        self.stretches: list[_Counts] = []  # one for every stretch of PIECE_CHARACTERS or so
        self.total = NOTHING
        self.documents_file = f"{name}-documents.bin"
        self._directory = directory
        self._shards: list[_File] = []
        self._documents = _File(directory / self.documents_file)
        self._in_document = False

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *_: object) -> None:
        for file in [*self._shards, self._documents]:
            file.close()

    def append(self, encoded: _Encoded) -> None:
        counts = encoded.counts
        if not counts.tokens:
            return
        starts = encoded.ends[encoded.ends < counts.tokens]  # a document that ends here is followed by another
        if not self._in_document:
            starts = np.concatenate([np.zeros(1, np.int64), starts])
        self._documents.write((starts + self.total.tokens).astype(START_DTYPE))
        self._in_document = not len(encoded.ends) or int(encoded.ends[-1]) < counts.tokens
        self.stretches.append(counts)
        self.total = _plus(self.total, counts)
        ids = encoded.ids
        while len(ids):
            if not self._shards or self._shards[-1].count == SHARD_TOKENS:
                if self._shards:
                    self._shards[-1].close()
                self._shards.append(_File(self._directory / f"{self.name}-{len(self._shards):05}.bin"))
            room = SHARD_TOKENS - self._shards[-1].count
            self._shards[-1].write(ids[:room])
            ids = ids[room:]

    def stretch_at(self, place: int) -> tuple[_Counts, _Counts]:
        """What lies before the stretch that holds token `place`, and the size of that stretch."""
        before = NOTHING
        for counts in self.stretches:
            if place < before.tokens + counts.tokens:
                return before, counts
            before = _plus(before, counts)
        raise IndexError(place)

    def read(self, directory: Path, start: int, stop: int) -> NDArray[Any]:
        """Ids [start, stop), read back from the finished files."""
        parts, low = [], 0
        for shard in self._shards:
            first, last = max(start, low) - low, min(stop, low + shard.count) - low
            if first < last:
                offset = first * self.dtype.itemsize
                parts.append(np.fromfile(directory / shard.path.name, self.dtype, count=last - first, offset=offset))
            low += shard.count
        return np.concatenate(parts)

    def range(self, start: _Counts, stop: _Counts) -> _Split:
        return _Split(self.name, start.tokens, stop.tokens, stop.bytes - start.bytes, stop.chars - start.chars)

    def index(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype.str,
            "shards": [shard.index() for shard in self._shards],
            "documents": self._documents.index(),
        }


class _File:
    """A file of numbers that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 (closed by its owner)

    def write(self, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.count += len(values)

    def close(self) -> None:
        self._file.close()

    def index(self) -> dict[str, Any]:
        return {"file": self.path.name, "count": self.count, "sha256": self._digest.hexdigest()}


class _Backlog:
    """Bytes read ahead of the tokenization."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, amount: int) -> None:
        self._bytes += amount

    def taken(self) -> int:
        amount, self._bytes = self._bytes, 0
        return amount


def _stretches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces by the handful, so that short documents are worth a thread's while."""
    gathered: list[Piece] = []
    size = 0
    for piece in pieces:
        if gathered and size + len(piece.text) > PIECE_CHARACTERS:
            yield gathered
            gathered, size = [], 0
        gathered.append(piece)
        size += len(piece.text) + 64  # a document's own cost
    if gathered:
        yield gathered


def _parallel(
    work: Callable[[list[Piece]], _Encoded], items: Iterable[tuple[list[Piece], int]], workers: int
) -> Generator[tuple[_Encoded, int], None, None]:
    """`work` done on the items by threads; results in order, with only a few items in flight."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gptsmith-tokenize")
    waiting: collections.deque[tuple[Future[_Encoded], int]] = collections.deque()
    try:
        for pieces, size in items:
            waiting.append((pool.submit(work, pieces), size))
            if len(waiting) >= workers + 2:
                future, done = waiting.popleft()
                yield future.result(), done
        while waiting:
            future, done = waiting.popleft()
            yield future.result(), done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _plus(a: _Counts, b: _Counts) -> _Counts:
    return _Counts(a.tokens + b.tokens, a.bytes + b.bytes, a.chars + b.chars)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
