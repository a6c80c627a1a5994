"""What `inspect` returns is what the model computes."""

from __future__ import annotations

import torch

from gptsmith.model.inspect import inspect, logit_lens
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_config

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def make_model() -> Transformer:
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=16, max_position_embeddings=32, initializer_range=0.3)
    return Transformer(config, dropout=0.5)


def test_inspect_ignores_dropout_and_keeps_the_mode() -> None:
    model = make_model().train()
    internals = inspect(model, IDS, attention=True, residuals=True)
    assert model.training
    model.eval()
    weights: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    with torch.no_grad():
        logits = model(torch.tensor([IDS]), weights=weights, residuals=residuals)
    torch.testing.assert_close(internals.logits, logits[0])
    torch.testing.assert_close(internals.attention, [layer[0] for layer in weights])
    torch.testing.assert_close(internals.residuals, [state[0] for state in residuals])
    assert not inspect(model, IDS).attention
    assert not inspect(model, IDS).residuals
    assert not model.training


def test_logit_lens_of_the_last_layer_is_the_models_prediction() -> None:
    model = make_model()
    internals = inspect(model, IDS, residuals=True)
    best, probability = logit_lens(model, internals.residuals[-1], vocab_size=12)
    expected = internals.logits[:, :12].softmax(dim=-1).max(dim=-1)
    assert torch.equal(best, expected.indices)
    torch.testing.assert_close(probability, expected.values)
