"""Rows of tables: JSON lines, JSON, CSV, Parquet and Arrow, one file or a folder of them.

    for row in read_rows(Path("chats.jsonl.gz")):
        row.values["messages"], row.where

Files are read in bounded memory, whatever their size. A folder can be a data set of the Hugging Face hub
(`data/train-00000-of-00002.parquet`) or one that `save_to_disk` wrote. What a row means is up to the caller.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptsmith.data import files
from gptsmith.data.files import (
    COMPRESSIONS,
    Advance,
    byte_lines,
    content_blocks,
    decoded,
    missing,
    read_blocks,
    stat,
    suffixes,
)
from gptsmith.errors import DataError, first_few, nearest

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_WHOLE = (".parquet", ".arrow")  # with a compression of their own
ROWS_AT_A_TIME = 256  # rows of Parquet and Arrow that are decoded at a time
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_BEFORE_VALUE = re.compile(r"[ \t\r\n]*")


Split = Literal["train", "validation", "test"]


class Row(NamedTuple):
    """where: the file and the line (JSON, CSV) or row, for messages. folder: of the file; paths are relative to it."""

    where: str
    values: dict[str, Any]
    folder: Path = Path()


class Shards(NamedTuple):
    """The files of rows in a folder, by the split that their names say; without any such name, all are `train`."""

    train: list[Path]
    validation: list[Path]
    test: list[Path]


def is_table(path: Path) -> bool:
    """Return whether the name of a file says that it holds rows."""
    suffix, compression = suffixes(path)
    return suffix in FORMATS and not (compression and suffix in _WHOLE)


def walk(folder: Path) -> tuple[list[Path], int, list[str]]:
    """Return what is in a folder and its folders: regular files sorted by relative path, the number of hidden entries,
    and the names of folders that are links, which are not followed. Raise DataError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}.") from None

    found: list[Path] = []
    linked: list[str] = []
    hidden = 0
    for root, folders, names in os.walk(folder, onerror=refuse):
        linked += [name for name in folders if (Path(root) / name).is_symlink()]
        hidden += sum(name.startswith(".") for name in [*folders, *names])
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix()), hidden, linked


def tables_among(paths: Sequence[Path]) -> list[Path]:
    """Return the files of rows. Left out are empty ones, the metadata of data sets, and what their caches wrote."""
    listed = {path.parent: _listed_files(path) for path in paths if path.name == "state.json"}

    def belongs(path: Path) -> bool:
        if names := listed.get(path.parent):  # of a data set that `save_to_disk` wrote
            return path.name in names
        return path.name not in METADATA or path.name == "state.json"

    return [path for path in paths if is_table(path) and stat(path).st_size and belongs(path)]


def _listed_files(state: Path) -> list[str]:
    """Return the names of the files that belong to a data set that `save_to_disk` wrote."""
    try:
        values = json.loads(state.read_bytes())
        names = [file["filename"] for file in values["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if values.get("_indices_files") or values.get("_indices_data_files"):
        raise DataError(
            f"{state.parent} holds a data set whose rows were selected without being copied. "
            "Write it again: dataset.flatten_indices().save_to_disk(…)."
        )
    return names


def by_split(paths: Sequence[Path], folder: Path) -> Shards:
    """Sort files by the split that a name or folder says, as data sets on the Hugging Face hub do.

    Files that name no split belong to training. Without any file for training, all do.
    """
    shards = Shards([], [], [])
    for path in paths:
        getattr(shards, _split_of(path.relative_to(folder))).append(path)
    return shards if shards.train else Shards(list(paths), [], [])


def _split_of(file: Path) -> str:
    for part in reversed(file.parts):  # the file's own name says most
        words = set(re.split(r"[\W_]+", part.lower()))
        for split, names in _SPLITS.items():
            if words & set(names.split("|")):
                return split
    return "train"


def row_files(path: Path, split: Split = "train") -> list[Path]:
    """Return the files of rows that `path` is: itself, or those of a split in a folder and its folders, in order.

    Raise DataError if there are no files of rows.
    """
    if not path.is_dir():
        if not is_table(path):
            raise DataError(
                f"{path} is not a table. Rows are read from {', '.join(FORMATS)} "
                f"(all but Parquet and Arrow also compressed: {', '.join(COMPRESSIONS)})."
            )
        return [path]
    tables = tables_among(walk(path)[0])
    if not tables:
        raise DataError(f"the folder {path} has no files of rows ({', '.join(FORMATS)}).")
    files_of_split: list[Path] = getattr(by_split(tables, path), split)
    return files_of_split


def read_rows(
    path: Path, advance: Advance | None = None, *, field: str | None = None, split: Split = "train"
) -> Iterator[Row]:
    """Yield the rows of a file, or of the files of a split in a folder.

    advance: called with the bytes read since the last call. field: read this field alone, which every row must have,
    and which must hold strings (or null).
    Raise DataError for anything that cannot be read, naming the file and where in it.
    """
    for file in row_files(Path(path), split):
        suffix = suffixes(file)[0]
        if suffix in _WHOLE:
            read = _parquet if suffix == ".parquet" else _arrow
            yield from (row._replace(folder=file.parent) for row in read(file, advance, field))
            continue
        if suffix in (".csv", ".tsv"):
            rows = _csv(file, "\t" if suffix == ".tsv" else "", advance)
        elif suffix == ".json":
            rows = _json(file, advance)
        else:
            rows = _json_lines(file, advance)
        for row in rows:
            values = row.values if field is None else {field: _text(row, field)}
            yield Row(row.where, values, file.parent)


def fields_of(path: Path) -> list[str]:
    """Return the names of the fields of a file's first row."""
    suffix = suffixes(path)[0]
    if suffix in _WHOLE:
        with _opened(path, suffix) as (schema, _):
            return list(schema.names)
    return list(next(read_rows(path), Row("", {})).values)


def _text(row: Row, field: str) -> str | None:
    """Return a field's text. Raise DataError where there is no such field, or something else in it."""
    if field not in row.values:
        raise DataError(f"{row.where}: no field {field!r}. {_describe_fields(field, row.values)}")
    text = row.values[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{row.where}: field {field!r} holds {_kind(text)}, not a string.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{row.where}: half of a surrogate pair at character {error.start}, which is not a character."
            ) from None
    return text


def _describe_fields(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    found = f"The fields are {first_few(names, 12)}." if names else "There are no fields."
    return f"{found}{nearest(wanted, names)} Choose the field with --field."


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, advance: Advance | None) -> Iterator[Row]:
    for number, line in enumerate(byte_lines(content_blocks(path, advance), path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _object(_parsed_line(line, where), where))


def _parsed_line(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start} of the line). Convert the file to UTF-8."
        ) from None
    with _explained(where):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Explain what Python's JSON parser cannot take."""
    try:
        yield
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads integers of up to 4300 digits
        raise DataError(f"{where}: a number in the JSON has too many digits. Store it as a string.") from None
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = json.dumps(value, ensure_ascii=False)
        raise DataError(f"{where}: expected a JSON object, not {shown if len(shown) <= 40 else f'{shown[:40]}…'}.")
    return value


class _JsonStream:
    """JSON values one after another in a text that is read bit by bit. At most one value is in memory."""

    def __init__(self, path: Path, advance: Advance | None) -> None:
        self._blocks = decoded(content_blocks(path, advance), path)
        self._decode = json.JSONDecoder().raw_decode
        self._buffer, self._place = "", 0
        self._ended = False
        self._path, self.line = path, 1

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            self._skip_to(_BEFORE_VALUE.match(self._buffer, self._place).end())  # type: ignore[union-attr]
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._read():
                return ""

    def skip(self) -> None:
        """Go past the next character."""
        self._skip_to(self._place + 1)

    def value(self, where: str) -> Any:
        """Return the next value and go past it. Raise DataError for one that is not valid or larger than the limit."""
        while True:
            available = len(self._buffer) - self._place
            with _explained(where):
                try:
                    value, end = self._decode(self._buffer, self._place)
                except json.JSONDecodeError as error:
                    if self._ended or not self._is_cut(error):
                        self._skip_to(error.pos)
                        raise self.invalid(error.msg) from None
                else:
                    self._skip_to(end)
                    return value
            if available > files.MAX_LINE_BYTES:
                limit = files.MAX_LINE_BYTES >> 20
                raise DataError(f"{where}: longer than {limit} MB. Store the rows as JSON lines, one object per line.")
            self._read(available)  # as much again, so that a long value is not parsed again for every block

    def invalid(self, message: str) -> DataError:
        """Return the error for what stands at the present place."""
        return DataError(f"{self._path}, line {self.line}: not valid JSON ({message}).")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the error may be there because the rest of the text has not been read yet."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 16

    def _skip_to(self, place: int) -> None:
        self.line += self._buffer.count("\n", self._place, place)
        self._place = place

    def _read(self, least: int = 1) -> bool:
        """Read at least so many characters more, if there are. Return whether there were any."""
        parts, read = [self._buffer[self._place :]], 0
        while read < least and not self._ended:
            block = next(self._blocks, "")
            self._ended = not block
            parts.append(block)
            read += len(block)
        self._buffer, self._place = "".join(parts), 0
        return read > 0


def _json(path: Path, advance: Advance | None) -> Iterator[Row]:
    """Read arrays of objects, objects one after another, or an object with one list of objects: {"data": [...]}."""
    stream = _JsonStream(path, advance)
    number = 0
    while character := stream.peek():
        if character != "[":
            number += 1
            where = f"{path}, line {stream.line}, row {number}"
            value = _object(stream.value(where), where)
            if number == 1 and not stream.peek() and (rows := _only_list(value)) is not None:
                name, values = rows
                yield from (Row(f"{path}, {name}[{i}]", row) for i, row in enumerate(values))
                return
            yield Row(where, value)
            continue
        stream.skip()
        while (character := stream.peek()) != "]":
            number += 1
            where = f"{path}, line {stream.line}, row {number}"
            yield Row(where, _object(stream.value(where), where))
            if (character := stream.peek()) == ",":
                stream.skip()
                if stream.peek() == "]":
                    raise stream.invalid("a comma after the last row")
            elif character != "]":
                raise stream.invalid("expected , or ] after a row" if character else "the list has no end")
        stream.skip()


def _only_list(value: dict[str, Any]) -> tuple[str, list[dict[str, Any]]] | None:
    """Return the name and the value of the only list of objects in `value`, if the rest says something about it."""
    lists = [(name, each) for name, each in value.items() if isinstance(each, list)]
    if len(lists) != 1 or not lists[0][1] or not all(isinstance(each, dict) for each in lists[0][1]):
        return None
    name, rows = lists[0]
    return (name, rows) if name in ("data", "rows", "train", "examples", "items", "records") else None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv(path: Path, delimiter: str, advance: Advance | None) -> Iterator[Row]:
    lines = _text_lines(path, advance)
    first = next(lines, None)
    if first is None:
        return
    if not delimiter:  # spreadsheets of many countries write semicolons
        outside = re.sub(r'"[^"]*"', "", first)
        delimiter = next((each for each in (",", ";", "\t") if each in outside), ",")
    csv.field_size_limit(max(csv.field_size_limit(), files.MAX_LINE_BYTES))
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for values in reader:
            where = f"{path}, line {line}"
            line = reader.line_num + 1
            if not values:  # a blank line
                continue
            if names is None:
                names = [name.strip() for name in values]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise DataError(f"{where}: several columns are called {first_few(twice)}. Rename them.")
                continue
            if len(values) != len(names):
                raise DataError(f"{where}: {len(values)} fields, but the first line names {len(names)}.")
            yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not valid CSV ({error}).") from None


def _text_lines(path: Path, advance: Advance | None) -> Iterator[str]:
    """Yield lines with their ends, one of which may be \\r\\n."""
    parts: list[str] = []
    for text in decoded(content_blocks(path, advance), path):
        *lines, rest = text.split("\n")
        for line in lines:
            yield "".join([*parts, line, "\n"])
            parts = []
        if rest:
            parts.append(rest)
            if sum(map(len, parts)) > files.MAX_LINE_BYTES:
                raise DataError(f"{path} has a line longer than {files.MAX_LINE_BYTES >> 20} MB. Is it a table?")
    if parts:
        yield "".join(parts)


# --- Parquet and Arrow -----------------------------------------------------------------------------------------------


def _parquet(path: Path, advance: Advance | None, field: str | None) -> Iterator[Row]:
    with _opened(path, ".parquet") as (schema, file):
        columns = None if field is None else [_text_column(schema, field, path)]
        per_row = stat(path).st_size / max(1, file.metadata.num_rows)
        batches = file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns, use_threads=False)
        yield from _batch_rows(batches, path, advance, per_row)


def _arrow(path: Path, advance: Advance | None, field: str | None) -> Iterator[Row]:
    import pyarrow

    with _opened(path, ".arrow") as (schema, file):
        if field is not None:
            _text_column(schema, field, path)
        place = 0

        def batches() -> Iterator[Any]:
            nonlocal place
            stream = isinstance(file, pyarrow.ipc.RecordBatchStreamReader)
            for batch in file if stream else (file.get_batch(i) for i in range(file.num_record_batches)):
                chosen = batch if field is None else batch.select([field])
                for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                    yield chosen.slice(start, ROWS_AT_A_TIME)
                if advance is not None:
                    size = min(batch.get_total_buffer_size(), stat(path).st_size - place)
                    place += size
                    advance(size)

        yield from _batch_rows(batches(), path, None, 0.0)
        if advance is not None:
            advance(stat(path).st_size - place)


def _batch_rows(batches: Iterable[Any], path: Path, advance: Advance | None, per_row: float) -> Iterator[Row]:
    iterator = iter(batches)
    number = 0
    while True:
        with _naming(path, number):
            batch = next(iterator, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for values in rows:
            number += 1
            yield Row(f"{path}, row {number}", values)
        if advance is not None:
            advance(round(per_row * len(rows)))


@contextlib.contextmanager
def _naming(path: Path, row: int) -> Iterator[None]:
    """Turn errors of pyarrow into one that names the file and the row."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if suffixes(path)[0] == ".parquet" else "Arrow"
        reason = (str(error).splitlines() or ["unknown reason"])[0].rstrip(".")
        raise DataError(f"{path} cannot be read as {kind} (near row {row + 1}): {reason}.") from None


@contextlib.contextmanager
def _opened(path: Path, suffix: str) -> Iterator[tuple[Any, Any]]:
    """Yield the schema and the reader of a Parquet file, or of an Arrow file of either form (stream or file)."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise missing("pyarrow", path) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming(path, 0))
        if suffix == ".parquet":
            # A small buffer makes pyarrow stream a row group instead of loading it whole.
            file = stack.enter_context(parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
            schema = file.schema_arrow
        else:
            raw = stack.enter_context(pyarrow.OSFile(str(path)))
            is_file = next(read_blocks(path), b"").startswith(b"ARROW1")
            file = stack.enter_context(ipc.open_file(raw) if is_file else ipc.open_stream(raw))
            schema = file.schema
        yield schema, file


def _text_column(schema: Any, field: str, path: Path) -> str:
    """Return `field`. Raise DataError if there is no such column, or none of strings."""
    import pyarrow

    if field not in schema.names:
        raise DataError(f"{path}: no column {field!r}. {_describe_fields(field, schema.names)}")
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_string", "is_large_string", "is_string_view", "is_null")  # null: a shard of nothing but null
    if not any(getattr(pyarrow.types, check)(kind) for check in checks if hasattr(pyarrow.types, check)):
        raise DataError(f"{path}: column {field!r} holds {kind}, not strings.")
    return field
