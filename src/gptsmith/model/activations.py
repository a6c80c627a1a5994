"""The activations of feed-forward layers, as transformers computes them (its `ACT2FN`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.model.config import ModelConfig


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016, 1606.08415). Compiled for a CPU it uses the identity
    1 + tanh(y) = 2·sigmoid(2y), since sigmoid takes half the time of tanh there."""
    if torch.compiler.is_compiling() and x.is_cpu:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))
    return F.gelu(x, approximate="tanh")


def laplace(x: Tensor) -> Tensor:
    """The distribution function of N(√½, 1/(4π)), which approximates relu² (Ma et al. 2022, 2209.10655)."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def gelu_10(x: Tensor) -> Tensor:
    """GELU between -10 and 10."""
    return F.gelu(x).clamp(-10, 10)


def linear(x: Tensor) -> Tensor:
    """x itself: with a gate, a bilinear layer."""
    return x


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), an approximation of GELU (1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, 2109.08668)."""
    return F.relu(x).square()


def sqrtsoftplus(x: Tensor) -> Tensor:
    """√softplus(x)."""
    return F.softplus(x).sqrt()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": gelu_10,
    "gelu_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrtsoftplus,
    "tanh": torch.tanh,
}
"""The functions of `config.ACTIVATIONS`."""


def gate_function(config: ModelConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what a feed-forward layer with a gate computes of gate and up, before its last matrix."""
    if config.mlp == "clamped_swiglu":
        alpha, limit = config.swiglu_alpha, config.swiglu_limit

        def clamped(gate: Tensor, up: Tensor) -> Tensor:
            gate = gate.clamp(max=limit)
            return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)

        return clamped
    activation = FUNCTIONS[config.activation]
    return lambda gate, up: activation(gate) * up
