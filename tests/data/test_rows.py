"""Rows of tables: every format gives the same rows, and what cannot be read is named with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data import files
from gptsmith.data.rows import by_split, fields_of, read_rows, row_files, tables_among, walk
from gptsmith.errors import DataError
from tests.factories import examples

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


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "json.gz", "csv.gz"])
def test_compressed(suffix: str, tmp_path: Path) -> None:
    if suffix.endswith("zst"):
        pack = pytest.importorskip("zstandard").compress
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix.rpartition(".")[2]]
    plain = write(tmp_path / f"plain.{suffix.partition('.')[0]}")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack(plain.read_bytes()))
    read: list[int] = []
    assert [row.values for row in read_rows(path, read.append)] == ROWS
    assert sum(read) == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is incomplete") as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=examples(200), deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), max_size=12),
    block=st.integers(1, 60),
    indent=st.sampled_from([None, 0, 2]),
    escape=st.booleans(),
)
def test_a_json_array_is_read_bit_by_bit(
    rows: list[dict[str, Any]], block: int, indent: int | None, escape: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escape), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_BYTES", block)
        assert [row.values for row in read_rows(path)] == rows


def test_a_large_json_array_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = json.dumps({"text": "some words of a text " * 50})
    with open(path, "w") as file:
        file.write("[" + ",\n".join([row] * 20_000) + "]")
    assert path.stat().st_size > 20 << 20
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20


def test_objects_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert [row.values for row in read_rows(path)] == ROWS
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert [row.values for row in read_rows(path)] == [{"messages": [{"role": "user", "content": "hi"}]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2\n', "line 3: not valid JSON"),
        ('[{"a": 1},\n {"a" 2}]', "line 2: not valid JSON .*delimiter"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: not valid JSON .expected , or ]"),
        ('[{"a": 1},\n', "not valid JSON"),
        ('[{"a": 1}', "the list has no end"),
        ('[{"a": 1},\n]', "line 2: not valid JSON .a comma after the last row"),
        ('[{"a": "b}]', "line 1: not valid JSON .Unterminated"),
        ('[{"a": ' + "9" * 5000 + "}]", "line 1, row 1: a number in the JSON has too many digits"),
        ('[{"a": ' + "[" * 100_000, "line 1, row 1: the JSON is nested too deeply"),
        ('[{"a": 1}, "b"]', 'line 1, row 2: expected a JSON object, not "b"'),
        ("words", "line 1: not valid JSON"),
    ],
)
def test_json_that_is_not_valid(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "a.json"))


def test_a_row_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": "' + "b" * (5 << 20) + '"}]')
    with pytest.raises(DataError, match="line 1, row 2: longer than 1 MB"):
        list(read_rows(tmp_path / "a.json"))


def test_csv_of_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext;label\r\n"a; b\r\nc";1\r\n\r\né;2\r\n'.encode())
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"text": "a; b\r\nc", "label": "1"}, {"text": "é", "label": "2"}]
    assert [row.where for row in rows] == [f"{path}, line 2", f"{path}, line 5"]
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="several columns are called text"):
        list(read_rows(path))


def test_one_field(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        path = write(tmp_path / name)
        assert [row.values for row in read_rows(path, field="prompt")] == [{"prompt": row["prompt"]} for row in ROWS]
        with pytest.raises(DataError, match=r"'promt'\. The fields are prompt, completion\. Did you mean 'prompt'"):
            list(read_rows(path, field="promt"))
        assert fields_of(path) == ["prompt", "completion"]


# --- data sets of Hugging Face's library


def test_data_sets_that_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS * 10)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert [row.values for row in read_rows(tmp_path / "one")] == ROWS * 10
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(
        (tmp_path / "one" / "data-00000-of-00003.arrow").read_bytes()
    )  # what `map` leaves beside the data
    assert len(list(read_rows(tmp_path / "one"))) == 30
    splits = datasets.DatasetDict(
        train=whole, validation=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list(ROWS[:2])
    )
    splits.save_to_disk(tmp_path / "splits")
    read: list[int] = []
    rows = list(read_rows(tmp_path / "splits", read.append, field="completion"))
    assert [row.values for row in rows] == [{"completion": row["completion"]} for row in ROWS * 10]
    assert sum(read) == sum(path.stat().st_size for path in row_files(tmp_path / "splits"))
    shards = by_split(tables_among(walk(tmp_path / "splits")[0]), tmp_path / "splits")
    assert [[path.parent.name for path in paths] for paths in shards] == [["train"], ["validation"], ["test"]]


def test_arrow_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS * 300)
    for name, make in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert [row.values for row in read_rows(tmp_path / name)] == ROWS * 300
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: -len(ROWS) * 5000])
        with pytest.raises(DataError, match="cannot be read as Arrow"):
            list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("validation.jsonl", "validation"),
        ("val/0.jsonl.gz", "validation"),
        ("dev.csv", "validation"),
        ("test/data-00000-of-00001.arrow", "test"),
        ("en/sample_eval.json", "test"),
        ("latest/trainer.jsonl", "train"),  # names no split
    ],
)
def test_splits(name: str, split: str, tmp_path: Path) -> None:
    shards = by_split([tmp_path / "train.jsonl", tmp_path / name], tmp_path)
    assert tmp_path / name in getattr(shards, split)
