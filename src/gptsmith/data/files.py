"""Bytes and text of files of any size, read in blocks: compressed or not, with the place of what is wrong in them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gptsmith.errors import DataError

if TYPE_CHECKING:
    from hashlib import _Hash

READ_BYTES = 1 << 18
MAX_LINE_BYTES = 64 << 20
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

Advance = Callable[[int], None]  # called with the number of bytes read from the files since the last call


class NotTextError(DataError):
    """The bytes are not UTF-8 text."""


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of the format, and that of the compression ("" if there is none), in lower case."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


def stat(path: Path) -> os.stat_result:
    """Return the status of a file. Raise DataError where it cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in nanoseconds."""
    status = stat(path)
    return status.st_size, status.st_mtime_ns


def read_blocks(path: Path, advance: Advance | None = None, digest: _Hash | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file block by block, and update `digest` with them."""
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                if advance is not None:
                    advance(len(block))
                if digest is not None:
                    digest.update(block)
                yield block
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def content_blocks(path: Path, advance: Advance | None = None, digest: _Hash | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if its name says that it is compressed.

    advance and digest are given the bytes on disk. Raise DataError for a damaged archive.
    """
    compression = suffixes(path)[1]
    if compression == ".zst":
        return _decompress_zstd(path, advance, digest)
    if compression:
        return _decompress(path, compression, advance, digest)
    return read_blocks(path, advance, digest)


class _Watched:
    """A binary file that reports the bytes that are read from it."""

    def __init__(self, file: IO[bytes], advance: Advance | None, digest: _Hash | None) -> None:
        self._file, self._advance, self._digest = file, advance, digest

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        if self._advance is not None:
            self._advance(len(block))
        if self._digest is not None:
            self._digest.update(block)
        return block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _decompress(path: Path, compression: str, advance: Advance | None, digest: _Hash | None) -> Iterator[bytes]:
    name = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}[compression]
    try:
        with open(path, "rb") as compressed:
            watched: Any = _Watched(compressed, advance, digest)
            file: Any
            if compression == ".gz":
                file = gzip.GzipFile(fileobj=watched)
            elif compression == ".bz2":
                file = bz2.BZ2File(watched)
            else:
                file = lzma.LZMAFile(watched)  # noqa: SIM115 (closed below)
            with file:
                while block := file.read(READ_BYTES):
                    yield block
    except EOFError:
        raise DataError(f"{path} is incomplete: its {name} data ends too early. Download or copy it again.") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is not a valid {name} file ({error}). Download or copy it again.") from None
    except OSError as error:
        if error.errno is None:  # of bz2
            raise DataError(f"{path} is not a valid {name} file ({error}). Download or copy it again.") from None
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def _decompress_zstd(path: Path, advance: Advance | None, digest: _Hash | None) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise missing("zstandard", path) from None
    frame: Any = None
    try:
        for block in read_blocks(path, advance, digest):
            for start in range(0, len(block), 1 << 14):  # small steps, since data may expand a hundredfold
                compressed = block[start : start + (1 << 14)]
                while compressed:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    if content := frame.decompress(compressed):
                        yield content
                    compressed = frame.unused_data
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is not a valid zstd file ({error}). Download or copy it again.") from None
    if frame is not None:
        raise DataError(f"{path} is incomplete: its zstd data ends too early. Download or copy it again.")


def missing(package: str, path: Path) -> DataError:
    """Return the error for a package that is not installed."""
    return DataError(
        f'reading {path} needs {package}, which is not installed. Install it: pip install "gptsmith[data]"'
    )


def byte_lines(blocks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines without their newlines and without a leading byte-order mark.

    Raise DataError for a line longer than MAX_LINE_BYTES, and for UTF-16 and UTF-32.
    """
    parts: list[bytes] = []
    size, number = 0, 1
    for count, block in enumerate(blocks):
        if count == 0:
            _refuse_wide_characters(block, path)
            block = block.removeprefix(codecs.BOM_UTF8)
        *ended, rest = block.split(b"\n")
        for end in ended:
            yield b"".join([*parts, end])
            parts, size = [], 0
            number += 1
        parts.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            limit = MAX_LINE_BYTES >> 20
            raise DataError(f"{path}, line {number}: longer than {limit} MB. Put each document on a line of its own.")
    if size:
        yield b"".join(parts)


def decoded(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Decode strict UTF-8. Drop a leading byte-order mark, and keep newlines as they are.

    Raise NotTextError with the place of what is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset, beginning = 0, True
    of_text = " of the decompressed text" if suffixes(path)[1] else ""
    advice = "If it is text, convert it to UTF-8 first."
    for block in blocks:
        if offset == 0:
            _refuse_wide_characters(block, path)
        pending = len(decoder.getstate()[0])
        zero = block.find(0)
        if zero >= 0:
            raise NotTextError(f"{path} is a binary file: byte {offset + zero}{of_text} is zero. Text must be UTF-8.")
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            raise NotTextError(f"{path} is not UTF-8 text: {error.reason} at byte {at}{of_text}. {advice}") from None
        offset += len(block)
        if text and beginning:
            beginning = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
    if pending := len(decoder.getstate()[0]):
        at = offset - pending
        raise NotTextError(f"{path} is not UTF-8 text: it ends inside the character at byte {at}{of_text}. {advice}")


def _refuse_wide_characters(block: bytes, path: Path) -> None:
    for name, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if block.startswith(marks):
            raise NotTextError(f"{path} is {name}, not UTF-8 text. Convert it: iconv -f {name} -t UTF-8")
