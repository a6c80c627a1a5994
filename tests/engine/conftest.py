"""Small models of every family, and the naive generation loop that the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from gptsmith.model.transformer import Transformer
from tests.factories import tiny_model

CONTEXT = 24
VOCABULARY = 30

MakeModel = Callable[..., Transformer]
Naive = Callable[[Transformer, Sequence[int], int], list[int]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    def make(family: str, vocab_size: int = VOCABULARY, context: int = CONTEXT, seed: int = 3) -> Transformer:
        return tiny_model(family, seed=seed, vocab_size=vocab_size, max_position_embeddings=context)

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
