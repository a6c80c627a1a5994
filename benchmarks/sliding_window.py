"""Time and memory of attention with a sliding window at long context: python benchmarks/sliding_window.py [--save]

One attention operation, forward and backward, 8 heads of 64, in fp32. `full mask` is SDPA with the window as a mask,
`sliding window` is what the model does. Each runs in its own process, so that peak memory is measured separately.
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
    """Return the median seconds of five forward and backward passes, and how much they raise peak memory, in MB."""
    import torch

    from gptsmith.model.attention import attend, causal_mask

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        began = time.perf_counter()
        if way == "sliding window":
            y = attend(q, k, v, window=window)
        else:
            mask = causal_mask(length, length, window, q.device)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sliding_window.json")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        way, length, window = arguments.child
        print(json.dumps(measure(way, int(length), int(window))))
        return
    rows = []
    for length in (2048, 8192):
        for way in ("full mask", "sliding window"):
            command = [sys.executable, __file__, "--child", way, str(length), "256"]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(rows[-1], flush=True)
    if arguments.save:
        print(machine.save("sliding_window", {"runs": rows}))


if __name__ == "__main__":
    main()
