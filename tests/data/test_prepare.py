"""Prepared tokens equal the tokenizer's. They are made once, split without overlap, and never left incomplete."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers

from gptsmith.data import Dataset, Source, open_dataset, open_source, prepare
from gptsmith.errors import DataError, GptsmithError, TokenizerError, UsageError
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char

preparing = importlib.import_module("gptsmith.data.prepare")
sources = importlib.import_module("gptsmith.data.sources")

WORDS = "the quick brown fox jumps over 13 lazy dogs, while the “naïve” 漢字 😀 wait.\n"
CHAR = train_char([WORDS, "abcxyz-_'\t\r"])
BPE = train_bpe([WORDS * 20], vocab_size=320)


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, inner: Tokenizer, **changes: Any) -> None:
        self.inner, self.encoded, self.changes, self.lock = inner, 0, changes, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self.inner, name)

    def _count(self, amount: int) -> None:
        with self.lock:
            self.encoded += amount

    def encode_array(self, text: str) -> np.ndarray:
        self._count(len(text))
        return self.inner.encode_array(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._count(sum(map(len, texts)))
        return self.inner.encode_batch(texts)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many chunks, batches and shards of little text."""
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(preparing, "CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(preparing, "SHARD_TOKENS", 1000)


def text_file(directory: Path, text: str, name: str = "input.txt") -> Source:
    path = directory / name
    path.write_bytes(text.encode())
    return open_source(path)


def jsonl_file(directory: Path, texts: list[str]) -> Source:
    path = directory / "input.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_source(path)


def all_tokens(dataset: Dataset) -> list[int]:
    return [*dataset.train.tokens().tolist(), *dataset.val.tokens().tolist()]


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("small_chunks")
def test_tokens_are_those_of_the_whole_text(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    text = WORDS * 100
    dataset = prepare(text_file(tmp_path, text), tokenizer, workers=workers)
    ids = tokenizer.encode(text)
    assert all_tokens(dataset) == ids
    assert len(list(dataset.directory.glob("train-0*.bin"))) == -(-len(ids) // 1000)
    assert abs(len(dataset.train) - 0.9 * len(ids)) <= 4
    assert dataset.train.tokens().dtype == np.uint16
    assert dataset.train.num_documents == dataset.val.num_documents == 1
    for split, size in ((dataset.train, dataset.bytes_train), (dataset.val, dataset.bytes_val)):
        decoded = tokenizer.decode(split.tokens())
        assert (split.num_chars, size) == (len(decoded), len(decoded.encode()))
    assert tokenizer.decode(dataset.train.tokens()) + tokenizer.decode(dataset.val.tokens()) == text
    assert open_dataset(dataset.directory, verify=True).fingerprint == dataset.fingerprint


def test_character_tokens_are_cut_exactly(tmp_path: Path) -> None:
    text = (WORDS * 20)[:1003]
    dataset = prepare(text_file(tmp_path, text), CHAR)
    assert len(dataset.train) == int(len(text) * 0.9)
    assert CHAR.decode(dataset.val.tokens()) == text[int(len(text) * 0.9) :]


def test_a_character_of_several_tokens_is_not_cut(tmp_path: Path) -> None:
    for spaces in range(4):
        text = " " * spaces + "😂" * 40  # four bytes each, none of them merged
        dataset = prepare(text_file(tmp_path, text), BPE, val_fraction=0.3)
        parts = [BPE.decode(dataset.train.tokens()), BPE.decode(dataset.val.tokens())]
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)
        assert [dataset.bytes_train, dataset.bytes_val] == [len(part.encode()) for part in parts]


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
@pytest.mark.usefixtures("small_chunks")
def test_documents_are_separated_and_kept_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [WORDS[i % 7 :] * (1 + i % 9) for i in range(60)]
    dataset = prepare(jsonl_file(tmp_path, [*texts[:30], "", *texts[30:]]), tokenizer)
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert all_tokens(dataset) == list(itertools.chain(*expected))
    found = []
    for split in (dataset.train, dataset.val):
        bounds = [*split.document_starts.tolist(), len(split)]
        parts = [split.tokens(low, high).tolist() for low, high in itertools.pairwise(bounds)]
        found += parts
        whole = "".join(tokenizer.decode(part) for part in parts)
        assert (split.num_chars, split.num_bytes) == (len(whole), len(whole.encode()))
    assert found == expected
    longest = max(map(len, expected))
    assert abs(len(dataset.val) - 0.1 * (len(dataset.train) + len(dataset.val))) <= longest


def test_a_long_document_may_be_cut(tmp_path: Path) -> None:
    dataset = prepare(jsonl_file(tmp_path, [WORDS * 10, WORDS * 10]), CHAR)
    total = len(dataset.train) + len(dataset.val)
    assert len(dataset.train) == int(total * 0.9)
    assert dataset.train.num_documents == 2
    assert dataset.val.document_starts.tolist() == [0]
    assert CHAR.decode(dataset.train.tokens()) + CHAR.decode(dataset.val.tokens()) == WORDS * 20


def test_separate_validation_text(tmp_path: Path) -> None:
    train = text_file(tmp_path, "abc xyz " * 100)
    val = text_file(tmp_path, "xyz é abc"[:4], "val.txt")
    dataset = prepare(train, CHAR, val=val, val_fraction=7.0)
    assert CHAR.decode(dataset.train.tokens()) == "abc xyz " * 100
    assert CHAR.decode(dataset.val.tokens()) == "xyz "
    assert dataset.bytes_val == 4
    assert dataset.fingerprint != prepare(train, CHAR).fingerprint


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet="ab xyz\n'13漢😀", max_size=80), min_size=1, max_size=12),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    kind=st.sampled_from(["char", "bpe"]),
    documents=st.booleans(),
)
@example(texts=["11漢"], fraction=0.25, kind="bpe", documents=False)
@pytest.mark.usefixtures("small_chunks")
def test_splits_share_nothing_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float, kind: str, documents: bool
) -> None:
    tokenizer = CHAR if kind == "char" else BPE
    directory = tmp_path_factory.mktemp("text")
    joined = "".join(texts)
    if documents:
        source = jsonl_file(directory, texts)
        ids: list[int | None] = list(
            itertools.chain(*([*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text))
        )
    else:
        (directory / "input.txt").write_bytes(joined.encode())
        if not joined:
            return
        source = text_file(directory, joined)
        ids = [*tokenizer.encode(joined)]
    target = int(len(ids) * (1 - fraction))
    if not joined.strip():
        with pytest.raises(DataError, match="nothing but white space"):
            prepare(source, tokenizer, val_fraction=fraction)
    elif fraction and min(target, len(ids) - target) < 2:
        with pytest.raises(DataError, match="is too short to hold out"):
            prepare(source, tokenizer, val_fraction=fraction)
    else:
        dataset = prepare(source, tokenizer, val_fraction=fraction)
        assert all_tokens(dataset) == ids
        assert bool(dataset.val) == bool(fraction)
        assert dataset.bytes_train + dataset.bytes_val == len(joined.encode())
        decoded = tokenizer.decode(dataset.train.tokens())
        assert (dataset.train.num_chars, dataset.bytes_train) == (len(decoded), len(decoded.encode()))


def test_the_same_text_is_tokenized_once(tmp_path: Path) -> None:
    text = WORDS * 50
    tokenizer: Any = Counting(BPE)
    dataset = prepare(text_file(tmp_path, text), tokenizer)
    assert tokenizer.encoded == len(text)
    again = prepare(text_file(tmp_path, text, "a copy of it.txt"), tokenizer)
    assert tokenizer.encoded == len(text)
    assert again.directory == dataset.directory
    assert again.fingerprint == dataset.fingerprint == again.directory.name + again.fingerprint[40:]
    for other, fraction in ((text + "x", 0.1), (text, 0.2)):
        before = tokenizer.encoded
        assert prepare(text_file(tmp_path, other), tokenizer, val_fraction=fraction).fingerprint != dataset.fingerprint
        assert tokenizer.encoded == before + len(other)
    assert prepare(text_file(tmp_path, text), CHAR).fingerprint != dataset.fingerprint


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    for vocab_size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokenizer: Any = Counting(CHAR, vocab_size=vocab_size, fingerprint=str(vocab_size))
        dataset = prepare(text_file(tmp_path, "abc xyz " * 10), tokenizer)
        assert dataset.train.tokens().dtype == dtype
        assert dataset.vocab_size == vocab_size
        assert CHAR.decode(dataset.train.tokens()) == ("abc xyz " * 10)[:72]


def test_an_unknown_character_is_named_with_its_place(tmp_path: Path) -> None:
    train = text_file(tmp_path, "abc xyz " * 100)
    val = text_file(tmp_path, "abc\nxyz ß", "val.txt")
    with pytest.raises(TokenizerError, match=r"'ß'.*line 2, column 5") as caught:
        prepare(train, CHAR, val=val)
    assert str(caught.value).startswith(f"{val.path}: ")


@pytest.mark.usefixtures("small_chunks")
def test_the_place_in_a_long_text(tmp_path: Path, cache: Path) -> None:
    source = text_file(tmp_path, "abc xyz\n" * 100 + "ß")
    with pytest.raises(TokenizerError, match=r"counting from line \d+: the character 'ß'"):
        prepare(source, CHAR)
    assert list(cache.glob("*")) == list(cache.glob("*.lock"))


# Text that a tokenizer of another model does not know


def other_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer over a few letters or words: with an unknown token, unless the kind ends in "without"."""
    letters = {character: id for id, character in enumerate(["<unk>", *"\u2581abcxyz"])}
    without = {character: id for id, character in enumerate("\u2581abcxyz")}
    scores = [(character, -1.0) for character in letters]
    if kind == "char":
        return train_char(["abcxyz "], unknown=True)
    if kind == "char without":
        return train_char(["abcxyz "])
    model: Any = {
        "wordpiece": lambda: models.WordPiece({"[UNK]": 0, "abc": 1, "xyz": 2, "##s": 3}, unk_token="[UNK]"),
        "unigram": lambda: models.Unigram(scores, unk_id=0),
        "unigram without": lambda: models.Unigram(scores[1:]),
        "bpe": lambda: models.BPE(letters, [], unk_token="<unk>"),
        "bpe without": lambda: models.BPE(without, []),
        "wordlevel without": lambda: models.WordLevel({"abc": 1, "xyz": 0}, unk_token="[UNK]"),
    }[kind]()
    pipeline = Pipeline(model)
    if kind.startswith("word"):
        pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        pipeline.pre_tokenizer, pipeline.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return Tokenizer(pipeline.to_str())


@pytest.mark.parametrize(("kind", "total"), [("char", 8002), ("wordpiece", 2001), ("unigram", 8003), ("bpe", 8003)])
@pytest.mark.usefixtures("small_chunks")
def test_unknown_tokens_are_counted_and_named(
    tmp_path: Path, kind: str, total: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = other_tokenizer(kind)
    source = text_file(tmp_path, "abc xyz " * 1000 + "é ")
    for _ in range(2):  # the second time, the dataset comes from the cache
        dataset = prepare(source, tokenizer)
        said = capsys.readouterr().err
        assert f"1 of {total:,} tokens ({100 / total:.2g}%) are unknown to the tokenizer: 'é' (U+00E9) once." in said
    assert (dataset.unknown["train"].count, dataset.unknown["train"].total) == (1, total)
    assert all_tokens(dataset).count(tokenizer.unk_id or 0) == 1


@pytest.mark.parametrize("kind", ["char", "wordpiece", "unigram", "bpe"])
def test_a_tokenizer_that_knows_too_little_of_a_text_is_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = other_tokenizer(kind)
    source = jsonl_file(tmp_path, ["abc xyz", "abc é 漢 é"])
    for _ in range(2):
        with pytest.raises(TokenizerError, match="A tokenizer that does not know more than 1% of a text") as caught:
            prepare(source, tokenizer, val_fraction=0)
        assert "3 of" in str(caught.value)
        assert "'é' (U+00E9) 2 times, '漢' (U+6F22) once" in str(caught.value)
    assert capsys.readouterr().err == ""
    assert prepare(source, tokenizer, val_fraction=0, allow_unknown=True).unknown["train"].count == 3
    assert "are unknown to the tokenizer" in capsys.readouterr().err


def test_unknown_text_in_the_validation_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = text_file(tmp_path, "abc xyz " * 100), text_file(tmp_path, "abc é", "val.txt")
    with pytest.raises(TokenizerError, match=r"val\.txt: 1 of 5 tokens \(20%\) are unknown"):
        prepare(train, other_tokenizer("char"), val=val)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("char without", "3 of 16 characters (19%) have no token: 'é' (U+00E9) 2 times, '漢' (U+6F22) once."),
        ("unigram without", "3 of 16 characters (19%) have no token: 'é' (U+00E9) 2 times, '漢' (U+6F22) once."),
        ("wordlevel without", "6 of 19 characters (32%) have no token: 'éé' 2 times, '漢漢' once."),
    ],
)
def test_text_without_tokens_is_refused_with_what_it_is(tmp_path: Path, cache: Path, kind: str, counted: str) -> None:
    source = jsonl_file(tmp_path, ["abc xyz", "abc é 漢 é" if kind != "wordlevel without" else "abc éé 漢漢 éé"])
    with pytest.raises(TokenizerError) as caught:
        prepare(source, other_tokenizer(kind), val_fraction=0, allow_unknown=True)
    message = str(caught.value)
    assert message.startswith(f"{source.path}, line 2: ")
    assert f"In all, {counted}" in message
    assert message.endswith("or use --tokenizer bpe, which covers all text.")
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_text_that_a_tokenizer_leaves_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline(models.BPE({character: id for id, character in enumerate("abcxyzĠ")}, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    without_some_bytes = Tokenizer(pipeline.to_str())
    assert without_some_bytes.kind == "bpe"
    for tokenizer in (without_some_bytes, other_tokenizer("bpe without")):
        prepare(text_file(tmp_path, "abc xyz " * 1000), tokenizer)
        assert capsys.readouterr().err == ""
        few = text_file(tmp_path, "abc xyz " * 1000 + "\x04")
        for _ in range(2):
            assert prepare(few, tokenizer).unknown["train"].count == 1
            said = capsys.readouterr().err
            assert "1 of 8,001 characters (0.012%) have no token and are left out: '\\x04' (U+0004) once." in said
        many = jsonl_file(tmp_path, ["abc xyz", "abc é 漢 é"])
        with pytest.raises(TokenizerError, match=r"3 of 16 characters \(19%\) have no token and are left out: 'é'"):
            prepare(many, tokenizer, val_fraction=0)
        assert prepare(many, tokenizer, val_fraction=0, allow_unknown=True).unknown["train"].count == 3
        capsys.readouterr()


@pytest.mark.usefixtures("small_chunks")
def test_reading_stops_and_counting_is_bounded_where_no_character_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "ENOUGH_UNKNOWN", 1000)
    monkeypatch.setattr(preparing, "MAX_UNKNOWN_PARTS", 10)
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    source = text_file(tmp_path, han * 10)
    with pytest.raises(TokenizerError) as caught:
        prepare(source, CHAR, workers=1)
    assert "Up to where reading was stopped, 1,000 of 1,000 characters (100%) have no token: " in str(caught.value)
    assert "'一' (U+4E00) once" in str(caught.value)
    assert str(caught.value).count(" once, ") == 5
    assert ", and others. " in str(caught.value)


def test_datasets_of_earlier_versions_are_counted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, source = other_tokenizer("char"), text_file(tmp_path, "abc xyz " * 1000 + "é")
    dataset = prepare(source, tokenizer)
    path = dataset.directory / "dataset.json"
    index = json.loads(path.read_text())
    del index["texts"]["train"]["unknown"]
    path.write_text(json.dumps(index))
    assert open_dataset(dataset.directory).unknown == {}
    capsys.readouterr()
    again = prepare(source, tokenizer)
    assert again.fingerprint == dataset.fingerprint
    assert again.unknown == dataset.unknown
    assert "preparing again: unknown tokens were not counted" in capsys.readouterr().err


@pytest.mark.parametrize("text", [" ", "\n\n \t\n"])
def test_white_space_only(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="nothing but white space"):
        prepare(text_file(tmp_path, text), BPE)


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        prepare(jsonl_file(tmp_path, ["", ""]), BPE)


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0, float("nan")])
def test_impossible_fractions(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match=r"between 0 and 0\.5"):
        prepare(text_file(tmp_path, WORDS), BPE, val_fraction=fraction)


def test_impossible_workers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers must be at least 1"):
        prepare(text_file(tmp_path, WORDS), BPE, workers=0)


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "version", "empty"])
def test_damaged_preparations_are_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = text_file(tmp_path, WORDS * 10)
    directory = prepare(source, CHAR).directory
    shard, index = directory / "train-00000.bin", directory / "dataset.json"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "gone":
        shard.unlink()
    elif damage == "index":
        os.truncate(index, index.stat().st_size // 2)
    elif damage == "version":
        index.write_text(index.read_text().replace('"format": 1', '"format": 0'))
    else:
        for path in directory.iterdir():
            path.unlink()
    with pytest.raises(DataError, match="Prepare the text again"):
        open_dataset(directory)
    tokenizer: Any = Counting(CHAR)
    dataset = prepare(source, tokenizer)
    assert tokenizer.encoded == len(WORDS * 10)
    assert "preparing again" in capsys.readouterr().err
    assert CHAR.decode(all_tokens(dataset)) == WORDS * 10


def test_a_changed_byte_is_found_on_request(tmp_path: Path) -> None:
    directory = prepare(text_file(tmp_path, WORDS * 10), CHAR).directory
    shard = directory / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    open_dataset(directory)
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged"):
        open_dataset(directory, verify=True)


def test_a_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing or damaged"):
        open_dataset(tmp_path / "nothing")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.usefixtures("small_chunks")
def test_an_interruption_leaves_no_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = text_file(tmp_path, WORDS * 100)
    append = preparing._Text.append
    calls = 0

    def interrupted(self: Any, encoded: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise error
        append(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(preparing._Text, "append", interrupted)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else GptsmithError) as caught:
            prepare(source, BPE)
    if isinstance(error, OSError):
        assert "no space left" in str(caught.value)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert [thread for thread in threading.enumerate() if thread.name.startswith("gptsmith-tokenize")] == []
    assert BPE.decode(all_tokens(prepare(source, BPE))) == WORDS * 100


@pytest.mark.skipif(os.name == "nt", reason="leftovers are only recognized where there are file locks")
def test_files_of_a_killed_process_are_removed(tmp_path: Path, cache: Path) -> None:
    source = text_file(tmp_path, WORDS * 10)
    directory = prepare(source, CHAR).directory
    left = cache / f".tmp-abc123-{directory.name}"
    of_another = cache / ".tmp-abc123-another"
    directory.rename(left)
    of_another.mkdir()
    prepare(source, CHAR)
    assert not left.exists()
    assert of_another.exists()


def test_text_that_changes_while_it_is_read(tmp_path: Path, cache: Path) -> None:
    source = text_file(tmp_path, WORDS * 10)

    class Slow(Counting):
        def encode_array(self, text: str) -> np.ndarray:
            with open(source.path, "a") as file:
                file.write("more")
            return super().encode_array(text)

    slow: Any = Slow(CHAR)
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare(source, slow)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_text_that_changes_before_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS)
    source = open_source(folder)
    source.fingerprint()
    assert source.unchanged()
    (folder / "a.txt").write_text(WORDS * 2)
    with pytest.raises(DataError, match="was changed"):
        prepare(source, CHAR)
    assert len(prepare(open_source(folder), CHAR).train) > len(WORDS)


def test_threads_at_the_same_time_do_the_work_once(tmp_path: Path) -> None:
    text = WORDS * 2000
    tokenizer: Any = Counting(BPE)
    found: list[Dataset] = []
    path = text_file(tmp_path, text).path
    threads = [threading.Thread(target=lambda: found.append(prepare(open_source(path), tokenizer))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({dataset.directory for dataset in found}) == 1
    assert len(found) == 4
    assert tokenizer.encoded == len(text) or os.name == "nt"


SCRIPT = """
import sys
from gptsmith.data import open_source, prepare
from gptsmith.tokenizer import train_char
source = open_source(sys.argv[1])
tokenizer = train_char(chunk.text for chunk in source.chunks())
assert "torch" not in sys.modules
print(prepare(source, tokenizer).directory)
"""


def test_processes_at_the_same_time_agree(tmp_path: Path, cache: Path) -> None:
    source = text_file(tmp_path, WORDS * 20_000)
    command = [sys.executable, "-c", SCRIPT, str(source.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert [str(path) for path in cache.iterdir() if path.is_dir()] == [outputs[0][0].strip()]
    assert len(open_dataset(Path(outputs[0][0].strip()), verify=True).train) == int(len(WORDS * 20_000) * 0.9)


def test_rows_that_are_left_out_are_said_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    path = tmp_path / "old" / "a.jsonl"
    path.write_text('{"text": "abc abc"}\n{"text": null}\n{"text": "abc"}\n')
    prepare(open_source(path), CHAR)
    shutil.move(tmp_path / "old", tmp_path / "new")
    prepare(open_source(tmp_path / "new" / "a.jsonl"), CHAR)  # from the cache
    lines = capsys.readouterr().err.splitlines()
    said = "left out 1 row without a text (null or empty; the first: a.jsonl, line 2)"
    assert lines == [f"{path}: {said}", f"{tmp_path / 'new' / 'a.jsonl'}: {said}"]
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": null}\n' * 3)
    with pytest.raises(DataError, match="holds no text: left out 3 rows without a text"):
        prepare(open_source(path), CHAR)
