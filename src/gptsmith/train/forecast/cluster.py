"""Forecast training on many accelerators from the shapes of a model and a file of constants for each. No torch.

    time of a step = micro-batches · (computation, and communication that it does not hide) · (1 + pipeline bubble)
                     + optimizer

Computation is the larger of arithmetic and memory traffic, kernel by kernel. What a kernel reads and writes is counted
from the shapes. Of an accelerator, a file in `hardware/` has the figures of its data sheet and five fractions of them
that programs reach; they belong to it and are the same for every model, layout and size. `benchmarks/cluster`
compares the forecasts with published runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Literal

from gptsmith.errors import UsageError, nearest
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters, flops_per_token

Recompute = Literal["none", "attention", "operators", "full"]
GIB = 1 << 30
TILE = (128, 256)  # rows and columns of a product that a multiprocessor computes at a time
TILE_SECONDS = 12e-6  # to begin and end a tile: to load the first numbers and to write the results
UNUSED = 0.06  # of the memory of activations: lost between the blocks of CUDA's allocator
# Bytes per logit at the peak: in bfloat16 and float32, with their gradients. DTensor's loss-parallel form makes two
# more copies.
LOGIT_BYTES = {"compiled": 10, "eager": 12, "parallel": 16}


@dataclass(frozen=True)
class Hardware:
    """An accelerator in its machine; see the files in `hardware/` for where the figures are from."""

    name: str
    title: str
    peak: float
    """Dense bfloat16 FLOP/s."""
    peak_fp8: float | None
    memory: float
    """Bytes."""
    bandwidth: float
    """Of the memory, bytes/s."""
    processors: int
    """Multiprocessors: a matrix product is divided into tiles among them."""
    per_machine: int
    """Accelerators in a machine."""
    link: float
    """To the others in the machine, bytes/s in one direction."""
    network: float
    """To other machines, bytes/s for each accelerator."""
    host_link: float
    """To the memory of the machine, bytes/s: what it takes to copy a state there, from where it is written."""
    storage: float
    """To write checkpoints, bytes/s for each machine."""
    failures: float
    """Per accelerator and day: the whole job stops."""
    price: float | None
    """Per hour, in US dollars, of a common offer."""
    # Fractions that programs reach, fitted on published runs by benchmarks/cluster/calibrate.py.
    matmul: float
    """Of the peak, by large matrix products."""
    attention: float
    """Of the peak, by attention kernels."""
    traffic: float
    """Of the memory bandwidth, by element-wise kernels and the optimizer."""
    links: float
    """Of links and network, by collectives."""
    overlap: float
    """Of a collective that runs beside computation: what the computation is slowed down by."""
    rests_on: str
    """Which runs the fractions were fitted on."""

    def exposed(self, communication: float, computation: float) -> float:
        """Return how many of the seconds of a collective are not hidden behind computation that runs beside it."""
        beside = min(communication, computation)
        return communication - beside + self.overlap * beside


def hardware_names() -> list[str]:
    """Return the names of the accelerators that there is a file for."""
    folder = resources.files("gptsmith.train.forecast") / "hardware"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


@cache
def load_hardware(name: str) -> Hardware:
    """Return the accelerator called `name`, in any case. UsageError for one that there is no file for."""
    import yaml

    known = hardware_names()
    if name.lower() not in known:
        raise UsageError(
            f"unknown accelerator {name!r}.{nearest(name.lower(), known)} Accelerators: {', '.join(known)}."
        )
    text = (resources.files("gptsmith.train.forecast") / "hardware" / f"{name.lower()}.yaml").read_text(
        encoding="utf-8"
    )
    return Hardware(name=name.lower(), **yaml.safe_load(text))


@dataclass(frozen=True)
class Spread:
    """How a model and its batch are spread over devices; the sizes multiply. Neighbors are along tp, then cp, then
    fsdp."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1
    """Context parallel: sequences are cut. Its ranks share the parameters as those of fsdp do."""
    interleave: int = 1
    """With pp: how many pieces of the model each device has."""

    @property
    def devices(self) -> int:
        return self.dp * self.fsdp * self.tp * self.ep * self.pp * self.cp

    @property
    def data(self) -> int:
        """Devices, or groups of them, that have rows of their own."""
        return self.dp * self.fsdp * self.ep

    def __str__(self) -> str:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) > 1}
        return ",".join(f"{name}={size}" for name, size in sizes.items()) or "dp=1"


@dataclass(frozen=True)
class Program:
    """How a program computes an update, as far as time and memory depend on it."""

    recompute: Recompute = "none"
    """Which activations are computed again in the backward pass: none; attention: the scores of unfused attention;
    operators: what every other matrix product gives, and all that is cheap; full: the whole block."""
    compiled: bool = True
    """Whether element-wise operations are fused."""
    fused_attention: bool = True
    fp8: bool = False
    """Whether the matrix products of the blocks are in 8 bits."""
    sequence_parallel: bool = True
    """With tp: whether what tp does not divide is divided by position."""
    gathers_again: bool = False
    """With sequence_parallel: whether the inputs of products are gathered again in the backward pass, not kept."""
    async_tp: bool = False
    """Whether the communication of tp is hidden behind the products."""
    state_bytes: float = 16.0
    """Per parameter: weight, gradient and the two moments of AdamW in float32."""
    gather_bytes: float = 2.0
    """Per parameter, in the collectives that give each device the weights of a block."""
    reduce_bytes: float = 4.0
    """Per parameter, in the collectives that add up gradients."""
    logits_at_once: int | None = None
    """How many logits are held at once; None: those of a micro-batch."""
    dropout: bool = False


@dataclass(frozen=True)
class Work:
    """What is computed: a model, on so many sequences."""

    model: ModelConfig
    context: int
    micro_batch: int
    """Sequences at a time, of each group of devices that has rows of its own."""
    micro_batches: int = 1
    """Per update."""

    def batch(self, spread: Spread) -> int:
        """Return the sequences of an update."""
        return self.micro_batch * self.micro_batches * spread.data


@dataclass(frozen=True)
class Forecast:
    """The forecast of one update on one device, in seconds and bytes."""

    work: Work
    spread: Spread
    program: Program
    hardware: Hardware
    seconds: Mapping[str, float]
    """Of an update, by part: products, attention, traffic (of element-wise operations), communication (what is exposed
    of it), bubble, optimizer."""
    memory: Mapping[str, float]
    """Bytes at the peak, by part: weights, gradients, optimizer, gathered, activations, logits."""
    traffic: Mapping[str, float]
    """Bytes that each device sends in an update, by axis."""

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens(self) -> int:
        return self.work.batch(self.spread) * self.work.context

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization: the arithmetic that the model needs, over what the devices could do."""
        flops = flops_per_token(self.work.model, self.work.context) * self.tokens
        return flops / (self.step * self.hardware.peak * self.spread.devices)


def forecast(work: Work, spread: Spread, hardware: Hardware, program: Program | None = None) -> Forecast:
    """Return the forecast of an update."""
    program = program or Program()
    blocks = math.ceil(work.model.num_hidden_layers / spread.pp)
    times = _Times(work, spread, hardware, program)
    block, head = times.block(), times.head()
    # The last of the devices along pp has the head, too, and is the slowest.
    parts = {key: blocks * block[key] + head[key] for key in block}
    busy = sum(parts.values())
    parts["communication"] += times.hand_over()
    if spread.pp == 1:
        parts["communication"] += hardware.exposed(times.gathered(blocks), busy)
    one = sum(parts.values())
    seconds = {key: value * work.micro_batches for key, value in parts.items()}
    seconds["bubble"] = (spread.pp - 1) / spread.interleave * one
    if spread.pp > 1:  # blocks stay gathered from the first micro-batch to the last
        seconds["communication"] += hardware.exposed(times.gathered(blocks), busy)
    seconds["communication"] += hardware.exposed(times.all_reduce(), busy * 2 / 3)  # beside the last backward pass
    seconds["optimizer"] = times.optimizer()
    memory = _memory(work, spread, program)
    return Forecast(work, spread, program, hardware, seconds, memory, times.sent(blocks))


# Time ----------------------------------------------------------------------------------------------------------------


class _Times:
    def __init__(self, work: Work, spread: Spread, hardware: Hardware, program: Program) -> None:
        self.work, self.spread, self.hw, self.program = work, spread, hardware, program
        self.c = work.model
        self.tokens = work.micro_batch * work.context / spread.cp
        self.local = self.tokens / (spread.tp if program.sequence_parallel else 1)  # where tp divides positions
        self.q = self.c.num_attention_heads * self.c.head_dim
        self.kv = self.c.num_key_value_heads * self.c.head_dim

    # -- computation ---------------------------------------------------------------------------------------------------

    def product(self, rows: float, inner: float, columns: float, *, fp8: bool = False) -> float:
        """Return the seconds of a matrix product: limited by arithmetic, or by reading and writing."""
        hw = self.hw
        peak = hw.peak_fp8 if fp8 and hw.peak_fp8 is not None else hw.peak
        tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
        waves = math.ceil(tiles / hw.processors)  # so many tiles are computed one after another
        one = 2 * TILE[0] * TILE[1] * inner * hw.processors / (peak * hw.matmul)
        traffic = 2 * (rows * inner + rows * columns + inner * columns) / (hw.bandwidth * hw.traffic)
        converted = 4 * (rows + columns) * inner / (hw.bandwidth * hw.traffic) if fp8 else 0.0  # scale found, then cast
        return max(waves * (one + TILE_SECONDS), traffic) + converted

    def products(self) -> Iterator[tuple[str, float, float, float]]:
        """Yield the products of a block's forward pass: name, rows, inner size, columns."""
        c, t = self.c, self.spread.tp
        yield "qkv", self.tokens, c.hidden_size, (self.q + 2 * self.kv) / t
        yield "output", self.tokens, self.q / t, c.hidden_size
        up = 2 if c.gated_mlp else 1
        if c.num_experts:
            experts = c.num_experts / self.spread.ep
            rows = self.tokens * c.num_experts_per_tok / experts
            for _ in range(math.ceil(experts)):
                yield "up", rows, c.hidden_size, up * c.intermediate_size / t
                yield "down", rows, c.intermediate_size / t, c.hidden_size
            if c.shared_expert_intermediate_size:
                yield "up", self.tokens, c.hidden_size, up * c.shared_expert_intermediate_size / t
                yield "down", self.tokens, c.shared_expert_intermediate_size / t, c.hidden_size
            return
        yield "up", self.tokens, c.hidden_size, up * c.intermediate_size / t
        yield "down", self.tokens, c.intermediate_size / t, c.hidden_size

    def block(self) -> dict[str, float]:
        """Return the seconds of a block's forward and backward pass, recomputation included, by part."""
        program = self.program
        fp8 = program.fp8
        forward = {"products": 0.0, "attention": self.attention(), "traffic": self.elementwise()}
        again = 0.0
        for name, rows, inner, columns in self.products():
            seconds = self.product(rows, inner, columns, fp8=fp8)
            forward["products"] += seconds
            if program.recompute == "full" and name != "down":  # which nothing in the backward pass needs
                again += seconds
            elif program.recompute == "operators" and name in ("output", "up"):
                again += seconds / (2 if name == "up" and self.c.gated_mlp else 1)
        # The backward pass has two products for each; attention's has five for two; what is read is written, too.
        parts = {
            "products": 3 * forward["products"] + again,
            "attention": 3.5 * forward["attention"] if program.fused_attention else 3 * forward["attention"],
            "traffic": 3 * forward["traffic"],
        }
        if program.recompute == "full":
            parts["attention"] += forward["attention"]
            parts["traffic"] += forward["traffic"]
        elif program.recompute == "operators":
            parts["traffic"] += forward["traffic"]
        elif program.recompute == "attention":
            parts["attention"] += forward["attention"]
        parts["communication"] = self.between_blocks()
        return parts

    def attention(self) -> float:
        """Return the seconds of attention in the forward pass of a block, on average over the blocks."""
        c, hw = self.c, self.hw
        width, seen = self.q / self.spread.tp, 0.0
        for layer in range(c.num_hidden_layers):
            window = min(c.window_of(layer) or self.work.context, self.work.context)
            seen += (
                window - window * window / (2 * self.work.context)
                if self.program.fused_attention
                else self.work.context
            )
        seen /= c.num_hidden_layers
        if self.program.fused_attention:
            return 4 * self.tokens * width * seen / (hw.peak * hw.attention)
        scores = self.tokens * seen * c.num_attention_heads / self.spread.tp
        read_and_written = (8 + 5 * self.program.dropout) * scores  # scores, softmax, dropout and its mask
        return 4 * self.tokens * width * seen / (hw.peak * hw.matmul) + read_and_written / (hw.bandwidth * hw.traffic)

    def elementwise(self) -> float:
        """Return the seconds of what is not a product, in the forward pass of a block."""
        c, program = self.c, self.program
        inner = (
            c.intermediate_size * (c.num_experts_per_tok if c.num_experts else 1) + c.shared_expert_intermediate_size
        )
        eager = not program.compiled
        norm = 34 if eager and c.norm == "rmsnorm" else 4  # a chain of operations in float32
        stream = 2 * norm + 2 * 6 + 2 * 5 * program.dropout
        activation = (10 if eager else 6) if c.gated_mlp else 4
        rotation = (24 if eager else 4) if c.position == "rope" else 0
        total = self.local * stream * c.hidden_size
        total += self.tokens / self.spread.tp * (activation * inner + rotation * (self.q + self.kv))
        if c.num_experts:  # tokens are brought into the order of the experts, and back
            total += self.tokens * c.num_experts_per_tok * 8 * c.hidden_size / self.spread.tp
        return total / (self.hw.bandwidth * self.hw.traffic)

    def head(self) -> dict[str, float]:
        """Return the seconds of logits and loss, forward and backward, by part."""
        c, t = self.c, self.spread.tp
        product = self.product(self.tokens, c.hidden_size, c.vocab_size / t)
        traffic = self.tokens * c.vocab_size / t * (14 if self.program.compiled else 28)
        return {
            "products": 3 * product,
            "attention": 0.0,
            "traffic": traffic / (self.hw.bandwidth * self.hw.traffic),
            "communication": 0.0,
        }

    def optimizer(self) -> float:
        """Return the seconds of clipping and AdamW, which reads gradient, weight and moments and writes the latter."""
        return 32 * sum(_parameters(self.work.model, self.spread)) / (self.hw.bandwidth * self.hw.traffic)

    # -- communication -------------------------------------------------------------------------------------------------

    def rate(self, size: int, stride: int) -> float:
        """Return the bytes/s of a collective among `size` devices, `stride` apart."""
        hw = self.hw
        inside = max(1, min(size, hw.per_machine // stride)) if stride < hw.per_machine else 1
        if inside == size:
            return hw.link * hw.links
        # A ring passes through the machines: the accelerators of one have the network together.
        return (min(hw.link, inside * hw.network) if inside > 1 else hw.network) * hw.links

    def collective(self, size_bytes: float, size: int, stride: int) -> float:
        """Return the seconds of an all-gather or a reduce-scatter of `size_bytes` in total."""
        return size_bytes * (size - 1) / size / self.rate(size, stride) if size > 1 else 0.0

    def between_blocks(self) -> float:
        """Return the seconds of a block's communication that nothing hides: that of tp, ep and cp."""
        c, s, program = self.c, self.spread, self.program
        seconds = 0.0
        if s.tp > 1:  # an all-reduce after attention and one after the feed-forward layer, in either direction
            one = self.collective(2 * self.tokens * c.hidden_size, s.tp, 1) * 2
            times = 4 + {"full": 1, "operators": 1}.get(program.recompute, 0)
            seconds += one * times * (self.hw.overlap if program.async_tp else 1)
        if s.ep > 1:
            routed = 2 * self.tokens * c.num_experts_per_tok * c.hidden_size / s.tp
            seconds += 4 * self.collective(routed, s.ep, s.tp)
        if s.cp > 1:  # keys and values go round, beside attention
            seconds += self.hw.overlap * 3 * self.collective(4 * self.tokens * s.cp * self.kv / s.tp, s.cp, s.tp)
        return seconds

    def gathered(self, blocks: int) -> float:
        """Return the seconds of FSDP's communication in a micro-batch, which computation hides."""
        s, program = self.spread, self.program
        dense, experts = _whole_parameters(self.c, s, blocks)
        size = s.fsdp * s.cp
        return self.collective((dense + experts) * (2 * program.gather_bytes + program.reduce_bytes), size, s.tp)

    def all_reduce(self) -> float:
        """Return the seconds of adding up gradients along dp, and along ep those that it does not divide."""
        s = self.spread
        dense, experts = _parameters(self.c, s)
        need = 2 * self.collective(dense * self.program.reduce_bytes, s.dp * s.ep, s.tp * s.cp * s.fsdp)
        return need + 2 * self.collective(experts * self.program.reduce_bytes, s.dp, s.tp * s.cp * s.fsdp * s.ep)

    def hand_over(self) -> float:
        """Return the seconds of handing activations to the next device along pp, and gradients back."""
        s = self.spread
        if s.pp == 1:
            return 0.0
        stride = s.devices // s.pp
        rate = self.hw.link if stride < self.hw.per_machine else self.hw.network
        return 2 * s.interleave * 2 * self.local * self.c.hidden_size / (rate * self.hw.links)

    def sent(self, blocks: int) -> dict[str, float]:
        """Return the bytes that a device sends in an update, by axis."""
        s, program, c, m = self.spread, self.program, self.c, self.work.micro_batches
        found: dict[str, float] = {}
        dense, experts = _whole_parameters(c, s, blocks)
        if (n := s.fsdp * s.cp) > 1:
            found["fsdp"] = m * (dense + experts) * (2 * program.gather_bytes + program.reduce_bytes) * (n - 1) / n
        if s.tp > 1:
            times = 4 + {"full": 1, "operators": 1}.get(program.recompute, 0)
            found["tp"] = m * blocks * times * 2 * 2 * self.tokens * c.hidden_size * (s.tp - 1) / s.tp
        own_dense, own_experts = _parameters(c, s)
        if (n := s.dp * s.ep) > 1:
            found["dp"] = 2 * own_dense * program.reduce_bytes * (n - 1) / n
            found["dp"] += 2 * own_experts * program.reduce_bytes * (s.dp - 1) / s.dp
        if s.ep > 1:
            routed = 2 * self.tokens * c.num_experts_per_tok * c.hidden_size / s.tp
            found["ep"] = m * blocks * 4 * routed * (s.ep - 1) / s.ep
        if s.pp > 1:
            found["pp"] = m * 2 * s.interleave * 2 * self.local * c.hidden_size
        return found


# Memory --------------------------------------------------------------------------------------------------------------


def _split(c: ModelConfig) -> tuple[float, float, float]:
    """Return the parameters of a block without its experts, of its experts, and of everything outside the blocks."""
    whole, shallow = count_parameters(c), count_parameters(replace(c, num_hidden_layers=1))
    block = (whole.total - shallow.total) / max(1, c.num_hidden_layers - 1) if c.num_hidden_layers > 1 else 0.0
    if c.num_hidden_layers == 1:
        block = float(count_parameters(replace(c, num_hidden_layers=2)).total - whole.total)
    matrices = (2 if c.gated_mlp else 1) + 1
    experts = float(c.num_experts * matrices * c.hidden_size * c.intermediate_size)
    return block - experts, experts, whole.total - c.num_hidden_layers * block


def _whole_parameters(c: ModelConfig, s: Spread, blocks: int) -> tuple[float, float]:
    """Return the parameters, but experts and experts, that a device computes with: before fsdp divides them."""
    dense, experts, outside = _split(c)
    return (blocks * dense + outside / (1 if s.pp == 1 else 2)) / s.tp, blocks * experts / (s.ep * s.tp)


def _parameters(c: ModelConfig, s: Spread) -> tuple[float, float]:
    """Return the parameters, but experts and experts, that a device keeps and updates."""
    dense, experts = _whole_parameters(c, s, math.ceil(c.num_hidden_layers / s.pp))
    shards = s.fsdp * s.cp
    return dense / shards, experts / shards


def saved_per_token(c: ModelConfig, s: Spread, program: Program) -> float:
    """Return the bytes of a block's activations per token that are kept for the backward pass, on one device.

    Korthikanti et al. 2022 (2205.05198), section 4, for any width of the feed-forward layer and grouped queries.
    """
    h, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    inner = c.intermediate_size * (c.num_experts_per_tok if c.num_experts else 1) + c.shared_expert_intermediate_size
    local = s.tp if program.sequence_parallel else 1
    if program.recompute == "full":
        return 2 * h / local
    up = 2 if c.gated_mlp else 1
    if program.recompute == "operators":  # outputs of every other product, of attention, and the input of the block
        kept = q + kv + inner + q
        return 2 * kept / s.tp + 2 * (h + h) / local
    stream = 2 * (2 * h) + 2 * h * program.dropout  # the inputs of both norms, and masks
    inputs = 2 * (2 * h) / (local if program.gathers_again else 1)  # what norms give to products
    divided = 2 * (q + 2 * kv) + 2 * q + 2 * (up + 1) * inner
    if c.gated_mlp and not program.compiled:
        divided += 2 * inner
    return stream / local + inputs + divided / s.tp


def _memory(work: Work, s: Spread, program: Program) -> dict[str, float]:
    c = work.model
    tokens = work.micro_batch * work.context / s.cp
    parameters = sum(_parameters(c, s))
    dense, experts, outside = _split(c)
    blocks = math.ceil(c.num_hidden_layers / s.pp)
    gathered = 0.0
    if s.fsdp * s.cp > 1:
        block = (dense + experts / s.ep) / s.tp
        both = program.gather_bytes + program.reduce_bytes
        if s.pp > 1:  # all blocks of the device stay gathered until the end of the update
            gathered = (blocks * block + outside / 2 / s.tp) * both
        else:  # a block and the next one, the gradients of one, and what is outside the blocks
            gathered = block * (both + program.gather_bytes) + outside / s.tp * both
    saved = saved_per_token(c, s, program)
    if not program.fused_attention and program.recompute == "none":
        saved += (4 + program.dropout) * c.num_attention_heads * work.context / s.tp
    # The first device along pp has as many micro-batches under way as there are devices; more if it has several pieces.
    under_way = 1.0
    if s.pp > 1:
        under_way = float(min(work.micro_batches, s.pp))
        if s.interleave > 1:
            under_way = s.pp * (1 + (s.pp - 1) / (s.pp * s.interleave))
    activations = tokens * blocks * saved * under_way
    if program.recompute in ("full", "operators"):  # the block that is computed again has all
        activations += tokens * saved_per_token(c, s, replace(program, recompute="none"))
    logits = 0.0
    if s.pp == 1:  # else the last device has them, which has fewer micro-batches under way
        held = tokens * c.vocab_size / s.tp
        held = held if program.logits_at_once is None else min(held, program.logits_at_once)
        form = "parallel" if s.tp > 1 else "compiled" if program.compiled else "eager"
        logits = held * LOGIT_BYTES[form]
    unused = UNUSED * (gathered + activations + logits)
    return {
        "weights": parameters * 4,
        "gradients": parameters * 4,
        "optimizer": parameters * (program.state_bytes - 8),
        "gathered": gathered,
        "activations": activations,
        "logits": logits,
        "unused": unused,
    }
