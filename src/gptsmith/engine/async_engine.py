"""An engine in a thread of its own, for asyncio: requests from any task, events as they are made.

engine = AsyncEngine(Engine(model))
async for event in engine.stream(prompt, params): ...
result = await engine.generate(prompt, params)
engine.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TypeVar

from gptsmith.engine.engine import Engine, EngineStats, as_error
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Event, Result
from gptsmith.errors import GptsmithError
from gptsmith.formats.peft import read_adapter

Deliver = Callable[[Event | Exception], None]
T = TypeVar("T")


class AsyncEngine:
    """Owns `engine`: nobody else may use it until `close`. May be used from any thread and any event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[int, Deliver] = {}
        self._closing = False
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="gptsmith-engine", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Items[int], params: SamplingParams) -> AsyncIterator[Event]:
        """Continue a prompt; its events as they come. A reader that leaves off (or is cancelled) cancels it.

        Raises UsageError for a prompt that cannot be served, GptsmithError if the engine has been closed.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def deliver(item: Event | Exception) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        ticket = self.submit(prompt, params, deliver)
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            ticket.cancel()

    async def generate(self, prompt: Items[int], params: SamplingParams) -> Result:
        """Continue a prompt. Raises as `stream` does; what goes wrong later is in the result's `error`."""
        stream = self.stream(prompt, params)
        try:
            async for event in stream:
                if event.result is not None:
                    return event.result
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        raise GptsmithError("the engine ended a request without a result.")  # pragma: no cover

    def submit(self, prompt: Items[int], params: SamplingParams, deliver: Deliver) -> RequestHandle:
        """Continue a prompt; `deliver(event)` is called in the engine's thread: it must be quick, and not fail. It gets
        an exception instead if the request cannot be served; that is then the last it gets, as is an event with a
        result."""
        ticket = RequestHandle(self)

        def begin() -> None:
            if ticket.cancelled:
                return
            try:
                ticket.request = self.engine.add_request(prompt, params)
            except Exception as failure:  # whatever is wrong with it, the others go on
                _deliver(deliver, as_error(failure))
            else:
                self._readers[ticket.request] = deliver

        if self._closing or self._broken is not None:
            _deliver(deliver, self._broken or GptsmithError("the engine is closed."))
        else:
            self._orders.put(begin)
        return ticket

    def stop(self, request: int, index: int) -> None:
        """End one sample as if it had come to a stop token (events that are under way may still come)."""
        self._orders.put(lambda: self.engine.stop(request, index))

    async def call(self, function: Callable[[], T]) -> T:
        """What `function()` gives; called in the engine's thread between two passes: nobody else uses the model."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if not answer.done():
                answer.set_exception(error) if error is not None else answer.set_result(value)  # type: ignore[arg-type]

        def order() -> None:
            value, error = None, None
            try:
                value = function() if not answer.cancelled() else None
            except Exception as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # an event loop that is closed takes nothing
                loop.call_soon_threadsafe(settle, value, error)

        if self._closing or self._broken is not None:
            raise self._broken or GptsmithError("the engine is closed.")
        self._orders.put(order)
        return await answer

    def add_adapter(self, name: str, directory: Path) -> None:
        """See `Engine.add_adapter`; raises what it raises, at once."""
        adapter = read_adapter(directory, self.engine.model)
        self._orders.put(lambda: self.engine.add_adapter(name, adapter))

    def remove_adapter(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        self._orders.put(lambda: self.engine.remove_adapter(name))

    def on_weights_updated(self) -> None:
        """See `Engine.on_weights_updated`."""
        self._orders.put(self.engine.on_weights_updated)

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests; return when those there are have ended (drain), or cancel them."""
        self._closing = True

        def end() -> None:
            for request in () if drain else list(self._readers):
                self.engine.abort(request)

        self._orders.put(end)  # which wakes the thread, too
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        try:
            while True:
                idle = not self.engine.has_work
                if idle and self._closing and self._orders.empty():
                    return
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._orders.get(block=idle)()
                        idle = False
                for event in self.engine.step():
                    deliver = self._readers.get(event.request)
                    if event.result is not None:
                        self._readers.pop(event.request, None)
                    if deliver is not None and not _deliver(deliver, event):
                        self.engine.abort(event.request)
        except Exception as failure:  # a mistake of this package: said to all who wait, and to who comes after
            self._broken = GptsmithError(f"the engine has failed: {type(failure).__name__}: {failure}.")
            for deliver in self._readers.values():
                _deliver(deliver, self._broken)


class RequestHandle:
    """A submitted request. request: its number, once the engine has taken it."""

    def __init__(self, owner: AsyncEngine) -> None:
        self._owner, self.cancelled = owner, False
        self.request: int | None = None

    def cancel(self) -> None:
        """Cancel it, if it is not finished; its blocks are free before the next pass."""
        self.cancelled = True
        self._owner._orders.put(lambda: None if self.request is None else self._owner.engine.abort(self.request))


def _deliver(deliver: Deliver, item: Event | Exception) -> bool:
    """Whether it was taken: an event loop that is closed takes nothing."""
    try:
        deliver(item)
    except RuntimeError:
        return False
    return True
