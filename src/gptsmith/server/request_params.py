"""From a request's fields to what the engine is asked: sampling parameters, grammars, how answers end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gptsmith.engine.sampling import Constraint, SamplingParams
from gptsmith.errors import GptsmithError
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.models import Served
from gptsmith.server.schema import JsonObjectFormat, JsonSchemaFormat, ResponseFormat, Sampling

SEED_LIMIT = 2**48


def sampling_params(
    body: Sampling,
    served: Served,
    *,
    more_stop: tuple[str, ...] = (),
    more_stop_ids: tuple[int, ...] = (),
    **more: Any,
) -> SamplingParams:
    """What `body` wishes for. more: what its kind of request says in its own way (max_tokens, logprobs, ...).
    more_stop, more_stop_ids: where its answers end besides.

    Raises ApiError 400 for what contradicts itself.
    """
    greedy = (body.beams or 1) > 1
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not text for text in stop):
        raise ApiError(400, "stop: a stop text may not be empty.", param="stop")
    wishes: dict[str, Any] = {
        "temperature": (0.0 if greedy else 1.0) if body.temperature is None else body.temperature,
        "stop": (*stop, *more_stop),
        "logit_bias": _bias(body, served),
        "adapter": served.adapter,
        "min_tokens": body.min_tokens or 0,
        "stop_ids": (*(body.stop_token_ids or ()), *more_stop_ids),
    }
    if body.seed is not None:
        wishes["seed"] = body.seed % SEED_LIMIT
    for name in (
        *("top_p", "n", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p"),
        *("repetition_penalty", "best_of", "beams", "length_penalty", "early_stopping", "overflow"),
    ):
        value = getattr(body, name)
        if value is not None:
            wishes[name] = value
    try:
        return SamplingParams(**(wishes | {name: value for name, value in more.items() if value is not None}))
    except GptsmithError as error:
        raise from_engine(error) from None


def _bias(body: Sampling, served: Served) -> dict[int, float]:
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or not key.isascii() or len(key) > 9 or int(key) >= served.tokenizer.vocab_size:
            most = served.tokenizer.vocab_size - 1
            raise ApiError(400, f"logit_bias: {key[:20]!r} is no token id; they go to {most}.", param="logit_bias")
        bias[int(key)] = float("-inf") if value <= -100 else value
    return bias


async def constraint_of(
    body: Sampling,
    served: Served,
    response_format: ResponseFormat | None,
    *,
    tools: str | None = None,
    end_ids: tuple[int, ...] = (),
) -> Constraint | None:
    """The grammar that a request asks for, if it does: at most one way of saying it. tools: as `tools.Form` wrote it.

    It is made, and tried, in a thread: a large tokenizer's first takes up to a second.
    """
    from gptsmith.engine import grammar

    tokenizer = served.tokenizer
    ways: dict[str, Callable[[], grammar.Grammar]] = {}
    if body.regex is not None:
        pattern = body.regex
        ways["regex"] = lambda: grammar.regex(tokenizer, pattern)
    if body.grammar is not None:
        text = body.grammar
        ways["grammar"] = lambda: grammar.grammar(tokenizer, text)
    if body.choice is not None:
        texts = body.choice
        ways["choice"] = lambda: grammar.choices(tokenizer, texts)
    if isinstance(response_format, JsonObjectFormat):
        ways["response_format"] = lambda: grammar.json_schema(tokenizer, {"type": "object"})
    elif isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
        ways["response_format"] = lambda: grammar.json_schema(tokenizer, schema)
    if tools is not None:
        calls = tools
        ways["tools"] = lambda: grammar.Grammar(tokenizer, calls)
    if not ways:
        return None
    if len(ways) > 1:
        first, second, *_ = ways
        raise ApiError(400, f"{second}: not together with {first}.", param=second)
    ((name, make),) = ways.items()

    def tried() -> Constraint:
        constraint = make()
        constraint.end_ids = (*end_ids, *(body.stop_token_ids or ()))
        constraint.start()
        return constraint

    try:
        return await asyncio.to_thread(tried)
    except GptsmithError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None


async def encoded(encode: Callable[[], list[int]], length: int) -> list[int]:
    """`encode()`, in a thread if the text is long. Raises ApiError 400 for what cannot be encoded."""
    try:
        return encode() if length < 10_000 else await asyncio.to_thread(encode)
    except GptsmithError as error:
        raise from_engine(error) from None


def check_stream(body: Sampling) -> None:
    """Raises ApiError 400 for what cannot be streamed, or is only for streams."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream.", param="stream_options")
    if body.stream:
        for name, least in (("best_of", body.n or 1), ("beams", 1)):
            if (getattr(body, name) or 1) > least:
                raise ApiError(400, f"{name}: not with stream; which are best is known at the end.", param=name)
