"""Dropout (Srivastava et al. 2014, JMLR 15) with fewer random numbers, which take most of its time on a CPU.

torch draws a float for each element, one at a time; compiled code computes a whole Philox block for each. Sixteen
random bits per element are enough, and a 64-bit number has four times as many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("gptsmith::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bits(count: int) -> Tensor:
    """Return at least `count` uniformly random int16, in multiples of four.

    A custom op, so that torch.compile does not substitute its own random numbers.
    """
    return torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)


@random_bits.register_fake
def _(count: int) -> Tensor:
    return torch.empty(4 * -(-count // 4), dtype=torch.int16)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p, and scale the others by 1/(1 - p). On a CPU p is rounded to 1/65536."""
    if not training or not p:
        return x
    if not x.is_cpu:
        return F.dropout(x, p)
    zeroed = min(round(p * 2**16), 2**16 - 1)
    kept = random_bits(x.numel())[: x.numel()].view(x.shape) >= zeroed - 2**15
    return torch.where(kept, x * (2**16 / (2**16 - zeroed)), 0.0)
