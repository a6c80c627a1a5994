"""Whose keys and values lie where: blocks handed out, shared, found again by their contents, and taken back.

A block is in one of three states: held by sequences (it counts them), *kept* (nobody's, but its contents are known by a
hash and can be found again until the room is needed: the longest unused goes first), or empty. Each group of layers
(`PagedCache.windows`) has a pool of its own; in a banded group a sequence lets go of what falls behind its window.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items

from gptsmith.engine.sequence import Sequence

NO_BLOCK = -1  # in a table: of tokens behind the window, let go


class BlockPool:
    """The blocks of one group of layers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._empty = list(range(size))[::-1]  # a stack: the lowest first, so that little memory is ever touched
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * size
        self._hash: list[bytes | None] = [None] * size
        self._by_hash: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        """How many blocks nobody holds, but which can be found again."""
        return len(self._cached)

    def take(self) -> int:
        """A block for one holder, its contents undefined. IndexError if none is available."""
        if self._empty:
            block = self._empty.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self.evict(block)
        else:
            raise IndexError("no block is available")
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held or kept."""
        self._cached.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder fewer."""
        if self._holders[block] <= 0:
            raise ValueError(f"block {block} is nobody's")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if self._hash[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def find(self, key: bytes) -> int | None:
        """The block with these contents."""
        return self._by_hash.get(key)

    def register(self, block: int, key: bytes) -> None:
        """Make a held block, now full, known by its contents (unless another with the same already is)."""
        if self._hash[block] is None and key not in self._by_hash:
            self._hash[block], self._by_hash[key] = key, block

    def holders(self, block: int) -> int:
        return self._holders[block]

    def evict(self, block: int) -> None:
        """A held block's contents are not to be found any more."""
        key = self._hash[block]
        if key is not None:
            del self._by_hash[key]
            self._hash[block] = None

    def evict_all(self) -> None:
        """Nothing computed so far is to be found any more (the weights have changed)."""
        self._empty.extend(reversed(self._cached))
        self._cached.clear()
        self._by_hash.clear()
        self._hash = [None] * self.size


class BlockManager:
    """The block tables of all sequences. `windows` and `sizes`: of each group of layers."""

    def __init__(
        self, windows: Items[int | None], sizes: Items[int], block_size: int, *, prefix_caching: bool = True
    ) -> None:
        self.windows, self.block_size, self.prefix_caching = tuple(windows), block_size, prefix_caching
        self.pools = [BlockPool(size) for size in sizes]
        self.prefix_tokens = self.prefix_hits = 0
        """Tokens looked for among what is known, and found."""

    def used(self) -> int:
        """How many blocks sequences hold, in all groups."""
        return sum(pool.size - pool.available for pool in self.pools)

    def capacity(self) -> int:
        """How many tokens a sequence may have if it has all blocks to itself."""
        full = [pool.size for pool, window in zip(self.pools, self.windows, strict=True) if window is None]
        return min(full) * self.block_size if full else 1 << 62

    def missing(self, sequence: Sequence) -> list[int]:
        """How many more blocks the sequence needs for the tokens it has, per group."""
        return [self._needed(sequence, g) for g in range(len(self.pools))]

    def _needed(self, sequence: Sequence, group: int) -> int:
        total, window = -(-sequence.length // self.block_size), self.windows[group]
        held = len(sequence.tables[group])
        if window is None:
            return max(0, total - held)
        return max(0, min(total - held, -(-window // self.block_size) + 1))

    def match(self, sequence: Sequence) -> None:
        """Give a sequence without blocks the longest run of known ones that its tokens start with.

        Its last token is never among them: it must be computed, for its logits.
        """
        if not self.prefix_caching or sequence.request.reads_prompt:
            return
        Z = self.block_size
        first_time = not sequence.preemptions
        if first_time:
            self.prefix_tokens += sequence.length
        candidates = (sequence.length - 1) // Z
        keys = self._hashes(sequence, candidates)
        found = [[pool.find(key) for key in keys] for pool in self.pools]
        for n in range(candidates, 0, -1):
            firsts = [0 if window is None else max(0, n * Z - window + 1) // Z for window in self.windows]
            if all(None not in blocks[first:n] for blocks, first in zip(found, firsts, strict=True)):
                break
        else:
            return
        for g, (pool, first) in enumerate(zip(self.pools, firsts, strict=True)):
            blocks = [block for block in found[g][first:n] if block is not None]
            for block in blocks:
                pool.share(block)
            sequence.tables[g] = [NO_BLOCK] * first + blocks
        sequence.computed = n * Z
        if first_time:
            self.prefix_hits += n * Z
            sequence.request.cached_tokens += n * Z

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Room for `count` tokens after those that are computed; False, and nothing taken, if there are not enough."""
        total = -(-(sequence.computed + count) // self.block_size)
        missing = [total - len(table) for table in sequence.tables]
        if any(n > pool.available for n, pool in zip(missing, self.pools, strict=True)):
            return False
        for n, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            table.extend(pool.take() for _ in range(n))
        return True

    def commit(self, sequence: Sequence) -> None:
        """After a pass: make full blocks known, let go of those behind the window."""
        if self.prefix_caching:
            full = sequence.computed // self.block_size
            if full > sequence.num_hashed_blocks:
                keys = self._hashes(sequence, full)
                for pool, table in zip(self.pools, sequence.tables, strict=True):
                    for i in range(sequence.num_hashed_blocks, full):
                        if table[i] != NO_BLOCK:
                            pool.register(table[i], keys[i])
                sequence.num_hashed_blocks = full
        for pool, window, table in zip(self.pools, self.windows, sequence.tables, strict=True):
            if window is not None:
                behind = max(0, sequence.computed - window + 1) // self.block_size
                for i in range(behind - 1, -1, -1):
                    if table[i] == NO_BLOCK:
                        break
                    pool.release(table[i])
                    table[i] = NO_BLOCK

    def fork(self, parent: Sequence, child: Sequence) -> list[tuple[int, int, int]]:
        """Give `child`, a copy of `parent` without blocks, the parent's: full ones shared, the last one copied.

        Returns the copies to make: (group, from, to). Where there is no block to copy to, the child computes the tokens
        of the last one anew.
        """
        full, rest = divmod(parent.computed, self.block_size)
        copies = []
        for pool, table, new in zip(self.pools, parent.tables, child.tables, strict=True):
            new[:] = table[:full]
            for block in new:
                if block != NO_BLOCK:
                    pool.share(block)
        child.computed, child.num_hashed_blocks = full * self.block_size, min(parent.num_hashed_blocks, full)
        if rest and all(pool.available for pool in self.pools):
            for g, pool in enumerate(self.pools):
                block = pool.take()
                copies.append((g, parent.tables[g][full], block))
                child.tables[g].append(block)
            child.computed = parent.computed
        elif any(self._gone(child, group) for group in range(len(self.pools))):
            self.release(child)  # what it would go on from lies behind the parent's window already: from the beginning
        return copies

    def _gone(self, sequence: Sequence, group: int) -> bool:
        """Whether blocks that its next token looks back to are no longer there."""
        window = self.windows[group]
        first = 0 if window is None else max(0, sequence.computed - window + 1) // self.block_size
        return NO_BLOCK in sequence.tables[group][first:]

    def release(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back: the last first, so that beginnings are known longest."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for block in reversed(table):
                if block != NO_BLOCK:
                    pool.release(block)
            table.clear()
        sequence.computed = sequence.num_hashed_blocks = 0

    def evict(self, sequence: Sequence) -> list[tuple[int, list[int]]]:
        """Let nobody find what a sequence computed (it is no number); the blocks to clear, by group."""
        own = []
        for g, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            blocks = [block for block in table if block != NO_BLOCK and pool.holders(block) == 1]
            for block in blocks:
                pool.evict(block)
            own.append((g, blocks))
        return own

    def _hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Hashes of the sequence's first `count` blocks: of their tokens, all those before, and the adapter's name."""
        keys, Z = sequence.block_hashes, self.block_size
        while len(keys) < count:
            previous = keys[-1] if keys else sequence.salt
            begin = sequence.start + len(keys) * Z
            tokens = array("q", sequence.tokens[begin : begin + Z])
            keys.append(hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest())
        return keys[:count]
