"""Run an update of many simulated processes: the real model, optimizer and layout, one process at a time.

Each process is simulated (`distributed/simulator.py`): its collectives return at once, and its tensors have no storage.
So the results are counts of what the code does: the bytes that a process holds, and every collective with its size.

Processes whose parts have the same shapes run the same program: one process of each such class is run, and the last
process of all (with Muon, processes also own different matrices). All blocks are alike, so two models of few layers are
run, and the rest is extrapolated.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gptsmith.distributed.layout import Layout
from gptsmith.distributed.sharding import sharding_of
from gptsmith.distributed.simulator import (
    SimulatedProcess,
    collective_name,
    group_of_collective,
    is_collective,
    payload,
    simulated_process,
)
from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision
from gptsmith.train.budget.machine import example_objective
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.storages import StorageMode, shallow_depths
from gptsmith.train.step import TrainingStep

MOST_CLASSES = 8  # of processes that are run


class Collective(NamedTuple):
    """A collective of one process."""

    moment: str
    """micro-batch: the forward and backward pass of one. update: everything after the last micro-batch."""
    kind: str
    axes: str
    """The axes of the layout, such as "fsdp" or "dp,fsdp"."""
    size: int
    """Number of processes."""
    dtype: str
    bytes: int
    """Of what is reduced, gathered or scattered, whole."""

    def alike(self, *, together: bool) -> tuple[object, ...]:
        """Return what must be the same in two processes. together: whether they are in the same group: others can have
        parts of another size. In an all-to-all, each gives and takes as much as it has."""
        return tuple(self) if together and self.kind != "all_to_all" else self[:-1]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes, at one moment."""

    moment: str
    kind: str
    axes: str
    processes: int
    count: int
    bytes: int
    """Of what is reduced, gathered or scattered, in all of them."""
    sent: int
    """Bytes that a process sends, by ring algorithms."""


@dataclass(frozen=True)
class DryRun:
    """What one update takes."""

    ranks: int
    layout: Layout
    model: ModelConfig
    micro_batch_size: int
    micro_batches: int
    """Of a process, in an update."""
    memory: Mapping[str, int]
    """Bytes of the process that holds most, at its peak: weights, gradients, optimizer, others (activations, logits,
    gathered weights, messages)."""
    peak: str
    """When: in a micro-batch or the update."""
    traffic: tuple[Traffic, ...]
    """Of one micro-batch, and of what follows the last."""
    simulated: tuple[int, ...]
    """The processes that were run, one of each class."""
    classes: int
    same: bool
    """Whether all of them issue the same sequence of collectives."""
    difference: str | None
    """The first collective in which two differ."""
    seconds: float
    """That this took."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layout": asdict(self.layout), "parallel": str(self.layout)}


def dry_run(config: RunConfig, model_config: ModelConfig, layout: Layout) -> DryRun:
    """Run an update of the configuration on `layout.size` simulated processes.

    UsageError for a layout that does not fit the model or the batch.
    """
    began = time.monotonic()
    layout.check(model_config)
    batch = config.loop.batch_size
    if batch % layout.data_size:
        raise UsageError(f"a batch of {batch} cannot be divided among {layout.data_size}: set another --batch-size.")
    rows = batch // layout.data_size
    micro = min(config.loop.micro_batch_size or rows, rows)
    low, high = shallow_depths(model_config)
    runs = {
        depth: _run(0, config, replace(model_config, num_hidden_layers=depth), layout, micro) for depth in (low, high)
    }
    representatives, classes = _classes(replace(model_config, num_hidden_layers=low), layout)
    difference = None
    held = {0: runs[low]}
    for rank in representatives:
        if rank:
            run = _run(rank, config, replace(model_config, num_hidden_layers=low), layout, micro)
            for other in held:
                difference = difference or _difference(layout, other, held[other].collectives, rank, run.collectives)
            held[rank] = run
    layers = model_config.num_hidden_layers
    times = (layers - low) / (high - low) if high > low else 0.0
    worst = max(held.values(), key=lambda run: run.total)
    memory, peak = _extrapolated(runs[low], runs[high], worst, times)
    return DryRun(
        ranks=layout.size,
        layout=layout,
        model=model_config,
        micro_batch_size=micro,
        micro_batches=math.ceil(rows / micro),
        memory=memory,
        peak=peak,
        traffic=tuple(_traffic(runs[low].collectives, runs[high].collectives, times)),
        simulated=tuple(held),
        classes=classes,
        same=difference is None,
        difference=difference,
        seconds=time.monotonic() - began,
    )


# One process ---------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    peaks: dict[str, dict[str, int]]
    collectives: list[Collective]

    @property
    def total(self) -> int:
        return max(sum(parts.values()) for parts in self.peaks.values())


def _run(rank: int, config: RunConfig, model_config: ModelConfig, layout: Layout, micro: int) -> _Run:
    """Run a micro-batch and the update of one process."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    objective = example_objective(config, model_config)
    precision: ChosenPrecision = "bf16" if config.loop.precision in ("auto", "bf16") else "fp32"
    with simulated_process(rank, layout.size) as ranks:
        ranks.arrange(layout, torch.device("cpu"))
        names = _names_of_groups(ranks)
        with torch.random.fork_rng(devices=[]), FakeTensorMode():
            model = Transformer(model_config, dropout=config.loop.dropout, initialize=False)
            model.activation_checkpointing = config.loop.activation_checkpointing == "on"
            step: TrainingStep[Any] = TrainingStep.build(
                model, objective, config, precision=precision, micro_batch_size=micro, ranks=ranks
            )
            recorder = _Recorder(names, layout.size, layout.coordinates(rank)["ep"])
            weights = sum(_bytes(p) for p in step.parameters)
            with recorder:
                recorder.begin("micro-batch")
                loss, metrics = step.accumulate(objective.example_batch(micro), 1.0)
                gradients = sum(_bytes(p) for p in step.parameters if p.requires_grad)
                recorder.begin("update")
                step.sum_over_ranks(loss, metrics)
                step.apply(1.0)
            state = sum(
                _bytes(value)
                for optimizer in step.optimizers.optimizers
                for values in optimizer.state.values()
                for value in values.values()
                if isinstance(value, Tensor) and value.ndim
            )
    peaks = {}
    for (
        moment,
        peak,
    ) in recorder.peaks.items():  # gradients, and from the second update on the state, are held throughout
        new = gradients + (state if moment == "update" else 0)
        peaks[moment] = {
            "weights": weights,
            "gradients": gradients,
            "optimizer": state,
            "others": max(0, peak - new),
        }
    return _Run(peaks, recorder.collectives)


def _bytes(tensor: Tensor) -> int:
    part: Any = tensor
    part = getattr(part, "_local_tensor", part)
    return int(part.numel() * part.element_size())


def _names_of_groups(ranks: SimulatedProcess) -> dict[str, tuple[str, int]]:
    """Return the axes and the size of each process group, by its name."""
    import itertools

    import torch.distributed as dist

    sizes = {axis: size for axis, size in ranks.layout.sizes.items() if size > 1}
    world: Any = dist.group.WORLD
    found = {world.group_name: (",".join(sizes), ranks.world_size)}
    if ranks.mesh is not None:
        from gptsmith.distributed.parallel import group_of

        for count in range(1, len(sizes) + 1):
            for axes in itertools.combinations(sizes, count):
                group = group_of(ranks.mesh, axes)
                if group is not None:
                    found[group.group_name] = (",".join(axes), math.prod(sizes[axis] for axis in axes))
    return found


class _Recorder(StorageMode):
    """Counts the bytes of live storages, and records collectives.

    expert_place: which of the processes that share a mixture's experts this one is.
    """

    def __init__(self, groups: Mapping[str, tuple[str, int]], world_size: int, expert_place: int) -> None:
        super().__init__()
        self.groups, self.world_size, self.expert_place = groups, world_size, expert_place
        self.moment, self.held = "", 0
        self.peaks: dict[str, int] = {}
        self.collectives: list[Collective] = []

    def begin(self, moment: str) -> None:
        self.moment = moment
        self.peaks[moment] = self.held

    def __enter__(self) -> Self:
        """Begin. FSDP frees memory by resizing storages: those are followed, too."""
        self.resize = torch.UntypedStorage.resize_
        recorder = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = recorder.resize(storage, size)
            if storage._cdata in recorder.live:
                recorder.live[storage._cdata] = storage.nbytes()
                recorder._hold(storage.nbytes() - before)
            return result

        setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010  a method of C
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        setattr(torch.UntypedStorage, "resize_", self.resize)  # noqa: B010

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_collective(function):
            axes, size = self.groups.get(group_of_collective((args, kwargs)) or "", ("all", self.world_size))
            count, dtype = payload((args, kwargs))
            kind = collective_name(function)
            if kind == "all_to_all" and dtype == "int64":  # how many tokens each process has for experts of this one
                here = len(self.tokens_per_expert) // size
                first = self.expert_place * here
                self.numbers = iter(self.tokens_per_expert[first : first + here] * size)
            if kind == "all_gather" and "into" in str(function._opname):  # the argument is one process's part
                count *= size
            self.collectives.append(Collective(self.moment, kind, axes, size, dtype, count))
        return super().__torch_dispatch__(function, types, args, kwargs)

    def allocated(self, key: int, size: int) -> None:
        self._hold(size)

    def freed(self, key: int, size: int) -> None:
        self.held -= size

    def _hold(self, size: int) -> None:
        self.held += size
        self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), self.held)


# All processes -------------------------------------------------------------------------------------------------------


def _classes(model_config: ModelConfig, layout: Layout) -> tuple[list[int], int]:
    """Return one process of each class (at most `MOST_CLASSES`, the first and the last among them), and how many
    classes there are: processes are alike if all their parts have the same shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with simulated_process(0, layout.size) as ranks:
        ranks.arrange(layout, torch.device("cpu"))
        shardings = []
        if layout.divides_model:
            from gptsmith.distributed.parallel import named_parameters, parallelize

            with FakeTensorMode():
                model = parallelize(Transformer(model_config, initialize=False), ranks.mesh, layout)
                shardings = [sharding_of(p) for _, p in named_parameters(model)]
    unlike = list({(s.shape, s.splits): s for s in shardings}.values())
    first_of: dict[Any, int] = {}
    by_place: dict[tuple[Any, ...], Any] = {}
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        place = tuple(at[axis] for axis in ("fsdp", "ep", "tp"))
        if place not in by_place:
            by_place[place] = tuple(s.block_shape(at) for s in unlike)
        first_of.setdefault(by_place[place], rank)
    found = sorted(first_of.values())
    chosen = found if len(found) <= MOST_CLASSES else [*found[: MOST_CLASSES - 1], found[-1]]
    return sorted({*chosen, layout.size - 1}), len(found)


def _difference(layout: Layout, one: int, first: list[Collective], other: int, second: list[Collective]) -> str | None:
    """Return where two processes differ; None if they do not."""
    here, there = layout.coordinates(one), layout.coordinates(other)
    apart = {axis for axis in here if here[axis] != there[axis]}
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        together = a.axes == "all" or apart <= {*a.axes.split(",")}
        if a.alike(together=together) != b.alike(together=together):
            return (
                f"collective {index}: process {one} begins {a.kind} of {a.bytes:,} bytes along {a.axes}, process "
                f"{other} {b.kind} of {b.bytes:,} bytes along {b.axes}"
            )
    if len(first) != len(second):
        return f"process {one} has {len(first):,} collectives, process {other} {len(second):,}"
    return None


def _extrapolated(low: _Run, high: _Run, worst: _Run, times: float) -> tuple[dict[str, int], str]:
    """Return the memory of the whole depth at its peak, and the moment of the peak."""
    found = {}
    for moment in low.peaks:
        found[moment] = {
            part: round(worst.peaks[moment][part] + times * (high.peaks[moment][part] - low.peaks[moment][part]))
            for part in low.peaks[moment]
        }
    peak = max(found, key=lambda moment: sum(found[moment].values()))
    return found[peak], peak


def _traffic(low: list[Collective], high: list[Collective], times: float) -> Iterator[Traffic]:
    """Yield what is communicated with the whole depth."""

    def sums(collectives: list[Collective]) -> tuple[Counter[Any], Counter[Any]]:
        count, size = Counter[Any](), Counter[Any]()
        for each in collectives:
            key = (each.moment, each.kind, each.axes, each.size)
            count[key] += 1
            size[key] += each.bytes
        return count, size

    (few, few_bytes), (more, more_bytes) = sums(low), sums(high)
    for key in more:
        moment, kind, axes, processes = key
        size = round(few_bytes[key] + times * (more_bytes[key] - few_bytes[key]))
        rounds = 2 if kind == "all_reduce" else 1
        yield Traffic(
            moment=moment,
            kind=kind,
            axes=axes,
            processes=processes,
            count=round(few[key] + times * (more[key] - few[key])),
            bytes=size,
            sent=round(size * rounds * (processes - 1) / processes),
        )
