"""Angles of rotary position embeddings (Su et al. 2021, 2104.09864), plain or scaled to a longer context.

Axis letters: T positions · D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig, RopeScaling


def rope_tables(
    config: ModelConfig, device: torch.device | None = None, *, local: bool = False
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of every position of the context: two (T, D/2) float32 tensors.

    D: the part of a head that is rotated. local: of the layers with `local_rope_theta`.
    """
    theta = config.local_rope_theta if local else config.rope_theta
    assert theta is not None
    D = config.rotary_dim
    frequencies = theta ** -(torch.arange(0, D, 2, device=device).double() / D)
    attention_factor = 1.0
    if config.rope_scaling is not None and not local:
        frequencies, attention_factor = scale_frequencies(frequencies, config.rope_scaling, theta)
    positions = torch.arange(config.max_position_embeddings, device=device).double()
    angles = positions[:, None] * frequencies
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling, theta: float) -> tuple[Tensor, float]:
    """Return the scaled frequencies (D/2,), and the factor by which cosines and sines are multiplied."""
    if scaling.kind == "longrope":
        divisors = torch.tensor(scaling.short_factor, dtype=torch.float64, device=frequencies.device)
        return frequencies / divisors, attention_factor(scaling)
    slowed = frequencies / scaling.factor
    original = scaling.original_max_position_embeddings or 0
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "proportional":
        turning = int(scaling.partial_rotary_factor * 2 * len(frequencies) // 2)
        slowed[turning:] = 0
        return slowed, 1.0
    if scaling.kind == "llama3":
        turns = original * frequencies / (2 * math.pi)  # over the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return slowed * (1 - keep) + frequencies * keep, 1.0
    # YaRN: dimensions that turn more than beta_fast times over the original context are kept, those that turn less than
    # beta_slow times are slowed down, those in between are interpolated (2309.00071, section 3.2).
    size = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    index = torch.arange(len(frequencies), device=frequencies.device).double()
    slow = ((index - first) / (last - first)).clamp(0, 1)
    return slowed * slow + frequencies * (1 - slow), attention_factor(scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """Return what YaRN and LongRoPE multiply cosines and sines by."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings or 0))


def extend_context(
    config: ModelConfig, context: int, method: Literal["linear", "ntk", "yarn", "llama3"] | None = None
) -> ModelConfig:
    """Return the configuration for a context of `context` tokens, with weights that were trained on a shorter one.

    ntk: raise rope_theta so that the slowest dimension turns as far over the new context as over the old one; nothing
        else changes. linear, yarn, llama3: see `RopeScaling`. None: yarn; in a model with LongRoPE, the divisors for
        long contexts replace those for short ones, at all positions.
    Raises UsageError for learned positions, or if the context is not longer than before.
    """
    old = config.max_position_embeddings
    if config.position != "rope":
        raise UsageError(f"the learned positions of this model end at {old}; only rotary positions can be extended.")
    if context <= old:
        raise UsageError(f"the context is already {old}; {context} does not extend it.")
    assert config.rope_theta is not None
    scaling = config.rope_scaling
    if method is None and scaling is not None and scaling.short_factor != scaling.long_factor:
        scaling = replace(scaling, short_factor=scaling.long_factor)
        return replace(config, max_position_embeddings=context, rope_scaling=scaling)
    if scaling is not None:
        raise UsageError("the context of this model has already been extended.")
    factor = context / old
    if method == "ntk":
        theta = config.rope_theta * factor ** (config.rotary_dim / max(1, config.rotary_dim - 2))
        return replace(config, max_position_embeddings=context, rope_theta=theta)
    scaling = RopeScaling(kind=method or "yarn", factor=factor, original_max_position_embeddings=old)
    return replace(config, max_position_embeddings=context, rope_scaling=scaling)
