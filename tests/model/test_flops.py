from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.model.families import FAMILIES, SIZES, by_depth, qwen3
from gptsmith.model.flops import attended, count_parameters, flops_per_token
from gptsmith.model.transformer import Transformer


@pytest.mark.parametrize("name", SIZES)
def test_counts_the_parameters_of_the_model(name: str) -> None:
    family, options = SIZES[name]
    config = FAMILIES[family](**options)
    with torch.device("meta"):
        assert count_parameters(config).total == Transformer(config, initialize=False).num_parameters()


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
)
def test_counts_odd_sizes(family: str, tied: bool, layers: int, heads: int) -> None:
    config = FAMILIES[family](
        vocab_size=17,
        hidden_size=8 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=8,
        intermediate_size=20,
        max_position_embeddings=12,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        assert count_parameters(config).total == Transformer(config, initialize=False).num_parameters()


def test_flops_equal_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = qwen3(**by_depth(2), vocab_size=50, max_position_embeddings=32)
    model, ids = Transformer(config), torch.zeros(3, 32, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids).sum().backward()
    attention = 12 * 2 * 128 * 32  # which torch does not count on a CPU
    assert counter.get_total_flops() / ids.numel() == flops_per_token(config, 32) - attention


def test_causal_and_sliding_window_scores_are_counted_without_masked_ones() -> None:
    config = FAMILIES["gpt3"](sliding_window=4, max_position_embeddings=16)
    every = [sum(min(t + 1, window) for t in range(16)) / 16 for window in (16, 4)]
    assert [attended(config, layer, 16) for layer in (0, 1)] == every
    assert flops_per_token(config, 16, full_attention=False) < flops_per_token(config, 16)
    assert flops_per_token(config, 16) == 3 * flops_per_token(config, 16, training=False)


def test_only_the_experts_of_a_token_are_multiplied() -> None:
    config = FAMILIES["mixtral"]()
    size = count_parameters(config)
    assert size.total == 46_702_792_704
    assert size.multiplied == pytest.approx(12.75e9, rel=0.001)  # published as 12.9B active, embeddings included
