"""Dropout (Srivastava et al. 2014, JMLR 15), of which most of the time on a CPU goes into random numbers.

torch draws one float for each element, one at a time; compiled code computes a whole Philox block for each. Sixteen
random bits decide as well, and four such draws come out of one 64-bit number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("gptsmith::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bits(count: int) -> Tensor:
    """At least `count` numbers, four at a time, from all of int16. An operator, lest the compiler draw its own way."""
    return torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)


@random_bits.register_fake
def _(count: int) -> Tensor:
    return torch.empty(4 * -(-count // 4), dtype=torch.int16)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeroes each element with probability p, to the nearest 1/65536 on a CPU, and scales the others by 1/(1 - p)."""
    if not training or not p:
        return x
    if not x.is_cpu:
        return F.dropout(x, p)
    zeroed = min(round(p * 2**16), 2**16 - 1)
    kept = random_bits(x.numel())[: x.numel()].view(x.shape) >= zeroed - 2**15
    return torch.where(kept, x * (2**16 / (2**16 - zeroed)), 0.0)
