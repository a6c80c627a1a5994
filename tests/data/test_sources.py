"""Sources yield the text on disk in bounded chunks, and refuse what is not text with its file and place."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptsmith.data import DocumentChunk, files, open_source
from gptsmith.data.sources import FolderSource
from gptsmith.errors import DataError, GptsmithError, UsageError

sources = importlib.import_module("gptsmith.data.sources")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))


def text_of(spec: Path, **options: str) -> str:
    return "".join(chunk.text for chunk in open_source(spec, **options).chunks())


def documents_of(spec: Path, **options: str) -> list[str]:
    documents, text = [], ""
    for chunk in open_source(spec, **options).chunks():
        text += chunk.text
        if chunk.ends_document:
            documents.append(text)
            text = ""
    assert not text, "the last document has no end"
    return documents


# --- plain text


def test_plain_text_is_one_stream_with_its_own_newlines(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\n\ufeffé\n".encode())
    assert list(open_source(path).chunks()) == [DocumentChunk("one\r\ntwo\rthree\n\ufeffé\n", ends_document=False)]


def test_the_fingerprint_of_a_text_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(b"to be or not to be")
    assert open_source(path).fingerprint() == hashlib.sha256(b"to be or not to be").hexdigest()


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_characters_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(files, "READ_BYTES", block)
    path = tmp_path / "input.txt"
    text = "\ufeffaé漢😀 z\n" * 5
    path.write_text(text, encoding="utf-8")
    assert text_of(path) == text[1:]


def test_chunks_are_bounded_and_progress_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    text = "the quick brown fox, é\n" * 50_000
    path.write_text(text, encoding="utf-8")
    read: list[int] = []
    source = open_source(path)
    chunks = list(source.chunks(read.append))
    assert len(chunks) > 3
    assert max(len(chunk.text) for chunk in chunks) <= sources.CHUNK_CHARACTERS
    assert "".join(chunk.text for chunk in chunks) == text
    assert sum(read) == source.size_bytes == path.stat().st_size


def test_text_without_any_space_is_still_cut(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    text = "漢字" * sources.CHUNK_CHARACTERS
    path.write_text(text, encoding="utf-8")
    chunks = list(open_source(path).chunks())
    assert {len(chunk.text) for chunk in chunks} == {sources.CHUNK_CHARACTERS}
    assert "".join(chunk.text for chunk in chunks) == text


def _gpt2_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["ab ab, ab\n\n  ab's we'll 12 123  \n é漢 " * 20], trainer)
    return tokenizer


TOKENIZER = _gpt2_like()
WORDS = st.text(alphabet="abé漢1²'.,-_  \n\n\r\t", min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS, max_size=60), limit=st.integers(20, 50))
def test_tokens_of_the_chunks_are_the_tokens_of_the_whole_text(words: list[str], limit: int) -> None:
    # " x " at intervals, so that every window has a place to cut
    text = " x ".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_CHARACTERS", limit)
        patch.setattr(sources, "CUT_WINDOW", limit)
        chunks = list(sources._cut([text[:30], text[30:31], text[31:]]))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= limit for chunk in chunks)
    assert [id for chunk in chunks for id in TOKENIZER.encode(chunk).ids] == TOKENIZER.encode(text).ids


# --- what is not text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "byte 3"),
        (b"ok" * 200_000 + b"\xff", "byte 400000"),
        (b"cut short \xe6\xbc", "byte 10"),
        (b"abc\x00def", "byte 3 is zero"),
        ("hello".encode("utf-16"), "UTF-16"),
    ],
)
def test_not_utf8(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        text_of(path)
    assert str(path) in str(caught.value)


def test_byte_offsets_do_not_depend_on_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 2)
    path = tmp_path / "input.txt"
    path.write_bytes("a漢".encode() + b"\xe6\xbcx")
    with pytest.raises(DataError, match="byte 4"):
        text_of(path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        open_source(path)


def test_a_missing_file_and_a_misspelt_corpus(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_source(tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match="Did you mean 'tinyshakespeare'"):
        open_source("tinyshakespear")


def test_a_corpus_is_opened_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = importlib.import_module("gptsmith.data.corpora")
    path = tmp_path / "built.txt"
    path.write_text("words")
    monkeypatch.setattr(corpora, "corpus_path", lambda name: path)
    source = open_source("tinyshakespeare")
    assert (source.name, source.spec, source.path) == ("tinyshakespeare", "tinyshakespeare", path)


# --- folders


def test_a_folder_is_its_text_files_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "one.txt").write_text("one")
    (folder / "a.md").write_text("two\n")
    (folder / "c.txt").write_text("")
    (folder / ".hidden").write_text("no")
    (folder / ".git" / "config").write_text("no")
    (folder / "picture.png").write_bytes(b"\x89PNG\x00\x00")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    source = open_source(folder)
    assert documents_of(folder) == ["two\n", "one"]
    assert isinstance(source, FolderSource)
    assert source.size_bytes == len("two\none")
    assert source.skipped == 4
    assert "2 text files; skipped 4" in capsys.readouterr().err


def test_a_folder_fingerprint_depends_on_names_and_contents(tmp_path: Path) -> None:
    prints = set()
    for place, (name, text) in enumerate([("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")]):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / name).write_text(text)
        prints.add(open_source(folder).fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("name", [None, "picture.png", ".hidden"])
def test_a_folder_without_text(tmp_path: Path, name: str | None) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    if name:
        (folder / name).write_bytes(b"\x00\x01")
    with pytest.raises(DataError, match="no text in the folder"):
        open_source(folder).fingerprint()


# --- JSON lines


def write_jsonl(path: Path, rows: list[object]) -> bytes:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return data


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    data = write_jsonl(path, [{"text": "one\nline", "id": 1}, {"text": ""}, {"text": "é😀"}])
    assert documents_of(path) == ["one\nline", "é😀"]
    path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") + b"\n  \n")
    assert documents_of(path) == ["one\nline", "é😀"]


def test_json_lines_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = write_jsonl(tmp_path / "data.jsonl", [{"body": f"document {i} " + "words " * 1000} for i in range(200)])
    plain = documents_of(tmp_path / "data.jsonl", field="body")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(data))
    half = len(data) // 2
    frames = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    (tmp_path / "data.jsonl.zst").write_bytes(frames)
    for name in ("data.jsonl.gz", "data.jsonl.zst"):
        assert documents_of(tmp_path / name, field="body") == plain
        source = open_source(tmp_path / name, field="body")
        assert source.name == "data"
        read: list[int] = []
        list(source.chunks(read.append))
        assert sum(read) == source.size_bytes


def test_text_compressed(tmp_path: Path) -> None:
    path = tmp_path / "input.txt.gz"
    path.write_bytes(gzip.compress(b"some words"))
    assert list(open_source(path).chunks()) == [DocumentChunk("some words", ends_document=False)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', "line 2: not valid JSON"),
        (b'["text"]', "line 2: expected a JSON object"),
        (b'{"Text": "a", "id": 3}', "line 2: no field 'text'. The fields are Text, id. Did you mean 'Text'"),
        (b'{"text": 7}', "line 2: field 'text' holds a number"),
        (b'{"text": "caf\xe9"}', "line 2: not UTF-8 text"),
        (b'{"text": "\\ud800"}', "line 2: half of a surrogate pair"),
        (b"[" * 100_000, "line 2: the JSON is nested too deeply"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError) as caught:
        text_of(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "' + b"a" * (3 << 20))
    with pytest.raises(DataError, match="line 2: longer than 1 MB"):
        text_of(path)


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "not packed"])
def test_damaged_archives(tmp_path: Path, compression: str, damage: str) -> None:
    rows = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(20_000))
    packed = gzip.compress(rows) if compression == "gz" else pytest.importorskip("zstandard").compress(rows)
    path = tmp_path / f"data.jsonl.{compression}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else rows)
    with pytest.raises(DataError, match="is incomplete" if damage == "cut" else "is not a valid") as caught:
        text_of(path)
    assert str(path) in str(caught.value)


# --- Parquet


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i} é" for i in range(1000)]
    path = tmp_path / "data.parquet"
    columns = {"body": texts, "id": list(range(1000)), "kind": pyarrow.array(["a", "b"] * 500).dictionary_encode()}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=300)
    assert documents_of(path, field="body") == texts
    assert documents_of(path, field="kind")[:3] == ["a", "b", "a"]
    with pytest.raises(DataError, match=r"no column 'text'\. The fields are body, id, kind"):
        text_of(path)
    with pytest.raises(DataError, match="column 'id' holds int64"):
        text_of(path, field="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        text_of(path)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(GptsmithError, match=package) as caught:
        text_of(tmp_path / name)
    assert 'pip install "gptsmith[data]"' in str(caught.value)


@pytest.mark.parametrize(
    ("path", "name"),
    [("input.txt", "input"), ("my data.jsonl.gz", "my-data"), ("v1.5", "v1"), ("war&peace.parquet", "war-peace")],
)
def test_short_names(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / path).write_text("x")
    assert open_source(tmp_path / path).name == name


def test_integers_of_thousands_of_digits(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text('{"text": "a", "id": ' + "9" * 5000 + "}\n")
    with pytest.raises(DataError, match=r"line 1: a number in the JSON has too many digits"):
        list(open_source(path).chunks())


@pytest.mark.parametrize("encoding", ["utf-32-le", "utf-32-be"])
def test_utf32_is_called_so(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc".encode(encoding))
    with pytest.raises(DataError, match="is UTF-32"):
        list(open_source(path).chunks())


def test_linked_folders_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "more").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "texts")
    assert isinstance(source, FolderSource)
    assert [chunk.text for chunk in source.chunks()] == ["a"]
    assert source.skipped == 1
    assert "linked folders: more" in capsys.readouterr().err


# --- folders of shards, and several files


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def test_a_folder_of_shards_is_read_by_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"
    for letter, suffix in zip("abcde", ["csv", "json", "jsonl", "jsonl.gz", "parquet"], strict=True):
        write_table(folder / f"{letter}.{suffix}", [{"id": 0, "body": f"{letter}{i}"} for i in range(2)])
    (folder / "f.txt").write_text("f0")
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"g0"))
    (folder / "README.md").write_text("about the data")
    (folder / "settings.json").write_text('{"id": 3}')  # among texts, a table without the field is a text
    source = open_source(folder, field="body")
    read: list[int] = []
    texts = [chunk.text for chunk in source.chunks(read.append)]
    assert texts == [*(f"{letter}{i}" for letter in "abcde" for i in range(2)), "f0", "g0", '{"id": 3}']
    assert sum(read) == source.size_bytes
    assert documents_of(folder, field="body") == texts
    err = capsys.readouterr().err
    assert "1 .csv file, 1 .json file, 1 .jsonl file, 1 .jsonl.gz file, 1 .parquet file, 3 text files" in err
    assert "about the data, not read: README.md" in err
    assert "read as text, without a field 'body': settings.json" in err


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "jsonl.gz", "parquet"])
def test_shards_without_the_field_are_no_text(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / "shards" / f"a.{suffix}", [{"body": "a", "id": 1}])
    (tmp_path / "shards" / "README.md").write_text("about the data")
    with pytest.raises(DataError, match=r"'text'\. The fields are body, id\. Choose the field with --field"):
        text_of(tmp_path / "shards")


def test_the_fingerprint_of_shards_depends_on_the_field(tmp_path: Path) -> None:
    write_table(tmp_path / "shards" / "a.jsonl", [{"text": "a", "body": "b"}])
    fields = {open_source(tmp_path / "shards", field=field).fingerprint() for field in ("text", "body")}
    shutil.copytree(tmp_path / "shards", tmp_path / "moved")
    assert open_source(tmp_path / "moved").fingerprint() in fields
    assert len(fields) == 2


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    write_table(tmp_path / "shards" / "a.jsonl", [{"text": "a"}])
    for source in (open_source(tmp_path / "shards"), open_source([tmp_path / "shards", tmp_path / "shards/a.jsonl"])):
        assert source.unchanged()
        write_table(tmp_path / "shards" / "a.jsonl", [{"text": "a", "more": len(str(source))}])
        assert not source.unchanged()


def test_the_splits_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = tmp_path / "hub"
    for split in ("train", "validation", "test"):
        for i in range(2):
            write_table(hub / "data" / f"{split}-0000{i}-of-00002.parquet", [{"text": f"{split}{i}"}])
    source = open_source(hub)
    assert [chunk.text for chunk in source.chunks()] == ["train0", "train1"]
    val = source.validation()
    assert val is not None
    assert [chunk.text for chunk in val.chunks()] == ["validation0", "validation1"]
    assert val.validation() is None
    assert source.fingerprint() != val.fingerprint()
    assert "of the split train; not read: the split test (2)" in capsys.readouterr().err
    write_table(tmp_path / "more.jsonl", [{"text": "more"}])
    both = open_source([tmp_path / "more.jsonl", hub])
    assert [chunk.text for chunk in both.chunks()] == ["more", "train0", "train1"]
    val = both.validation()
    assert val is not None
    assert [chunk.text for chunk in val.chunks()] == ["validation0", "validation1"]


def test_folders_of_texts_have_no_splits(tmp_path: Path) -> None:
    for name in ("train.py", "test.py", "README.md", "package.json"):
        (tmp_path / name).write_text('{"text": 1}')
    source = open_source(tmp_path, field="name")
    assert source.validation() is None
    assert len(list(source.chunks())) == 4
    assert not source.has_fields


def test_several_files_are_separate_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"two"))
    write_table(tmp_path / "c.jsonl", [{"text": "three"}, {"text": "four"}])
    paths = [tmp_path / name for name in ("b.txt", "a.txt.gz", "c.jsonl")]
    source = open_source(paths)
    assert list(source.chunks()) == [DocumentChunk(text, True) for text in ("one", "two", "three", "four")]
    assert source.places == [str(path.resolve()) for path in paths]
    assert source.size_bytes == sum(path.stat().st_size for path in paths)
    assert open_source(source.places).fingerprint() == source.fingerprint()
    assert open_source(paths[::-1]).fingerprint() != source.fingerprint()
    assert open_source(paths[:1]).fingerprint() == open_source(paths[0]).fingerprint()
    assert not capsys.readouterr().err
    assert len(list(open_source([paths[0]] * 2).chunks())) == 2
    assert f"given more than once, and read as often: {paths[0]}" in capsys.readouterr().err


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "a"}, {"text": None}, {"text": ""}]
    write_table(tmp_path / "a.jsonl", rows)
    write_table(tmp_path / "b.parquet", rows)
    write_table(tmp_path / "c.parquet", [{"text": None}] * 2)  # a column of the type null
    for path, count, where in (
        (tmp_path / "a.jsonl", 2, "a.jsonl, line 2"),
        (tmp_path / "b.parquet", 2, "b.parquet, row 2"),
        (tmp_path / "c.parquet", 2, "c.parquet, row 1"),
        (tmp_path, 6, "a.jsonl, line 2"),
    ):
        source = open_source(path)
        for _ in range(2):  # each time anew
            assert {chunk.text for chunk in source.chunks()} <= {"a"}
            assert (source.skipped_rows.count, source.skipped_rows.where) == (count, where)


def test_a_field_that_has_no_use(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_table(tmp_path / "b.jsonl", [{"body": "b"}])
    text, rows = open_source(tmp_path / "a.txt"), open_source(tmp_path / "b.jsonl", field="body")
    sources.refuse_useless_field("body", text, rows)
    sources.refuse_useless_field("body", open_source([tmp_path / "a.txt", tmp_path / "b.jsonl"]), None)
    sources.refuse_useless_field("text", text)
    with pytest.raises(UsageError, match=r"--field body has no use: .*a\.txt is plain text"):
        sources.refuse_useless_field("body", text, None)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "shards" / "a.jsonl.gz", [{"text": "a" * 100}])
    path = tmp_path / "shards" / "b.jsonl.gz"
    path.write_bytes((tmp_path / "shards" / "a.jsonl.gz").read_bytes()[:-5])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is incomplete"):
        text_of(tmp_path / "shards")
