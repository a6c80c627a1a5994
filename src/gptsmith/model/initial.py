"""Initial weights. Those of a parameter follow from a seed and from the parameter's name, whatever is drawn before it.

So a process that makes a part of a model, in whatever order, draws the same weights as one that makes all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


def draw_seed() -> int:
    """Return a seed from torch's global generator, which is the only number that new weights take from it."""
    with _disable_current_modes():  # where a forecast calculates without numbers
        return int(torch.randint(2**62, (), device="cpu"))


def draw(p: Tensor, name: str, seed: int, fill: Callable[..., object]) -> None:
    """Fill `p` by `fill(values, generator=…)`, on the CPU, so that the values are the same on every device."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    values = p if p.device.type == "cpu" else torch.empty(p.shape, dtype=p.dtype)
    fill(values, generator=generator)
    if values is not p:
        p.copy_(values)


class WithoutDefaultDraws(TorchFunctionMode):
    """`with WithoutDefaultDraws():` PyTorch's modules leave their random weights undefined.

    They would be overwritten; and memory that is not written is not taken from the system.
    """

    SKIPPED = (nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self.SKIPPED:
            return None  # what they return is not used
        return function(*args, **(kwargs or {}))
