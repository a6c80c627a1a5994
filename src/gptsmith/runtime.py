"""The machine: cache directory, device, precision, memory, compiler, and a description of it.

Importing this module has no side effects and does not import torch; the functions that need torch import it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptsmith.errors import UsageError
from gptsmith.storage import explain_os_errors

if TYPE_CHECKING:
    import torch

ChosenPrecision = Literal["fp32", "bf16", "fp16", "fp8"]
Precision = Literal["auto", ChosenPrecision]


def cache_directory() -> Path:
    """Return the directory for downloads and prepared data, and create it if it does not exist.

    It is $GPTSMITH_CACHE if that is set, else the platform's user cache directory.
    """
    chosen = os.environ.get("GPTSMITH_CACHE")
    if chosen:
        path = Path(chosen).expanduser()
    else:
        import platformdirs

        path = Path(platformdirs.user_cache_dir("gptsmith", appauthor=False))
    with explain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def choose_device(name: str = "auto") -> torch.device:
    """Return the torch device for `name`; `auto` is a CUDA GPU, else Apple's MPS, else the CPU.

    Raises UsageError for a device that this machine does not have.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name!r} is not supported. Use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs. Use --device auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Apple GPU. Use --device auto.")
    return device


def choose_precision(name: Precision, device: torch.device) -> ChosenPrecision:
    """Return the precision for `name`; `auto` is fp32 on a CPU, bf16 on a GPU that supports it, else fp16.

    Raises UsageError for a precision that the device does not support.
    """
    import torch

    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16 requires a GPU. On a CPU use fp32 or bf16.")
        if name == "fp8":
            if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
                raise UsageError("--precision fp8 requires an NVIDIA GPU of the Ada or Hopper generation or later.")
            if importlib.util.find_spec("torchao") is None:
                raise UsageError('--precision fp8 requires torchao: pip install "gptsmith[fp8]".')
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def autocast_dtype(precision: ChosenPrecision) -> torch.dtype | None:
    """Return the autocast type; None for fp32. The inputs and outputs of fp8 layers are bf16."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[precision]


def compiler_available(device: torch.device) -> bool:
    """Return whether `torch.compile` can work: it needs a C++ compiler on a CPU, Triton and a C compiler on a GPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang", "cc")))
    if device.type == "cpu":
        name = os.environ.get("CXX")
        return any(map(shutil.which, [name] if name else ["g++", "clang++"])) and platform.system() != "Windows"
    return False


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work. Call it before measuring time."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that memory ran out: torch's error on a GPU, or any of several on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def keep_freed_memory() -> None:
    """Make glibc keep memory that a training step frees, so that the next step can reuse it.

    By default glibc returns large blocks to the system at once, and every step has to fault in thousands of pages
    again, which takes a tenth of a small model's step. Does nothing with another C library, or if MALLOC_* variables or
    GLIBC_TUNABLES are set.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUN")) for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (malloc.h)
        mallopt(option, value)


def return_freed_memory() -> None:
    """Make glibc return the memory that `keep_freed_memory` has kept. Does nothing with another C library."""
    import ctypes

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def describe_machine() -> dict[str, str | int]:
    """Return the machine's description in run.json: processor, cores, GPU, system, Python and torch versions."""
    import torch

    return {
        "processor": _processor_name(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def available_cores() -> int:
    """Return how many cores this process can run on, given its affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
