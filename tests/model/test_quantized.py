"""Quantized weights: packing, products, and whole models that are quantized, saved, loaded and dequantized."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.kernels import threads as kernel_threads
from gptsmith.model import families, quantized
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.quantized import (
    BITS,
    Bits,
    Codes,
    QuantizedMatrix,
    bits_of,
    dequantize,
    encode,
    load_quantized_state,
    pack,
    quantize,
    quantize_on_gpu,
    quantize_skeleton,
    quantized_state,
    scales_of,
    unpack,
)
from tests.factories import tiny_model

make_model = functools.partial(
    tiny_model,
    vocab_size=101,
    hidden_size=64,
    num_key_value_heads=None,
    intermediate_size=96,
    max_position_embeddings=32,
    initializer_range=0.1,
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), groups=st.integers(1, 5), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows: int, groups: int, bits: Bits, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 32 * groups), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.numel() == -(-rows // 16) * 16 * groups * 4 * bits
    assert torch.equal(unpack(packed, bits, rows), codes)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_error_is_small(bits: Bits) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * torch.rand(64, 1) * 3
    matrix = QuantizedMatrix.of(encode(weight, bits))
    assert relative(matrix.dequantized(), weight) < {8: 0.006, 6: 0.02, 5: 0.04, 4: 0.08}[bits]
    rows = torch.tensor([0, 63, 17, 17])
    assert torch.equal(matrix.rows_at(rows), matrix.dequantized()[rows])
    for exact in (torch.zeros(16, 32), torch.full((16, 32), 0.5), torch.arange(16.0).repeat(16, 2) - 3):
        if bits == 4 or exact.unique().numel() == 1:  # representable in sixteen steps
            torch.testing.assert_close(
                QuantizedMatrix.of(encode(exact, bits)).dequantized(), exact, atol=1e-3, rtol=1e-3
            )


def test_clipping_the_range_lowers_the_error_of_4_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 320)
    made = encode(weight, 4)
    assert made.zero_points is not None
    low, high = weight.view(32, 10, 32).aminmax(dim=-1)
    step = (high - low) / 15
    plain = ((weight.view(32, 10, 32) - low[..., None]) / step[..., None]).round() * step[..., None] + low[..., None]
    ours = made.codes.view(32, 10, 32).float() * made.scales.float()[..., None] + made.zero_points.float()[..., None]
    assert relative(ours.flatten(1), weight) < 0.99 * relative(plain.flatten(1), weight)


@pytest.mark.skipif(not kernel_threads.kernels_available(), reason="needs numba and a processor with AVX-512 VNNI")
@pytest.mark.parametrize(("bits", "threads"), list(itertools.product(BITS, (1, 2))))
def test_kernels_equal_the_dequantized_product(bits: Bits, threads: int) -> None:
    """Up to the rounding of inputs to 8 bits (twice 8 bits in 8 bits); exactly for inputs that 8 bits represent."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, columns, tokens in itertools.product((16, 40, 129), (32, 160), (1, 2, 3, 7, 8, 21)):
            matrix = QuantizedMatrix.of(encode(torch.randn(rows, columns), bits))
            x = torch.randn(tokens, columns)
            assert relative(matrix.multiply(x), x @ matrix.dequantized().T) < (1e-4 if bits == 8 else 0.02)
            exact = torch.randint(-127, 128, (tokens, columns)).float()
            exact.view(tokens, -1, 32)[..., 0] = 127
            torch.testing.assert_close(
                matrix.multiply(exact[:, None])[:, 0], exact @ matrix.dequantized().T, atol=0.02, rtol=1e-4
            )
        assert matrix.multiply(torch.zeros(0, columns)).shape == (0, rows)
        assert torch.equal(matrix.multiply(torch.zeros(1, columns)), torch.zeros(1, rows))
    finally:
        torch.set_num_threads(before)


def keep_experts(monkeypatch: pytest.MonkeyPatch, closest: float) -> Callable[[], None]:
    """Let tokens keep the experts of the first forward pass, so that near ties of the router do not decide a
    comparison. A choice that is not a near tie must not change: scores of other experts are higher by `closest` at
    most. Call what this returns before each further pass.
    """
    choose, first, rest = MixtureOfExperts.choose, list[torch.Tensor](), list[torch.Tensor]()
    recording = True

    def chosen(self: MixtureOfExperts, scores: torch.Tensor) -> torch.Tensor:
        own = choose(self, scores)
        if recording:
            first.append(own)
            return own
        kept = rest.pop(0)
        if self.groups == 1:  # else the groups are chosen before
            choice = scores + self.score_correction_bias if self.sigmoid else scores
            missed = choice.gather(1, own).amin(dim=1) - choice.gather(1, kept).amin(dim=1)
            assert missed.max() < closest
        return kept

    def again() -> None:
        nonlocal recording, rest
        assert not rest
        recording, rest = False, list(first)

    monkeypatch.setattr(MixtureOfExperts, "choose", chosen)
    return again


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_logits_stay_nearly_the_same(family: str, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    ids = torch.randint(0, 101, (2, 20))
    again = keep_experts(monkeypatch, closest=0.01 if bits == 8 else 0.1)
    with torch.no_grad():
        before = model(ids)
        quantize(model, bits)
        again()
        after = model(ids)
        again()
        monkeypatch.setattr(quantized, "kernels_available", lambda: False)
        without_kernels = model(ids)
    assert relative(after, before) < (0.05 if bits == 8 else 0.35)
    assert relative(after, without_kernels) < 0.05
    unquantized = [name for name, p in model.named_parameters() if p.dim() > 1 and quantized.can_quantize(p)]
    kept = ("router", "gate", "position", "_bias")
    assert all(any(part in name for part in kept) for name in unquantized)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_scales_of_8_bits_are_stored_exactly(rows: int, groups: int, bits: Bits, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = (torch.rand(rows, 2, generator=generator) * 1e-3 + 1e-4).bfloat16()
    scale_codes = torch.randint(0, 256, (rows, groups), generator=generator).to(torch.uint8)
    zero_codes = torch.randint(-127, 128, (rows, groups), generator=generator).to(torch.int8) if bits < 8 else None
    units[:, 1] = torch.maximum(units[:, 1], (scale_codes.amax(dim=1) * units[:, 0] * 2.0 ** (bits - 10)).bfloat16())
    scales, zero_points = scales_of(scale_codes, zero_codes, units[:, :1], units[:, 1:], bits)
    codes = torch.randint(0, 2**bits, (rows, 32 * groups), generator=generator).to(torch.uint8)
    matrix = QuantizedMatrix.of(Codes(bits, codes, scales, zero_points, units))
    stored = matrix.stored()
    assert stored["scales"].dtype == torch.uint8
    other = QuantizedMatrix(rows, 32 * groups, bits)
    other.load(stored)
    assert torch.equal(other.dequantized(), matrix.dequantized())
    other.scales[0, 0, 0] = 1.5 * units[0, 0]  # no multiple of the unit
    assert other.stored()["scales"].dtype == torch.float16


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded(family: str, bits: Bits) -> None:
    model = quantize(make_model(family), bits)
    tensors = {name: tensor.clone() for name, tensor in quantized_state(model).items()}
    assert "layers.0.attention.o_proj.weight.least" in tensors  # zero points keep the name that earlier versions wrote
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    other = quantize_skeleton(make_model(family), shapes, "here")
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    load_quantized_state(other, tensors, "here")
    ids = torch.randint(0, 101, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))
    name = next(name for name in tensors if name.endswith("o_proj.weight.packed"))
    with pytest.raises(CheckpointError, match="here has no tensor .*o_proj"):
        quantize_skeleton(make_model(family), {n: s for n, s in shapes.items() if n != name}, "here")
    with pytest.raises(CheckpointError, match=r"o_proj.weight.packed is .* expected"):
        quantize_skeleton(make_model(family), shapes | {name: (4, 2, 100)}, "here")
    with pytest.raises(CheckpointError, match=r"norm.weight is .* expected"):
        quantize_skeleton(make_model(family), shapes | {"norm.weight": (1,)}, "here")
    with pytest.raises(CheckpointError, match="expected torch.uint8"):
        load_quantized_state(other, tensors | {name: tensors[name].float()}, "here")


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize("bits", BITS)
def test_dequantized(family: str, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    quantize(model, bits)
    ids = torch.randint(0, 101, (1, 9))
    again = keep_experts(monkeypatch, closest=0.01)
    with torch.no_grad():
        packed = model(ids)
        dequantize(model)
        again()
        assert relative(packed, model(ids)) < 0.03  # the rounding of inputs
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == names
    assert bits_of(model) is None
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.skipif(not kernel_threads.kernels_available(), reason="needs numba and a processor with AVX-512 VNNI")
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_infinity_are_not_lost(bits: Bits) -> None:
    """Rounding inputs to 8 bits must not turn them into finite numbers: the engine checks for them."""
    matrix = QuantizedMatrix.of(encode(torch.randn(48, 96), bits))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 96)
        x[1, 40] = bad
        y = matrix.multiply(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("openmp", [True, False])
def test_a_failing_thread_releases_the_others_from_the_barrier(
    threads: int, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C can arrive just before a thread starts the program."""
    if not openmp:
        monkeypatch.setattr(kernel_threads, "_openmp", lambda: None)
    seen: list[tuple[int, int]] = []

    def program(thread: int, threads: int, counter: int) -> None:
        seen.append((thread, threads))
        if thread == 0:
            raise KeyboardInterrupt
        count = ctypes.c_int64.from_address(counter)
        while count.value < threads:
            time.sleep(0.001)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(KeyboardInterrupt):
            kernel_threads.run_in_threads(program)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(i, threads) for i in range(threads)]


def test_on_a_gpu_through_torchao() -> None:
    """torchao's 8-bit layers work on a CPU, too: which layers are quantized, and which are not."""
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (an extra: gptsmith[gpu])")
    model = make_model("qwen2_moe")
    ids = torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        before = model(ids)
        quantize_on_gpu(model, 8)
        assert relative(model(ids), before) < 0.05
    attention: Any = model.layers[0].attention
    assert type(attention.qkv_proj.weight).__name__ != "Parameter"
    assert type(model.lm_head.weight) is torch.nn.Parameter


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu(bits: Bits) -> None:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (an extra: gptsmith[gpu])")
    model = make_model("qwen3", hidden_size=1024).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 101, (2, 20), device="cuda")
    with torch.no_grad():
        before = model(ids)
        assert relative(quantize_on_gpu(model, bits)(ids), before) < (0.05 if bits == 8 else 0.35)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match="needs torchao: pip install"):
        quantize_on_gpu(make_model("gpt2"), 8)


def test_refused_models_and_bits() -> None:
    with pytest.raises(UsageError, match="4, 5, 6 or 8"):
        quantize(make_model("gpt2"), 3)  # type: ignore[arg-type]
    narrow = make_model("gpt2", hidden_size=20)
    for layer in narrow.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(UsageError, match="multiple of 32"):
        quantize(narrow, 8)
