"""Tokenize text once, in parallel and in bounded memory, into the files that `shards` opens.

The work is done by threads: the tokenizers library and numpy release Python's global lock, so threads use every core
without the memory and start-up time of processes. At most `workers + 2` batches of text are in memory at once.

Text that the tokenizer does not know never goes unnoticed. If it becomes unknown tokens or is left out (some byte-level
tokenizers lack rare bytes), the amount is printed with the most frequent characters or words, and more than MAX_UNKNOWN
of the text is an error unless it is allowed. Text that cannot be encoded at all is always an error.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptsmith.data.shards import FORMAT_VERSION, INDEX_FILE, START_DTYPE, Dataset, UnknownText, open_dataset
from gptsmith.data.sources import CHUNK_CHARACTERS, DocumentChunk, Source
from gptsmith.errors import DataError, GptsmithError, TokenizerError, UsageError
from gptsmith.log import note, progress
from gptsmith.runtime import available_cores, cache_directory
from gptsmith.storage import TEMPORARY_PREFIX, atomic_directory, explain_os_errors
from gptsmith.tokenizer.tokenizer import UnknownTextError

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27  # tokens per file: 256 MB as uint16
MAX_WORKERS = 16
MAX_TOKENS_PER_CHARACTER = 8  # how far to look for the end of a character that consists of several tokens
MAX_UNKNOWN = 0.01  # the share of unknown text above which a tokenizer does not fit the text
MAX_UNKNOWN_PARTS = 1000  # different unknown characters or words whose occurrences are counted
MAX_EXAMPLES = 5  # of them that a message names
ENOUGH_UNKNOWN = 10_000  # characters without a token after which the rest of the text is not read


def prepare(
    train: Source,
    tokenizer: Tokenizer,
    *,
    val: Source | None = None,
    val_fraction: float = 0.1,
    workers: int | None = None,
    allow_unknown: bool = False,
) -> Dataset:
    """Tokenize `train` and split it into training and validation. Reuse the cached result if there is one.

    val: validation text; if given, all of `train` is for training, and `val_fraction` is ignored.
    val_fraction: otherwise, the share of tokens at the end of `train` to hold out, from 0 (none) to 0.5. The cut is
        between two documents if a document ends nearby, else between two characters.
    workers: number of threads, by default one per core.
    allow_unknown: accept a text of which the tokenizer does not know more than MAX_UNKNOWN.

    Raises UsageError for a fraction out of range, DataError for text that cannot be read or split, TokenizerError for
    text that the tokenizer cannot encode, or knows too little of. The cache never holds an incomplete dataset.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"the number of workers must be at least 1, not {workers}.")
    if val is None and not 0 <= val_fraction <= 0.5:
        raise UsageError(f"the fraction for validation must be between 0 and 0.5, not {val_fraction}. 0.1 is usual.")
    job = _Job(train, val, tokenizer, val_fraction, workers or min(available_cores(), MAX_WORKERS))
    dataset = _prepared(job, prepared_directory(job.key))
    for source, name in zip(job.sources, ("train", "val"), strict=False):
        if skipped := dataset.skipped_rows.get(name):
            note(f"{source.spec}: {skipped}")
        if (unknown := dataset.unknown.get(name)) is not None and unknown.count:
            _report_unknown(source, unknown, allow_unknown)
    return dataset


def prepared_directory(fingerprint: str) -> Path:
    """Return where the dataset with this fingerprint is kept, whether it is there or not."""
    return cache_directory() / "prepared" / fingerprint[:40]


def _prepared(job: _Job, directory: Path) -> Dataset:
    """Open the dataset in `directory`, making it first if necessary."""
    if (dataset := _open_cached(directory, job.tokenizer)) is not None:
        return dataset
    with _exclusive(directory):
        if (dataset := _open_cached(directory, job.tokenizer)) is not None:  # made by another process meanwhile
            return dataset
        shutil.rmtree(directory, ignore_errors=True)
        try:
            with atomic_directory(directory) as temporary:
                job.write(temporary)
        except (OSError, GptsmithError):
            # Without locks on this file system, another process may have been faster.
            if (dataset := _open_cached(directory, job.tokenizer)) is None:
                raise
    return open_dataset(directory)


def _open_cached(directory: Path, tokenizer: Tokenizer) -> Dataset | None:
    """Return the dataset in `directory`, or None if there is none that can be used."""
    if not directory.exists():
        return None
    try:
        dataset = open_dataset(directory)
    except DataError as error:
        note(f"preparing again: {error}")
        return None
    may_lose_text = not tokenizer.covers_all_text and (tokenizer.kind != "char" or tokenizer.replaces_unknown)
    if may_lose_text and not dataset.unknown:
        note("preparing again: unknown tokens were not counted by an earlier version of gptsmith.")
        return None
    return dataset


def _report_unknown(source: Source, unknown: UnknownText, allowed: bool) -> None:
    """Print how much of a text is unknown. Raise TokenizerError if it is too much."""
    if unknown.left_out:
        what = f"{_describe(unknown, 'characters')} have no token and are left out"
    else:
        what = f"{_describe(unknown, 'tokens')} are unknown to the tokenizer"
    text = f"{source.spec}: {what}: {_examples(unknown)}."
    if unknown.share > MAX_UNKNOWN and not allowed:
        raise TokenizerError(
            f"{text} A tokenizer that does not know more than {MAX_UNKNOWN:.0%} of a text does not fit it. Use a "
            "tokenizer made for such text, or a byte-level one, or allow unknown text with --unknown."
        )
    note(text)


def _describe(unknown: UnknownText, units: str) -> str:
    share = f"{100 * unknown.share:.2g}%" if unknown.share < 0.995 else f"{unknown.share:.0%}"
    return f"{unknown.count:,} of {unknown.total:,} {units} ({share})"


def _examples(unknown: UnknownText) -> str:
    """The most frequent unknown parts of a text, for messages."""

    def example(part: str, count: int) -> str:
        shown = repr(part if len(part) <= 20 else part[:20] + "\u2026")
        code = f" (U+{ord(part):04X})" if len(part) == 1 else ""
        return f"{shown}{code} {'once' if count == 1 else f'{count:,} times'}"

    shown = [example(part, count) for part, count in itertools.islice(unknown.parts.items(), MAX_EXAMPLES)]
    return ", ".join(shown) + (", and others" if len(unknown.parts) > MAX_EXAMPLES else "")


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Let one process at a time prepare `directory`, and remove what killed processes left of it.

    Uses a lock that the system releases when its process ends. Where there are no such locks (Windows, some network
    disks) two processes may do the same work; the one that finishes first wins.
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
    """Sizes of a text, or of a part of one."""

    tokens: int
    bytes: int
    chars: int


NOTHING = _Counts(0, 0, 0)


@dataclass(frozen=True)
class _Encoded:
    """A tokenized batch of chunks.

    ids: (tokens,), with separators. ends: (documents,) int64, the offsets in ids at which documents end. unknown: the
    parts of the text that became unknown tokens, were left out or could not be encoded. cannot_encode: the message for
    the first part that could not be encoded, or "".
    """

    ids: NDArray[Any]
    ends: NDArray[np.int64]
    counts: _Counts
    is_blank: bool
    unknown: Counter[str]
    cannot_encode: str


@dataclass(frozen=True)
class _Split:
    """A range of the tokens of one text."""

    text: str
    start: int
    stop: int
    bytes: int
    chars: int


class _Job:
    """The preparation of one dataset. key: the sha256 (hex) of everything that it depends on."""

    def __init__(self, train: Source, val: Source | None, tokenizer: Tokenizer, fraction: float, workers: int) -> None:
        self.train, self.val, self.tokenizer = train, val, tokenizer
        self.fraction = 0.0 if val is not None else fraction
        self.workers = workers
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.sources = [train] if val is None else [train, val]
        texts = [source.fingerprint() for source in self.sources]
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
            "sources": [source.spec for source in self.sources],
            "texts": {name: text.index() for name, text in texts.items()},
            "splits": {name: asdict(split) for name, split in splits.items()},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _check_unchanged(self) -> None:
        for source in self.sources:
            if not source.unchanged():
                raise DataError(f"{source.spec} was changed while it was read. Try again when nothing writes to it.")

    def _write_text(self, directory: Path, name: str, source: Source) -> _Text:
        text = _Text(directory, name, self.dtype, left_out=not self.tokenizer.replaces_unknown)
        is_blank, cannot_encode, whole = True, "", True
        with text, progress(source.size_bytes, f"tokenizing {source.name}", "B") as bar:
            read = _Backlog()  # progress counts text when it is tokenized, not when it is read
            batches = ((batch, read.taken()) for batch in _batches(source.chunks(read.add)))
            with contextlib.closing(_parallel(self._encode, batches, self.workers)) as results:
                for encoded, size in results:
                    text.append(encoded)
                    is_blank = is_blank and encoded.is_blank
                    cannot_encode = cannot_encode or encoded.cannot_encode
                    bar.advance(size)
                    if cannot_encode and text.num_unknown >= ENOUGH_UNKNOWN:
                        whole = False
                        break
        if cannot_encode:
            if not text.num_unknown:
                raise UnknownTextError(cannot_encode)
            unknown = text.unknown_text()
            raise UnknownTextError(
                f"{cannot_encode} {'In all' if whole else 'Up to where reading was stopped'}, "
                f"{_describe(unknown, 'characters')} have no token: {_examples(unknown)}."
            )
        text.skipped_rows = source.skipped_rows.describe()
        if is_blank:
            why = text.skipped_rows or "it has nothing but white space"
            raise DataError(f"{source.spec} holds no text: {why}.")
        return text

    def _encode(self, chunks: list[DocumentChunk]) -> _Encoded:
        texts = [chunk.text for chunk in chunks]
        ids, unknown, cannot_encode = self._ids(chunks)
        eos = self.tokenizer.eos_id
        separator = np.array([] if eos is None else [eos], self.dtype)
        parts: list[NDArray[Any]] = []
        ends: list[int] = []
        total = 0
        for chunk, part in zip(chunks, ids, strict=True):
            parts.append(part)
            total += len(part)
            if chunk.ends_document:
                parts.append(separator)
                total += len(separator)
                ends.append(total)
        return _Encoded(
            ids=np.concatenate(parts).astype(self.dtype, copy=False),
            ends=np.array(ends, np.int64),
            counts=_Counts(total, sum(_utf8_length(text) for text in texts), sum(map(len, texts))),
            is_blank=all(text.isspace() for text in texts),
            unknown=unknown,
            cannot_encode=cannot_encode,
        )

    def _ids(self, chunks: list[DocumentChunk]) -> tuple[list[NDArray[Any]], Counter[str], str]:
        """Return the ids of each chunk, and what of the text is unknown (see `_Encoded`)."""
        tokenizer, unknown, cannot_encode = self.tokenizer, Counter[str](), ""
        ids: list[NDArray[Any]] = []
        if tokenizer.kind != "char":
            with contextlib.suppress(TokenizerError):  # which chunk it was is found below
                texts = [chunk.text for chunk in chunks]
                ids = [np.asarray(each, self.dtype) for each in tokenizer.encode_batch(texts)]
        for chunk in chunks[len(ids) :]:
            try:
                ids.append(tokenizer.encode_array(chunk.text))
            except UnknownTextError as error:
                cannot_encode = cannot_encode or f"{chunk.where}: {error.problem}"
                ids.append(np.zeros(0, self.dtype))
            except TokenizerError as error:
                raise TokenizerError(f"{chunk.where}: {error}") from None
        for chunk, part in zip(chunks, ids, strict=True):
            if tokenizer.covers_all_text or (tokenizer.replaces_unknown and not (part == tokenizer.unk_id).any()):
                continue
            if tokenizer.kind != "char" or tokenizer.replaces_unknown or cannot_encode:
                unknown += tokenizer.count_unknown(chunk.text)
        return ids, unknown, cannot_encode

    def _cut(self, directory: Path, text: _Text) -> dict[str, _Split]:
        """Return the training and validation ranges: the last `fraction` of the tokens is held out."""
        total = text.total.tokens
        if not self.fraction:
            return {"train": text.range(NOTHING, text.total), "val": text.range(text.total, text.total)}
        target = int(total * (1 - self.fraction))
        if min(target, total - target) < 2:
            raise DataError(
                f"{self.train.spec} is too short to hold out {self.fraction:g} of it: it has {total:,} tokens. "
                "Use more text, or another validation fraction."
            )
        # A memmap, because the offsets of the documents may not fit into memory.
        starts: NDArray[np.int64] = np.memmap(directory / text.documents_file, dtype=START_DTYPE, mode="r")
        after = int(np.searchsorted(starts, target))
        near = [int(start) for start in starts[max(1, after - 1) : after + 1]]
        near = [start for start in near if 0.5 <= (total - start) / (total - target) <= 1.5]
        if near:  # between two documents
            cut = self._counts_before(directory, text, min(near, key=lambda start: abs(start - target)))
        else:  # one document, or a few long ones
            forwards = range(target, min(target + MAX_TOKENS_PER_CHARACTER, total))
            backwards = range(target - 1, max(target - MAX_TOKENS_PER_CHARACTER, 0), -1)  # in case the text ends first
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
        """Return the bytes and characters that the first `place` tokens stand for.

        They are estimated if the text cannot be decoded from the tokens.
        """
        exact = self._exact_counts_before(directory, text, place)
        if exact is not None:
            return exact
        before, batch = text.batch_at(place)
        share = (place - before.tokens) / batch.tokens
        return _Counts(place, before.bytes + round(share * batch.bytes), before.chars + round(share * batch.chars))

    def _exact_counts_before(self, directory: Path, text: _Text, place: int) -> _Counts | None:
        """Return the same, or None if `place` is inside a character or the text cannot be decoded from the tokens."""
        before, batch = text.batch_at(place)
        ids = text.read(directory, before.tokens, before.tokens + batch.tokens).tolist()
        head = self.tokenizer.decode(ids[: place - before.tokens])
        tail = self.tokenizer.decode(ids[place - before.tokens :])
        whole = self.tokenizer.decode(ids)
        if head + tail != whole or (len(whole), _utf8_length(whole)) != (batch.chars, batch.bytes):
            return None
        return _Counts(place, before.bytes + _utf8_length(head), before.chars + len(head))


class _Text:
    """The files of one tokenized text while they are written, and their entries in the index."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], *, left_out: bool) -> None:
        self.name, self.dtype = name, dtype
        self.batches: list[_Counts] = []  # each of about CHUNK_CHARACTERS
        self.total = NOTHING
        self.left_out = left_out  # whether unknown text is left out, and counted in characters
        self.num_unknown = 0
        self.unknown: Counter[str] = Counter()  # at most MAX_UNKNOWN_PARTS of what they stand for
        self.documents_file = f"{name}-documents.bin"
        self._directory = directory
        self._shards: list[_File] = []
        self._documents = _File(directory / self.documents_file)
        self.skipped_rows = ""  # what is said about rows that were left out
        self._in_document = False
        self._num_separators = 0

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *_: object) -> None:
        for file in [*self._shards, self._documents]:
            file.close()

    def append(self, encoded: _Encoded) -> None:
        counts = encoded.counts
        for part, count in encoded.unknown.items():
            self.num_unknown += count * (len(part) if self.left_out else 1)
            if part in self.unknown or len(self.unknown) < MAX_UNKNOWN_PARTS:
                self.unknown[part] += count
        if not counts.tokens:
            self.total = _plus(self.total, counts)
            return
        starts = encoded.ends[encoded.ends < counts.tokens]  # a document that ends here is followed by another
        if not self._in_document:
            starts = np.concatenate([np.zeros(1, np.int64), starts])
        self._documents.write((starts + self.total.tokens).astype(START_DTYPE))
        self._in_document = not len(encoded.ends) or int(encoded.ends[-1]) < counts.tokens
        self.batches.append(counts)
        self._num_separators += len(encoded.ends)
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

    def batch_at(self, place: int) -> tuple[_Counts, _Counts]:
        """Return the size of all batches before the one with token `place`, and the size of that batch."""
        before = NOTHING
        for counts in self.batches:
            if place < before.tokens + counts.tokens:
                return before, counts
            before = _plus(before, counts)
        raise IndexError(place)

    def read(self, directory: Path, start: int, stop: int) -> NDArray[Any]:
        """Read ids [start, stop) back from the finished files."""
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

    def unknown_text(self) -> UnknownText:
        total = self.total.chars if self.left_out else self.total.tokens - self._num_separators
        return UnknownText(self.num_unknown, total, dict(self.unknown.most_common(MAX_EXAMPLES + 1)), self.left_out)

    def index(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype.str,
            "shards": [shard.index() for shard in self._shards],
            "documents": self._documents.index(),
            "unknown": asdict(self.unknown_text()),
            "skipped_rows": self.skipped_rows,
        }


class _File:
    """A binary file of numbers that is hashed while it is written."""

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
    """The number of bytes that were read but not yet handed on."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, amount: int) -> None:
        self._bytes += amount

    def taken(self) -> int:
        amount, self._bytes = self._bytes, 0
        return amount


def _batches(chunks: Iterable[DocumentChunk]) -> Iterator[list[DocumentChunk]]:
    """Group short chunks, so that the work for a thread is not too small."""
    gathered: list[DocumentChunk] = []
    size = 0
    for chunk in chunks:
        if gathered and size + len(chunk.text) > CHUNK_CHARACTERS:
            yield gathered
            gathered, size = [], 0
        gathered.append(chunk)
        size += len(chunk.text) + 64  # the fixed cost per document
    if gathered:
        yield gathered


def _parallel(
    work: Callable[[list[DocumentChunk]], _Encoded], items: Iterable[tuple[list[DocumentChunk], int]], workers: int
) -> Generator[tuple[_Encoded, int], None, None]:
    """Do `work` on the items in threads. Yield results in order, with at most `workers + 2` items in flight."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gptsmith-tokenize")
    waiting: collections.deque[tuple[Future[_Encoded], int]] = collections.deque()
    try:
        for chunks, size in items:
            waiting.append((pool.submit(work, chunks), size))
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
