"""Pictures in requests: from the parts of messages to what the engine takes.

Limits apply before anything is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from starlette.requests import Request

from gptsmith.data.images import DecodedImage, ImageError, decode_image, image_bytes
from gptsmith.engine.prompt import Prompt, PromptImage, around_images, prompt_image, with_images
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.server.errors import ApiError, from_engine
from gptsmith.server.media import MediaError
from gptsmith.server.models import ServedModel
from gptsmith.server.schema import ChatMessage, ImagePart, UserMessage
from gptsmith.server.service import Service, context_of

T = TypeVar("T")


class Picture(NamedTuple):
    """A picture as a request gives it. param: the field that it is in."""

    param: str
    url: str


def pictures_of(messages: Sequence[ChatMessage]) -> list[Picture]:
    """Return the pictures of a conversation, in their order."""
    return [
        Picture(f"messages[{i}].content[{j}]", part.image_url.url)
        for i, message in enumerate(messages)
        if isinstance(message, UserMessage) and isinstance(message.content, list)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


def check_pictures(service: Service, served: ServedModel, pictures: Sequence[Picture]) -> None:
    """Raise ApiError 400 for pictures that the model cannot read, or for too many."""
    if not pictures:
        return
    if served.loaded.image_processor is None:
        param = pictures[0].param
        raise ApiError(400, f"{param} is a picture, and the model {served.name} reads text only.", param=param)
    limit = service.settings.max_images
    if len(pictures) > limit:
        param = pictures[limit].param
        raise ApiError(400, f"{param}: the request has {len(pictures)} pictures; the limit is {limit}.", param=param)


async def load_pictures(
    service: Service, request: Request, served: ServedModel, pictures: Sequence[Picture]
) -> list[PromptImage]:
    """Return pictures that `check_pictures` has accepted as the engine takes them. Raise as `read_pictures` does."""
    processor = served.loaded.image_processor
    if processor is None:
        return []
    return await read_pictures(service, request, pictures, lambda image: prompt_image(image, processor))


async def read_pictures(
    service: Service, request: Request, pictures: Sequence[Picture], prepare: Callable[[DecodedImage], T]
) -> list[T]:
    """Fetch and decode pictures; return what `prepare` makes of each. Raise ApiError 400, 500 or 504.

    The server decodes one picture at a time, so that memory is bounded whatever the number of requests.
    """
    limits = service.settings.image_limits

    def decode(source: bytes | str) -> T:
        return prepare(decode_image(image_bytes(source, limits=limits), limits=limits))

    prepared: list[T] = []
    for param, url in pictures:
        try:
            async with asyncio.timeout_at(context_of(request).deadline):
                source: bytes | str = url
                if url[:5].lower() != "data:":
                    source = await service.settings.media.fetch(url, limits.max_bytes)
                async with service.decoding:
                    prepared.append(await asyncio.to_thread(decode, source))
        except (ImageError, MediaError) as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None
        except GptsmithError as error:  # Pillow is not installed
            raise from_engine(error) from None
        except TimeoutError:
            raise ApiError(504, "The request timed out while its pictures were read.", code="timeout") from None
    return prepared


def placed(served: ServedModel, ids: Sequence[int], images: Sequence[PromptImage]) -> Prompt:
    """Return a conversation's ids with its pictures in place of the placeholders. Raise ApiError 400 if the chat
    template has not written one placeholder for each."""
    token = served.model.config.image_token_id
    if token is None:
        return Prompt(ids)
    try:
        return with_images(ids, images, token, around_images(served.model.config, served.tokenizer))
    except UsageError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


def expanded(served: ServedModel, ids: Sequence[int]) -> list[int]:
    """Return ids in which each placeholder is repeated as often as its picture has tokens, without the pictures."""
    processor, token = served.loaded.image_processor, served.model.config.image_token_id
    if processor is None:
        return list(ids)
    before, after = around_images(served.model.config, served.tokenizer)
    picture = [*before, *[token or 0] * processor.tokens, *after]
    return [id for each in ids for id in (picture if each == token else [each])]
