"""Causal attention for training on a CPU, in C++ where there is a compiler.

At the sizes that are trained on a CPU, torch's kernel reaches a third of the machine's matrix multiplication rate,
since each of its small products is a library call. `cpu_attention.cpp` keeps them in registers. It is compiled in a few
seconds when it is first used, and cached on disk; where that fails, torch's kernel is called.

Axis letters: B batch · H heads · K key/value heads · T tokens · D head_dim.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import GptsmithError
from gptsmith.runtime import cache_directory, compiler_available

BLOCK, LANES = 32, 16  # T and D must be multiples of these


def is_supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernel can compute the attention of q: (B, H, T, D) over k, v: (B, K, T, D): float32 on a CPU,
    T and D multiples of `BLOCK` and `LANES`."""
    T, D = q.shape[2:]
    alike = q.dtype == k.dtype == v.dtype == torch.float32 and v.shape[-1] == D
    return q.is_cpu and alike and T % BLOCK == 0 and D % LANES == 0


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, first_visible: Tensor | None = None
) -> Tensor:
    """Return softmax(q kᵀ · scale) v, where each token sees itself and the past: (B, H, T, D).

    q: (B, H, T, D); k, v: (B, K, T, D), K dividing H; shapes as `is_supported` checks. scale: None: 1/√D.
    first_visible: (B, T) int64, the first token that each token sees, which may not decrease along T (documents,
        sliding windows); None: the first of the row.
    """
    y: Tensor = _forward(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, first_visible)[0]
    return y


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None where it cannot be compiled."""
    if not compiler_available(torch.device("cpu")):
        return None
    # The target architecture, and the floats per register: accumulators in longer vectors would spill to memory.
    levels = {"AVX512": ("-march=x86-64-v4", 16), "AVX2": ("-march=x86-64-v3", 8)}
    level, numbers = levels.get(torch.backends.cpu.get_cpu_capability(), ("", 4))
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    options = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *level.split()]
    options += [f"-DQUERIES={BLOCK}", f"-DNUMBERS={numbers}"]
    source = Path(__file__).with_suffix(".cpp")
    key = hashlib.sha256(repr((source.read_text(encoding="utf-8"), compiler, options)).encode()).hexdigest()[:16]
    try:
        built = cache_directory() / "kernels" / f"attention-{key}.so"
        if not built.exists():
            built.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as directory:
                new = Path(directory) / built.name
                subprocess.run([compiler, *options, str(source), "-o", str(new)], check=True, capture_output=True)
                new.replace(built)  # atomic, since other processes may be compiling it too
        return ctypes.CDLL(str(built))
    except (GptsmithError, OSError, subprocess.SubprocessError):
        return None


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


def _describe(x: Tensor) -> Any:
    return ctypes.byref(_Tensor(x.data_ptr(), *x.stride()[:3]))


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a contiguous tensor; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _sizes(q: Tensor, k: Tensor) -> Any:
    B, H, T, D = q.shape
    return (ctypes.c_int64 * 5)(B, H, k.shape[1], T, D)


def _contiguous_last(x: Tensor) -> Tensor:
    """Return x, or a copy of it, with a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape (B, H, T, D) with the memory layout of the projections: (B, T, H, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("gptsmith::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, first_visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, D), and the logarithms of the softmaxes' denominators (B, H, T)."""
    out, logsum = _like(q), q.new_empty(q.shape[:3])
    kernel = library()
    if kernel is None:
        y, logsum = _torch_forward(q, _repeat_heads(k, q), _repeat_heads(v, q), scale, first_visible)
        return out.copy_(y), logsum.contiguous()
    q, k, v = map(_contiguous_last, (q, k, v))
    first_visible = None if first_visible is None else first_visible.contiguous()
    kernel.attention_forward(
        _sizes(q, k), *map(_describe, (q, k, v, out)), _pointer(first_visible), _pointer(logsum), ctypes.c_float(scale),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, logsum


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, first_visible: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("gptsmith::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsum: Tensor,
    scale: float,
    first_visible: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    gradients = _like(q), _like(k), _like(v)
    kernel = library()
    if kernel is None:
        k, v = (_repeat_heads(x, q) for x in (k, v))
        by_head = _torch_backward(dout, q, k, v, out, logsum, scale, first_visible)
        for gradient, each in zip(gradients, by_head, strict=True):
            B, K, T, D = gradient.shape
            gradient.copy_(each.reshape(B, K, -1, T, D).sum(dim=2))
        return gradients
    dout, q, k, v, out = map(_contiguous_last, (dout, q, k, v, out))
    logsum, first_visible = logsum.contiguous(), None if first_visible is None else first_visible.contiguous()
    kernel.attention_backward(
        _sizes(q, k), *map(_describe, (q, k, v, out, dout)), _pointer(first_visible), _pointer(logsum),
        *map(_describe, gradients), ctypes.c_float(scale), torch.get_num_threads(),
    )  # fmt: skip
    return gradients


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsum: Tensor,
    scale: float,
    first_visible: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, first_visible = inputs
    ctx.save_for_backward(q, k, v, *output, first_visible)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, first_visible = ctx.saved_tensors
    return *_backward(dout, *tensors, ctx.scale, first_visible), None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# torch's kernel, where there is no compiler ---------------------------------------------------------------------------


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _mask(q: Tensor, first_visible: Tensor | None) -> Tensor | None:
    """Return the mask (B, 1, T, T) that is added to the scores."""
    if first_visible is None:
        return None
    position = torch.arange(q.shape[2])
    hidden = (position < first_visible[..., None]) | (position > position[:, None])
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None]


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first_visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    mask = _mask(q, first_visible)
    y, logsum = forward(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
    return y, logsum


def _torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsum: Tensor,
    scale: float,
    first_visible: Tensor | None,
) -> tuple[Tensor, ...]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    mask = _mask(q, first_visible)
    gradients: tuple[Tensor, ...] = backward(dout, q, k, v, out, logsum, 0.0, mask is None, attn_mask=mask, scale=scale)
    return gradients
