"""How much memory a run takes, before it takes any: the run's own code, executed on tensors that have no storage.

A model, its optimizers and one update (forward, backward, clipping, optimizer step), then one batch of the evaluation,
run under torch's FakeTensorMode: every operation gives tensors of the right shape and device, and a ledger notes when
each storage comes and goes. So what is counted is what the code does, not a formula beside it. All layers of one kind
are alike: two shallow models are run and the rest follows on a straight line, so that any size takes a second.

On a CPU the forecast is of peak resident memory, on a GPU of allocated memory.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision, compiler_available
from gptsmith.train.compile import compile_blocks, partitioned, undo_compile
from gptsmith.train.config import TrainConfig
from gptsmith.train.objectives.pretrain import EVAL_TOKENS_AT_ONCE, evaluation_rows
from gptsmith.train.step import Update

Parts = dict[str, float]

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
SHALLOW = 2  # layers of the smaller model that is run
USABLE = 0.92  # of what is available: a forecast errs, and other programs want some too

# Measured on Linux (glibc) by benchmarks/forecast.py.
RUNTIME = 60 << 20  # buffers of matrix products and threads, and what drawing the report takes
COMPILER = 40 << 20  # what the compiler loads and keeps
GPU_BUFFERS = 64 << 20  # of matrix products on a GPU: cuBLAS and cuBLASLt take 32 MB each on Hopper
HOLES = 0.17  # of all tensors: space between blocks of the heap that fits nothing


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when a run holds most."""

    parts: Mapping[str, int]
    """weights, gradients, optimizer (its state and what a step needs), activations, logits (with their gradients) and
    process (on a CPU Python, torch and their buffers; on a GPU the buffers of matrix products); on a CPU also heap
    (freed, but not given back to the system)."""
    moment: str
    """When that is: update (forward and backward pass), optimizer (its step), evaluation or save (of a checkpoint)."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Forecaster:
    """Forecasts the memory of runs that differ in nothing but their micro-batch.

    device: where the run would compute; it need not be there.
    compiled: whether blocks are compiled. On a CPU they keep about as much for the backward pass, and the compiler
        takes room; on a GPU they keep less.
    process: bytes of the process itself (default: measured now, of this one; on a GPU the buffers of its products).
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        *,
        device: torch.device,
        precision: ChosenPrecision,
        compiled: bool = False,
        process: int | None = None,
    ) -> None:
        self.config, self.model_config, self.device, self.precision = config, model_config, device, precision
        self.compiled = compiled
        self.on_heap = device.type != "cuda"
        self.process = GPU_BUFFERS
        if self.on_heap:
            self.process = RUNTIME + compiled * COMPILER + (process_memory() if process is None else process)
        self._known: dict[int, Memory] = {}

    def at(self, micro_batch_size: int) -> Memory:
        """The forecast for micro-batches of so many sequences."""
        if micro_batch_size not in self._known:
            self._known[micro_batch_size] = self._forecast(micro_batch_size)
        return self._known[micro_batch_size]

    def largest_fitting(self, available: int) -> int | None:
        """The largest divisor of the batch whose forecast fits into `available` bytes; None if not even 1 does."""
        if self.at(1).total > USABLE * available:
            return None
        divisors = [size for size in range(1, self.config.batch_size + 1) if self.config.batch_size % size == 0]
        fitting = bisect.bisect_left(divisors, True, key=lambda size: self.at(size).total > USABLE * available)
        return divisors[fitting - 1]

    def _forecast(self, micro_batch_size: int) -> Memory:
        peaks = self._peaks(micro_batch_size)
        if not self.on_heap:
            moment, parts = max(peaks.items(), key=lambda item: sum(item[1].values()))
            parts = {**parts, "process": float(self.process)}
        else:
            # What is freed stays with the process, to be used again. But the large blocks that an optimizer's step asks
            # for do not fit into the holes that activations leave between gradients: they come on top.
            step = peaks.pop("optimizer")
            moment, parts = max(peaks.items(), key=lambda item: sum(item[1].values()))
            temporary = max(0.0, step["optimizer"] - peaks["save"]["optimizer"])
            held = sum(parts.values()) + temporary
            parts = {**parts, "heap": temporary + HOLES * held, "process": float(self.process)}
        return Memory({part: max(0, round(size)) for part, size in parts.items()}, moment.split("/")[0])

    def _peaks(self, micro_batch_size: int) -> dict[str, Parts]:
        """Bytes by part at each moment's peak, for the whole depth."""
        c = self.model_config
        period = max(1, len(c.window_pattern))
        few = -(-SHALLOW // period) * period
        if c.num_hidden_layers <= few + period:
            return self._run(c, micro_batch_size)
        low = self._run(replace(c, num_hidden_layers=few), micro_batch_size)
        high = self._run(replace(c, num_hidden_layers=few + period), micro_batch_size)
        times = (c.num_hidden_layers - few) / period
        return {
            moment: {part: low[moment][part] + times * (high[moment][part] - low[moment][part]) for part in PARTS}
            for moment in low
        }

    def _run(self, model_config: ModelConfig, micro_batch_size: int) -> dict[str, Parts]:
        partition = self.compiled and not self.on_heap
        return run_without_storage(
            self.config, model_config, micro_batch_size, self.device, self.precision, partition=partition
        )


# A run without storage -----------------------------------------------------------------------------------------------


def run_without_storage(
    config: TrainConfig,
    model_config: ModelConfig,
    micro_batch_size: int,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    partition: bool = False,
) -> dict[str, Parts]:
    """Bytes held, by part, at the peak of each moment of training from the second update on.

    partition: keep for the backward pass what the compiler would.
    The backward pass comes in stages (`update/...`): the peak of each is a straight line in the depth, the highest of
    them is not.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cpu") if device.type == "mps" else device
    ledger = _Ledger()

    def tokens(rows: int) -> tuple[Tensor, Tensor | None]:
        ids = torch.zeros(rows, config.context, dtype=torch.int64)
        return ids, torch.zeros_like(ids, dtype=torch.int32) if config.mask_documents else None

    with torch.random.fork_rng(devices=[]), FakeTensorMode(), torch.device(device):
        with ledger:
            update = Update(Transformer(model_config, dropout=config.dropout, initialize=False), config, precision)
            model = update.model
            ledger.watch(model)
            weights = ledger.total["weights"]
        if partition:
            compile_blocks(model, partitioned(ledger.looking_away))
            try:
                update.accumulate(*tokens(micro_batch_size))  # not noted: the compiler's own tensors come and go
            except Exception:  # whatever a compiler cannot take: the run will do without, too
                undo_compile(model)
            model.zero_grad(set_to_none=True)
        with ledger:
            for _ in range(min(2, config.batch_size // micro_batch_size)):  # the second finds gradients of the first
                ledger.begin("update", "activations")
                update.accumulate(*tokens(micro_batch_size))
            ledger.begin("optimizer", "optimizer")
            update.apply()
            ledger.begin("evaluation", "activations")
            state = ledger.total["optimizer"]
            ids, documents = tokens(evaluation_rows(micro_batch_size, config.context))
            with update.autocast(), torch.no_grad():
                token_loss_sum(model.eval(), ids, ids, documents)
    if partition:
        torch.compiler.reset()  # what was compiled is of no use
    peaks = ledger.peaks
    for moment, parts in peaks.items():
        if moment.startswith("update"):
            parts["optimizer"] += state
    # A checkpoint's weights are put together in memory, from copies where their layout is another (GPT-1's, GPT-2's).
    copies = 0 if device.type == "cuda" else 2 if model_config.model_type in ("gpt2", "openai-gpt") else 1
    del peaks["start"]
    peaks["save"] = dict.fromkeys(PARTS, 0.0) | {"weights": (1 + copies) * weights, "optimizer": state}
    return peaks


def _on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    """Have `call` called when the backward pass has reached `tensor`."""
    register: Any = tensor.register_hook
    register(call)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages by part, and remembers them at the peak of each moment."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes nothing: compiled code runs under it, which torch otherwise would not let it do."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment, self.part = "start", "weights"
        self.live: dict[int, tuple[str, int]] = {}
        self.total: Parts = dict.fromkeys(PARTS, 0.0)
        self.peaks: dict[str, Parts] = {}
        self.shares: Iterator[int] = iter(())
        self.looks = True

    def begin(self, moment: str, part: str) -> None:
        """What happens from here on belongs to `moment`, what is new to `part`."""
        self.moment, self.part = moment, part

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """What comes meanwhile is not counted."""
        self.looks = False
        try:
            yield
        finally:
            self.looks = True

    def watch(self, model: Transformer) -> None:
        """Tell activations, logits and gradients apart as the model runs, and the stages of the backward pass."""

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
                part, size = self.live[key]
                self.live[key] = ("gradients", size)
                self.total[part] -= size
                self.total["gradients"] += size

        model.layers[0].register_forward_hook(first_block)
        model.layers[-1].register_forward_pre_hook(last_block)
        model.norm.register_forward_hook(enter_head)
        for p in model.parameters():
            register: Any = p.register_post_accumulate_grad_hook
            register(is_gradient)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Experts' shares of the tokens are known only from the numbers, which are not there: let all have the same.
        if function is torch.ops.aten.bincount.default:
            tokens, experts = args[0].numel(), int((kwargs or {}).get("minlength") or args[2])
            self.shares = iter([tokens // experts + (i < tokens % experts) for i in range(experts)])
            return torch.zeros(experts, dtype=torch.int64, device=args[0].device)
        if function is torch.ops.aten._local_scalar_dense.default:
            return next(self.shares, 1)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if self.looks else ():
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        self.live[key] = (self.part, size)
        self.total[self.part] += size
        peak = self.peaks.get(self.moment)
        if peak is None or sum(self.total.values()) > sum(peak.values()):
            self.peaks[self.moment] = dict(self.total)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        part, size = self.live.pop(key)
        self.total[part] -= size


# The machine ---------------------------------------------------------------------------------------------------------


def process_memory() -> int:
    """Resident bytes of this process once it has loaded all that a training run loads, its model apart.

    Where that cannot be read (outside Linux): what a Linux process takes.
    """
    import matplotlib.figure  # noqa: F401  the report needs it

    with torch.random.fork_rng(devices=[]):  # the first product and the first step load libraries and buffers
        x = torch.nn.Parameter(torch.zeros(256, 256))
        torch.autograd.backward((x @ x).square().sum())
        torch.optim.AdamW([x], fused=True).step()
    return resident_memory() or 400 << 20


def resident_memory() -> int | None:
    """Resident bytes of this process; None where the system does not tell."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read("/proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else None


def available_memory(device: torch.device) -> int | None:
    """Bytes that a training process may take on `device`, what this process has already included; None: unknown.

    CPU: what Linux says is available, and no more than the limits of the control groups this process is in. GPU: what
    is free, and what this process holds there.
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
    """What each control group above this process leaves it: its limit without what is used and cannot be given back."""
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


def certainly_fits(config: TrainConfig, model_config: ModelConfig, micro_batch_size: int, available: int) -> bool:
    """Whether a run takes so little of `available` bytes that a forecast is not worth its second."""
    c, tokens = model_config, micro_batch_size * config.context
    width = 24 * c.hidden_size + 12 * (c.num_attention_heads * c.head_dim)
    width += 8 * c.intermediate_size * (c.num_experts_per_tok if c.num_experts else 1)
    masks = config.mask_documents * config.context**2 * micro_batch_size * 16
    logits = 16 * max(tokens, EVAL_TOKENS_AT_ONCE) * c.vocab_size
    rough = 32 * count_parameters(c).total + 8 * tokens * c.num_hidden_layers * width + masks + logits
    return (2 << 30) + 2 * rough < available


def likely_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether to reckon with compiled blocks, before it is known. A run that fills a GPU will be long enough for them;
    where it is not, it runs out of memory and goes on with smaller micro-batches."""
    if config.compile == "auto" and device.type == "cuda":
        return compiler_available(device)
    return config.compile == "on"


def fit(
    config: TrainConfig,
    model_config: ModelConfig,
    *,
    device: torch.device,
    precision: ChosenPrecision,
    micro_batch_size: int | None = None,
) -> int:
    """The micro-batch to train with: the one asked for, or the largest that fits into the memory there is.

    micro_batch_size: the one asked for, if not the configuration's.
    Says so where it is another one; UsageError with the numbers where not even 1 fits.
    """
    asked = micro_batch_size or config.micro_batch_size or config.batch_size
    available = available_memory(device)
    if available is None or certainly_fits(config, model_config, asked, available):
        return asked
    forecaster = Forecaster(
        config, model_config, device=device, precision=precision, compiled=likely_compiled(config, device)
    )
    needed = forecaster.at(asked).total
    if needed <= USABLE * available:
        return asked
    largest = largest_micro_batch(forecaster, available)
    note(
        f"micro-batches of {asked} would need {gigabytes(needed)} of memory, {gigabytes(available)} are available: "
        f"training with {largest}, {config.batch_size // largest} to an update"
    )
    return largest


def largest_micro_batch(forecaster: Forecaster, available: int) -> int:
    """The largest divisor of the batch that fits into `available` bytes. UsageError with the numbers if 1 does not."""
    largest = forecaster.largest_fitting(available)
    if largest is None:
        config, c = forecaster.config, forecaster.model_config
        raise UsageError(
            f"this run does not fit into memory: with one sequence of {config.context:,} tokens at a time, "
            f"{count_parameters(c).total / 1e6:,.1f}M parameters trained by {config.optim.name} need "
            f"{gigabytes(forecaster.at(1).total)}, and {gigabytes(available)} are available. "
            "Choose a smaller model or a shorter --context; `gptsmith plan` shows what takes how much."
        )
    return largest


def gigabytes(size: float) -> str:
    """`1.23 GB`, `45 MB`: 10**9 and 10**6 bytes."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB")):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e6:,.0f} MB"
