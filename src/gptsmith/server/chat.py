"""POST /v1/chat/completions: chat completion."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.grammar import without_unknown_formats
from gptsmith.engine.text import Detokenizer, TextToken
from gptsmith.errors import GptsmithError
from gptsmith.server.completions import finish_reason
from gptsmith.server.errors import ApiError
from gptsmith.server.generation import Generation, Job
from gptsmith.server.images import check_pictures, load_pictures, pictures_of, placed
from gptsmith.server.models import ServedModel
from gptsmith.server.request_params import check_stream, constraint_of, encode, sampling_params
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
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    TemplateOptions,
    TextFormat,
    ToolCall,
    TopLogprob,
)
from gptsmith.server.service import Service, check_length, service_of, usage_of
from gptsmith.server.sse import DONE, event, event_stream
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.harmony import HarmonyParser, split
from gptsmith.tokenizer.tokenizer import readable
from gptsmith.tokenizer.tools import ToolCallDelta, ToolCallFormat, ToolCallParser

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
async def chat(body: ChatRequest, request: Request) -> Any:
    """Answer in a conversation."""
    answer = await start_answer(service_of(request), request, body)
    envelope: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return event_stream(_events(answer, {**envelope, "object": "chat.completion.chunk"}, include_usage))
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(
                content=choice.content,
                reasoning_content=choice.reasoning or None,
                tool_calls=choice.tool_calls or None,
            ),
            logprobs=logprobs_of(answer.served.tokenizer, choice.tokens) if answer.logprobs else None,
            finish_reason=choice.finish_reason or "stop",
        )
        for index, choice in sorted((await answer.collect()).items())
    ]
    return ChatCompletion(**envelope, choices=choices, usage=usage_of(answer.generation))


async def _events(answer: Answer, envelope: dict[str, Any], include_usage: bool) -> AsyncIterator[bytes]:
    no_usage = {"usage": None} if include_usage else {}
    started: set[int] = set()
    async for deltas in answer.deltas():
        for index, delta in deltas.items():
            for choice in _stream_choices(delta):
                if index not in started:
                    started.add(index)
                    choice["delta"] = {"role": "assistant", **choice["delta"]}
                if delta.tokens:
                    choice["logprobs"] = logprobs_of(answer.served.tokenizer, delta.tokens).model_dump()
                    delta.tokens = []
                yield event({**envelope, "choices": [{"index": index, "logprobs": None, **choice}], **no_usage})
    if include_usage:
        yield event({**envelope, "choices": [], "usage": usage_of(answer.generation).model_dump()})
    yield DONE


def _stream_choices(delta: ChoiceDelta) -> list[dict[str, Any]]:
    """Return a delta as OpenAI streams it: text, then pieces of tool calls, then the finish reason.

    Reasoning comes first, in a field that OpenAI does not have and others share.
    """
    contents: list[dict[str, Any]] = []
    if delta.reasoning:
        contents.append({"reasoning_content": delta.reasoning})
    if delta.text or (delta.tokens and not delta.calls and not delta.reasoning):
        contents.append({"content": delta.text})
    for call in delta.calls:
        entry: dict[str, Any] = {"index": call.index}
        if call.name is not None:
            entry |= {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        else:
            entry["function"] = {"arguments": call.arguments}
        contents.append({"tool_calls": [entry]})
    choices: list[dict[str, Any]] = [{"delta": content, "finish_reason": None} for content in contents]
    if delta.finish_reason is not None:
        choices.append({"delta": {}, "finish_reason": delta.finish_reason})
    return choices


# An answer, for chat completions and for responses ------------------------------------------------------------------


@dataclass
class ChoiceDelta:
    """What is new in one choice. finish_reason: set in the last delta."""

    text: str = ""
    reasoning: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


@dataclass
class Choice:
    """One choice, complete."""

    text: str = ""
    reasoning: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None

    @property
    def content(self) -> str | None:
        return None if self.tool_calls and not self.text.strip() else self.text


class Answer:
    """The answer to a conversation. Each choice has text and, if the request has tools, tool calls.

    make_parser: what tells text, reasoning and calls apart; None: all is text. strips: whether to remove white space at
    the beginning. in_channels: whether there can be reasoning.
    """

    def __init__(
        self,
        served: ServedModel,
        generation: Generation,
        make_parser: Callable[[], ToolCallParser | HarmonyParser] | None,
        *,
        in_channels: bool,
        logprobs: bool,
        strips: bool,
    ) -> None:
        self.served, self.generation, self.logprobs, self._strips = served, generation, logprobs, strips
        self._make_parser, self.in_channels = make_parser, in_channels
        self._parsers: dict[int, ToolCallParser | HarmonyParser] = {}
        self._has_text: set[int] = set()

    async def deltas(self) -> AsyncIterator[dict[int, ChoiceDelta]]:
        """Yield what is new, by choice index, until the end. Raise ApiError."""
        async for chunks in self.generation.chunks():
            deltas: dict[int, ChoiceDelta] = {}
            for index, chunk in chunks:
                delta = deltas.setdefault(index, ChoiceDelta())
                delta.tokens += chunk.tokens
                text, has_calls = chunk.text, False
                if self._make_parser is not None:
                    parser = self._parsers.get(index) or self._parsers.setdefault(index, self._make_parser())
                    text, reasoning, calls = split(parser, text, last=chunk.finish_reason is not None)
                    delta.reasoning += reasoning
                    delta.calls += calls
                    has_calls = parser.calls > 0 and not parser.in_call
                if self._strips and index not in self._has_text:
                    text = text.lstrip()
                if text:
                    self._has_text.add(index)
                delta.text += text
                reason = finish_reason(chunk.finish_reason)
                delta.finish_reason = "tool_calls" if has_calls and reason == "stop" else reason
            yield deltas

    async def collect(self) -> dict[int, Choice]:
        """Return the complete choices, by index. Raise ApiError."""
        choices: dict[int, Choice] = {}
        async for deltas in self.deltas():
            for index, delta in deltas.items():
                choice = choices.setdefault(index, Choice())
                choice.text += delta.text
                choice.reasoning += delta.reasoning
                choice.tokens += delta.tokens
                choice.finish_reason = delta.finish_reason or choice.finish_reason
                for call in delta.calls:
                    if call.name is not None:
                        function = CalledFunction(name=call.name, arguments="")
                        choice.tool_calls.append(ToolCall(id=call.id, function=function))
                    choice.tool_calls[call.index].function.arguments += call.arguments
        return choices


async def start_answer(service: Service, request: Request, body: ChatRequest) -> Answer:
    """Start generating the answer to a conversation, and wait for its first text. Raise ApiError."""
    check_stream(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs requires logprobs=true.", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_completion_tokens cannot be combined with max_tokens.", param="max_completion_tokens")
    served = await service.served(request, body.model)
    template = served.template
    tool_format, tool_grammar = _tool_format(body, served)
    messages = template_messages(body.messages)
    tools = None if tool_format is None else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    pictures = pictures_of(body.messages)
    check_pictures(service, served, pictures)
    written = await conversation_ids(template, messages, body, tools=tools, **effort)
    harmony, in_text = template.harmony, bool(body.continue_final_message)
    constrained = isinstance(body.response_format, JsonObjectFormat | JsonSchemaFormat)
    constrained = constrained or any(each is not None for each in (body.regex, body.grammar, body.choice))
    if harmony is not None and constrained and not in_text and body.add_generation_prompt is not False:
        written = [*written, *harmony.final_ids(served.tokenizer)]  # what is asked for is the text, without reasoning
        in_text = True
    prompt = placed(served, written, await load_pictures(service, request, served, pictures))
    ids = prompt.ids
    starts_turn = not body.continue_final_message and body.add_generation_prompt is not False
    check_length(served, ids, body.overflow)
    response_format = None if isinstance(body.response_format, TextFormat) else body.response_format
    end_ids = template.end_ids()
    params = sampling_params(
        body,
        served,
        max_tokens=body.max_completion_tokens or body.max_tokens or max(1, served.loaded.context - len(ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=await constraint_of(body, served, response_format, tools=tool_grammar, end_ids=end_ids),
        more_stop=template.stop,
        more_stop_ids=() if body.ignore_eos else end_ids,
    )
    special = served.tokenizer.special_tokens().values()
    marks_calls = harmony is not None or (
        tool_format is not None and any(token in tool_format.texts for token in special)
    )
    detokenizer = Detokenizer(
        served.tokenizer,
        "",
        params,
        skip_special_tokens=not marks_calls,
        prompt_ids=() if starts_turn else ids,
    )
    generation = await service.start(request, served, [Job(prompt, detokenizer)])
    strips = template.plain and starts_turn  # the plain template leaves the space after "Assistant:" to the model
    make_parser: Callable[[], ToolCallParser | HarmonyParser] | None = None
    if harmony is not None:
        make_parser = partial(HarmonyParser, in_text=in_text)
    elif tool_format is not None:
        make_parser = partial(ToolCallParser, tool_format)
    return Answer(
        served,
        generation,
        make_parser,
        in_channels=harmony is not None,
        logprobs=bool(body.logprobs),
        strips=strips,
    )


_OWN_VARIABLES = {
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
    *("generic_tools", "return_mask", "train_on", "self"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
}


async def conversation_ids(
    template: ChatTemplate, messages: list[dict[str, Any]], body: TemplateOptions, **variables: Any
) -> list[int]:
    """Return the ids of a conversation, written as `body` asks for. variables: of the template. Raise ApiError 400."""
    if body.continue_final_message:
        if body.add_generation_prompt:
            message = "continue_final_message cannot be combined with add_generation_prompt."
            raise ApiError(400, message, param="continue_final_message")
        last = messages[-1]
        if last["role"] != "assistant" or last.get("tool_calls"):
            found = "has tool calls" if last["role"] == "assistant" else f"has the role {last['role']}"
            message = f"continue_final_message needs an assistant's text as the last message, which {found}."
            raise ApiError(400, message, param="continue_final_message")
    more = body.chat_template_kwargs or {}
    for name, value in more.items():
        param = f"chat_template_kwargs.{name}"
        if name in _OWN_VARIABLES:
            own = name in body.__class__.model_fields
            raise ApiError(400, f"{param}: {'send it as a field of its own' if own else 'cannot be set'}.", param=param)
        if name in variables:
            raise ApiError(400, f"{param} cannot be combined with {name}.", param=param)
        if name in ("enable_thinking", "thinking") and not isinstance(value, bool | None):
            raise ApiError(400, f"{param} must be true or false, not {json.dumps(value)[:60]}.", param=param)
    return await encode(
        lambda: template.encode(
            messages,
            add_generation_prompt=False if body.continue_final_message else body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            generic_tools=True,
            **(variables | more),
        ),
        sum(len(str(message)) for message in messages),
    )


def _tool_format(body: ChatRequest, served: ServedModel) -> tuple[ToolCallFormat | None, str | None]:
    """Return the format of tool calls and the grammar of answers with them; None for a request without tools.

    Raise ApiError 400.
    """
    choice = body.tool_choice or "auto"
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice requires tools.", param="tool_choice")
        return None, None
    if choice == "none":
        return None, None
    tool_format = served.template.tool_format
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have the same name.", param="tools")
    mode, several = "auto", body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            message = f"tool_choice: {choice.function.name!r} is not one of the tools."
            raise ApiError(400, message, param="tool_choice")
        mode, several = "required", False
    elif choice == "required":
        mode = "required"
    described = [
        {**function.model_dump(), "parameters": without_unknown_formats(function.parameters)} for function in functions
    ]
    try:
        harmony = served.template.harmony
        if harmony is not None:
            return tool_format, harmony.grammar(described, mode)
        grammar = tool_format.grammar(described, mode, several=several)
    except GptsmithError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from None
    return tool_format, grammar


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: contents as one text, or as parts where there is a picture among
    them, and arguments as objects. Raise ApiError 400."""
    return [_template_message(message, i) for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    values: dict[str, Any] = message.model_dump(exclude_none=True)
    content = values.get("content")
    if isinstance(content, list) and any(part["type"] == "image_url" for part in content):
        values["content"] = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
    else:
        values["content"] = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    if values["role"] == "developer":
        values["role"] = "system"
    if isinstance(message, AssistantMessage):
        if message.content is None and not message.tool_calls:
            raise ApiError(400, f"messages.{index}.content is missing.", param=f"messages.{index}.content")
        for call in values.get("tool_calls", ()):
            call["function"]["arguments"] = _parse_arguments(call["function"]["arguments"], index)
    return values


def _parse_arguments(text: str, index: int) -> dict[str, Any]:
    field = f"messages.{index}.tool_calls"
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{field}: the arguments are not valid JSON: {error}.", param=field) from None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{field}: the arguments are not a JSON object.", param=field)
    return arguments


def logprobs_of(tokenizer: Tokenizer, tokens: list[TextToken]) -> ChatLogprobs:
    """Return log-probabilities as OpenAI does. Special tokens, which add nothing to the text, have no bytes."""
    special = tokenizer.special_tokens()

    def entry(id: int, value: float, previous: int | None) -> dict[str, Any]:
        written = tokenizer.token_bytes(id, previous)
        return {"token": readable(written), "logprob": value, "bytes": [] if id in special else list(written)}

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **entry(token.id, token.logprob.logprob, token.previous),
                top_logprobs=[TopLogprob(**entry(id, value, token.previous)) for id, value in token.logprob.top],
            )
            for token in tokens
            if token.logprob is not None
        ]
    )
