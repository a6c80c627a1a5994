"""Initial weights of a divided model without the whole model in memory: each process keeps its shard of each tensor.

    model = uninitialized(config)               # its weights take no memory until they are written
    parallelize(model, mesh, layout)
    initialize_shards(model, at)                 # draws one whole parameter after the other, keeps the shard

Weights, and the state of the random numbers afterwards, are those of one process that makes the whole model: they
depend on the seed and the parameter, and not on the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptsmith.distributed.parallel import named_parameters
from gptsmith.distributed.sharding import Coordinates, local, sharding_of
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer

DRAWS = {torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default}
FILLS = DRAWS | {torch.ops.aten.zero_.default}


def uninitialized(config: ModelConfig, *, dropout: float = 0.0) -> Transformer:
    """Return a model whose matrices are not initialized. Random numbers are drawn as if they were."""
    with _RedirectedFills(DRAWS, lambda tensor, filled: None):
        return Transformer(config, dropout=dropout, initialize=False)


@torch.no_grad()
def initialize_shards(model: Transformer, at: Coordinates) -> None:
    """Initialize the shards of an `uninitialized` model that the process at these coordinates has."""
    with torch.device("meta"):
        skeleton = Transformer(model.config, initialize=False)
    parameters = dict(named_parameters(model))
    names = {id(p): name for name, p in skeleton.named_parameters()}

    def keep(tensor: Tensor, filled: Tensor) -> None:
        p = parameters[names[id(tensor)]]
        local(p).copy_(sharding_of(p).block(filled, at))

    with _RedirectedFills(FILLS, keep):
        skeleton.initialize()


class _RedirectedFills(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Make some functions fill a scratch tensor of the same shape instead; `keep` gets the tensor and the scratch.

    All scratch tensors share one memory: an allocation each would leave no memory saved.
    """

    def __init__(self, functions: set[Any], keep: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functions, self.keep, self.memory = functions, keep, torch.empty(0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in self.functions:
            return function(*args, **(kwargs or {}))
        tensor, *rest = args
        if len(self.memory) < tensor.numel() or self.memory.dtype != tensor.dtype:
            self.memory = torch.empty(tensor.numel(), dtype=tensor.dtype)
        filled = self.memory[: tensor.numel()].view(tensor.shape)
        function(filled, *rest, **(kwargs or {}))
        self.keep(tensor, filled)
        return tensor
