"""Causal attention for training on a CPU, by a kernel of our own where a C++ compiler is at hand.

torch's own kernel reaches a third of the rate of the machine's matrix products at the sizes that a CPU trains: each of
its small products is a call of a library. `fused_attention.cpp` keeps them in registers. It is compiled in a few
seconds when first used, and kept; where that fails torch's kernel is called.

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

BLOCK, LANES = 32, 16  # of which the tokens and the head_dim must be multiples


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these shapes, (B, H, T, D) and (B, K, T, D): whole blocks, float32, on a CPU."""
    T, D = q.shape[2:]
    return q.is_cpu and q.dtype == k.dtype == v.dtype == torch.float32 and T % BLOCK == 0 and D % LANES == 0


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, each token seeing itself and the past: (B, H, T, D).

    q: (B, H, T, D); k, v: (B, K, T, D), K dividing H; as `suits` says. scale: 1/√D if None.
    """
    y: Tensor = _forward(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)[0]
    return y


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be had."""
    if not compiler_available(torch.device("cpu")):
        return None
    # What to compile for, and how many numbers a register holds there: with longer vectors sums would leave it.
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
                new.replace(built)  # at once, whoever else may be making it
        return ctypes.CDLL(str(built))
    except (GptsmithError, OSError, subprocess.SubprocessError):
        return None


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


def _describe(x: Tensor) -> Any:
    return ctypes.byref(_Tensor(x.data_ptr(), *x.stride()[:3]))


def _sizes(q: Tensor, k: Tensor) -> Any:
    B, H, T, D = q.shape
    return (ctypes.c_int64 * 5)(B, H, k.shape[1], T, D)


def _side_by_side(x: Tensor) -> Tensor:
    """x, or a copy of it, whose last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (B, H, T, D) that lies as (B, T, H, D): as projections read and write it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("gptsmith::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The attention's output and the logarithms of its softmaxes' denominators, (B, H, T)."""
    out, logsum = _like(q), q.new_empty(q.shape[:3])
    kernel = library()
    if kernel is None:
        y, logsum = _torch_forward(q, _for_each_head(k, q), _for_each_head(v, q), scale)
        return out.copy_(y), logsum.contiguous()
    q, k, v = map(_side_by_side, (q, k, v))
    kernel.attention_forward(
        _sizes(q, k), *map(_describe, (q, k, v, out)), ctypes.c_void_p(logsum.data_ptr()), ctypes.c_float(scale),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, logsum


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("gptsmith::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = _like(q), _like(k), _like(v)
    kernel = library()
    if kernel is None:
        k, v = (_for_each_head(x, q) for x in (k, v))
        for gradient, each in zip(gradients, _torch_backward(dout, q, k, v, out, logsum, scale), strict=True):
            B, K, T, D = gradient.shape
            gradient.copy_(each.reshape(B, K, -1, T, D).sum(dim=2))
        return gradients
    dout, q, k, v, out = map(_side_by_side, (dout, q, k, v, out))
    kernel.attention_backward(
        _sizes(q, k), *map(_describe, (q, k, v, out, dout)), ctypes.c_void_p(logsum.contiguous().data_ptr()),
        *map(_describe, gradients), ctypes.c_float(scale), torch.get_num_threads(),
    )  # fmt: skip
    return gradients


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(context: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *context.saved_tensors, context.scale), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    y, logsum = forward(q, k, v, 0.0, True, scale=scale)
    return y, logsum


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsum: Tensor, scale: float
) -> tuple[Tensor, ...]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradients: tuple[Tensor, ...] = backward(dout, q, k, v, out, logsum, 0.0, True, scale=scale)
    return gradients
