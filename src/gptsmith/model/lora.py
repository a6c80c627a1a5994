"""Low-rank adapters (LoRA; Hu et al. 2021, 2106.09685): y = W x + scaling · B A x, with W left as it is.

    adapter = read_adapter(directory, model)             # PEFT's layout: adapter_config.json, adapter_model.safetensors
    with applied(model, [(adapter, rows)]): model(ids)   # to these rows of the pass alone

Nothing is merged: sequences with different adapters, or none, share a pass.

Axis letters: T tokens of a pass · K columns (inputs) · R rows (outputs) · r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.model.transformer import Transformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Update:
    """Of some rows of a matrix, from `first` on: A (r, K), B (R, r), scaling included in B."""

    first: int
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Adapter:
    """updates: by the name of our module (`layers.0.attention.qkv_proj`), those of the matrices it stands for."""

    rank: int
    updates: dict[str, tuple[Update, ...]]


@contextlib.contextmanager
def applied(model: Transformer, routes: Sequence[tuple[Adapter, Sequence[int]]]) -> Iterator[None]:
    """Within it, each adapter changes these rows of what the model reads, as (1, T): a row belongs to one adapter."""
    device = next(model.parameters()).device
    indices = [(adapter, torch.tensor(rows, device=device)) for adapter, rows in routes]

    def hook_of(name: str) -> Any:
        def change(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in indices:
                for update in adapter.updates.get(name, ()):
                    x = inputs[0][:, rows].to(update.A.dtype)
                    delta = (x @ update.A.T @ update.B.T).to(output.dtype)
                    output[:, rows, update.first : update.first + delta.shape[-1]] += delta
            return output

        return change

    names = {name for adapter, _ in routes for name in adapter.updates}
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
