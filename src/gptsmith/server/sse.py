"""Server-sent events: a response as a stream of JSON objects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response

from gptsmith.server.errors import ApiError

# By default the library cuts all streams on SIGTERM. This server lets them finish first.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

DONE = b"data: [DONE]\n\n"
SEND_TIMEOUT = 60.0
"""Seconds without a successful send after which the client counts as disconnected."""


_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"}


def json_line(data: Any) -> str:
    """Encode JSON in one line, also for readers that end lines at U+0085, U+2028 and U+2029."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Encode one event. name: its type, for clients that distinguish events by name."""
    line = json_line(data)
    return f"data: {line}\n\n".encode() if name is None else f"event: {name}\ndata: {line}\n\n".encode()


def event_stream(
    events: AsyncIterator[bytes], on_error: Callable[[ApiError], bytes] = lambda error: event(error.body())
) -> Response:
    """Return a response that streams `events`. An ApiError ends the stream with the event `on_error` makes of it."""

    async def with_error_event() -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield each
        except ApiError as error:
            yield on_error(error)

    return EventSourceResponse(with_error_event(), sep="\n", send_timeout=SEND_TIMEOUT)
