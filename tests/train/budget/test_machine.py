"""Timing a few updates before a run: what fits into memory is timed, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptsmith.errors import GptsmithError
from gptsmith.train.budget import machine
from tests.factories import tiny_run_config

CONFIG = tiny_run_config(batch_size=12)
MODEL = CONFIG.model.build(50, 32)
CPU = torch.device("cpu")


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert machine.seconds_per_update(CONFIG, MODEL, CPU, "fp32") > 0
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("most", "fitting", "tried"), [(1 << 15, 12, [12]), (256, 12, [8]), (1 << 15, 4, [12, 6, 3])])
def test_of_a_large_batch_a_part_is_timed(
    most: int, fitting: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fastest(config: Any, model: Any, device: Any, precision: Any, objective: Any, rows: int) -> tuple[float, float]:
        seen.append(rows)
        if rows > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return 0.5 * rows, 7.0

    monkeypatch.setattr(machine, "MOST_TOKENS", most)
    monkeypatch.setattr(machine, "_fastest", fastest)
    assert machine.seconds_per_update(CONFIG, MODEL, CPU, "fp32") == pytest.approx(0.5 * 12 + 7)
    assert seen == tried


def test_a_model_of_which_not_one_sequence_fits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(*_: Any) -> tuple[float, float]:
        raise MemoryError

    monkeypatch.setattr(machine, "_fastest", fastest)
    with pytest.raises(GptsmithError, match="not enough memory to time .* Set a smaller --depth"):
        machine.seconds_per_update(CONFIG, MODEL, CPU, "fp32")
