"""The machine: where to cache, which device and precision, how many threads, whether a compiler is there.

Nothing here happens at import; torch is imported inside the functions that need it.
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
    """Where downloads and prepared data are kept: $GPTSMITH_CACHE, or the platform's user cache. Made on demand."""
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
    """`auto`: a CUDA GPU, then Apple's MPS, then the CPU. UsageError for a device this machine does not have."""
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
        raise UsageError(f"--device {name!r} is not a device to compute on. Use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs. Use --device auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Apple GPU. Use --device auto.")
    return device


def choose_precision(name: Precision, device: torch.device) -> ChosenPrecision:
    """`auto`: fp32 on a CPU, bf16 on a GPU that has it, otherwise fp16 with loss scaling."""
    import torch

    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16 needs a GPU. On a CPU use fp32 or bf16.")
        if name == "fp8":
            if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
                raise UsageError("--precision fp8 needs an NVIDIA GPU of the Ada or Hopper generation or later.")
            if importlib.util.find_spec("torchao") is None:
                raise UsageError('--precision fp8 needs torchao: pip install "gptsmith[fp8]".')
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def autocast_dtype(precision: ChosenPrecision) -> torch.dtype | None:
    """The type of products under autocast; None for plain fp32. fp8 layers take and give bf16."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[precision]


def compiler_available(device: torch.device) -> bool:
    """Whether `torch.compile` can work here: a C++ compiler for a CPU, Triton (and a C compiler) for a GPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang", "cc")))
    if device.type == "cpu":
        name = os.environ.get("CXX")
        return any(map(shutil.which, [name] if name else ["g++", "clang++"])) and platform.system() != "Windows"
    return False


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given: before looking at the clock."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had: torch's on a GPU, and the several forms of it on a CPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def keep_freed_memory() -> None:
    """Have the C library keep what a training step frees, for the next step to use.

    By default it hands large blocks back to the system at once, and every step touches thousands of fresh pages again:
    a tenth of the time of a small model's step. Does nothing where the library is not glibc, or is told otherwise by
    MALLOC_* variables or GLIBC_TUNABLES.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUN")) for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (malloc.h)
        mallopt(option, value)


def describe_machine() -> dict[str, str | int]:
    """What a report says of the machine: processor, cores, operating system, Python and torch versions."""
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
    """Cores this process may run on (containers and affinity masks respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
