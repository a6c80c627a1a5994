"""Initial weights of a divided model without the whole model in memory: each process keeps its shard of each tensor.

    model = Transformer(config, initialize=False)       # its weights take no memory until they are written
    seed = draw_seed()
    parallelize(model, mesh, layout)
    initialize_shards(model, at, seed)                  # draws one whole parameter after the other, keeps the shard

Weights, and the state of the random numbers afterwards, are those of one process that makes the whole model.
"""

from __future__ import annotations

import math

import torch

from gptsmith.distributed.parallel import named_parameters
from gptsmith.distributed.sharding import Coordinates, local, sharding_of
from gptsmith.model.transformer import Transformer


@torch.no_grad()
def initialize_shards(model: Transformer, at: Coordinates, seed: int) -> None:
    """Initialize the shards of a divided model that the process at these coordinates has."""
    parameters = [(name, p, sharding_of(p)) for name, p in named_parameters(model)]
    largest = max(math.prod(sharding.shape) for _, _, sharding in parameters)
    memory = torch.empty(largest)  # shared by all: freed memory would not be returned in between
    for name, p, sharding in parameters:
        whole = memory[: math.prod(sharding.shape)].view(sharding.shape)
        if model.initialize_parameter(name, whole, seed):
            local(p).copy_(sharding.block(whole, at))
