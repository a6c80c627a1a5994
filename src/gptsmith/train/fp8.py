"""Products in 8-bit floating point on GPUs that have it, through torchao (Micikevicius et al. 2022, 2209.05433)."""

from __future__ import annotations

from typing import Any

from torch import nn

from gptsmith.model.transformer import Transformer


def use_fp8(model: Transformer, *, emulate: bool = False) -> None:
    """Swap the blocks' linear layers for ones that multiply in fp8; weights and their names stay as they are.

    Layers whose sides are not multiples of 16, which the hardware cannot multiply, the head, routers and experts stay
    in bf16.
    emulate: compute what an fp8 GPU would, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def suits(module: nn.Module, name: str) -> bool:
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        inside = name.startswith("layers.") and not name.endswith((".router", ".shared_gate"))
        return inside and not any(size % 16 for size in sizes)

    make: Any = Float8LinearConfig
    convert_to_float8_training(model, config=make(emulate=emulate), module_filter_fn=suits)
