"""The keys and values of the tokens seen so far. An argument of `forward`, never hidden in the model."""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig


class KVCache:
    """Room for `capacity` tokens of `batch` sequences: keys and values are (L, B, K, capacity, D).

    `length` tokens of it are filled. The model appends to it and advances `length` at the end of a forward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's new k, v: (B, K, T, D); return all of it so far: (B, K, length + T, D)."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise IndexError(f"the cache holds {self.capacity} tokens, {end} were asked for")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
