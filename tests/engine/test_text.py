"""Text on top of the engine: chunks, stop strings, echo, the Python API."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptsmith
from gptsmith.engine import grammar
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Event, TokenLogprob
from gptsmith.engine.text import (
    Detokenizer,
    StopStringFilter,
    TextChunk,
    conversation_prompt,
    encode_prompt,
    generate_texts,
    stream,
    stream_answer,
)
from gptsmith.errors import GptsmithError, TokenizerError, UsageError
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from gptsmith.tokenizer.chat import ChatTemplate
from tests.channels import channel_model, channel_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghij \n"])


@pytest.fixture(scope="module")
def engine(make_model: Any, tokenizer: Tokenizer) -> Engine:
    return Engine(make_model("qwen3", tokenizer.vocab_size, context=64))


def joined(chunks: list[TextChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_exactly_however_the_text_is_chunked(text: str, stops: list[str], data: st.DataObject) -> None:
    watcher, out, rest = StopStringFilter(stops), "", text
    while rest and not watcher.stopped:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + watcher.push(rest[:size]), rest[size:]
    out += watcher.finish()
    if not any(s in text for s in stops):
        assert out == text
    else:
        # The first complete stop string ends the text; no part of it is returned.
        assert text.startswith(out)
        assert not any(s in out for s in stops)
        assert any(text[len(out) :].startswith(s) for s in stops)


def test_chunks_are_the_text_of_the_ids(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, n=3)
    chunks = list(stream(engine, tokenizer, "abc", params))
    assert tokenizer.eos_id is not None
    (result,) = engine.generate(
        [tokenizer.encode("abc")], SamplingParams(40, temperature=1.0, seed=4, n=3, stop_ids=(tokenizer.eos_id,))
    )
    assert [joined(chunks, i) for i in range(3)] == [tokenizer.decode(c.ids) for c in result.completions]
    assert sorted(p.index for p in chunks if p.finish_reason) == [0, 1, 2]
    assert generate_texts(engine, tokenizer, ["abc"], params) == [[joined(chunks, i) for i in range(3)]]


def test_chunks_are_whole_characters(make_model: Any) -> None:
    tokenizer = train_bpe(["naïve café 🙂 日本語 " * 5], 300)
    engine = Engine(make_model("qwen3", tokenizer.vocab_size, context=80))
    params = SamplingParams(max_tokens=60, temperature=2.0, seed=2)
    chunks = list(stream(engine, tokenizer, "日", params, ignore_eos=True))
    (result,) = engine.generate([tokenizer.encode("日")], params)
    assert joined(chunks) == tokenizer.decode(result.ids)
    assert len(result.ids) == 60


def test_a_stop_string_across_tokens_ends_the_sample_at_once(engine: Engine, tokenizer: Tokenizer) -> None:
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=9)
    whole = joined(list(stream(engine, tokenizer, "a", free)))
    stop = whole[10:13]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=9, stop=(stop, "never"))
    chunks = list(stream(engine, tokenizer, "a", params))
    assert joined(chunks) == whole[: whole.index(stop)]
    assert [p.finish_reason for p in chunks if p.finish_reason] == ["stop"]
    made = engine.stats.generated_tokens
    list(stream(engine, tokenizer, "a", params))
    assert engine.stats.generated_tokens - made == whole.index(stop) + 3  # no further token was generated
    assert engine.stats.blocks_used == 0
    late = SamplingParams(max_tokens=40, min_tokens=40, temperature=1.0, seed=9, stop=(stop,))
    assert len(joined(list(stream(engine, tokenizer, "a", late, ignore_eos=True)))) >= 30


def test_stop_strings_with_best_of_and_beam_search(engine: Engine, tokenizer: Tokenizer, naive: Any) -> None:
    """Texts that are returned only at their end are cut at stop strings, too, and ranked as cut."""
    free = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=6, logprobs=0)
    (every,) = engine.generate([tokenizer.encode("a")], replace(free, stop_ids=(tokenizer.eos_id or 0,)))
    texts = [tokenizer.decode(c.ids) for c in every.completions]
    stop = texts[0][8:10]  # two tokens, since each is one character
    ranked = []
    for text, completion in zip(texts, every.completions, strict=True):
        size = text.index(stop) + 2 if stop in text else len(completion.ids)
        mean = sum(each.logprob for each in (completion.logprobs or [])[:size] if each) / size
        ranked.append((-mean, text[: text.index(stop)] if stop in text else text))
    expected = [text for _, text in sorted(ranked)]
    made = engine.stats.generated_tokens
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=2, best_of=6, stop=(stop,))
    assert generate_texts(engine, tokenizer, ["a"], params) == [expected[:2]]
    assert engine.stats.generated_tokens - made < sum(len(c.ids) for c in every.completions)
    # The last token of a stop string ends a beam as a stop token would.
    beams = SamplingParams(max_tokens=20, temperature=0, beams=4, n=4)
    whole = generate_texts(engine, tokenizer, ["a"], beams)[0]
    stop = whole[0][5:7]
    detokenizer = Detokenizer(tokenizer, "a", replace(beams, stop=(stop,)))
    (result,) = engine.generate([tokenizer.encode("a")], detokenizer.engine_params)
    for completion in result.completions:
        text = tokenizer.decode(completion.ids)
        assert stop not in text[:-1]
        assert (stop in text) == (completion.finish_reason == "stop" and completion.ids[-1] != tokenizer.eos_id)
    assert any(c.finish_reason == "stop" for c in result.completions)
    cut = generate_texts(engine, tokenizer, ["a"], replace(beams, stop=(stop,)))[0]
    assert cut == [tokenizer.decode(c.ids).partition(stop)[0] for c in result.completions]


def test_echo_and_prompts_of_ids(engine: Engine, tokenizer: Tokenizer) -> None:
    plain = SamplingParams(max_tokens=10, temperature=1.0, seed=1, stop=("abc",))
    echo = SamplingParams(max_tokens=10, temperature=1.0, seed=1, stop=("abc",), echo=True, n=2)
    text = joined(list(stream(engine, tokenizer, "abcabc", plain)))
    chunks = list(stream(engine, tokenizer, tokenizer.encode("abcabc"), echo))
    assert joined(chunks) == "abcabc" + text  # stop strings in the prompt do not count
    assert joined(chunks, 1).startswith("abcabc")


def test_on_shift_is_called_once(make_model: Any, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("gpt2", tokenizer.vocab_size))
    for prompt, overflow, expected in (("abc", "shift", 1), ("abc" * 20, "shift", 1), ("abc", "error", 0)):
        calls: list[bool] = []
        params = SamplingParams(max_tokens=70, temperature=0, overflow=overflow)  # type: ignore[arg-type]
        list(
            stream(engine, tokenizer, prompt, params, ignore_eos=True, on_shift=lambda calls=calls: calls.append(True))  # type: ignore[misc]
        )
        assert len(calls) == expected


def test_python_api(make_model: Any, tokenizer: Tokenizer) -> None:
    model = make_model("qwen3", tokenizer.vocab_size).train()
    text = gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1)
    assert text == gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1)
    assert len(text) <= 20
    assert model.training  # unchanged
    stop = text[3:5]
    assert (
        gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1, stop=stop)
        == (text[: text.index(stop)])
    )
    texts = [gptsmith.generate(model, tokenizer, "abc", max_tokens=90, temperature=2.0, seed=i) for i in range(9)]
    assert max(map(len, texts)) > 24  # beyond the context
    with pytest.raises(UsageError, match="temprature"):
        gptsmith.generate(model, tokenizer, "abc", temprature=1)
    with pytest.raises(UsageError, match="generate_texts"):
        gptsmith.generate(model, tokenizer, "abc", n=2)


def test_bad_prompts(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=3)
    with pytest.raises(TokenizerError, match="'Z'"):
        stream(engine, tokenizer, "abZ", params)
    with pytest.raises(UsageError, match="outside"):
        stream(engine, tokenizer, [99], params)
    with pytest.raises(TokenizerError, match="'Z'"):
        generate_texts(engine, tokenizer, ["a", "Z"], params)
    assert not engine.has_work or all(event.result is not None for event in engine.step())
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]
    assert len(generate_texts(engine, tokenizer, ["", "a"], params)) == 2


def test_ids_beyond_the_tokenizer_are_never_generated(make_model: Any, tokenizer: Tokenizer) -> None:
    """A model's vocabulary is often padded."""
    model = make_model("qwen3", tokenizer.vocab_size + 50)
    text = gptsmith.generate(model, tokenizer, "ab", max_tokens=60, temperature=2.0, seed=0, repetition_penalty=1.1)
    assert len(text) > 0


def test_nan_weights_are_a_clear_error(make_model: Any, tokenizer: Tokenizer) -> None:
    model = make_model("qwen3", tokenizer.vocab_size)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(GptsmithError, match="NaN"):
        gptsmith.generate(model, tokenizer, "a", max_tokens=3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_are_returned_with_the_chunk_they_begin_in(data: st.DataObject) -> None:
    """In order, each once, none beyond the cut, however events arrive and wherever a stop string cuts."""
    tokenizer = train_bpe(["the cat sat on a mat é 日本 "] * 20, 300)
    ids = tokenizer.encode(data.draw(st.text("the caé日 ", min_size=1, max_size=20)))
    stop = data.draw(st.sampled_from([(), ("t",), ("ca", "é"), ("日日",)]))
    prompt = tokenizer.encode("a mat") if data.draw(st.booleans()) else []
    params = SamplingParams(stop=stop, logprobs=0, echo=bool(prompt), prompt_logprobs=0 if prompt else None)
    detokenizer = Detokenizer(tokenizer, "a mat", params, prompt_length=len(prompt))
    chunks: list[TextChunk] = []
    rest, first = [*prompt, *ids], len(prompt)
    while rest and not (chunks and chunks[-1].finish_reason):
        size = first + data.draw(st.integers(1, 3))
        some, rest, first = rest[:size], rest[size:], 0
        logprobs: list[TokenLogprob | None] = [TokenLogprob(id, -1.0) for id in some]
        event = Event(0, 0, some, logprobs, None if rest else "length")
        chunk, _ = detokenizer.push(event)
        if chunk is not None:
            chunks.append(chunk)
    text = "".join(chunk.text for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert [token.id for token in tokens] == [*prompt, *ids][: len(tokens)]
    starts = [token.start for token in tokens]
    assert starts == sorted(starts)
    cut = chunks[-1].finish_reason == "stop"
    if not cut:
        assert text == tokenizer.decode([*prompt, *ids])
        assert len(tokens) == len(prompt) + len(ids)
    assert all(start < len(text) or not cut for start in starts)
    sent = 0
    for chunk in chunks:
        sent += len(chunk.text)
        assert all(token.start < sent or chunk.finish_reason for token in chunk.tokens)


@pytest.fixture(scope="module")
def answers() -> Any:
    """Return the chunks of answers to the message "hi" by a model that answers in channels."""
    model, template = channel_model(), ChatTemplate(channel_tokenizer())
    engine = Engine(model, vocab_size=template.tokenizer.vocab_size)
    prompt = conversation_prompt(model, template, [{"role": "user", "content": "hi"}], ())
    return lambda **params: stream_answer(engine, template, prompt, SamplingParams(max_tokens=60, **params))


def test_an_answer_in_channels(answers: Any) -> None:
    chunks = list(answers(n=2, temperature=0.01))
    for i in range(2):
        assert joined(chunks, i) == "Hello you"
        assert "".join(chunk.reasoning for chunk in chunks if chunk.index == i) == "I think."
    assert all(chunk.finish_reason == "stop" for chunk in chunks[-1:])


def test_the_form_of_an_answer_in_channels_is_that_of_its_text(answers: Any) -> None:
    chunks = list(answers(constraint=grammar.choices(channel_tokenizer(), ("aa", "b")), temperature=1.0, seed=0))
    assert joined(chunks) in ("aa", "b")
    assert not any(chunk.reasoning for chunk in chunks)
