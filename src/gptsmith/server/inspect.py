"""The page's view inside a model for one short text: attention, the logit lens, and the next token's distribution.

With a picture, the text is a question about it, written by the chat template. The picture counts as one token, which
stands for all of its patches: what attends to it attends to one of them, and it predicts what its last patch predicts.

Axis letters: T tokens · L layers · H heads · V vocabulary · P patches of the picture.
"""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import torch
import torch.nn.functional as F
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from gptsmith.data.images import DecodedImage
from gptsmith.engine.image_features import ImageFeatures, place
from gptsmith.engine.prompt import Prompt, processor_of
from gptsmith.engine.text import prepare_image, question
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.flops import count_parameters
from gptsmith.model.inspect import inspect, logit_lens
from gptsmith.model.transformer import Transformer
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.images import Picture, read_pictures
from gptsmith.server.service import context_of, service_of
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate

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
    image_tokens: int | None
    """How many tokens a picture becomes; null for a model that reads text only."""
    adapter: bool


class InspectRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    text: str = Field(max_length=MAX_CHARACTERS)
    image: str | None = None
    """A picture that the text is about: as `image_url.url` of a chat completion."""
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


class PatchAttention(BaseModel):
    """What tokens attend to within the picture."""

    index: int
    """The token that stands for the picture."""
    grid: int
    """Rows of patches, and patches of a row."""
    weights: list[list[list[float]]] | None
    """(H, T, P): how much token i attends to each patch, row by row."""
    url: str
    """A data: URL of the picture as the model sees it."""


class InspectResponse(BaseModel):
    model: str
    layers: int
    heads: int
    ids: list[int]
    tokens: list[str]
    probabilities: list[float | None]
    """The probability of each token given those before it; null for the first."""
    attention: Attention | None
    image: PatchAttention | None
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
    image: DecodedImage | None = None,
) -> dict[str, Any]:
    """Return the fields of an `InspectResponse`, except the model's name.

    Raise UsageError for a layer that does not exist and for no or too many tokens; TokenizerError as `encode` does.
    """
    parts = ["attention", "lens", "next"] if parts is None else parts
    config = model.config
    if layer >= config.num_hidden_layers:
        raise UsageError(f"layer must be from 0 to {config.num_hidden_layers - 1} for this model, not {layer}.")
    if image is None:
        prompt = Prompt(tokenizer.encode_prompt(text))
    else:
        prompt = question(model, ChatTemplate(tokenizer), text, [prepare_image(model, image)])
    picture = prompt.images[0] if prompt.images else None
    hidden = range(picture.start, picture.stop - 1) if picture is not None else range(0)  # all patches but the last
    shown = [i for i in range(len(prompt)) if i not in hidden]
    limit = min(MAX_TOKENS, config.max_position_embeddings - len(hidden))
    if not 1 <= len(shown) <= limit:
        raise UsageError(f"text must have 1 to {limit} tokens, not {len(shown)}.")
    internals = inspect(
        model,
        prompt.ids,
        attention="attention" in parts,
        layer=layer,
        residuals="lens" in parts,
        embeddings=None if picture is None else _embeddings(model, prompt),
    )
    ids = [prompt.ids[i] for i in shown]
    probabilities = internals.logits[shown, : tokenizer.vocab_size].float().softmax(dim=-1)  # (T, V)
    of_tokens = [None, *(probabilities[i, id].item() for i, id in enumerate(ids[1:]))]
    result: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "ids": ids,
        "tokens": [tokenizer.token_text(id) for id in ids],
        "probabilities": [None if p is None else round(p, 6) for p in of_tokens],
        "attention": None,
        "image": None,
        "lens": None,
        "next": None,
    }
    if "attention" in parts:
        result["attention"] = {
            "layer": layer,
            "window": config.window_of(layer) if picture is None else None,  # a picture is more than one token
            "weights": _rounded(_merged(internals.attention[layer][:, shown], hidden)),
        }
    processor = processor_of(config)
    if picture is not None and image is not None and processor is not None:
        patches = None
        if "attention" in parts:
            outputs = internals.attention[layer][:, shown, picture.start : picture.stop]
            # The tower's outputs can begin with one that is no patch, or lack the first patch.
            patches = _rounded(F.pad(outputs, (-processor.extra_tokens, 0)))
        result["image"] = {
            "index": picture.start,
            "grid": processor.grid,
            "weights": patches,
            "url": _data_url(processor.resize(image)),
        }
    if "lens" in parts:
        guesses = [logit_lens(model, residual[shown], tokenizer.vocab_size) for residual in internals.residuals]
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


@torch.inference_mode()
def _embeddings(model: Transformer, prompt: Prompt) -> torch.Tensor:
    """Return the embeddings of the tokens, with the features of the pictures: (T, C)."""
    embeddings: torch.Tensor = model.embed(torch.tensor(prompt.ids, device=next(model.parameters()).device))
    features = ImageFeatures(model)
    return place(embeddings, [(image.start, features.of(image)) for image in prompt.images])


def _merged(weights: torch.Tensor, hidden: range) -> torch.Tensor:
    """Return attention weights (H, T, all) in which the columns of `hidden` are added to the column after them."""
    merged = weights.clone()
    if hidden:
        merged[..., hidden.stop] += weights[..., hidden.start : hidden.stop].sum(dim=-1)
    return torch.cat([merged[..., : hidden.start], merged[..., hidden.stop :]], dim=-1)


def _data_url(image: DecodedImage) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


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
        image_tokens=None if served.loaded.image_processor is None else served.loaded.image_processor.tokens,
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

    if not body.text and body.image is None:
        raise ApiError(400, "text is empty.", param="text")
    image = None
    if body.image is not None:
        processor = served.loaded.image_processor
        if processor is None:
            raise ApiError(400, f"image is a picture, and the model {served.name} reads text only.", param="image")
        (image,) = await read_pictures(service, request, [Picture("image", body.image)], processor.resize)

    def look() -> dict[str, Any]:
        return inspect_text(
            served.model,
            served.tokenizer,
            body.text,
            layer=body.layer,
            top=body.top,
            parts=body.parts,
            image=image,
        )

    slot = await service.limiter.acquire(context.deadline)
    context.on_close(slot.release)
    try:
        return InspectResponse(model=body.model, **await served.engine.call(look))
    except GptsmithError as error:
        raise from_engine(error) from error
