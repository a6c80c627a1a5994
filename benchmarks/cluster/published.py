"""The published runs of runs.csv, as forecasts see them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.train.forecast.cluster import (
    GIB,
    Forecast,
    Hardware,
    Program,
    Recompute,
    Spread,
    Work,
    forecast,
    load_hardware,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A published run."""

    source: str
    model: str
    hardware: str
    devices: int
    context: int
    spread: str
    micro_batch: int
    micro_batches: int
    recompute: str
    options: str
    tokens_per_second: float | None
    """Of each device."""
    seconds: float | None
    """Of an update."""
    memory: float | None
    """GiB of each device."""
    use: str
    """fit: the constants of the hardware were fitted on it; check: not."""
    note: str
    """Why the forecast is off, where that is known or likely."""

    def forecast(self, hardware: Hardware | None = None) -> Forecast:
        """Return our forecast. hardware: instead of the file's."""
        spread = Spread(**{name: int(size) for name, _, size in (p.partition("=") for p in self.spread.split(","))})
        assert spread.devices == self.devices, self
        work = Work(model_of(self.model, self.context), self.context, self.micro_batch, self.micro_batches)
        return forecast(work, spread, hardware or load_hardware(self.hardware), self.program())

    def program(self) -> Program:
        given = dict.fromkeys(self.options.split(), "") | dict(
            option.split("=") for option in self.options.split() if "=" in option
        )
        return Program(
            recompute=cast(Recompute, self.recompute),
            compiled="eager" not in given,
            fused_attention="unfused-attention" not in given,
            dropout="dropout" in given,
            fp8="fp8" in given,
            async_tp="async-tp" in given,
            sequence_parallel="no-sequence-parallel" not in given,
            gathers_again="gathers-again" in given,
            state_bytes=float(given.get("state", 16)),
            reduce_bytes=float(given.get("reduce", 4)),
            gather_bytes=float(given.get("gather", 2)),
        )

    def published_seconds(self, found: Forecast) -> float:
        if self.seconds is not None:
            return self.seconds
        assert self.tokens_per_second is not None
        return found.tokens / (self.tokens_per_second * self.devices)

    def errors(self, hardware: Hardware | None = None) -> tuple[float, float | None]:
        """Return the relative errors of time and memory: above 0 if the forecast is too high."""
        found = self.forecast(hardware)
        time = found.step / self.published_seconds(found) - 1
        return time, None if self.memory is None else found.bytes / GIB / self.memory - 1


def runs() -> list[Run]:
    """Return all published runs."""
    numbers = {"devices": int, "context": int, "micro_batch": int, "micro_batches": int}
    found = []
    with open(HERE / "runs.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values: dict[str, Any] = {name: numbers.get(name, str)(value) for name, value in row.items()}
            for name in ("tokens_per_second", "seconds", "memory"):
                values[name] = float(row[name]) if row[name] else None
            found.append(Run(**values))
    return found


def model_of(name: str, context: int) -> ModelConfig:
    sizes = dict(yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8"))[name])
    family = sizes.pop("family")
    return FAMILIES[family](max_position_embeddings=context, **sizes)


def sources() -> dict[str, dict[str, str]]:
    return dict(yaml.safe_load((HERE / "sources.yaml").read_text(encoding="utf-8")))


def within(errors: Sequence[float], limit: float = 0.1) -> int:
    return sum(abs(error) <= limit for error in errors)
