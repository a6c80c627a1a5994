"""`gptsmith serve`: models behind OpenAI's API, and a web page."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.errors import UsageError, nearest
from gptsmith.log import note

KEY_VARIABLE = "GPTSMITH_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve models to everything that speaks OpenAI's API, and to people at a web page."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs, model directories, .gguf files, org/name on the hub, or smollm2-135m."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 for all networks this machine is in."""
    port: int = 8000
    """The port; 0 takes one that is free."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """A key that requests must bring; can be given several times. Others see a command line: prefer --api-key-file,
    or the environment's GPTSMITH_API_KEY."""
    api_key_file: Path | None = None
    """A file with a key a line."""
    alias: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """NAME=MODEL: another name of a model; can be given several times."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """NAME=DIRECTORY: a LoRA adapter of the first model, as a model of that name; NAME=DIRECTORY@MODEL: of another. Can
    be given several times."""
    preload: Literal["first", "all", "none"] = "first"
    """Which models to load before the first request; the others are loaded when they are first asked for."""
    max_concurrency: int = 32
    """Most requests worked on at a time."""
    queue_limit: int = 256
    """Most requests that wait; more are refused with 429."""
    rate_limit: str | None = None
    """Most requests of one key, or of one address where there are no keys: 60/min, 5/s, 1000/h."""
    timeout: float = 600.0
    """Seconds after which a request is given up."""
    max_body: int = 4 << 20
    """Largest request, in bytes."""
    cors: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """An origin (https://example.org) whose pages may ask, or * for all; can be given several times."""
    runs: Path | None = None
    """A directory of runs, for the page to show."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8 or int4: make the weights 8 or 4 bits while loading. auto: as they are stored. none: full precision."""
    cache_tokens: int | None = None
    """Room for so many tokens' keys and values, of each model (default: what --max-concurrency texts can need, up to a
    quarter of the memory)."""
    speculate: bool = False
    """Guess ahead from what the text has said before; the answers stay the same."""
    log_level: Literal["info", "warning", "error"] = "info"
    """How much to write into the log, which is JSON lines on standard error."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Serve, prog="gptsmith serve", args=arguments)
    if not chosen.models:
        raise UsageError("name a model to serve: gptsmith serve runs/bard")
    for name, least in (("max_concurrency", 1), ("queue_limit", 0), ("max_body", 1)):
        if getattr(chosen, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(chosen, name)}.")
    if not 0 < chosen.timeout <= 86_400:
        raise UsageError(f"--timeout must be above 0 and at most 86400 seconds, not {chosen.timeout:g}.")
    if not 0 <= chosen.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, not {chosen.port}.")
    if chosen.runs is not None and not chosen.runs.is_dir():
        raise UsageError(f"--runs {chosen.runs} is no directory.")
    aliases = dict(_pair("--alias", text) for text in chosen.alias)
    try:
        from gptsmith.server.app import create_app
    except ImportError as error:
        raise UsageError(f"serving needs more packages ({error.name}): pip install 'gptsmith[serve]'.") from None
    from gptsmith.loading import resolve_model
    from gptsmith.server.access_log import write_journal
    from gptsmith.server.auth import parse_rate, read_keys
    from gptsmith.server.listening import LOOPBACK, is_loopback, listen
    from gptsmith.server.models import Models, load, name_of
    from gptsmith.server.runner import serve
    from gptsmith.server.service import Settings

    keys = [*chosen.api_key, *os.environ.get(KEY_VARIABLE, "").split()]
    if chosen.api_key_file is not None:
        keys += read_keys(chosen.api_key_file)
    if any(not key.strip() for key in keys):
        raise UsageError("--api-key: a key may not be empty.")
    settings = Settings(
        keys=tuple(keys),
        max_concurrency=chosen.max_concurrency,
        queue_limit=chosen.queue_limit,
        rate=None if chosen.rate_limit is None else parse_rate(chosen.rate_limit),
        timeout=chosen.timeout,
        max_body=chosen.max_body,
        cors=chosen.cors,
        hosts=(*LOOPBACK, chosen.host) if is_loopback(chosen.host) and not keys else None,
        runs=chosen.runs,
    )
    for spec in chosen.models:  # what is not there is said now, and not when it is first asked for
        resolve_model(spec)
    models = Models(
        chosen.models,
        functools.partial(
            load,
            device=chosen.device,
            quantize=chosen.quantize,
            max_batch=chosen.max_concurrency,
            cache_tokens=chosen.cache_tokens,
            speculate=chosen.speculate,
        ),
        aliases=aliases,
        adapters=dict(_adapter(text, [*map(name_of, chosen.models), *chosen.models]) for text in chosen.adapter),
    )
    listening = listen(chosen.host, chosen.port)
    try:
        for name in {"first": models.bases[:1], "all": models.bases, "none": []}[chosen.preload]:
            note(f"loading {name}")
            models.load(name)
        if not is_loopback(chosen.host) and not keys:
            note(f"warning: everybody who reaches {chosen.host} may use this server; give it an --api-key-file.")
        app = create_app(models, settings)
        write_journal(chosen.log_level)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {', '.join(models.names)} at http://{shown}:{port} (Ctrl-C ends)")
        serve(app, listening)
    finally:
        listening.close()
        models.close(drain=False)
    return 0


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"{option} {text!r}: write NAME=VALUE.")
    return name, value


def _adapter(text: str, models: list[str]) -> tuple[str, tuple[str, Path]]:
    """NAME=DIRECTORY or NAME=DIRECTORY@MODEL."""
    name, value = _pair("--adapter", text)
    directory, at, model = value.rpartition("@")
    if not at or Path(value).exists():
        directory, model = value, models[0]
    elif model not in models:
        raise UsageError(f"--adapter {text!r}: {model!r} is not served.{nearest(model, models)}")
    if not Path(directory).is_dir():
        raise UsageError(f"--adapter {text!r}: {directory} is no directory.")
    return name, (model, Path(directory))
