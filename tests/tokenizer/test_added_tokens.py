"""Tokens that a tokenizer puts around a text, mostly one for its beginning: as transformers and llama.cpp do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import processors

from gptsmith.formats.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from gptsmith.tokenizer import Tokenizer, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.pretrained import read_tokenizer
from gptsmith.tokenizer.tokenizer import with_added_tokens
from tests.foreign import SPECIAL, byte_level, sentencepiece

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "The quick"}]


def transformers_ids(directory: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(directory)(text).input_ids
    return ids


def processor(kind: str) -> Any:
    """A post-processor over the special tokens <unk> 0, <s> 1, </s> 2."""
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return {
        "none": None,
        "bytes": processors.ByteLevel(trim_offsets=False),
        "bos": bos,
        "bos and eos": processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        ),
        "eos": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
        "two": processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]),
        "llama 3": processors.Sequence([processors.ByteLevel(trim_offsets=False), bos]),
        "nested": processors.Sequence(
            [bos, processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])]
        ),
        "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
        "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    }[kind]


KINDS = ("none", "bytes", "bos", "bos and eos", "eos", "two", "llama 3", "nested", "bert", "roberta")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bytes_kind", [True, False])
def test_prompts_are_encoded_as_transformers_does(kind: str, bytes_kind: bool, tmp_path: Path) -> None:
    pipeline = byte_level(("<unk>", "<s>", "</s>")) if bytes_kind else sentencepiece(bos=False)
    pipeline.post_processor = processor(kind)
    pipeline.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}))
    tokenizer = read_tokenizer(tmp_path)
    for text in ("The quick brown", "naïve\n", " x", "", "a"):
        assert tokenizer.encode_prompt(text) == transformers_ids(tmp_path, text)
        assert (
            tokenizer.encode(text)
            == tokenizer.encode_prompt(text)[
                len(tokenizer.prefix_ids) : len(tokenizer.encode_prompt(text)) - len(tokenizer.suffix_ids)
            ]
        )


@settings(max_examples=30, deadline=None)
@given(
    before=st.lists(st.sampled_from(SPECIAL), max_size=2, unique=True),
    after=st.lists(st.sampled_from(SPECIAL), max_size=2, unique=True),
    text=st.text(st.sampled_from("The quick\n<s>"), max_size=20),
)
def test_added_tokens_are_what_tokenizers_adds(before: list[str], after: list[str], text: str) -> None:
    pipeline = byte_level_cached()
    ids = {token: id for id, token in enumerate(SPECIAL)}
    described = with_added_tokens(
        pipeline.to_str(), {token: ids[token] for token in before}, {token: ids[token] for token in after}
    )
    tokenizer = Tokenizer(described)
    expected = Pipeline.from_str(described)
    expected.encode_special_tokens = True
    assert tokenizer.encode_prompt(text) == expected.encode(text).ids
    assert copy.deepcopy(tokenizer).encode_prompt(text) == tokenizer.encode_prompt(text)


_CACHE: list[Pipeline] = []


def byte_level_cached() -> Pipeline:
    if not _CACHE:
        _CACHE.append(byte_level())
    return _CACHE[0]


@pytest.mark.parametrize("stated", [True, False])
def test_the_flag_of_a_directory_without_tokenizer_json(stated: bool, tmp_path: Path) -> None:
    model = json.loads(byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": stated, "bos_token": "<|im_start|>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("The quick") == transformers_ids(tmp_path, "The quick")
    assert tokenizer.prefix_ids == ((1,) if stated else ())


def test_what_the_user_has_written_is_not_added_again() -> None:
    tokenizer = Tokenizer(sentencepiece().to_str(), NAMES)
    assert tokenizer.encode_prompt("<s>The quick") == tokenizer.encode_prompt("The quick")
    assert tokenizer.encode_prompt("The <s>").count(1) == 1
    assert 1 not in tokenizer.encode("<s>The quick")


def test_tokenizers_made_here_add_nothing() -> None:
    tokenizer = train_char(["ab"])
    assert tokenizer.encode_prompt("ab") == tokenizer.encode("ab")


def test_a_new_model_does_not_get_tokens_that_its_text_lacks(tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece().to_str(), NAMES)
    plain = tokenizer.without_added_tokens()
    plain.save(tmp_path)
    assert plain.encode_prompt("The quick") == tokenizer.encode("The quick") == transformers_ids(tmp_path, "The quick")
    assert (plain.eos_id, plain.bos_id) == (2, 1)


# GGUF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_json", [True, False])
@pytest.mark.parametrize(("flag", "added"), [(True, True), (False, False), (None, True)])
def test_the_flag_of_a_gguf_file_decides(keep_json: bool, flag: bool | None, added: bool) -> None:
    """Without a flag llama.cpp adds the token for SentencePiece's tokenizers."""
    metadata = tokenizer_to_gguf(Tokenizer(sentencepiece(bos=flag is not True).to_str(), NAMES), 500)
    del metadata["tokenizer.ggml.add_bos_token"]
    if flag is not None:
        metadata["tokenizer.ggml.add_bos_token"] = flag
    if not keep_json:
        del metadata["tokenizer.huggingface.json"]
    tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
    assert tokenizer.prefix_ids == ((1,) if added else ())
    assert tokenizer.encode_prompt("The quick") == [1] * added + tokenizer.encode("The quick")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "two"])
def test_added_tokens_survive_a_gguf_file(kind: str) -> None:
    pipeline = sentencepiece(bos=False)
    pipeline.post_processor = processor(kind)
    tokenizer = Tokenizer(pipeline.to_str(), NAMES)
    metadata = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    for kept in (True, False):
        read = tokenizer_from_gguf(metadata, "x.gguf")
        assert (read.prefix_ids, read.suffix_ids) == (tokenizer.prefix_ids, tokenizer.suffix_ids)
        assert read.encode_prompt("The quick") == tokenizer.encode_prompt("The quick")
        if kept:
            del metadata["tokenizer.huggingface.json"]


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_a_conversation_begins_with_one_such_token(template: str) -> None:
    tokenizer = Tokenizer(sentencepiece().to_str(), {**NAMES, "chat_template": template})
    ids = ChatTemplate(tokenizer).encode(MESSAGES)
    assert ids[0] == 1
    assert ids.count(1) == 1
    without = Tokenizer(sentencepiece(bos=False).to_str(), {**NAMES, "chat_template": CHATML})
    assert ids[1:] == ChatTemplate(without).encode(MESSAGES)


def test_the_mask_of_a_conversation_counts_the_added_token() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "brown fox"}]
    tokenizer = Tokenizer(sentencepiece().to_str(), {**NAMES, "chat_template": CHATML})
    ids, mask = ChatTemplate(tokenizer).encode(messages, return_mask=True)
    assert (ids[0], mask[0]) == (1, False)
    assert tokenizer.decode([id for id, said in zip(ids, mask, strict=True) if said]).startswith("brown fox")
