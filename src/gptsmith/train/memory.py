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
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptsmith.data.shards import Dataset, TokenSplit
from gptsmith.errors import UsageError
from gptsmith.evaluate.loss import to_device, token_loss_sum
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import build_optimizers
from gptsmith.train.config import TrainConfig
from gptsmith.train.pretrain import EVAL_TOKENS_AT_ONCE, Pretrain

RunPrecision = Literal["fp32", "bf16", "fp16"]
Parts = dict[str, float]

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
USABLE = 0.92  # of what is available: a forecast errs, and other programs want some too
SHALLOW = 2  # layers of the smaller model that is run


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment when a run holds most."""

    parts: Mapping[str, int]
    """weights, gradients, optimizer (its state and what a step needs), activations, logits (with their gradients); on a
    CPU also fragmentation (of the heap: freed, but not given back) and the process itself."""
    moment: str
    """When that is: update (forward and backward pass), optimizer (its step), evaluation or save (of a checkpoint)."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Forecaster:
    """Forecasts the memory of runs that differ in nothing but their micro-batch.

    device: where the run would compute; it need not be there.
    compiled: whether blocks are compiled; what they keep for the backward pass is then less.
    process: bytes of the process itself (default: measured now, of this one; 0 on a GPU).
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        *,
        device: torch.device,
        precision: RunPrecision,
        compiled: bool = False,
        process: int | None = None,
    ) -> None:
        self.config, self.model_config, self.device, self.precision = config, model_config, device, precision
        self.process = 0 if device.type == "cuda" else process_memory() if process is None else process
        self.kept = compiled_share(model_config, config.dropout) if compiled else 1.0
        self._known: dict[int, Memory] = {}

    def at(self, micro_batch: int) -> Memory:
        """The forecast for micro-batches of so many sequences."""
        if micro_batch not in self._known:
            self._known[micro_batch] = self._forecast(micro_batch)
        return self._known[micro_batch]

    def largest_micro_batch(self, available: int) -> int | None:
        """The largest divisor of the batch whose forecast fits into `available` bytes; None if not even 1 does."""
        batch = self.config.batch_size
        divisors = [size for size in range(1, batch + 1) if batch % size == 0]
        fitting = bisect.bisect_left(divisors, True, key=lambda size: self.at(size).total > USABLE * available)
        return divisors[fitting - 1] if fitting else None

    def _forecast(self, micro_batch: int) -> Memory:
        c = self.model_config
        period = max(1, len(c.window_pattern))
        few = SHALLOW * period
        if c.num_hidden_layers <= few + period:
            peaks = self._run(c, micro_batch)
        else:
            low = self._run(replace(c, num_hidden_layers=few), micro_batch)
            high = self._run(replace(c, num_hidden_layers=few + period), micro_batch)
            times = (c.num_hidden_layers - few) / period
            peaks = {
                moment: {part: low[moment][part] + times * (high[moment][part] - low[moment][part]) for part in parts}
                for moment, parts in low.items()
            }
        moment, parts = max(peaks.items(), key=lambda item: sum(item[1].values()))
        if self.device.type != "cuda":
            parts = {**parts, "process": self.process}
        return Memory({part: max(0, round(size)) for part, size in parts.items()}, moment.split("/")[0])

    def _run(self, model_config: ModelConfig, micro_batch: int) -> dict[str, Parts]:
        trace = trace_run(self.config, model_config, micro_batch, self.device, self.precision)
        if self.device.type == "cuda":
            return trace.peaks(self.kept)
        return trace.peaks_on_heap(self.kept)


# A run without storage -----------------------------------------------------------------------------------------------


def trace_run(
    config: TrainConfig, model_config: ModelConfig, micro_batch: int, device: torch.device, precision: RunPrecision
) -> Trace:
    """What one update and one evaluation batch ask of the allocator, found by running them without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = torch.device("cpu") if device.type == "mps" else device
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ledger = _Ledger()
    with _without_rng(), FakeTensorMode(), ledger, torch.device(device):
        model = Transformer(model_config, dropout=config.dropout, initialize=False).train()
        objective = Pretrain(
            _nothing(config.context),
            batch_size=micro_batch,
            seq_len=config.context,
            seed=0,
            device=device,
            mask_documents=config.mask_documents,
        )
        optim = config.optim
        optimizers = build_optimizers(
            model,
            name=optim.name,
            lr=optim.lr,
            embedding_lr=optim.embedding_lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            betas=(optim.beta1, optim.beta2),
            newton_schulz_steps=optim.newton_schulz_steps,
        )
        autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
        ledger.watch(model)
        for _ in range(min(2, config.batch_size // micro_batch)):  # the second finds the gradients of the first
            ledger.begin("update", "activations")
            with autocast:
                result = objective.loss(model, objective.blank(micro_batch))
                loss = result.sum / result.weight
            torch.autograd.backward(loss)
            del loss, result
        ledger.begin("optimizer", "optimizer")
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip or 1.0, norm)
        optimizers.step()
        for p in parameters:
            p.grad = None
        del norm
        ledger.begin("evaluation", "activations")
        with autocast, torch.no_grad():
            token_loss_sum(model.eval(), *to_device(objective.blank(objective.evaluation_rows), device))
        events = list(ledger.events)
    copies = 0 if device.type == "cuda" else 2 if model_config.model_type in ("gpt2", "openai-gpt") else 1
    return Trace(events, copies)


class Event(NamedTuple):
    """A storage comes (size > 0) or goes (size 0)."""

    storage: int
    size: int
    part: str
    moment: str


class Trace:
    """Comings and goings of storages: making the model, then update, optimizer and evaluation once.

    copies: how many copies of the weights are made to save them (one; two where GPT-1's and GPT-2's layouts are others).
    """

    def __init__(self, events: list[Event], copies: int) -> None:
        self.events, self.copies = events, copies

    def peaks(self, kept: float) -> dict[str, Parts]:
        """Bytes held, by part, at the peak of each moment from the second update on.

        kept: what share of a block's activations is kept for the backward pass.
        """
        state = self._optimizer_state()
        found: dict[str, Parts] = {}
        highest: dict[str, float] = {}
        total = dict.fromkeys(PARTS, 0.0)
        live: dict[int, tuple[str, float]] = {}
        for storage, size, part, moment in self.events:
            if size:
                share = kept * size if part == "blocks" else float(size)
                part = "activations" if part == "blocks" else part
                live[storage] = (part, share)
                total[part] += share
            else:
                part, share = live.pop(storage)
                total[part] -= share
            held = sum(total.values())
            if held > highest.get(moment, 0.0):
                highest[moment], found[moment] = held, dict(total)
        for moment, parts in found.items():
            if moment.startswith("update"):
                parts["optimizer"] += state
        weights = sum(event.size for event in self.events if event.moment == "start" and event.size)
        found["save"] = dict.fromkeys(PARTS, 0.0) | {"weights": weights * (1.0 + self.copies), "optimizer": state}
        del found["start"]
        return found

    def peaks_on_heap(self, kept: float) -> dict[str, Parts]:
        """The same, with the heap's fragmentation: three updates, an evaluation and a save on a simulated heap."""
        heap, at = Heap(), dict[tuple[int, int], tuple[int, int]]()

        def replay(moments: Sequence[str], turn: int) -> None:
            for storage, size, part, moment in self.events:
                if moment.split("/")[0] not in moments:
                    continue
                if size and (turn == 0 or storage not in lasting):
                    at[turn, storage] = heap.take(round(kept * size) if part == "blocks" else size)
                elif not size and (turn, storage) in at:
                    heap.give(*at.pop((turn, storage)))

        born = {event.storage for event in self.events if event.size}
        lasting = born - {event.storage for event in self.events if not event.size}
        replay(["start"], 0)
        for turn in range(3):
            replay(["update", "optimizer"], turn)
        replay(["evaluation"], 3)
        found = self.peaks(kept)
        weights = [e.size for e in self.events if e.moment == "start" and e.size]
        for block in [heap.take(size) for _ in range(self.copies - 1) for size in weights] + [heap.take(sum(weights))]:
            heap.give(*block)
        for parts in found.values():
            parts["fragmentation"] = max(0.0, heap.highest - sum(parts.values()))
        return found

    def _optimizer_state(self) -> float:
        gone = {event.storage for event in self.events if not event.size}
        return float(sum(e.size for e in self.events if e.moment == "optimizer" and e.size and e.storage not in gone))


class Heap:
    """The C library's heap, as far as large blocks go: best fit, neighbours joined, nothing returned to the system."""

    PADDING = 128  # a block is aligned to 64 bytes within a larger one

    def __init__(self) -> None:
        self.top = self.highest = 0
        self.by_size: list[tuple[int, int]] = []  # free blocks (size, start)
        self.by_start: dict[int, int] = {}
        self.by_end: dict[int, int] = {}

    def take(self, size: int) -> tuple[int, int]:
        """(start, size) of a block of at least `size` bytes."""
        size = (size + self.PADDING + 15) & ~15
        index = bisect.bisect_left(self.by_size, (size, 0))
        if index < len(self.by_size):
            whole, start = self.by_size[index]
            self._remove(start, whole)
            if whole > size:
                self._add(start + size, whole - size)
            return start, size
        start, self.top = self.top, self.top + size
        self.highest = max(self.highest, self.top)
        return start, size

    def give(self, start: int, size: int) -> None:
        """Take a block back, and join it with free neighbours."""
        before = self.by_end.get(start)
        if before is not None:
            self._remove(before, start - before)
            start, size = before, size + start - before
        after = self.by_start.get(start + size)
        if after is not None:
            self._remove(start + size, after)
            size += after
        if start + size == self.top:
            self.top = start
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self.by_size, (size, start))
        self.by_start[start], self.by_end[start + size] = size, start

    def _remove(self, start: int, size: int) -> None:
        del self.by_size[bisect.bisect_left(self.by_size, (size, start))]
        del self.by_start[start], self.by_end[start + size]


class _Ledger(TorchDispatchMode):
    """Notes every storage that comes and goes, by part and moment."""

    def __init__(self) -> None:
        super().__init__()
        self.moment, self.part = "start", "weights"
        self.live: set[int] = set()
        self.number: dict[int, int] = {}  # addresses are used again, numbers are not
        self.events: list[Event] = []
        self.run_lengths: Iterator[int] = iter(())

    def begin(self, moment: str, part: str) -> None:
        """What happens from here on belongs to `moment`, what is new to `part`."""
        self.moment, self.part = moment, part

    def watch(self, model: Transformer) -> None:
        """Tell activations, logits and gradients apart as the model runs, and the stages of the backward pass: the
        peaks of each are a straight line in the depth, the highest of them is not."""

        def enter_blocks(module: nn.Module, inputs: Any) -> None:
            self.part = "blocks"

        def last_block(module: nn.Module, inputs: Any) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: setattr(self, "moment", "update/middle"))

        def first_block(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad and len(model.layers) > 1:
                output.register_hook(lambda _: setattr(self, "moment", "update/end"))

        def leave_blocks(module: nn.Module, inputs: Any) -> None:
            self.part = "activations"

        def enter_head(module: nn.Module, inputs: Any, hidden: Tensor) -> None:
            self.part = "logits"
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.begin("update/blocks", "activations"))

        def is_gradient(p: Tensor) -> None:
            if p.grad is not None and (key := p.grad.untyped_storage()._cdata) in self.number:
                number = self.number[key]
                born = next(i for i in range(len(self.events) - 1, -1, -1) if self.events[i].storage == number)
                size = self.events[born].size
                if size and self.events[born].part != "gradients":  # from here on it counts as one
                    self.events += [Event(number, 0, "", self.moment), Event(number, size, "gradients", self.moment)]

        model.layers[0].register_forward_pre_hook(enter_blocks)
        model.layers[0].register_forward_hook(first_block)
        model.layers[-1].register_forward_pre_hook(last_block)
        model.norm.register_forward_pre_hook(leave_blocks)
        model.norm.register_forward_hook(enter_head)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(is_gradient)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Experts' shares of the tokens are known only from the numbers, which are not there: let all have the same.
        if function is torch.ops.aten.bincount.default:
            tokens, experts = args[0].numel(), int((kwargs or {}).get("minlength", args[2] if len(args) > 2 else 0))
            self.run_lengths = iter([tokens // experts + (i < tokens % experts) for i in range(experts)])
            return torch.zeros(experts, dtype=torch.int64, device=args[0].device)
        if function is torch.ops.aten._local_scalar_dense.default:
            return next(self.run_lengths, 1)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.number or not size:
            return
        self.number[key] = number = len(self.events)
        self.events.append(Event(number, size, self.part, self.moment))
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.events.append(Event(self.number.pop(key), 0, "", self.moment))


def _nothing(context: int) -> Dataset:
    """A dataset just long enough to be one."""
    empty = TokenSplit.from_array(np.zeros(0, np.uint16), ())
    return Dataset(Path(), "", 1, "", TokenSplit.from_array(np.zeros(context + 1, np.uint16)), empty)


# Compiled blocks -----------------------------------------------------------------------------------------------------


def compiled_share(model_config: ModelConfig, dropout: float) -> float:
    """Bytes that a compiled block keeps for the backward pass, as a share of what it keeps when run as written.

    The compiler computes cheap things again rather than keeping them (a minimum cut of the graph: 1912.02967's idea, as
    in torch's AOTAutograd). Its choice is made here for one narrow block of the same proportions, no code is generated.
    1 where that fails.
    """
    from functorch.compile import aot_module, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    c = _narrow(model_config)
    kept = [0.0, 0.0]

    def see_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """All outputs but the first, which is the block's own."""
        given = {id(node) for node in graph.graph.nodes if node.op == "placeholder"}
        (output,) = graph.graph.find_nodes(op="output")
        saved = {node for node in output.args[0][1:] if isinstance(node, torch.fx.Node) and id(node) not in given}
        kept[1] = float(sum(v.untyped_storage().nbytes() for n in saved if isinstance(v := n.meta.get("val"), Tensor)))
        return make_boxed_func(graph)

    with _without_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = Transformer(c, dropout=dropout).train()
        x = torch.randn(2, c.max_position_embeddings, c.hidden_size, requires_grad=True)
        rope = (block.rope_cos, block.rope_sin) if c.position == "rope" else None
        own = {p.untyped_storage().data_ptr() for p in block.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block.layers[0](x, None, rope, None, None, None)
        kept[0] = float(sum(size for at, size in storages.items() if at != x.untyped_storage().data_ptr()))
        del y
        try:
            compiled = aot_module(
                block.layers[0],
                fw_compiler=see_forward,
                bw_compiler=lambda graph, inputs: make_boxed_func(graph),
                partition_fn=min_cut_rematerialization_partition,
                decompositions=select_decomp_table(),
            )
            compiled(x, None, rope, None, None, None)
        except Exception:  # whatever a compiler can do wrong: then count as without it
            return 1.0
    return min(1.0, kept[1] / kept[0]) if kept[1] else 1.0


def _narrow(c: ModelConfig) -> ModelConfig:
    """One layer of the same proportions, at most about 256 wide, over 64 tokens."""
    factor = max(1, c.num_attention_heads * c.head_dim // 256)
    heads = max(1, c.num_attention_heads // factor)
    kv_heads = next(k for k in range(max(1, min(heads, c.num_key_value_heads // factor)), 0, -1) if heads % k == 0)
    return replace(
        c,
        vocab_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=max(8, c.hidden_size // factor),
        intermediate_size=max(8, c.intermediate_size // factor),
        num_experts=min(c.num_experts, 4 * c.num_experts_per_tok) if c.num_experts else 0,
        max_position_embeddings=64,
        window_pattern=(),
        rope_scaling=None,
    )


# The machine ---------------------------------------------------------------------------------------------------------


def process_memory() -> int:
    """Resident bytes of this process once it has loaded all that a training run loads, its model apart.

    Where that cannot be read (outside Linux): what a Linux process takes.
    """
    import matplotlib.figure  # noqa: F401  the report needs it

    with _without_rng():  # the first matrix product and the first optimizer step load libraries and their buffers
        x = torch.nn.Parameter(torch.zeros(256, 256))
        torch.autograd.backward((x @ x).square().sum())
        torch.optim.AdamW([x], fused=True).step()
    return resident_memory() or 400 << 20


def resident_memory() -> int | None:
    """Resident bytes of this process; None where the system does not tell."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read("/proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else None


def available_memory(device: torch.device) -> int | None:
    """Bytes that a training process may take on `device` in all, what this process has already included; None: unknown.

    CPU: what Linux says is available, and no more than the limits of the control groups this process is in. GPU: what is
    free, and what this process holds there.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    own = resident_memory() or 0
    limits = [limit for limit in _control_group_limits()]
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


def certainly_fits(config: TrainConfig, model_config: ModelConfig, micro_batch: int, available: int) -> bool:
    """Whether a run takes so little of `available` bytes that a forecast is not worth its second."""
    c, tokens = model_config, micro_batch * config.context
    width = 24 * c.hidden_size + 12 * (c.num_attention_heads * c.head_dim)
    width += 8 * c.intermediate_size * (c.num_experts_per_tok if c.num_experts else 1)
    masks = config.mask_documents * config.context**2 * micro_batch * 16
    logits = 16 * max(tokens, EVAL_TOKENS_AT_ONCE) * c.vocab_size
    rough = 32 * count_parameters(c).total + 8 * tokens * c.num_hidden_layers * width + masks + logits
    return (2 << 30) + 2 * rough < available


def fit(
    config: TrainConfig,
    model_config: ModelConfig,
    *,
    device: torch.device,
    precision: RunPrecision,
    micro_batch: int | None = None,
) -> int:
    """The micro-batch to train with: the one asked for, or the largest that fits into the memory there is.

    micro_batch: the one asked for, if not the configuration's. UsageError with the numbers where not even 1 fits.
    """
    asked = micro_batch or config.micro_batch_size or config.batch_size
    available = available_memory(device)
    if available is None or certainly_fits(config, model_config, asked, available):
        return asked
    compiled = config.compile == "on"
    forecaster = Forecaster(config, model_config, device=device, precision=precision, compiled=compiled)
    wanted = forecaster.at(asked).total
    if wanted <= USABLE * available:
        return asked
    largest = forecaster.largest_micro_batch(available)
    where = "memory" if device.type == "cpu" else f"memory of {device}"
    if largest is None:
        raise UsageError(
            f"this run does not fit into the {where}: with one sequence of {config.context:,} tokens at a time it needs "
            f"{gigabytes(forecaster.at(1).total)}, and {gigabytes(available)} are available. "
            "Choose a smaller model or a shorter --context; `gptsmith plan` shows what takes how much."
        )
    note(
        f"micro-batch {asked} would need {gigabytes(wanted)} of {where}, {gigabytes(available)} are available: "
        f"training with micro-batches of {largest}, {config.batch_size // largest} to an update"
    )
    return largest


def gigabytes(size: float) -> str:
    """`1.23 GB`, `45 MB`: 10**9 and 10**6 bytes."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


@contextlib.contextmanager
def _without_rng() -> Iterator[None]:
    """What is done inside leaves the random numbers of the run as they were."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
