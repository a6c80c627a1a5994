"""The page's view inside a model shows what the model computes."""

from __future__ import annotations

import pytest
import torch

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.model.transformer import AttentionInputs, Transformer
from gptsmith.server.inspect import MAX_TOKENS, inspect_text
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import tiny_model

ALPHABET = "abcdefgh .\n"
TEXT = "abc. dead beef\nhead"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_char([ALPHABET])


def model_of(family: str, tokenizer: Tokenizer, context: int = 128) -> Transformer:
    return tiny_model(
        family,
        seed=2,
        vocab_size=tokenizer.vocab_size + 5,  # a padded vocabulary: the last ids belong to no token
        num_hidden_layers=3,
        max_position_embeddings=context,
        initializer_range=0.3,
    )


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gpt3", "qwen3", "mixtral"])
def test_values_are_the_models(family: str, tokenizer: Tokenizer) -> None:
    model = model_of(family, tokenizer)
    ids = tokenizer.encode(TEXT)
    expected: list[torch.Tensor] = []
    with torch.no_grad():
        logits = model(torch.tensor([ids]), weights=expected)[0, :, : tokenizer.vocab_size]
    probabilities = logits.softmax(dim=-1)
    found = {layer: inspect_text(model, tokenizer, TEXT, layer=layer, top=4) for layer in range(3)}

    for layer, look in found.items():
        weights = torch.tensor(look["attention"]["weights"])
        assert weights.shape == (2, len(ids), len(ids))
        torch.testing.assert_close(weights, expected[layer][0], atol=6e-6, rtol=0)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, len(ids)), atol=2e-4, rtol=0)
        assert not weights.triu(1).any()  # causal
        window = look["attention"]["window"]
        assert window == model.config.window_of(layer)
        if window is not None:
            assert not weights.tril(-window).any()

    look = found[0]
    assert look["tokens"] == list(TEXT)
    assert look["probabilities"][0] is None
    for i, p in enumerate(look["probabilities"][1:]):
        assert p == pytest.approx(probabilities[i, ids[i + 1]].item(), abs=1e-6)
    for i, candidates in enumerate(look["next"]):
        best = probabilities[i].topk(4)
        assert [each["id"] for each in candidates] == best.indices.tolist()
        assert [each["probability"] for each in candidates] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert len(look["lens"]["tokens"]) == 4  # the embeddings, and three layers
    assert look["lens"]["tokens"][-1] == [tokenizer.token_text(int(id)) for id in logits.argmax(dim=-1)]
    assert look["lens"]["probabilities"][-1] == pytest.approx(probabilities.amax(dim=-1).tolist(), abs=2e-5)


@pytest.mark.parametrize("family", ["gpt1", "qwen3"])
def test_last_residual_gives_the_logits(family: str, tokenizer: Tokenizer) -> None:
    model = model_of(family, tokenizer)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    states: list[torch.Tensor] = []
    with torch.no_grad():
        logits = model(ids, residuals=states)
        assert len(states) == 4
        assert torch.equal(model.lm_head(model.norm(states[-1])), logits)
        length = ids.shape[1]
        rope = (model.rope_cos[:length], model.rope_sin[:length]) if family == "qwen3" else None
        last = model.layers[2](states[2], AttentionInputs(rope=rope))
        torch.testing.assert_close(last, states[3])
        assert torch.equal(model(ids), logits)  # inspecting leaves the model unchanged


def test_only_requested_parts(tokenizer: Tokenizer) -> None:
    look = inspect_text(model_of("qwen3", tokenizer), tokenizer, TEXT, parts=["lens"])
    assert look["attention"] is None
    assert look["next"] is None
    assert look["lens"] is not None


def test_invalid_requests(tokenizer: Tokenizer) -> None:
    model = model_of("qwen3", tokenizer)
    with pytest.raises(UsageError, match="from 0 to 2"):
        inspect_text(model, tokenizer, TEXT, layer=3)
    with pytest.raises(UsageError, match=f"1 to {MAX_TOKENS}"):
        inspect_text(model, tokenizer, "a" * (MAX_TOKENS + 1))
    with pytest.raises(UsageError, match="1 to 8"):
        inspect_text(model_of("gpt2", tokenizer, context=8), tokenizer, "a" * 9)
    with pytest.raises(TokenizerError, match="z"):
        inspect_text(model, tokenizer, "z")
