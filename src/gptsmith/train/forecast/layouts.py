"""Choose how processes share a model: the simplest layout whose forecast fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptsmith.distributed.layout import Layout
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.runtime import ChosenPrecision
from gptsmith.train.adapter import is_on
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.memory import USABLE, Forecaster, available_memory, certainly_fits, gigabytes
from gptsmith.train.objectives.base import Objective


def candidates(processes: int, local: int) -> Iterator[Layout]:
    """Yield layouts, the one with the least communication first. local: how many processes a machine has."""
    yield Layout(dp=processes)
    if 1 < local < processes and processes % local == 0:
        yield Layout(dp=processes // local, fsdp=local)
    if processes > 1:
        yield Layout(fsdp=processes)
    for tp in (2, 4, 8):
        if local % tp == 0 and processes % tp == 0 and processes > tp:
            yield Layout(fsdp=processes // tp, tp=tp)


def choose_layout(
    config: RunConfig,
    model_config: ModelConfig,
    *,
    processes: int,
    local: int,
    device: torch.device,
    precision: ChosenPrecision,
    objective: Objective[Any],
) -> Layout:
    """Return the first candidate that fits, and say why it is not plain data parallelism. If none fits, the last.

    Only what the run allows: one that samples answers, or adds up in a fixed order, does not divide the model.
    """
    available = available_memory(device)
    if available is not None and device.type != "cuda":
        available //= local
    chosen, needed_whole = Layout(dp=processes), 0
    whole_model: Forecaster | None = None
    for layout in candidates(processes, local):
        if any(layout.problems(model_config)) or config.loop.batch_size % layout.data_size:
            continue
        whole = not objective.can_divide or config.parallel.exact or config.loop.compile == "on" or precision == "fp16"
        if (layout.divides_model and whole) or (layout.tp > 1 and is_on(config.adapter)):
            continue
        chosen = layout
        if available is None or certainly_fits(config, model_config, 1, available):
            break
        if whole_model is None:
            whole_model = Forecaster(
                config,
                model_config,
                device=device,
                precision=precision,
                objective=objective,
                activation_checkpointing=config.loop.activation_checkpointing != "off",
            )
        needed = whole_model.divided(layout.fsdp * layout.tp).at(1).total
        needed_whole = needed_whole or needed
        if needed <= USABLE * available:
            break
    if chosen.divides_model and available is not None:
        note(
            f"--parallel {chosen}: in one piece the model would need {gigabytes(needed_whole)} of memory in each "
            f"process, and {gigabytes(available)} are available"
        )
    return chosen
