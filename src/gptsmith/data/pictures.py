"""The pictures of rows: where they are, the tokens that stand for them, and their pixels in a batch.

    reader = PictureReader.of(config, tokenizer)        # None for a model that reads no pictures
    picture = reader.read("cat.png", base=folder)       # decoded once, so that a damaged one is found now
    ids = reader.expand(ids)                            # one image token becomes as many as there are features
    pixels = reader.pixels([picture])                   # (N, 3, S, S)

A picture is kept as its file, not as pixels, and decoded for every batch. Augmentation moves, scales and recolors it by
random numbers that follow from the seed and the position in the data, so a resumed run sees the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from gptsmith.data.image_processor import ImageProcessor
from gptsmith.data.images import WHITE, DecodedImage, decode_image, image_bytes
from gptsmith.errors import DataError
from gptsmith.model.config import ModelConfig
from gptsmith.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SHIFT = 4 / 72  # augmentation moves a picture by up to this part of its side,
SCALE = 0.15  # and makes it smaller or larger by up to this part


class Picture(NamedTuple):
    """A picture of a row. source: the file's bytes or its path. key: of its pixels, `DecodedImage.key`."""

    source: bytes | Path
    key: str


@dataclass(frozen=True)
class PictureReader:
    """How a model reads pictures. token_id: of the image token. before, after: tokens around those of a picture."""

    processor: ImageProcessor
    token_id: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig, tokenizer: Tokenizer) -> PictureReader | None:
        """Return the reader of a model, None if it reads no pictures."""
        if config.vision is None or config.image_token_id is None:
            return None
        known = tokenizer.added_tokens()
        around = [tuple(known[name] for name in part) for part in config.vision.around]
        return cls(ImageProcessor.of(config.vision), config.image_token_id, *around)

    @property
    def tokens(self) -> list[int]:
        """The ids that stand for a picture."""
        return [*self.before, *[self.token_id] * self.processor.tokens, *self.after]

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Return ids in which every image token has become `tokens`."""
        return [new for id in ids for new in (self.tokens if id == self.token_id else (id,))]

    def expand_along(self, ids: Sequence[int], values: Sequence[T]) -> list[T]:
        """Return values, one for each of `ids`, repeated as `expand` repeats them."""
        length = len(self.tokens)
        return [
            value
            for id, each in zip(ids, values, strict=True)
            for value in [each] * (length if id == self.token_id else 1)
        ]

    def read(self, source: Any, base: Path | None) -> Picture:
        """Return the picture that a part of a message refers to; see `image_bytes`. Raise ImageError."""
        data = image_bytes(source, base=base)
        key = decode_image(data).key
        path = _path_of(source)
        return Picture(data if path is None or base is None else base / path, key)

    def pixels(self, pictures: Sequence[Picture], variation: Sequence[int] | None = None) -> Tensor:
        """Return the pictures as (N, 3, S, S). variation: numbers that augmentation follows from; None: none.

        Raises DataError for a file that has changed since it was read.
        """
        import torch

        made = []
        for number, picture in enumerate(pictures):
            data = image_bytes(picture.source, base=Path())
            if variation is None:
                image = decode_image(data)
                if image.key != picture.key:
                    raise DataError(f"the picture {picture.source!s:.200} has changed since the data was read.")
            else:
                image = augmented(data, self.processor, np.random.default_rng([*variation, number]))
            made.append(self.processor(image))
        return torch.stack(made)


def _path_of(source: Any) -> str | None:
    """Return the path in a part of a message that names a file."""
    while isinstance(source, dict):
        if source.get("bytes") is not None:
            return None
        found = (source.get(key) for key in ("image_url", "image", "url", "path"))
        source = next((value for value in found if value is not None), None)
    if isinstance(source, Path):
        return str(source)
    if not isinstance(source, str) or source[:5].lower() == "data:":
        return None
    return source.removeprefix("file://")


def augmented(data: bytes, processor: ImageProcessor, rng: np.random.Generator) -> DecodedImage:
    """Return a picture moved, scaled, and where it is transparent recolored at random, as the model is to see it."""
    from PIL import Image

    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    color = (red, green, blue) if rng.random() < 0.5 else WHITE
    image = processor.resize(decode_image(data, background=color))
    size = processor.size
    scale = 1 / (1 + rng.uniform(-SCALE, SCALE))
    left, top = rng.uniform(-SHIFT, SHIFT, 2) * size + size / 2 * (1 - scale)
    moved = Image.fromarray(image.pixels).transform(
        (size, size),
        Image.Transform.AFFINE,
        (scale, 0, left, 0, scale, top),
        resample=Image.Resampling.BICUBIC,
        fillcolor=color,
    )
    return DecodedImage(np.asarray(moved))
