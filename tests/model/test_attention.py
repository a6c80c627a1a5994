"""Banded attention: whatever way it is computed, it is softmax under the band."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.model.attention import attend, attend_flex, attend_in_blocks, attention_weights, visible
from gptsmith.model.cache import KVCache
from tests.factories import tiny_model


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    new=st.integers(1, 40),
    window=st.none() | st.integers(1, 45),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)
def test_equals_the_written_out_softmax(
    length: int, new: int, window: int | None, kv_heads: int, masked: bool, scale: float | None, seed: int
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
    expected = attention_weights(q, k, mask, window, scale) @ v.repeat_interleave(4 // kv_heads, dim=1)
    torch.testing.assert_close(attend(q, k, v, mask, window, 0.0, scale), expected, atol=5e-5, rtol=5e-5)


def test_blocks_have_the_gradients_of_the_full_mask() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 33, 4, requires_grad=True) for _ in range(3)]
    q, k, v = leaves
    upstream = torch.randn(1, 2, 33, 4)
    blocks = torch.autograd.grad(attend(q, k, v, None, 5, 0.0), leaves, upstream)
    written = torch.autograd.grad(attention_weights(q, k, None, 5) @ v, leaves, upstream)
    for a, b in zip(blocks, written, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "window", "kv_heads", "scale"), [(150, 5, 2, None), (300, 130, 1, 0.5)])
def test_flex_attention_is_the_same_band(length: int, window: int, kv_heads: int, scale: float | None) -> None:
    """Not compiled, on any device: that the mask, the groups and the scale are right. Lengths of no whole blocks."""
    torch.manual_seed(0)
    q = torch.randn(2, 2, length, 16)
    k, v = torch.randn(2, kv_heads, length, 16), torch.randn(2, kv_heads, length, 16)
    expected = attend_in_blocks(q, k, v, window, 0.0, scale)
    torch.testing.assert_close(attend_flex(q, k, v, window, scale, compiled=False), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("compiled_block", [False, True])
def test_flex_attention_on_a_gpu(compiled_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The band of a training step goes through the kernel, forward and backward, also from compiled code."""
    from gptsmith.model import attention

    used = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def noted(*arguments: Any) -> torch.Tensor:
        used.append(1)
        return attend_flex(*arguments)

    monkeypatch.setattr(attention, "attend_flex", noted)
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, 1000, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = leaves
    function = torch.compile(attend) if compiled_block else attend
    y = function(q, k, v, None, 100)
    expected = attend_in_blocks(q, k, v, 100)
    assert used
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("family", ["gpt1", "gpt3", "mistral", "llama", "qwen2"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cached_equals_uncached(family: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 99))
    model = tiny_model(
        family, seed=seed, vocab_size=31, hidden_size=24, num_attention_heads=4, max_position_embeddings=20
    )
    ids = torch.randint(0, 31, (2, 20))
    with torch.no_grad():
        whole = model(ids)
        cache, parts, start = KVCache(model.config, 2, 20), [], 0
        while start < 20:
            size = data.draw(st.integers(1, 20 - start))
            parts.append(model(ids[:, start : start + size], cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
