"""POST /v1/chat/completions: conversations continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.text import TextToken, Writing
from gptsmith.server.completions import finish_reason, merged
from gptsmith.server.models import Served
from gptsmith.server.schema import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    TopLogprob,
)
from gptsmith.server.service import check_length, service_of, usage_of
from gptsmith.server.stream import DONE, event, event_stream
from gptsmith.server.wishes import check_stream, constraint_of, encoded, sampling_params
from gptsmith.server.work import Job, Work
from gptsmith.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
async def chat(body: ChatRequest, request: Request) -> Any:
    """Continue a conversation."""
    service = service_of(request)
    check_stream(body)
    served = await service.served(request, body.model)
    messages = [_message(message) for message in body.messages]
    length = sum(len(str(message.get("content"))) for message in messages)
    ids = await encoded(served.tokenizer, lambda: served.template.encode(messages), length)
    check_length(served, ids, body.overflow)
    params = sampling_params(
        body,
        served,
        max_tokens=body.max_completion_tokens or body.max_tokens or max(1, served.loaded.context - len(ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=await constraint_of(body, served, body.response_format),
    )
    work = await service.begin(request, served, [Job(ids, Writing(served.tokenizer, "", params))])
    frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return event_stream(_chunks(work, {**frame, "object": "chat.completion.chunk"}, served, usage))
    texts: dict[int, Any] = {}
    async for pieces in work.pieces():
        for choice, text in merged(pieces).items():
            if choice in texts:
                texts[choice].text += text.text
                texts[choice].tokens += text.tokens
                texts[choice].finish_reason = text.finish_reason or texts[choice].finish_reason
            else:
                texts[choice] = text
    choices = [
        ChatChoice(
            index=choice,
            message=AnswerMessage(content=text.text),
            logprobs=logprobs_of(served.tokenizer, text.tokens) if body.logprobs else None,
            finish_reason=finish_reason(text.finish_reason) or "stop",
        )
        for choice, text in sorted(texts.items())
    ]
    return ChatCompletion(**frame, choices=choices, usage=usage_of(work))


async def _chunks(work: Work, frame: dict[str, Any], served: Served, usage: bool) -> AsyncIterator[bytes]:
    nothing = {"usage": None} if usage else {}
    begun: set[int] = set()
    async for pieces in work.pieces():
        for choice, text in merged(pieces).items():
            delta: dict[str, Any] = {"content": text.text}
            if choice not in begun:
                begun.add(choice)
                delta = {"role": "assistant", **delta}
            known = logprobs_of(served.tokenizer, text.tokens).model_dump() if text.tokens else None
            chunk = {
                "index": choice,
                "delta": delta,
                "logprobs": known,
                "finish_reason": finish_reason(text.finish_reason),
            }
            yield event({**frame, "choices": [chunk], **nothing})
    if usage:
        yield event({**frame, "choices": [], "usage": usage_of(work).model_dump()})
    yield DONE


def _message(message: Any) -> dict[str, Any]:
    values: dict[str, Any] = message.model_dump(exclude_none=True)
    if isinstance(values.get("content"), list):
        values["content"] = "".join(part["text"] for part in values["content"])
    if values["role"] == "developer":
        values["role"] = "system"
    return values


def logprobs_of(tokenizer: Tokenizer, tokens: list[TextToken]) -> ChatLogprobs:
    def entry(id: int, value: float) -> dict[str, Any]:
        return {"token": tokenizer.token_text(id), "logprob": value, "bytes": list(tokenizer.token_bytes(id))}

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **entry(token.id, token.logprob.logprob),
                top_logprobs=[TopLogprob(**entry(id, value)) for id, value in token.logprob.top],
            )
            for token in tokens
            if token.logprob is not None
        ]
    )
