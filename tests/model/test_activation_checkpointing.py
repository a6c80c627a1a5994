"""Recomputing layers in the backward pass changes no bit of the loss or the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.model.families import FAMILIES
from gptsmith.model.loss import training_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.train.compile import compile_blocks, partitioned, undo_compile
from tests.factories import tiny_config


def training_step(model: Transformer, documents: bool) -> list[Tensor]:
    """Return loss, metrics and gradients of a step with fixed tokens and random numbers."""
    torch.manual_seed(7)
    ids, targets = torch.randint(0, 30, (2, 24)), torch.randint(0, 30, (2, 24))
    document_ids = (torch.arange(24) // 7).expand(2, 24) if documents else None
    loss, metrics = training_loss_sum(model, ids, targets, document_ids)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return [loss.detach(), *metrics.values(), *gradients, torch.rand(())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("documents", [False, True])
def test_same_bits(family: str, documents: bool) -> None:
    """With dropout, router losses and documents; the random numbers that follow are the same, too."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(family), dropout=0.2).train()
    expected = training_step(model, documents)
    model.activation_checkpointing = True
    for a, b in zip(training_step(model, documents), expected, strict=True):
        assert torch.equal(a, b)


def test_frozen_layers() -> None:
    torch.manual_seed(0)
    model = Transformer(tiny_config("llama")).train()
    model.embed_tokens.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    expected = training_step(model, documents=False)
    model.activation_checkpointing = True
    for a, b in zip(training_step(model, documents=False), expected, strict=True):
        assert torch.equal(a, b)


def test_activations_are_not_kept() -> None:
    """What autograd saves for the backward pass: without checkpointing each layer adds many tensors, with it one."""

    def saved_elements(layers: int, checkpointing: bool) -> int:
        model = Transformer(tiny_config("llama", num_hidden_layers=layers)).train()
        model.activation_checkpointing = checkpointing
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in parameters:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.zeros(2, 24, dtype=torch.int64))
        return sum(saved.values())

    def per_layer(checkpointing: bool) -> int:
        return saved_elements(6, checkpointing) - saved_elements(2, checkpointing)

    assert per_layer(True) < 0.2 * per_layer(False)


def test_inspection_and_inference_do_not_recompute() -> None:
    model = Transformer(tiny_config("qwen3_moe")).train()
    model.activation_checkpointing = True
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.layers[0].register_forward_pre_hook(count)
    weights: list[Tensor] = []
    router_logits: list[Tensor] = []
    ids = torch.zeros(1, 8, dtype=torch.int64)
    torch.autograd.backward(model(ids, weights=weights, router_logits=router_logits).sum())
    assert (calls, len(weights), len(router_logits)) == (1, 2, 2)
    with torch.no_grad():
        model(ids)
    assert calls == 2
    router_logits.clear()
    torch.autograd.backward(model(ids, router_logits=router_logits).sum())
    assert (calls, len(router_logits)) == (4, 2)  # the layer ran twice, its router was noted once


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_compiled_layers(family: str) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny_config(family)).train()
    expected = training_step(model, documents=False)
    model.activation_checkpointing = True
    compile_blocks(model, partitioned())
    found = training_step(model, documents=False)
    undo_compile(model)
    torch.compiler.reset()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
