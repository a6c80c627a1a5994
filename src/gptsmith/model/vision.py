"""Vision for a GPT: a vision transformer and the layers that make its output look like embeddings of tokens.

    picture (3, S, S) -> patches of P×P pixels -> VisionTower -> one vector per patch -> Projector -> "words"

The tower is an ordinary transformer in which every patch sees every other (ViT, Dosovitskiy et al. 2020, 2010.11929),
with the parts of SigLIP (Zhai et al. 2023, 2303.15343) or of CLIP (Radford et al. 2021, 2103.00020). A projector of two
layers makes it LLaVA (Liu et al. 2023, 2304.08485 and 2310.03744); a single layer over squares of neighboring patches
makes it Idefics3 and SmolVLM (Laurençon et al. 2024, 2408.12637).

Axis letters: N pictures · S pixels per side · P pixels of a patch per side · T patches · D hidden of the tower ·
H heads · C hidden of the text model.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.model.activations import FUNCTIONS
from gptsmith.model.config import VisionConfig
from gptsmith.model.parameters import annotate


class Images(NamedTuple):
    """The pictures of a batch, in the order in which their tokens stand in it.

    pixels: (N, 3, S, S). rows: N numbers, ascending: the row of the batch that each belongs to. No tensor, since they
    have to be known in a memory forecast, too, whose tensors have no values.
    """

    pixels: Tensor
    rows: tuple[int, ...]

    def slice(self, start: int, stop: int) -> Images | None:
        """Return those of rows [start, stop), None if there are none."""
        first, last = (bisect.bisect_left(self.rows, row) for row in (start, stop))
        rows = tuple(row - start for row in self.rows[first:last])
        return Images(self.pixels[first:last], rows) if rows else None


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), without a mask."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.activation = config.num_attention_heads, FUNCTIONS[config.activation]
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        for part in ("weight", "bias"):
            annotate(self, f"qkv.{part}", split_sizes=(width,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> (N, T, D)."""
        N, T, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (N, H, T, D/H) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, T, D)
        x = x + self.out(y)
        z: Tensor = self.fc2(self.activation(self.fc1(self.norm_2(x))))
        return x + z


class VisionTower(nn.Module):
    """The vision transformer: (N, 3, S, S), normalized as `ImageProcessor` does, -> (N, T, D).

    The output is that of the last block, before any norm, unless `VisionConfig.post_norm` says otherwise.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not config.class_token)
        self.position_embedding = nn.Embedding(config.num_positions, width)
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(width))
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.class_token else nn.Identity()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.post_norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pictures must be (N, 3, {size}, {size}), not {tuple(pixels.shape)}.")
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT  # (N, T, D), row by row
        if self.config.class_token:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x), dim=1)
        x = self.pre_norm(x + self.position_embedding.weight)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.post_norm(x)
        return y[:, 1:] if self.config.drop_first else y


def shuffle_pixels(x: Tensor, side: int) -> Tensor:
    """Join squares of side × side neighboring patches into one vector each: (N, T, D) -> (N, T/side², D·side²)."""
    N, T, D = x.shape
    grid = round(T**0.5)
    x = x.view(N, grid // side, side, grid // side, side, D).transpose(2, 3)
    return x.reshape(N, T // side**2, D * side**2)


class Projector(nn.Module):
    """Two layers, or one, from the tower's width to that of the text model: (N, T, D) -> (N, tokens, C)."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.side, self.activation = config.pixel_shuffle, FUNCTIONS[config.projector_activation]
        self.linear_1 = nn.Linear(config.hidden_size * self.side**2, hidden_size, bias=config.projector_bias)
        self.linear_2 = (
            nn.Linear(hidden_size, hidden_size, bias=config.projector_bias) if config.projector == "mlp" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.side > 1:
            x = shuffle_pixels(x, self.side)
        y: Tensor = self.linear_1(x)
        return y if self.linear_2 is None else self.linear_2(self.activation(y))


def replace_placeholders(embeddings: Tensor, ids: Tensor, features: Tensor, image_token_id: int) -> Tensor:
    """Return embeddings (B, T, C) in which those of the image tokens are the features (N, tokens, C), in their order.

    Raises ValueError where ids (B, T) have another number of image tokens than there are features.
    """
    placeholders = ids == image_token_id
    if type(ids) is Tensor:  # not a fake one of a forecast, which has no values
        tokens, available = int(placeholders.sum()), features.shape[0] * features.shape[1]
        if tokens != available:
            raise ValueError(
                f"there are {tokens:,} image tokens for {features.shape[0]:,} pictures of {features.shape[1]:,} "
                f"features each, which makes {available:,}."
            )
    return embeddings.masked_scatter(placeholders[..., None], features.to(embeddings.dtype))
