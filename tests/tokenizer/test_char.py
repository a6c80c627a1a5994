from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.errors import TokenizerError
from gptsmith.tokenizer import train_char


def test_specials_first_then_the_alphabet_by_code_point() -> None:
    tokenizer = train_char(["ba\n", "", "éa"])
    assert [tokenizer.token_text(id) for id in range(tokenizer.vocab_size)] == ["<|endoftext|>", "\n", "a", "b", "é"]
    tokenizer = train_char(["b"], unknown=True)
    assert [tokenizer.token_text(id) for id in range(tokenizer.vocab_size)] == ["<|endoftext|>", "<|unk|>", "b"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=5))
def test_any_text_can_be_an_alphabet(texts: list[str]) -> None:
    tokenizer = train_char(texts)
    text = "".join(texts)
    assert tokenizer.vocab_size == len(set(text)) + 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_order_of_texts_does_not_matter() -> None:
    assert train_char(["ab", "c"]).fingerprint == train_char(iter(["cb", "aaa"])).fingerprint


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="empty"):
        train_char(texts)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"U\+DC80\) at character 2 "):
        train_char(["ab\udc80"])
