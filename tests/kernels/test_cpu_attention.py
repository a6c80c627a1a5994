"""The C++ attention kernel for training on a CPU, against torch's attention in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels import cpu_attention as module
from gptsmith.kernels.cpu_attention import fused_attention, is_supported, library
from gptsmith.runtime import compiler_available

needs_compiler = pytest.mark.skipif(not compiler_available(torch.device("cpu")), reason="needs a C++ compiler")


def random_inputs(B: int, H: int, K: int, T: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as in the model: views of one projection's output, tokens before heads."""
    torch.manual_seed(T)
    qkv = torch.randn(B, T, H + 2 * K, D)
    q, k, v = (x.transpose(1, 2) for x in qkv.split((H, K, K), dim=2))
    return q, k, v


def outputs_and_gradients(attention: object, dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
    y = attention(*inputs)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


SHAPES = [(2, 4, 4, 128, 32), (1, 6, 2, 64, 64), (3, 2, 1, 96, 48), (1, 1, 1, 32, 16), (1, 2, 2, 256, 80)]


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]  # of processors, each including those before it


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compile the kernel for processors with this capability."""
    own = torch.backends.cpu.get_cpu_capability()
    if request.param != own and (
        own not in CAPABILITIES or CAPABILITIES.index(request.param) > CAPABILITIES.index(own)
    ):
        pytest.skip(f"this processor has {own}, not {request.param}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    library.cache_clear()
    yield request.param
    library.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("scale", "absolute"), [(None, 2e-5), (1.0, 5e-5)])
def test_equals_torch_on_every_processor(capability: str, scale: float | None, absolute: float) -> None:
    assert library() is not None
    for shape in SHAPES:
        inputs = random_inputs(*shape)
        assert is_supported(*inputs)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        ours = outputs_and_gradients(lambda q, k, v: fused_attention(q, k, v, scale), torch.float32, inputs)
        theirs = outputs_and_gradients(reference, torch.float64, inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=absolute)


def documents_of(B: int, T: int) -> Tensor:
    """Return the first visible token of each token, for documents of different lengths in every row: (B, T)."""
    position = torch.arange(T)
    return torch.stack([position - position % (7 + 13 * row) for row in range(B)])


def masked_reference(first: Tensor, scale: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    position = torch.arange(first.shape[1])
    mask = ((position >= first[..., None]) & (position <= position[:, None]))[:, None]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    return reference


@needs_compiler
def test_documents_equal_torch_s_mask(capability: str) -> None:
    for B, H, K, T, D in SHAPES:
        inputs, first = random_inputs(B, H, K, T, D), documents_of(B, T)
        ours = outputs_and_gradients(
            lambda q, k, v, first=first: fused_attention(q, k, v, None, first), torch.float32, inputs
        )
        theirs = outputs_and_gradients(masked_reference(first), torch.float64, inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@needs_compiler
def test_a_document_changes_no_bit_of_another() -> None:
    """Nor of its gradients."""
    inputs, first = random_inputs(2, 2, 1, 96, 16), documents_of(2, 96)
    chosen = (first == first[1, 50]) & (torch.arange(2)[:, None] == 1)
    others = tuple(torch.where(chosen[:, None, :, None], x + 1, x) for x in inputs)
    before, after = (
        outputs_and_gradients(lambda q, k, v: fused_attention(q, k, v, None, first), torch.float32, each)
        for each in (inputs, others)
    )
    for a, b in zip(before, after, strict=True):
        a, b = a.transpose(1, 2), b.transpose(1, 2)  # (B, T, H, D)
        assert torch.equal(a[~chosen], b[~chosen])
        assert not torch.equal(a[chosen], b[chosen])


@needs_compiler
def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    q, k, v = (100 * x for x in random_inputs(1, 2, 2, 64, 32))
    y = fused_attention(q, k, v)
    reference = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(y.double(), reference, rtol=1e-3, atol=1e-2)


@needs_compiler
def test_nan_reaches_later_tokens_only() -> None:
    q, k, v = random_inputs(1, 1, 1, 64, 16)
    k = k.clone()
    k[0, 0, 40, 3] = math.nan
    y = fused_attention(q, k, v)
    assert y[0, 0, :40].isfinite().all()
    assert y[0, 0, 40:].isnan().all()


@needs_compiler
def test_does_not_depend_on_the_number_of_threads() -> None:
    inputs = random_inputs(3, 2, 1, 64, 32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(fused_attention, torch.float32, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_an_expanded_output_gradient() -> None:
    q, k, v = (x.detach().requires_grad_() for x in random_inputs(1, 2, 2, 32, 16))
    fused_attention(q, k, v).sum().backward()  # its gradient is an expanded 1
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))
    for x, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_torch_s_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", lambda: None)
    inputs = random_inputs(2, 4, 2, 32, 16)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    ours = outputs_and_gradients(fused_attention, torch.float32, inputs)
    theirs = outputs_and_gradients(reference, torch.float32, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    first = documents_of(2, 32)
    ours = outputs_and_gradients(lambda q, k, v: fused_attention(q, k, v, None, first), torch.float32, inputs)
    theirs = outputs_and_gradients(masked_reference(first), torch.float32, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_failing_compiler_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("GPTSMITH_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    try:
        assert library() is None
        assert not list((tmp_path / "cache" / "kernels").iterdir())
    finally:
        library.cache_clear()


@needs_compiler
def test_compiled_blocks_call_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptsmith.model.attention import attend

    q, k, v = (x.detach().requires_grad_() for x in random_inputs(1, 2, 2, 32, 16))
    with torch.profiler.profile() as profile:
        torch.compile(attend)(q, k, v).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"gptsmith::attention", "gptsmith::attention_backward"} <= names
