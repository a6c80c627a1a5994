"""Which matrices get more bits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.model.quantized import BITS, Bits, QuantizedMatrix, dequantize, encode, quantize, replace_matrices
from gptsmith.quantize.widths import (
    allocate,
    bits_per_weight,
    choose_widths,
    left_wide,
    loss_of_rounding,
    quantizable,
    total_bits,
)
from tests.factories import tiny_model

WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "initializer_range": 0.15}


def test_sizes_are_those_of_the_tensors() -> None:
    for bits in BITS:
        matrix = QuantizedMatrix.of(encode(torch.randn(64, 320), bits))
        tensors = (matrix.packed, matrix.scales, matrix.zero_points)
        assert sum(t.nbytes for t in tensors) * 8 / matrix.rows / 320 == bits_per_weight(bits, in_memory=True)


def test_widths_have_the_least_loss_of_all() -> None:
    """Among all widths of matrices of one size, up to the bits of a single step, which may not fit the budget."""
    losses = {"a": 1.0, "b": 0.3, "c": 0.05, "d": 0.01}
    sizes = dict.fromkeys(losses, 1000)
    for average in (4.5, 5.0, 5.25, 6.0, 7.1, 9.0):
        found = allocate(losses, sizes, average)
        assert total_bits(sizes, found) <= 4000 * average + 1e-6

        def loss(widths: Mapping[str, Bits]) -> float:
            return sum(losses[n] * 4.0 ** (4 - b) * (1.4 if b == 8 else 1) for n, b in widths.items())

        for each in itertools.product(BITS, repeat=4):
            other = dict(zip(losses, each, strict=True))
            if total_bits(sizes, other) <= 4000 * average - 1750:
                assert loss(found) <= loss(other) + 1e-12, (average, found, other)


def test_a_budget_below_four_bits_gives_four() -> None:
    assert allocate({"a": 1.0}, {"a": 100}, 3.0) == {"a": 4}
    assert allocate({}, {"a": 100}, 9.0) == {"a": 8}  # without an estimate, such as an expert without tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt1", "mixtral", "qwen2_moe"])
def test_estimates_follow_the_measured_divergence(family: str) -> None:
    """Rounding one matrix after the other: what the estimates are the largest for changes the predictions most."""
    model = tiny_model(family, **WIDE)
    ids = torch.randint(0, 30, (8, 24), generator=torch.Generator().manual_seed(0))
    requires = [p.requires_grad for p in model.parameters()]
    estimates = loss_of_rounding(model, ids)
    assert [p.requires_grad for p in model.parameters()] == requires
    assert not model.activation_checkpointing
    with torch.no_grad():
        full = model(ids).log_softmax(dim=-1)
    measured = {}
    for name in estimates:
        if name.split(".")[-1].isdigit():
            continue
        other = tiny_model(family, **WIDE)

        def rounded_one(n: str, w: Tensor, name: str = name) -> QuantizedMatrix | None:
            return QuantizedMatrix.of(encode(w.detach(), 4)) if n == name else None

        replace_matrices(other, rounded_one)
        with torch.no_grad():
            rounded = dequantize(other)(ids).log_softmax(dim=-1)
        measured[name] = float((full.exp() * (full - rounded)).sum(dim=-1).mean())
    order = sorted(measured, key=lambda name: measured[name])
    ranks = torch.tensor([sorted(order, key=lambda name: estimates[name]).index(name) for name in order]).float()
    places = torch.arange(len(order)).float()
    assert float(torch.corrcoef(torch.stack((ranks, places)))[0, 1]) > 0.6
    assert all(0.1 < estimates[name] / measured[name] < 10 for name in order)


def test_all_have_8_bits_with_8_and_none_more_than_the_budget_with_fewer() -> None:
    model = tiny_model("qwen3", **WIDE)
    ids = torch.randint(0, 30, (8, 24))
    assert set(choose_widths(model, ids, 8).values()) == {8}
    sizes = {name: weight.numel() for name, weight in quantizable(model).items()}
    for bits in (4, 5, 6):
        widths = choose_widths(model, ids, bits)
        assert total_bits(sizes, widths) <= (bits + 1) * sum(sizes.values())
        assert len(set(widths.values())) > 1
    assert set(choose_widths(model, ids, 4, budget=4.5).values()) == {4}


def test_which_matrices_are_quantized() -> None:
    """Those that `model.quantized.quantize` replaces."""
    for family, more in itertools.product(("gpt2", "qwen2_moe", "mixtral"), ({}, {"intermediate_size": 40})):
        model = tiny_model(family, **WIDE | more)
        names = set(quantizable(model))
        assert bool(left_wide(model)) == bool(more)
        quantized = quantize(tiny_model(family, **WIDE | more), 4)
        found = {path for path, module in quantized.named_modules() if isinstance(module, QuantizedMatrix)}
        assert names == {path for path in found if path.startswith("layers.")}
