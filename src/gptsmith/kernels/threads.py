"""Run the compiled kernels of `cpu_decode` in several threads, each of which computes its share of the work."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
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
    """Return whether numba is installed and this processor has the instructions that the kernels need."""
    if importlib.util.find_spec("numba") is None:
        return False
    from gptsmith.kernels import cpu_decode as kernels

    return kernels.available()


def are_compiled() -> bool:
    """Return whether the kernels lie compiled in this machine's cache."""
    from gptsmith.kernels import cpu_decode as kernels

    return any(Path(str(kernels.forward.stats.cache_path)).glob("cpu_decode.forward*.nbi"))


@functools.cache
def announce_compiling() -> None:
    """Print a note if the kernels have not been compiled on this machine yet, since that takes a while."""
    if not are_compiled():
        note("compiling kernels for this processor (only once; takes half a minute) ...")


_lock = threading.Lock()  # one kernel at a time: two would compete for the same cores
_pool: ThreadPoolExecutor | None = None


@functools.cache
def _openmp() -> Any:
    """Return the OpenMP library that torch has loaded, to run kernels in its threads; None if that is not possible.

    Additional threads would often wait for a core: an idle OpenMP thread spins for milliseconds before it sleeps.
    """
    try:
        maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        found = [path for path in maps if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", path)]
        path = min(found, key=lambda path: ("/torch" not in path, path))  # other packages may have loaded another one
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return library if library.omp_get_thread_num() == 0 else None
    except (OSError, ValueError, AttributeError):
        return None


def run_in_threads(program: Callable[..., None], *arguments: Any) -> None:
    """Run `program(thread, threads, counter, *arguments)` in as many threads as torch uses.

    counter: the address of a 64-bit zero, for barriers. Raises what a thread has raised.
    """
    global _pool
    threads = torch.get_num_threads()
    counter = np.zeros(8, dtype=np.int64)
    failures: list[BaseException] = []

    def work(thread: int, threads: int) -> None:
        try:
            program(thread, threads, counter.ctypes.data, *arguments)
        except BaseException as failure:  # above all Ctrl-C, which can arrive just before the program
            counter[0] = 1 << 62  # release the threads that wait for this one at a barrier
            failures.append(failure)

    library = _openmp() if threads > 1 else None
    with _lock:
        if threads == 1:
            work(0, 1)
        elif library is not None:
            call = _Work(lambda _: work(library.omp_get_thread_num(), library.omp_get_num_threads()))
            library.GOMP_parallel(ctypes.cast(call, ctypes.c_void_p), None, threads, 0)
        else:
            if _pool is None or _pool._max_workers < threads - 1:
                _pool = ThreadPoolExecutor(threads - 1, "gptsmith-kernel")
            others = [_pool.submit(work, i, threads) for i in range(1, threads)]
            work(0, threads)
            for other in others:
                other.result()
    if failures:
        raise failures[0]


_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, rows: int, bits: int) -> Tensor:
    """Return x (..., K) float32 times the transpose of a quantized matrix with `rows` rows: (..., rows).

    packed, scales, zero_points: as in `model.quantized.QuantizedMatrix`.
    """
    from gptsmith.kernels import cpu_decode as kernels

    K = x.shape[-1]
    inputs = x.detach().reshape(-1, K).contiguous().numpy()
    N, G = len(inputs), K // kernels.GROUP
    width = -(-rows // kernels.ROWS) * kernels.ROWS
    out = torch.empty(N, width)
    if N:
        codes, own_scales, sums = np.empty(2 * N * K, np.int8), np.empty(N * G, np.float32), np.empty(N * G, np.float32)
        addresses = (packed.data_ptr(), scales.data_ptr(), zero_points.data_ptr() if bits < 8 else 0)
        run_in_threads(kernels.linear, bits, *addresses, rows, inputs, codes, own_scales, sums, out.data_ptr(), width)
    return out[:, :rows].reshape(*x.shape[:-1], rows)
