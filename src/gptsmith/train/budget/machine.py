"""The speed of this machine, measured by a few real updates of a model that is thrown away."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from gptsmith.errors import GptsmithError
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision, available_cores, compiler_available, out_of_memory, synchronize
from gptsmith.train.adapter import adapt
from gptsmith.train.budget.recipe import Machine
from gptsmith.train.compile import costs
from gptsmith.train.config import RunConfig
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.pretrain import NextToken
from gptsmith.train.step import TrainingStep

REPEATS, LONGEST = 4, 3.0  # updates to time, and the seconds after which no third or later one is started
MOST_TOKENS = 1 << 15  # in one forward pass: more are not faster
DEFAULT_CPU_FLOPS, DEFAULT_GPU_FLOPS = 5e10, 5e13  # FLOP/s of updates, until something has been measured


def example_objective(config: RunConfig, model_config: ModelConfig) -> NextToken:
    """Return the pretraining objective of a run without its data: for forecasts and timing."""
    return NextToken(
        seq_len=config.loop.context,
        vocab_size=model_config.vocab_size,
        mask_documents=config.method.masks_documents,
    )


def example_step(
    config: RunConfig,
    model_config: ModelConfig,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    rows: int | None = None,
    objective: Objective[Any] | None = None,
) -> TrainingStep[Any]:
    """Return the training step of a run with a new model and without data, for timing. rows: of a micro-batch."""
    return TrainingStep.build(
        adapt(Transformer(model_config, dropout=config.loop.dropout), config.adapter, config.vision).to(device),
        objective or example_objective(config, model_config),
        config,
        precision=precision,
        micro_batch_size=rows or config.loop.micro_batch_size or config.loop.batch_size,
    )


def seconds_per_update(
    config: RunConfig,
    model_config: ModelConfig,
    device: torch.device,
    precision: ChosenPrecision,
    objective: Objective[Any] | None = None,
) -> float:
    """Return the duration of the fastest of a few updates, uncompiled, on an example batch.

    Random numbers are left as they were. Of a large batch a part is timed, as large as memory allows; GptsmithError
    where not even one sequence fits.
    """
    objective, context = objective or example_objective(config, model_config), config.loop.context
    short = int(LONGEST * default_flops(device) / (context * flops_per_token(model_config, context)))
    rows = max(1, min(config.loop.micro_batch_size or config.loop.batch_size, MOST_TOKENS // context, short))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while True:
            try:
                forward_backward, step = _fastest(config, model_config, device, precision, objective, rows)
                return forward_backward * config.loop.batch_size / rows + step
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if rows == 1:
                size = count_parameters(model_config).total / 1e6
                raise GptsmithError(
                    f"there is not enough memory to time the {size:,.0f}M parameters that suit this budget. "
                    "Set a smaller --depth."
                )
            rows //= 2


def _fastest(
    config: RunConfig,
    model_config: ModelConfig,
    device: torch.device,
    precision: ChosenPrecision,
    objective: Objective[Any],
    rows: int,
) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass over `rows` sequences, and of an optimizer step."""
    step = example_step(config, model_config, device, precision, rows=rows, objective=objective)
    batch = objective.example_batch(rows)
    count = objective.normalizer(batch)[0]

    def timed(part: Callable[[], object]) -> float:
        began = time.perf_counter()
        part()
        synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    passes: list[float] = []
    steps: list[float] = []
    # The first allocates buffers and warms up, which on a busy machine can take many times as long as the others.
    while len(passes) < REPEATS and (len(passes) < 2 or time.perf_counter() - began < LONGEST):
        passes.append(timed(lambda: step.accumulate(batch, count)))
        steps.append(timed(lambda: step.apply(1.0)))
    return min(passes[1:]), min(steps[1:])


def this_machine(device: torch.device, precision: ChosenPrecision, compile: str) -> Machine:
    """Return what the rules of a budget need to know about this machine. compile: the option of that name."""
    cores = available_cores()
    able = compile != "off" and compiler_available(device)
    name = f"{cores} core{'s' if cores > 1 else ''}"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    seconds, saves = costs(device)
    return Machine(
        lambda config, model_config: seconds_per_update(config, model_config, device, precision),
        seconds if able else math.inf,
        saves,
        default_flops(device),
        name,
    )


def default_flops(device: torch.device) -> float:
    """Return the FLOP/s of updates to assume before any has been timed."""
    return DEFAULT_CPU_FLOPS if device.type == "cpu" else DEFAULT_GPU_FLOPS
