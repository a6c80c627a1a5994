"""Public reports about the accounting of the loss, replayed. Each docstring names the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.data.conversations import Counts, Example
from gptsmith.data.packing import Examples
from gptsmith.train.chats import Chats
from gptsmith.train.objectives.sft import Sft
from gptsmith.train.step import TrainingStep
from tests.factories import tiny_model, tiny_run_config


def gradients(micro_batch: int, *, packing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of one update on conversations of very unequal lengths."""
    examples = [Example([1 + i % 7] * n + [2, 3 + i % 5], [False] * n + [True, True]) for i, n in enumerate([2, 3, 18])]
    examples += [Example(list(range(1, 20)), [False] + [True] * 18)]
    model = tiny_model()
    chats: Any = Chats(Examples(examples), Examples([]), Counts())
    tokenizer: Any = None
    sft = Sft(chats, tokenizer, batch_size=4, seq_len=20, seed=0, vocab_size=30, packing=packing)
    step = TrainingStep.build(
        model, sft, tiny_run_config(batch_size=4, context=20), precision="fp32", micro_batch_size=micro_batch
    )
    batch = sft.next_batch(step.models, 0)
    loss, _ = step.accumulate(batch, sft.normalizer(batch)[0])
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True])
def test_A1_the_gradient_does_not_depend_on_the_micro_batch(packing: bool) -> None:
    """transformers #34191, #35203, #37766: with accumulation the mean of the means of micro-batches is trained on."""
    loss, whole = gradients(4, packing=packing)
    for micro_batch in (1, 2):
        other, parts = gradients(micro_batch, packing=packing)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
