"""Inside the model, for one short text: who attends to whom, what each layer would predict, what comes next.

Axis letters: T tokens · L layers · H heads · C hidden · V vocabulary.
The logit lens is nostalgebraist's (2020, "interpreting GPT: the logit lens"): the residual stream after any layer, read
by the final norm and the output matrix as if it were the last.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.flops import count_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.service import exchange_of, service_of
from gptsmith.tokenizer import Tokenizer

router = APIRouter(tags=["web page"])
MOST_TOKENS = 96  # more cannot be told apart in a picture, and a picture is what this is for
MOST_CHARACTERS = 4_000

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
    """Whether it has a chat template of its own: it was taught to answer."""
    adapter: bool


class InsideRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    text: str = Field(min_length=1, max_length=MOST_CHARACTERS)
    layer: int = Field(default=0, ge=0)
    """Whose attention is wanted; 0 is the first."""
    top: int = Field(default=8, ge=1, le=20)
    """How many of the most probable next tokens."""
    parts: list[Part] = ["attention", "lens", "next"]


class Attention(BaseModel):
    layer: int
    window: int | None
    """A token of this layer sees this many tokens, ending with itself; null: all up to itself."""
    weights: list[list[list[float]]]
    """(H, T, T): how much token i looks at token j; rows sum to 1."""


class Lens(BaseModel):
    """(L + 1, T): the most probable next token, and its probability, by the residual stream before and after layers."""

    tokens: list[list[str]]
    probabilities: list[list[float]]


class Candidate(BaseModel):
    id: int
    text: str
    probability: float


class InsideResponse(BaseModel):
    model: str
    layers: int
    heads: int
    ids: list[int]
    tokens: list[str]
    probabilities: list[float | None]
    """Of each token, given those before it; of the first there is none."""
    attention: Attention | None
    lens: Lens | None
    next: list[list[Candidate]] | None
    """(T, top): what may follow each token, the most probable first."""


def look_inside(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    layer: int = 0,
    top: int = 8,
    parts: list[Part] | None = None,
) -> dict[str, Any]:
    """What `InsideResponse` shows, but for the model's name. The model is only read.

    Raises UsageError for a layer that is not there, and for no or too many tokens; TokenizerError as `encode` does.
    """
    parts = ["attention", "lens", "next"] if parts is None else parts
    config = model.config
    if layer >= config.num_hidden_layers:
        raise UsageError(f"layer {layer}: this model has {config.num_hidden_layers} layers, from 0 on.")
    ids = tokenizer.encode(text)
    most = min(MOST_TOKENS, config.max_position_embeddings)
    if not 1 <= len(ids) <= most:
        raise UsageError(f"the text has {len(ids)} tokens; it takes 1 to {most} to look inside.")
    weights: list[torch.Tensor] | None = [] if "attention" in parts else None
    residuals: list[torch.Tensor] | None = [] if "lens" in parts else None
    with torch.inference_mode():
        device = next(model.parameters()).device
        logits = model(torch.tensor([ids], device=device), weights=weights, residuals=residuals)[0]  # (T, V)
        probabilities = logits[:, : tokenizer.vocab_size].float().softmax(dim=-1)
        chosen = [None, *(probabilities[i, id].item() for i, id in enumerate(ids[1:]))]
        found: dict[str, Any] = {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "ids": ids,
            "tokens": [tokenizer.token_text(id) for id in ids],
            "probabilities": [None if p is None else round(p, 6) for p in chosen],
            "attention": None,
            "lens": None,
            "next": None,
        }
        if weights is not None:
            found["attention"] = {
                "layer": layer,
                "window": config.window_of(layer),
                "weights": _rounded(weights[layer][0]),
            }
        if residuals is not None:
            found["lens"] = _lens(model, tokenizer, residuals)
        if "next" in parts:
            best = probabilities.topk(min(top, tokenizer.vocab_size), dim=-1)
            found["next"] = [
                [
                    {"id": id, "text": tokenizer.token_text(id), "probability": round(p, 6)}
                    for p, id in zip(values, best_ids, strict=True)
                ]
                for values, best_ids in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
    return found


def _lens(model: Transformer, tokenizer: Tokenizer, residuals: list[torch.Tensor]) -> dict[str, Any]:
    tokens, probabilities = [], []
    for x in residuals:  # one at a time: the logits of all layers together would be large
        logits = model.lm_head(model.norm(x))[0, :, : tokenizer.vocab_size].float()
        best = logits.max(dim=-1)
        tokens.append([tokenizer.token_text(id) for id in best.indices.tolist()])
        probabilities.append(_rounded((best.values - logits.logsumexp(dim=-1)).exp()))
    return {"tokens": tokens, "probabilities": probabilities}


def _rounded(x: torch.Tensor) -> Any:
    rounded = x.double().mul(1e5).round().div(1e5)
    return rounded.tolist()


@router.get("/api/models/{name:path}")
async def describe(name: str, request: Request) -> ModelDescription:
    """What the page needs to know of a model; it is loaded, if it was not."""
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
async def inside(body: InsideRequest, request: Request) -> InsideResponse:
    """Attention of one layer's heads, the logit lens and the next token's distribution, for a short text."""
    service, exchange = service_of(request), exchange_of(request)
    served = await service.served(request, body.model)
    if served.adapter is not None:
        raise ApiError(400, f"model: {served.name} is an adapter; look inside {served.base}.", param="model")

    def look() -> dict[str, Any]:
        return look_inside(served.model, served.tokenizer, body.text, layer=body.layer, top=body.top, parts=body.parts)

    place = await service.gate.enter(exchange.deadline)
    exchange.on_close(place.leave)
    try:
        return InsideResponse(model=body.model, **await served.engine.call(look))
    except GptsmithError as error:
        raise from_engine(error) from error
