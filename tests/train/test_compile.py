"""What is compiled half way, for forecasts, computes the same; and what the compiler would not write is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from gptsmith.model.loss import token_loss_sum
from gptsmith.train.compile import compile_blocks, costs, partitioned, undo_compile, worth_compiling
from tests.factories import tiny_model


def test_half_way_it_is_the_same_model() -> None:
    model = tiny_model(
        "qwen3",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.02,
    ).train()
    ids = torch.randint(0, 40, (2, 16))
    expected = torch.autograd.grad(token_loss_sum(model, ids, ids, None), list(model.parameters()))
    unwritten = 0

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        nonlocal unwritten
        unwritten += 1
        yield

    compile_blocks(model, partitioned(counted))
    found = torch.autograd.grad(token_loss_sum(model, ids, ids, None), list(model.parameters()))
    undo_compile(model)
    torch.compiler.reset()
    assert unwritten > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_flows_into_a_loop_is_not_written_and_what_a_product_takes_is() -> None:
    from gptsmith.train.compile import _fused

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        inner = torch.ops.aten.relu.default(x)
        taken = torch.ops.aten.mul.Tensor(inner, 2.0)
        turned = torch.ops.aten.t.default(taken)
        total = torch.ops.aten.sum.dim_IntList(taken, [0])
        return torch.ops.aten.add.Tensor(torch.ops.aten.mm.default(turned, w), total)

    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(torch.randn(3, 3), torch.randn(3, 3)).graph
    names = {str(node.target) for node in _fused(graph.nodes)}
    assert names == {"aten.relu.default", "aten.sum.dim_IntList"}


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_compiling_pays_in_long_runs(kind: str) -> None:
    device = torch.device(kind)
    seconds, saves = costs(device)
    assert not worth_compiling(seconds / saves, device)  # what it saves is what it takes
    assert worth_compiling(2 * seconds / saves, device)
