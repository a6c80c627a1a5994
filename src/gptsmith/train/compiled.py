"""Compiling the blocks of a model for training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from gptsmith.model.transformer import Transformer

COMPILE_SECONDS = 18.0  # to compile one block's forward and backward on a CPU; the other blocks share it
COMPILE_SAVES = 0.28  # of an update's time


def pays(seconds: float) -> bool:
    """Whether compiling is worth its time on a CPU, for a run whose passes take so many seconds without it."""
    return seconds * COMPILE_SAVES > 1.5 * COMPILE_SECONDS


def compile_blocks(model: Transformer) -> None:
    """Compile one block; all share its code, so it costs the same whatever the depth."""
    # Dynamo looks at the block's input as if it were a parameter, and torch warns of that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in model.layers:
        layer.forward = _compiled_while_training(layer)


def undo_compile(model: Transformer) -> None:
    for layer in model.layers:
        del layer.forward


def _compiled_while_training(module: torch.nn.Module) -> Callable[..., Any]:
    """A forward that is compiled while `module` trains. Evaluation and generation come in other shapes, each of which
    would be compiled anew: they run as written."""
    eager = module.forward
    compiled = torch.compile(eager)
    return lambda *arguments: (compiled if module.training else eager)(*arguments)
