"""Chat templates for models that have none: the same ids in transformers, and after saving."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import TokenizerError
from gptsmith.export.export import export_gguf
from gptsmith.formats.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from gptsmith.loading import load_model
from gptsmith.model.resize import resize_embeddings
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template
from gptsmith.tokenizer.pretrained import read_tokenizer
from tests.factories import tiny_model
from tests.foreign import byte_level, sentencepiece, unigram, word_ends, wordpiece

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_end|> there"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And?"},
]
WORDS = "Be brief. Hello there Hi And? system user assistant" + string.printable.strip() + "\n"


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "bpe": train_bpe([WORDS * 9], 330),
        "char": train_char([WORDS + string.printable.replace("\r", "")]),
        "letters": train_char(["BebriefHllothrAnd?.im_end|<>( )" + "H"]),
    }


@pytest.mark.parametrize("kind", ["bpe", "char", "letters"])
def test_saved_and_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain = tokenizers()[kind]
    tokenizer, new = with_chat_template(plain)
    assert new == tuple(range(plain.vocab_size, tokenizer.vocab_size))
    assert tokenizer.kind == plain.kind
    assert tokenizer.eos_id == new[-1]
    assert plain.eos_id in tokenizer.end_ids
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    messages: list[dict[str, Any]] = [{**m, "content": m["content"].replace("<|im_end|>", "")} for m in MESSAGES]
    ids = ChatTemplate(loaded).encode(messages)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    assert theirs.eos_token_id == tokenizer.eos_id
    assert not ChatTemplate(loaded).plain
    again, none = with_chat_template(loaded)
    assert none == ()
    assert again.vocab_size == loaded.vocab_size


FOREIGN: dict[str, Tokenizer] = {
    "byte level": Tokenizer(byte_level(("<|endoftext|>",)).to_str(), {"eos_token": "<|endoftext|>"}),
    "sentencepiece": Tokenizer(sentencepiece().to_str(), {"eos_token": "</s>", "bos_token": "<s>"}),
    "sentencepiece without <s>": Tokenizer(sentencepiece(bos=False).to_str(), {"eos_token": "</s>"}),
    "unigram": Tokenizer(unigram().to_str(), {"eos_token": "</s>"}),
    "wordpiece": Tokenizer(wordpiece().to_str(), {"eos_token": "[SEP]"}),
    "word ends": Tokenizer(word_ends().to_str()),
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_the_same_ids_everywhere(kind: str, tmp_path: Path) -> None:
    """In transformers, in GGUF, and after saving."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, new = with_chat_template(FOREIGN[kind])
    assert new == tuple(range(FOREIGN[kind].vocab_size, tokenizer.vocab_size))
    assert new
    messages = [{"role": "user", "content": "The house"}, {"role": "assistant", "content": "a fox"}]
    messages += [{"role": "user", "content": "  and the sea\n"}]
    ids = ChatTemplate(tokenizer).encode(messages)
    assert tokenizer.end_ids[0] == tokenizer.eos_id == new[-1]
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    assert ChatTemplate(read_tokenizer(tmp_path)).encode(messages) == ids
    if kind in ("byte level", "sentencepiece", "sentencepiece without <s>"):
        again = tokenizer_from_gguf(tokenizer_to_gguf(tokenizer, tokenizer.vocab_size), "a file")
        assert ChatTemplate(again).encode(messages) == ids
        assert again.end_ids == tokenizer.end_ids


def test_a_token_that_is_there_already_becomes_special() -> None:
    pipeline = byte_level(("<|endoftext|>",))
    pipeline.add_tokens([AddedToken("<|im_end|>", special=False)])
    known = pipeline.token_to_id("<|im_end|>")
    tokenizer, (new,) = with_chat_template(Tokenizer(pipeline.to_str()))
    assert tokenizer.special_tokens() == {0: "<|endoftext|>", known: "<|im_end|>", new: "<|im_start|>"}
    assert tokenizer.eos_id == known


def test_ids_with_gaps_are_refused() -> None:
    description = json.loads(byte_level(("<|endoftext|>",)).to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] += 7
    with pytest.raises(TokenizerError, match="have gaps"):
        with_chat_template(Tokenizer(json.dumps(description)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_model(family: str, tied: bool, tmp_path: Path) -> None:
    """A model with new tokens keeps its logits, and carries the template into its directory and its GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = FOREIGN["byte level"]
    tokenizer, _ = with_chat_template(base)
    model = tiny_model(family, vocab_size=base.vocab_size, tie_word_embeddings=tied, max_position_embeddings=64).eval()
    before = model(torch.tensor([[1, 2, 3]])).detach()
    resize_embeddings(model, tokenizer.vocab_size)
    save_checkpoint(tmp_path / "model", model, tokenizer)
    ids = ChatTemplate(tokenizer).encode([{"role": "user", "content": "The house"}])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    rendered = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "The house"}], add_generation_prompt=True, return_dict=False
    )
    assert rendered == ids
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits
        assert torch.allclose(model(torch.tensor([ids])), expected, atol=1e-4)
    assert torch.equal(model(torch.tensor([[1, 2, 3]]))[..., : base.vocab_size].detach(), before)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype="f32")
    loaded, again = load_model(tmp_path / "model.gguf")
    assert ChatTemplate(again).encode([{"role": "user", "content": "The house"}]) == ids
    assert torch.allclose(loaded(torch.tensor([ids])), expected, atol=1e-3)


def test_text_never_becomes_a_special_token() -> None:
    for tokenizer in tokenizers().values():
        made, _ = with_chat_template(tokenizer)
        ids = ChatTemplate(made).encode(MESSAGES)
        assert [id for id in ids if id == made.eos_id] == [made.eos_id] * len(MESSAGES)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied: bool) -> None:
    model, ids = tiny_model("llama", tie_word_embeddings=tied), torch.tensor([[1, 2, 3]])
    before = model(ids)
    mean = model.lm_head.weight.mean(dim=0)
    resize_embeddings(model, 33)
    assert model.config.vocab_size == 33
    assert torch.equal(model(ids)[..., :30], before)
    assert torch.allclose(model.lm_head.weight[30:], mean.expand(3, -1), atol=1e-6)
    assert (model.lm_head.weight is model.embed_tokens.weight) is tied
    model(torch.tensor([[30, 31, 32]])).sum().backward()
