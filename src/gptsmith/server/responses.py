"""POST /v1/responses: the text part of OpenAI's newer API. Nothing is kept: each request brings its whole conversation.

It is chat completions in other words: requests are translated, answers become output items and named events.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from gptsmith.server.chat import Answer, Delta, begin_answer, logprobs_of
from gptsmith.server.errors import ApiError, from_validation
from gptsmith.server.schema import (
    ChatRequest,
    FunctionCall,
    FunctionCallOutput,
    ResponseJsonSchema,
    ResponseNamedTool,
    ResponsePart,
    ResponsesRequest,
)
from gptsmith.server.service import service_of
from gptsmith.server.sse import event, event_stream

router = APIRouter()
_SAME = (
    *("temperature", "top_p", "seed", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("regex", "grammar", "choice", "parallel_tool_calls"),
)


@router.post("/v1/responses", tags=["OpenAI"], response_model=dict[str, Any])
async def respond(body: ResponsesRequest, request: Request) -> Any:
    """Continue a conversation, in the newer form."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream.", param="stream_options")
    answer = await begin_answer(service_of(request), request, _as_chat(body))
    output = _Output(body, answer)
    if body.stream:
        return event_stream(output.events(), output.failure)
    async for _ in output.events():
        pass
    return JSONResponse(output.response())


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    logprobs = "message.output_text.logprobs" in (body.include or ())
    if body.top_logprobs is not None and not logprobs:
        raise ApiError(400, "top_logprobs: include message.output_text.logprobs as well.", param="top_logprobs")
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            _add(messages, item)
    values: dict[str, Any] = {"model": body.model, "messages": messages}
    values |= {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.max_output_tokens is not None:
        values["max_completion_tokens"] = body.max_output_tokens
    if logprobs:
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.tools:
        values["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    if isinstance(body.tool_choice, ResponseNamedTool):
        values["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    elif body.tool_choice is not None:
        values["tool_choice"] = body.tool_choice
    if body.text is not None and body.text.format is not None:
        form = body.text.format
        if isinstance(form, ResponseJsonSchema):
            schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            values["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            values["response_format"] = {"type": form.type}
    if body.truncation == "auto":
        values["overflow"] = "truncate"
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        raise from_validation(error.errors()) from None


def _add(messages: list[dict[str, Any]], item: Any) -> None:
    """Append an input item; calls belong to the assistant's message before them."""
    if isinstance(item, FunctionCall):
        call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif isinstance(item, FunctionCallOutput):
        messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    else:
        messages.append({"role": item.role, "content": _text(item.content)})


def _text(content: str | list[ResponsePart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class _Output:
    """An answer as output items, and the events in which they come about."""

    def __init__(self, body: ResponsesRequest, answer: Answer) -> None:
        self.body, self.answer = body, answer
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.items: list[dict[str, Any]] = []
        self.status, self.finished = "in_progress", False
        self.error: Mapping[str, Any] | None = None
        self._numbers = itertools.count()

    def response(self) -> dict[str, Any]:
        body, work = self.body, self.answer.work
        form = (
            {"type": "text"}
            if body.text is None or body.text.format is None
            else body.text.format.model_dump(by_alias=True, exclude_none=True)
        )
        choice = body.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "background": False,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                {"strict": True, "parameters": {}, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": {
                "input_tokens": work.prompt_tokens,
                "input_tokens_details": {"cached_tokens": work.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": work.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": work.prompt_tokens + work.completion_tokens,
            }
            if self.finished
            else None,
            "user": body.user,
        }

    def failure(self, error: ApiError) -> bytes:
        """The last event, if the answer breaks off."""
        self.status = "failed"
        self.error = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self.response())

    async def events(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())
        reason = None
        async for news in self.answer.news():
            for delta in news.values():
                for each in self._news(delta):
                    yield each
                reason = delta.finish_reason or reason
        self.finished = True
        self.status = "incomplete" if reason == "length" else "completed"
        if not self.items:
            for each in self._begin_message():
                yield each
        for each in self._end_item():
            yield each
        yield self._event(f"response.{self.status}", response=self.response())

    def _news(self, delta: Delta) -> list[bytes]:
        events: list[bytes] = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta)
            if delta.text.strip() or not delta.calls:
                if not self.items or self.items[-1]["type"] != "message":
                    events += self._begin_message()
                part = self.items[-1]["content"][0]
                part["text"] += delta.text
                part["logprobs"] += logprobs
                events.append(self._of_part("response.output_text.delta", delta=delta.text, logprobs=logprobs))
        for call in delta.calls:
            if call.name is not None:
                events += self._end_item()
                self.items.append(
                    {
                        "id": f"fc_{uuid.uuid4().hex}",
                        "type": "function_call",
                        "status": "in_progress",
                        "call_id": call.id,
                        "name": call.name,
                        "arguments": "",
                    }
                )
                events.append(self._of_item("response.output_item.added"))
            else:
                item = self.items[-1]
                item["arguments"] += call.arguments
                events.append(
                    self._event(
                        "response.function_call_arguments.delta",
                        item_id=item["id"],
                        output_index=len(self.items) - 1,
                        delta=call.arguments,
                    )
                )
        return events

    def _begin_message(self) -> list[bytes]:
        message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.items.append(message)
        added = self._of_item("response.output_item.added")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message["content"].append(part)
        return [added, self._of_part("response.content_part.added", part=part)]

    def _end_item(self) -> list[bytes]:
        """The item that is under way, if there is one, is whole (or never will be)."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = "incomplete" if self.status == "incomplete" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            ends = [
                self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._of_part("response.content_part.done", part=part),
            ]
        else:
            ends = [
                self._event(
                    "response.function_call_arguments.done",
                    item_id=item["id"],
                    output_index=len(self.items) - 1,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            ]
        return [*ends, self._of_item("response.output_item.done")]

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        return [each.model_dump() for each in logprobs_of(self.answer.served.tokenizer, delta.tokens).content]

    def _of_item(self, name: str) -> bytes:
        return self._event(name, output_index=len(self.items) - 1, item=self.items[-1])

    def _of_part(self, name: str, **values: Any) -> bytes:
        return self._event(
            name, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, content_index=0, **values
        )

    def _event(self, name: str, /, **values: Any) -> bytes:
        return event({"type": name, "sequence_number": next(self._numbers), **values}, name)
