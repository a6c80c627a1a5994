"""Sources of text: a file, a folder, JSON lines, Parquet or a named corpus, read in chunks of bounded size.

A source of any size is read in bounded memory. A long text is cut only where a tokenizer that splits words as GPT-2
does begins a new token anyway: right before a space or a newline that follows a letter or a digit. The tokens of the
chunks are then exactly the tokens of the whole text.
"""

from __future__ import annotations

import abc
import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptsmith.errors import DataError, UsageError, nearest
from gptsmith.log import note, progress

CHUNK_CHARACTERS = 1 << 18  # the maximum length of a chunk
CUT_WINDOW = 1 << 16  # how far before the end of a chunk to look for a good place to cut
READ_BYTES = 1 << 18
MAX_LINE_BYTES = 64 << 20  # of JSON lines
PARQUET_ROWS = 256  # rows decoded at a time

Advance = Callable[[int], None]  # called with the number of bytes read from the files since the last call

# For reversed text: a space or newline, followed by the character that precedes it in the text.
_AFTER_LETTER_OR_DIGIT = re.compile(r"[ \n](?=[^\W_])")
_AFTER_ANYTHING = re.compile(r"[ \n](?=\S)")


@dataclass(frozen=True)
class DocumentChunk:
    """A document, or a part of a long one.

    ends_document: whether a document ends here, so that a separator token belongs after the text. where: the file (and
    line or row) that the text comes from, for messages.
    """

    text: str
    ends_document: bool
    where: str = field(default="", compare=False)


class Source(abc.ABC):
    """Text that can be read any number of times, always the same, in bounded memory.

    spec: the name or path that the user gave. name: a short name, usable as the name of a folder. path: where it is on
    disk.
    """

    def __init__(self, spec: str, path: Path, name: str) -> None:
        self.spec, self.path, self.name = spec, path, name
        self._fingerprint: str | None = None
        self._seen: tuple[Any, ...] = ()  # sizes and times of the files when the fingerprint was computed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    @property
    def size_bytes(self) -> int:
        """The number of bytes on disk (of the compressed file, if it is compressed)."""
        return _stat(self.path).st_size

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the text. Computed once, then remembered."""
        if self._fingerprint is None:
            self._seen = self._state()
            digest = hashlib.sha256(self._header().encode())
            with progress(self.size_bytes, f"checking {self.name}", "B") as bar:
                for _ in _read_blocks(self.path, bar.advance, digest):
                    pass
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def unchanged(self) -> bool:
        """Return whether the files are unchanged since the fingerprint was computed."""
        self.fingerprint()
        return self._state() == self._seen

    @abc.abstractmethod
    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        """Yield the text in order, in chunks of 1 to CHUNK_CHARACTERS characters.

        advance: called with the number of bytes (of `size_bytes`) read since the last call.
        Raises DataError for anything that is not text, naming the file and where in it.
        """

    def _state(self) -> tuple[Any, ...]:
        return _size_and_time(self.path)

    def _header(self) -> str:
        """Return what is hashed before the content. The fingerprint of plain text is the sha256 of its file."""
        return ""


class TextSource(Source):
    """A plain text file (.gz and .zst are decompressed): one text, without separators."""

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        blocks = _decompressed_blocks(self.path, advance)
        yield from _chunks(_decoded(blocks, self.path), str(self.path), document=False)


class JsonLinesSource(Source):
    """A file of one JSON object per line, with the text in `field`. Every line is a document."""

    def __init__(self, spec: str, path: Path, name: str, field: str) -> None:
        super().__init__(spec, path, name)
        self.field = field

    def _header(self) -> str:
        return f"jsonl {self.field}\n"

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        for number, line in enumerate(_lines(_decompressed_blocks(self.path, advance), self.path), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                where = f"{self.path}, line {number}"
                yield from _chunks([self._text(line, where)], where)

    def _text(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 text (byte {error.start} of the line). Convert the file to UTF-8."
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None
        except ValueError:  # Python reads integers of up to 4300 digits
            raise DataError(f"{where}: a number in the JSON has too many digits. Store it as a string.") from None
        except RecursionError:
            raise DataError(f"{where}: the JSON is nested too deeply.") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: expected a JSON object such as {{{json.dumps(self.field)}: ...}}, not {_kind(row)}."
            )
        if self.field not in row:
            raise DataError(f"{where}: no field {self.field!r}. {_fields(self.field, row)}")
        text = row[self.field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self.field!r} holds {_kind(text)}, not a string.")
        if rb"\u" in line:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: half of a surrogate pair at character {error.start}, which is not a character."
                ) from None
        return text


class ParquetSource(Source):
    """A Parquet file with the text in the string column `field`. Every row is a document."""

    def __init__(self, spec: str, path: Path, name: str, field: str) -> None:
        super().__init__(spec, path, name)
        self.field = field

    def _header(self) -> str:
        return f"parquet {self.field}\n"

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise _missing("pyarrow", self.path) from None
        row = 0
        try:
            # A small buffer makes pyarrow stream a row group instead of loading it whole.
            with parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                self._check_column(file.schema_arrow, pyarrow)
                per_row = self.size_bytes / max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[self.field], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            raise DataError(f"{self.path}, row {row}: column {self.field!r} is null. Remove such rows.")
                        yield from _chunks([text], f"{self.path}, row {row}")
                        row += 1
                    if advance is not None:
                        advance(round(per_row * batch.num_rows))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"{self.path} cannot be read as Parquet (near row {row}): {reason}.") from None

    def _check_column(self, schema: Any, pyarrow: Any) -> None:
        if self.field not in schema.names:
            raise DataError(f"{self.path}: no column {self.field!r}. {_fields(self.field, schema.names)}")
        kind = schema.field(self.field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        is_text = (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            getattr(pyarrow.types, "is_string_view", None),
        )
        if not any(check(kind) for check in is_text if check is not None):
            raise DataError(f"{self.path}: column {self.field!r} holds {kind}, not strings.")


class FolderSource(Source):
    """All text files under a folder, sorted by relative path. Every file is a document.

    Files that are hidden, empty or not UTF-8 text are skipped; `skipped` counts them once the folder has been read.
    """

    def __init__(self, spec: str, path: Path, name: str) -> None:
        super().__init__(spec, path, name)
        self.skipped = 0
        self._linked: list[str] = []  # folders that are links, which are not followed
        self._files: list[Path] | None = None

    @property
    def size_bytes(self) -> int:
        return sum(_stat(path).st_size for path in self.files())

    def _state(self) -> tuple[Any, ...]:
        return tuple(_size_and_time(path) for path in self.files())

    def fingerprint(self) -> str:
        self.files()
        assert self._fingerprint is not None
        return self._fingerprint

    def files(self) -> list[Path]:
        """Return the text files in order. The first call reads them all. Raises DataError if there are none."""
        if self._files is None:
            self._files = self._scan()
        return self._files

    def _scan(self) -> list[Path]:
        candidates, hidden = self._walk()
        files: list[Path] = []
        seen: list[tuple[int, int]] = []
        not_text: list[str] = []
        digest = hashlib.sha256(b"folder\n")
        with progress(sum(_stat(path).st_size for path in candidates), f"checking {self.name}", "B") as bar:
            for path in candidates:
                content = hashlib.sha256()
                state = _size_and_time(path)
                relative = path.relative_to(self.path).as_posix()
                try:
                    for _ in _decoded(_read_blocks(path, bar.advance, content), path):
                        pass
                except _NotText:
                    not_text.append(relative)
                    continue
                if state[0]:
                    files.append(path)
                    seen.append(state)
                    digest.update(f"{content.hexdigest()} {relative}\n".encode("utf-8", "surrogateescape"))
        self.skipped = hidden + len(not_text) + len(self._linked)
        if not files:
            raise DataError(
                f"no text in the folder {self.path}: it has no UTF-8 text files ({self.skipped} are hidden or binary)."
            )
        if self.skipped:
            names = f", not text: {', '.join(not_text[:3])}{', ...' if len(not_text) > 3 else ''}" if not_text else ""
            names += f", linked folders: {', '.join(self._linked[:3])}" if self._linked else ""
            note(f"{self.spec}: {len(files):,} text files; skipped {self.skipped:,} (hidden: {hidden:,}{names})")
        self._fingerprint, self._seen = digest.hexdigest(), tuple(seen)
        return files

    def _walk(self) -> tuple[list[Path], int]:
        """Return the regular files that are not hidden, sorted by relative path, and the number of hidden entries."""

        def refuse(error: OSError) -> None:
            raise DataError(f"cannot read {error.filename}: {error.strerror}.") from None

        found: list[Path] = []
        hidden = 0
        for root, folders, names in os.walk(self.path, onerror=refuse):
            self._linked += [name for name in folders if (Path(root) / name).is_symlink()]
            hidden += sum(name.startswith(".") for name in [*folders, *names])
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (Path(root, name) for name in names if not name.startswith("."))
            found += [path for path in paths if path.is_file()]
        return sorted(found, key=lambda path: path.relative_to(self.path).as_posix()), hidden

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        for path in self.files():
            yield from _chunks(_decoded(_read_blocks(path, advance), path), str(path))


def open_source(spec: str | Path, *, field: str = "text") -> Source:
    """Open the text that `spec` names.

    spec: a named corpus (`gptsmith data list`), a text file, a folder of text files, `.jsonl[.gz|.zst]` or `.parquet`.
        A corpus takes precedence over a file of the same name; write `./name` for the file.
    field: the field or column with the text, for JSON lines and Parquet.
    Raises UsageError if there is no such corpus or file, DataError for an empty or unreadable file.
    """
    from gptsmith.data.corpora import CORPORA, corpus_path

    given = str(spec)
    path = Path(given).expanduser()
    if given in CORPORA and isinstance(spec, str):
        if path.exists():
            note(f"{given}: using the named corpus. Write ./{given} for the file or folder of that name.")
        return _open_path(given, corpus_path(given), given, field)
    if not path.exists():
        looks_like_name = not path.suffix and len(path.parts) == 1
        hint = nearest(given, CORPORA) or (f" The named corpora are {', '.join(CORPORA)}." if looks_like_name else "")
        raise UsageError(f"no such file, folder or named corpus: {given!r}.{hint}")
    return _open_path(given, path, _short_name(path), field)


def _open_path(spec: str, path: Path, name: str, field: str) -> Source:
    if path.is_dir():
        return FolderSource(spec, path, name)
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Save the text to a file first.")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {path}: permission denied.")
    if _stat(path).st_size == 0:
        raise DataError(f"{path} is empty: it has no text.")
    suffix = _suffixes(path)[0]
    if suffix in (".jsonl", ".ndjson"):
        return JsonLinesSource(spec, path, name, field)
    if suffix == ".parquet":
        return ParquetSource(spec, path, name, field)
    return TextSource(spec, path, name)


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of the format, and that of the compression ("" if there is none)."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


def _short_name(path: Path) -> str:
    path = path.resolve()
    name = path.name
    if not path.is_dir():
        for suffix in (_suffixes(path)[1], _suffixes(path)[0]):
            if suffix and name.lower().endswith(suffix) and len(name) > len(suffix):
                name = name[: -len(suffix)]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


# --- bytes -----------------------------------------------------------------------------------------------------------


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = _stat(path)
    return stat.st_size, stat.st_mtime_ns


def _read_blocks(path: Path, advance: Advance | None, digest: hashlib._Hash | None = None) -> Iterator[bytes]:
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


def _decompressed_blocks(path: Path, advance: Advance | None) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if its name ends in .gz or .zst."""
    compression = _suffixes(path)[1]
    if compression == ".gz":
        return _decompress_gzip(path, advance)
    if compression == ".zst":
        return _decompress_zstd(path, advance)
    return _read_blocks(path, advance)


def _decompress_gzip(path: Path, advance: Advance | None) -> Iterator[bytes]:
    try:
        with open(path, "rb") as compressed, gzip.GzipFile(fileobj=compressed) as file:
            seen = 0
            while block := file.read(READ_BYTES):
                if advance is not None:
                    advance(compressed.tell() - seen)
                    seen = compressed.tell()
                yield block
    except EOFError:
        raise DataError(f"{path} is incomplete: its gzip data ends too early. Download or copy it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a valid gzip file ({error}). Download or copy it again.") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def _decompress_zstd(path: Path, advance: Advance | None) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise _missing("zstandard", path) from None
    frame: Any = None
    try:
        for block in _read_blocks(path, advance):
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


def _missing(package: str, path: Path) -> DataError:
    return DataError(
        f'reading {path} needs {package}, which is not installed. Install it: pip install "gptsmith[data]"'
    )


def _lines(blocks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines without their newlines."""
    parts: list[bytes] = []
    size, number = 0, 1
    for block in blocks:
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


# --- text ------------------------------------------------------------------------------------------------------------


class _NotText(DataError):
    """The bytes are not UTF-8 text."""


def _decoded(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Decode strict UTF-8. Drop a leading byte-order mark, and keep newlines as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset, beginning = 0, True
    of_text = " of the decompressed text" if _suffixes(path)[1] else ""
    advice = "If it is text, convert it to UTF-8 first."
    for block in blocks:
        if offset == 0 and block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            raise _NotText(f"{path} is UTF-32, not UTF-8 text. Convert it: iconv -f UTF-32 -t UTF-8")
        if offset == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _NotText(f"{path} is UTF-16, not UTF-8 text. Convert it: iconv -f UTF-16 -t UTF-8")
        pending = len(decoder.getstate()[0])
        zero = block.find(0)
        if zero >= 0:
            raise _NotText(f"{path} is a binary file: byte {offset + zero}{of_text} is zero. Text must be UTF-8.")
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            raise _NotText(f"{path} is not UTF-8 text: {error.reason} at byte {at}{of_text}. {advice}") from None
        offset += len(block)
        if text and beginning:
            beginning = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
    if pending := len(decoder.getstate()[0]):
        at = offset - pending
        raise _NotText(f"{path} is not UTF-8 text: it ends inside the character at byte {at}{of_text}. {advice}")


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Yield the same text in chunks of at most CHUNK_CHARACTERS, cut where a token begins (see the module's docs)."""
    buffer = ""
    for text in texts:
        buffer = buffer + text if buffer else text
        start = 0
        while len(buffer) - start > CHUNK_CHARACTERS:
            end = _place_to_cut(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _place_to_cut(text: str, start: int) -> int:
    """Return the last good index in (start, start + CHUNK_CHARACTERS], or that limit if there is no space near it."""
    limit = start + CHUNK_CHARACTERS
    window = text[max(start, limit - CUT_WINDOW) : limit + 1][::-1]
    for pattern in (_AFTER_LETTER_OR_DIGIT, _AFTER_ANYTHING):
        if match := pattern.search(window):
            return limit - match.start()
    return limit


def _chunks(texts: Iterable[str], where: str, *, document: bool = True) -> Iterator[DocumentChunk]:
    """Yield the chunks of one text. document: whether the text is a document, which the last chunk ends."""
    place, line, previous = where, 1, ""
    for text in _cut(texts):
        if previous:
            yield DocumentChunk(previous, False, place)
            line += previous.count("\n")
            place = f"{where}, counting from line {line:,}"
        previous = text
    if previous:
        yield DocumentChunk(previous, document, place)


def _fields(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    found = f"The fields are {shown}." if names else "There are no fields."
    return f"{found}{nearest(wanted, names)} Choose the field with --field."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
