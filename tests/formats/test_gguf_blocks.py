"""Blocks of GGUF: decoding bit for bit as the gguf library, encoding at least as well as ggml's quantizers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import CheckpointError
from gptsmith.formats.gguf_blocks import TENSOR_TYPES, TYPES_BY_NAME, TensorType, decode, encode

gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")

QUANTIZED = [type for type in TENSOR_TYPES.values() if type.block_size > 1]
WRITTEN = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
HALVES |= {"Q6_K": (208,), "MXFP4": ()}


def library(raw: np.ndarray, type: TensorType) -> np.ndarray:
    with np.errstate(all="ignore"):
        numbers: np.ndarray = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type.number)).reshape(-1)
    return numbers


@pytest.mark.parametrize("type", TENSOR_TYPES.values(), ids=lambda type: type.name)
def test_decoding_equals_the_gguf_library(type: TensorType) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (5000, type.block_bytes), dtype=np.uint8)  # more than is decoded at a time
    for at in HALVES.get(type.name, (0,)) if type.block_size > 1 else ():
        raw[:, at : at + 2] = rng.normal(size=5000).astype("<f2").view(np.uint8).reshape(-1, 2)
    numbers = decode(type.name, raw)
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, library(raw, type))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type.number)] == (type.block_size, type.block_bytes)


def weights(seed: int, rows: int = 24, columns: int = 512) -> torch.Tensor:
    torch.manual_seed(seed)
    tail = torch.distributions.StudentT(4.0).sample((rows, columns))  # trained weights have heavy tails
    return 0.02 * tail * torch.rand(rows, 1).exp()


def error(numbers: Any, exact: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    squares = (torch.as_tensor(numbers).view_as(exact) - exact).square()
    return float((squares if weight is None else squares * weight).sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_encoding_is_at_least_as_good_as_the_gguf_library(name: str) -> None:
    w, type = weights(0), TYPES_BY_NAME[name]
    theirs = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType(type.number))
    ours = encode(name, w)
    assert ours.dtype == np.uint8
    if name == "Q8_0":
        np.testing.assert_array_equal(ours, theirs.reshape(-1))
    assert error(decode(name, ours), w) <= error(library(theirs, type), w) * 1.0001


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("weighted", [False, True])
def test_encoding_is_at_least_as_good_as_ggml(name: str, weighted: bool) -> None:
    """With importance as ggml's quantizers use it; Q5_0 and others of its old types without."""
    ggml = ggml_library()
    w, type = weights(1), TYPES_BY_NAME[name]
    importance = torch.rand(512).square() + 0.01
    columns = (ctypes.c_float * 512)(*importance.tolist()) if weighted else None
    theirs = ggml_blocks(ggml, w, type, columns)
    ours = encode(name, w, importance if weighted else None)
    assert theirs.shape == ours.shape
    scale = importance if weighted else None
    allowed = 1.05 if weighted or name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1") else 1.02
    assert (
        error(decode(name, ours), w, scale)
        <= error(library(theirs.reshape(-1, type.block_bytes), type), w, scale) * allowed
    )


@pytest.mark.parametrize("name", [type.name for type in QUANTIZED])
def test_blocks_of_ggml_are_decoded_as_it_decodes_them(name: str) -> None:
    ggml = ggml_library()
    w, type = weights(2), TYPES_BY_NAME[name]
    theirs = ggml_blocks(ggml, w, type, None)
    traits = ctypes.cast(ggml.ggml_get_type_traits(type.number), ctypes.POINTER(Traits)).contents
    assert (traits.block_size, traits.type_bytes) == (type.block_size, type.block_bytes)
    expected = np.empty(w.numel(), np.float32)
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    to_float(theirs.ctypes.data, expected.ctypes.data, w.numel())
    found = decode(name, theirs)
    # its compiler may fuse a multiplication with an addition, which rounds once less
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    if name not in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"):
        np.testing.assert_array_equal(found, expected)
    assert error(found, w) < 0.2 * float(w.square().sum())


class Traits(ctypes.Structure):
    """The beginning of ggml's `struct ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("type_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def ggml_library() -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the optional package llama-cpp-python is not installed")
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    if not found:
        pytest.skip("llama-cpp-python comes without a library ggml-base")
    ggml: Any = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    ggml.ggml_get_type_traits.restype = ctypes.c_void_p
    return ggml


def ggml_blocks(ggml: Any, w: torch.Tensor, type: TensorType, importance: Any) -> np.ndarray:
    source = np.ascontiguousarray(w.numpy())
    packed = np.empty(type.num_bytes(source.size), np.uint8)
    written = ggml.ggml_quantize_chunk(
        type.number, source.ctypes.data, packed.ctypes.data, 0, *source.shape, importance
    )
    assert written == packed.size
    return packed


@pytest.mark.parametrize("name", WRITTEN)
def test_importance_moves_the_error_to_columns_that_do_not_count(name: str) -> None:
    w = weights(3)
    importance = torch.where(torch.arange(512) % 8 == 0, 1000.0, 1.0)
    plain, weighted = (torch.from_numpy(decode(name, encode(name, w, each))) for each in (None, importance))
    if name == "Q8_0":
        assert torch.equal(plain, weighted)
        return
    assert error(weighted, w, importance) < 0.95 * error(plain, w, importance)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_stack_of_experts_has_an_importance_each(name: str) -> None:
    w = weights(4, rows=12).view(3, 4, 512)
    importance = torch.rand(3, 512)
    whole = encode(name, w, importance)
    parts = [encode(name, expert, columns) for expert, columns in zip(w, importance, strict=True)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "MXFP4", "Q6_K"])
def test_numbers_of_the_type_are_kept_exactly(name: str) -> None:
    """A file that is read and written again in the same type loses nothing more."""
    once = decode(name, encode(name, weights(5)))
    again = decode(name, encode(name, once.reshape(24, 512)))
    if name == "Q6_K":  # the scales of its groups are rounded to those of the whole block
        assert error(again, torch.from_numpy(once)) < 0.05 * error(once, weights(5).flatten())
    else:
        np.testing.assert_array_equal(again, once)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 6e-8, -3e-3, 1000.0], ids=lambda value: f"{value:g}")
def test_constant_and_nearly_empty_blocks(name: str, value: float) -> None:
    w = torch.full((2, 256), value)
    numbers = decode(name, encode(name, w))
    assert np.isfinite(numbers).all()
    assert np.abs(numbers - value).max() <= max(0.15 * abs(value), 4e-7)
    w[:, 1:] = 0
    numbers = decode(name, encode(name, w)).reshape(2, 256)
    assert np.abs(numbers[:, 0] - value).max() <= max(0.15 * abs(value), 4e-7)
    assert np.abs(numbers[:, 1:]).max() <= max(0.02 * abs(value), 4e-7)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(WRITTEN),
    seed=st.integers(0, 1 << 20),
    scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
    dead=st.floats(0, 1),
)
def test_errors_are_bounded_by_the_range_of_a_block(
    name: str, seed: int, scale: float, shift: float, dead: float
) -> None:
    torch.manual_seed(seed)
    w = scale * (torch.randn(2, 256) + shift)
    importance = torch.where(torch.rand(256) < dead, 0, torch.rand(256))
    numbers = decode(name, encode(name, w, importance))
    assert np.isfinite(numbers).all()
    assert np.abs(numbers - w.flatten().numpy()).max() <= float(w.abs().max())


def test_bad_numbers_and_importance_are_rejected() -> None:
    for name in WRITTEN[:-1]:
        with pytest.raises(CheckpointError, match=f"too large for {name}"):
            encode(name, torch.full((1, 256), 1e12))
    for importance in (torch.ones(255), -torch.ones(256), torch.full((256,), torch.nan)):
        with pytest.raises(CheckpointError, match="the importance of 256 columns is not"):
            encode("Q4_K", torch.ones(1, 256), importance)
