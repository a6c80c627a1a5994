"""Convert the fields of a request to what the engine takes: token ids, sampling parameters and grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gptsmith.engine.sampling import SAMPLING_OPTIONS, Constraint, SamplingParams
from gptsmith.engine.text import encode_prompt
from gptsmith.errors import GptsmithError
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.models import SERVER_SAMPLING, ServedModel
from gptsmith.server.schema import GenerationRequest, JsonObjectFormat, JsonSchemaFormat, ResponseFormat

SEED_LIMIT = 2**48
_CONVERTED = ("temperature", "stop", "seed", "logit_bias")
_UNCHANGED = [name for name in GenerationRequest.model_fields if name in SAMPLING_OPTIONS and name not in _CONVERTED]


def sampling_params(
    body: GenerationRequest,
    served: ServedModel,
    *,
    more_stop: tuple[str, ...] = (),
    more_stop_ids: tuple[int, ...] = (),
    **more: Any,
) -> SamplingParams:
    """Return the sampling parameters a request asks for: its own, then the model's defaults, then the server's.

    more_stop, more_stop_ids: further stop strings and tokens, such as the end of turn of a chat template.
    more: parameters that the endpoints name differently (max_tokens, logprobs, …); None: the default.
    Raise ApiError 400 for values out of range and for contradictions.
    """
    beam_search = (body.beams or 1) > 1
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not text for text in stop):
        raise ApiError(400, "stop must not contain an empty string.", param="stop")
    defaults = {"temperature": SERVER_SAMPLING.temperature, **served.loaded.defaults.options}
    params: dict[str, Any] = {
        **defaults,
        "temperature": (0.0 if beam_search else defaults["temperature"])
        if body.temperature is None
        else body.temperature,
        "stop": (*stop, *more_stop),
        "logit_bias": _logit_bias(body, served),
        "adapter": served.adapter,
        "stop_ids": (*(body.stop_token_ids or ()), *more_stop_ids),
    }
    if body.seed is not None:
        params["seed"] = body.seed % SEED_LIMIT
    for name in _UNCHANGED:
        value = getattr(body, name)
        if value is not None:
            params[name] = value
    if params.get("top_k") in (0, -1):  # as in llama.cpp and vLLM: all tokens
        del params["top_k"]
    if params.get("top_p") == 0:  # the most probable token only
        params["top_p"] = 1e-9
    try:
        return SamplingParams(**(params | {name: value for name, value in more.items() if value is not None}))
    except GptsmithError as error:
        raise from_engine(error) from None


def _logit_bias(body: GenerationRequest, served: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in (body.logit_bias or {}).items():
        if not key.isdecimal() or not key.isascii() or len(key) > 9 or int(key) >= served.tokenizer.vocab_size:
            largest = served.tokenizer.vocab_size - 1
            raise ApiError(
                400, f"logit_bias: {key[:20]!r} is not a token id of this model (0 to {largest}).", param="logit_bias"
            )
        bias[int(key)] = float("-inf") if value <= -100 else value
    return bias


async def constraint_of(
    body: GenerationRequest,
    served: ServedModel,
    response_format: ResponseFormat | None,
    *,
    tools: str | None = None,
    end_ids: tuple[int, ...] = (),
) -> Constraint | None:
    """Return the constraint a request asks for, if any. tools: a grammar made by `ToolCallFormat.grammar`.

    It is built and started in a thread: the first one for a large tokenizer takes up to a second.
    Raise ApiError 400 for more than one kind of constraint, and for one that is invalid.
    """
    from gptsmith.engine import grammar

    tokenizer = served.tokenizer
    kinds: dict[str, Callable[[], grammar.Grammar]] = {}
    if body.regex is not None:
        pattern = body.regex
        kinds["regex"] = lambda: grammar.regex(tokenizer, pattern)
    if body.grammar is not None:
        text = body.grammar
        kinds["grammar"] = lambda: grammar.grammar(tokenizer, text)
    if body.choice is not None:
        texts = body.choice
        kinds["choice"] = lambda: grammar.choices(tokenizer, texts)
    if isinstance(response_format, JsonObjectFormat):
        kinds["response_format"] = lambda: grammar.json_schema(tokenizer, {"type": "object"})
    elif isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
        kinds["response_format"] = lambda: grammar.json_schema(tokenizer, schema)
    if tools is not None:
        calls = tools
        kinds["tools"] = lambda: grammar.Grammar(tokenizer, calls)
    if not kinds:
        return None
    if len(kinds) > 1:
        first, second, *_ = kinds
        raise ApiError(400, f"{second} cannot be combined with {first}.", param=second)
    ((name, make),) = kinds.items()
    if (body.beams or 1) > 1:
        raise ApiError(400, f"{name} cannot be combined with beams.", param=name)

    def build() -> Constraint:
        constraint = make()
        constraint.end_ids = (*end_ids, *(body.stop_token_ids or ()))
        constraint.start()  # fails if the grammar is invalid
        return constraint

    try:
        return await asyncio.to_thread(build)
    except GptsmithError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None


def split_inputs(value: str | list[str] | list[int] | list[list[int]], field: str, limit: int) -> list[str | list[int]]:
    """Return the inputs in a field that takes a text, a list of token ids, or a list of either.

    Raise ApiError 400 for none, and for more than `limit`.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise ApiError(400, f"{field} is empty.", param=field)
    if isinstance(value[0], int):
        return [value]
    if len(value) > limit:
        raise ApiError(400, f"{field} has {len(value)} items; at most {limit} are allowed.", param=field)
    return list(value)


async def input_ids(served: ServedModel, value: str | list[int], field: str) -> list[int]:
    """Return the token ids of one input. Raise ApiError 400 for text that cannot be encoded and for invalid ids."""
    tokenizer, placeholder = served.tokenizer, served.model.config.image_token_id
    if isinstance(value, str):
        return await encode(lambda: encode_prompt(tokenizer, value), len(value))
    if not value:
        raise ApiError(400, f"{field} contains an empty list of token ids.", param=field)
    if max(value) >= tokenizer.vocab_size:
        largest = tokenizer.vocab_size - 1
        raise ApiError(400, f"{field}: {max(value)} is not a token id of this model (0 to {largest}).", param=field)
    if placeholder in value:
        message = f"{field}: {placeholder} stands for a picture. Send pictures in the messages of a chat completion."
        raise ApiError(400, message, param=field)
    return value


async def encode(function: Callable[[], list[int]], length: int) -> list[int]:
    """Return `function()`, which encodes a text of `length` characters; in a thread if it is long.

    Raise ApiError 400 for text that cannot be encoded.
    """
    try:
        return function() if length < 10_000 else await asyncio.to_thread(function)
    except GptsmithError as error:
        raise from_engine(error) from None


def check_stream(body: GenerationRequest) -> None:
    """Raise ApiError 400 for options that cannot be streamed, or that only streams have."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options requires stream=true.", param="stream_options")
    if body.stream:
        for name, limit in (("best_of", body.n or 1), ("beams", 1)):
            if (getattr(body, name) or 1) > limit:
                raise ApiError(
                    400,
                    f"{name} cannot be combined with stream=true, because the best texts are only known at the end.",
                    param=name,
                )
