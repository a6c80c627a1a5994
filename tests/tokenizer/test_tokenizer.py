from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe, train_char

TEXT = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    "  two  spaces\t\u00a0é e\u0301 ß 😀👍🏽 你好 \u202e\x00\x7f <|endoftext|>\r\n"
) * 3

CHAR = train_char([TEXT])
CHAR_UNKNOWN = train_char([TEXT], unknown=True)
BPE = train_bpe([TEXT], 320)
TOKENIZERS = [CHAR, CHAR_UNKNOWN, BPE]
NAMES = ["char", "char with unknown", "bpe"]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
known_text = st.text(st.sampled_from(sorted(set(TEXT))), max_size=60)


def other_tokenizer() -> Tokenizer:
    """Return a tokenizer of kind "other": like SentencePiece with byte fallback, as in Llama."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlo", "he", "▁he", "ll"]
    pipeline = Pipeline(
        models.BPE(
            {token: id for id, token in enumerate(tokens)},
            [("h", "e"), ("▁", "he"), ("l", "l")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(pipeline.to_str(), {"eos_token": {"content": "</s>", "special": True}})


OTHER = other_tokenizer()


def test_attributes_of_each_kind() -> None:
    alphabet = len(set(TEXT))
    assert (CHAR.kind, CHAR.vocab_size, CHAR.eos_id, CHAR.unk_id) == ("char", alphabet + 1, 0, None)
    assert (CHAR_UNKNOWN.kind, CHAR_UNKNOWN.vocab_size, CHAR_UNKNOWN.eos_id) == ("char", alphabet + 2, 0)
    assert CHAR_UNKNOWN.unk_id == 1
    assert (BPE.kind, BPE.vocab_size, BPE.eos_id, BPE.unk_id) == ("bpe", 320, 0, None)
    assert (OTHER.kind, OTHER.eos_id, OTHER.unk_id) == ("other", 2, 0)


@given(any_text)
def test_bpe_decodes_any_text_exactly(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert all(0 <= id < BPE.vocab_size for id in ids)


@pytest.mark.parametrize("tokenizer", [CHAR, CHAR_UNKNOWN], ids=NAMES[:2])
@given(text=known_text)
def test_char_decodes_known_text_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer._pipeline.encode(text, add_special_tokens=False).ids == ids  # as others read the same file


@given(any_text)
def test_char_unknown_token_stands_for_each_unknown_character(text: str) -> None:
    ids = CHAR_UNKNOWN.encode(text)
    assert ids == CHAR_UNKNOWN._pipeline.encode(text, add_special_tokens=False).ids
    assert [id == 1 for id in ids] == [character not in TEXT for character in text]


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, OTHER], ids=[*NAMES, "other"])
@settings(max_examples=300)
@given(data=st.data())
def test_streaming_gives_the_same_text_as_decoding_all(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@given(any_text)
def test_streaming_never_returns_a_part_of_a_character(text: str) -> None:
    stream = BPE.stream()
    done = ""
    for id in BPE.encode(text):
        done += stream.push(id)
        assert text.startswith(done)
    assert done + stream.finish() == text


def test_streaming_holds_bytes_back_until_the_character_is_complete() -> None:
    tokenizer = train_bpe(["abc"], 257)
    first, second, third = tokenizer.encode("€")
    stream = tokenizer.stream()
    assert [stream.push(first), stream.push(second), stream.push(third)] == ["", "", "€"]
    assert stream.push(first) == ""
    assert stream.push(tokenizer.encode("a")[0]) == "\ufffda"  # now it is certain
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(second) == "\ufffd"


def test_streaming_and_special_tokens() -> None:
    for tokenizer in TOKENIZERS:
        ids = [*tokenizer.encode("All"), 0, *tokenizer.encode("we")]
        for skip in (True, False):
            stream = tokenizer.stream(skip_special_tokens=skip)
            text = "".join(map(stream.push, ids)) + stream.finish()
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)
            assert text == ("Allwe" if skip else f"All{END_OF_TEXT}we")


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
def test_text_that_looks_like_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(END_OF_TEXT)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == END_OF_TEXT
    assert tokenizer.encode_batch([END_OF_TEXT]) == [ids]
    assert tokenizer.encode_array(END_OF_TEXT).tolist() == ids


def test_text_that_looks_like_the_unknown_token_stays_text() -> None:
    tokenizer = train_char(["<|unk|>"], unknown=True)
    assert tokenizer.decode(tokenizer.encode("<|unk|>")) == "<|unk|>"


@pytest.mark.parametrize("text", ["", " ", "\n", "\ufeff", "\x00", "\ufffd", "a" * 100_000, "\n" * 100_000])
def test_odd_texts(text: str) -> None:
    for tokenizer in (BPE, train_char([text or "a"])):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint32
        assert array.shape == (len(tokenizer.encode(text)),)


def test_a_batch_encodes_as_single_texts_do() -> None:
    texts = ["", "All: speak", "😀 two"]
    for tokenizer in [*TOKENIZERS, OTHER]:
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(TokenizerError) as raised:
        CHAR.encode("All:\nhear @ me")
    assert "'@' (U+0040) at character 10 (line 2, column 6)" in str(raised.value)
    for text, code in (("\U00020000", "U+20000"), ("Ω", "U+03A9")):
        with pytest.raises(TokenizerError, match=rf"{code[:1]}\+{code[2:]}\) at character 3 \(line 1, column 4\)"):
            CHAR.encode_array(f"All{text}")


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, OTHER], ids=[*NAMES, "other"])
def test_lone_surrogate_is_named_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"U\+D83D\) at character 4 \(line 1, column 5\)"):
        tokenizer.encode("hear\ud83d me")
    with pytest.raises(TokenizerError, match=r"U\+D83D"):
        tokenizer.encode_batch(["hear", "\ud83d"])


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, OTHER], ids=[*NAMES, "other"])
def test_id_out_of_range_is_refused(tokenizer: Tokenizer) -> None:
    for id in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(TokenizerError, match=f"{id} is not a token id"):
            tokenizer.decode([0, id])
        with pytest.raises(TokenizerError, match=f"{id} is not a token id"):
            tokenizer.stream().push(id)
        with pytest.raises(TokenizerError, match=f"{id} is not a token id"):
            tokenizer.token_text(id)


def test_decode_takes_arrays() -> None:
    for tokenizer in TOKENIZERS:
        assert tokenizer.decode(tokenizer.encode_array("All: speak")) == "All: speak"
        assert tokenizer.decode(np.array(tokenizer.encode("All"), dtype=np.int64)) == "All"


def test_token_text_is_readable() -> None:
    assert CHAR.token_text(CHAR.encode("\n")[0]) == "\n"
    assert CHAR.token_text(0) == BPE.token_text(0) == END_OF_TEXT
    assert [train_bpe(["abc"], 257).token_text(id) for id in train_bpe(["abc"], 257).encode("é a")] == [
        "\\xc3",
        "\\xa9",
        " ",
        "a",
    ]


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, OTHER], ids=[*NAMES, "other"])
def test_saving_and_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = load_tokenizer(tmp_path)
    assert loaded == tokenizer
    assert hash(loaded) == hash(tokenizer)
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id, loaded.unk_id) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.unk_id,
    )
    assert loaded.encode("he hello") == tokenizer.encode("he hello")
    assert Tokenizer.from_json(tokenizer.to_json()).fingerprint == tokenizer.fingerprint
    again = tmp_path / "again"
    loaded.save(again)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_fingerprint_is_of_the_content_not_of_the_layout(tmp_path: Path) -> None:
    description = json.loads(BPE.to_json())
    assert Tokenizer.from_json(json.dumps(description, indent=7)).fingerprint == BPE.fingerprint
    canonical = json.dumps(description, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == BPE.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in [*TOKENIZERS, OTHER]}) == 4
    assert BPE != CHAR
    assert CHAR != "CHAR"


def test_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[]", b"{}", b'{"model": 1}', b"\xff\xfe", BPE.to_json().encode()[:5000]):
        path.write_bytes(content)
        with pytest.raises(TokenizerError) as raised:
            load_tokenizer(tmp_path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    path.write_text(BPE.to_json(), encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    for content in (b"", b"[]", b"\xff"):
        config.write_bytes(content)
        with pytest.raises(TokenizerError) as raised:
            load_tokenizer(tmp_path)
        assert str(config) in str(raised.value)


def test_eos_comes_from_the_config_then_from_the_special_tokens() -> None:
    assert Tokenizer.from_json(OTHER.to_json(), {"eos_token": "<s>"}).eos_id == 1
    assert Tokenizer.from_json(OTHER.to_json(), {"eos_token": "<none>"}).eos_id == 2
    assert Tokenizer.from_json(OTHER.to_json()).eos_id == 2


def encode_elsewhere(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def test_tokenizers_can_be_pickled() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        jobs = [pool.apply_async(encode_elsewhere, (tokenizer, "All: speak")) for tokenizer in (CHAR, BPE)]
        assert [job.get(timeout=60) for job in jobs] == [tokenizer.encode("All: speak") for tokenizer in (CHAR, BPE)]
        pool.close()
        pool.join()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=NAMES)
@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_transformers_reads_the_same_files(tokenizer: Tokenizer, model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    config = {
        "model_type": model_type,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = TEXT.replace(END_OF_TEXT, "")
    for reader in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = reader.from_pretrained(tmp_path)
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
        assert theirs(TEXT, split_special_tokens=True)["input_ids"] == tokenizer.encode(TEXT)
        assert theirs.eos_token_id == tokenizer.eos_id
        assert theirs.unk_token_id == tokenizer.unk_id
        assert len(theirs) == tokenizer.vocab_size
        if tokenizer is CHAR:
            with pytest.raises(Exception, match="WordLevel"):
                theirs("Ω")
    theirs.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.kind, again.eos_id, again.encode(text)) == (
        tokenizer.kind,
        tokenizer.eos_id,
        tokenizer.encode(text),
    )
