"""Every way to compute attention equals the written-out softmax under the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.model import attention
from gptsmith.model.attention import (
    attend,
    causal_mask,
    document_attention,
    flex_attention,
    sliding_window_attention,
)
from gptsmith.model.cache import KVCache
from gptsmith.model.documents import Documents
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import attention_weights
from tests.factories import tiny_model


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    return attention_weights(q, k, mask, scale) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@st.composite
def document_ids(draw: st.DrawFn, rows: int, length: int) -> Tensor:
    """Rows of documents of random lengths; numbers may come back, as those of padding do."""
    lengths = st.integers(1, length)
    ids = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            number = draw(st.integers(0, 3))
            row += [number] * draw(lengths)
        ids.append(row[:length])
    return torch.tensor(ids)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    new=st.integers(1, 40),
    window=st.none() | st.integers(1, 45),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)
def test_equals_the_written_out_softmax(
    length: int, new: int, window: int | None, kv_heads: int, scale: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    new = min(new, length)
    q = torch.randn(2, 4, new, 8)
    k, v = torch.randn(2, kv_heads, length, 8), torch.randn(2, kv_heads, length, 8)
    expected = written_out(q, k, v, causal_mask(new, length, window, q.device), scale)
    torch.testing.assert_close(attend(q, k, v, window=window, scale=scale), expected, atol=5e-5, rtol=5e-5)


def test_sliding_window_has_the_gradients_of_the_mask() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 33, 4, requires_grad=True) for _ in range(3)]
    q, k, v = leaves
    upstream = torch.randn(1, 2, 33, 4)
    blocks = torch.autograd.grad(attend(q, k, v, window=5), leaves, upstream)
    expected = torch.autograd.grad(written_out(q, k, v, causal_mask(33, 33, 5, q.device)), leaves, upstream)
    for a, b in zip(blocks, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


# -- documents ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    length=st.integers(1, 70),
    window=st.none() | st.integers(1, 75),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.5]),
)
def test_documents_equal_the_mask(
    data: st.DataObject, length: int, window: int | None, kv_heads: int, scale: float | None
) -> None:
    """Outputs and gradients."""
    torch.manual_seed(length)
    documents = Documents(data.draw(document_ids(2, length)))
    leaves = [torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    q, k, v = leaves
    found = attend(q, k, v, documents=documents, window=window, scale=scale)
    expected = written_out(q, k, v, documents.mask(window), scale)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


@given(data=st.data(), length=st.integers(1, 50), window=st.none() | st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_masks_and_positions_of_documents(data: st.DataObject, length: int, window: int | None) -> None:
    """Against their definition, token by token."""
    ids = data.draw(document_ids(2, length))
    documents = Documents(ids)
    mask, positions = documents.mask(window)[:, 0], documents.positions()
    for row in range(2):
        start = 0
        for i in range(length):
            if i and ids[row, i] != ids[row, i - 1]:
                start = i
            oldest = start if window is None else max(start, i - window + 1)
            assert mask[row, i].tolist() == [oldest <= j <= i for j in range(length)]
            assert positions[row, i] == i - start


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_document_changes_no_bit_of_another(family: str, data: st.DataObject) -> None:
    """When it gets other tokens. (An expert multiplies the tokens of all documents that chose it in one product, whose
    shape decides how sums are rounded: there the logits stay the same up to rounding.)"""
    model = tiny_model(family)
    ids = torch.randint(0, 30, (2, 24))
    numbers = data.draw(document_ids(2, 24))
    row, at = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 23))
    starts = Documents(numbers).starts
    changed = (starts == starts[row, at]) & (torch.arange(2)[:, None] == row)
    others = torch.where(changed, (ids + 1 + torch.randint(0, 29, ids.shape)) % 30, ids)
    with torch.no_grad():
        before, after = model(ids, document_ids=numbers), model(others, document_ids=numbers)
    if model.config.num_experts:
        torch.testing.assert_close(before[~changed], after[~changed], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_those_alone(family: str) -> None:
    model = tiny_model(family)
    lengths, ids = [3, 1, 9, 11], torch.randint(0, 30, (1, 24))
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = model(ids, document_ids=numbers)
        alone = torch.cat([model(part) for part in torch.split(ids, lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_rows_of_single_documents_are_computed_as_without_documents() -> None:
    model, ids = tiny_model("llama"), torch.randint(0, 30, (2, 24))
    numbers = torch.tensor([[3], [5]]).expand(2, 24)
    with torch.no_grad():
        assert torch.equal(model(ids, document_ids=numbers), model(ids))


def test_memory_of_documents_is_linear_in_the_context() -> None:
    """The largest tensor of the forward and backward pass; twice the context doubles it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
            return result

    def largest(length: int) -> int:
        leaves = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        documents = Documents((torch.arange(length) // 24)[None])
        with Largest() as mode:
            torch.autograd.backward(attend(*leaves, documents=documents).sum())
        return mode.elements

    assert largest(2048) <= 2.2 * largest(1024)


def test_dropout_of_attention_weights_stays_within_documents() -> None:
    """Expected values are those without dropout, and weights of other documents stay 0."""
    torch.manual_seed(0)
    documents = Documents(torch.tensor([[0] * 3 + [1] * 9]))
    q, k = (0.1 * torch.randn(1, 1, 12, 4) for _ in range(2))
    v = torch.eye(12)[None, None]  # outputs are the weights themselves
    q, k = (torch.nn.functional.pad(x, (0, 8)) for x in (q, k))
    drawn = torch.stack([document_attention(q, k, v, documents, dropout=0.5) for _ in range(2000)])
    expected = attention_weights(q, k, documents.mask())
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.1, rtol=0)
    assert (drawn[..., ~documents.mask()[0, 0]] == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("length", "window"), [(64, None), (64, 20), (40, None)])
def test_compiled_documents(length: int, window: int | None) -> None:
    """In the kernel where shapes allow it, otherwise outside of the compiled code."""
    torch.manual_seed(0)
    compiled: Any = torch.compile(attend, backend="eager")
    for numbers in ((torch.arange(length) // 13).expand(2, length), torch.arange(length).expand(2, length) // 29):
        documents = Documents(numbers)
        leaves = [torch.randn(2, heads, length, 16, requires_grad=True) for heads in (4, 2, 2)]
        q, k, v = leaves
        found = compiled(q, k, v, documents=documents, window=window)
        expected = written_out(q, k, v, documents.mask(window))
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)
        upstream = torch.randn_like(found)
        ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


# -- FlexAttention -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "window", "kv_heads", "scale"), [(150, 5, 2, None), (300, 130, 1, 0.5)])
def test_flex_attention_computes_the_same_window(length: int, window: int, kv_heads: int, scale: float | None) -> None:
    """Not compiled, on any device: mask, groups and scale. The lengths are no multiples of its block size."""
    torch.manual_seed(0)
    q = torch.randn(2, 2, length, 16)
    k, v = torch.randn(2, kv_heads, length, 16), torch.randn(2, kv_heads, length, 16)
    expected = sliding_window_attention(q, k, v, window, 0.0, scale)
    found = flex_attention(q, k, v, window=window, scale=scale, compiled=False)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_computes_the_same_documents(window: int | None) -> None:
    torch.manual_seed(0)
    documents = Documents(torch.stack([torch.arange(150) // 31, torch.arange(150) // 77]))
    q, k, v = (torch.randn(2, heads, 150, 16) for heads in (4, 2, 2))
    found = flex_attention(q, k, v, documents=documents, window=window, compiled=False)
    torch.testing.assert_close(found, written_out(q, k, v, documents.mask(window)), atol=5e-5, rtol=5e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("compiled_block", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_on_a_gpu(compiled_block: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and documents use the kernel in training, forward and backward, also in compiled code."""
    used = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def noted(*arguments: Any, **options: Any) -> Any:
        used.append(1)
        return flex_attention(*arguments, **options)

    monkeypatch.setattr(attention, "flex_attention", noted)
    torch.manual_seed(0)
    documents = Documents(torch.arange(1000, device="cuda")[None] // 170) if packed else None
    leaves = [torch.randn(1, heads, 1000, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = leaves
    function: Any = torch.compile(attend) if compiled_block else attend
    y = function(q, k, v, window=100, documents=documents)
    mask = causal_mask(1000, 1000, 100, q.device) if documents is None else documents.mask(100)
    expected = written_out(q, k, v, mask)
    assert used
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


# -- cache -------------------------------------------------------------------------------------------------------------


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
