from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import UsageError
from gptsmith.model.cache import KVCache
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_config

config = functools.partial(
    tiny_config,
    vocab_size=31,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
    initializer_range=0.3,
)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_cached_equals_uncached(family: str, data: st.DataObject) -> None:
    """In chunks of any size, the logits equal those of a single forward pass."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = Transformer(config(family)).eval()
    ids = torch.randint(0, 31, (2, 20))
    with torch.no_grad():
        whole = model(ids)
        cache, parts, start = KVCache(model.config, 2, 20), [], 0
        while start < 20:
            size = data.draw(st.integers(1, 20 - start))
            parts.append(model(ids[:, start : start + size], cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_no_token_sees_the_future(family: str) -> None:
    model = Transformer(config(family)).eval()
    ids = torch.randint(0, 31, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 31
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[0, :12], after[0, :12])
    assert not torch.allclose(before[0, 12:], after[0, 12:])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_documents_do_not_attend_to_each_other(family: str) -> None:
    """Two documents packed into a row have the logits that each has alone."""
    model = Transformer(config(family)).eval()
    a, b = torch.randint(0, 31, (1, 7)), torch.randint(0, 31, (1, 13))
    document_ids = torch.tensor([[4] * 7 + [5] * 13])
    with torch.no_grad():
        packed = model(torch.cat((a, b), dim=1), document_ids=document_ids)
        torch.testing.assert_close(packed[:, :7], model(a), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed[:, 7:], model(b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_attention_weights_are_those_used(family: str) -> None:
    """Rows are distributions over the past, and their product with the values equals the output of SDPA."""
    model = Transformer(config(family, num_hidden_layers=1)).eval()
    ids, weights = torch.randint(0, 31, (1, 9)), list[torch.Tensor]()
    captured: dict[str, torch.Tensor] = {}
    attention: Any = model.layers[0].attention
    attention.o_proj.register_forward_pre_hook(lambda _, inputs: captured.update(mixed=inputs[0]))
    attention.qkv_proj.register_forward_hook(lambda _, __, output: captured.update(qkv=output))
    with torch.no_grad():
        model(ids, weights=weights)
    (w,) = weights
    assert w.shape == (1, 4, 9, 9)
    torch.testing.assert_close(w.sum(-1), torch.ones(1, 4, 9))
    assert torch.equal(w.triu(1), torch.zeros_like(w))
    kv_heads = model.config.num_key_value_heads
    v = captured["qkv"].view(1, 9, 4 + 2 * kv_heads, 6)[:, :, 4 + kv_heads :].transpose(1, 2)
    mixed = (w @ v.repeat_interleave(4 // kv_heads, dim=1)).transpose(1, 2).reshape(1, 9, 24)
    torch.testing.assert_close(mixed, captured["mixed"], atol=1e-5, rtol=1e-5)


def test_initial_loss_is_that_of_a_uniform_distribution() -> None:
    for family in ("gpt2", "qwen3"):
        torch.manual_seed(0)
        model = Transformer(config(family, hidden_size=64, initializer_range=0.02))
        ids = torch.randint(0, 31, (8, 20))
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), torch.randint(0, 31, (160,)))
        assert abs(loss.item() - math.log(31)) < 0.1


def test_gpt2_initializes_residual_projections_smaller() -> None:
    model = Transformer(config("gpt2", hidden_size=128, num_hidden_layers=8, initializer_range=0.02))
    first: Any = model.layers[0]
    assert first.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert first.attention.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_embeddings_in_place_of_ids(family: str) -> None:
    model, ids = Transformer(config(family)).eval(), torch.randint(0, 31, (2, 9))
    embeddings = model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embeddings), model(ids))
    upstream = torch.autograd.grad(model(inputs_embeds=embeddings).sum(), embeddings)
    assert upstream[0].shape == embeddings.shape
    with torch.no_grad():
        cache = KVCache(model.config, 2, 9)
        first = model(ids[:, :4], cache=cache)
        rest = model(inputs_embeds=embeddings[:, 4:], cache=cache)
        torch.testing.assert_close(torch.cat((first, rest), dim=1), model(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="either token ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either token ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings)


def test_dropout_only_in_training() -> None:
    model = Transformer(config("gpt2"), dropout=0.5)
    ids = torch.randint(0, 31, (1, 9))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_beyond_the_context_is_refused() -> None:
    model = Transformer(config("gpt2"))
    with pytest.raises(IndexError, match="context of 20"):
        model(torch.zeros(1, 21, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [{"num_hidden_layers": 0}, {"num_attention_heads": 4, "num_key_value_heads": 3}, {"head_dim": 5}],
)
def test_impossible_shapes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        config("qwen3", **wrong)


def test_dropout_out_of_range() -> None:
    with pytest.raises(UsageError, match="dropout"):
        Transformer(config("gpt2"), dropout=1.0)
