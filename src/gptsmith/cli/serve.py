"""`gptsmith serve`: an OpenAI-compatible API and a web page."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.errors import CheckpointError, UsageError, nearest
from gptsmith.log import is_terminal, note, quiet

if TYPE_CHECKING:
    from gptsmith.server.models import ModelRegistry
    from gptsmith.server.service import Settings

KEY_VARIABLE = "GPTSMITH_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve models through an OpenAI-compatible API and a web page."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m.
    NAME=MODEL serves it under another name."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 listens on all interfaces."""
    port: int = 8000
    """Port to bind; 0 picks a free one."""
    api_key: tuple[str, ...] = field(default=())
    """API key that requests must send. Other users of this machine can see command lines, so prefer
    --api-key-file or the environment variable GPTSMITH_API_KEY."""
    api_key_file: Path | None = None
    """File with one key per line."""
    alias: tuple[str, ...] = field(default=())
    """NAME=MODEL: another name for a model."""
    adapter: tuple[str, ...] = field(default=())
    """NAME=DIRECTORY: serve the first model with this LoRA adapter, or that of a run, under the given name;
    NAME=DIRECTORY@MODEL: another model."""
    preload: Literal["first", "all", "none"] = "first"
    """Models to load at startup; the others are loaded when they are first requested."""
    max_concurrency: int = 32
    """Maximum number of requests processed at once."""
    queue_limit: int = 256
    """Maximum number of waiting requests; more are answered with 429."""
    rate_limit: str | None = None
    """Rate limit per API key, or per client address if there are no keys: 60/min, 5/s, 1000/h."""
    timeout: float = 600.0
    """Request timeout in seconds, including the time in the queue."""
    max_body: int = 4 << 20
    """Maximum size of a request body, in bytes."""
    cors: tuple[str, ...] = field(default=())
    """Origin (https://example.org) whose web pages may call the API, or * for all."""
    allowed_host: tuple[str, ...] = field(default=())
    """Host header to accept, such as the name under which a reverse proxy passes requests on; * for any."""
    trusted_proxy: tuple[str, ...] = field(default=())
    """Address or network (10.0.0.0/8) of a reverse proxy whose X-Forwarded-For header names the client, for rate
    limits and the log; * for any."""
    allow_media_domain: tuple[str, ...] = field(default=())
    """Domain, such as images.example.org, from which pictures in requests are fetched. Without any, they have to be in
    the request, as data: URLs."""
    runs: Path | None = None
    """Directory of training runs to show in the web page."""
    collect: Path | None = None
    """File (.jsonl) to which the page appends a person's comparisons of two answers, as `reward` and `dpo` read
    them. Adds the view Compare."""
    reward_model: str | None = None
    """With --collect: a run or a directory of a reward model. The page counts how many choices it predicts."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8, int4: quantize the weights to 8 or 4 bits while loading. auto: as stored. none: full precision."""
    cache_tokens: int | None = None
    """Size of each model's KV cache, in tokens (default: enough for --max-concurrency sequences, up to a quarter of the
    memory)."""
    speculate: bool = False
    """Speculative decoding: draft tokens by prompt lookup. Answers stay the same."""
    log_level: Literal["info", "warning", "error"] = "info"
    """Log level. The log is written to standard error as JSON lines."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = parse(Serve, "gptsmith serve", arguments)
    _check(chosen)
    try:
        from gptsmith.server.app import create_app
    except ImportError as error:
        raise UsageError(
            f"serving needs a package that is not installed ({error.name}): pip install 'gptsmith[serve]'."
        ) from None
    from gptsmith.server.access_log import announce, configure_logging
    from gptsmith.server.models import SERVER_SAMPLING
    from gptsmith.server.runner import is_loopback, listen, serve

    settings, models = _settings(chosen), _models(chosen)
    configure_logging(chosen.log_level)
    say = note if is_terminal() else announce  # a log file has JSON lines only
    listening = listen(chosen.host, chosen.port)
    try:
        app = create_app(models, settings)
        if not is_loopback(chosen.host) and not settings.keys:
            say("warning: anyone who can reach this machine can use this server. Protect it with --api-key-file.")
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {', '.join(models.names)} at http://{shown}:{port} (press Ctrl-C to stop)")
        preload = {"first": models.base_models[:1], "all": models.base_models, "none": []}[chosen.preload]

        def load_models() -> None:
            for name in preload:
                defaults = models.load(name).defaults.describe(SERVER_SAMPLING)
                if defaults is not None:
                    note(f"{name}: {defaults}")

        with quiet(not is_terminal()):
            serve(app, listening, load_models if preload else None)
    finally:
        listening.close()
        models.close(drain=False)
    return 0


def _check(chosen: Serve) -> None:
    """Raise UsageError for options that are wrong by themselves."""
    if not chosen.models:
        raise UsageError("no model given. Name at least one: gptsmith serve runs/bard")
    for name, minimum in (("max_concurrency", 1), ("queue_limit", 0), ("max_body", 1)):
        if getattr(chosen, name) < minimum:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {minimum}, not {getattr(chosen, name)}.")
    if not 0 < chosen.timeout <= 86_400:
        raise UsageError(f"--timeout must be above 0 and at most 86400 seconds, not {chosen.timeout:g}.")
    if not 0 <= chosen.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, not {chosen.port}.")
    if chosen.runs is not None and not chosen.runs.is_dir():
        raise UsageError(f"--runs {chosen.runs}: not a directory.")
    if chosen.reward_model is not None and chosen.collect is None:
        raise UsageError("--reward-model needs --collect: it is compared with the choices that are collected.")
    for address in chosen.trusted_proxy:
        _check_address(address)


def _settings(chosen: Serve) -> Settings:
    """Return how requests are answered: who may ask, how much at once, and what is shown and collected."""
    from gptsmith.server.auth import parse_rate, read_keys
    from gptsmith.server.comparisons import check_file
    from gptsmith.server.media import MediaFetcher, parse_domain
    from gptsmith.server.runner import LOOPBACK, is_loopback
    from gptsmith.server.service import Settings

    def current_keys() -> list[str]:
        from_file = [] if chosen.api_key_file is None else read_keys(chosen.api_key_file)
        return [*chosen.api_key, *os.environ.get(KEY_VARIABLE, "").split(), *from_file]

    if chosen.collect is not None:
        check_file(chosen.collect)
    keys = current_keys()
    if any(not key.strip() for key in keys):
        raise UsageError("--api-key: a key must not be empty.")
    allowed = tuple(_host_name(host) for host in chosen.allowed_host)
    restricted = bool(allowed) or (is_loopback(chosen.host) and not keys)
    return Settings(
        keys=tuple(keys),
        read_keys=None if chosen.api_key_file is None else current_keys,
        trusted_proxies=chosen.trusted_proxy,
        max_concurrency=chosen.max_concurrency,
        queue_limit=chosen.queue_limit,
        rate=None if chosen.rate_limit is None else parse_rate(chosen.rate_limit),
        timeout=chosen.timeout,
        max_body=chosen.max_body,
        cors=chosen.cors,
        hosts=(*LOOPBACK, chosen.host.lower(), *allowed) if restricted and "*" not in allowed else None,
        runs=chosen.runs,
        collect=chosen.collect,
        reward_model=chosen.reward_model,
        media=MediaFetcher(tuple(parse_domain(domain) for domain in chosen.allow_media_domain)),
    )


def _models(chosen: Serve) -> ModelRegistry:
    """Return the models to serve, which are not loaded yet. Raise UsageError for one that is not there: now, and not at
    the first request."""
    from gptsmith.loading import resolve_model
    from gptsmith.server.models import ModelRegistry, default_name, load

    aliases = dict(_pair("--alias", text) for text in chosen.alias)
    named = _named(chosen.models, default_name)
    for spec in named.values():
        resolve_model(spec)
    return ModelRegistry(
        named,
        functools.partial(
            load,
            device=chosen.device,
            quantize=chosen.quantize,
            max_batch=chosen.max_concurrency,
            cache_tokens=chosen.cache_tokens,
            speculate=chosen.speculate,
        ),
        aliases=aliases,
        adapters=dict(_adapter(text, [*named, *named.values()]) for text in chosen.adapter),
    )


def _named(models: tuple[str, ...], default_name: Callable[[str], str]) -> dict[str, str]:
    """Return the models by name, from MODEL or NAME=MODEL. Raise UsageError for a name that two of them have."""
    named: dict[str, str] = {}
    for text in models:
        name, equals, spec = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, spec = default_name(text), text
        elif not name or not spec:
            raise UsageError(f"{text!r}: expected MODEL or NAME=MODEL.")
        if name in named:
            raise UsageError(f"two models are named {name!r}; give one of them another name with NAME=MODEL.")
        named[name] = spec
    return named


def _check_address(text: str) -> None:
    """Raise UsageError for a trusted proxy that is neither an address nor a network. Names are not resolved."""
    try:
        if text != "*":
            ipaddress.ip_network(text)
    except ValueError:
        message = f"--trusted-proxy {text!r}: expected an IP address, a network such as 10.0.0.0/8, or *."
        raise UsageError(message) from None


def _host_name(text: str) -> str:
    """Return an allowed host as it is compared: without its port, in lower case. Raise UsageError for an address of a
    page."""
    if "/" in text or not text.strip():
        raise UsageError(f"--allowed-host {text!r}: expected a host name, such as gpt.example.org.")
    name, _, port = text.strip().lower().rpartition(":")
    return name if name and port.isdecimal() else text.strip().lower()


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"{option} {text!r}: expected NAME=VALUE.")
    return name, value


def _adapter(text: str, models: list[str]) -> tuple[str, tuple[str, Path]]:
    """Parse NAME=DIRECTORY or NAME=DIRECTORY@MODEL. Raise UsageError if there is no adapter."""
    from gptsmith.loading import resolve_adapter

    name, value = _pair("--adapter", text)
    directory, at, model = value.rpartition("@")
    if not at or Path(value).exists():
        directory, model = value, models[0]
    elif model not in models:
        raise UsageError(f"--adapter {text!r}: {model!r} is not served.{nearest(model, models)}")
    if not Path(directory).is_dir():
        raise UsageError(f"--adapter {text!r}: {directory} is not a directory.")
    try:  # report missing and damaged files now, not when the model is loaded
        resolve_adapter(directory)
    except CheckpointError as error:
        raise UsageError(f"--adapter {text!r}: {error}") from None
    return name, (model, Path(directory))
