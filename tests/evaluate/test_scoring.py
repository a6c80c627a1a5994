"""Log-probabilities of continuations: those of the plain forward, whatever else is scored with them."""

from __future__ import annotations

import random

import pytest
import torch

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.evaluate.scoring import Continuation, ContinuationScore, Scorer, encode_pairs
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from tests import foreign
from tests.factories import tiny_model


def alone(model: Transformer, request: Continuation) -> ContinuationScore:
    """Score a request by one forward over its tokens."""
    ids = torch.tensor([[*request.context, *request.ids]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).log_softmax(dim=-1)[0, len(request.context) - 1 :]
    targets = torch.tensor(request.ids)
    values = logprobs.gather(1, targets[:, None])[:, 0]
    return ContinuationScore(tuple(values.tolist()), bool((logprobs.argmax(-1) == targets).all()))


def requests(seed: int, vocab_size: int, longest: int) -> list[Continuation]:
    """Return continuations with many shared prefixes: some equal, some prefixes of others."""
    rng = random.Random(seed)
    trunk = rng.choices(range(vocab_size), k=longest)
    made = []
    for _ in range(60):
        prefix = trunk[: rng.randint(0, longest - 4)]
        rest = rng.choices(range(3), k=rng.randint(2, min(8, longest - len(prefix))))
        sequence = [*prefix, *rest]
        cut = rng.randint(1, len(sequence) - 1)
        made.append(Continuation(tuple(sequence[:cut]), tuple(sequence[cut:])))
    return made + made[:5]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt3", "mistral", "mixtral"])
@pytest.mark.parametrize("tokens_at_once", [5, 512])
def test_scores_are_those_of_the_plain_forward(family: str, tokens_at_once: int) -> None:
    model = tiny_model(family)
    wanted = requests(1, model.config.vocab_size, model.config.max_position_embeddings)
    scorer = Scorer(model, tokens_at_once=tokens_at_once)
    for scores in (scorer.score(wanted), scorer.score(wanted)):  # the second time with a used cache
        for request, score in zip(wanted, scores, strict=True):
            expected = alone(model, request)
            assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert score.greedy == expected.greedy
            assert score.total == pytest.approx(sum(expected.logprobs), abs=1e-4)


def test_each_prefix_is_computed_once() -> None:
    model = tiny_model(max_position_embeddings=64)
    trunk = tuple(range(20))
    wanted = [Continuation((*trunk, q), (a, 5, b)) for q in (3, 4, 5) for a in (1, 2) for b in (7, 8, 9)]
    scorer = Scorer(model)
    scorer.score(wanted)
    prefixes = {(*r.context, *r.ids)[:n] for r in wanted for n in range(1, len(r.context) + len(r.ids))}
    assert scorer.computed_tokens == len(prefixes) == 20 + 3 + 6 + 6


def test_order_and_company_change_nothing() -> None:
    model = tiny_model()
    wanted = requests(2, model.config.vocab_size, 24)
    together = Scorer(model).score(wanted)
    singly = [Scorer(model).score([each])[0] for each in wanted]
    backwards = Scorer(model).score(wanted[::-1])[::-1]
    for a, b, c in zip(together, singly, backwards, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.logprobs == pytest.approx(c.logprobs, abs=1e-4)


def test_a_small_cache_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptsmith.evaluate.scoring._MIN_CACHE", 1)
    model = tiny_model()
    wanted = requests(3, model.config.vocab_size, 24)
    scores = Scorer(model, tokens_at_once=3).score(wanted)
    assert [s.logprobs for s in scores] == [pytest.approx(alone(model, r).logprobs, abs=1e-4) for r in wanted]


def test_the_mode_of_the_model_is_restored() -> None:
    model = tiny_model().train()
    Scorer(model).score([Continuation((1, 2), (3,))])
    assert model.training


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_model()
    for request, message in (
        (Continuation((), (1,)), "at least one token"),
        (Continuation((1,), ()), "at least one token"),
        (Continuation((1,) * 20, (1,) * 6), "25 tokens are more than the context of 24"),
    ):
        with pytest.raises(UsageError, match=message):
            Scorer(model).score([request])
    with torch.no_grad():
        model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(GptsmithError, match="NaN"):
        Scorer(model).score([Continuation((1,), (2,))])


PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox"),  # the space moves to the continuation
    ("Once upon a time there was a hou", "se by the sea"),  # a token spans the boundary
    ("I'll", " go, don't you?"),
    ("", "Once"),
    ("naïve\n\n", "café"),
]


def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer(foreign.byte_level().to_str(), {"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("pair", PAIRS)
def test_the_boundary_is_where_the_context_alone_ends(pair: tuple[str, str]) -> None:
    tokenizer = byte_level_tokenizer()
    (found,) = encode_pairs(tokenizer, [pair])
    context, continuation = pair[0].rstrip(), pair[0][len(pair[0].rstrip()) :] + pair[1]
    before = tokenizer.encode(context)
    assert tokenizer.eos_id is not None
    assert list(found.context) == (before or [tokenizer.eos_id])
    assert list(found.ids) == tokenizer.encode(context + continuation)[len(before) :]


def test_a_token_that_spans_the_whole_boundary_is_scored() -> None:
    tokenizer = byte_level_tokenizer()
    (word,) = tokenizer.encode(" house")
    assert len(tokenizer.encode(" hous")) > 1  # so that the whole has fewer tokens than the context
    (found,) = encode_pairs(tokenizer, [("a hous", "e")])
    assert (*found.context, *found.ids) == tuple(tokenizer.encode("a house"))
    assert found.ids[-1] == word


def test_the_beginning_of_sequence_token_comes_once() -> None:
    tokenizer = Tokenizer(foreign.sentencepiece().to_str(), {"bos_token": "<s>", "eos_token": "</s>"})
    for context in ("Once upon", "<s>Once upon", ""):
        (found,) = encode_pairs(tokenizer, [(context, " a time")])
        assert found.context[0] == 1
        assert (*found.context, *found.ids).count(1) == 1


def test_pairs_without_tokens_are_refused() -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(UsageError, match="has no tokens"):
        encode_pairs(tokenizer, [("Once", "")])
    without_special = Tokenizer(foreign.byte_level(special=()).to_str())
    with pytest.raises(UsageError, match="without a context"):
        encode_pairs(without_special, [("", "Once")])
