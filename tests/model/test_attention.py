"""Banded attention: whatever way it is computed, it is softmax under the band."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.model import families
from gptsmith.model.attention import attend, attention_weights, visible
from gptsmith.model.cache import KVCache
from gptsmith.model.transformer import Transformer


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    new=st.integers(1, 40),
    window=st.none() | st.integers(1, 45),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_written_out_softmax(
    length: int, new: int, window: int | None, kv_heads: int, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    new = min(new, length)
    q = torch.randn(2, 4, new, 8)
    k, v = torch.randn(2, kv_heads, length, 8), torch.randn(2, kv_heads, length, 8)
    mask = None
    if masked:  # two documents; each token sees at least itself
        documents = torch.arange(length) >= length // 3
        mask = (documents[-new:, None] == documents[None, :]) & visible(new, length, None, q.device)
        mask = mask[None, None]
    expected = attention_weights(q, k, mask, window) @ v.repeat_interleave(4 // kv_heads, dim=1)
    torch.testing.assert_close(attend(q, k, v, mask, window, 0.0), expected, atol=1e-5, rtol=1e-5)


def test_blocks_have_the_gradients_of_the_full_mask() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 33, 4, requires_grad=True) for _ in range(3)]
    q, k, v = leaves
    upstream = torch.randn(1, 2, 33, 4)
    blocks = torch.autograd.grad(attend(q, k, v, None, 5, 0.0), leaves, upstream)
    written = torch.autograd.grad(attention_weights(q, k, None, 5) @ v, leaves, upstream)
    for a, b in zip(blocks, written, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt1", "gpt3", "mistral", "llama", "qwen2"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cached_equals_uncached(family: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options = {"sliding_window": 6} if family in ("gpt3", "mistral") else {}
    config = families.FAMILIES[family](
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        initializer_range=0.3,
        **options,
    )
    model = Transformer(config).eval()
    ids = torch.randint(0, 31, (2, 20))
    with torch.no_grad():
        whole = model(ids)
        cache, parts, start = KVCache(config, 2, 20), [], 0
        while start < 20:
            size = data.draw(st.integers(1, 20 - start))
            parts.append(model(ids[:, start : start + size], cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
