"""llama.cpp for the benchmarks that compare with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def plain_buffers() -> Iterator[None]:
    """Keep llama.cpp from storing weights in other layouts than those of the file.

    Its layouts for AMX end in an illegal instruction in virtual machines that do not keep the state of AMX, and
    llama-cpp-python has no option for this. Decoding hardly depends on them; long prompts do, where AMX works.
    """
    import llama_cpp.llama_cpp as bindings

    make = bindings.llama_model_default_params

    def without_extra_buffers() -> Any:
        settings = make()
        settings.use_extra_bufts = False
        return settings

    bindings.llama_model_default_params = without_extra_buffers
    try:
        yield
    finally:
        bindings.llama_model_default_params = make


def open_llama(path: Path, *, threads: int, **options: Any) -> Any:
    """Open a GGUF file with llama.cpp."""
    import llama_cpp

    with plain_buffers():
        return llama_cpp.Llama(str(path), n_threads=threads, n_threads_batch=threads, verbose=False, **options)


def quantize_gguf(source: Path, target: Path, ftype: int, threads: int) -> None:
    """Write a GGUF file with the weights of another in llama.cpp's type of files `ftype`."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = ftype, threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(f"llama.cpp does not write type {ftype} of {source}.")
