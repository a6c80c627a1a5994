"""Pictures as a vision tower reads them, compared with transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gptsmith.data.image_processor import RESAMPLE_IDS, ImageProcessor, Resample
from gptsmith.data.images import DecodedImage
from gptsmith.errors import UsageError


def random_picture(width: int, height: int) -> DecodedImage:
    rng = np.random.default_rng(width * 1000 + height)
    return DecodedImage(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(24, 24), (50, 31), (31, 50), (7, 9), (200, 3)])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_pixels_equal_those_of_transformers(size: tuple[int, int], crop: bool, resample: Resample) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    mean, std = (0.48, 0.45, 0.4), (0.26, 0.27, 0.3)
    theirs = CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": 24} if crop else {"height": 24, "width": 24},
        do_center_crop=True,
        crop_size={"height": 24, "width": 24},
        resample=RESAMPLE_IDS[resample],
        image_mean=mean,
        image_std=std,
    )
    picture = random_picture(*size)
    expected = theirs(Image.fromarray(picture.pixels), return_tensors="pt")["pixel_values"][0]
    found = ImageProcessor(24, 8, mean, std, resample, crop=crop)(picture)
    assert found.shape == (3, 24, 24)
    difference = (found - expected).abs() * torch.tensor(std)[:, None, None] * 255
    if crop:  # cut in the original: Pillow may then take the axes in the other order, and rounds in between
        assert difference.mean() < 0.5
        assert difference.max() < 20
    else:
        assert difference.max() < 1e-3


def test_tokens_follow_from_the_sizes() -> None:
    assert ImageProcessor(72, 12).tokens == 36
    assert ImageProcessor(72, 12, pixel_shuffle=2).tokens == 9
    assert ImageProcessor(72, 12).grid == 6


def test_the_hash_changes_with_every_setting() -> None:
    variants = [
        ImageProcessor(72, 12),
        ImageProcessor(60, 12),
        ImageProcessor(72, 8),
        ImageProcessor(72, 12, mean=(0.4, 0.5, 0.5)),
        ImageProcessor(72, 12, std=(0.4, 0.5, 0.5)),
        ImageProcessor(72, 12, resample="lanczos"),
        ImageProcessor(72, 12, pixel_shuffle=2),
        ImageProcessor(72, 12, crop=True),
    ]
    assert len({each.hash() for each in variants}) == len(variants)
    assert ImageProcessor(72, 12).hash() == variants[0].hash()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="patch size"):
        ImageProcessor(8, 12)
    with pytest.raises(UsageError, match="image_std"):
        ImageProcessor(72, 12, std=(0.0, 1.0, 1.0))
