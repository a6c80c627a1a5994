"""Low-rank adapters (LoRA; Hu et al. 2021, 2106.09685): y = W x + scaling · B A x, with W unchanged.

    adapter = read_adapter(directory, model)             # from `formats.peft`
    with applied(model, [(adapter, rows)]): model(ids)   # to these token positions of the batch alone

Nothing is merged, so sequences with different adapters, or none, can share a batch.

Axis letters: T tokens of the batch · K columns (inputs) · R rows (outputs) · r rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.model.transformer import Transformer


@dataclass(frozen=True)
class Update:
    """The update of some rows of a matrix, from row `first` on: A (r, K), B (R, r), with the scaling included in B."""

    first: int
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Adapter:
    """updates: by module name (`layers.0.attention.qkv_proj`), the updates of the matrices that are fused in it."""

    rank: int
    updates: dict[str, tuple[Update, ...]]


@contextlib.contextmanager
def applied(model: Transformer, routes: Sequence[tuple[Adapter, Sequence[int]]]) -> Iterator[None]:
    """Within the context, apply each adapter to its tokens of the input (1, T).

    routes: adapters, each with the positions of its tokens; a token has at most one adapter.
    """
    device = next(model.parameters()).device
    indices = [(adapter, torch.tensor(rows, device=device)) for adapter, rows in routes]

    def hook_for(name: str) -> Any:
        def add_updates(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in indices:
                for update in adapter.updates.get(name, ()):
                    x = inputs[0][:, rows].to(update.A.dtype)
                    delta = (x @ update.A.T @ update.B.T).to(output.dtype)
                    output[:, rows, update.first : update.first + delta.shape[-1]] += delta
            return output

        return add_updates

    names = {name for adapter, _ in routes for name in adapter.updates}
    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
