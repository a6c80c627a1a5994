"""Small models of every family, and the naive generation loop that the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gptsmith.engine.make_runner import Kernels
from gptsmith.kernels.threads import kernels_available
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model

CONTEXT = 24
VOCABULARY = 30

MakeModel = Callable[..., Transformer]
Naive = Callable[[Transformer, Sequence[int], int], list[int]]


COMPILED = pytest.mark.skipif(not kernels_available(), reason="needs numba and a processor with AVX-512 VNNI")
PROGRAMS = [
    *((family, "auto") for family in sorted(FAMILIES)),
    *(pytest.param(family, "always", marks=COMPILED) for family in sorted(FAMILIES) if family != "deepseek_v3"),
]
"""Families and `Kernels`: each runs by the general program, and all but one by the compiled one, too."""


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    def make(
        family: str, vocab_size: int = VOCABULARY, context: int = CONTEXT, seed: int = 3, kernels: Kernels = "auto"
    ) -> Transformer:
        sizes: dict[str, Any] = {}
        if kernels == "always":  # multiples of what the compiled program computes at once
            sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 128 if family == "gpt1" else 32}
            sizes["initializer_range"] = 0.3
        return tiny_model(family, seed=seed, vocab_size=vocab_size, max_position_embeddings=context, **sizes)

    return make


@pytest.fixture(scope="session")
def naive() -> Naive:
    """Return the greedy continuation, computed by running the whole model over all tokens for each token."""

    @torch.no_grad()
    def continue_(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]

    return continue_
