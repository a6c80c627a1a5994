"""A split reads the same for one shard or many, and refuses reads outside of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.data import TokenSplit


@st.composite
def splits(draw: st.DrawFn) -> tuple[TokenSplit, list[int], list[int]]:
    """Draw a split over several shards, its ids, and the offsets at which its documents begin."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    total = sum(sizes)
    ids = np.arange(total, dtype=np.uint16)
    ends = list(itertools.accumulate(sizes))
    shards = [ids[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    starts = sorted({0} | set(draw(st.lists(st.integers(0, max(0, total - 1)))))) if total else []
    start = draw(st.integers(0, total))
    stop = draw(st.integers(start, total))
    inside = [at - start for at in starts if start < at < stop]
    split = TokenSplit(shards, np.array(starts, dtype=np.int64), start=start, stop=stop)
    return split, list(range(start, stop)), ([0, *inside] if stop > start else [])


@given(splits(), st.data())
def test_a_range_across_shards_is_joined(case: tuple[TokenSplit, list[int], list[int]], data: st.DataObject) -> None:
    split, ids, starts = case
    assert len(split) == len(ids)
    assert split.document_starts.tolist() == starts
    assert split.num_documents == len(starts)
    low = data.draw(st.integers(0, len(ids)))
    high = data.draw(st.integers(low, len(ids)))
    assert split.tokens(low, high).tolist() == ids[low:high]
    assert split.tokens().tolist() == ids
    if ids:
        length = data.draw(st.integers(1, len(ids)))
        begins = data.draw(st.lists(st.integers(0, len(ids) - length), max_size=6))
        windows = split.windows(np.array(begins, dtype=np.int64), length)
        assert windows.tolist() == [ids[begin : begin + length] for begin in begins]
        documents = split.documents_at(np.arange(len(ids)))
        assert documents.tolist() == [sum(start <= at for start in starts) - 1 for at in range(len(ids))]


def test_reading_outside_is_an_error() -> None:
    split = TokenSplit([np.arange(10, dtype=np.uint16)], np.zeros(1, np.int64), start=2, stop=8)
    with pytest.raises(IndexError):
        split.tokens(0, 7)
    for start in (-1, 4):
        with pytest.raises(IndexError):
            split.windows(np.array([start]), 3)


def test_an_empty_split_is_falsy() -> None:
    assert not TokenSplit.from_array(np.zeros(0, np.uint16), ())
    assert TokenSplit.from_array(np.zeros(1, np.uint16))
