"""POST /v1/chat/completions: conversations continued."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.text import Detokenizer, TextToken
from gptsmith.server.completions import finish_reason
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Job, Work
from gptsmith.server.models import Served
from gptsmith.server.request_params import check_stream, constraint_of, encoded, sampling_params
from gptsmith.server.schema import (
    AnswerMessage,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    NamedTool,
    TextFormat,
    ToolCall,
    TopLogprob,
)
from gptsmith.server.service import Service, check_length, service_of, usage_of
from gptsmith.server.sse import DONE, event, event_stream
from gptsmith.server.tools import CallPiece, Form, Reader
from gptsmith.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
async def chat(body: ChatRequest, request: Request) -> Any:
    """Continue a conversation."""
    answer = await begin_answer(service_of(request), request, body)
    frame: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return event_stream(_chunks(answer, {**frame, "object": "chat.completion.chunk"}, usage))
    choices = [
        ChatChoice(
            index=choice,
            message=AnswerMessage(content=whole.content, tool_calls=whole.tool_calls or None),
            logprobs=logprobs_of(answer.served.tokenizer, whole.tokens) if answer.logprobs else None,
            finish_reason=whole.finish_reason or "stop",
        )
        for choice, whole in sorted((await answer.whole()).items())
    ]
    return ChatCompletion(**frame, choices=choices, usage=usage_of(answer.work))


async def _chunks(answer: Answer, frame: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
    nothing = {"usage": None} if usage else {}
    begun: set[int] = set()
    async for news in answer.news():
        for choice, delta in news.items():
            for change in _changes(delta):
                if choice not in begun:
                    begun.add(choice)
                    change["delta"] = {"role": "assistant", **change["delta"]}
                if delta.tokens:
                    change["logprobs"] = logprobs_of(answer.served.tokenizer, delta.tokens).model_dump()
                    delta.tokens = []
                yield event({**frame, "choices": [{"index": choice, "logprobs": None, **change}], **nothing})
    if usage:
        yield event({**frame, "choices": [], "usage": usage_of(answer.work).model_dump()})
    yield DONE


def _changes(delta: Delta) -> list[dict[str, Any]]:
    """What a choice has more of, one after another."""
    changes: list[dict[str, Any]] = []
    if delta.text or (delta.tokens and not delta.calls):
        changes.append({"content": delta.text})
    for call in delta.calls:
        known: dict[str, Any] = {"index": call.index}
        if call.name is not None:
            known |= {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        else:
            known["function"] = {"arguments": call.arguments}
        changes.append({"tool_calls": [known]})
    chunks: list[dict[str, Any]] = [{"delta": change, "finish_reason": None} for change in changes]
    if delta.finish_reason is not None:
        chunks.append({"delta": {}, "finish_reason": delta.finish_reason})
    return chunks


# An answer, for chat completions and for responses ------------------------------------------------------------------


@dataclass(frozen=True)
class Call(CallPiece):
    """News of a call, which has an id."""

    id: str


@dataclass
class Delta:
    """What is new of one choice. finish_reason: with its last."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


@dataclass
class Whole:
    """One choice from beginning to end."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None

    @property
    def content(self) -> str | None:
        return None if self.tool_calls and not self.text.strip() else self.text


class Answer:
    """What comes of a conversation: for each choice text, and calls if the conversation has tools."""

    def __init__(self, served: Served, work: Work, form: Form | None, *, logprobs: bool) -> None:
        self.served, self.work, self.logprobs = served, work, logprobs
        self._form = form
        self._readers: dict[int, Reader] = {}
        self._ids: dict[tuple[int, int], str] = {}
        self._begun: set[int] = set()

    async def news(self) -> AsyncIterator[dict[int, Delta]]:
        """What is new of each choice, again and again until the end. Raises ApiError."""
        async for pieces in self.work.pieces():
            deltas: dict[int, Delta] = {}
            for choice, piece in pieces:
                delta = deltas.setdefault(choice, Delta())
                delta.tokens += piece.tokens
                text, calls = piece.text, 0
                if self._form is not None:
                    reader = self._readers.setdefault(choice, Reader(self._form))
                    text, news = reader.push(text)
                    if piece.finish_reason is not None:
                        text += reader.finish()
                    delta.calls += [self._call(choice, each) for each in news]
                    calls = reader.calls
                if self.served.template.plain and choice not in self._begun:
                    text = text.lstrip()  # such templates leave the space after "Assistant:" to the model
                if text:
                    self._begun.add(choice)
                delta.text += text
                reason = finish_reason(piece.finish_reason)
                delta.finish_reason = "tool_calls" if calls and reason == "stop" else reason
            yield deltas

    async def whole(self) -> dict[int, Whole]:
        """All of it, by choice. Raises ApiError."""
        choices: dict[int, Whole] = {}
        async for news in self.news():
            for choice, delta in news.items():
                whole = choices.setdefault(choice, Whole())
                whole.text += delta.text
                whole.tokens += delta.tokens
                whole.finish_reason = delta.finish_reason or whole.finish_reason
                for call in delta.calls:
                    if call.name is not None:
                        function = CalledFunction(name=call.name, arguments="")
                        whole.tool_calls.append(ToolCall(id=call.id, function=function))
                    whole.tool_calls[call.index].function.arguments += call.arguments
        return choices

    def _call(self, choice: int, piece: CallPiece) -> Call:
        id = self._ids.setdefault((choice, piece.index), f"call_{uuid.uuid4().hex[:24]}")
        return Call(piece.index, piece.name, piece.arguments, id)


async def begin_answer(service: Service, request: Request, body: ChatRequest) -> Answer:
    """Have the engine begin with an answer, and wait for its first text. Raises ApiError."""
    check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_completion_tokens: not together with max_tokens.", param="max_completion_tokens")
    served = await service.served(request, body.model)
    template = served.template
    form, grammar = _tools(body, served)
    messages = template_messages(body.messages)
    tools = None if form is None else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    length = sum(len(str(message.get("content"))) for message in messages)
    ids = await encoded(lambda: template.encode(messages, tools=tools), length)
    check_length(served, ids, body.overflow)
    response_format = None if isinstance(body.response_format, TextFormat) else body.response_format
    ends = template.end_ids()
    params = sampling_params(
        body,
        served,
        max_tokens=body.max_completion_tokens or body.max_tokens or max(1, served.loaded.context - len(ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=await constraint_of(body, served, response_format, tools=grammar, end_ids=ends),
        more_stop=template.stop,
        more_stop_ids=() if body.ignore_eos else ends,
    )
    writing = Detokenizer(
        served.tokenizer, "", params, ignore_eos=bool(body.ignore_eos), skip_special_tokens=form is None
    )
    work = await service.begin(request, served, [Job(ids, writing)])
    return Answer(served, work, form, logprobs=bool(body.logprobs))


def _tools(body: ChatRequest, served: Served) -> tuple[Form | None, str | None]:
    """How calls are written, and the grammar of answers with them; None where there are to be none."""
    choice = body.tool_choice or "auto"
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: there are no tools to choose from.", param="tool_choice")
        return None, None
    if choice == "none":
        return None, None
    form = served.loaded.form
    if form is None:
        message = f"tools: the chat template of {served.name} does not know tools."
        raise ApiError(400, message, param="tools", code="unsupported_parameter")
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two have the same name.", param="tools")
    mode, several = "auto", body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise ApiError(400, f"tool_choice: {choice.function.name!r} is none of the tools.", param="tool_choice")
        mode, several = "required", False
    elif choice == "required":
        mode = "required"
    return form, form.grammar([function.model_dump() for function in functions], mode, several=several)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them. Raises ApiError."""
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: ChatMessage, place: int) -> dict[str, Any]:
    """Content as one text, arguments as objects."""
    values: dict[str, Any] = message.model_dump(exclude_none=True)
    content = values.get("content")
    values["content"] = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    if values["role"] == "developer":
        values["role"] = "system"
    if isinstance(message, AssistantMessage):
        if message.content is None and not message.tool_calls:
            raise ApiError(400, f"messages.{place}.content: missing.", param=f"messages.{place}.content")
        for call in values.get("tool_calls", ()):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"], place)
    return values


def _arguments(text: str, place: int) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        where = f"messages.{place}.tool_calls"
        raise ApiError(400, f"{where}: arguments that are no JSON object: {error}.", param=where) from None
    return arguments


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
