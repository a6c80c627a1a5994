"""Rounding of a matrix for the inputs of a calibration text."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptsmith.model.quantized import BITS, GROUP, Bits, Codes, QuantizedMatrix, encode
from gptsmith.quantize import rounding
from gptsmith.quantize.file_matrix import FileMatrix
from gptsmith.quantize.rounding import round_matrix


def example(rows: int = 48, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and the second moments of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 2
    x = torch.randn(1000, columns, generator=generator) @ mixing
    x += 0.3 * torch.randn(1000, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 0.05, x.T @ x / 1000


def stored(hessian: Tensor) -> FileMatrix:
    matrix = FileMatrix(*hessian.shape)
    matrix.write(0, hessian)
    return matrix


def error(weight: Tensor, hessian: Tensor, codes: Codes) -> float:
    """The mean squared change of the products."""
    difference = (weight - QuantizedMatrix.of(codes).dequantized()).double()
    return float((difference @ hessian.double() * difference).sum())


@pytest.mark.parametrize("bits", BITS)
def test_products_change_less_than_with_the_nearest_numbers(bits: Bits) -> None:
    weight, hessian = example()
    nearest = error(weight, hessian, encode(weight, bits))
    gptq = error(weight, hessian, round_matrix(weight, stored(hessian), bits, rounds=0))
    refined = error(weight, hessian, round_matrix(weight, stored(hessian), bits))
    assert gptq < 0.6 * nearest
    assert refined < (1.0 if bits == 8 else 0.93) * gptq


def test_a_matrix_can_be_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = example()
    whole = round_matrix(weight, stored(hessian), 4)
    monkeypatch.setattr(rounding, "_CHUNK", 7 * 96)
    parts = round_matrix(weight, stored(hessian), 4)
    assert (parts.codes == whole.codes).double().mean() > 0.99  # up to the order of sums
    assert error(weight, hessian, parts) == pytest.approx(error(weight, hessian, whole), rel=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_no_single_code_can_be_improved(bits: Bits) -> None:
    """After coordinate descent, nearly no code has a neighbor that lowers the error (damping included)."""
    weight, hessian = example(rows=8, columns=32)
    made = round_matrix(weight, stored(hessian), bits, rounds=12)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    values = QuantizedMatrix.of(made).dequantized()
    gradient = (weight - values) @ damped  # (R, K)
    step = made.scales.float().repeat_interleave(GROUP, dim=1)
    better = 0
    for direction in (1, -1):
        moved = made.codes.int() + direction
        possible = (moved >= (1 if bits == 8 else 0)) & (moved < 2**bits)
        gain = 2 * direction * step * gradient - (direction * step) ** 2 * damped.diagonal()
        better += int(((gain > 1e-4 * step**2 * damped.diagonal()) & possible).sum())
    assert better <= 0.02 * weight.numel()


@pytest.mark.parametrize("bits", BITS)
def test_gptq_follows_its_definition(bits: Bits) -> None:
    """Column by column, from the largest inputs to the smallest; each error is spread over the columns that are left by
    regression, recomputed here for each column from the definition (2210.17323, equation 2)."""
    weight, hessian = example(rows=5, columns=64, seed=3)
    made = round_matrix(weight, stored(hessian), bits, rounds=0)
    scales = made.scales.float().repeat_interleave(GROUP, dim=1).double()
    zeros = -128 * scales
    if made.zero_points is not None:
        zeros = made.zero_points.float().repeat_interleave(GROUP, dim=1).double()
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)).double()
    w, left = weight.double().clone(), torch.ones(64, dtype=torch.bool)
    codes = torch.zeros_like(w)
    for k in damped.diagonal().argsort(descending=True).tolist():
        codes[:, k] = ((w[:, k] - zeros[:, k]) / scales[:, k]).round().clamp(1 if bits == 8 else 0, 2**bits - 1)
        change = codes[:, k] * scales[:, k] + zeros[:, k] - w[:, k]
        left[k] = False
        if left.any():
            w[:, left] -= torch.outer(change, torch.linalg.solve(damped[left][:, left], damped[left, k]))
    same = (codes == made.codes).double().mean()
    assert same > (0.97 if bits == 8 else 0.99)  # float32 against float64: ties


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), groups=st.integers(1, 3), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_odd_matrices(rows: int, groups: int, bits: Bits, seed: int) -> None:
    """Rows of zeros, constant groups, dead inputs, huge and tiny numbers: finite, and stored with scales of 8 bits."""
    weight, hessian = example(rows, 32 * groups, seed)
    weight[0] = 0.0
    weight[-1, :32] = 0.5
    weight *= 10.0 ** (seed % 5 - 3)
    dead = torch.arange(32 * groups) % 5 == seed % 5
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    matrix = QuantizedMatrix.of(round_matrix(weight, stored(hessian), bits))
    values = matrix.dequantized()
    assert values.isfinite().all()
    assert float((values - weight).abs().max()) < (0.6 if bits == 4 else 0.4) * float(weight.abs().max())
    assert not values[0].any() or rows == 1
    buffers = matrix.stored()
    assert (buffers["scales"].dtype, buffers["zero_points"].dtype) == (torch.uint8, torch.int8)


@pytest.mark.parametrize(("bits", "inputs"), list(itertools.product(BITS, ("none", "zero", "one"))))
def test_few_inputs(bits: Bits, inputs: str) -> None:
    """Without inputs, the nearest numbers; one input alone is multiplied nearly exactly."""
    weight, _ = example()
    x = torch.randn(96, generator=torch.Generator().manual_seed(1))
    hessian = {"none": None, "zero": torch.zeros(96, 96), "one": torch.outer(x, x)}[inputs]
    made = QuantizedMatrix.of(round_matrix(weight, None if hessian is None else stored(hessian), bits)).dequantized()
    nearest = QuantizedMatrix.of(encode(weight, bits)).dequantized()
    if inputs == "one":
        assert float(((made - weight) @ x).norm()) < 0.1 * float(((nearest - weight) @ x).norm())
    else:
        assert float((made - weight).norm()) < 1.05 * float((nearest - weight).norm())
