"""`gptsmith watch`: training runs in the browser, while they train and after."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

import tyro

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.log import note

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Watch:
    """Show training runs in the browser: losses, learning rate, speed and samples as they come. Ctrl-C ends it."""

    run: tyro.conf.Positional[Path] = Path("runs")
    """A run directory, or a directory of runs."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 lets the whole network look."""
    port: int = 8001
    """The port to listen on; 0 takes a free one."""
    open: bool = False
    """Open the page in a browser."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Watch, prog="gptsmith watch", args=arguments)
    if not chosen.run.is_dir():
        raise GptsmithError(
            f"there is no directory {chosen.run}. Give a run, or the directory that runs are in (`runs`, by default)."
        )
    try:
        import uvicorn

        from gptsmith.server.pages import watch_app
    except ModuleNotFoundError as error:
        raise GptsmithError(f"watch needs {error.name}: pip install 'gptsmith[serve]'") from None

    hosts = ["127.0.0.1", "localhost", "[::1]"] if chosen.host in LOOPBACK else None
    listening = listen(chosen.host, chosen.port)
    port = listening.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(chosen.host, chosen.host)
    url = f"http://{shown}:{port}/"
    note(f"watching {chosen.run} at {url}  (Ctrl-C ends)")
    if chosen.open:
        import threading
        import webbrowser

        threading.Timer(0.5, webbrowser.open, (url,)).start()
    server: uvicorn.Server
    app = watch_app(chosen.run, hosts=hosts, stopping=lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    with contextlib.suppress(KeyboardInterrupt):  # this is how it ends
        server.run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError for an address that is none or not free."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: ports go from 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another --port, or 0 for a free one."
        ) from None
    return listening
