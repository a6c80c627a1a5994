"""How sequences fork, shift, end and fail: the changes that concern scheduler, block tables and cache together."""

from __future__ import annotations

import torch

from gptsmith.engine.scheduler import Scheduler
from gptsmith.engine.sequence import FinishReason, Request, Sequence, TokenLogprob
from gptsmith.errors import GptsmithError
from gptsmith.model.cache import PagedCache


class Lifecycle:
    """shifted_length: how many tokens stay when a context of `context` tokens is full and shifts."""

    def __init__(self, scheduler: Scheduler, cache: PagedCache, *, context: int, shifted_length: int) -> None:
        self.scheduler, self.blocks, self.cache = scheduler, scheduler.blocks, cache
        self.context, self.shifted_length = context, shifted_length
        self.generated_tokens = 0
        self.failed: list[Request] = []
        """Requests that failed and that the engine has not reported yet."""

    def append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token that was chosen."""
        sequence.push(token, logprob)
        self.generated_tokens += 1

    def admit_fork(self, parent: Sequence, child: Sequence) -> None:
        """Run a fork of a sequence, which shares the parent's blocks."""
        parent.request.live.append(
            child
        )  # first, so that the child's blocks are freed with the request if a copy fails
        for group, source, target in self.blocks.fork(parent, child):
            self.cache.copy(group, source, target)
        self.scheduler.admit(child)

    def shift_if_full(self, sequence: Sequence) -> None:
        """If the sequence is longer than the context, forget its oldest tokens and have the others computed again."""
        if sequence.length > self.context:
            self.blocks.release(sequence)
            sequence.shift(self.shifted_length)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and free its blocks."""
        sequence.finish_reason = reason
        request = sequence.request
        request.live.remove(sequence)
        request.finished.append(sequence)
        self.scheduler.remove(sequence)

    def end(self, request: Request, reason: FinishReason) -> None:
        """End all live sequences of a request."""
        for sequence in list(request.live):
            self.finish(sequence, reason)

    def fail(self, request: Request, failure: Exception) -> None:
        """End a request with an error, unless it has failed before."""
        if request.error is None:
            request.error = as_error(failure)
            self.end(request, "error")
            self.failed.append(request)

    def fail_non_finite(self, sequence: Sequence) -> None:
        """Fail a request whose logits are NaN or infinite. What was computed for it is erased, so that no other
        sequence reads it."""
        for group, blocks in self.blocks.evict(sequence):
            self.cache.clear(group, blocks)
        message = "the model's logits are NaN or infinite: its weights are damaged, or training diverged."
        self.fail(sequence.request, GptsmithError(message))


def as_error(failure: Exception) -> GptsmithError:
    """Return the error to report for a failure, whoever raised it."""
    if isinstance(failure, GptsmithError):
        return failure
    if isinstance(failure, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(failure):
        error = GptsmithError("out of memory: give the engine fewer tokens per step, or a smaller cache.")
    else:
        error = GptsmithError(f"generation failed: {type(failure).__name__}: {failure}.")
    error.__cause__ = failure
    return error
