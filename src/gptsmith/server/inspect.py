"""The page's view inside a model for one short text: attention, the logit lens, and the next token's distribution.

Axis letters: T tokens · L layers · H heads · V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.flops import count_parameters
from gptsmith.model.inspect import inspect, logit_lens
from gptsmith.model.transformer import Transformer
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.service import context_of, service_of
from gptsmith.tokenizer import Tokenizer

router = APIRouter(tags=["web page"])
MAX_TOKENS = 96  # as many as a picture can show legibly
MAX_CHARACTERS = 4_000

Part = Literal["attention", "lens", "next"]


class ModelDescription(BaseModel):
    name: str
    parameters: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    tokens: Literal["char", "bpe", "other"]
    chat: bool
    """Whether it has a chat template; without one it is a base model."""
    adapter: bool


class InspectRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    text: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    layer: int = Field(default=0, ge=0)
    """The layer whose attention to return; 0 is the first."""
    top: int = Field(default=8, ge=1, le=20)
    """Number of candidates for the next token."""
    parts: list[Part] = ["attention", "lens", "next"]


class Attention(BaseModel):
    layer: int
    window: int | None
    """The layer's sliding window: tokens each token attends to, itself included; null: all tokens up to itself."""
    weights: list[list[list[float]]]
    """(H, T, T): how much token i attends to token j; rows sum to 1."""


class Lens(BaseModel):
    """(L + 1, T): the most likely next token and its probability, read from the residual stream of each layer."""

    tokens: list[list[str]]
    probabilities: list[list[float]]


class Candidate(BaseModel):
    id: int
    text: str
    probability: float


class InspectResponse(BaseModel):
    model: str
    layers: int
    heads: int
    ids: list[int]
    tokens: list[str]
    probabilities: list[float | None]
    """The probability of each token given those before it; null for the first."""
    attention: Attention | None
    lens: Lens | None
    next: list[list[Candidate]] | None
    """(T, top): the candidates for the token after each token, the most likely first."""


def inspect_text(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    layer: int = 0,
    top: int = 8,
    parts: list[Part] | None = None,
) -> dict[str, Any]:
    """Return the fields of an `InspectResponse`, except the model's name.

    Raise UsageError for a layer that does not exist and for no or too many tokens; TokenizerError as `encode` does.
    """
    parts = ["attention", "lens", "next"] if parts is None else parts
    config = model.config
    if layer >= config.num_hidden_layers:
        raise UsageError(f"layer must be from 0 to {config.num_hidden_layers - 1} for this model, not {layer}.")
    ids = tokenizer.encode_prompt(text)
    limit = min(MAX_TOKENS, config.max_position_embeddings)
    if not 1 <= len(ids) <= limit:
        raise UsageError(f"text must have 1 to {limit} tokens, not {len(ids)}.")
    internals = inspect(model, ids, attention="attention" in parts, residuals="lens" in parts)
    probabilities = internals.logits[:, : tokenizer.vocab_size].float().softmax(dim=-1)  # (T, V)
    of_tokens = [None, *(probabilities[i, id].item() for i, id in enumerate(ids[1:]))]
    result: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "ids": ids,
        "tokens": [tokenizer.token_text(id) for id in ids],
        "probabilities": [None if p is None else round(p, 6) for p in of_tokens],
        "attention": None,
        "lens": None,
        "next": None,
    }
    if "attention" in parts:
        result["attention"] = {
            "layer": layer,
            "window": config.window_of(layer),
            "weights": _rounded(internals.attention[layer]),
        }
    if "lens" in parts:
        guesses = [logit_lens(model, residual, tokenizer.vocab_size) for residual in internals.residuals]
        result["lens"] = {
            "tokens": [[tokenizer.token_text(id) for id in best.tolist()] for best, _ in guesses],
            "probabilities": [_rounded(likelihood) for _, likelihood in guesses],
        }
    if "next" in parts:
        best = probabilities.topk(min(top, tokenizer.vocab_size), dim=-1)
        result["next"] = [
            [
                {"id": id, "text": tokenizer.token_text(id), "probability": round(p, 6)}
                for p, id in zip(values, best_ids, strict=True)
            ]
            for values, best_ids in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return result


def _rounded(x: torch.Tensor) -> Any:
    rounded = x.double().mul(1e5).round().div(1e5)
    return rounded.tolist()


@router.get("/api/models/{name:path}")
async def describe(name: str, request: Request) -> ModelDescription:
    """Describe a model, loading it if needed."""
    served = await service_of(request).served(request, name)
    config = served.model.config
    return ModelDescription(
        name=name,
        parameters=count_parameters(config).total,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        context=config.max_position_embeddings,
        vocabulary=served.tokenizer.vocab_size,
        tokens=served.tokenizer.kind,
        chat=not served.template.plain,
        adapter=served.adapter is not None,
    )


@router.post("/api/inside")
async def inside(body: InspectRequest, request: Request) -> InspectResponse:
    """Return one layer's attention, the logit lens and the next token's distribution, for a short text."""
    service, context = service_of(request), context_of(request)
    served = await service.served(request, body.model)
    if served.adapter is not None:
        raise ApiError(
            400, f"model: {served.name} is an adapter, which cannot be inspected; use {served.base}.", param="model"
        )

    def look() -> dict[str, Any]:
        return inspect_text(served.model, served.tokenizer, body.text, layer=body.layer, top=body.top, parts=body.parts)

    slot = await service.limiter.acquire(context.deadline)
    context.on_close(slot.release)
    try:
        return InspectResponse(model=body.model, **await served.engine.call(look))
    except GptsmithError as error:
        raise from_engine(error) from error
