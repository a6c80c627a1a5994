"""POST /v1/embeddings: the mean of a text's last hidden states. POST /tokenize, /detokenize: texts and token ids."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.engine.text import encode_prompt
from gptsmith.errors import GptsmithError
from gptsmith.model.transformer import Transformer
from gptsmith.server.chat import template_messages
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.request_params import encoded
from gptsmith.server.schema import (
    DetokenizeRequest,
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbeddingUsage,
    Text,
    TokenizeRequest,
    Tokens,
)
from gptsmith.server.service import check_length, exchange_of, service_of

router = APIRouter()
MOST_TEXTS = 2048


@torch.inference_mode()
def mean_hidden_state(model: Transformer, ids: Sequence[int]) -> list[float]:
    """The mean over all tokens of what the output layer reads (after the final norm), of unit length: (C,)."""
    states = model.hidden_states(torch.tensor([list(ids)], device=next(model.parameters()).device))[0]
    mean = states.float().mean(dim=0)
    values: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return values


@router.post("/v1/embeddings", response_model=Embeddings, tags=["OpenAI"])
async def embed(body: EmbeddingsRequest, request: Request) -> Any:
    """Texts as vectors of unit length."""
    service = service_of(request)
    served = await service.served(request, body.model)
    width = served.model.config.hidden_size
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: this model's vectors have {width}.", param="dimensions")
    if served.adapter is not None:
        raise ApiError(400, f"model: {served.name} is an adapter; ask for embeddings of {served.base}.", param="model")
    prompts: list[list[int]] = []
    texts = _inputs(body)
    for text in texts:
        ids = await _ids(served.tokenizer, text)
        check_length(served, ids, None)
        prompts.append(ids)
    exchange = exchange_of(request)
    place = await service.gate.enter(exchange.deadline)
    exchange.on_close(place.leave)
    vectors = []
    for ids in prompts:  # one at a time: what others generate goes on between them
        if asyncio.get_running_loop().time() > exchange.deadline:
            raise ApiError(504, "the request took longer than this server allows.", code="timeout")
        try:
            vectors.append(await served.engine.call(lambda ids=ids: mean_hidden_state(served.model, ids)))  # type: ignore[misc]
        except GptsmithError as error:
            raise from_engine(error) from None
    count = sum(map(len, prompts))
    exchange.facts["prompt_tokens"] = count
    service.metrics.prompt_tokens.labels(served.base).inc(count)
    data = [
        Embedding(index=i, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
        for i, vector in enumerate(vectors)
    ]
    return Embeddings(data=data, model=body.model, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))


def _inputs(body: EmbeddingsRequest) -> list[str | list[int]]:
    if isinstance(body.input, str):
        return [body.input]
    if not body.input:
        raise ApiError(400, "input: there is none in it.", param="input")
    if isinstance(body.input[0], int):
        return [body.input]
    if len(body.input) > MOST_TEXTS:
        raise ApiError(400, f"input: at most {MOST_TEXTS} at a time.", param="input")
    return list(body.input)


async def _ids(tokenizer: Any, text: str | list[int]) -> list[int]:
    if isinstance(text, str):
        return await encoded(lambda: encode_prompt(tokenizer, text), len(text))
    if not text:
        raise ApiError(400, "input: it has no tokens.", param="input")
    if max(text) >= tokenizer.vocab_size:
        message = f"input: {max(text)} is no token id; they go to {tokenizer.vocab_size - 1}."
        raise ApiError(400, message, param="input")
    return text


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


@router.post("/tokenize", response_model=Tokens, tags=["tokens"])
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """The token ids of a text, or of a conversation as it would be put to the model."""
    served = await service_of(request).served(request, body.model)
    tokenizer = served.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give it or messages.", param="prompt")
    if body.prompt is not None:
        text = body.prompt
        ids = await encoded(lambda: tokenizer.encode(text), len(text))
    else:
        messages = template_messages(body.messages or [])
        tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
        ids = await encoded(
            lambda: served.template.encode(messages, add_generation_prompt=body.add_generation_prompt, tools=tools),
            sum(len(str(message)) for message in messages),
        )
    return Tokens(
        count=len(ids),
        max_model_len=served.loaded.context,
        tokens=ids,
        token_strs=[tokenizer.token_text(id) for id in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=Text, tags=["tokens"])
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """The text of token ids; special tokens are written out."""
    served = await service_of(request).served(request, body.model)
    try:
        return Text(prompt=served.tokenizer.decode(body.tokens, skip_special_tokens=False))
    except GptsmithError as error:
        raise from_engine(error) from None
