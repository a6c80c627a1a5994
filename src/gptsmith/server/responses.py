"""POST /v1/responses: the text part of OpenAI's Responses API. It is stateless: a request contains the conversation.

Requests are translated to chat completions, and answers to output items and named events.
"""

from __future__ import annotations

import itertools
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from gptsmith.server.chat import Answer, ChoiceDelta, logprobs_of, start_answer
from gptsmith.server.errors import ApiError, from_validation
from gptsmith.server.schema import (
    ChatRequest,
    FunctionCall,
    FunctionCallOutput,
    ReasoningItem,
    ResponseImage,
    ResponseJsonSchema,
    ResponseNamedTool,
    ResponsePart,
    ResponsesRequest,
)
from gptsmith.server.service import service_of
from gptsmith.server.sse import event, event_stream

router = APIRouter()
_SHARED_FIELDS = (
    *("temperature", "top_p", "seed", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("ignore_eos", "cache_prompt", "regex", "grammar", "choice", "parallel_tool_calls", "chat_template_kwargs"),
)


@router.post("/v1/responses", tags=["OpenAI"], response_model=dict[str, Any])
async def respond(body: ResponsesRequest, request: Request) -> Any:
    """Answer in a conversation, in the format of the Responses API."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options requires stream=true.", param="stream_options")
    try:
        answer = await start_answer(service_of(request), request, _as_chat(body))
    except ApiError as error:
        raise _in_fields_of(body, error) from None
    output = _Output(body, answer)
    if body.stream:
        return event_stream(output.events(), output.failure)
    async for _ in output.events():
        pass
    return JSONResponse(output.response())


_CHAT_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "overflow": "truncation",
}


def _in_fields_of(body: ResponsesRequest, error: ApiError) -> ApiError:
    """Return an error of a chat request that names the field of the response request instead."""
    picture = re.fullmatch(r"messages\[(\d+)\](\..+)", error.param or "")
    if picture is not None:
        param = f"input[{_message_items(body)[int(picture[1])]}]{picture[2]}"
        return ApiError(error.status, error.message.replace(str(error.param), param), param=param, code=error.code)
    field, dot, rest = (error.param or "").partition(".")
    if field not in _CHAT_FIELDS:
        return error
    param = _CHAT_FIELDS[field]
    if field == "messages" and dot and not isinstance(body.input, str):
        number, _, rest = rest.partition(".")
        items = _message_items(body)
        item = items[int(number)] if number.isdecimal() and int(number) < len(items) else None
        param = "instructions" if item is None else f"{param}.{item}"
        if rest == "tool_calls" and isinstance(item, int):
            call = next((i for i in range(item, len(body.input)) if isinstance(body.input[i], FunctionCall)), item)
            param, rest = f"{_CHAT_FIELDS[field]}.{call}", "arguments"
        dot = "." if rest else ""
    param = f"{param}{dot}{rest}"
    message = error.message
    if error.param is not None and message.startswith(error.param):
        message = param + message[len(error.param) :]
    return ApiError(error.status, message, param=param, code=error.code, retry_after=error.retry_after)


def _message_items(body: ResponsesRequest) -> list[int | None]:
    """Return the number of the input item that each chat message begins with; None for the instructions."""
    messages: list[dict[str, Any]] = []
    numbers: list[int | None] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
        numbers.append(None)
    for i, item in enumerate(body.input):
        _append(messages, item)
        numbers += [i] * (len(messages) - len(numbers))
    return numbers


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    logprobs = "message.output_text.logprobs" in (body.include or ())
    if body.top_logprobs and not logprobs:
        message = 'top_logprobs requires include=["message.output_text.logprobs"].'
        raise ApiError(400, message, param="top_logprobs")
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            _append(messages, item)
    values: dict[str, Any] = {"model": body.model, "messages": messages}
    values |= {name: getattr(body, name) for name in _SHARED_FIELDS if getattr(body, name) is not None}
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
        text_format = body.text.format
        if isinstance(text_format, ResponseJsonSchema):
            schema = text_format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
            values["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            values["response_format"] = {"type": text_format.type}
    if body.reasoning is not None:
        values["reasoning_effort"] = body.reasoning.effort
    if body.truncation == "auto":
        values["overflow"] = "truncate"
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        raise from_validation(error.errors()) from None


def _append(messages: list[dict[str, Any]], item: Any) -> None:
    """Append an input item to the chat messages. A call becomes part of the assistant's message before it."""
    if isinstance(item, ReasoningItem):
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "".join(part.text for part in item.content or ()),
            }
        )
    elif isinstance(item, FunctionCall):
        call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif isinstance(item, FunctionCallOutput):
        messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    elif item.role == "assistant" and messages and _is_reasoning(messages[-1]):
        messages[-1]["content"] = _content(item.content)
    else:
        messages.append({"role": item.role, "content": _content(item.content)})


def _is_reasoning(message: dict[str, Any]) -> bool:
    """Return whether a message has reasoning, and so far nothing else."""
    return "reasoning_content" in message and not message["content"] and "tool_calls" not in message


def _text(content: str | list[ResponsePart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _content(content: str | list[ResponsePart | ResponseImage]) -> str | list[dict[str, Any]]:
    """Return the content of a message, as parts where there is a picture among them."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, ResponseImage):
            parts.append({"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts if any(part["type"] == "image_url" for part in parts) else "".join(part["text"] for part in parts)


class _Output:
    """An answer as output items, and the events that build them up."""

    def __init__(self, body: ResponsesRequest, answer: Answer) -> None:
        self.body, self.answer = body, answer
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.items: list[dict[str, Any]] = []
        self.status, self.finished = "in_progress", False
        self.error: Mapping[str, Any] | None = None
        self._sequence_numbers = itertools.count()

    def response(self) -> dict[str, Any]:
        body, generation = self.body, self.answer.generation
        text_format = (
            {"type": "text"}
            if body.text is None or body.text.format is None
            else body.text.format.model_dump(by_alias=True, exclude_none=True)
        )
        tool_choice = body.tool_choice or "auto"
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
            "text": {"format": text_format},
            "tool_choice": tool_choice if isinstance(tool_choice, str) else tool_choice.model_dump(),
            "tools": [
                {"strict": True, "parameters": {}, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": {
                "input_tokens": generation.prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": generation.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens()},
                "total_tokens": generation.prompt_tokens + generation.completion_tokens,
            }
            if self.finished
            else None,
            "user": body.user,
        }

    def _reasoning_tokens(self) -> int:
        """Return how many tokens the reasoning is, without what marks it."""
        texts = (item["content"][0]["text"] for item in self.items if item["type"] == "reasoning")
        return sum(len(self.answer.served.tokenizer.encode(text)) for text in texts)

    def failure(self, error: ApiError) -> bytes:
        """Return the last event of an answer that failed."""
        self.status = "failed"
        self.error = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self.response())

    async def events(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())
        reason = None
        async for deltas in self.answer.deltas():
            for delta in deltas.values():
                for each in self._delta_events(delta):
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

    def _delta_events(self, delta: ChoiceDelta) -> list[bytes]:
        events: list[bytes] = []
        if delta.reasoning:
            if not self.items or self.items[-1]["type"] != "reasoning":
                events += [*self._end_item(), *self._begin_reasoning()]
            self.items[-1]["content"][0]["text"] += delta.reasoning
            events.append(self._part_event("response.reasoning_text.delta", delta=delta.reasoning))
        in_message = bool(self.items) and self.items[-1]["type"] == "message"
        if delta.text or (delta.tokens and (in_message or not self.answer.in_channels)):
            logprobs = self._logprobs(delta)
            if delta.text.strip() or not delta.calls:
                if not in_message:
                    events += [*self._end_item(), *self._begin_message()]
                part = self.items[-1]["content"][0]
                part["text"] += delta.text
                part["logprobs"] += logprobs
                events.append(self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs))
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
                events.append(self._item_event("response.output_item.added"))
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

    def _begin_reasoning(self) -> list[bytes]:
        part = {"type": "reasoning_text", "text": ""}
        self.items.append(
            {
                "id": f"rs_{uuid.uuid4().hex}",
                "type": "reasoning",
                "status": "in_progress",
                "summary": [],
                "content": [part],
            }
        )
        added = self._item_event("response.output_item.added")
        return [added, self._part_event("response.content_part.added", part=part)]

    def _begin_message(self) -> list[bytes]:
        message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.items.append(message)
        added = self._item_event("response.output_item.added")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        message["content"].append(part)
        return [added, self._part_event("response.content_part.added", part=part)]

    def _end_item(self) -> list[bytes]:
        """Close the current output item, if there is one, as completed or incomplete."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = "incomplete" if self.status == "incomplete" else "completed"
        if item["type"] == "reasoning":
            part = item["content"][0]
            done = [
                self._part_event("response.reasoning_text.done", text=part["text"]),
                self._part_event("response.content_part.done", part=part),
            ]
        elif item["type"] == "message":
            part = item["content"][0]
            done = [
                self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._part_event("response.content_part.done", part=part),
            ]
        else:
            done = [
                self._event(
                    "response.function_call_arguments.done",
                    item_id=item["id"],
                    output_index=len(self.items) - 1,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            ]
        return [*done, self._item_event("response.output_item.done")]

    def _logprobs(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        return [each.model_dump() for each in logprobs_of(self.answer.served.tokenizer, delta.tokens).content]

    def _item_event(self, name: str) -> bytes:
        return self._event(name, output_index=len(self.items) - 1, item=self.items[-1])

    def _part_event(self, name: str, **values: Any) -> bytes:
        return self._event(
            name, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, content_index=0, **values
        )

    def _event(self, name: str, /, **values: Any) -> bytes:
        return event({"type": name, "sequence_number": next(self._sequence_numbers), **values}, name)
