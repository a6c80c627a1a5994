"""The attention kernel against torch's: python benchmarks/attention.py [--repeats N] [--save]

Forward and backward pass of causal attention in training on a CPU, in turns, medians, at the shapes of the two models
of benchmarks/train.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels.cpu_attention import fused_attention, library

SHAPES = {"384 wide": (8, 6, 256, 64), "128 wide": (16, 4, 128, 32)}  # B, H, T, D


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], gradient: Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(attention(*inputs), inputs, gradient)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if library() is None:
        raise SystemExit("the kernel needs a C++ compiler")
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": fused_attention,
        "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    results = {"processor": torch.backends.cpu.get_cpu_capability(), "milliseconds": {}}
    for name, (B, H, T, D) in SHAPES.items():
        inputs = [torch.randn(B, T, H, D).transpose(1, 2).requires_grad_() for _ in "qkv"]
        gradient = torch.randn(B, T, H, D).transpose(1, 2)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, attention in ways.items():
                taken[way].append(seconds(attention, inputs, gradient))
        medians = {way: round(1000 * statistics.median(each), 2) for way, each in taken.items()}
        results["milliseconds"][name] = medians  # type: ignore[index]
        print(f"{name}: {medians['ours']} ms, torch {medians['torch']} ms", flush=True)
    if arguments.save:
        machine.save("attention", results)


if __name__ == "__main__":
    main()
