"""How long a run takes on this machine, before it runs: its own updates, timed; the rest by arithmetic.

What fits into a few seconds is timed as it is. Of a larger run a smaller one of the same kind is timed - fewer
sequences, then fewer layers, then narrower ones - and scaled by its arithmetic.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from gptsmith.data.loader import TokenLoader
from gptsmith.data.shards import TokenSplit
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision, autocast_dtype, compiler_available, synchronize
from gptsmith.train.budget.recipe import REPORT_SECONDS
from gptsmith.train.compile import pays
from gptsmith.train.config import TrainConfig
from gptsmith.train.forecast.memory import USABLE, available_memory
from gptsmith.train.objectives.pretrain import evaluation_rows
from gptsmith.train.step import Update

PASS_SECONDS = 2.0  # what one timed pass may take, roughly
TIMED_SECONDS = 1.5  # and all passes of one kind together
FEWEST, MOST = 2, 12  # passes
NARROWEST = 256  # a width below which matrix products run at another rate
START_SECONDS = 3.0  # from the command to the first step, the text being prepared


@dataclass(frozen=True)
class Times:
    """Seconds that the parts of a run take."""

    update: float
    evaluation: float
    """Over the whole of what is evaluated on."""
    save: float
    sampled_token: float
    compile: float
    """To compile the blocks, once; 0 where they are not."""
    scale: float
    """How many times more arithmetic a micro-batch of the run is than what was timed. 1: it was timed itself."""

    def training(self, config: TrainConfig) -> float:
        """Seconds from the first step to the last evaluation, as a run's record counts them."""
        evaluations = -(-config.steps // config.eval_every)
        saves = evaluations
        if config.save_every:
            steps = {*range(config.save_every, config.steps + 1, config.save_every), config.steps}
            steps |= set(range(config.eval_every, config.steps + 1, config.eval_every))
            saves = len(steps)
        previews = (config.steps - 1) // config.eval_every
        return (
            self.compile
            + config.steps * self.update
            + evaluations * self.evaluation
            + saves * self.save
            + previews * config.sample_tokens * self.sampled_token
        )

    def command(self, config: TrainConfig) -> float:
        """Seconds of the whole command, with the last samples and the report."""
        return START_SECONDS + self.training(config) + 6 * config.sample_tokens * self.sampled_token + REPORT_SECONDS


def measure(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    micro_batch_size: int | None = None,
    val_tokens: int = 0,
) -> Times:
    """Time a run's parts on this machine, in a few seconds (and those of compiling, where the run would).

    micro_batch_size: what to train with, if not the configuration's. val_tokens: length of the validation split.
    Random numbers are left as they were.
    """
    rows = micro_batch_size or config.micro_batch_size or config.batch_size
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        rate = _matrix_rate(device, precision)
        tried, tried_rows = _affordable(model_config, rows, config.context, rate, device)
        work = rows * config.context * flops_per_token(model_config, config.context)
        scale = work / (tried_rows * config.context * flops_per_token(tried, config.context))
        passes = config.batch_size // rows
        timer = _Timer(Transformer(tried, dropout=config.dropout).to(device), config, precision, tried_rows)

        forward_backward, step = timer.update()
        step *= _step_scale(model_config, tried, config.optim.name)
        update = scale * forward_backward * passes + step + _loading_seconds(config)
        compiling = 0.0
        alike = tried.hidden_size == model_config.hidden_size  # what compiling saves depends on the width
        if alike and _would_compile(config, device, scale * forward_backward * passes):
            compiling, compiled = timer.compiled()
            update += scale * passes * (compiled - forward_backward)
        forward = timer.evaluation() * scale * tried_rows / rows  # of one sequence of the whole model
        looked_at = min(val_tokens, config.eval_tokens or val_tokens)
        sequences = -(-looked_at // config.context)
        return Times(
            update=update,
            evaluation=sequences * forward,
            save=_saving_seconds(model_config, config.optim.name),
            sampled_token=timer.sampled_token()
            * count_parameters(model_config).multiplied
            / count_parameters(tried).multiplied,
            compile=compiling,
            scale=scale,
        )


def _would_compile(config: TrainConfig, device: torch.device, passes: float) -> bool:
    """What the run itself will decide; passes: seconds of an update's forward and backward passes."""
    if config.compile != "auto" or not compiler_available(device):
        return config.compile == "on"
    return pays(passes * config.steps, device)


# What to time --------------------------------------------------------------------------------------------------------


def _affordable(c: ModelConfig, rows: int, context: int, rate: float, device: torch.device) -> tuple[ModelConfig, int]:
    """The largest model and micro-batch of this kind whose pass takes no more than `PASS_SECONDS`, roughly."""

    def seconds(model: ModelConfig, rows: int) -> float:
        return rows * context * flops_per_token(model, context) / rate

    def bytes_held(model: ModelConfig) -> float:
        return 24.0 * count_parameters(model).total

    room = min(2 << 30, USABLE / 2 * (available_memory(device) or 4 << 30))
    period = max(1, len(c.window_pattern))
    while True:
        excess = max(seconds(c, rows) / PASS_SECONDS, bytes_held(c) / room)
        if excess <= 1:
            return c, rows
        if rows > 1 and seconds(c, rows) > PASS_SECONDS and bytes_held(c) <= room:
            rows = max(1, min(rows - 1, int(rows / excess)))
        elif c.num_hidden_layers > 2 * period:
            c = replace(c, num_hidden_layers=max(2 * period, c.num_hidden_layers // 2 // period * period))
        elif c.vocab_size > 32768:
            c = replace(c, vocab_size=32768)
        elif c.hidden_size // 2 >= NARROWEST and c.num_attention_heads > 1:
            c = _half_as_wide(c)
        else:
            return c, rows


def _half_as_wide(c: ModelConfig) -> ModelConfig:
    heads = c.num_attention_heads // 2
    wanted = max(1, c.num_key_value_heads // 2)
    return replace(
        c,
        hidden_size=c.hidden_size // 2,
        num_attention_heads=heads,
        num_key_value_heads=max(k for k in range(1, min(wanted, heads) + 1) if heads % k == 0),
        intermediate_size=max(1, c.intermediate_size // 2),
        shared_expert_intermediate_size=c.shared_expert_intermediate_size // 2,
    )


def _step_scale(whole: ModelConfig, tried: ModelConfig, optimizer: str) -> float:
    """How many times longer the optimizer's step takes: AdamW's reads every number, Muon's multiplies every matrix."""
    if optimizer != "muon":
        return count_parameters(whole).total / count_parameters(tried).total
    return whole.num_hidden_layers / tried.num_hidden_layers * (whole.hidden_size / tried.hidden_size) ** 3


# Timing --------------------------------------------------------------------------------------------------------------


class _Timer:
    """Times the parts of training one model with micro-batches of `rows` sequences."""

    def __init__(self, model: Transformer, config: TrainConfig, precision: ChosenPrecision, rows: int) -> None:
        self.config, self.model, self.rows = config, model, rows
        self.update_of = Update(model, config, precision)
        self.device = self.update_of.device
        self.ids = torch.randint(model.config.vocab_size, (rows, config.context), device=self.device)
        self.pass_seconds = 0.0
        self.documents = torch.zeros_like(self.ids, dtype=torch.int32) if config.mask_documents else None

    def update(self) -> tuple[float, float]:
        """Seconds of a forward and backward pass, and of an optimizer step."""
        passes, steps = list[float](), list[float]()
        for _ in _enough():
            passes.append(self._timed(lambda: self.update_of.accumulate(self.ids, self.documents)))
            steps.append(self._timed(self.update_of.apply))
        self.pass_seconds = _typical(passes)
        return self.pass_seconds, _typical(steps)

    def compiled(self) -> tuple[float, float]:
        """Seconds to compile the blocks, and of a pass then."""
        from gptsmith.train.compile import compile_blocks, undo_compile

        before = self._timed(lambda: self.update_of.accumulate(self.ids, self.documents))
        compile_blocks(self.model)
        try:
            first = self._timed(lambda: self.update_of.accumulate(self.ids, self.documents))
            passes = [self._timed(lambda: self.update_of.accumulate(self.ids, self.documents)) for _ in _enough()]
        except Exception:  # whatever a compiler can do wrong: the run will go on without it, too
            undo_compile(self.model)
            return 0.0, before
        finally:
            self.model.zero_grad(set_to_none=True)
        return max(0.0, first - _typical(passes)), _typical(passes)

    def evaluation(self) -> float:
        """Seconds a sequence of an evaluation takes."""
        rows = self.rows
        if self.pass_seconds < PASS_SECONDS / 2:  # else one as large is like many
            rows = evaluation_rows(rows, self.config.context)
        ids = self.ids.repeat(4, 1)[:rows]
        documents = None if self.documents is None else self.documents.repeat(4, 1)[:rows]
        self.model.eval()

        def evaluate() -> None:
            with self.update_of.autocast(), torch.no_grad():
                token_loss_sum(self.model, ids, ids, documents)

        seconds = _typical([self._timed(evaluate) for _ in _enough()])
        self.model.train()
        return seconds / rows

    def sampled_token(self) -> float:
        """Seconds a generated token takes."""
        count, made = max(1, min(24, self.config.context - 1)), 0
        engine = Engine(self.model, max_batch=1, cache_tokens=2 * self.config.context + 16)
        began = time.perf_counter()
        engine.add_request([0], SamplingParams(max_tokens=count, temperature=0.8, seed=0))
        while engine.has_work and time.perf_counter() - began < TIMED_SECONDS:
            engine.step()
            made += 1
        return (time.perf_counter() - began) / made

    def _timed(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - began


def _enough() -> Iterator[int]:
    """Turns of a measurement: a few at least, and as many as there is time for."""
    began = time.perf_counter()
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() - began > TIMED_SECONDS:
            return
        yield turn


def _typical(seconds: list[float]) -> float:
    """The median without the first, which makes buffers and warms up."""
    return statistics.median(seconds[1:])


def _matrix_rate(device: torch.device, precision: ChosenPrecision) -> float:
    """FLOP/s to expect of training, roughly: half the rate of a matrix product."""
    size = 512 if device.type == "cpu" else 4096
    dtype = autocast_dtype(precision) or torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(3):
            torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 0.5 * 3 * 2 * size**3 / best


def _loading_seconds(config: TrainConfig) -> float:
    """What making a batch takes."""
    split = TokenSplit.from_array(np.zeros(1 << 20, np.uint16) if config.context < 1 << 19 else np.zeros(4 << 20))
    rows = min(config.batch_size, max(1, (1 << 20) // config.context))
    loader = TokenLoader(split, batch_size=rows, seq_len=config.context, seed=0)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        next(loader)
        seconds.append(time.perf_counter() - began)
    return min(seconds) * config.batch_size / rows


def _saving_seconds(model_config: ModelConfig, optimizer: str) -> float:
    """What writing a checkpoint takes: all weights and optimizer state written, synced and summed, by a small file."""
    probe = os.urandom(8 << 20)
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        file.write(probe)
        file.flush()
        os.fsync(file.fileno())
        hashlib.sha256(probe)
        per_byte = (time.perf_counter() - began) / len(probe)
    size = count_parameters(model_config).total * (12 if optimizer == "adamw" else 8)
    return FILES_SECONDS + per_byte * size


FILES_SECONDS = 0.05  # of a checkpoint's dozen small files
