"""What a run will take - memory, time, money - from its configuration, before anything of it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptsmith.config import to_dict
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import Size, count_parameters, flops_per_token
from gptsmith.runtime import ChosenPrecision, choose_precision
from gptsmith.train.budget.recipe import Text
from gptsmith.train.config import TrainConfig
from gptsmith.train.forecast.memory import Forecaster, Memory, available_memory, likely_compiled, process_memory
from gptsmith.train.forecast.timing import Times, measure


@dataclass(frozen=True)
class Plan:
    """A forecast. Memory in bytes, times in seconds."""

    config: TrainConfig
    model: ModelConfig
    text: Text | None
    """The data, where given."""
    device: str
    precision: ChosenPrecision
    parameters: Size
    flops_per_token: float
    """Of training: forward and backward pass."""
    memory: Memory
    """With the micro-batch that was asked for."""
    smallest: Memory
    """With micro-batches of one sequence."""
    available: int | None
    """What a process may take on the device; None where that is not known."""
    largest_micro_batch: int | None
    """The largest divisor of the batch that fits; None where not even one sequence does, or where it is not known."""
    times: Times
    price_per_hour: float | None

    @property
    def micro_batch_size(self) -> int:
        """What was asked for."""
        return self.config.micro_batch_size or self.config.batch_size

    @property
    def fits(self) -> bool:
        return self.available is None or self.largest_micro_batch is not None

    @property
    def trained_micro_batch(self) -> int:
        """What the run would train with: as asked, or the largest that fits."""
        return min(self.micro_batch_size, self.largest_micro_batch or self.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Seen in training, all told."""
        return self.config.steps * self.config.batch_size * self.config.context

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch_size * self.config.context / self.times.update

    @property
    def seconds(self) -> float:
        """Of the whole command."""
        return self.times.command(self.config)

    @property
    def cost(self) -> float | None:
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "config": to_dict(self.config),
            "model": to_dict(self.model),
            "text": None if self.text is None else to_dict(self.text),
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
            "times": to_dict(self.times),
            "tokens_per_second": self.tokens_per_second,
            "training_seconds": self.times.training(self.config),
            "seconds": self.seconds,
            "cost": self.cost,
        }


def forecast(
    config: TrainConfig,
    model_config: ModelConfig,
    text: Text | None,
    device: torch.device,
    *,
    price_per_hour: float | None = None,
) -> Plan:
    """Forecast a run. Takes a few seconds, and those of compiling a block where the run would compile.

    text: its data, or None where that is not known: then evaluations are left out of the time.
    """
    precision = choose_precision(config.precision, device)
    asked = config.micro_batch_size or config.batch_size
    available = available_memory(device)
    own = process_memory()

    def forecaster(compiled: bool) -> Forecaster:
        return Forecaster(config, model_config, device=device, precision=precision, compiled=compiled, process=own)

    foreseen = forecaster(likely_compiled(config, device))
    largest = None if available is None else foreseen.largest_fitting(available)
    times = measure(
        config,
        model_config,
        device,
        precision,
        micro_batch_size=min(asked, largest or asked),
        val_tokens=text.val_tokens if text is not None else 0,
    )
    if times.compile:  # what `auto` decides shows only by the time
        foreseen = forecaster(True)
    return Plan(
        config=config,
        model=model_config,
        text=text,
        device=str(device),
        precision=precision,
        parameters=count_parameters(model_config),
        flops_per_token=flops_per_token(model_config, config.context),
        memory=foreseen.at(asked),
        smallest=foreseen.at(1),
        available=available,
        largest_micro_batch=largest,
        times=times,
        price_per_hour=price_per_hour,
    )
