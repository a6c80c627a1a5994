"""Blocks are never lost, never given to two sequences that do not share them, and found again by their contents."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gptsmith.engine.block_manager import NO_BLOCK, BlockManager, BlockPool
from gptsmith.engine.sampler import SamplerState
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Request, Sequence


def make_sequence(tokens: list[int], groups: int = 1) -> Sequence:
    params = SamplingParams()
    request = Request(0, tokens, params, 0, b"")
    return Sequence(request, 0, SamplerState(params, 0, tokens, 100), groups)


def compute(manager: BlockManager, sequence: Sequence, count: int) -> bool:
    if not manager.extend(sequence, count):
        return False
    sequence.computed += count
    manager.commit(sequence)
    return True


def test_a_common_prefix_is_found() -> None:
    manager = BlockManager([None], [10], 4)
    first = make_sequence(list(range(11)))
    assert compute(manager, first, 11)
    second = make_sequence([*range(9), 50, 51])
    manager.match(second)
    assert second.computed == 8
    assert second.tables[0] == first.tables[0][:2]
    manager.release(first)
    manager.release(second)
    third = make_sequence(list(range(8)))
    manager.match(third)  # its last token must be computed: only the first block counts
    assert third.computed == 4
    assert (manager.prefix_hits, manager.prefix_tokens) == (12, 19)


def test_sequences_with_different_adapters_share_no_blocks() -> None:
    manager = BlockManager([None], [10], 4)
    compute(manager, make_sequence(list(range(9))), 9)
    other = make_sequence(list(range(9)))
    other.request.salt = b"adapter"
    manager.match(other)
    assert other.computed == 0


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(2)
    a, b = pool.take(), pool.take()
    pool.register(a, b"a")
    pool.register(b, b"b")
    pool.release(b)
    pool.release(a)
    assert pool.take() == b
    assert pool.find(b"b") is None
    assert pool.find(b"a") == a
    with pytest.raises(IndexError):
        [pool.take() for _ in range(2)]


def test_a_sliding_window_group_releases_blocks_behind_the_window() -> None:
    manager = BlockManager([None, 6], [20, 8], 4)
    sequence = make_sequence(list(range(40)), groups=2)
    for _ in range(8):
        assert compute(manager, sequence, 4)
    full, windowed = sequence.tables
    assert NO_BLOCK not in full
    assert [block == NO_BLOCK for block in windowed] == [True] * 6 + [False] * 2
    other = make_sequence([*range(33), 77], groups=2)
    manager.match(other)
    assert other.computed == 32  # of the group with the window, only the blocks within it are needed
    manager.release(sequence)
    manager.release(other)
    assert manager.used() == 0


def test_releasing_twice_raises() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ValueError, match="not held"):
        pool.release(block)


class RandomOperations(RuleBasedStateMachine):
    """Sequences over two tokens, so that they often share prefixes."""

    @initialize(size=st.integers(1, 4), blocks=st.integers(4, 12), window=st.none() | st.integers(1, 9))
    def begin(self, size: int, blocks: int, window: int | None) -> None:
        windows = [None] if window is None else [None, window]
        self.manager = BlockManager(windows, [blocks] * len(windows), size)
        self.live: list[Sequence] = []
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, tokens: list[int]) -> None:
        sequence = make_sequence(tokens, len(self.manager.windows))
        self.manager.match(sequence)
        self.live.append(sequence)
        Z = self.manager.block_size
        # A block that is found holds exactly these tokens, after the same tokens.
        for g, table in enumerate(sequence.tables):
            for i, block in enumerate(table):
                if block != NO_BLOCK:
                    assert self.contents[g, block] == tuple(tokens[: (i + 1) * Z])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        if sequence.remaining == 0:
            sequence.tokens.append(data.draw(st.integers(0, 1)))
        count = data.draw(st.integers(1, sequence.remaining))
        before = sequence.computed
        if not self.manager.extend(sequence, count):
            return
        Z = self.manager.block_size
        for g, table in enumerate(sequence.tables):
            for i in range(before // Z, -(-(before + count) // Z)):
                self.contents[g, table[i]] = tuple(sequence.tokens[: min((i + 1) * Z, before + count)])
        sequence.computed += count
        self.manager.commit(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.live))
        child = parent.fork(0, 0)
        for g, source, target in self.manager.fork(parent, child):
            self.contents[g, target] = self.contents[g, source]
        self.live.append(child)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.manager.release(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "manager"):
            return
        Z = self.manager.block_size
        for g, pool in enumerate(self.manager.pools):
            held = {block for s in self.live for block in s.tables[g] if block != NO_BLOCK}
            assert pool.size - pool.available == len(held)
            for block in range(pool.size):
                count = sum(s.tables[g].count(block) for s in self.live)
                assert pool.holders(block) == count
        for s in self.live:  # the blocks that it needs hold its own tokens
            for g, window in enumerate(self.manager.windows):
                first = 0 if window is None else max(0, s.computed - window + 1)
                for i in range(first // Z, -(-s.computed // Z)):
                    known = self.contents[g, s.tables[g][i]]
                    end = min((i + 1) * Z, s.computed)
                    assert known[:end] == tuple(s.tokens[:end])

    def teardown(self) -> None:
        for s in getattr(self, "live", []):
            self.manager.release(s)
        if hasattr(self, "manager"):
            assert self.manager.used() == 0


TestRandomOperations = RandomOperations.TestCase
TestRandomOperations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
