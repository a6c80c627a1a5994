"""Forecast the memory, time and cost of a run from its configuration, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptsmith.config import to_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import Size, count_parameters, flops_per_token
from gptsmith.runtime import ChosenPrecision, choose_precision
from gptsmith.train.budget.recipe import Text
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.memory import Forecaster, Memory, available_memory, likely_compiled, process_memory
from gptsmith.train.forecast.timing import Times, measure
from gptsmith.train.objectives.base import Objective


@dataclass(frozen=True)
class Plan:
    """A forecast. Memory in bytes, times in seconds."""

    config: RunConfig
    model: ModelConfig
    text: Text | None
    """The data, where given."""
    device: str
    precision: ChosenPrecision
    parameters: Size
    flops_per_token: float
    """Of training: forward and backward pass."""
    memory: Memory
    """With the micro-batch size that was asked for."""
    smallest: Memory
    """With micro-batches of one sequence."""
    available: int | None
    """Bytes that a process can use on the device; None where that is not known."""
    largest_micro_batch: int | None
    """The largest divisor of the batch size that fits; None where not even 1 does, or where it is not known."""
    activation_checkpointing: bool
    """Whether the run would recompute activations in the backward pass."""
    times: Times
    price_per_hour: float | None

    @property
    def micro_batch_size(self) -> int:
        """The micro-batch size that was asked for."""
        return self.config.loop.micro_batch_size or self.config.loop.batch_size

    @property
    def fits(self) -> bool:
        return self.available is None or self.largest_micro_batch is not None

    @property
    def trained_micro_batch(self) -> int:
        """The micro-batch size that the run would train with: as asked, or the largest that fits."""
        return min(self.micro_batch_size, self.largest_micro_batch or self.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Tokens seen in training, in total."""
        return self.config.loop.steps * self.config.loop.batch_size * self.config.loop.context

    @property
    def tokens_per_second(self) -> float:
        return self.config.loop.batch_size * self.config.loop.context / self.times.update

    @property
    def seconds(self) -> float:
        """Duration of the whole command."""
        return self.times.command(self.config)

    @property
    def cost(self) -> float | None:
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "config": self.config.as_options(),
            "model": to_dict(self.model),
            "text": None
            if self.text is None
            else {k: v for k, v in to_dict(self.text).items() if k.endswith(("_tokens", "_size"))},
            "device": self.device,
            "precision": self.precision,
            "parameters": to_dict(self.parameters),
            "flops_per_token": self.flops_per_token,
            "flops": self.flops_per_token * self.tokens,
            "tokens": self.tokens,
            "memory": {**self.memory.parts, "total": self.memory.total, "moment": self.memory.moment},
            "memory_at_micro_batch_1": {**self.smallest.parts, "total": self.smallest.total},
            "available": self.available,
            "fits": self.fits,
            "micro_batch_size": self.trained_micro_batch,
            "largest_micro_batch": self.largest_micro_batch,
            "activation_checkpointing": self.activation_checkpointing,
            "times": to_dict(self.times),
            "tokens_per_second": self.tokens_per_second,
            "training_seconds": self.times.training(self.config),
            "seconds": self.seconds,
            "cost": self.cost,
        }


def forecast(
    config: RunConfig,
    model_config: ModelConfig,
    text: Text | None,
    device: torch.device,
    *,
    objective: Objective[Any] | None = None,
    process: int | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """Forecast a run. Takes a few seconds, and those of compiling a block where the run would compile.

    text: its data, or None where that is not known: then the time does not include evaluations.
    objective: of the run (default: pretraining). process: bytes of the process without the models of the objective
    (default: of this process, measured now).
    """
    precision = choose_precision(config.loop.precision, device)
    asked = config.loop.micro_batch_size or config.loop.batch_size
    available = available_memory(device)
    own = process_memory() if process is None else process

    def forecaster(compiled: bool, recompute: bool) -> Forecaster:
        return Forecaster(
            config,
            model_config,
            device=device,
            precision=precision,
            objective=objective,
            compiled=compiled,
            activation_checkpointing=recompute,
            process=own,
        )

    compiled, recompute = likely_compiled(config, device), config.loop.activation_checkpointing == "on"
    memory = forecaster(compiled, recompute)
    largest = None if available is None else memory.largest_fitting(available)
    if available is not None and largest is None and config.loop.activation_checkpointing == "auto":
        saving = forecaster(compiled, True)
        if saving.largest_fitting(available) is not None:  # else the run is refused, and recomputing would not help
            memory, recompute, largest = saving, True, saving.largest_fitting(available)
    times = measure(
        config,
        model_config,
        device,
        precision,
        objective=objective,
        micro_batch_size=min(asked, largest or asked),
        activation_checkpointing=recompute,
        train_tokens=text.train_tokens if text is not None else 0,
        val_tokens=text.val_tokens if text is not None else 0,
    )
    if times.compile:  # with `--compile auto` only the measured time decides
        memory = forecaster(True, recompute)
    return Plan(
        config=config,
        model=model_config,
        text=text,
        device=str(device),
        precision=precision,
        parameters=count_parameters(model_config),
        flops_per_token=flops_per_token(model_config, config.loop.context),
        memory=memory.at(asked),
        smallest=memory.at(1),
        available=available,
        largest_micro_batch=largest,
        activation_checkpointing=recompute,
        times=times,
        price_per_hour=price_per_hour,
    )
