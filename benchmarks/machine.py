"""What a result was measured on, and how fast that machine multiplies matrices."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def sgemm_gflops(size: int = 1024, seconds: float = 1.0) -> float:
    """The rate of an fp32 matrix product of (size, size) matrices, GFLOP/s, the best of several short trials."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def describe() -> dict[str, Any]:
    """The date, the machine and its measured matrix rate."""
    from gptsmith.runtime import describe_machine

    return {
        "date": datetime.date.today().isoformat(),
        **describe_machine(),
        "sgemm_gflops": round(sgemm_gflops()),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a dated result to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=2) + "\n")
    return path
