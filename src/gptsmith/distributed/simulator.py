"""Simulate one process of many: torch's process group without communication, for tensors without storage.

This module uses private parts of torch, as no other does. `check_version` refuses versions with which it was not
tested.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gptsmith.distributed.context import ProcessGroup
from gptsmith.distributed.layout import Layout
from gptsmith.errors import GptsmithError

T = TypeVar("T")

OLDEST, NEWEST = (2, 9), (2, 13)  # versions of torch that this was tested with
NAMESPACES = ("c10d", "_c10d_functional")


def check_version() -> None:
    """Raise GptsmithError for a version of torch with which this module was not tested."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not OLDEST <= version <= NEWEST:
        raise GptsmithError(
            f"dry-run needs torch {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}, whose private parts it "
            f"uses; this is torch {torch.__version__}."
        )


class SimulatedProcess(ProcessGroup):
    """A process whose collectives return at once, with arbitrary values."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size, timeout=60.0)

    @property
    def is_main(self) -> bool:
        """Return False, since the main process does more than the others: it holds the whole model, and writes."""
        return False

    def arrange(self, layout: Layout, device: torch.device, *, exact: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # of groups that never wait
            super().arrange(layout, device, exact=exact)

    def any(self, flag: bool) -> bool:
        """Return the flag of this process; the others are taken to have the same."""
        dist.all_reduce(torch.tensor([int(flag)]), op=dist.ReduceOp.MAX)
        return flag

    def gather(self, value: T) -> list[T]:
        """Return the value of this process for each; values that are no tensors are not communicated."""
        return [value] * self.world_size

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Do nothing: there is no connection to break."""
        yield


@contextlib.contextmanager
def simulated_process(rank: int, world_size: int) -> Iterator[SimulatedProcess]:
    """Simulate process `rank` of `world_size` within the context."""
    check_version()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise GptsmithError("torch.distributed is in use already, so that processes cannot be simulated here.")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _real_meshes():
            yield SimulatedProcess(rank, world_size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """Let device meshes compute with real ranks, also where other tensors have no storage."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.device_mesh import DeviceMesh

    def real(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with unset_fake_temporarily():
                return function(*arguments, **options)

        return call

    own = vars(DeviceMesh)
    before = {name: own[name] for name in ("__init__", "__hash__", "mesh") if name in own}
    try:
        for name, what in before.items():
            method: Any = what.fget if isinstance(what, property) else what
            setattr(DeviceMesh, name, property(real(method)) if isinstance(what, property) else real(method))
        yield
    finally:
        for name, what in before.items():
            setattr(DeviceMesh, name, what)


def is_collective(function: Any) -> bool:
    """Return whether an operator communicates."""
    return function.namespace in NAMESPACES and "wait" not in function._opname


def collective_name(function: Any) -> str:
    """Return the usual name of a collective operator: all_reduce, all_gather, reduce_scatter, all_to_all, …"""
    name = str(function._opname).strip("_").replace("_base", "").replace("_into_tensor", "").replace("_tensor", "")
    for usual in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        if name.replace("_", "").startswith(usual.replace("_", "")):
            return usual
    return name.replace("_out", "").replace("_coalesced", "")


def group_of_collective(arguments: Any) -> str | None:
    """Return the name of the process group among the arguments of a collective operator."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, str) and leaf not in ("sum", "avg", "max", "min", "product"):
            return leaf
        if isinstance(leaf, torch.ScriptObject):
            with contextlib.suppress(Exception):
                return str(dist.ProcessGroup.unbox(leaf).group_name)
    return None


def payload(arguments: Any) -> tuple[int, str]:
    """Return the bytes and the dtype of the largest tensor among the arguments of a collective operator: what is
    reduced, gathered or scattered, whole."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    largest = max(tensors, key=lambda t: t.numel() * t.element_size(), default=None)
    return (0, "") if largest is None else (largest.numel() * largest.element_size(), str(largest.dtype)[6:])
