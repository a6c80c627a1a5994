"""How many requests are worked on at a time, and how many may wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from gptsmith.server.errors import ApiError


class Gate:
    """At most `limit` inside, at most `queue_limit` waiting; first come, first served."""

    def __init__(self, limit: int, queue_limit: int) -> None:
        self.limit, self.queue_limit = limit, queue_limit
        self.inside = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._stay = 1.0
        """Seconds that requests have lately been inside, on average."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, deadline: float | None = None) -> Pass:
        """Wait for a place. Raises ApiError: 429 if too many wait already, 504 at the deadline (the loop's clock)."""
        if self.inside < self.limit and not self._queue:
            self.inside += 1
            return Pass(self)
        if len(self._queue) >= self.queue_limit:
            raise ApiError(
                429,
                f"{self.limit} requests are being served and {len(self._queue)} wait; come again later.",
                code="queue_full",
                retry_after=min(60.0, self._stay * (len(self._queue) + 1) / self.limit),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came in the very moment in which it gave up
                self._leave()
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise ApiError(504, "the request waited longer than this server allows.", code="timeout") from None
            raise
        return Pass(self)

    def _leave(self) -> None:
        self.inside -= 1
        while self._queue and self.inside < self.limit:
            turn = self._queue.popleft()
            if not turn.done():
                self.inside += 1
                turn.set_result(None)


class Pass:
    """A place inside; `leave` may be called more than once."""

    def __init__(self, gate: Gate) -> None:
        self._gate: Gate | None = gate
        self._entered = time.monotonic()

    def leave(self) -> None:
        if self._gate is not None:
            gate, self._gate = self._gate, None
            gate._stay += 0.1 * (time.monotonic() - self._entered - gate._stay)
            gate._leave()
