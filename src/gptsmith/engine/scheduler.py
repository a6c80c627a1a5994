"""Decides which sequences compute how many tokens in the next step.

Requests are admitted strictly in the order of their arrival: the head of the queue waits until its tokens fit. In a
step, every decoding sequence computes its one token (and drafts). The rest of the token budget goes to prompts, in
chunks: a quarter to the oldest, so that it finishes whatever arrives, and the rest to the shortest first, so that a
short prompt does not wait for a long one. When blocks run out, the youngest sequence is preempted: it releases its
blocks and computes its tokens again later (often from the prefix cache). The oldest is never preempted. So the oldest
request always advances, and every request becomes the oldest: none starves.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from gptsmith.engine.block_manager import BlockManager
from gptsmith.engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """A sequence and how many of its tokens the step computes, drafts included."""

    sequence: Sequence
    count: int


class Scheduler:
    """Queues and runs sequences.

    max_batch: maximum number of sequences per step. max_batch_tokens: maximum number of tokens, at least max_batch.
    """

    def __init__(self, blocks: BlockManager, *, max_batch: int, max_batch_tokens: int) -> None:
        self.blocks, self.max_batch, self.max_batch_tokens = blocks, max_batch, max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.waiting_for_beams: list[Sequence] = []
        """Beams that have candidates and wait for the other beams of their request. They can hold blocks."""
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, in the order of arrival."""
        if self.waiting and sequence.order < self.waiting[-1].order:
            self.waiting = deque(sorted([*self.waiting, sequence], key=lambda s: s.order))
        else:
            self.waiting.append(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Run a sequence that holds blocks, if the batch has room; otherwise release its blocks and queue it."""
        if len(self.running) < self.max_batch:
            insort(self.running, sequence, key=lambda s: s.order)
        else:
            self.blocks.release(sequence)
            self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from wherever it is, and release its blocks."""
        for sequences in (self.running, self.waiting_for_beams, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)
        self.blocks.release(sequence)

    def hold_beam(self, sequence: Sequence) -> None:
        """Let a running beam wait for the other beams of its request."""
        self.running.remove(sequence)
        self.waiting_for_beams.append(sequence)

    def resume_beam(self, sequence: Sequence) -> None:
        """Run a beam that waited, or queue it if it was preempted meanwhile."""
        if sequence in self.waiting_for_beams:
            self.waiting_for_beams.remove(sequence)
            self.admit(sequence)
        else:
            self.add(sequence)

    def schedule(self) -> list[Scheduled]:
        """Return what the next step computes: at least one token, unless all sequences wait for other beams."""
        chosen: dict[Sequence, int] = {}
        budget = self.max_batch_tokens
        decoding = [s for s in self.running if s.remaining == 1]
        crowded = len(self.waiting) > 0 or len(decoding) < len(self.running)  # prompts can use the budget
        preempted = self.preemptions
        for i, sequence in enumerate(decoding):
            if self.preemptions > preempted and sequence not in self.running:  # preempted for an older one
                continue
            count = 1
            if sequence.drafts:
                if crowded or len(decoding) - i + len(sequence.drafts) > budget:
                    sequence.drafts = []
                count += len(sequence.drafts)
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
                    break  # a prompt ends in this step: its first token does not wait for the oldest to fill it up
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
        """Return whether enough blocks are available for all its tokens and those of the running sequences."""
        promised = [0] * len(self.blocks.pools)
        for other in [*self.running, sequence]:
            promised = [a + b for a, b in zip(promised, self.blocks.missing(other), strict=True)]
        return all(n <= pool.available for n, pool in zip(promised, self.blocks.pools, strict=True))

    def _make_room(self, sequence: Sequence, count: int, chosen: dict[Sequence, int]) -> bool:
        """Take the blocks for `count` more tokens, preempting younger sequences if needed. Return False if the sequence
        itself was preempted."""
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
            self.waiting_for_beams.remove(sequence)  # `resume_beam` brings it back
        else:
            self.running.remove(sequence)
            self.add(sequence)
