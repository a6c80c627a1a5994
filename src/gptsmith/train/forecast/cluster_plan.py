"""Plan a run on many accelerators: the layout that gptsmith should use there, its memory, time, goodput and cost.

Every layout that gptsmith can run is forecast with each micro-batch that divides the batch; the fastest that fits wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gptsmith.distributed.layout import Layout
from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.cluster import (
    Forecast,
    Hardware,
    Program,
    Spread,
    Work,
    forecast,
    hardware_names,
    load_hardware,
)

USABLE = 0.92  # of the memory: forecasts err
RESTART_SECONDS = 300.0  # to notice a failure, find the machines and start the processes, before anything is read
MAX_LOGITS = 1 << 29  # as in model/loss.py
GRACE = 1.02  # a simpler layout is preferred to one that is faster by less


@dataclass(frozen=True)
class Cluster:
    """So many of one accelerator."""

    count: int
    hardware: Hardware

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Return the cluster that `1024xH100` describes. UsageError for another form or an unknown accelerator."""
        found = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*([\w.-]+)\s*", text)
        if not found or int(found[1]) < 1:
            names = ", ".join(hardware_names())
            raise UsageError(
                f"--cluster {text}: write a number and an accelerator, such as 1024xH100. Accelerators: {names}."
            )
        hardware = load_hardware(found[2])
        count = int(found[1])
        if count > hardware.per_machine and count % hardware.per_machine:
            raise UsageError(f"--cluster {text}: a machine has {hardware.per_machine} of them; give a multiple.")
        return cls(count, hardware)


@dataclass(frozen=True)
class Saving:
    """Checkpoints and failures. Seconds."""

    bytes: float
    """Of a checkpoint: weights and the state of the optimizer."""
    stall: float
    """That training waits for a checkpoint: its copy into the memory of the machines. It is written meanwhile."""
    writing: float
    """To write it. Less than between two."""
    interval: float
    """Between checkpoints: with the least loss of time (Young 1974)."""
    failure: float
    """Between failures of the whole cluster."""
    restart: float
    """From a failure to the first step after it."""

    @property
    def goodput(self) -> float:
        """Return the share of the time in which updates are made that count."""
        lost = self.stall / self.interval + (self.interval / 2 + self.restart) / self.failure
        return max(0.0, 1 / (1 + lost))


@dataclass(frozen=True)
class ClusterPlan:
    """A recommended layout and what it takes."""

    cluster: Cluster
    found: Forecast
    steps: int
    saving: Saving
    price_per_hour: float | None
    """Of one accelerator."""
    reasons: tuple[str, ...]
    fits: bool
    """Otherwise the plan is of the layout that needs the least memory."""

    @property
    def update(self) -> float:
        """Seconds of an update, with its share of checkpoints."""
        return self.found.step * (1 + self.saving.stall / self.saving.interval)

    @property
    def seconds(self) -> float:
        """Of the whole run, failures included."""
        return self.steps * self.found.step / self.saving.goodput

    @property
    def cost(self) -> float | None:
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * self.cluster.count * self.seconds / 3600

    @property
    def times(self) -> dict[str, float]:
        """Seconds of an update by part."""
        return {**self.found.seconds, "checkpoint": self.update - self.found.step}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON. Memory in bytes, times in seconds."""
        found, s = self.found, self.found.spread
        return {
            "cluster": {"count": self.cluster.count, "accelerator": self.cluster.hardware.name},
            "hardware": asdict(self.cluster.hardware),
            "parallel": parallel_option(s),
            "layout": asdict(s),
            "micro_batch_size": found.work.micro_batch,
            "micro_batches": found.work.micro_batches,
            "batch_size": found.work.batch(s),
            "activation_checkpointing": found.program.recompute == "full",
            "fits": self.fits,
            "memory": {**found.memory, "total": found.bytes, "available": self.cluster.hardware.memory},
            "seconds_per_update": {**self.times, "total": self.update},
            "bytes_sent_per_update": dict(found.traffic),
            "tokens_per_second": found.tokens_per_second,
            "tokens_per_second_per_accelerator": found.tokens_per_second / self.cluster.count,
            "utilization": found.utilization,
            "steps": self.steps,
            "saving": {**asdict(self.saving), "goodput": self.saving.goodput},
            "seconds": self.seconds,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "reasons": list(self.reasons),
        }


def plan_cluster(
    config: RunConfig,
    model: ModelConfig,
    cluster: Cluster,
    *,
    price_per_hour: float | None = None,
    micro_batch_size: int | None = None,
    layout: Layout | None = None,
) -> ClusterPlan:
    """Return the plan of a pretraining run.

    price_per_hour: of one accelerator, not the file's. micro_batch_size, layout: to plan with, not the best ones.
    Raises UsageError for what such a plan does not know.
    """
    if config.adapter.lora == "on":
        raise UsageError("--cluster forecasts training of all weights; leave out --lora.")
    if config.parallel.exact:
        raise UsageError("--cluster does not support --exact: leave it out.")
    if config.loop.precision not in ("auto", "bf16"):
        raise UsageError(f"--cluster forecasts training in bf16; leave out --precision {config.loop.precision}.")

    def candidates_for(batch: int) -> list[Forecast]:
        found = _candidates(config, model, cluster, batch, layout)
        return [each for each in found if micro_batch_size in (None, each.work.micro_batch)]

    candidates, reasons = candidates_for(config.loop.batch_size), []
    if not candidates:
        batch = _possible_batch(config, model, cluster, layout)
        candidates = candidates_for(batch)
        if not candidates:
            raise UsageError(f"--micro-batch-size {micro_batch_size} does not divide any share of a batch of {batch}.")
        reasons.append(
            f"a batch of {config.loop.batch_size:,} sequences cannot be divided among {cluster.count:,}: planned with "
            f"--batch-size {batch}, and as many tokens in total"
        )
    room = USABLE * cluster.hardware.memory
    fitting = [c for c in candidates if c.bytes <= room]
    fastest = min(fitting, key=lambda c: c.step, default=None)
    if fastest is None:
        chosen = min(candidates, key=lambda c: c.bytes)
        reasons.append("no layout fits; this is the one that takes the least memory")
    else:
        near = [c for c in fitting if c.step <= GRACE * fastest.step]
        chosen = min(near, key=lambda c: (_complexity(c), c.step))
        reasons += _why(chosen, fitting, candidates, room)
    tokens = config.loop.steps * config.loop.batch_size * config.loop.context
    steps = max(1, round(tokens / (chosen.work.batch(chosen.spread) * config.loop.context)))
    return ClusterPlan(
        cluster=cluster,
        found=chosen,
        steps=steps,
        saving=_saving(chosen, cluster),
        price_per_hour=cluster.hardware.price if price_per_hour is None else price_per_hour,
        reasons=tuple(reasons),
        fits=fastest is not None,
    )


def program_of(spread: Spread, *, recompute: bool, optimizer: str, compiled: bool = True) -> Program:
    """Return how gptsmith computes with a layout: weights stay in float32 and are gathered so, a divided model is not
    compiled, and tp does not divide positions."""
    divided = spread.fsdp * spread.tp * spread.ep > 1
    return Program(
        recompute="full" if recompute else "none",
        compiled=compiled and not divided,
        sequence_parallel=False,
        state_bytes=16.0 if optimizer == "adamw" else 12.0,
        gather_bytes=4.0,
        reduce_bytes=4.0,
        logits_at_once=MAX_LOGITS,
    )


def parallel_option(spread: Spread) -> str:
    """Return the value of --parallel."""
    sizes = {"dp": spread.dp, "fsdp": spread.fsdp, "ep": spread.ep, "tp": spread.tp}
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "dp"


# Candidates ----------------------------------------------------------------------------------------------------------


def spreads(model: ModelConfig, cluster: Cluster, layout: Layout | None = None) -> Iterator[Spread]:
    """Yield the layouts that gptsmith can run, products of dp, fsdp, tp within a machine and ep; or the one given.

    UsageError if that one does not fit the model.
    """
    if layout is not None:
        layout.check(model)
        yield Spread(dp=layout.dp, fsdp=layout.fsdp, tp=layout.tp, ep=layout.ep)
        return
    count, inside = cluster.count, cluster.hardware.per_machine
    for tp in _divisors(math.gcd(count, inside)):
        if any(Layout(tp=tp).problems(model)):
            continue
        rest = count // tp
        for ep in _divisors(math.gcd(rest, model.num_experts) if model.num_experts else 1):
            for fsdp in _divisors(rest // ep):
                yield Spread(dp=rest // ep // fsdp, fsdp=fsdp, tp=tp, ep=ep)


def _candidates(
    config: RunConfig, model: ModelConfig, cluster: Cluster, batch: int, layout: Layout | None = None
) -> Iterator[Forecast]:
    wanted, room = config.loop.activation_checkpointing, USABLE * cluster.hardware.memory
    for spread in spreads(model, cluster, layout):
        if batch % spread.data:
            continue
        rows = batch // spread.data
        for recompute in (False, True):
            if recompute != (wanted == "on") and wanted != "auto":
                continue
            program = program_of(
                spread, recompute=recompute, optimizer=config.optim.name, compiled=config.loop.compile != "off"
            )
            for micro in _divisors(rows):
                work = Work(model, config.loop.context, micro, rows // micro)
                found = forecast(work, spread, cluster.hardware, program)
                yield found
                if found.bytes > room:  # and so do larger ones
                    break


def _possible_batch(config: RunConfig, model: ModelConfig, cluster: Cluster, layout: Layout | None) -> int:
    """Return the nearest batch size that some layout can divide."""
    sizes = {spread.data for spread in spreads(model, cluster, layout)}
    wanted = config.loop.batch_size
    batches = [size * max(1, round(wanted / size)) for size in sizes]
    return min(batches, key=lambda batch: (abs(batch - wanted), batch))


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _complexity(found: Forecast) -> int:
    """Return how many kinds of parallelism there are, recomputation included: fewer are simpler to run."""
    s = found.spread
    return (s.dp > 1) + (s.fsdp > 1) + 2 * (s.tp > 1) + 2 * (s.ep > 1) + (found.program.recompute == "full")


# Why -----------------------------------------------------------------------------------------------------------------


def _why(chosen: Forecast, fitting: list[Forecast], candidates: list[Forecast], room: float) -> list[str]:
    s, reasons = chosen.spread, []

    def best(keep: Any, among: list[Forecast]) -> Forecast | None:
        return min((c for c in among if keep(c)), key=lambda c: c.step, default=None)

    def smallest(keep: Any) -> Forecast | None:
        return min((c for c in candidates if keep(c)), key=lambda c: c.bytes, default=None)

    def compare(name: str, keep: Any) -> None:
        other, small = best(keep, fitting), smallest(keep)
        if other is not None:
            reasons.append(f"{name}: {other.step / chosen.step:.2f} times the time")
        elif small is not None:
            reasons.append(f"{name}: does not fit, {small.bytes / 1e9:,.0f} GB of {room / 1e9:,.0f} GB at least")

    if s.fsdp * s.tp * s.ep > 1:
        compare("a whole model on each accelerator (dp)", lambda c: c.spread.fsdp * c.spread.tp * c.spread.ep == 1)
    if s.tp > 1:
        compare("without tp", lambda c: c.spread.tp == 1)
    else:
        compare("with tp=8", lambda c: c.spread.tp == 8)
    if s.ep == 1 and chosen.work.model.num_experts:
        compare("with the experts divided (ep)", lambda c: c.spread.ep > 1)
    if s.fsdp > 1 and s.dp > 1:
        compare("fsdp over all", lambda c: c.spread.dp == 1 and c.spread.tp == s.tp and c.spread.ep == s.ep)
    elif s.fsdp > 1:
        compare("fsdp in groups, with copies (hsdp)", lambda c: c.spread.dp > 1 and c.spread.fsdp > 1)
    if chosen.program.recompute == "full":
        compare("without recomputing activations", lambda c: c.program.recompute == "none")
    return reasons


# Checkpoints and failures --------------------------------------------------------------------------------------------


def _saving(found: Forecast, cluster: Cluster) -> Saving:
    hw, count = cluster.hardware, cluster.count
    size = count_parameters(found.work.model).total * (found.program.state_bytes - 4)  # all but gradients
    machines = max(1, count // hw.per_machine)
    writers = count // found.spread.dp  # one of each group of copies
    stall = size / writers / hw.host_link
    writing = size / (hw.storage * max(1, machines // found.spread.dp))
    failure = 86400 / (hw.failures * count)
    interval = max(math.sqrt(2 * stall * failure), writing, found.step)
    return Saving(
        bytes=size,
        stall=stall,
        writing=writing,
        interval=interval,
        failure=failure,
        restart=RESTART_SECONDS + writing,
    )
