"""From a picture to the numbers that a vision tower reads, as its preprocessor_config.json describes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gptsmith.data.images import DecodedImage
from gptsmith.errors import UsageError
from gptsmith.model.config import VisionConfig

if TYPE_CHECKING:
    from torch import Tensor

Resample = Literal["bilinear", "bicubic", "lanczos"]
RESAMPLE_IDS: dict[Resample, int] = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which preprocessor_config.json has."""


@dataclass(frozen=True)
class ImageProcessor:
    """Resize a picture to `size` × `size` pixels, scale it to [0, 1], and normalize each channel: (x - mean) / std.

    The whole picture is seen: one that is not square is stretched, as SigLIP's processor does.
    patch: side of the patches that the tower cuts the picture into. pixel_shuffle: that many patches per side become
    one token. crop: keep the proportions, and cut off what is outside the square in the middle (CLIP's way).
    extra_tokens: of a tower that has more (or fewer) outputs than patches.
    """

    size: int
    patch: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: Resample = "bicubic"
    pixel_shuffle: int = 1
    crop: bool = False
    extra_tokens: int = 0

    @classmethod
    def of(cls, config: VisionConfig) -> ImageProcessor:
        """Return the processor of a model."""
        return cls(
            config.image_size,
            config.patch_size,
            config.image_mean,
            config.image_std,
            config.resample,
            config.pixel_shuffle,
            config.center_crop,
            config.class_token - config.drop_first,
        )

    def __post_init__(self) -> None:
        if not 1 <= self.patch <= self.size:
            raise UsageError(f"the patch size ({self.patch}) must be between 1 and the image size ({self.size}).")
        if any(not value > 0 for value in self.std):
            raise UsageError(f"image_std must be above 0, not {self.std}.")

    @property
    def tokens(self) -> int:
        """Number of tokens that a picture becomes."""
        return self.grid**2 + self.extra_tokens

    @property
    def grid(self) -> int:
        """Tokens per side of a picture."""
        return self.size // self.patch // self.pixel_shuffle

    def __call__(self, image: DecodedImage) -> Tensor:
        """Return the picture as (3, size, size) float32."""
        import torch

        pixels = torch.from_numpy(self.resize(image).pixels.astype(np.float32) / 255)
        normalized = (pixels - torch.tensor(self.mean)) / torch.tensor(self.std)
        return normalized.permute(2, 0, 1).contiguous()

    def resize(self, image: DecodedImage) -> DecodedImage:
        """Return the picture with `size` × `size` pixels, which is what the model sees."""
        if image.width == image.height == self.size:
            return image
        from PIL import Image

        resampling = Image.Resampling(RESAMPLE_IDS[self.resample])
        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.crop:  # in the original, where pixels around the square count: a resized long picture would be huge
            short = min(image.width, image.height)
            longer = [int(self.size * side / short) for side in (image.width, image.height)]
            scale = [side / long for side, long in zip((image.width, image.height), longer, strict=True)]
            start = [(long - self.size) // 2 for long in longer]
            left, top, right, bottom = (
                (start[axis] + extent) * scale[axis] for extent in (0, self.size) for axis in (0, 1)
            )
            box = (left, top, min(right, image.width), min(bottom, image.height))
        picture = Image.fromarray(image.pixels).resize((self.size, self.size), resampling, box=box)
        return DecodedImage(np.asarray(picture))

    def hash(self) -> str:
        """Return a sha256 of everything that changes the result: with the picture's `key`, that of a cache."""
        return hashlib.sha256(repr(self).encode()).hexdigest()
