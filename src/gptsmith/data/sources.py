"""Where text comes from: a file, a folder, JSON lines, Parquet or a named corpus, read as bounded chunks.

Every source is read in bounded memory, whatever its size. A long text is cut only where a tokenizer that splits words
as GPT-2 does begins a new token anyway: right before a space or a newline that follows a letter or a digit. The tokens
of the chunks are then exactly the tokens of the whole text.
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

CHUNK_CHARACTERS = 1 << 18  # the most characters in one chunk
CUT_WINDOW = 1 << 16  # how far back from there a good place to cut is looked for
READ_BYTES = 1 << 18
LONGEST_LINE = 64 << 20  # bytes of one JSON line
PARQUET_ROWS = 256  # decoded at a time

Advance = Callable[[int], None]  # told how many bytes of the files have been read since the last call

# In reversed text: a space or newline and, after it, the character that stands before it.
_AFTER_LETTER_OR_DIGIT = re.compile(r"[ \n](?=[^\W_])")
_AFTER_ANYTHING = re.compile(r"[ \n](?=\S)")


@dataclass(frozen=True)
class DocumentChunk:
    """A stretch of text.

    ends_document: a document ends with it, so a separator token belongs after it. where: its place, for messages.
    """

    text: str
    ends_document: bool
    where: str = field(default="", compare=False)


class Source(abc.ABC):
    """Text to be read as often as needed, always the same, in bounded memory.

    spec: what the user called it; name: a short form fit for a folder's name; path: where it is on disk.
    """

    def __init__(self, spec: str, path: Path, name: str) -> None:
        self.spec, self.path, self.name = spec, path, name
        self._fingerprint: str | None = None
        self._seen: tuple[Any, ...] = ()  # sizes and times of the files when the fingerprint was taken

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    @property
    def size_bytes(self) -> int:
        """Bytes on disk (compressed, if it is)."""
        return _stat(self.path).st_size

    def fingerprint(self) -> str:
        """The sha256 (hex) of what is read from here. Read once, then remembered."""
        if self._fingerprint is None:
            self._seen = self._state()
            digest = hashlib.sha256(self._header().encode())
            with progress(self.size_bytes, f"checking {self.name}", "B") as bar:
                for _ in _read_blocks(self.path, bar.advance, digest):
                    pass
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def unchanged(self) -> bool:
        """Whether nobody has written to the files since the fingerprint was taken."""
        self.fingerprint()
        return self._state() == self._seen

    @abc.abstractmethod
    def pieces(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        """The text in order, in chunks of at most CHUNK_CHARACTERS characters, none of them empty.

        advance: called with the number of bytes (of `size_bytes`) read since the last call.
        Raises DataError for anything that is not text, naming file and place.
        """

    def _state(self) -> tuple[Any, ...]:
        return _size_and_time(self.path)

    def _header(self) -> str:
        """What goes into the fingerprint ahead of the content; a plain text's fingerprint is its file's sha256."""
        return ""


class TextSource(Source):
    """A plain text file (.gz and .zst are unpacked on the way): one stream, without separators."""

    def pieces(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        blocks = _unpacked_blocks(self.path, advance)
        yield from _chunks(_decoded(blocks, self.path), str(self.path), document=False)


class JsonLinesSource(Source):
    """A file of one JSON object a line with the text in `field`: every line is a document."""

    def __init__(self, spec: str, path: Path, name: str, field: str) -> None:
        super().__init__(spec, path, name)
        self.field = field

    def _header(self) -> str:
        return f"jsonl {self.field}\n"

    def pieces(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        for number, line in enumerate(_lines(_unpacked_blocks(self.path, advance), self.path), 1):
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
        except RecursionError:
            raise DataError(f"{where}: the JSON is nested too deeply.") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: a JSON object such as {{{json.dumps(self.field)}: ...}} is needed, not {_kind(row)}."
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
                raise DataError(f"{where}: half a surrogate pair at character {error.start} is not text.") from None
        return text


class ParquetSource(Source):
    """A Parquet file with the text in the string column `field`: every row is a document."""

    def __init__(self, spec: str, path: Path, name: str, field: str) -> None:
        super().__init__(spec, path, name)
        self.field = field

    def _header(self) -> str:
        return f"parquet {self.field}\n"

    def pieces(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
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
    """Every text file under a folder, sorted by relative path: each is a document.

    Hidden and empty files and those that are not UTF-8 text are left out; `skipped` counts them, once they were read.
    """

    def __init__(self, spec: str, path: Path, name: str) -> None:
        super().__init__(spec, path, name)
        self.skipped = 0
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
        """The text files, in order. DataError if there is none. The first call reads them all."""
        if self._files is None:
            self._files = self._scan()
        return self._files

    def _scan(self) -> list[Path]:
        candidates, hidden = self._walk()
        files: list[Path] = []
        seen: list[tuple[int, int]] = []
        unfit: list[str] = []
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
                    unfit.append(relative)
                    continue
                if state[0]:
                    files.append(path)
                    seen.append(state)
                    digest.update(f"{content.hexdigest()} {relative}\n".encode("utf-8", "surrogateescape"))
        self.skipped = hidden + len(unfit)
        if not files:
            raise DataError(
                f"no text in the folder {self.path}: it has no UTF-8 text file ({self.skipped} are hidden or binary)."
            )
        if self.skipped:
            names = f", not text: {', '.join(unfit[:3])}{', ...' if len(unfit) > 3 else ''}" if unfit else ""
            note(f"{self.spec}: {len(files):,} text files; skipped {self.skipped:,} (hidden: {hidden:,}{names})")
        self._fingerprint, self._seen = digest.hexdigest(), tuple(seen)
        return files

    def _walk(self) -> tuple[list[Path], int]:
        """Regular files that are not hidden, sorted by relative path, and the number of hidden entries passed by."""

        def refuse(error: OSError) -> None:
            raise DataError(f"cannot read {error.filename}: {error.strerror}.") from None

        found: list[Path] = []
        hidden = 0
        for root, folders, names in os.walk(self.path, onerror=refuse):
            hidden += sum(name.startswith(".") for name in [*folders, *names])
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (Path(root, name) for name in names if not name.startswith("."))
            found += [path for path in paths if path.is_file()]
        return sorted(found, key=lambda path: path.relative_to(self.path).as_posix()), hidden

    def pieces(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        for path in self.files():
            yield from _chunks(_decoded(_read_blocks(path, advance), path), str(path))


def open_source(spec: str | Path, *, field: str = "text") -> Source:
    """The text that `spec` names.

    spec: a named corpus (`gptsmith data list`), a text file, a folder of text files, `.jsonl[.gz|.zst]` or `.parquet`.
        A corpus's name wins over a file of the same name; write `./name` for the file.
    field: the field or column that holds the text of JSON lines and Parquet.
    Raises UsageError for a name that is neither, DataError for an empty or unreadable file.
    """
    from gptsmith.data.corpora import CORPORA, corpus_path

    given = str(spec)
    path = Path(given).expanduser()
    if given in CORPORA and isinstance(spec, str):
        if path.exists():
            note(f"{given}: the named corpus is meant; write ./{given} for the file or folder of that name.")
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
        raise DataError(f"{path} is not a regular file: save the text to a file first.")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {path}: permission denied.")
    if _stat(path).st_size == 0:
        raise DataError(f"{path} is empty: there is no text to read.")
    suffix = _suffixes(path)[0]
    if suffix in (".jsonl", ".ndjson"):
        return JsonLinesSource(spec, path, name, field)
    if suffix == ".parquet":
        return ParquetSource(spec, path, name, field)
    return TextSource(spec, path, name)


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the format, and the one that tells the compression ("" if none)."""
    packing = path.suffix.lower()
    if packing in (".gz", ".zst"):
        return path.with_suffix("").suffix.lower(), packing
    return packing, ""


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
    """The file's bytes, a block at a time, each also fed to `digest`."""
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


def _unpacked_blocks(path: Path, advance: Advance | None) -> Iterator[bytes]:
    """The file's bytes, decompressed if its name ends in .gz or .zst."""
    packing = _suffixes(path)[1]
    if packing == ".gz":
        return _gunzipped(path, advance)
    if packing == ".zst":
        return _unzstandarded(path, advance)
    return _read_blocks(path, advance)


def _gunzipped(path: Path, advance: Advance | None) -> Iterator[bytes]:
    try:
        with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            seen = 0
            while block := file.read(READ_BYTES):
                if advance is not None:
                    advance(packed.tell() - seen)
                    seen = packed.tell()
                yield block
    except EOFError:
        raise DataError(f"{path} is cut short: its gzip data end too early. Download or copy it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a sound gzip file ({error}). Download or copy it again.") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None


def _unzstandarded(path: Path, advance: Advance | None) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise _missing("zstandard", path) from None
    frame: Any = None
    try:
        for block in _read_blocks(path, advance):
            for start in range(0, len(block), 1 << 14):  # small steps: one may unpack to a hundred times its size
                packed = block[start : start + (1 << 14)]
                while packed:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    if unpacked := frame.decompress(packed):
                        yield unpacked
                    packed = frame.unused_data
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is not a sound zstd file ({error}). Download or copy it again.") from None
    if frame is not None:
        raise DataError(f"{path} is cut short: its zstd data end too early. Download or copy it again.")


def _missing(package: str, path: Path) -> DataError:
    return DataError(
        f'reading {path} needs {package}, which is not installed. Install it: pip install "gptsmith[data]"'
    )


def _lines(blocks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines without their newlines."""
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
        if size > LONGEST_LINE:
            limit = LONGEST_LINE >> 20
            raise DataError(f"{path}, line {number}: longer than {limit} MB. Give each document a line of its own.")
    if size:
        yield b"".join(parts)


# --- text ------------------------------------------------------------------------------------------------------------


class _NotText(DataError):
    """The bytes are not UTF-8 text."""


def _decoded(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Strict UTF-8, a leading byte-order mark dropped, newlines as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset, beginning = 0, True
    unpacked = " of the unpacked text" if _suffixes(path)[1] else ""
    advice = "Convert it to UTF-8 first, if it is text at all."
    for block in blocks:
        if offset == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise _NotText(f"{path} is UTF-16, not UTF-8 text. Convert it: iconv -f UTF-16 -t UTF-8")
        pending = len(decoder.getstate()[0])
        zero = block.find(0)
        if zero >= 0:
            raise _NotText(f"{path} is a binary file: byte {offset + zero}{unpacked} is zero. Text must be UTF-8.")
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            raise _NotText(f"{path} is not UTF-8 text: {error.reason} at byte {at}{unpacked}. {advice}") from None
        offset += len(block)
        if text and beginning:
            beginning = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
    if pending := len(decoder.getstate()[0]):
        at = offset - pending
        raise _NotText(f"{path} is not UTF-8 text: it ends inside the character at byte {at}{unpacked}. {advice}")


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """The same text in chunks of at most CHUNK_CHARACTERS, cut where a token begins (see the top of this file)."""
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
    """An index in (start, start + CHUNK_CHARACTERS]: the last good one, or that limit itself if no space is near it."""
    limit = start + CHUNK_CHARACTERS
    window = text[max(start, limit - CUT_WINDOW) : limit + 1][::-1]
    for pattern in (_AFTER_LETTER_OR_DIGIT, _AFTER_ANYTHING):
        if match := pattern.search(window):
            return limit - match.start()
    return limit


def _chunks(texts: Iterable[str], where: str, *, document: bool = True) -> Iterator[DocumentChunk]:
    """The chunks of one text; the last one ends a document if the text is one."""
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
    return f"There is {shown or 'no field at all'}.{nearest(wanted, names)} Name the right one with --field."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
