"""Beam search: keep the k most probable texts, extend_beams each by every token, keep the k most probable again.

Compares and ends as transformers does: finished texts by log-probability over length to the power of `length_penalty`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gptsmith.engine.sequence import FinishReason, Sequence, TokenLogprob


@dataclass(frozen=True)
class Step:
    """A beam and the token to extend_beams it by; total: the log-probability then."""

    parent: Sequence
    token: TokenLogprob
    total: float


@dataclass
class Finished:
    """The texts that ended, as (score, order of ending, ...); the `width` best are kept."""

    width: int
    length_penalty: float
    early_stopping: bool
    best: list[tuple[float, int, Step, FinishReason]] = field(default_factory=list)
    seen: int = 0

    def score(self, total: float, length: int) -> float:
        return float(total / max(1, length) ** self.length_penalty)

    def add(self, step: Step, reason: FinishReason) -> None:
        length = len(step.parent.generated) + 1
        self.best.append((self.score(step.total, length), -self.seen, step, reason))
        self.seen += 1
        self.best.sort(key=lambda each: each[:2], reverse=True)
        del self.best[self.width :]

    def complete(self, best_live: float, length: int) -> bool:
        """Whether no live beam can come among the best. best_live: the highest log-probability of those of `length`.

        The estimate of transformers: what the best would score at its present length; exact where lengthening a text
        lowers its score.
        """
        if len(self.best) < self.width:
            return False
        return self.early_stopping or self.best[-1][0] >= self.score(best_live, length)


def extend_beams(beams: list[Sequence], finished: Finished) -> list[Step]:
    """The beams' candidates, best first: those that end among the first k are added to `finished`, the k best others
    are returned. Each beam's `candidates` are (total, token id, log-probability of the token)."""
    candidates = sorted(
        (
            Step(beam, logprob, total)
            for beam in beams
            for total, _, logprob in beam.candidates or ()
            if total > -math.inf  # others are forbidden
        ),
        key=lambda step: -step.total,
    )
    live: list[Step] = []
    for rank, step in enumerate(candidates):
        if step.parent.sampler.would_stop(step.token.id):
            if rank < finished.width:
                finished.add(step, "stop")
        elif len(live) < finished.width:
            live.append(step)
        if len(live) == finished.width and rank + 1 >= finished.width:
            break
    return live
