"""Packing: nothing is lost or cut, rows are nearly full, and no document influences another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data.conversations import Example
from gptsmith.data.loader import TokenBatch
from gptsmith.data.packing import Examples, PackedLoader, pack, packed_batch
from gptsmith.errors import CheckpointError, UsageError
from gptsmith.model.config import IGNORED
from tests.factories import tiny_model


def examples_of(lengths: list[int], *, seed: int = 0) -> Examples:
    random = np.random.default_rng(seed)
    return Examples(
        Example(random.integers(1, 30, n).tolist(), [False, *(random.random(n - 1) < 0.6).tolist()]) for n in lengths
    )


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
def test_every_example_is_in_one_row_and_fits(lengths: list[int], seq_len: int) -> None:
    rows = pack(lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= seq_len for row in rows)
    # Best-fit decreasing needs at most 11/9 of the optimum plus one (Johnson 1973); half of a row is used at least.
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // seq_len)) * 2 + 1
    assert rows == pack(lengths, seq_len)


def test_it_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 500)
    rows = pack(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) > 0.98


def test_too_long() -> None:
    with pytest.raises(UsageError, match="an example of 9 tokens does not fit into a row of 8"):
        pack([3, 9], 8)


@settings(deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.booleans())
def test_batches_have_every_token_and_mask(lengths: list[int], packing: bool) -> None:
    examples = examples_of(lengths)
    loader = PackedLoader(examples, batch_size=3, seq_len=16, seed=1, packing=packing)
    found = []
    for batch in loader.whole(3):
        assert batch.document_ids is not None
        columns = (batch.ids.tolist(), batch.targets.tolist(), batch.document_ids.tolist())
        for ids, targets, documents in zip(*columns, strict=True):
            for number in sorted({d for d in documents if d >= 0}):
                at = [i for i, d in enumerate(documents) if d == number]
                assert at == list(range(at[0], at[-1] + 1))
                found.append(([ids[i] for i in at], [targets[i] for i in at]))
            assert all(target == IGNORED for target, d in zip(targets, documents, strict=True) if d < 0)
    expected = [
        (ids[:-1], [id if t else IGNORED for id, t in zip(ids[1:], trained[1:], strict=True)])
        for ids, trained, _ in (examples[i] for i in range(len(examples)))
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("family", ["gpt2", "gpt1", "qwen3", "mistral"])
def test_a_document_changes_no_bit_of_another(family: str) -> None:
    options: dict[str, Any] = {"intermediate_size": None} if family == "gpt1" else {}
    model = tiny_model(family, max_position_embeddings=24, **options)
    examples = examples_of([9, 8, 7])
    changed = Example([(i * 7) % 29 + 1 for i in examples[1].ids], examples[1].trained)
    other = Examples([examples[0], changed, examples[2]])
    rows = [[0, 1, 2]]
    with torch.no_grad():
        one, two = (
            model(batch.ids, document_ids=batch.document_ids)
            for batch in (packed_batch(each, rows, 24) for each in (examples, other))
        )
    assert torch.equal(one[:, :8], two[:, :8])
    assert torch.equal(one[:, 15:21], two[:, 15:21])
    assert not torch.equal(one[:, 8:15], two[:, 8:15])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_equals_alone(family: str) -> None:
    """Positions start anew in every document: its logits are those that it has alone."""
    model, examples = tiny_model(family, max_position_embeddings=24), examples_of([9, 8, 7])
    batch = packed_batch(examples, [[0, 1, 2]], 24)
    with torch.no_grad():
        packed = model(batch.ids, document_ids=batch.document_ids)[0]
        alone = [model(torch.tensor([examples[i].ids[:-1]]))[0] for i in range(3)]
    assert torch.allclose(packed[:21], torch.cat(alone), atol=1e-5)


def test_the_position_is_the_only_state() -> None:
    examples = examples_of([5, 9, 12, 3, 7, 7, 2, 11])

    def loader(**options: Any) -> PackedLoader:
        return PackedLoader(examples, **{"batch_size": 2, "seq_len": 16, "seed": 3, **options})

    first = loader()
    batches = [next(first) for _ in range(9)]
    second = loader()
    second.load_state_dict({**first.state_dict(), "position": 8})
    assert all(torch.equal(a, b) for a, b in zip(next(second)[:2], batches[4][:2], strict=True))
    epoch = [tuple(row.tolist()) for batch in batches[: len(first.rows) // 2] for row in batch.ids]
    assert len(first.rows) % 2 or len(set(epoch)) == len(first.rows)
    with pytest.raises(CheckpointError, match="seed of the data is 4, and was 3"):
        loader(seed=4).load_state_dict(first.state_dict())


def test_without_packing_rows_are_as_wide_as_the_longest() -> None:
    loader = PackedLoader(examples_of([5, 9, 70]), batch_size=3, seq_len=200, seed=0, packing=False)
    batch: TokenBatch = next(loader)
    assert batch.ids.shape == (3, 128)
