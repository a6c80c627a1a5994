"""One API request in the engine: its prompts, their samples, and the text they produce.

    generation = Generation(served, [Job(ids, detokenizer), ...], deadline=deadline)
    async for chunks in generation.chunks(): ...        # [(choice index, chunk), ...]: everything since the last time

The choice index is the index of the prompt times n, plus the index of the sample.

Events that arrive while the consumer is busy are queued and delivered together. The engine stops working on the
request when it finishes, fails, passes its deadline or is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from gptsmith.engine.prompt import Prompt
from gptsmith.engine.sequence import Event, Result
from gptsmith.engine.text import Detokenizer, TextChunk
from gptsmith.errors import GptsmithError
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.models import ServedModel


@dataclass
class Job:
    """A prompt, and the detokenizer of its continuations. result: set once it has finished."""

    prompt: Sequence[int] | Prompt
    detokenizer: Detokenizer
    result: Result | None = None


@dataclass
class Timing:
    """When tokens arrived, in the time of `time.perf_counter`."""

    started_at: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between consecutive tokens of a sample."""


class Generation:
    """Submit jobs to the engine of a model.

    deadline: when to stop with a 504, in the event loop's time. started_at: when the request arrived, in the time of
    `time.perf_counter`. on_end: called once, when the engine is done, even if the consumer has not read everything.
    """

    def __init__(
        self,
        served: ServedModel,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        started_at: float | None = None,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        self.served, self.jobs, self._on_end = served, jobs, on_end
        self.samples = jobs[0].detokenizer.params.n
        self.timing = Timing(time.perf_counter() if started_at is None else started_at)
        self.tokens_seen = 0
        """Generated tokens received so far, including those of unfinished prompts."""
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[tuple[int, Event | Exception]] = deque()
        self._wakeup, self._wakeup_pending = asyncio.Event(), False
        self._unfinished, self._ended = len(jobs), False
        self._started: set[int] = set()  # choice indices
        self._last: dict[int, float] = {}  # choice index -> when its last token arrived
        self._first_chunks: list[tuple[int, TextChunk]] | None = None
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._expire)
        self._handles = [
            served.engine.submit(job.prompt, job.detokenizer.engine_params, self._callback(i))
            for i, job in enumerate(jobs)
        ]

    def _callback(self, job: int) -> Callable[[Event | Exception], None]:
        def receive(item: Event | Exception) -> None:  # runs in the engine's thread
            self._inbox.append((job, item))
            if isinstance(item, Exception) or item.result is not None:
                self._loop.call_soon_threadsafe(self._job_finished)
            if not self._wakeup_pending:
                self._wakeup_pending = True
                self._loop.call_soon_threadsafe(self._wakeup.set)

        return receive

    def _expire(self) -> None:
        self._inbox.append((0, ApiError(504, "The request timed out.", code="timeout")))
        self._wakeup.set()
        self._end()

    def _job_finished(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._handles:
            handle.cancel()
        if self._on_end is not None:
            self._on_end(self)

    def close(self) -> None:
        """Cancel what the engine has not finished."""
        self._end()

    async def start(self) -> Generation:
        """Wait for the first chunk. Raise ApiError if generation fails before it; `chunks` raises later errors."""
        self._first_chunks = await self._next()
        return self

    async def chunks(self) -> AsyncIterator[list[tuple[int, TextChunk]]]:
        """Yield lists of (choice index, chunk) until every prompt has finished. Raise ApiError."""
        try:
            if self._first_chunks is not None:
                first, self._first_chunks = self._first_chunks, None
                yield first
            while any(job.result is None for job in self.jobs):
                chunks = await self._next()
                if chunks:
                    yield chunks
        finally:
            self.close()

    async def _next(self) -> list[tuple[int, TextChunk]]:
        chunks: list[tuple[int, TextChunk]] = []
        while not chunks and any(job.result is None for job in self.jobs):
            await self._wakeup.wait()
            self._wakeup.clear()
            self._wakeup_pending = False
            now = time.perf_counter()
            while self._inbox:
                number, item = self._inbox.popleft()
                if isinstance(item, Exception):
                    raise self._failure(item, number)
                job = self.jobs[number]
                choice = number * self.samples + item.index
                echoed = len(job.prompt) if job.detokenizer.engine_params.echo and choice not in self._started else 0
                self._started.add(choice)
                self._record_times(choice, len(item.ids) - echoed, now)
                chunk, stop = job.detokenizer.push(item)
                if stop:
                    self.served.engine.stop(item.request, item.index)
                if item.result is not None:
                    job.result = item.result
                    if item.result.error is not None:
                        raise self._failure(item.result.error, number)
                    if any(c.finish_reason == "cancelled" for c in item.result.completions):
                        raise ApiError(503, "The server is shutting down.", retry_after=5)
                if chunk is not None:
                    chunks.append((choice, chunk))
        return chunks

    def _failure(self, error: Exception, number: int) -> Exception:
        self.close()
        constrained = self.jobs[number].detokenizer.params.constraint is not None
        return from_engine(error, constrained=constrained) if isinstance(error, GptsmithError) else error

    def _record_times(self, choice: int, count: int, now: float) -> None:
        self.tokens_seen += count
        if count == 0:
            return
        if self.timing.first is None:
            self.timing.first = now
        last = self._last.get(choice)
        if last is not None:
            self.timing.gaps += [(now - last) / count] * count
        self._last[choice] = now

    # usage, complete once every prompt has finished

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.prompt if job.result is None else job.result.prompt_ids) for job in self.jobs)

    @property
    def cached_tokens(self) -> int:
        return sum(job.result.cached_tokens for job in self.jobs if job.result is not None)

    @property
    def completion_tokens(self) -> int:
        """Generated tokens of the prompts that have finished."""
        total = 0
        for job in self.jobs:
            if job.result is not None:
                echoed = len(job.result.prompt_ids) if job.detokenizer.engine_params.echo else 0
                total += sum(len(c.ids) - echoed for c in job.result.completions)
        return total
