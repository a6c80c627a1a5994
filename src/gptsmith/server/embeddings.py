"""POST /v1/embeddings: the mean of a text's last hidden states. POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request

from gptsmith.errors import GptsmithError
from gptsmith.model.transformer import Transformer
from gptsmith.server.chat import conversation_ids, template_messages
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.images import check_pictures, expanded, pictures_of
from gptsmith.server.request_params import encode, input_ids, split_inputs
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
from gptsmith.server.service import check_length, context_of, service_of

router = APIRouter()
MAX_INPUTS = 2048


@torch.inference_mode()
def mean_hidden_state(model: Transformer, ids: Sequence[int]) -> list[float]:
    """Return the mean over all tokens of the hidden states after the final norm, scaled to unit length: (C,)."""
    states = model.hidden_states(torch.tensor([list(ids)], device=next(model.parameters()).device))[0]
    mean = states.float().mean(dim=0)
    values: list[float] = (mean / mean.norm().clamp_min(1e-12)).tolist()
    return values


@router.post("/v1/embeddings", response_model=Embeddings, tags=["OpenAI"])
async def embed(body: EmbeddingsRequest, request: Request) -> Any:
    """Return an embedding, a vector of unit length, for each input."""
    service = service_of(request)
    served = await service.served(request, body.model)
    width = served.model.config.embedding_size or served.model.config.hidden_size
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions must be {width}, the width of this model.", param="dimensions")
    if served.adapter is not None:
        raise ApiError(
            400, f"model: {served.name} is an adapter, which has no embeddings; use {served.base}.", param="model"
        )
    prompts: list[list[int]] = []
    for value in split_inputs(body.input, "input", MAX_INPUTS):
        ids = await input_ids(served, value, "input")
        check_length(served, ids, None)
        prompts.append(ids)
    context = context_of(request)
    slot = await service.limiter.acquire(context.deadline)
    context.on_close(slot.release)
    vectors = []
    for ids in prompts:  # one at a time, so that other requests make progress in between
        if asyncio.get_running_loop().time() > context.deadline:
            raise ApiError(504, "The request timed out.", code="timeout")
        try:
            vectors.append(await served.engine.call(lambda ids=ids: mean_hidden_state(served.model, ids)))  # type: ignore[misc]
        except GptsmithError as error:
            raise from_engine(error) from None
    count = sum(map(len, prompts))
    context.log_fields["prompt_tokens"] = count
    service.metrics.prompt_tokens.labels(served.base).inc(count)
    data = [
        Embedding(index=i, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
        for i, vector in enumerate(vectors)
    ]
    return Embeddings(data=data, model=body.model, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


@router.post("/tokenize", response_model=Tokens, tags=["tokens"])
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """Return the token ids of a text, or of a conversation rendered by the chat template. Pictures are counted, not
    read."""
    served = await service_of(request).served(request, body.model)
    tokenizer = served.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Set either prompt or messages.", param="prompt")
    if body.prompt is not None:
        text = body.prompt
        add = tokenizer.encode if body.add_special_tokens is False else tokenizer.encode_prompt
        ids = await encode(lambda: add(text), len(text))
    else:
        if body.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens is for a prompt, not for messages.", param="add_special_tokens")
        check_pictures(service_of(request), served, pictures_of(body.messages or []))
        messages = template_messages(body.messages or [])
        tools = None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]
        ids = expanded(served, await conversation_ids(served.template, messages, body, tools=tools))
    return Tokens(
        count=len(ids),
        max_model_len=served.loaded.context,
        tokens=ids,
        token_strs=[tokenizer.token_text(id) for id in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=Text, tags=["tokens"])
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """Return the text of token ids, including special tokens."""
    served = await service_of(request).served(request, body.model)
    try:
        return Text(prompt=served.tokenizer.decode(body.tokens, skip_special_tokens=False))
    except GptsmithError as error:
        raise from_engine(error) from None
