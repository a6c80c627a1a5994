from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.runtime import choose_precision
from tests.factories import tiny_model


def test_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(UsageError, match="--precision fp8 requires an NVIDIA GPU"):
        choose_precision("fp8", torch.device("cpu"))


def test_layers_are_swapped_weights_keep_their_names_and_outputs_stay_near() -> None:
    pytest.importorskip("torchao.float8", reason="torchao is not installed (an extra: gptsmith[fp8])")
    from gptsmith.train.fp8 import use_fp8

    model = tiny_model(
        "qwen3",
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.02,
    )
    ids = torch.randint(0, 40, (2, 16))
    expected, names = model(ids), set(model.state_dict())
    use_fp8(model, emulate=True)
    mlp: Any = model.layers[0].mlp
    assert type(mlp.up_proj).__name__ == "Float8Linear"
    assert type(model.lm_head) is torch.nn.Linear
    assert set(model.state_dict()) == names
    difference = (model(ids) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.1
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
