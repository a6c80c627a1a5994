"""What a request continues: token ids, and the pictures that stand at some of them.

    picture = prompt_image(decode_image(data), processor)
    prompt = with_images(template.encode(messages), [picture], config.image_token_id)

A text with pictures has one placeholder token for each. In a `Prompt`, each placeholder is repeated for every token
that its picture becomes; the engine puts the picture's features there in place of token embeddings.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.data.image_processor import ImageProcessor
    from gptsmith.data.images import DecodedImage
    from gptsmith.model.config import ModelConfig
    from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, slots=True)
class PromptImage:
    """A picture in a prompt.

    pixels: (3, H, W), as the vision tower reads it. key: a hash of the decoded picture (pixels, size, mode) and of the
    processor; pictures with the same key have the same features. tokens: how many tokens it becomes. start: the
    position of the first of them in the prompt.
    """

    pixels: Tensor
    key: bytes
    tokens: int
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """Token ids, with the pictures in the order of their positions."""

    ids: Sequence[int]
    images: tuple[PromptImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def without_beginning(self, count: int) -> Prompt:
        """Return the prompt without its first `count` tokens. A picture is not cut in two: it goes as a whole."""
        count = after_image(self.images, count)
        kept = (image for image in self.images if image.start >= count)
        return Prompt(self.ids[count:], tuple(dataclasses.replace(image, start=image.start - count) for image in kept))


def as_prompt(prompt: Sequence[int] | Prompt) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def processor_of(config: ModelConfig) -> ImageProcessor | None:
    """Return what prepares pictures for a model; None for a model that reads text only."""
    from gptsmith.data.image_processor import ImageProcessor

    return None if config.vision is None else ImageProcessor.of(config.vision)


def prompt_image(image: DecodedImage, processor: ImageProcessor) -> PromptImage:
    """Prepare a decoded picture for the model that `processor` belongs to."""
    key = hashlib.sha256(f"{image.key} {processor.hash()}".encode()).digest()
    return PromptImage(processor(image), key, processor.tokens)


def around_images(config: ModelConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the tokens before those of a picture, and after them. Raise UsageError if there are none."""
    known, around = tokenizer.added_tokens(), config.vision.around if config.vision is not None else ((), ())
    missing = [name for part in around for name in part if name not in known]
    if missing:
        raise UsageError(f"the tokenizer has no {missing[0]}, which this model needs around pictures.")
    before, after = ([known[name] for name in part] for part in around)
    return before, after


def with_images(
    ids: Sequence[int],
    images: Sequence[PromptImage],
    image_token_id: int,
    around: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Prompt:
    """Return the prompt of ids with one placeholder for each picture. around: as `around_images` returns it.

    Raise UsageError if there are more placeholders than pictures, or fewer.
    """
    before, after = around
    found = sum(id == image_token_id for id in ids)
    if found != len(images):
        raise UsageError(
            f"the text has {_count(found, 'placeholder')} for {_count(len(images), 'picture')}: each picture needs one."
        )
    expanded: list[int] = []
    placed: list[PromptImage] = []
    for id in ids:
        if id == image_token_id:
            expanded += before
            image = dataclasses.replace(images[len(placed)], start=len(expanded))
            placed.append(image)
            expanded += [*[id] * image.tokens, *after]
        else:
            expanded.append(id)
    return Prompt(expanded, tuple(placed))


def after_image(images: Sequence[PromptImage], position: int) -> int:
    """Return the first position from `position` on that is not inside a picture, after its first token."""
    inside = next((image for image in images if image.start < position < image.stop), None)
    return position if inside is None else inside.stop


def overlapping(images: Sequence[PromptImage], start: int, stop: int) -> Iterator[tuple[PromptImage, int, int]]:
    """Yield the pictures that have tokens from `start` up to `stop`, each with the positions of these tokens: from,
    up to."""
    for image in images:
        first, last = max(start, image.start), min(stop, image.stop)
        if first < last:
            yield image, first, last


def check_images(prompt: Prompt, image_token_id: int | None) -> None:
    """Raise UsageError if pictures and placeholders of a prompt do not belong together."""
    if prompt.images and image_token_id is None:
        raise UsageError("this model reads text only, and the prompt has pictures.")
    if image_token_id is None:
        return
    position = 0
    for image in prompt.images:
        if image.start < position or any(id != image_token_id for id in prompt.ids[image.start : image.stop]):
            raise UsageError("a picture of the prompt does not stand at placeholder tokens.")
        position = image.stop
    placeholders = sum(id == image_token_id for id in prompt.ids)
    if placeholders != sum(image.tokens for image in prompt.images) or position > len(prompt):
        raise UsageError(
            f"the prompt has {_count(placeholders, 'placeholder token')} (id {image_token_id}), and its "
            f"{_count(len(prompt.images), 'picture')} would take {sum(image.tokens for image in prompt.images):,}."
        )


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
