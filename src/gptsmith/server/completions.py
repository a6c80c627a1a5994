"""POST /v1/completions: text completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.text import Detokenizer, TextChunk, TextToken
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Generation, Job
from gptsmith.server.request_params import check_stream, constraint_of, input_ids, sampling_params, split_inputs
from gptsmith.server.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from gptsmith.server.service import check_length, service_of, usage_of
from gptsmith.server.sse import DONE, event, event_stream
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.tokenizer import readable

router = APIRouter()
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256


@router.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
async def complete(body: CompletionRequest, request: Request) -> Any:
    """Continue one or more texts."""
    service = service_of(request)
    check_stream(body)
    served = await service.served(request, body.model)
    tokenizer = served.tokenizer
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if (body.min_tokens or 0) > max_tokens:
        raise ApiError(400, f"min_tokens must be at most max_tokens ({max_tokens}).", param="min_tokens")
    params = sampling_params(
        body,
        served,
        max_tokens=max(1, max_tokens),
        prompt_only=max_tokens == 0,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        echo=body.echo,
        constraint=await constraint_of(body, served, body.response_format),
    )
    if body.echo and body.logprobs is not None and params.overflow != "error":
        raise ApiError(400, "overflow cannot be combined with echo and logprobs.", param="overflow")
    jobs = []
    for prompt in split_inputs(body.prompt, "prompt", MAX_PROMPTS):
        ids = await input_ids(served, prompt, "prompt")
        check_length(served, ids, body.overflow)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        detokenizer = Detokenizer(tokenizer, text, params, prompt_length=len(ids), prompt_ids=ids)
        jobs.append(Job(ids, detokenizer))
    generation = await service.start(request, served, jobs)
    envelope: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        envelope["object"] = "text_completion"
        return event_stream(_events(generation, envelope, tokenizer, body.logprobs, include_usage))
    samples: dict[int, _Sample] = {}
    async for chunks in generation.chunks():
        _merge(samples, chunks)
    choices = [
        CompletionChoice(
            index=index,
            text=sample.text,
            logprobs=_logprobs(tokenizer, sample.tokens, body.logprobs),
            finish_reason=finish_reason(sample.finish_reason) or "stop",
        )
        for index, sample in sorted(samples.items())
    ]
    return Completion(**envelope, choices=choices, usage=usage_of(generation))


async def _events(
    generation: Generation, envelope: dict[str, Any], tokenizer: Tokenizer, logprobs: int | None, include_usage: bool
) -> AsyncIterator[bytes]:
    no_usage = {"usage": None} if include_usage else {}
    async for chunks in generation.chunks():
        new: dict[int, _Sample] = {}
        _merge(new, chunks)
        for index, sample in new.items():
            sample_logprobs = _logprobs(tokenizer, sample.tokens, logprobs)
            choice = {
                "index": index,
                "text": sample.text,
                "logprobs": None if sample_logprobs is None else sample_logprobs.model_dump(),
                "finish_reason": finish_reason(sample.finish_reason),
            }
            yield event({**envelope, "choices": [choice], **no_usage})
    if include_usage:
        yield event({**envelope, "choices": [], "usage": usage_of(generation).model_dump()})
    yield DONE


@dataclass
class _Sample:
    """The text of one choice so far."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: str | None = None


def _merge(samples: dict[int, _Sample], chunks: Sequence[tuple[int, TextChunk]]) -> None:
    """Append chunks to the samples they belong to, by choice index."""
    for index, chunk in chunks:
        sample = samples.setdefault(index, _Sample())
        sample.text += chunk.text
        sample.tokens += chunk.tokens
        sample.finish_reason = chunk.finish_reason or sample.finish_reason


def finish_reason(reason: str | None) -> Literal["stop", "length"] | None:
    """Convert the engine's finish reason to OpenAI's, where a full context counts as "length"."""
    return None if reason is None else "stop" if reason == "stop" else "length"


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[TextToken], top: int | None) -> CompletionLogprobs | None:
    if top is None:
        return None

    def top_of(token: TextToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        values: dict[str, float] = {}  # of two tokens that are written alike, the more probable one comes first
        for id, value in token.logprob.top:
            values.setdefault(readable(tokenizer.token_bytes(id, token.previous)), value)
        return values

    tops = [top_of(token) for token in tokens]
    return CompletionLogprobs(
        tokens=[readable(tokenizer.token_bytes(token.id, token.previous)) for token in tokens],
        token_logprobs=[None if token.logprob is None else token.logprob.logprob for token in tokens],
        top_logprobs=tops if top else None,
        text_offset=[token.start for token in tokens],
    )
