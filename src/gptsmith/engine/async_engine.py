"""An engine in its own thread, for asyncio: requests from any task, events as they come.

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

from gptsmith.engine.engine import Engine, EngineStats
from gptsmith.engine.lifecycle import as_error
from gptsmith.engine.prompt import Prompt
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Event, Result
from gptsmith.errors import GptsmithError
from gptsmith.formats.peft import read_adapter

Callback = Callable[[Event | Exception], None]
T = TypeVar("T")


class AsyncEngine:
    """Runs `engine`, which nothing else may use until `close`. Can be used from any thread and any event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._callbacks: dict[int, Callback] = {}
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="gptsmith-engine", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Items[int] | Prompt, params: SamplingParams) -> AsyncIterator[Event]:
        """Continue a prompt; yield its events as they come. Leaving the loop cancels the request.

        Raise UsageError for a prompt that cannot be served, GptsmithError if the engine has been closed.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def callback(item: Event | Exception) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        handle = self.submit(prompt, params, callback)
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            handle.cancel()

    async def generate(self, prompt: Items[int] | Prompt, params: SamplingParams) -> Result:
        """Continue a prompt. Raise as `stream` does; a later failure is the result's `error`."""
        stream = self.stream(prompt, params)
        try:
            async for event in stream:
                if event.result is not None:
                    return event.result
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        raise GptsmithError("the engine ended a request without a result.")  # pragma: no cover

    def submit(self, prompt: Items[int] | Prompt, params: SamplingParams, callback: Callback) -> RequestHandle:
        """Continue a prompt; call `callback(event)` in the engine's thread, where it must be quick and not raise. The
        last call has an event with a result, or an exception if the request cannot be served."""
        handle = RequestHandle(self)

        def begin() -> None:
            if handle.cancelled:
                return
            try:
                handle.request = self.engine.add_request(prompt, params)
            except Exception as failure:  # whatever is wrong with this request, the others continue
                _deliver(callback, as_error(failure))
            else:
                self._callbacks[handle.request] = callback

        if self._closing or self._failure is not None:
            _deliver(callback, self._failure or GptsmithError("the engine is closed."))
        else:
            self._commands.put(begin)
        return handle

    def stop(self, request: int, index: int) -> None:
        """End one sample as if it had reached a stop token. Events that are already under way can still arrive."""
        self._commands.put(lambda: self.engine.stop(request, index))

    async def call(self, function: Callable[[], T]) -> T:
        """Call `function` in the engine's thread between two steps, when nothing else uses the model; return its
        result."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if not result.done():
                result.set_exception(error) if error is not None else result.set_result(value)  # type: ignore[arg-type]

        def command() -> None:
            value, error = None, None
            try:
                value = function() if not result.cancelled() else None
            except Exception as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(settle, value, error)

        if self._closing or self._failure is not None:
            raise self._failure or GptsmithError("the engine is closed.")
        self._commands.put(command)
        return await result

    def add_adapter(self, name: str, directory: Path) -> None:
        """See `Engine.add_adapter`; what it raises is raised here, at once."""
        adapter = read_adapter(directory, self.engine.model)
        self._commands.put(lambda: self.engine.add_adapter(name, adapter))

    def remove_adapter(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        self._commands.put(lambda: self.engine.remove_adapter(name))

    def on_weights_updated(self) -> None:
        """See `Engine.on_weights_updated`."""
        self._commands.put(self.engine.on_weights_updated)

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def close(self, *, drain: bool = True) -> None:
        """Accept no more requests, and return when the present ones have finished (drain) or are cancelled."""
        self._closing = True

        def end() -> None:
            for request in () if drain else list(self._callbacks):
                self.engine.abort(request)

        self._commands.put(end)  # this also wakes the thread
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        try:
            while True:
                idle = not self.engine.has_work
                if idle and self._closing and self._commands.empty():
                    return
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._commands.get(block=idle)()
                        idle = False
                for event in self.engine.step():
                    callback = self._callbacks.get(event.request)
                    if event.result is not None:
                        self._callbacks.pop(event.request, None)
                    if callback is not None and not _deliver(callback, event):
                        self.engine.abort(event.request)
        except Exception as failure:  # a bug: report it to all requests, present and future
            self._failure = GptsmithError(f"the engine has failed: {type(failure).__name__}: {failure}.")
            for callback in self._callbacks.values():
                _deliver(callback, self._failure)


class RequestHandle:
    """A submitted request. request: its number, once the engine has accepted it."""

    def __init__(self, owner: AsyncEngine) -> None:
        self._owner, self.cancelled = owner, False
        self.request: int | None = None

    def cancel(self) -> None:
        """Cancel the request, if it is not finished, before the next step."""
        self.cancelled = True
        self._owner._commands.put(lambda: None if self.request is None else self._owner.engine.abort(self.request))


def _deliver(callback: Callback, item: Event | Exception) -> bool:
    """Call the callback. Return False if it raises RuntimeError, which is what a closed event loop does."""
    try:
        callback(item)
    except RuntimeError:
        return False
    return True
