"""Chat templates for models that have none: the same ids in transformers, and after saving."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.model.resize import resize_embeddings
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.chatml import with_chat_template
from tests.factories import tiny_model

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
