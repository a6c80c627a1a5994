"""Threads for `model.kernels`: the same compiled program in each, over its own share of the work."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptsmith.log import note


@functools.cache
def kernels_available() -> bool:
    """Whether numba is installed and this processor has the instructions that the kernels are written in."""
    if importlib.util.find_spec("numba") is None:
        return False
    from gptsmith.model import kernels

    return kernels.available()


@functools.cache
def announce_compiling() -> None:
    """Say so if the kernels have not been compiled on this machine yet: it takes a while, once."""
    from gptsmith.model import kernels

    if not any(Path(str(kernels.forward.stats.cache_path)).glob("kernels.forward*.nbi")):
        note("compiling kernels for this processor (once; it takes about 20 s) ...")


_lock = threading.Lock()  # one program at a time: two would only wait for each other's processors
_pool: ThreadPoolExecutor | None = None


def together(program: Callable[..., None], *arguments: Any) -> None:
    """Run `program(thread, threads, counter, *arguments)` in as many threads as torch uses. counter: the address of a
    zero that they may count on."""
    global _pool
    threads = torch.get_num_threads()
    counter = np.zeros(8, dtype=np.int64)
    with _lock:
        if threads > 1 and (_pool is None or _pool._max_workers < threads - 1):
            _pool = ThreadPoolExecutor(threads - 1, "gptsmith-kernel")
        others = [
            _pool.submit(program, thread, threads, counter.ctypes.data, *arguments)
            for thread in range(1, threads)
            if _pool is not None
        ]
        program(0, threads, counter.ctypes.data, *arguments)
        for other in others:
            other.result()


def packed_linear(x: Tensor, packed: Tensor, scales: Tensor, least: Tensor, rows: int, bits: int) -> Tensor:
    """x (..., K) float32 times a packed matrix of `rows` rows (see `model.quantized.pack`): (..., rows)."""
    from gptsmith.model import kernels

    K = x.shape[-1]
    inputs = x.detach().reshape(-1, K).contiguous().numpy()
    N, G = len(inputs), K // kernels.GROUP
    width = -(-rows // kernels.ROWS) * kernels.ROWS
    out = torch.empty(N, width)
    if N:
        codes, own, sums = np.empty((N, K), np.int8), np.empty((N, G), np.float32), np.empty((N, G), np.float32)
        addresses = (packed.data_ptr(), scales.data_ptr(), least.data_ptr() if bits == 4 else 0)
        together(kernels.linear, bits, *addresses, rows, inputs, codes, own, sums, out.data_ptr(), width)
    return out[:, :rows].reshape(*x.shape[:-1], rows)
