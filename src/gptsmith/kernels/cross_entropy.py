"""Cross-entropy and its derivative in one pass over logits on a GPU, in Triton (Tillet et al. 2019).

A row of logits is read once from memory and once from the cache, and overwritten by its derivative: nothing as large is
written in between. torch's own operators would go over it ten times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time


@triton.jit
def _loss_and_error(
    logits, targets, losses, columns: tl.constexpr, ignored: tl.constexpr, wanted: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counted = target != ignored
    highest = -float("inf")
    total = 0.0  # of exp(logit - highest), corrected when a higher one is found (Milakov & Gimelshein 2018, 1805.02867)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        x = tl.load(logits + index, mask=index < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    log_sum = highest + tl.log(total)
    chosen = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counted, log_sum - chosen, 0.0))
    if wanted:
        tl.debug_barrier()  # every thread has read the chosen logit before one overwrites it
        for start in range(0, columns, block):
            index = start + tl.arange(0, block)
            inside = index < columns
            x = tl.load(logits + index, mask=inside, other=0.0).to(tl.float32)
            error = tl.exp(x - log_sum) - tl.where(index == target, 1.0, 0.0)
            tl.store(logits + index, tl.where(counted, error, 0.0), mask=inside)


def loss_and_error(logits: Tensor, targets: Tensor, ignored: int, wanted: bool) -> Tensor:
    """The summed loss of logits (N, V), contiguous; if `wanted`, its derivative by them is where they were.

    targets: (N,) int64; those that are `ignored` count for nothing.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _loss_and_error[(rows,)](
            logits,
            targets,
            losses,
            columns,
            ignored,
            wanted=wanted,
            block=block,
            num_warps=max(1, min(32, block // 512)),
        )
    return losses.sum()
