"""`gptsmith watch`: training runs in the browser, while they train and after."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.log import note


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
    if not 0 <= chosen.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, not {chosen.port}.")
    if not chosen.run.is_dir():
        raise GptsmithError(
            f"there is no directory {chosen.run}. Give a run, or the directory that runs are in (`runs`, by default)."
        )
    try:
        import uvicorn

        from gptsmith.server.webapp import watch_app
    except ImportError as error:
        raise UsageError(f"watching needs more packages ({error.name}): pip install 'gptsmith[serve]'.") from None
    from gptsmith.server.listening import is_loopback, listen

    listening = listen(chosen.host, chosen.port)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chosen.host, chosen.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    hosts = [chosen.host, "127.0.0.1", "localhost"] if is_loopback(chosen.host) else None
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
