"""Sources yield the text on disk in bounded chunks, and refuse what is not text with its file and place."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptsmith.data import DocumentChunk, open_source
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
    monkeypatch.setattr(sources, "READ_BYTES", block)
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
    monkeypatch.setattr(sources, "READ_BYTES", 2)
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
        (b'{"text": null}', "line 2: field 'text' holds null"),
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
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1 << 20)
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
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match="row 1: column 'text' is null"):
        text_of(path)
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
