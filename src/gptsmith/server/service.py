"""What all endpoints share: the models, the concurrency limit, and the way from a request to its generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from gptsmith.data.images import DEFAULT_LIMITS, ImageLimits
from gptsmith.errors import GptsmithError
from gptsmith.server.access_log import logger
from gptsmith.server.auth import Keys, RateLimiter
from gptsmith.server.concurrency import ConcurrencyLimiter
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Generation, Job
from gptsmith.server.media import MediaFetcher
from gptsmith.server.metrics import Metrics
from gptsmith.server.models import ModelRegistry, ServedModel
from gptsmith.server.request_context import RequestContext
from gptsmith.server.schema import CachedTokens, Usage


@dataclass(frozen=True)
class Settings:
    """Settings of a server."""

    keys: tuple[str, ...] = ()
    """API keys; with none, anyone can use the server."""
    read_keys: Callable[[], Sequence[str]] | None = None
    """Returns the keys as they are now, for SIGHUP; None: they cannot change."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of reverse proxies whose X-Forwarded-For header names the client."""
    max_concurrency: int = 32
    """Requests processed at once."""
    queue_limit: int = 256
    """Requests that may wait; more are answered with 429."""
    rate: RateLimiter | None = None
    """Rate limit per API key, or per client address if there are no keys."""
    timeout: float = 600.0
    """Seconds until a request times out, including the time in the queue."""
    max_body: int = 4 << 20
    """Largest request body, in bytes."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may call the server; "*" for all."""
    hosts: tuple[str, ...] | None = None
    """Allowed Host headers; None for any. Protects a local server from DNS rebinding by web pages elsewhere."""
    runs: Path | None = None
    """A directory of training runs to show in the web page."""
    collect: Path | None = None
    """A file of JSON lines to which the web page appends a person's comparisons of answers."""
    reward_model: str | None = None
    """With `collect`: a run or a directory of a reward model, whose predictions of the comparisons are counted."""
    media: MediaFetcher = field(default_factory=MediaFetcher)
    """Fetches pictures that requests give as addresses on the network; from no domain unless some are allowed."""
    max_images: int = 16
    """Most pictures in a request."""
    image_limits: ImageLimits = DEFAULT_LIMITS
    """Largest picture, in bytes and in pixels; checked before it is decoded."""


class Service:
    """The state of a running server."""

    def __init__(self, models: ModelRegistry, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.decoding = asyncio.Lock()
        """Held while a picture is decoded."""
        self.limiter = ConcurrencyLimiter(settings.max_concurrency, settings.queue_limit)
        self.metrics = Metrics(models, self.limiter)
        self.draining = False
        """Whether new requests are refused while those in flight finish."""
        self.keys = Keys(settings.keys)
        self.loading = False
        """Whether the models to load at startup are still being loaded."""
        self.open_requests = 0
        """HTTP requests in flight."""

    def reload_keys(self) -> None:
        """Read the API keys again. If that fails, log why and keep those there are."""
        if self.settings.read_keys is None:
            logger.warning("there is no file of keys to reload")
            return
        try:
            self.keys = Keys(self.settings.read_keys())
        except GptsmithError as error:
            logger.error("the keys were not reloaded", extra={"fields": {"error": str(error)}})
        else:
            logger.info("the keys were reloaded")

    def start_draining(self) -> None:
        """Refuse new requests from now on. Endless streams check `draining` and end."""
        self.draining = True

    async def served(self, request: Request, name: str) -> ServedModel:
        """Return the model a request asks for, loading it if needed.

        Raise ApiError: 404 if there is none, 500 if it cannot be loaded, 504 if loading takes too long.
        """
        context = context_of(request)
        context.log_fields["model"] = name if name in self.models else None
        try:
            async with asyncio.timeout_at(context.deadline):
                return await self.models.get(name)
        except TimeoutError:
            raise ApiError(
                504, "The model is still loading. Try again later.", code="timeout", retry_after=10
            ) from None

    async def start(self, request: Request, served: ServedModel, jobs: Sequence[Job]) -> Generation:
        """Wait for a slot, submit the jobs to the engine, and wait for the first text. Raise ApiError.

        The generation is canceled when the HTTP request ends.
        """
        context = context_of(request)
        slot = await self.limiter.acquire(context.deadline)

        generation = Generation(
            served,
            jobs,
            deadline=context.deadline,
            started_at=context.started_at,
            on_end=lambda _: slot.release(),
        )
        context.on_close(lambda: self._record(context, generation))
        context.on_close(generation.close)
        return await generation.start()

    def _record(self, context: RequestContext, generation: Generation) -> None:
        self.metrics.record_generation(generation)
        context.log_fields.update(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.tokens_seen,
            cached_tokens=generation.cached_tokens,
        )
        if generation.timing.first is not None:
            context.log_fields["first_token_ms"] = round(1000 * (generation.timing.first - context.started_at), 1)


def context_of(request: Request) -> RequestContext:
    context: RequestContext = request.scope["state"]["context"]
    return context


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def usage_of(generation: Generation) -> Usage:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=generation.cached_tokens),
    )


def check_length(served: ServedModel, ids: Sequence[int], overflow: str | None) -> None:
    """Raise ApiError 400, with OpenAI's error code, for a prompt longer than the context."""
    context = served.loaded.context
    if len(ids) > context and (overflow or "error") == "error":
        raise ApiError(
            400,
            f"The prompt has {len(ids):,} tokens, but the model's context is {context:,} tokens. Shorten the prompt "
            'or set overflow to "truncate" or "shift".',
            code="context_length_exceeded",
        )
