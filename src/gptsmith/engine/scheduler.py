"""Who computes what in the next pass.

Requests are admitted in the order of their arrival, and none overtakes: the head of the queue waits until its tokens
fit. In a pass every decoding sequence computes its one token (and drafts); the rest of the budget goes to prompts, in
chunks: a quarter of it to the oldest, which so comes to its end whatever arrives, and the rest to the shortest first,
so that a short prompt does not wait for a long one. When blocks run out, the youngest sequence gives up its own and
computes its tokens again later (what it had is often still known by then); the oldest never has to. So the oldest
request always advances, and every request becomes the oldest.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from gptsmith.engine.block_manager import BlockManager
from gptsmith.engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """A sequence and how many of its tokens (its drafts last) the pass computes."""

    sequence: Sequence
    count: int


class Scheduler:
    """max_batch: most sequences of one pass. max_batch_tokens: most tokens of one pass (more than max_batch)."""

    def __init__(self, blocks: BlockManager, *, max_batch: int, max_batch_tokens: int) -> None:
        self.blocks, self.max_batch, self.max_batch_tokens = blocks, max_batch, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.waiting_for_beams: list[Sequence] = []
        """Beams that wait for their siblings; they compute nothing, but may hold blocks."""
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, at its place in the order of arrival."""
        if self.waiting and sequence.order < self.waiting[-1].order:
            self.waiting = deque(sorted([*self.waiting, sequence], key=lambda s: s.order))
        else:
            self.waiting.append(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Run a sequence that holds blocks at once, if there is a place; else it gives them up and is queued."""
        if len(self.running) < self.max_batch:
            insort(self.running, sequence, key=lambda s: s.order)
        else:
            self.blocks.release(sequence)
            self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks are free."""
        for place in (self.running, self.waiting_for_beams, self.waiting):
            if sequence in place:
                place.remove(sequence)
        self.blocks.release(sequence)

    def hold_beam(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting_for_beams.append(sequence)

    def resume_beam(self, sequence: Sequence) -> None:
        """Back to work, or to the queue if its blocks were taken away meanwhile."""
        if sequence in self.waiting_for_beams:
            self.waiting_for_beams.remove(sequence)
            self.admit(sequence)
        else:
            self.add(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next pass; at least one token, if there is any sequence that is not waiting_for_beams."""
        chosen: dict[Sequence, int] = {}
        budget = self.max_batch_tokens
        decoding = [s for s in self.running if s.remaining == 1]
        crowded = len(self.waiting) > 0 or len(decoding) < len(self.running)  # prompts have a use for the budget
        for i, sequence in enumerate(decoding):
            if sequence not in self.running:  # given up for an older one
                continue
            if crowded or len(decoding) - i + len(sequence.drafts) > budget:
                sequence.drafts = []
            count = 1 + len(sequence.drafts)
            if self._make_room(sequence, count, chosen):
                chosen[sequence] = count
                budget -= count
        if budget > 0:
            self._admit_waiting()
        prompts = [s for s in self.running if s not in chosen]
        shares = dict.fromkeys(prompts, 0)
        if prompts:
            oldest, *others = prompts
            shares[oldest] = min(oldest.remaining, budget if not others else max(1, budget // 4))
            budget -= shares[oldest]
            for sequence in [*sorted(others, key=lambda s: s.remaining), oldest]:
                if sequence is oldest and any(shares[s] == s.remaining for s in others):
                    break  # a prompt ends in this pass: its first token does not wait for the oldest to fill it up
                more = min(sequence.remaining - shares[sequence], budget)
                shares[sequence] += more
                budget -= more
        for sequence, count in shares.items():
            if count and sequence in self.running and self._make_room(sequence, count, chosen):
                chosen[sequence] = count
        return [Scheduled(sequence, count) for sequence, count in chosen.items()]

    def _admit_waiting(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            head = self.waiting[0]
            if self.running and not self._fits(head):
                break
            self.waiting.popleft()
            self.blocks.match(head)
            insort(self.running, head, key=lambda s: s.order)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all its tokens, besides what those that run still need for theirs."""
        promised = [0] * len(self.blocks.pools)
        for other in [*self.running, sequence]:
            promised = [a + b for a, b in zip(promised, self.blocks.missing(other), strict=True)]
        return all(n <= pool.available for n, pool in zip(promised, self.blocks.pools, strict=True))

    def _make_room(self, sequence: Sequence, count: int, chosen: dict[Sequence, int]) -> bool:
        """Blocks for `count` more tokens, if need be from younger sequences; False if the sequence had to give way."""
        while not self.blocks.extend(sequence, count):
            idle = [s for s in self.waiting_for_beams if s.computed]
            younger = [s for s in [*self.running, *idle] if s.order > sequence.order]
            victim = max(younger or idle or [sequence], key=lambda s: s.order)
            chosen.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        sequence.drafts = []
        self.blocks.release(sequence)
        if sequence in self.waiting_for_beams:
            self.waiting_for_beams.remove(sequence)  # it comes back through `resume_beam`
        else:
            self.running.remove(sequence)
            self.add(sequence)
