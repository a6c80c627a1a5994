"""Cross-entropy and its gradient in one pass over the logits on a GPU, in Triton (Tillet et al. 2019).

A row of logits is read once from memory and once from the cache, and overwritten by its gradient: no intermediate
result of that size is written. torch's operators would go over it ten times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns per iteration


@triton.jit
def _loss_and_gradient(
    logits,
    targets,
    losses,
    columns: tl.constexpr,
    ignored: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counted = target != ignored
    highest = -float("inf")
    total = 0.0  # Σ exp(logit - highest), rescaled when a higher one is found (Milakov & Gimelshein 2018, 1805.02867)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        x = tl.load(logits + index, mask=index < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    log_sum = highest + tl.log(total)
    chosen = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counted, log_sum - chosen, 0.0))
    if with_gradient:
        tl.debug_barrier()  # all threads must have read the target's logit before it is overwritten
        for start in range(0, columns, block):
            index = start + tl.arange(0, block)
            inside = index < columns
            x = tl.load(logits + index, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(index == target, 1.0, 0.0)
            tl.store(logits + index, tl.where(counted, gradient, 0.0), mask=inside)


def loss_and_gradient(logits: Tensor, targets: Tensor, ignored: int, with_gradient: bool) -> Tensor:
    """Return the summed cross-entropy of logits (N, V), contiguous; with_gradient: overwrite them with its gradient.

    targets: (N,) int64; those equal to `ignored` do not count.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _loss_and_gradient[(rows,)](
            logits,
            targets,
            losses,
            columns,
            ignored,
            with_gradient=with_gradient,
            block=block,
            num_warps=max(1, min(32, block // 512)),
        )
    return losses.sum()
