"""Matrix products in 8-bit floating point on GPUs with fp8, through torchao (Micikevicius et al. 2022, 2209.05433)."""

from __future__ import annotations

from typing import Any

from torch import nn

from gptsmith.model.transformer import Transformer


def use_fp8(model: Transformer, *, emulate: bool = False) -> None:
    """Replace the blocks' linear layers by ones that multiply in fp8; weights and their names stay as they are.

    The head, routers, experts and layers whose sides are not multiples of 16, which the hardware requires, stay in
    bf16.
    emulate: compute what an fp8 GPU would, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_supported(module: nn.Module, name: str) -> bool:
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        inside = name.startswith("layers.") and not name.endswith((".router", ".shared_gate"))
        return inside and not any(size % 16 for size in sizes)

    make: Any = Float8LinearConfig
    convert_to_float8_training(model, config=make(emulate=emulate), module_filter_fn=is_supported)
