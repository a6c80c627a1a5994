"""Batches are a pure function of seed and position, and show no token twice in an epoch for any number of ranks."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.data import TokenLoader, TokenSplit, whole_split_batches
from gptsmith.data.loader import permuted
from gptsmith.errors import CheckpointError, DataError, UsageError
from gptsmith.model.config import IGNORED


def counting(length: int, document_starts: tuple[int, ...] = (0,), **options: object) -> TokenSplit:
    """Return a split in which every token equals its position."""
    return TokenSplit.from_array(np.arange(length, dtype=np.uint32), document_starts, **options)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(n: int, key: int) -> None:
    found = permuted(np.arange(n, dtype=np.uint64), n, np.full(n, key, dtype=np.uint64))
    assert np.array_equal(np.sort(found), np.arange(n))


@given(n=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permuted_stays_within_large_ranges(n: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)), dtype=np.uint64)
    found = permuted(index, n, np.full(len(index), key, dtype=np.uint64))
    assert found.max() < n
    assert len(np.unique(found)) == len(index)


def test_permutations_look_random() -> None:
    n, epochs = 50, 2000
    loader = TokenLoader(counting(n * 4 + 4), batch_size=1, seq_len=4, seed=1)
    assert loader.windows_per_epoch == n
    starts = loader.window_starts(np.arange(n * epochs)).reshape(epochs, n)
    offsets = starts.min(axis=1)
    order = (starts - offsets[:, None]) // 4
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (epochs, 1)))
    expected = epochs / n  # each window is equally likely at every place
    for place in range(0, n, 7):
        chi_squared = np.sum((np.bincount(order[:, place], minlength=n) - expected) ** 2) / expected
        assert chi_squared < 100  # with 49 degrees of freedom, 100 is exceeded once in fifty thousand
    neighbors = np.mean(np.diff(order, axis=1) % n == 1)
    assert neighbors == pytest.approx(1 / n, rel=0.1)
    assert np.bincount(offsets, minlength=4).min() > epochs / 4 * 0.85


@settings(deadline=None)
@given(length=st.integers(2, 400), seq_len=st.integers(1, 40), seed=st.integers(), epoch=st.integers(0, 10**9))
def test_an_epoch_sees_no_target_twice(length: int, seq_len: int, seed: int, epoch: int) -> None:
    if length < seq_len + 1:
        with pytest.raises(DataError, match=f"it has {length} tokens, and a context of {seq_len} needs"):
            TokenLoader(counting(length), batch_size=1, seq_len=seq_len, seed=seed)
        return
    loader = TokenLoader(counting(length), batch_size=3, seq_len=seq_len, seed=seed)
    n = loader.windows_per_epoch
    assert n == max(1, (length - 1 - (seq_len - 1)) // seq_len)
    starts = loader.window_starts(np.arange(epoch * n, (epoch + 1) * n))
    targets = (starts[:, None] + np.arange(1, seq_len + 1)).ravel()
    assert targets.max() < length
    assert len(np.unique(targets)) == n * seq_len
    batch = loader.batch_at(epoch * n)
    assert batch.ids.shape == batch.targets.shape == (3, seq_len)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids is None
    assert np.array_equal(batch.targets, batch.ids + 1)


def test_every_token_is_a_target_at_some_time() -> None:
    loader = TokenLoader(counting(103), batch_size=12, seq_len=8, seed=0)
    seen: set[int] = set()
    for _ in range(100):
        seen.update(next(loader).targets.ravel().tolist())
    assert seen == set(range(1, 103))


@settings(deadline=None)
@given(
    length=st.integers(30, 300),
    start=st.integers(0, 29),
    held_out=st.integers(1, 100),
    position=st.integers(0, 10**12),
    seed=st.integers(),
)
def test_training_never_sees_a_token_outside_its_split(
    length: int, start: int, held_out: int, position: int, seed: int
) -> None:
    ids = np.arange(start + length + held_out, dtype=np.uint32)
    split = TokenSplit([ids[:17], ids[17:]], np.zeros(1, np.int64), start=start, stop=start + length)
    loader = TokenLoader(split, batch_size=16, seq_len=10, seed=seed)
    batch = loader.batch_at(position)
    for part in (batch.ids, batch.targets):
        assert part.min() >= start
        assert part.max() < start + length


@given(ranks=st.sampled_from([2, 3, 4]), batch_size=st.integers(1, 4), position=st.integers(0, 1000))
def test_ranks_share_one_order(ranks: int, batch_size: int, position: int) -> None:
    split = counting(500)
    whole = TokenLoader(split, batch_size=ranks * batch_size, seq_len=8, seed=3)
    parts = [
        TokenLoader(split, batch_size=batch_size, seq_len=8, seed=3, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    for loader in [whole, *parts]:
        loader.position = position
    for _ in range(3):
        joined = np.concatenate([next(part).ids for part in parts])
        assert np.array_equal(next(whole).ids, joined)
        assert {part.position for part in parts} == {whole.position}


def test_a_batch_depends_on_seed_and_position_only() -> None:
    loader = TokenLoader(counting(1000), batch_size=4, seq_len=16, seed=5)
    again = TokenLoader(counting(1000), batch_size=4, seq_len=16, seed=5)
    run = [next(loader).ids for _ in range(40)]
    assert np.array_equal(again.batch_at(4 * 17).ids, run[17])
    assert again.position == 0
    assert not np.array_equal(TokenLoader(counting(1000), batch_size=4, seq_len=16, seed=6).batch_at(0).ids, run[0])
    assert len({ids.numpy().tobytes() for ids in run}) == 40


def test_the_position_survives_json() -> None:
    options: dict[str, Any] = {"batch_size": 4, "seq_len": 16, "seed": 5}
    loader = TokenLoader(counting(1000, fingerprint="abc"), **options)
    for _ in range(33):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = TokenLoader(counting(1000, fingerprint="abc"), **options)
    resumed.load_state_dict(state)
    for _ in range(33):
        assert np.array_equal(next(loader).ids, next(resumed).ids)
    half = TokenLoader(counting(1000, fingerprint="abc"), **{**options, "batch_size": 2}, world_size=2, rank=1)
    half.load_state_dict(state)
    assert np.array_equal(half.batch_at(132).ids, loader.batch_at(132).ids[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "the seed has changed (checkpoint: 5, now: 6)"),
        ({"seq_len": 8}, "the context length has changed"),
        ({"batch_size": 8}, "the number of sequences per step has changed"),
        ({"fingerprint": "other"}, "the training text or its tokenizer has changed"),
        ({"length": 999}, "the number of training tokens has changed"),
        ({"mask_documents": True}, "the masking across documents has changed"),
    ],
)
def test_the_position_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    def make(length: int = 1000, fingerprint: str = "abc", **options: Any) -> TokenLoader:
        return TokenLoader(
            counting(length, fingerprint=fingerprint), **{"batch_size": 4, "seq_len": 16, "seed": 5, **options}
        )

    loader = make(**change)
    with pytest.raises(CheckpointError) as caught:
        loader.load_state_dict(make().state_dict())
    assert message in str(caught.value)
    assert loader.position == 0


@pytest.mark.parametrize("change", [{"position": -1}, {"position": "7"}, {"position": None}, {"seed": ...}])
def test_a_damaged_position_is_refused(change: dict[str, object]) -> None:
    loader = TokenLoader(counting(100), batch_size=4, seq_len=16, seed=5)
    state = {key: value for key, value in {**loader.state_dict(), **change}.items() if value is not ...}
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"seq_len": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TokenLoader(counting(100), **{"batch_size": 4, "seq_len": 16, "seed": 5, **change})
    with pytest.raises(UsageError):
        whole_split_batches(counting(100), **{"batch_size": 4, "seq_len": 16, **change})


@st.composite
def document_splits(draw: st.DrawFn) -> tuple[TokenSplit, tuple[int, ...]]:
    length = draw(st.integers(20, 120))
    starts = (0, *sorted(draw(st.sets(st.integers(1, length - 1)))))
    return counting(length, starts), starts


@given(document_splits(), st.integers(1, 15), st.integers(0, 1000))
def test_document_ids_separate_documents(case: tuple[TokenSplit, tuple[int, ...]], seq_len: int, position: int) -> None:
    split, starts = case
    masked = TokenLoader(split, batch_size=5, seq_len=seq_len, seed=1, mask_documents=True).batch_at(position)
    plain = TokenLoader(split, batch_size=5, seq_len=seq_len, seed=1).batch_at(position)
    assert np.array_equal(masked.ids, plain.ids)
    assert masked.document_ids is not None
    assert masked.document_ids.dtype == torch.int32
    for ids, targets, documents in zip(masked.ids, masked.targets, masked.document_ids, strict=True):
        owner = [max(start for start in starts if start <= at) for at in range(len(split))]
        for at, target, document in zip(ids, targets, documents, strict=True):
            assert target == (IGNORED if at + 1 in starts else at + 1)
            for other, other_document in zip(ids, documents, strict=True):
                assert (owner[at] == owner[other]) == (document == other_document)


@given(
    length=st.integers(2, 200),
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 30),
    world_size=st.integers(1, 3),
    document_starts=st.sets(st.integers(1, 199)),
    mask_documents=st.booleans(),
)
def test_the_whole_split_is_predicted_once(
    length: int, batch_size: int, seq_len: int, world_size: int, document_starts: set[int], mask_documents: bool
) -> None:
    starts = (0, *sorted(at for at in document_starts if at < length))
    split = counting(length, starts)
    per_rank = [
        list(
            whole_split_batches(
                split,
                batch_size=batch_size,
                seq_len=seq_len,
                mask_documents=mask_documents,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in per_rank} == {math.ceil((length - 1) / (batch_size * seq_len * world_size))}
    targets: list[int] = []
    for batch in (batch for batches in per_rank for batch in batches):
        assert batch.ids.shape == batch.targets.shape == (batch_size, seq_len)
        counted = batch.targets != IGNORED
        assert np.array_equal(batch.targets[counted], batch.ids[counted] + 1)
        targets += batch.targets[counted].tolist()
        assert (batch.document_ids is not None) == mask_documents
    left_out = set(starts) if mask_documents else set()
    assert sorted(targets) == [at for at in range(1, length) if at not in left_out]


def test_slices_of_a_batch_are_its_rows() -> None:
    split = counting(100, (0, 13, 40, 63, 80, 91))
    batch = TokenLoader(split, batch_size=5, seq_len=10, seed=1, mask_documents=True).batch_at(0)
    assert batch.num_rows == 5
    parts = [batch.slice(0, 2), batch.slice(2, 5)]
    assert [part.num_rows for part in parts] == [2, 3]
    for name in ("ids", "targets", "document_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.num_targets for part in parts) == batch.num_targets < batch.targets.numel()


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_batch_moves_to_a_device_as_a_whole(mask_documents: bool) -> None:
    batch = TokenLoader(counting(50), batch_size=2, seq_len=8, seed=1, mask_documents=mask_documents).batch_at(0)
    moved = batch.to(torch.device("meta"))
    assert (moved.document_ids is not None) == mask_documents
    for place, parts in (("meta", moved), ("cpu", batch.to(torch.device("cpu")))):
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        assert len(tensors) == 2 + mask_documents
        assert all(tensor.device.type == place for tensor in tensors)


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_predict(length: int) -> None:
    with pytest.raises(DataError, match=f"validation text is too short: it has {length} tokens"):
        whole_split_batches(counting(length), batch_size=2, seq_len=4)
