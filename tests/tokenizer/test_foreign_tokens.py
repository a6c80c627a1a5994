"""The bytes and places of tokens, for tokenizers that write a token differently at the beginning of a text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline

from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Event, TokenLogprob
from gptsmith.engine.text import Detokenizer, TextToken
from gptsmith.tokenizer import Tokenizer, train_bpe
from tests.foreign import TEXT, sentencepiece, unigram, word_ends, wordpiece

MAKERS: dict[str, Callable[[], Pipeline]] = {
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word ends": word_ends,
}
TOKENIZERS = {name: Tokenizer(make().to_str()) for name, make in MAKERS.items()}
TOKENIZERS["bytes"] = train_bpe([TEXT], 300)


def byte(value: int) -> int:
    id = TOKENIZERS["sentencepiece"]._pipeline.token_to_id(f"<0x{value:02X}>")
    assert id is not None
    return id


def texts(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 20), max_size=10)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZERS)))
def test_bytes_joined_are_the_text(data: st.DataObject, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(texts(tokenizer))
    special = tokenizer.special_tokens()
    ordinary = [id for id in ids if id not in special]
    joined = b"".join(map(tokenizer.token_bytes, ordinary, [None, *ordinary]))
    text = tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert joined.decode() == text
    decoder = tokenizer.stream()
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == text


def pieces(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: list[int]
) -> tuple[str, list[TextToken]]:
    """The text and the tokens of a sample that arrives token by token."""
    detokenizer = Detokenizer(tokenizer, "", params, prompt_ids=prompt)
    text, tokens = "", list[TextToken]()
    for at, id in enumerate(ids):
        last = at == len(ids) - 1
        chunk, _ = detokenizer.push(Event(0, 0, [id], [TokenLogprob(id, 0.0)], "length" if last else None, None))
        if chunk is not None:
            text += chunk.text
            tokens += chunk.tokens
    return text, tokens


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZERS)))
def test_places_of_tokens(data: st.DataObject, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids, prompt = data.draw(texts(tokenizer)), data.draw(st.sampled_from([[], tokenizer.encode("The house")]))
    params = SamplingParams(max_tokens=20, logprobs=0, ignore_eos=True)
    text, tokens = pieces(tokenizer, ids, params, prompt)
    if prompt:
        whole = tokenizer.decode([*prompt, *ids])
        if "\ufffd" not in whole:
            assert tokenizer.decode(prompt) + text == whole
    if not ids:
        return
    assert [token.id for token in tokens] == ids
    assert all(0 <= token.start <= len(text) for token in tokens)
    if "\ufffd" in text:
        return
    special, before = tokenizer.special_tokens(), b""
    for token in tokens:
        if token.id not in special:
            assert token.start == len(before.decode("utf-8", "ignore"))
            before += tokenizer.token_bytes(token.id, token.previous)
    assert before.decode() == text


def test_offsets_after_a_run_of_bytes() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [*map(byte, "漢字".encode()), *tokenizer.encode("The house"), byte(0xFF), *tokenizer.encode("dog")]
    text, tokens = pieces(tokenizer, ids, SamplingParams(max_tokens=40, logprobs=0), [])
    assert text == "漢字 The house\ufffd dog"
    starts = [token.start for token in tokens]
    assert starts[:6] == [0, 0, 0, 1, 1, 1]
    assert starts[6] == 2
    assert text[starts[ids.index(byte(0xFF))]] == "\ufffd"


def test_spellings_of_tokens() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    (the,) = [id for id in range(tokenizer.vocab_size) if tokenizer._pipeline.id_to_token(id) == "▁the"]
    assert (tokenizer.token_bytes(the), tokenizer.token_bytes(the, the)) == (b"the", b" the")
    assert tokenizer.token_text(the) == " the"
    assert (tokenizer.token_text(byte(0x57)), tokenizer.token_text(byte(0xE6))) == ("W", "\\xe6")


@pytest.mark.parametrize("name", ["unigram", "sentencepiece", "wordpiece"])
def test_special_tokens_in_texts_are_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    special = tokenizer.special_tokens()
    unknown = {tokenizer.unk_id}
    for content in special.values():
        for text in (content, f"the {content} house", f"the{content}"):
            assert not (set(tokenizer.encode(text)) & set(special)) - unknown
