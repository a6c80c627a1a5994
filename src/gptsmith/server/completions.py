"""POST /v1/completions: texts continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.text import Detokenizer, TextChunk, TextToken, encode_prompt
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Job, Work
from gptsmith.server.models import Served
from gptsmith.server.request_params import check_stream, constraint_of, encoded, sampling_params
from gptsmith.server.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from gptsmith.server.service import check_length, service_of, usage_of
from gptsmith.server.sse import DONE, event, event_stream
from gptsmith.tokenizer import Tokenizer

router = APIRouter()
DEFAULT_MAX_TOKENS = 16
MOST_PROMPTS = 256


@router.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
async def complete(body: CompletionRequest, request: Request) -> Any:
    """Continue a text, or several."""
    service = service_of(request)
    check_stream(body)
    served = await service.served(request, body.model)
    params = sampling_params(
        body,
        served,
        max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        echo=body.echo,
        constraint=await constraint_of(body, served, body.response_format),
    )
    if body.echo and body.logprobs is not None and params.overflow != "error":
        raise ApiError(400, "overflow: not together with echo and logprobs.", param="overflow")
    jobs = []
    for prompt in _prompts(body):
        text, ids = await _encoded(served, prompt)
        check_length(served, ids, body.overflow)
        writing = Detokenizer(served.tokenizer, text, params, ignore_eos=bool(body.ignore_eos), prompt_length=len(ids))
        jobs.append(Job(ids, writing))
    work = await service.begin(request, served, jobs)
    frame: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return event_stream(
            _chunks(work, {**frame, "object": "text_completion"}, served.tokenizer, body.logprobs, usage)
        )
    texts: dict[int, _Text] = {}
    async for pieces in work.pieces():
        for choice, piece in pieces:
            texts.setdefault(choice, _Text()).add(piece)
    choices = [
        CompletionChoice(
            index=choice,
            text=text.text,
            logprobs=logprobs_of(served.tokenizer, text.tokens, body.logprobs),
            finish_reason=finish_reason(text.finish_reason) or "stop",
        )
        for choice, text in sorted(texts.items())
    ]
    return Completion(**frame, choices=choices, usage=usage_of(work))


async def _chunks(
    work: Work, frame: dict[str, Any], tokenizer: Tokenizer, logprobs: int | None, usage: bool
) -> AsyncIterator[bytes]:
    nothing = {"usage": None} if usage else {}
    async for pieces in work.pieces():
        for choice, text in merged(pieces).items():
            known = logprobs_of(tokenizer, text.tokens, logprobs)
            chunk = {
                "index": choice,
                "text": text.text,
                "logprobs": None if known is None else known.model_dump(),
                "finish_reason": finish_reason(text.finish_reason),
            }
            yield event({**frame, "choices": [chunk], **nothing})
    if usage:
        yield event({**frame, "choices": [], "usage": usage_of(work).model_dump()})
    yield DONE


@dataclass
class _Text:
    """A sample's text, as much as has come."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: TextChunk) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason


def merged(pieces: Sequence[tuple[int, TextChunk]]) -> dict[int, _Text]:
    """What has come of each choice, in one."""
    texts: dict[int, _Text] = {}
    for choice, piece in pieces:
        texts.setdefault(choice, _Text()).add(piece)
    return texts


def finish_reason(reason: str | None) -> Literal["stop", "length"] | None:
    """As OpenAI has it: a full context is a length, too."""
    return None if reason is None else "stop" if reason == "stop" else "length"


def logprobs_of(tokenizer: Tokenizer, tokens: Sequence[TextToken], most: int | None) -> CompletionLogprobs | None:
    if most is None:
        return None
    tops = [
        None if token.logprob is None else {tokenizer.token_text(id): value for id, value in token.logprob.top}
        for token in tokens
    ]
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(token.id) for token in tokens],
        token_logprobs=[None if token.logprob is None else token.logprob.logprob for token in tokens],
        top_logprobs=tops if most else None,
        text_offset=[token.start for token in tokens],
    )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: there is none in it.", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MOST_PROMPTS:
        raise ApiError(400, f"prompt: at most {MOST_PROMPTS} at a time.", param="prompt")
    return list(prompt)


async def _encoded(served: Served, prompt: str | list[int]) -> tuple[str, list[int]]:
    """The prompt as text and as ids."""
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        return prompt, await encoded(lambda: encode_prompt(tokenizer, prompt), len(prompt))
    if not prompt:
        raise ApiError(400, "prompt: it has no tokens.", param="prompt")
    if max(prompt) >= tokenizer.vocab_size:
        most = tokenizer.vocab_size - 1
        raise ApiError(400, f"prompt: {max(prompt)} is no token id; they go to {most}.", param="prompt")
    return tokenizer.decode(prompt), prompt
