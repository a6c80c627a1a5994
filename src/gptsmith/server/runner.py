"""Run the application until it is told to end; then finish what has been accepted."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gptsmith.server.service import Service


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve `app` until SIGTERM or Ctrl-C. The first has it finish what it has begun, and refuse what comes; a second
    breaks all off."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(service.settings.timeout) + 5,
    )
    _Server(config, service).run(sockets=[listening])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining or self._loop is None:
            self.force_exit = True
            super().handle_exit(sig, frame)
        else:
            self._service.stop_taking()
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        """Until the last exchange is over connections are still taken, and told 503; then the door is shut."""
        while self._service.open:
            await asyncio.sleep(0.02)
        self.should_exit = True
