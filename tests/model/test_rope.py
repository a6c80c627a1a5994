from __future__ import annotations

import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.model import families
from gptsmith.model.config import RopeScaling
from gptsmith.model.rope import extend_context, rope_tables
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_config

SMALL = tiny_config("llama", hidden_size=32, num_hidden_layers=1, max_position_embeddings=64)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_extended_models_accept_longer_contexts(method: str) -> None:
    longer = extend_context(SMALL, 512, method)  # type: ignore[arg-type]
    model = Transformer(longer).eval()
    assert model(torch.zeros(1, 512, dtype=torch.int64)).shape == (1, 512, 30)
    cos, _ = rope_tables(longer)
    assert cos.shape == (512, 8)


def test_linear_divides_positions() -> None:
    plain, (cos, sin) = rope_tables(SMALL), rope_tables(extend_context(SMALL, 128, "linear"))
    torch.testing.assert_close(cos[::2], plain[0])
    torch.testing.assert_close(sin[::2], plain[1])


def test_ntk_keeps_the_largest_angle_of_the_slowest_dimension() -> None:
    _, sin = rope_tables(extend_context(SMALL, 256, "ntk"))
    _, before = rope_tables(SMALL)
    torch.testing.assert_close(sin[4::4, -1], before[1:, -1], atol=1e-6, rtol=1e-4)


def test_refused_extensions() -> None:
    with pytest.raises(UsageError, match="learned positions"):
        extend_context(families.gpt2(), 2048)
    with pytest.raises(UsageError, match="already"):
        extend_context(SMALL, 64)
    with pytest.raises(UsageError, match="above 0"):
        RopeScaling("linear", 0.0)
    with pytest.raises(UsageError, match="original_max_position_embeddings"):
        RopeScaling("yarn", 2.0)
