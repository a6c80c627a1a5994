"""Runs on tensors without storage, of shallow models: which storages operators allocate and free."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptsmith.model.config import ModelConfig

SHALLOW = 2  # layers of the smaller of two models


def shallow_depths(c: ModelConfig) -> tuple[int, int]:
    """Return two small depths from which any other is extrapolated; twice the depth itself, if it is small.

    They differ by a period of the layers' sliding windows. Both have the layers before the first one with experts.
    """
    period = max(1, len(c.window_pattern))
    few = -(-SHALLOW // period) * period
    if c.num_experts:
        few += -(-c.first_k_dense_replace // period) * period
    if c.num_hidden_layers <= few + period:
        return c.num_hidden_layers, c.num_hidden_layers
    return few, few + period


class StorageMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Call `allocated` for every new storage, and `freed` when it is gone. Subclasses implement both.

    How many tokens each expert gets depends on numbers that tensors without storage do not have: all get the same.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        """Bytes of each storage, by its address."""
        self.tokens_per_expert: list[int] = []
        """Of the last mixture."""
        self.numbers: Iterator[int] = iter(())
        """What is read next from tensors."""
        self.counts = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not follow storages meanwhile."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def allocated(self, key: int, size: int) -> None:
        raise NotImplementedError

    def freed(self, key: int, size: int) -> None:
        raise NotImplementedError

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.bincount.default:
            tokens, experts = args[0].numel(), int((kwargs or {}).get("minlength") or args[2])
            self.tokens_per_expert = [tokens // experts + (i < tokens % experts) for i in range(experts)]
            self.numbers = iter(self.tokens_per_expert)
            return torch.zeros(experts, dtype=torch.int64, device=args[0].device)
        if function is torch.ops.aten._local_scalar_dense.default:
            return next(self.numbers, 1)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if self.counts else ():
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.allocated(key, storage.nbytes())
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.freed(key, self.live.pop(key))
