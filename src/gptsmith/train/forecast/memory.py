"""Forecast the memory of a run by executing its own code on tensors without storage.

A model, its optimizers, one update (forward, backward, clipping, optimizer step) and one batch of the evaluation run
under torch's FakeTensorMode: every operation returns tensors of the right shape and device, and a ledger records when
each storage is allocated and freed. So the forecast counts what the code does, and no formula has to follow it. All
layers of one kind are alike: two shallow models are run and the rest is extrapolated, so that any size takes a second.

On a CPU the forecast is of peak resident memory, on a GPU of allocated memory.
"""

from __future__ import annotations

import bisect
import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision, compiler_available
from gptsmith.train.adapter import adapt, is_on
from gptsmith.train.budget.machine import example_objective
from gptsmith.train.compile import compile_blocks, partitioned, undo_compile
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.storages import StorageMode, shallow_depths
from gptsmith.train.objectives.base import Models, Objective
from gptsmith.train.objectives.pretrain import EVAL_TOKENS_AT_ONCE, evaluation_rows
from gptsmith.train.step import TrainingStep

Parts = dict[str, float]

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
USABLE = 0.92  # of what is available: forecasts err, and other programs need some

# Measured on Linux (glibc) by benchmarks/forecast.py.
RUNTIME = 60 << 20  # buffers of matrix products and threads, and drawing the report
COMPILER = 40 << 20  # loaded by the compiler and kept
GPU_BUFFERS = 64 << 20  # of matrix products on a GPU: cuBLAS and cuBLASLt take 32 MB each on Hopper
FRAGMENTATION = 0.17  # of all tensors: unusable space between blocks of the heap


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment of peak memory."""

    parts: Mapping[str, int]
    """weights, gradients, optimizer (its state and temporary buffers), activations, logits (with their gradients),
    cache (keys and values, while answers are sampled) and process (on a CPU Python, torch and their buffers; on a GPU
    the buffers of matrix products); on a CPU also heap (freed, but not returned to the system)."""
    moment: str
    """The moment: update (forward and backward pass), optimizer (its step), evaluation, save (of a checkpoint), or one
    of the objective's own, such as rollout."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Forecaster:
    """Forecast the memory of runs that differ only in their micro-batch size.

    objective: of the run (default: pretraining). device: where the run would compute; it need not be present.
    compiled: whether blocks are compiled. On a CPU they keep about as much for the backward pass, and the compiler
        itself takes memory; on a GPU they keep less.
    activation_checkpointing: whether blocks are recomputed in the backward pass.
    process: bytes of the process itself (default: this process, measured now; on a GPU the buffers of its products).
    model_parts: among how many processes weights, gradients and optimizer state are divided.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: ModelConfig,
        *,
        device: torch.device,
        precision: ChosenPrecision,
        objective: Objective[Any] | None = None,
        compiled: bool = False,
        activation_checkpointing: bool = False,
        process: int | None = None,
        model_parts: int = 1,
    ) -> None:
        self.model_parts = model_parts
        self.config, self.model_config, self.device, self.precision = config, model_config, device, precision
        self.objective = objective or example_objective(config, model_config)
        self.compiled, self.activation_checkpointing = compiled, activation_checkpointing
        self.on_heap = device.type != "cuda"
        self.process = GPU_BUFFERS
        if self.on_heap:
            self.process = RUNTIME + compiled * COMPILER + (process_memory() if process is None else process)
        self._known: dict[int, Memory] = {}
        self._undivided: dict[int, dict[str, Parts]] = {}

    def divided(self, model_parts: int) -> Forecaster:
        """Return the forecaster of the same runs with the model divided otherwise."""
        other = copy.copy(self)  # what has been run without storage is shared
        other.model_parts, other._known = model_parts, {}
        return other

    def at(self, micro_batch_size: int) -> Memory:
        """Return the forecast for micro-batches of that many rows."""
        if micro_batch_size not in self._known:
            self._known[micro_batch_size] = self._forecast(micro_batch_size)
        return self._known[micro_batch_size]

    def largest_fitting(self, available: int) -> int | None:
        """Return the largest divisor of the batch size that fits into `available` bytes; None if not even 1 does."""
        if self.at(1).total > USABLE * available:
            return None
        batch_size = self.config.loop.batch_size
        if self.at(batch_size).total <= USABLE * available:  # mostly so, and each forecast takes a second
            return batch_size
        divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        fitting = bisect.bisect_left(divisors, True, key=lambda size: self.at(size).total > USABLE * available)
        return divisors[fitting - 1]

    def _forecast(self, micro_batch_size: int) -> Memory:
        if micro_batch_size not in self._undivided:
            self._undivided[micro_batch_size] = self._peaks(micro_batch_size)
        shares = {part: self.model_parts if part in ("weights", "gradients", "optimizer") else 1 for part in PARTS}
        peaks = {
            moment: {part: size / shares[part] for part, size in parts.items()}
            for moment, parts in self._undivided[micro_batch_size].items()
        }
        if not self.on_heap:
            moment, parts = max(peaks.items(), key=lambda item: sum(item[1].values()))
            parts = {**parts, "process": float(self.process)}
        else:
            # Freed memory stays with the process and is used again. But the large blocks of an optimizer's step do not
            # fit into the gaps that activations leave between gradients: they come on top.
            step = peaks.pop("optimizer")
            moment, parts = max(peaks.items(), key=lambda item: sum(item[1].values()))
            temporary = max(0.0, step["optimizer"] - peaks["save"]["optimizer"])
            held = sum(parts.values()) + temporary
            parts = {**parts, "heap": temporary + FRAGMENTATION * held, "process": float(self.process)}
        return Memory({part: max(0, round(size)) for part, size in parts.items()}, moment.split("/")[0])

    def _peaks(self, micro_batch_size: int) -> dict[str, Parts]:
        """Return the bytes by part at each moment's peak, for the whole depth."""
        c = self.model_config
        few, more = shallow_depths(c)
        low = self._run(replace(c, num_hidden_layers=few), micro_batch_size)
        if few == more:
            return low
        high = self._run(replace(c, num_hidden_layers=more), micro_batch_size)
        times = (c.num_hidden_layers - few) / (more - few)
        return {
            moment: {part: low[moment][part] + times * (high[moment][part] - low[moment][part]) for part in PARTS}
            for moment in low
        }

    def _run(self, model_config: ModelConfig, micro_batch_size: int) -> dict[str, Parts]:
        return run_without_storage(
            self.config,
            model_config,
            micro_batch_size,
            self.device,
            self.precision,
            objective=self.objective,
            partition=self.compiled and not self.on_heap,
            activation_checkpointing=self.activation_checkpointing,
        )


# A run without storage -----------------------------------------------------------------------------------------------


def run_without_storage(
    config: RunConfig,
    model_config: ModelConfig,
    micro_batch_size: int,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    objective: Objective[Any] | None = None,
    partition: bool = False,
    activation_checkpointing: bool = False,
) -> dict[str, Parts]:
    """Return the bytes held, by part, at the peak of each moment of training from the second update on.

    partition: keep for the backward pass what the compiler would keep.
    The backward pass has stages (`update/...`): the peak of each is linear in the depth, their maximum is not.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cpu") if device.type == "mps" else device
    ledger = _Ledger()

    objective = objective or example_objective(config, model_config)
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), torch.device(device):
        with ledger:
            model = Transformer(model_config, dropout=config.loop.dropout, initialize=False)
            adapt(model, config.adapter, config.vision)
            model.activation_checkpointing = activation_checkpointing
            step: TrainingStep[Any] = TrainingStep.build(
                model, objective, config, precision=precision, micro_batch_size=micro_batch_size
            )
            ledger.watch(step.models)
            weights = ledger.total["weights"]
        if partition:
            compile_blocks(model, partitioned(ledger.paused))
            try:
                step.accumulate(objective.example_batch(micro_batch_size), 1.0)  # not recorded: the compiler's tensors
            except Exception:  # a compiler can fail in many ways; the run will go on without it, too
                undo_compile(model)
            step.clear_gradients()
        with ledger:
            for _ in range(min(2, config.loop.batch_size // micro_batch_size)):  # the second adds to gradients
                ledger.begin("update", "activations")
                step.accumulate(objective.example_batch(micro_batch_size), 1.0)
            ledger.begin("optimizer", "optimizer")
            step.apply(1.0)
            ledger.begin("evaluation", "activations")
            state = ledger.total["optimizer"]
            model.eval()
            with torch.no_grad():
                step.loss(objective.example_batch(evaluation_rows(micro_batch_size, config.loop.context)))
    if partition:
        torch.compiler.reset()  # the compiled code is of no further use
    peaks = ledger.peaks
    for moment, parts in peaks.items():
        if moment.startswith("update"):
            parts["optimizer"] += state
    # A checkpoint's weights are collected in memory, as copies where the layout differs (GPT-1, GPT-2).
    copies = 0 if device.type == "cuda" else 2 if model_config.model_type in ("gpt2", "openai-gpt") else 1
    if is_on(config.adapter):  # alone is saved
        copies = 0
    del peaks["start"]
    peaks["save"] = dict.fromkeys(PARTS, 0.0) | {"weights": (1 + copies) * weights, "optimizer": state}
    for moment, others in objective.other_moments(model_config).items():
        peaks[moment] = {part: size + others.get(part, 0.0) for part, size in peaks["evaluation"].items()}
    for parts in peaks.values():
        parts["weights"] += objective.held_bytes
    return peaks


def _on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call `call` when the backward pass reaches `tensor`."""
    register: Any = tensor.register_hook
    register(call)


class _Ledger(StorageMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages by part, and keeps them for the peak of each moment."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True, since it changes nothing: torch then lets compiled code run under it."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.moment, self.part = "start", "weights"
        self.part_of: dict[int, str] = {}
        self.total: Parts = dict.fromkeys(PARTS, 0.0)
        self.peaks: dict[str, Parts] = {}

    def begin(self, moment: str, part: str) -> None:
        """Attribute what follows to `moment`, and new storages to `part`."""
        self.moment, self.part = moment, part

    def watch(self, models: Models) -> None:
        """Tell activations, logits and gradients apart as the policy runs, and the stages of the backward pass."""
        model = models.policy

        def enter_head(module: nn.Module, inputs: Any, hidden: Tensor) -> None:
            self.part = "logits"
            if hidden.requires_grad:
                _on_gradient(hidden, lambda _: self.begin("update/last", "activations"))

        def last_block(module: nn.Module, inputs: Any) -> None:
            if inputs[0].requires_grad:
                _on_gradient(inputs[0], lambda _: self.begin("update/middle", "activations"))

        def first_block(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad and len(model.layers) > 1:
                _on_gradient(output, lambda _: self.begin("update/first", "activations"))

        def is_gradient(p: Tensor) -> None:
            if p.grad is not None and (key := p.grad.untyped_storage()._cdata) in self.live:
                size = self.live[key]
                self.total[self.part_of[key]] -= size
                self.total["gradients"] += size
                self.part_of[key] = "gradients"

        model.layers[0].register_forward_hook(first_block)
        model.layers[-1].register_forward_pre_hook(last_block)
        model.norm.register_forward_hook(enter_head)
        trained = (p for _, module in models.named_modules() for p in module.parameters() if p.requires_grad)
        for p in trained:
            register: Any = p.register_post_accumulate_grad_hook
            register(is_gradient)

    def allocated(self, key: int, size: int) -> None:
        self.part_of[key] = self.part
        self.total[self.part] += size
        peak = self.peaks.get(self.moment)
        if peak is None or sum(self.total.values()) > sum(peak.values()):
            self.peaks[self.moment] = dict(self.total)

    def freed(self, key: int, size: int) -> None:
        self.total[self.part_of.pop(key)] -= size


# The machine ---------------------------------------------------------------------------------------------------------


def process_memory() -> int:
    """Return the resident bytes of this process once it has loaded all that a training run loads, without the model.

    Outside Linux: a typical value of a Linux process.
    """
    import matplotlib.figure  # noqa: F401  the report needs it

    with torch.random.fork_rng(devices=[]):  # the first product and the first step load libraries and buffers
        x = torch.nn.Parameter(torch.zeros(256, 256))
        torch.autograd.backward((x @ x).square().sum())
        torch.optim.AdamW([x], fused=True).step()
    return resident_memory() or 400 << 20


def resident_memory() -> int | None:
    """Return the resident bytes of this process; None where the system does not provide them."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read("/proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else None


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that a training process can use on `device`, including what this process holds; None: unknown.

    CPU: what Linux reports as available, within the limits of the control groups of this process. GPU: what is free and
    what this process holds there.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    own = resident_memory() or 0
    limits = list(_control_group_limits())
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.M)
    if found:
        limits.append(int(found[1]) * 1024)
    elif not limits and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(limits) + own if limits else None


def _control_group_limits(root: Path = Path("/sys/fs/cgroup"), groups: str | None = None) -> Iterator[int]:
    """Yield what each control group of this process leaves it: its limit minus what is used and cannot be reclaimed."""
    for line in (groups if groups is not None else _read("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit_file, usage_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / name.lstrip("/")
        for folder in (group, *group.parents):
            limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if limit.isdigit() and usage.isdigit() and int(limit) < 1 << 60:
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.M)
                yield max(0, int(limit) - int(usage) + (int(cache[1]) if cache else 0))
            if folder == base:
                break


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# Fitting -------------------------------------------------------------------------------------------------------------


def certainly_fits(config: RunConfig, model_config: ModelConfig, micro_batch_size: int, available: int) -> bool:
    """Return whether a run takes so little of `available` bytes that a forecast is not worth a second."""
    c, tokens = model_config, micro_batch_size * config.loop.context
    width = 24 * c.hidden_size + 12 * (c.num_attention_heads * c.head_dim)
    width += 8 * c.intermediate_size * (c.num_experts_per_tok if c.num_experts else 1)
    masks = config.method.masks_documents * config.loop.context**2 * micro_batch_size * 16
    logits = 16 * max(tokens, EVAL_TOKENS_AT_ONCE) * c.vocab_size
    rough = 32 * count_parameters(c).total + 8 * tokens * c.num_hidden_layers * width + masks + logits
    return (2 << 30) + 2 * rough < available


def likely_compiled(config: RunConfig, device: torch.device) -> bool:
    """Return whether to forecast with compiled blocks, before that is decided. A run that fills a GPU is long enough to
    be compiled; where it is not, it runs out of memory and continues with smaller micro-batches."""
    if config.loop.compile == "auto" and device.type == "cuda":
        return compiler_available(device)
    return config.loop.compile == "on"


class Fit(NamedTuple):
    """How a run fits into memory."""

    micro_batch_size: int
    activation_checkpointing: bool


def fit_into_memory(
    config: RunConfig,
    model_config: ModelConfig,
    *,
    device: torch.device,
    precision: ChosenPrecision,
    objective: Objective[Any] | None = None,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool | None = None,
    processes: int = 1,
    model_parts: int = 1,
) -> Fit:
    """Return the micro-batch size to train with: the one asked for, or the largest that fits into the available memory.

    With `--activation-checkpointing auto`, blocks are recomputed only where not even one row fits otherwise.
    micro_batch_size, activation_checkpointing: of a resumed run, instead of the configuration's.
    processes: how many such processes this machine runs; without a GPU they share its memory. model_parts: among how
    many the model is divided.
    Reports a change with `note`; UsageError with the numbers where not even 1 fits.
    """
    loop = config.loop
    asked = micro_batch_size or loop.micro_batch_size or loop.batch_size
    recompute = loop.activation_checkpointing == "on" if activation_checkpointing is None else activation_checkpointing
    available = available_memory(device)
    if available is not None and device.type != "cuda":
        available //= processes
    if available is None or certainly_fits(config, model_config, asked, available):
        return Fit(asked, recompute)

    def forecaster(recompute: bool) -> Forecaster:
        return Forecaster(
            config,
            model_config,
            device=device,
            precision=precision,
            objective=objective,
            compiled=likely_compiled(config, device) and model_parts == 1,
            activation_checkpointing=recompute,
            model_parts=model_parts,
        )

    forecast = forecaster(recompute)
    needed = forecast.at(asked).total
    if needed <= USABLE * available:
        return Fit(asked, recompute)
    auto = loop.activation_checkpointing == "auto" and activation_checkpointing is None
    if auto and forecast.largest_fitting(available) is None:
        recompute, forecast = True, forecaster(True)
    largest = largest_micro_batch(forecast, available)
    what = f"{gigabytes(needed)} of memory, {gigabytes(available)} are available"
    if recompute and auto:
        note(f"this run would need {what}: recomputing activations in the backward pass")
    if largest != asked:
        note(
            f"micro-batches of {asked} would need {what}: training with micro-batches of {largest}, "
            f"{loop.batch_size // largest} per update"
        )
    return Fit(largest, recompute)


def largest_micro_batch(forecaster: Forecaster, available: int) -> int:
    """Return the largest divisor of the batch size that fits into `available` bytes. UsageError with the numbers if 1
    does not."""
    largest = forecaster.largest_fitting(available)
    if largest is None:
        config, c = forecaster.config, forecaster.model_config
        advice = "" if forecaster.activation_checkpointing else ", or set --activation-checkpointing on"
        raise UsageError(
            f"this run does not fit into memory: with one sequence of {config.loop.context:,} tokens at a time, "
            f"{count_parameters(c).total / 1e6:,.1f}M parameters trained by {config.optim.name} need "
            f"{gigabytes(forecaster.at(1).total)}, and {gigabytes(available)} are available. "
            f"Choose a smaller model or a shorter --context{advice}; `gptsmith plan` shows how much each part takes."
        )
    return largest


def gigabytes(size: float) -> str:
    """`1.23 GB`, `45 MB`: 10**9 and 10**6 bytes."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB")):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e6:,.0f} MB"
