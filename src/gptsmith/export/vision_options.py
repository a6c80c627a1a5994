"""The size of a new vision tower, as options of a command: without torch, so that help is instant."""

from __future__ import annotations

from dataclasses import dataclass

from gptsmith.errors import UsageError
from gptsmith.model.config import VisionConfig
from gptsmith.tokenizer.chatml import IMAGE_TOKEN


@dataclass(frozen=True)
class VisionOptions:
    """The size of a new vision tower."""

    image_size: int = 72
    """Pixels per side of the square to which pictures are resized."""
    patch_size: int = 12
    """Pixels per side of a patch. A picture becomes (image size / patch size)² tokens."""
    hidden_size: int = 192
    """Width of the tower."""
    num_hidden_layers: int = 4
    """Number of blocks of the tower."""
    num_attention_heads: int = 4
    """Number of attention heads of the tower."""
    intermediate_size: int | None = None
    """Width of the tower's feed-forward layers (default: 4 times its width)."""
    seed: int = 1337
    """Seed of the initial weights."""

    def build(self) -> VisionConfig:
        """Return the configuration. Raise UsageError where sizes do not fit together."""
        if self.image_size % max(1, self.patch_size):
            raise UsageError(
                f"--image-size {self.image_size} is not a multiple of --patch-size {self.patch_size}: pixels at the "
                "edge would be in no patch."
            )
        return VisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            image_token=IMAGE_TOKEN,
        )
