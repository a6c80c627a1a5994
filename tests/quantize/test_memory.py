"""What quantization takes beside the model: at most a layer in float32, or half of one and a sequence's activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptsmith.model.quantized import Bits
from gptsmith.model.transformer import Transformer
from gptsmith.quantize import layers, rounding
from gptsmith.quantize.calibration import first_states, layer_arguments
from gptsmith.quantize.layers import open_partial, quantize_layers, round_outer
from gptsmith.quantize.report import Reference
from tests.factories import tiny_model


class Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, as long as anything refers to their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live.keys() | old:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes of tensors at once while a function runs, without those that were there before."""
    with Counter() as counter:
        function()
    return counter.most


def of_a_layer(model: Transformer, ids: Tensor) -> tuple[int, int]:
    """Return the bytes of a layer's weights, and those that computing a sequence takes beside them."""
    block: Any = model.layers[0]
    x = first_states(model, ids[:1])
    positional, named = layer_arguments(model, ids[:1])[0]
    with torch.no_grad():
        activations = peak_bytes(lambda: block(x, *positional, **named))
    return sum(4 * parameter.numel() for parameter in block.parameters()), activations + x.nbytes


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 352},
    "gpt2": {"intermediate_size": 512},  # the second moments of its widest inputs are larger than a layer
    "qwen3_moe": {"intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("gpt2", 4), ("qwen3_moe", 4)])
def test_quantization_takes_a_layer(family: str, bits: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_BLOCK", 32)  # rows: in proportion to a model of this size
    monkeypatch.setattr(layers, "_ROWS", 64)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    ids = torch.randint(0, 30, (16, 24), generator=torch.Generator().manual_seed(0))
    layer, activations = of_a_layer(tiny_model(family, **shape, **SHAPES[family]), ids)
    sizes: list[int] = []

    def run() -> None:
        model = tiny_model(family, **shape, **SHAPES[family])
        sizes.append(4 * model.num_parameters())
        reference = Reference(model, ids.flatten().tolist(), directory=tmp_path)
        quantize_layers(model, ids, open_partial(tmp_path / "x", model, ids, bits, None), tmp_path / "x")
        round_outer(model)
        reference.compare(model)

    beside = peak_bytes(run) - sizes[0]
    assert beside <= max(layer, layer / 2 + activations), (beside / layer, activations / layer)
