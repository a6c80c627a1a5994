"""Time and memory of banded against full attention at long context: python benchmarks/banded_attention.py [--save]

One attention operation, forward and backward, 8 heads of 64, in fp32. `full mask` is SDPA masked to the band, `band`
is what the model does. Each in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import machine


def measure(way: str, length: int, window: int) -> dict[str, float | str | int]:
    """Median seconds of five forward-backward passes, and the growth of peak memory they cause, in MB."""
    import torch

    from gptsmith.model.attention import attend, visible

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        began = time.perf_counter()
        if way == "band":
            y = attend(q, k, v, None, window, 0.0)
        else:
            y = attend(q, k, v, visible(length, length, window, q.device), None, 0.0)
        torch.autograd.backward(y.sum())
        times.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "way": way,
        "length": length,
        "window": window,
        "seconds": round(sorted(times)[2], 4),
        "memory_mb": round((after - before) * 1024 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/banded_attention.json")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        way, length, window = arguments.child
        print(json.dumps(measure(way, int(length), int(window))))
        return
    rows = []
    for length in (2048, 8192):
        for way in ("full mask", "band"):
            command = [sys.executable, __file__, "--child", way, str(length), "256"]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(rows[-1], flush=True)
    if arguments.save:
        print(machine.save("banded_attention", {"runs": rows}))


if __name__ == "__main__":
    main()
