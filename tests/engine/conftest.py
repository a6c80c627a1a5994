"""Small models of every family, and the loop that needs no engine: the reference for all that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from gptsmith.model import families
from gptsmith.model.transformer import Transformer

CONTEXT = 24
VOCABULARY = 30

MakeModel = Callable[..., Transformer]
Naive = Callable[[Transformer, Sequence[int], int], list[int]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    def make(family: str, vocab_size: int = VOCABULARY, context: int = CONTEXT, seed: int = 3) -> Transformer:
        torch.manual_seed(seed)
        options: dict[str, object] = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": 24}
        if family in ("gpt3", "mistral"):
            options["sliding_window"] = 7
        if family in ("llama", "qwen3"):
            options["num_key_value_heads"] = 1
        if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
            options |= {"num_experts": 4, "num_experts_per_tok": 2}
        config = families.FAMILIES[family](
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=context,
            initializer_range=0.4,
            **options,
        )
        return Transformer(config).eval()

    return make


@pytest.fixture(scope="session")
def naive() -> Naive:
    """Greedy continuation by the whole model over all tokens, every time."""

    @torch.no_grad()
    def continue_(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]

    return continue_
