"""Forecasts of memory, each of which runs a model twice, are made once for a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gptsmith.model.config import ModelConfig
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast import memory


@pytest.fixture(scope="module")
def remembered_forecasts() -> Iterator[None]:
    """Run nothing a second time whose peaks are known, for modules whose runs have no objective of their own."""
    run, known = memory.run_without_storage, dict[Any, dict[str, memory.Parts]]()

    def remembered(
        config: RunConfig, model: ModelConfig, rows: int, device: torch.device, precision: Any, **options: Any
    ) -> dict[str, memory.Parts]:
        objective = options.pop("objective")
        same = config.replace(activation_checkpointing="auto")  # what is run is in the options
        key = (repr(same), model, rows, device, precision, *sorted(options.items()))
        if key not in known:
            known[key] = run(config, model, rows, device, precision, objective=objective, **options)
        return {moment: dict(parts) for moment, parts in known[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "run_without_storage", remembered)
        yield
