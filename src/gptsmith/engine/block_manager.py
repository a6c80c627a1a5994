"""Manages the blocks of the key/value cache: which sequence holds which, and which can be shared.

A block is in one of three states: held by one or more sequences (it counts them), cached (held by none, but registered
under the hash of its contents, so that it can be shared until its room is needed; the least recently used is evicted
first), or empty. Each group of layers (`PagedCache.windows`) has its own pool. In a group with a sliding window, a
sequence releases the blocks that fall behind its window.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items

from gptsmith.engine.prompt import overlapping
from gptsmith.engine.sequence import Sequence

NO_BLOCK = -1  # table entry of a block that fell behind the window and was released


class BlockPool:
    """The blocks of one group of layers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._empty = list(range(size))[::-1]  # a stack, lowest first, so that memory is touched only as needed
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * size
        self._hashes: list[bytes | None] = [None] * size
        self._by_hash: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """The number of blocks that can be taken."""
        return len(self._empty) + len(self._cached)

    def take(self) -> int:
        """Return a block for one holder, with undefined contents. Raise IndexError if none is available."""
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
        """Add a holder to a block that is held or cached."""
        self._cached.pop(block, None)
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """Remove a holder. Raise ValueError if the block has none."""
        if self._holders[block] <= 0:
            raise ValueError(f"block {block} is not held")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if self._hashes[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def find(self, hash: bytes) -> int | None:
        """Return the block whose contents have this hash, or None."""
        return self._by_hash.get(hash)

    def register(self, block: int, hash: bytes) -> None:
        """Register a held block that is full, unless another with the same contents is registered."""
        if self._hashes[block] is None and hash not in self._by_hash:
            self._hashes[block], self._by_hash[hash] = hash, block

    def holders(self, block: int) -> int:
        """Return how many sequences hold the block."""
        return self._holders[block]

    def evict(self, block: int) -> None:
        """Unregister a block: its contents can no longer be found."""
        hash = self._hashes[block]
        if hash is not None:
            del self._by_hash[hash]
            self._hashes[block] = None

    def evict_all(self) -> None:
        """Unregister all blocks; cached ones become empty."""
        self._empty.extend(reversed(self._cached))
        self._cached.clear()
        self._by_hash.clear()
        self._hashes = [None] * self.size


class BlockManager:
    """Manages the block tables of all sequences. windows, sizes: the sliding window and pool size of each group."""

    def __init__(
        self, windows: Items[int | None], sizes: Items[int], block_size: int, *, prefix_caching: bool = True
    ) -> None:
        self.windows, self.block_size, self.prefix_caching = tuple(windows), block_size, prefix_caching
        self.pools = [BlockPool(size) for size in sizes]
        self.prefix_tokens = self.prefix_hits = 0
        """Tokens that were looked up in the prefix cache, and how many were found."""

    def used(self) -> int:
        """Return how many blocks sequences hold, in all groups."""
        return sum(pool.size - pool.available for pool in self.pools)

    def capacity(self) -> int:
        """Return how many tokens one sequence can have if it holds all blocks."""
        full = [pool.size for pool, window in zip(self.pools, self.windows, strict=True) if window is None]
        return min(full) * self.block_size if full else 1 << 62

    def missing(self, sequence: Sequence) -> list[int]:
        """Return how many more blocks the sequence needs for its tokens, for each group."""
        return [self._needed(sequence, g) for g in range(len(self.pools))]

    def _needed(self, sequence: Sequence, group: int) -> int:
        total, window = -(-sequence.length // self.block_size), self.windows[group]
        held = len(sequence.tables[group])
        if window is None:
            return max(0, total - held)
        return max(0, min(total - held, -(-window // self.block_size) + 1))

    def match(self, sequence: Sequence) -> None:
        """Give a sequence without blocks the registered blocks of its longest known prefix.

        The last token is never part of it: it must be computed for its logits.
        """
        if not self.prefix_caching or sequence.request.reads_prompt:
            return
        Z = self.block_size
        first_time = not sequence.preemptions
        if first_time:
            self.prefix_tokens += sequence.length
        candidates = (sequence.length - 1) // Z
        hashes = self._prefix_hashes(sequence, candidates)
        found = [[pool.find(hash) for hash in hashes] for pool in self.pools]
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
        """Take the blocks for `count` tokens after those that are computed. Return False, and take none, if too few are
        available."""
        total = -(-(sequence.computed + count) // self.block_size)
        if all(len(table) >= total for table in sequence.tables):
            return True
        missing = [total - len(table) for table in sequence.tables]
        if any(n > pool.available for n, pool in zip(missing, self.pools, strict=True)):
            return False
        for n, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            table.extend(pool.take() for _ in range(n))
        return True

    def commit(self, sequence: Sequence) -> None:
        """After a step: register full blocks and release those behind the window."""
        if self.prefix_caching:
            full = sequence.computed // self.block_size
            if full > sequence.num_hashed_blocks:
                hashes = self._prefix_hashes(sequence, full)
                for pool, table in zip(self.pools, sequence.tables, strict=True):
                    for i in range(sequence.num_hashed_blocks, full):
                        if table[i] != NO_BLOCK:
                            pool.register(table[i], hashes[i])
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
        """Give `child`, a copy of `parent` without blocks, the parent's blocks: full ones shared, the last one copied.

        Return the copies to make: (group, source, target). If no block is available for the copy, the child computes
        the tokens of the last block again.
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
        elif any(self._lacks_window(child, group) for group in range(len(self.pools))):
            self.release(child)  # the parent has released blocks that the child's next token needs: start over
        return copies

    def _lacks_window(self, sequence: Sequence, group: int) -> bool:
        """Return whether blocks within the window of the sequence's next token have been released."""
        window = self.windows[group]
        first = 0 if window is None else max(0, sequence.computed - window + 1) // self.block_size
        return NO_BLOCK in sequence.tables[group][first:]

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence, the last first, so that beginnings stay cached longest."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for block in reversed(table):
                if block != NO_BLOCK:
                    pool.release(block)
            table.clear()
        sequence.computed = sequence.num_hashed_blocks = 0

    def evict_all(self) -> None:
        """Unregister all blocks."""
        for pool in self.pools:
            pool.evict_all()

    def evict(self, sequence: Sequence) -> list[tuple[int, list[int]]]:
        """Unregister the blocks that only this sequence holds; return them as (group, blocks)."""
        own = []
        for g, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            blocks = [block for block in table if block != NO_BLOCK and pool.holders(block) == 1]
            for block in blocks:
                pool.evict(block)
            own.append((g, blocks))
        return own

    def _prefix_hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Return the hashes of the first `count` blocks: of their tokens and pictures, of all before, and of the
        adapter (salt). All pictures have the same tokens, so the key and the place of a picture are hashed, too."""
        hashes, Z = sequence.block_hashes, self.block_size
        while len(hashes) < count:
            previous = hashes[-1] if hashes else sequence.salt
            begin = sequence.start + len(hashes) * Z
            digest = hashlib.blake2b(previous, digest_size=16)
            digest.update(array("q", sequence.tokens[begin : begin + Z]).tobytes())
            for image, _, _ in overlapping(sequence.request.images, begin, begin + Z):
                digest.update(image.key + array("q", [image.start - begin, image.tokens]).tobytes())
            hashes.append(digest.digest())
        return hashes[:count]
