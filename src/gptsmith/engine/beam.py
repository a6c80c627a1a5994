"""Beam search: keep the k most probable texts, extend each by every token, and keep the k most probable again.

Scores and ends texts as transformers does: a text's score is its log-probability divided by its length to the power of
`length_penalty`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptsmith.engine.lifecycle import Lifecycle
from gptsmith.engine.sampler import NO_TOKEN_ALLOWED, adjust
from gptsmith.engine.sequence import FinishReason, Request, Sequence, TokenLogprob
from gptsmith.errors import UsageError


@dataclass(frozen=True)
class BeamStep:
    """A beam and a token to extend it by. total: the log-probability of the extended text."""

    parent: Sequence
    token: TokenLogprob
    total: float


@dataclass
class FinishedBeams:
    """The `width` best texts that have ended, as (score, order of ending, text)."""

    width: int
    length_penalty: float
    early_stopping: bool
    best: list[tuple[float, int, Sequence]] = field(default_factory=list)
    seen: int = 0

    def score(self, total: float, length: int) -> float:
        return float(total / max(1, length) ** self.length_penalty)

    def add(self, step: BeamStep, reason: FinishReason) -> None:
        """Add a text that ends with a step. It is a copy: other steps extend the parent."""
        text = step.parent.fork(self.seen, step.parent.request.seed)
        text.push(step.token.id, step.token)
        text.finish_reason = reason
        self.best.append((self.score(step.total, len(text.generated)), -self.seen, text))
        self.seen += 1
        self.best.sort(key=lambda each: each[:2], reverse=True)
        del self.best[self.width :]

    def is_complete(self, best_live: float, length: int) -> bool:
        """Return whether no live beam can become one of the best.

        best_live: their highest log-probability, at `length`. As in transformers, this compares with what the best live
        beam would score at its present length. That is exact where extending a text lowers its score.
        """
        if len(self.best) < self.width:
            return False
        return self.early_stopping or self.best[-1][0] >= self.score(best_live, length)


def extend_beams(beams: list[Sequence], finished: FinishedBeams) -> list[BeamStep]:
    """Return the best steps that continue a text, at most `width`, best first. Steps that end a text and rank among the
    first `width` are added to `finished`."""
    candidates = sorted(
        (
            BeamStep(beam, logprob, total)
            for beam in beams
            for total, _, logprob in beam.candidates or ()
            if total > -math.inf  # forbidden tokens have -inf
        ),
        key=lambda step: -step.total,
    )
    live: list[BeamStep] = []
    for rank, step in enumerate(candidates):
        if step.parent.sampler.would_stop(step.token.id):
            if rank < finished.width:
                finished.add(step, "stop")
        elif len(live) < finished.width:
            live.append(step)
        if len(live) == finished.width and rank + 1 >= finished.width:
            break
    return live


class BeamSearch:
    """Advances the beams of all requests that search."""

    def __init__(self, lifecycle: Lifecycle, *, vocab_size: int) -> None:
        self._lifecycle, self._vocab_size = lifecycle, vocab_size
        self._finished: dict[Request, FinishedBeams] = {}

    def advance(self, request: Request, ready: list[tuple[Sequence, Tensor]]) -> None:
        """Take the logits (1, V) of some of a request's beams. Beams whose siblings have none yet are held; once all
        beams of the request have candidates, they are extended."""
        scheduler, params = self._lifecycle.scheduler, request.params
        # As in transformers, log-probabilities are adjusted rather than logits: nothing is drawn, so they need not
        # sum to 1.
        logprobs = torch.cat([logits for _, logits in ready]).log_softmax(dim=-1)
        logprobs = adjust(logprobs, [sequence.sampler for sequence, _ in ready])
        width = min(params.beams * (1 + max(1, len(params.stop_ids))), self._vocab_size)
        for (sequence, _), row in zip(ready, logprobs, strict=True):
            best, ids = row.topk(width)
            top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
            sequence.candidates = [
                (sequence.cumulative_logprob + value, id, TokenLogprob(id, value, top[: params.logprobs or 0]))
                for id, value in top
            ]
            scheduler.blocks.commit(sequence)
            scheduler.hold_beam(sequence)
        if all(sequence.candidates is not None for sequence in request.live):
            self._extend(request)

    def discard(self, request: Request) -> None:
        """Drop what is known of a request that has ended."""
        self._finished.pop(request, None)

    def _extend(self, request: Request) -> None:
        params = request.params
        finished = self._finished.get(request)
        if finished is None:
            finished = FinishedBeams(params.beams, params.length_penalty, params.early_stopping)
            self._finished[request] = finished
        steps = extend_beams(request.live, finished)
        if not steps and not finished.best:
            raise UsageError(NO_TOKEN_ALLOWED)
        self._lifecycle.generated_tokens += len(steps)
        length = len(request.live[0].generated) + 1
        reason = self._limit_reached(request, length)
        if reason is not None:
            for step in steps:
                finished.add(step, reason)
        if reason is not None or not steps or finished.is_complete(steps[0].total, length):
            self._end(request, finished)
        else:
            self._continue(request, steps)

    def _limit_reached(self, request: Request, length: int) -> FinishReason | None:
        if length >= request.params.max_tokens:
            return "length"
        if request.live[0].length >= self._lifecycle.context and request.params.overflow != "shift":
            return "context"
        return None

    def _continue(self, request: Request, steps: list[BeamStep]) -> None:
        """Make the steps the request's live beams: the first step of a beam extends it, further ones extend forks."""
        scheduler = self._lifecycle.scheduler
        steps_of: dict[Sequence, list[BeamStep]] = {}
        for step in steps:
            steps_of.setdefault(step.parent, []).append(step)
        used = {beam.index for beam in request.live}
        free = iter(i for i in range(2 * request.params.beams) if i not in used)
        for beam in list(request.live):
            if beam not in steps_of:
                request.live.remove(beam)
                scheduler.remove(beam)
        for parent, (first, *others) in steps_of.items():
            parent.candidates = None
            for step in others:
                child = parent.fork(next(free), request.seed)
                child.push(step.token.id, step.token)
                self._lifecycle.admit_fork(parent, child)
            parent.push(first.token.id, first.token)
            scheduler.resume_beam(parent)
        for beam in request.live:
            self._lifecycle.shift_if_full(beam)

    def _end(self, request: Request, finished: FinishedBeams) -> None:
        completed = []
        for index, (_, _, text) in enumerate(finished.best[: request.params.n]):
            text.index = index
            completed.append(text)
        for beam in list(request.live):
            self._lifecycle.scheduler.remove(beam)
        request.live, request.finished = [], completed
