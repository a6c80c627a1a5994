"""HEAD requests: the status and headers of GET, without the body."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Answer HEAD as GET, and end once the headers have been sent; so a stream without an end does not run on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        started = asyncio.Event()

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start" and not started.is_set():
                scope["method"] = "HEAD"  # the server looks at it to leave out the body
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                started.set()

        scope["method"] = "GET"
        app_task = asyncio.ensure_future(self.app(scope, receive, send_start))
        waiter = asyncio.ensure_future(started.wait())
        try:
            await asyncio.wait({app_task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            scope["method"] = "HEAD"
            for task in (app_task, waiter):
                task.cancel()
            await asyncio.wait({app_task, waiter})
        if not app_task.cancelled() and not started.is_set():
            app_task.result()
