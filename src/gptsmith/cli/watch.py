"""`gptsmith watch`: live training curves in the browser."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptsmith.cli.parser import parse
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.log import note


@dataclass(frozen=True)
class Watch:
    """Show training runs in the browser: loss, rewards, learning rate, speed and samples, updated live."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[RUN]")] = Path("runs")
    """Run directory, or directory of runs."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 listens on all interfaces."""
    port: int = 8001
    """Port to bind; 0 picks a free one."""
    open: bool = False
    """Open the page in the default browser."""


def main(arguments: list[str]) -> int:
    chosen = parse(Watch, "gptsmith watch", arguments)
    if not 0 <= chosen.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, not {chosen.port}.")
    if not chosen.run.is_dir():
        raise GptsmithError(
            f"{chosen.run}: no such directory. Pass a run directory, or a directory of runs (default: runs)."
        )
    try:
        import uvicorn

        from gptsmith.server.webapp import watch_app
    except ImportError as error:
        raise UsageError(
            f"watching needs a package that is not installed ({error.name}): pip install 'gptsmith[serve]'."
        ) from None
    from gptsmith.server.runner import is_loopback, listen

    listening = listen(chosen.host, chosen.port)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chosen.host, chosen.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    hosts = [chosen.host, "127.0.0.1", "localhost"] if is_loopback(chosen.host) else None
    note(f"watching {chosen.run} at {url} (press Ctrl-C to stop)")
    if chosen.open:
        import threading
        import webbrowser

        threading.Timer(0.5, webbrowser.open, (url,)).start()
    server: uvicorn.Server
    app = watch_app(chosen.run, hosts=hosts, stopping=lambda: server.should_exit)
    # uvicorn's own log configuration would close every handler of the process
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to stop it
        server.run(sockets=[listening])
    return 0
