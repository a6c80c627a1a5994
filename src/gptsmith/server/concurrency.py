"""A limit on how many requests are processed at once and how many may wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from gptsmith.server.errors import ApiError


class ConcurrencyLimiter:
    """Allow `limit` requests at once and `queue_limit` more in a first-in, first-out queue."""

    def __init__(self, limit: int, queue_limit: int) -> None:
        self.limit, self.queue_limit = limit, queue_limit
        self.in_use = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 1.0
        """How long requests hold a slot: an exponential moving average, in seconds."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def acquire(self, deadline: float | None = None) -> Slot:
        """Wait for a slot. deadline: in the event loop's time.

        Raise ApiError: 429 if the queue is full, 504 if the deadline passes first.
        """
        if self.in_use < self.limit and not self._queue:
            self.in_use += 1
            return Slot(self)
        if len(self._queue) >= self.queue_limit:
            raise ApiError(
                429,
                f"The server is busy: {self.in_use} requests are running and {len(self._queue)} are waiting. "
                "Try again later.",
                code="queue_full",
                retry_after=min(60.0, self._mean_seconds * (len(self._queue) + 1) / self.limit),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the slot was granted just as the request was canceled
                self._release()
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise ApiError(504, "The request timed out while waiting in the queue.", code="timeout") from None
            raise
        return Slot(self)

    def _release(self) -> None:
        self.in_use -= 1
        while self._queue and self.in_use < self.limit:
            turn = self._queue.popleft()
            if not turn.done():
                self.in_use += 1
                turn.set_result(None)


class Slot:
    """The right to run one request. `release` may be called more than once."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self._limiter: ConcurrencyLimiter | None = limiter
        self._acquired_at = time.monotonic()

    def release(self) -> None:
        if self._limiter is not None:
            limiter, self._limiter = self._limiter, None
            limiter._mean_seconds += 0.1 * (time.monotonic() - self._acquired_at - limiter._mean_seconds)
            limiter._release()
