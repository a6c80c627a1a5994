"""Bind a socket, run the application on it, and shut down gracefully."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from gptsmith.errors import UsageError

if TYPE_CHECKING:  # these bring torch, which `gptsmith watch` does without
    from fastapi import FastAPI

    from gptsmith.server.service import Service

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Host names under which a machine reaches itself."""


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that accepts connections; port 0 picks a free one. Raise UsageError if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":  # on Windows it would let two servers take the same port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {reason}. Choose another --host or --port.") from None
    return listening


def serve(app: FastAPI, listening: socket.socket, load: Callable[[], None] | None = None) -> None:
    """Serve `app` until SIGTERM or Ctrl-C. SIGHUP reloads the API keys.

    load: called in a thread once the server listens; until it returns, /health answers 503. What it raises ends the
    server and is raised here.

    The first signal stops accepting requests and lets running ones finish; a second one quits immediately.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=bool(service.settings.trusted_proxies),
        forwarded_allow_ips=list(service.settings.trusted_proxies),
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(service.settings.timeout) + 5,
    )
    server = _Server(config, service, load)
    server.run(sockets=[listening])
    if server.load_error is not None:
        raise server.load_error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, load: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._service, self._load = service, load
        self.load_error: Exception | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._service.reload_keys)
        self._service.loading = self._load is not None
        await super().startup(sockets)
        if self._load is not None:
            self._load_task = asyncio.ensure_future(self._load_models(self._load))

    async def _load_models(self, load: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(load)
        except Exception as error:
            self.load_error, self.should_exit = error, True
        self._service.loading = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining or self._loop is None:
            self.force_exit = True
            super().handle_exit(sig, frame)
        else:
            self._service.start_draining()
            self._loop.call_soon_threadsafe(self._start_drain_task)

    def _start_drain_task(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Reply 503 to new requests until those in flight have finished, then exit."""
        while self._service.open_requests:
            await asyncio.sleep(0.02)
        self.should_exit = True
