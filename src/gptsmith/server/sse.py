"""Server-sent events: an answer in pieces, each a JSON object."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response

from gptsmith.server.errors import ApiError

# By default the library cuts all streams when the process is told to end. Here they come to their end first.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

DONE = b"data: [DONE]\n\n"
SEND_TIMEOUT = 60.0
"""Seconds after which a reader that takes nothing counts as gone."""


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event. name: for readers that tell events apart by their name."""
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {line}\n\n".encode() if name is None else f"event: {name}\ndata: {line}\n\n".encode()


def event_stream(
    events: AsyncIterator[bytes], on_error: Callable[[ApiError], bytes] = lambda error: event(error.body())
) -> Response:
    """A response that sends these events; an ApiError on the way becomes the last."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield each
        except ApiError as error:
            yield on_error(error)

    return EventSourceResponse(guarded(), sep="\n", send_timeout=SEND_TIMEOUT)
