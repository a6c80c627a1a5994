from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptsmith
from gptsmith.engine.generate import StopText, generate_ids, generate_samples, stream
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import GptsmithError, TokenizerError, UsageError
from gptsmith.model import families
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char

CONTEXT = 24


def make_model(family: str, vocab_size: int) -> Transformer:
    torch.manual_seed(3)
    options: dict[str, object] = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": 24}
    if family in ("gpt3", "mistral"):
        options["sliding_window"] = 7
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        options |= {"num_experts": 4, "num_experts_per_tok": 2}
    return Transformer(
        families.FAMILIES[family](
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.4,
            **options,
        )
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char(["abcdefghij \n"])


def ids_of(model: Transformer, prompt: list[int], params: SamplingParams, n: int = 1) -> list[list[int]]:
    steps = list(generate_ids(model, prompt, params, num_samples=n))
    return [[step[i] for step in steps if step[i] is not None] for i in range(n)]  # type: ignore[misc]


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_greedy_equals_a_naive_loop(family: str) -> None:
    model = make_model(family, 30)
    tokens = [1, 2, 3]
    (fast,) = ids_of(model, tokens, SamplingParams(max_tokens=CONTEXT - 3, temperature=0))
    model.eval()
    with torch.no_grad():
        for _ in range(CONTEXT - 3):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert fast == tokens[3:]


def test_beyond_the_context_the_window_slides() -> None:
    """After the context is full, its last three quarters are read again: the naive loop that does so agrees."""
    model = make_model("qwen3", 30)
    slid: list[bool] = []
    params = SamplingParams(max_tokens=60, temperature=0)
    fast = [step[0] for step in generate_ids(model, [5, 6, 7], params, on_slide=lambda: slid.append(True))]
    assert slid == [True]
    tokens, window_start = [5, 6, 7], 0
    model.eval()
    with torch.no_grad():
        while len(tokens) < 63:
            if len(tokens) - window_start > CONTEXT:
                window_start = len(tokens) - CONTEXT * 3 // 4
            tokens.append(int(model(torch.tensor([tokens[window_start:]]))[0, -1].argmax()))
    assert fast == tokens[3:]


def test_a_prompt_longer_than_the_context_says_so() -> None:
    model = make_model("gpt2", 30)
    slid: list[bool] = []
    params = SamplingParams(max_tokens=40, temperature=0)
    out = list(generate_ids(model, list(range(29)) * 2, params, on_slide=lambda: slid.append(True)))
    assert len(out) == 40
    assert slid == [True]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_samples_do_not_depend_on_each_other(n: int) -> None:
    model = make_model("qwen3", 30)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=11)
    together = ids_of(model, [1, 2], params, n)
    alone = [ids_of(model, [1, 2], SamplingParams(max_tokens=30, temperature=1.0, seed=11 + i))[0] for i in range(n)]
    assert together == alone
    assert together == ids_of(model, [1, 2], params, n)
    assert n == 1 or together[0] != together[1]


def test_stops_at_a_stop_id_and_leaves_others_running() -> None:
    model = make_model("qwen3", 12)
    params = SamplingParams(max_tokens=80, temperature=1.5, seed=0)
    steps = list(generate_ids(model, [1], params, num_samples=4, stop_ids=[3]))
    for i in range(4):
        column = [step[i] for step in steps]
        if 3 in column:
            end = column.index(3)
            assert all(token is None for token in column[end + 1 :])


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_exactly_however_text_arrives(text: str, stops: list[str], data: st.DataObject) -> None:
    watcher, out, rest = StopText(stops), "", text
    while rest and not watcher.stopped:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + watcher.push(rest[:size]), rest[size:]
    out += watcher.finish()
    if not any(s in text for s in stops):
        assert out == text
    else:
        # The first stop string to be complete ends it; nothing of it is let through.
        assert text.startswith(out)
        assert not any(s in out for s in stops)
        assert any(text[len(out) :].startswith(s) for s in stops)


def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer) -> None:
    model = make_model("gpt2", tokenizer.vocab_size)
    params = SamplingParams(max_tokens=50, temperature=1.0, seed=4)
    pieces = list(stream(model, tokenizer, "abc", params, num_samples=2))
    for i, text in enumerate(generate_samples(model, tokenizer, "abc", params, num_samples=2)):
        assert text == "".join(piece for sample, piece in pieces if sample == i)


def test_byte_level_pieces_are_whole_characters() -> None:
    tokenizer = train_bpe(["naïve café 🙂 日本語 " * 5], 300)
    model = make_model("qwen3", tokenizer.vocab_size)
    params = SamplingParams(max_tokens=60, temperature=2.0, seed=2)
    pieces = [piece for _, piece in stream(model, tokenizer, "日", params)]
    assert tokenizer.eos_id is not None
    steps = generate_ids(model, tokenizer.encode("日"), params, stop_ids=[tokenizer.eos_id])
    ids = [i for (i,) in steps if i is not None and i != tokenizer.eos_id]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_python_api(tokenizer: Tokenizer) -> None:
    model = make_model("qwen3", tokenizer.vocab_size).train()
    text = gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1)
    assert text == gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1)
    assert len(text) <= 20
    assert model.training  # left as it was
    stop = text[3:5]
    assert (
        gptsmith.generate(model, tokenizer, "abc", max_tokens=20, temperature=0.8, seed=1, stop=stop)
        == (text[: text.index(stop)])
    )
    with pytest.raises(UsageError, match="temprature"):
        gptsmith.generate(model, tokenizer, "abc", temprature=1)


def test_bad_prompts(tokenizer: Tokenizer) -> None:
    model = make_model("qwen3", tokenizer.vocab_size)
    params = SamplingParams(max_tokens=3)
    with pytest.raises(TokenizerError, match="'Z'"):
        stream(model, tokenizer, "abZ", params)
    with pytest.raises(UsageError, match="empty"):
        next(generate_ids(model, [], params))
    with pytest.raises(UsageError, match="outside"):
        next(generate_ids(model, [tokenizer.vocab_size], params))
    assert len(generate_samples(model, tokenizer, "", params)) == 1  # starts from the end-of-document token


def test_ids_beyond_the_tokenizer_are_never_chosen(tokenizer: Tokenizer) -> None:
    """Vocabularies of models are often padded."""
    model = make_model("qwen3", tokenizer.vocab_size + 50)
    params = SamplingParams(max_tokens=60, temperature=2.0, seed=0, repetition_penalty=1.1)
    assert len(generate_samples(model, tokenizer, "ab", params)[0]) > 0


def test_nan_weights_are_a_clear_error(tokenizer: Tokenizer) -> None:
    model = make_model("qwen3", tokenizer.vocab_size)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(GptsmithError, match="NaN"):
        generate_samples(model, tokenizer, "a", SamplingParams(max_tokens=3))
