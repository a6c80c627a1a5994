"""Sources of text: files, folders, rows of tables or a named corpus, read in chunks of bounded size.

A source of any size is read in bounded memory. A long text is cut only where a tokenizer that splits words as GPT-2
does begins a new token anyway: right before a space or a newline that follows a letter or a digit. The tokens of the
chunks are then exactly the tokens of the whole text.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptsmith.data.files import (
    Advance,
    NotTextError,
    content_blocks,
    decoded,
    read_blocks,
    size_and_time,
    stat,
    suffixes,
)
from gptsmith.data.rows import FORMATS, METADATA, Shards, by_split, fields_of, is_table, read_rows, tables_among, walk
from gptsmith.errors import DataError, UsageError, first_few, nearest
from gptsmith.log import note, progress

CHUNK_CHARACTERS = 1 << 18  # the maximum length of a chunk
CUT_WINDOW = 1 << 16  # how far before the end of a chunk to look for a good place to cut
DEFAULT_FIELD = "text"

# Files of these formats may be anything. In a folder that also has text files they count as text, without the field.
_PERHAPS_TABLES = (".json", ".csv", ".tsv")
_ABOUT_THE_DATA = re.compile(r"(readme|license|licence|citation|notice)\b.*", re.IGNORECASE)

# For reversed text: a space or newline, followed by the character that precedes it in the text.
_AFTER_LETTER_OR_DIGIT = re.compile(r"[ \n](?=[^\W_])")
_AFTER_ANYTHING = re.compile(r"[ \n](?=\S)")

Spec = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class DocumentChunk:
    """A document, or a part of a long one.

    ends_document: whether a document ends here, so that a separator token belongs after the text. where: the file (and
    line or row) that the text comes from, for messages.
    """

    text: str
    ends_document: bool
    where: str = field(default="", compare=False)


@dataclass
class SkippedRows:
    """Rows without a text that were left out. where: the first of them, without the folder."""

    count: int = 0
    where: str = ""

    def add(self, count: int, where: str) -> None:
        self.where = self.where or where.rpartition(os.sep)[2]
        self.count += count

    def describe(self) -> str:
        """Return how many there are and which is the first, "" if there are none."""
        if not self.count:
            return ""
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return f"left out {rows} without a text (null or empty; the first: {self.where})"


class Source(abc.ABC):
    """Text that can be read any number of times, always the same, in bounded memory.

    spec: the name or path that the user gave, for messages. path: where it is on disk; of several files, the first.
    name: a short name, usable as the name of a folder. skipped_rows: of the last time that the text was read.
    """

    has_fields = False
    """Whether the text is in a field of rows."""

    def __init__(self, spec: str, path: Path, name: str) -> None:
        self.spec, self.path, self.name = spec, path, name
        self.skipped_rows = SkippedRows()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r})"

    @property
    def places(self) -> list[str]:
        """Full paths on disk, from which `open_source` opens the same text."""
        return [str(self.path.resolve())]

    @property
    @abc.abstractmethod
    def size_bytes(self) -> int:
        """The number of bytes on disk (of compressed files, if they are compressed)."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the text, which does not depend on where it is. Computed once, then remembered."""

    @abc.abstractmethod
    def unchanged(self) -> bool:
        """Return whether the files are unchanged since the fingerprint was computed."""

    def validation(self) -> Source | None:
        """Return the text for validation, where a data set brings one."""
        return None

    @abc.abstractmethod
    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        """Yield the text in order, in chunks of 1 to CHUNK_CHARACTERS characters.

        advance: called with the number of bytes (of `size_bytes`) read since the last call.
        Raises DataError for anything that is not text, naming the file and where in it.
        """


class _FileSource(Source):
    """A single file."""

    _fingerprint: str | None = None
    _seen = (0, 0)  # size and time of the file when the fingerprint was computed

    @property
    def size_bytes(self) -> int:
        return stat(self.path).st_size

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._seen = size_and_time(self.path)
            digest = hashlib.sha256(self._header().encode())
            with progress(self.size_bytes, f"checking {self.name}", "B") as bar:
                for _ in read_blocks(self.path, bar.advance, digest):
                    pass
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def unchanged(self) -> bool:
        self.fingerprint()
        return size_and_time(self.path) == self._seen

    def _header(self) -> str:
        """Return what is hashed before the content. The fingerprint of plain text is the sha256 of its file."""
        return ""


class TextSource(_FileSource):
    """A plain text file, decompressed if its name says so: one text, without separators.

    is_document: whether it is one of several, which are separated.
    """

    def __init__(self, spec: str, path: Path, name: str, *, is_document: bool = False) -> None:
        super().__init__(spec, path, name)
        self.is_document = is_document

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        blocks = content_blocks(self.path, advance)
        yield from _chunks(decoded(blocks, self.path), str(self.path), document=self.is_document)


class RowsSource(_FileSource):
    """A file of rows (JSON lines, JSON, CSV, Parquet, Arrow) with the text in `field`. Every row is a document.

    Rows whose text is null or empty are left out and counted in `skipped_rows`.
    """

    has_fields = True

    def __init__(self, spec: str, path: Path, name: str, field: str) -> None:
        super().__init__(spec, path, name)
        self.field = field

    def _header(self) -> str:
        kind = suffixes(self.path)[0].removeprefix(".")
        return f"{'jsonl' if kind == 'ndjson' else kind} {self.field}\n"

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        self.skipped_rows = SkippedRows()
        for row in read_rows(self.path, advance, field=self.field):
            if text := row.values[self.field]:
                yield from _chunks([text], row.where)
            else:
                self.skipped_rows.add(1, row.where)


class _SeveralFiles(Source):
    """Base of sources that consist of others, which are separated from one another."""

    @abc.abstractmethod
    def parts(self) -> Sequence[Source]:
        """Return the sources in order."""

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts())

    def chunks(self, advance: Advance | None = None) -> Iterator[DocumentChunk]:
        self.skipped_rows = SkippedRows()
        for part in self.parts():
            yield from part.chunks(advance)
            self.skipped_rows.add(part.skipped_rows.count, part.skipped_rows.where)


class FilesSource(_SeveralFiles):
    """Several files, folders or corpora, in the order in which they are given."""

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__(first_few([part.spec for part in parts], 3), parts[0].path, parts[0].name)
        self._parts = parts
        for part in parts:
            if isinstance(part, TextSource):
                part.is_document = True

    @property
    def has_fields(self) -> bool:  # type: ignore[override]
        return any(part.has_fields for part in self._parts)

    @property
    def places(self) -> list[str]:
        return [place for part in self._parts for place in part.places]

    def parts(self) -> Sequence[Source]:
        return self._parts

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(["files", *(part.fingerprint() for part in self._parts)]).encode()).hexdigest()

    def unchanged(self) -> bool:
        return all(part.unchanged() for part in self._parts)

    def validation(self) -> Source | None:
        found = [val for part in self._parts if (val := part.validation()) is not None]
        return FilesSource(found) if len(found) > 1 else found[0] if found else None


class FolderSource(_SeveralFiles):
    """The files under a folder, sorted by relative path: tables of rows by their suffixes, and text files.

    Every row is a document, and every text file. Where names say splits, as those of data sets on the Hugging Face hub
    do, rows are read from one `split`. Files that are hidden, empty or not UTF-8 text are skipped; `skipped` counts
    them once the folder has been read.
    """

    def __init__(self, spec: str, path: Path, name: str, field: str = DEFAULT_FIELD, split: str = "train") -> None:
        super().__init__(spec, path, name)
        self.field, self.split = field, split
        self.skipped = 0
        self._parts: list[_FileSource] | None = None
        self._sorted: _Folder | None = None
        self._fingerprint = ""
        self._seen: list[tuple[int, int]] = []  # sizes and times of the files when they were read

    @property
    def has_fields(self) -> bool:  # type: ignore[override]
        return self._sort().shards != NO_SHARDS

    def validation(self) -> Source | None:
        if self.split != "train" or not self._sort().shards.validation:
            return None
        return FolderSource(self.spec, self.path, self.name, self.field, "validation")

    def fingerprint(self) -> str:
        self.parts()
        return self._fingerprint

    def unchanged(self) -> bool:
        return [size_and_time(part.path) for part in self.parts()] == self._seen

    def parts(self) -> Sequence[_FileSource]:
        """Return the files in order. The first call reads them all. Raises DataError if there are none."""
        if self._parts is None:
            self._parts = self._scan()
        return self._parts

    def _sort(self) -> _Folder:
        if self._sorted is None:
            self._sorted = _sort_files(self.path, self.field)
        return self._sorted

    def _scan(self) -> list[_FileSource]:
        """Read all files, to see what is text and to compute the fingerprint."""
        found = self._sort()
        tables = set(getattr(found.shards, self.split))
        texts = set(found.texts) if self.split == "train" else set()
        parts: list[_FileSource] = []
        not_text: list[str] = []
        digest = hashlib.sha256(b"folder\n")
        candidates = [path for path in found.files if path in tables or path in texts]
        with progress(sum(stat(path).st_size for path in candidates), f"checking {self.name}", "B") as bar:
            for path in candidates:
                content = hashlib.sha256()
                state = size_and_time(path)
                relative = path.relative_to(self.path).as_posix()
                if path in tables:
                    for _ in read_blocks(path, bar.advance, content):
                        pass
                    part: _FileSource = RowsSource(str(path), path, self.name, self.field)
                    digest.update(f"rows {self.field} ".encode())
                else:
                    try:
                        for _ in decoded(content_blocks(path, bar.advance, content), path):
                            pass
                    except NotTextError:
                        not_text.append(relative)
                        continue
                    part = TextSource(str(path), path, self.name, is_document=True)
                if state[0]:
                    parts.append(part)
                    self._seen.append(state)
                    digest.update(f"{content.hexdigest()} {relative}\n".encode("utf-8", "surrogateescape"))
        self.skipped = found.hidden + len(not_text) + len(found.linked)
        if not parts:
            raise DataError(
                f"no text in the folder {self.path}: it has no UTF-8 text files ({self.skipped} are hidden or binary)."
            )
        self._fingerprint = digest.hexdigest()
        if self.skipped or tables:
            self._say(found, parts, not_text)
        return parts

    def _say(self, found: _Folder, parts: list[_FileSource], not_text: list[str]) -> None:
        """Print what is read and what is not."""
        kinds = collections.Counter(
            "".join(suffixes(part.path)) if isinstance(part, RowsSource) else "text" for part in parts
        )
        read = [f"{count:,} {kind} file{'' if count == 1 else 's'}" for kind, count in kinds.items() if kind != "text"]
        if kinds["text"]:
            read.append(f"{kinds['text']:,} text file{'' if kinds['text'] == 1 else 's'}")
        what = f"{self.spec}: {', '.join(read)}"
        if found.shards.validation or found.shards.test:
            what += f" of the split {self.split}"
            if self.split == "train" and found.shards.test:
                what += f"; not read: the split test ({len(found.shards.test):,})"
        if found.about and self.split == "train":
            what += f"; about the data, not read: {first_few(found.about, 3)}"
        if found.without_field and self.split == "train":
            what += f"; read as text, without a field {self.field!r}: {first_few(found.without_field, 3)}"
        if self.skipped:
            names = f", not text: {first_few(not_text, 3)}" if not_text else ""
            names += f", linked folders: {first_few(found.linked, 3)}" if found.linked else ""
            what += f"; skipped {self.skipped:,} (hidden: {found.hidden:,}{names})"
        note(what)


NO_SHARDS = Shards([], [], [])


@dataclass(frozen=True)
class _Folder:
    """The files of a folder, by how they are read.

    files: all, in order. shards: tables. texts: what may be text. about: names of files that describe the data.
    without_field: names of tables that are read as text. hidden: the number of hidden entries. linked: names of folders
    that are links.
    """

    files: list[Path]
    shards: Shards
    texts: list[Path]
    about: list[str]
    without_field: list[str]
    hidden: int
    linked: list[str]


def _sort_files(folder: Path, field: str) -> _Folder:
    paths, hidden, linked = walk(folder)
    tables = tables_among(paths)
    others = [path for path in paths if not is_table(path)]
    described = [
        path for path in paths if path not in tables and (path.name in METADATA or _ABOUT_THE_DATA.fullmatch(path.name))
    ]
    if any(_begins_as_text(path) for path in others if path not in described):
        certain = [path for path in tables if suffixes(path)[0] not in _PERHAPS_TABLES or _has_field(path, field)]
    else:
        certain = tables
    without = [path for path in tables if path not in set(certain)]
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    if not certain:  # a folder of texts
        return _Folder(paths, NO_SHARDS, paths, [], [names[path] for path in without], hidden, linked)
    texts = [path for path in others if path not in described] + without
    about = [names[path] for path in described if path.name not in METADATA]
    return _Folder(paths, by_split(certain, folder), texts, about, [names[path] for path in without], hidden, linked)


def _begins_as_text(path: Path) -> bool:
    """Return whether a file is not empty, and may be text by its first block."""
    with contextlib.suppress(NotTextError):
        first = next(content_blocks(path), b"")
        next(decoded([first[: first.rfind(b"\n") + 1] or first[:1000]], path), None)
        return bool(first)
    return False


def _has_field(path: Path, field: str) -> bool:
    try:
        return field in fields_of(path)
    except DataError:
        return False


def open_source(spec: Spec, *, field: str = DEFAULT_FIELD) -> Source:
    """Open the text that `spec` names.

    spec: a named corpus (`gptsmith data list`), a text file, a file of rows (JSON lines, JSON, CSV, Parquet, Arrow), or
        a folder of them; or a list of these, which are read one after another. A corpus takes precedence over a file of
        the same name; write `./name` for the file.
    field: the field or column of rows with the text.
    Raises UsageError if there is no such corpus or file, DataError for an empty or unreadable file.
    """
    if not isinstance(spec, str | Path):
        specs = list(spec)
        if not specs:
            raise UsageError("no data given: the list of files is empty.")
        twice = [str(each) for each, count in collections.Counter(specs).items() if count > 1]
        if twice:
            note(f"given more than once, and read as often: {first_few(twice)}")
        parts = [open_source(each, field=field) for each in specs]
        return FilesSource(parts) if len(parts) > 1 else parts[0]

    from gptsmith.data.corpora import CORPORA, corpus_path

    given = str(spec)
    if not given:
        raise UsageError("no data given: a name is empty.")
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


def refuse_useless_field(field: str, *sources: Source | None) -> None:
    """Raise UsageError where a field is chosen, but no source has any."""
    texts = [source for source in sources if source is not None]
    if field != DEFAULT_FIELD and not any(source.has_fields for source in texts):
        specs = " and ".join(source.spec for source in texts)
        raise UsageError(
            f"--field {field} has no use: {specs} is plain text, without fields. Leave it out. "
            f"Fields are those of {', '.join(FORMATS)}."
        )


def _open_path(spec: str, path: Path, name: str, field: str) -> Source:
    if path.is_dir():
        return FolderSource(spec, path, name, field)
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Save the text to a file first.")
    if not os.access(path, os.R_OK):
        raise DataError(f"cannot read {path}: permission denied.")
    if stat(path).st_size == 0:
        raise DataError(f"{path} is empty: it has no text.")
    return RowsSource(spec, path, name, field) if is_table(path) else TextSource(spec, path, name)


def _short_name(path: Path) -> str:
    path = path.resolve()
    name = path.name
    if not path.is_dir():
        for suffix in reversed(suffixes(path)):
            if suffix and name.lower().endswith(suffix) and len(name) > len(suffix):
                name = name[: -len(suffix)]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


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
