"""What every HTTP exchange goes through before and after the application: an id, keys, limits, a log line.

A body is read as a whole, up to a limit, before the application sees it; while the application works, the connection
is watched, and a client that goes away takes the application's task, and all that it holds, with it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptsmith.server.access_log import journal
from gptsmith.server.auth import Keys
from gptsmith.server.errors import ApiError
from gptsmith.server.request_context import Exchange
from gptsmith.server.service import Service

_OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics")
_LARGEST_DISCARDED = 64 << 20  # of a body that is too large: read and forgotten, so that the client hears why


def guarded(path: str) -> bool:
    """Whether a path needs a key, where there are keys: all but pages, documentation and health."""
    return path.startswith(("/v1/", "/api/")) or path in ("/tokenize", "/detokenize", "/metrics")


class Front:
    """The outermost part of the application; see above."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.keys = app, service, Keys(service.settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, self.service.settings.timeout)
        self.service.open += 1
        scope.setdefault("state", {})["exchange"] = exchange

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = exchange.id
            await send(message)

        try:
            try:
                self._admit(scope, exchange)
                body = await self._read(scope, receive, exchange)
                if body is not None:
                    await self._run(scope, receive, answer, body)
            except ApiError as error:
                await _refuse(answer, error, exchange)
            except Exception as error:
                journal.error("failure", exc_info=error, extra={"fields": {"request_id": exchange.id}})
                await _refuse(answer, ApiError(500, "something went wrong in the server; its log says what."), exchange)
        finally:
            exchange.close()
            self.service.open -= 1
            self._tell(scope, exchange)

    def _admit(self, scope: Scope, exchange: Exchange) -> None:
        path, hosts = scope["path"], self.service.settings.hosts
        if hosts is not None:
            host = Headers(scope=scope).get("host", "")
            name, _, port = host.rpartition(":")
            if (name if name and port.isdecimal() else host) not in hosts:
                raise ApiError(403, f"this server is not known as {host[:100]!r}, but as {', '.join(hosts)}.")
        if self.service.draining and path not in _OPEN_WHILE_DRAINING:
            raise ApiError(503, "the server is shutting down.", retry_after=5)
        if not guarded(path) or scope["method"] == "OPTIONS":
            return
        client = scope.get("client")
        who = str(client[0] if client else "local")
        if self.keys:
            who = exchange.facts["key"] = self.keys.check(Headers(scope=scope))
        rate = self.service.settings.rate
        if rate is not None and path != "/metrics":
            rate.take(who)

    async def _read(self, scope: Scope, receive: Receive, exchange: Exchange) -> bytes | None:
        """The body; None if the client has gone. Raises ApiError 413 or 408."""
        most = self.service.settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        too_large = length.isdecimal() and int(length) > most
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout_at(exchange.deadline):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > most
                    if too_large:
                        parts.clear()
                        if size > _LARGEST_DISCARDED:
                            break
                    else:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "the request's body did not come in time.", code="timeout") from None
        if too_large:
            raise ApiError(413, f"the body is larger than {most:,} bytes.", code="body_too_large")
        return b"".join(parts)

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """The application, until it is done or the client has gone."""
        messages: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])
        gone: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def replay() -> Message:
            return messages.popleft() if messages else await asyncio.shield(gone)

        async def watch() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return

        working = asyncio.ensure_future(self.app(scope, replay, send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.wait({working, watching})
            if not watching.cancelled() and watching.exception() is None:
                scope["state"]["exchange"].facts.setdefault("gone", not working.done() or working.cancelled())
        if not working.cancelled():
            working.result()

    def _tell(self, scope: Scope, exchange: Exchange) -> None:
        """Count an exchange that is over, and write its line into the log."""
        endpoint = getattr(scope.get("route"), "path", None) or "other"  # never a path that somebody made up
        seconds = time.perf_counter() - exchange.began
        status = exchange.status or 499  # as some servers say for: the client went away first
        self.service.metrics.answered(endpoint, exchange.facts.get("model"), status, seconds)
        client = scope.get("client")
        fields = {
            "request_id": exchange.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "client": client[0] if client else None,
            "duration_ms": round(1000 * seconds, 1),
            **exchange.facts,
        }
        journal.info("request", extra={"fields": fields})


async def _refuse(send: Send, error: ApiError, exchange: Exchange) -> None:
    if exchange.status is not None:  # too late: the answer has begun, and breaks off here
        return
    exchange.facts.setdefault("error", error.message)
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = error.headers | {"content-type": "application/json", "content-length": str(len(body))}
    if error.status in (408, 413):
        headers["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
