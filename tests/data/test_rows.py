"""Rows of tables: every format gives the same rows, and what cannot be read is named with its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptsmith.data.rows import read_rows, row_files
from gptsmith.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "completion": "two\nlines, and a comma"},
    {"prompt": 'a "quote"', "completion": "é ünï 漢字"},
    {"prompt": "last", "completion": "x" * 3000},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows)) + "\n\n"
        content = text.encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_formats(name: str, tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / name)))
    assert [row.values for row in rows] == ROWS
    assert all(str(tmp_path / name) in row.where for row in rows)


def test_json_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    for name in ("nested", "lines", "bom"):
        assert [row.values for row in read_rows(tmp_path / f"{name}.json")] == ROWS


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        write(tmp_path / "data" / f"train-0000{i}-of-00003.jsonl", [row])
    write(tmp_path / "data" / "test-00000-of-00001.jsonl")
    write(tmp_path / "data" / ".hidden.jsonl")
    (tmp_path / "README.md").write_text("not a table")
    assert [row.values for row in read_rows(tmp_path)] == ROWS
    assert len(row_files(tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text", "is not a table"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"line 2: expected a JSON object, not \[1\]"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1: not UTF-8 text"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "too many digits"),
        ("a.json", b"[1, 2]", "row 1: expected a JSON object"),
        ("a.json", b"7", "expected a list of objects|expected a JSON object"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the first line names 2"),
        ("a.csv", b'a,b\n"1,2\n', "not valid CSV"),
        ("a.parquet", b"PAR1 but not", "cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no files of rows"):
        list(read_rows(tmp_path))
