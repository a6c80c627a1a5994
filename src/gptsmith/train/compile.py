"""Compile the blocks of a model for training."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gptsmith.model.transformer import Transformer

# Seconds to compile one block's forward and backward pass (the other blocks share it), and the share of time it saves.
COSTS = {"cpu": (18.0, 0.28), "cuda": (12.0, 0.4)}


def costs(device: torch.device) -> tuple[float, float]:
    """Return the seconds that compiling takes on this kind of device, and the share of the time that it saves."""
    return COSTS.get(device.type, COSTS["cpu"])


def worth_compiling(seconds: float, device: torch.device) -> bool:
    """Return whether compiling saves clearly more than it costs. seconds: the run's passes without it."""
    takes, saves = costs(device)
    return seconds * saves > 1.5 * takes


def compile_blocks(model: Transformer, backend: Any = "inductor") -> None:
    """Compile one block; all share its code, so it costs the same whatever the depth."""
    # Dynamo looks at the block's input as if it were a parameter, and torch warns of that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in model.layers:
        layer.forward = _compiled_while_training(layer, backend)


def undo_compile(model: Transformer) -> None:
    for layer in model.layers:
        del layer.forward


def _compiled_while_training(module: torch.nn.Module, backend: Any) -> Callable[..., Any]:
    """Return a forward that is compiled in training mode only. Evaluation and generation have other shapes, each of
    which would be compiled again: they run eagerly."""
    eager = module.forward
    compiled = torch.compile(eager, backend=backend)
    return lambda *arguments: (compiled if module.training else eager)(*arguments)


def partitioned(unwritten: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext) -> Any:
    """Return a backend that partitions forward and backward as the compiler does, and runs the operations one by one.

    It shows what compiled code keeps for the backward pass, for memory forecasts.
    unwritten: entered around an operation whose result the compiled code would fuse into its consumer.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx import GraphModule, Interpreter, Node

    class OneByOne(Interpreter):
        def __init__(self, graph: GraphModule) -> None:
            super().__init__(graph)
            self.fused = _fused(graph.graph.nodes)

        def run_node(self, n: Node) -> Any:
            with unwritten() if n in self.fused else contextlib.nullcontext():
                return super().run_node(n)

    def take(graph: GraphModule, inputs: Any) -> Any:
        run: Any = lambda arguments: OneByOne(graph).boxed_run(arguments)  # noqa: E731
        run._boxed_call = True  # so that tensors are freed after their last use
        return run

    make: Any = aot_autograd
    return make(
        fw_compiler=take,
        bw_compiler=take,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )


def _fused(nodes: Iterable[Any]) -> set[Any]:
    """Return the nodes whose results are only read inside the same fused loop: pointwise operations and reductions that
    no matrix product, no attention and nothing outside reads."""

    def is_view(node: Any) -> bool:
        return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))

    def is_loop(node: Any) -> bool:
        tags = {str(tag).rpartition(".")[2] for tag in getattr(node.target, "tags", ())}
        return bool(tags & {"pointwise", "reduction"}) or node.target is torch.ops.aten.cat.default

    fused: set[Any] = set()
    for node in reversed(list(nodes)):
        fused_into_users = all(user in fused if is_view(user) else is_loop(user) for user in node.users)
        if fused_into_users and (is_loop(node) or is_view(node)):
            fused.add(node)
    return fused
