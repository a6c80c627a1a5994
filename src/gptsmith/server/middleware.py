"""What every HTTP request passes through around the application: a request id, API keys, limits and a log line.

The body is read whole, up to a limit, before the application sees it. While the application works, the connection is
watched; if the client disconnects, the application's task is canceled and everything it holds is freed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptsmith.server.access_log import logger
from gptsmith.server.errors import ApiError
from gptsmith.server.request_context import RequestContext
from gptsmith.server.service import Service

_OPEN = ("/", "/favicon.ico", "/docs", "/openapi.json", "/health", "/ready")
_OPEN_WHILE_DRAINING = ("/health", "/ready", "/metrics")
_NOT_LOGGED = (*_OPEN_WHILE_DRAINING, "/", "/favicon.ico")  # and /static/: probes and the page's files
_MAX_DISCARDED = 64 << 20  # bytes of an oversized body that are read and dropped, so that the client sees the 413


def requires_key(path: str) -> bool:
    """Return whether a path needs an API key if the server has keys: all but the page, documentation and health."""
    return path not in _OPEN and not path.startswith("/static/")


class RequestMiddleware:
    """The outermost ASGI middleware of the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext(scope, self.service.settings.timeout)
        self.service.open_requests += 1
        scope.setdefault("state", {})["context"] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = context.id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                context.complete = True

        try:
            try:
                self._authorize(scope, context)
                body = await self._read_body(scope, receive, context)
                if body is not None:
                    await self._run_app(scope, receive, send_with_id, body)
            except ApiError as error:
                await _send_error(send_with_id, error, context)
            except Exception as error:
                logger.error("failure", exc_info=error, extra={"fields": {"request_id": context.id}})
                internal = ApiError(500, f"Internal server error; the server log has details (request {context.id}).")
                await _send_error(send_with_id, internal, context)
        finally:
            context.close()
            self.service.open_requests -= 1
            self._record(scope, context)

    def _authorize(self, scope: Scope, context: RequestContext) -> None:
        """Check the Host header, the API key and the rate limit. Raise ApiError 401, 403, 429 or 503."""
        path, hosts = scope["path"], self.service.settings.hosts
        if hosts is not None:
            host = Headers(scope=scope).get("host", "").lower()
            name, _, port = host.rpartition(":")
            if (name if name and port.isdecimal() else host) not in hosts:
                raise ApiError(403, f"Host {host[:100]!r} is not allowed; use {' or '.join(dict.fromkeys(hosts))}.")
        if self.service.draining and path not in _OPEN_WHILE_DRAINING:
            raise ApiError(503, "The server is shutting down.", retry_after=5)
        if not requires_key(path) or scope["method"] == "OPTIONS":
            return
        address = scope.get("client")
        client = str(address[0] if address else "local")
        if self.service.keys:
            client = context.log_fields["key"] = self.service.keys.check(Headers(scope=scope))
        rate = self.service.settings.rate
        if rate is not None and path != "/metrics":
            rate.take(client)

    async def _read_body(self, scope: Scope, receive: Receive, context: RequestContext) -> bytes | None:
        """Return the body, or None if the client has disconnected. Raise ApiError 413 or 408."""
        limit = self.service.settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        too_large = length.isdecimal() and int(length) > limit
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout_at(context.deadline):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > limit
                    if too_large:
                        parts.clear()
                        if size > _MAX_DISCARDED:
                            break
                    else:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "Timed out while waiting for the request body.", code="timeout") from None
        if too_large:
            raise ApiError(413, f"The request body is larger than {limit:,} bytes.", code="body_too_large")
        return b"".join(parts)

    async def _run_app(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the application until it is done or the client has disconnected."""
        messages: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": False}])
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def replay() -> Message:
            return messages.popleft() if messages else await asyncio.shield(never)

        async def watch() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return

        app_task = asyncio.ensure_future(self.app(scope, replay, send))
        watch_task = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({app_task, watch_task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (app_task, watch_task):
                task.cancel()
            await asyncio.wait({app_task, watch_task})
            if not watch_task.cancelled() and watch_task.exception() is None:
                context = scope["state"]["context"]  # the connection also counts as closed after a whole response
                context.log_fields.setdefault("client_disconnected", not context.complete)
        if not app_task.cancelled():
            app_task.result()

    def _record(self, scope: Scope, context: RequestContext) -> None:
        """Count a request that has ended, and write its log line."""
        endpoint = getattr(scope.get("route"), "path", None) or "other"  # not the path itself, which clients choose
        seconds = time.perf_counter() - context.started_at
        status = context.status or 499  # nginx's code for: the client closed the connection before the response
        self.service.metrics.record_request(endpoint, context.log_fields.get("model"), status, seconds)
        client = scope.get("client")
        if status < 400 and (scope["path"] in _NOT_LOGGED or scope["path"].startswith("/static/")):
            return
        fields = {
            "request_id": context.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "client": client[0] if client else None,
            "duration_ms": round(1000 * seconds, 1),
            **context.log_fields,
        }
        logger.info("request", extra={"fields": fields})


async def _send_error(send: Send, error: ApiError, context: RequestContext) -> None:
    if context.status is not None:  # the response has already started: it ends here, incomplete
        return
    context.log_error(error)
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = error.headers | {"content-type": "application/json", "content-length": str(len(body))}
    if error.status in (408, 413):
        headers["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
