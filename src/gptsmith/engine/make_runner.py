"""Selects how a model is run."""

from __future__ import annotations

from typing import Literal

import torch

from gptsmith.engine.cpu_runner import CpuRunner, is_supported, worth_compiling
from gptsmith.engine.cuda_graphs import GraphRunner
from gptsmith.engine.runner import Runner
from gptsmith.model.cache import PagedCache
from gptsmith.model.transformer import Transformer

Kernels = Literal["auto", "always", "never"]
"""Whether the engine runs kernels of its own. auto: where the time to compile them is likely to pay. always: wherever
they can run the model on a CPU. never: it runs the model's forward, as training does."""


def make_runner(model: Transformer, cache: PagedCache, vocab_size: int, *, kernels: Kernels = "auto") -> Runner:
    """Return the fastest runner that `kernels` allows for this model on its device."""
    if kernels == "never":
        return Runner(model, cache, vocab_size)
    if cache.keys[0].is_cuda and not model.config.num_experts:  # how many tokens an expert has is not known to a graph
        return GraphRunner(model, cache, vocab_size)
    if (kernels == "always" or worth_compiling(model)) and is_supported(model) and cache.keys[0].dtype == torch.float32:
        return CpuRunner(model, cache, vocab_size)
    return Runner(model, cache, vocab_size)
