"""What all endpoints share: the models, the gate before them, and how a request becomes work for an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from gptsmith.server.auth import RateLimiter
from gptsmith.server.concurrency import Gate
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Job, Work
from gptsmith.server.metrics import Metrics
from gptsmith.server.models import Models, Served
from gptsmith.server.request_context import Exchange
from gptsmith.server.schema import CachedTokens, Usage


@dataclass(frozen=True)
class Settings:
    """How a server behaves. keys: none lets everybody in. timeout: seconds. max_body: bytes. cors: origins of pages
    elsewhere that may ask, "*" for all. hosts: by which names it may be reached, None for any: a page elsewhere could
    have a name of its own lead to this machine. runs: the directory whose runs the web pages show."""

    keys: tuple[str, ...] = ()
    max_concurrency: int = 32
    queue_limit: int = 256
    rate: RateLimiter | None = None
    timeout: float = 600.0
    max_body: int = 4 << 20
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    runs: Path | None = None


class Service:
    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.gate = Gate(settings.max_concurrency, settings.queue_limit)
        self.metrics = Metrics(models, self.gate)
        self.draining = False
        """It takes no more requests, and finishes those it has."""
        self.open = 0
        """Exchanges that are under way."""

    def stop_taking(self) -> None:
        """Refuse what comes from now on. Streams without an end of their own look at `draining`, and end."""
        self.draining = True

    async def served(self, request: Request, name: str) -> Served:
        """The model that a request is for. Raises ApiError: 404, or 504 if loading it takes too long."""
        exchange = exchange_of(request)
        exchange.facts["model"] = name if self.models.known(name) else None
        try:
            async with asyncio.timeout_at(exchange.deadline):
                return await self.models.get(name)
        except TimeoutError:
            raise ApiError(504, "the model is still being loaded.", code="timeout", retry_after=10) from None

    async def begin(self, request: Request, served: Served, jobs: Sequence[Job]) -> Work:
        """Wait for a place, put the jobs to the engine, and wait for the first text. Raises ApiError.

        The work ends with the exchange, however that ends.
        """
        exchange = exchange_of(request)
        place = await self.gate.enter(exchange.deadline)

        work = Work(served, jobs, deadline=exchange.deadline, began=exchange.began, on_end=lambda work: place.leave())
        exchange.on_close(lambda: self._account(exchange, work))
        exchange.on_close(work.close)
        return await work.begin()

    def _account(self, exchange: Exchange, work: Work) -> None:
        """What came of a request, for the metrics and the log."""
        self.metrics.worked(work)
        exchange.facts.update(
            prompt_tokens=work.prompt_tokens, completion_tokens=work.tokens_seen, cached_tokens=work.cached_tokens
        )
        if work.timing.first is not None:
            exchange.facts["first_token_ms"] = round(1000 * (work.timing.first - exchange.began), 1)


def exchange_of(request: Request) -> Exchange:
    exchange: Exchange = request.scope["state"]["exchange"]
    return exchange


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def usage_of(work: Work) -> Usage:
    prompt, completion = work.prompt_tokens, work.completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=work.cached_tokens),
    )


def check_length(served: Served, ids: Sequence[int], overflow: str | None) -> None:
    """Raises ApiError 400, with the code that OpenAI's clients know, for a prompt beyond the context."""
    context = served.loaded.context
    if len(ids) > context and (overflow or "error") == "error":
        raise ApiError(
            400,
            f"the prompt has {len(ids):,} tokens, more than the context of {context:,}. Shorten it, or say what to do "
            "beyond the context: overflow truncate or shift.",
            code="context_length_exceeded",
        )
