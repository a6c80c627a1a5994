"""Selects how a model is run."""

from __future__ import annotations

from typing import Literal

import torch

from gptsmith.engine.cpu_runner import CpuRunner, is_supported, unsupported, worth_compiling
from gptsmith.engine.cuda_graphs import GraphRunner
from gptsmith.engine.runner import Runner
from gptsmith.kernels.threads import kernels_available
from gptsmith.log import note
from gptsmith.model.cache import PagedCache
from gptsmith.model.lora import lora_layers
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
    if (kernels == "always" or worth_compiling(model)) and not cache.keys[0].is_cuda:
        if is_supported(model) and cache.keys[0].dtype == torch.float32:
            return CpuRunner(model, cache, vocab_size)
        reason = unsupported(model)
        if reason is not None and kernels_available() and not lora_layers(model):  # a model in training is no news
            note(f"note: the compiled program for CPUs has no {reason}: PyTorch runs this model, which is slower.")
    return Runner(model, cache, vocab_size)
