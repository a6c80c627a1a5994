"""How many blocks the cache gets."""

from __future__ import annotations

import os
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer

_MEMORY_FRACTION = {"cpu": 0.25, "cuda": 0.8}  # that the cache takes at most by default


def pool_sizes(
    windows: Items[int | None], cache_tokens: int, *, max_batch: int, max_batch_tokens: int, block_size: int
) -> list[int]:
    """Return the number of blocks of each group of layers.

    A group with full attention has room for `cache_tokens`. A group with a sliding window needs no more than the
    windows of a full batch and the tokens of one step, and no less than one sequence holds during a step.
    """
    blocks = -(-cache_tokens // block_size)
    sizes = []
    for window in windows:
        if window is None:
            sizes.append(blocks)
            continue
        one_sequence = -(-(window + max_batch_tokens) // block_size) + 2
        full_batch = max_batch * (-(-window // block_size) + 2) + -(-max_batch_tokens // block_size)
        sizes.append(max(one_sequence, min(blocks, full_batch)))
    return sizes


def cache_config(model: Transformer) -> ModelConfig:
    """Return a configuration with the heads that this process has: with tensor parallelism, a part of the model's."""
    attention: Any = model.layers[0].attention
    if getattr(attention, "kv_heads", None) in (None, model.config.num_key_value_heads):
        return model.config
    return replace(model.config, num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads)


def cache_bytes_per_token(config: ModelConfig, element_size: int) -> int:
    """Return the bytes of the keys and values of one token. element_size: bytes of a number."""
    tensors = 2 if config.kv_lora_rank is None else 1
    return tensors * config.num_hidden_layers * config.cached_heads * config.cached_key_dim * element_size


def default_cache_tokens(config: ModelConfig, max_batch: int, block_size: int, weight: Tensor) -> int:
    """Return how many tokens the cache holds by default: what a full batch can need, within a fraction of the memory.

    weight: any of the model's weights, for its device and type.
    """
    bytes_per_token = cache_bytes_per_token(config, weight.element_size())
    if weight.device.type == "cuda":
        memory, _ = torch.cuda.mem_get_info(weight.device)
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = 8 << 30
    affordable = int(memory * _MEMORY_FRACTION.get(weight.device.type, 0.25)) // bytes_per_token
    context = -(-config.max_position_embeddings // block_size) * block_size
    return max(1, min(max_batch * context, affordable))
