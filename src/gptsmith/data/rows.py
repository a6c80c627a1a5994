"""Rows of tables: JSON lines, JSON, CSV and Parquet, one file or a folder of them.

    for row in read_rows(Path("chats.jsonl.gz")): row.values["messages"], row.where

Files are read in bounded memory, except a JSON array, which is read whole. What a row means is up to the caller.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptsmith.data.sources import (
    PARQUET_ROWS,
    Advance,
    _decoded,
    _decompressed_blocks,
    _lines,
    _missing,
    _suffixes,
)
from gptsmith.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
LARGEST_FIELD = 64 << 20  # characters of a CSV field


class Row(NamedTuple):
    """where: the file and the line (CSV, JSON lines) or row, for messages."""

    where: str
    values: dict[str, Any]


def row_files(path: Path) -> list[Path]:
    """Return the files of rows that `path` is: itself, or those in a folder and its folders, sorted by name.

    Where a folder has files of several splits, as data sets on the Hugging Face hub do, those of the training split are
    returned. Raises DataError if there are none.
    """
    if not path.is_dir():
        if _suffixes(path)[0] not in FORMATS:
            raise DataError(f"{path} is not a table. Rows are read from {', '.join(FORMATS)} (also .gz, .zst).")
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _suffixes(file)[0] in FORMATS and not file.name.startswith(".")
    ]
    found = [file for file in found if file.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
    if not found:
        raise DataError(f"the folder {path} has no files of rows ({', '.join(FORMATS)}).")
    splits = {file: _split_of(file.relative_to(path)) for file in found}
    if "train" in splits.values():
        found = [file for file in found if splits[file] in ("train", None)]
    return found


def _split_of(file: Path) -> str | None:
    """Return the split that a file's name or folder names: train, validation, test."""
    words = {word.split("-")[0].split(".")[0].lower() for word in (*file.parts[:-1], file.name)}
    return next((split for split in ("train", "validation", "valid", "dev", "test") if split in words), None)


def read_rows(path: Path, advance: Advance | None = None) -> Iterator[Row]:
    """Yield the rows of a file or of a folder's files. advance: called with the bytes read since the last call.

    Raises DataError for anything that cannot be read, naming the file and where in it.
    """
    for file in row_files(Path(path)):
        suffix = _suffixes(file)[0]
        if suffix == ".parquet":
            yield from _parquet(file, advance)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(file, "\t" if suffix == ".tsv" else ",", advance)
        elif suffix == ".json":
            yield from _json(file, advance)
        else:
            yield from _json_lines(file, advance)


def _json_lines(path: Path, advance: Advance | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(_decompressed_blocks(path, advance), path), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _object(_parsed(line, where), where))


def _json(path: Path, advance: Advance | None) -> Iterator[Row]:
    content = b"".join(_decompressed_blocks(path, advance)).removeprefix(codecs.BOM_UTF8)
    try:
        values = _parsed(content, str(path))
    except DataError:
        if (
            len(lines := content.splitlines()) > 1
            and lines[0].lstrip().startswith(b"{")
            and lines[0].rstrip()[-1:] == b"}"
        ):
            yield from _json_lines(path, None)  # JSON lines under another name
            return
        raise
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 and len(values) <= 3 else [values]  # {"data": [...]}
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of objects.")
    for number, value in enumerate(values, 1):
        where = f"{path}, row {number}"
        yield Row(where, _object(value, where))


def _csv(path: Path, delimiter: str, advance: Advance | None) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(_text_lines(path, advance), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for values in reader:
            if names is None:
                names = [name.strip() for name in values]
                continue
            where = f"{path}, line {reader.line_num}"
            if values and len(values) != len(names):
                raise DataError(f"{where}: {len(values)} fields, but the first line names {len(names)}.")
            if values:
                yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None


def _text_lines(path: Path, advance: Advance | None) -> Iterator[str]:
    rest = ""
    for text in _decoded(_decompressed_blocks(path, advance), path):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest


def _parquet(path: Path, advance: Advance | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", path) from None
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
                if advance is not None:
                    advance(round(per_row * batch.num_rows))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be read as Parquet (near row {number}): {reason}.") from None


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}). Convert the file to UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})."
        ) from None
    except ValueError:  # Python reads integers of up to 4300 digits
        raise DataError(f"{where}: a number in the JSON has too many digits. Store it as a string.") from None
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, not {json.dumps(value)[:40]}.")
    return value
