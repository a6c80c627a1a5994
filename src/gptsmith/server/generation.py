"""One API request on its way through the engine: its prompts, their samples, the text that comes of them.

    work = Work(served, [Job(ids, writing), ...], deadline)
    async for pieces in work.pieces(): ...        # [(choice, TextChunk), ...], all that is new

A choice's number is its prompt's times n plus its sample's.

What comes while the reader is busy waits, and is handed over together. `close` takes the work off the engine; so does
its end, an error or the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from gptsmith.engine.sequence import Event, Result
from gptsmith.engine.text import Detokenizer, TextChunk
from gptsmith.errors import GptsmithError
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.models import Served


@dataclass
class Job:
    """A prompt and how its continuations become text. result: once it is finished."""

    ids: Sequence[int]
    writing: Detokenizer
    result: Result | None = None


@dataclass
class Timing:
    """When tokens came, on the clock of `time.perf_counter`."""

    began: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between one sample's tokens, since the last time somebody took them away."""


class Work:
    """deadline: when it is given up (on the event loop's clock), with a 504. on_end: called once, when the engine is
    done with it, whatever its readers still have before them."""

    def __init__(
        self,
        served: Served,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        began: float | None = None,
        on_end: Callable[[Work], None] | None = None,
    ) -> None:
        self.served, self.jobs, self._on_end = served, jobs, on_end
        self.samples = jobs[0].writing.params.n
        self.timing = Timing(time.perf_counter() if began is None else began)
        self.tokens_seen = 0
        """Tokens made that have come here, of finished and unfinished prompts."""
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[tuple[int, Event | Exception]] = deque()
        self._arrived, self._announced = asyncio.Event(), False
        self._unfinished, self._ended = len(jobs), False
        self._last: dict[int, float] = {}
        self._held: list[tuple[int, TextChunk]] | None = None
        self._alarm = None if deadline is None else self._loop.call_at(deadline, self._expire)
        self._tickets = [
            served.engine.submit(job.ids, job.writing.engine_params, self._deliver(i)) for i, job in enumerate(jobs)
        ]

    def _deliver(self, job: int) -> Callable[[Event | Exception], None]:
        def deliver(item: Event | Exception) -> None:  # in the engine's thread
            self._inbox.append((job, item))
            if isinstance(item, Exception) or item.result is not None:
                self._loop.call_soon_threadsafe(self._finished)
            if not self._announced:
                self._announced = True
                self._loop.call_soon_threadsafe(self._arrived.set)

        return deliver

    def _expire(self) -> None:
        self._inbox.append((0, ApiError(504, "the request took longer than this server allows.", code="timeout")))
        self._arrived.set()
        self._end()

    def _finished(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._alarm is not None:
            self._alarm.cancel()
        for ticket in self._tickets:
            ticket.cancel()
        if self._on_end is not None:
            self._on_end(self)

    def close(self) -> None:
        """Take it off the engine, if it is not finished."""
        self._end()

    async def begin(self) -> Work:
        """Wait for the first text. Raises ApiError for what went wrong until then; later errors come from `pieces`."""
        self._held = await self._next()
        return self

    async def pieces(self) -> AsyncIterator[list[tuple[int, TextChunk]]]:
        """All that is new, again and again until the end. Raises ApiError."""
        try:
            if self._held is not None:
                held, self._held = self._held, None
                yield held
            while any(job.result is None for job in self.jobs):
                pieces = await self._next()
                if pieces:
                    yield pieces
        finally:
            self.close()

    async def _next(self) -> list[tuple[int, TextChunk]]:
        pieces: list[tuple[int, TextChunk]] = []
        while not pieces and any(job.result is None for job in self.jobs):
            await self._arrived.wait()
            self._arrived.clear()
            self._announced = False
            now = time.perf_counter()
            while self._inbox:
                number, item = self._inbox.popleft()
                if isinstance(item, Exception):
                    raise self._failure(item, number)
                job = self.jobs[number]
                choice = number * self.samples + item.index
                self._time(choice, len(item.ids), now)
                piece, stop = job.writing.push(item)
                if stop:
                    self.served.engine.stop(item.request, item.index)
                if item.result is not None:
                    job.result = item.result
                    if item.result.error is not None:
                        raise self._failure(item.result.error, number)
                    if any(c.finish_reason == "cancelled" for c in item.result.completions):
                        raise ApiError(503, "the server is shutting down.", retry_after=5)
                if piece is not None:
                    pieces.append((choice, piece))
        return pieces

    def _failure(self, error: Exception, number: int) -> Exception:
        self.close()
        constrained = self.jobs[number].writing.params.constraint is not None
        return from_engine(error, constrained=constrained) if isinstance(error, GptsmithError) else error

    def _time(self, choice: int, count: int, now: float) -> None:
        self.tokens_seen += count
        if count == 0:
            return
        if self.timing.first is None:
            self.timing.first = now
        last = self._last.get(choice)
        if last is not None:
            self.timing.gaps += [(now - last) / count] * count
        self._last[choice] = now

    # what it came to, once it is finished

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.ids if job.result is None else job.result.prompt_ids) for job in self.jobs)

    @property
    def cached_tokens(self) -> int:
        return sum(job.result.cached_tokens for job in self.jobs if job.result is not None)

    @property
    def completion_tokens(self) -> int:
        """Generated tokens of all finished prompts."""
        total = 0
        for job in self.jobs:
            if job.result is not None:
                echoed = len(job.result.prompt_ids) if job.writing.engine_params.echo else 0
                total += sum(len(c.ids) - echoed for c in job.result.completions)
        return total
