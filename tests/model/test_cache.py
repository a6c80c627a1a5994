"""Contiguous and paged caches: logits equal those of a single forward pass over all tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.model import families
from gptsmith.model.cache import Chunk, KVCache, PagedBatch, PagedCache, windows_of
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_config

CONTEXT = 30


config = functools.partial(
    tiny_config,
    vocab_size=31,
    hidden_size=24,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,
)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_paged_equals_uncached(family: str, data: st.DataObject) -> None:
    """For sequences of any length, in chunks of any size, with blocks in any order."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = Transformer(config(family)).eval()
    lengths = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4))
    size = data.draw(st.integers(1, 7))
    each = -(-CONTEXT // size)
    windows = windows_of(model.config)
    cache = PagedCache(model.config, [each * len(lengths)] * len(windows), size)
    blocks = range(each * len(lengths))
    order = data.draw(st.permutations(blocks)) if data.draw(st.booleans()) else list(blocks)  # scattered or contiguous
    tables = [[list(order[s * each : (s + 1) * each]) for _ in windows] for s in range(len(lengths))]
    ids = [torch.randint(0, 31, (length,)) for length in lengths]
    got: list[list[torch.Tensor]] = [[] for _ in lengths]
    past = [0] * len(lengths)
    with torch.no_grad():
        while any(p < n for p, n in zip(past, lengths, strict=True)):
            chosen = [s for s, n in enumerate(lengths) if past[s] < n]
            counts = [data.draw(st.integers(1, min(4, lengths[s] - past[s]))) for s in chosen]
            chunks = [Chunk(past[s], count, tables[s]) for s, count in zip(chosen, counts, strict=True)]
            new = torch.cat([ids[s][past[s] : past[s] + count] for s, count in zip(chosen, counts, strict=True)])
            logits = model(new[None], cache=PagedBatch(cache, chunks, CONTEXT))[0]
            for s, count, part in zip(chosen, counts, logits.split(counts), strict=True):
                got[s].append(part)
                past[s] += count
        for s, parts in enumerate(got):
            torch.testing.assert_close(torch.cat(parts), model(ids[s][None])[0], atol=1e-4, rtol=1e-4)


def test_groups_of_layers_with_the_same_window() -> None:
    assert windows_of(config("gpt3")) == [None, 7]
    assert windows_of(config("mistral")) == [7]
    cache = PagedCache(config("gpt3"), [7, 3], 4)
    assert [tuple(keys.shape) for keys in cache.keys] == [(7, 4, 4, 6), (3, 4, 4, 6)]
    assert cache.bytes() == 2 * (7 + 3) * 4 * 4 * 6 * 4


def test_copied_and_cleared_blocks() -> None:
    cache = PagedCache(config("gpt3"), [4, 4], 2)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.arange(4.0)[:, None, None, None].expand_as(tensor))
    cache.copy(1, 2, 0)
    cache.clear(0, [3])
    assert [keys[:, 0, 0, 0].tolist() for keys in cache.keys] == [[0, 1, 2, 0], [2, 1, 2, 3]]
    assert [values[:, 0, 0, 0].tolist() for values in cache.values] == [[0, 1, 2, 0], [2, 1, 2, 3]]


def test_too_many_tokens_for_the_capacity_or_the_context() -> None:
    model = Transformer(config("gpt2"))
    with pytest.raises(IndexError, match="capacity of 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=KVCache(model.config, 1, 4))
    with pytest.raises(IndexError, match="context of 30"):
        model(torch.zeros(1, 31, dtype=torch.int64), cache=KVCache(model.config, 1, 40))
    paged = PagedBatch(PagedCache(model.config, [9], 4), [Chunk(30, 1, [list(range(8))])], CONTEXT)
    with pytest.raises(IndexError, match="context of 30"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=paged)
