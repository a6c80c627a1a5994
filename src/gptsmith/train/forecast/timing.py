"""Forecast how long a run takes on this machine: time its own updates, and compute the rest.

What fits into a few seconds is timed as it is. For a larger run a smaller one of the same kind is timed (fewer
sequences, then fewer layers, then narrower ones) and scaled by the ratio of their arithmetic.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gptsmith.data.loader import TokenLoader
from gptsmith.data.shards import TokenSplit
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import ChosenPrecision, autocast_dtype, compiler_available, synchronize
from gptsmith.train.adapter import adapt
from gptsmith.train.budget.machine import example_objective
from gptsmith.train.budget.recipe import REPORT_SECONDS
from gptsmith.train.compile import compile_blocks, undo_compile, worth_compiling
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast.memory import USABLE, available_memory
from gptsmith.train.objectives.base import Objective, Rehearsal
from gptsmith.train.objectives.pretrain import evaluation_rows
from gptsmith.train.step import TrainingStep

PASS_SECONDS = 2.0  # rough limit for one timed forward and backward pass
TIMED_SECONDS = 1.5  # and for all repeats of one measurement together
FEWEST, MOST = 2, 12  # repeats
NARROWEST = 256  # a width below which matrix products run at a lower rate
START_SECONDS = 3.0  # from the command to the first step, the text being prepared


@dataclass(frozen=True)
class Times:
    """Duration of the parts of a run, in seconds."""

    update: float
    """One update, with its share of the answers that are sampled and scored for it."""
    evaluation: float
    """One evaluation."""
    save: float
    sampled_token: float
    compile: float
    """Compiling the blocks, once; 0 where they are not compiled."""
    scale: float
    """Arithmetic of a micro-batch of the run relative to what was timed. 1: the run itself was timed."""
    rollout: float = 0.0
    """The share of `update` in which answers are sampled and scored, at their full length."""
    reference: float = 0.0
    """Before the first update: log-probabilities of the reference, once."""

    def training(self, config: RunConfig) -> float:
        """Return the seconds from the first step to the last evaluation, as run.json counts them."""
        loop = config.loop
        evaluations = -(-loop.steps // loop.eval_every)
        saves = evaluations
        if loop.save_every:
            steps = {*range(loop.save_every, loop.steps + 1, loop.save_every), loop.steps}
            steps |= set(range(loop.eval_every, loop.steps + 1, loop.eval_every))
            saves = len(steps)
        previews = (loop.steps - 1) // loop.eval_every
        return (
            self.compile
            + self.reference
            + loop.steps * self.update
            + evaluations * self.evaluation
            + saves * self.save
            + previews * loop.sample_tokens * self.sampled_token
        )

    def command(self, config: RunConfig) -> float:
        """Return the seconds of the whole command, with the last samples and the report."""
        samples = 6 * config.loop.sample_tokens * self.sampled_token
        return START_SECONDS + self.training(config) + samples + REPORT_SECONDS


def measure(
    config: RunConfig,
    model_config: ModelConfig,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    objective: Objective[Any] | None = None,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool = False,
    train_tokens: int = 0,
    val_tokens: int = 0,
) -> Times:
    """Time the parts of a run on this machine. Takes a few seconds, and those of compiling where the run would compile.

    objective: of the run (default: pretraining). micro_batch_size: if not the configuration's. train_tokens,
    val_tokens: length of the two splits. Random numbers are left as they were.
    """
    loop, objective = config.loop, objective or example_objective(config, model_config)
    rows = micro_batch_size or loop.micro_batch_size or loop.batch_size
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        rate = _matrix_rate(device, precision)
        tried, tried_rows = _affordable(model_config, rows, loop.context, rate, device)
        work = rows * loop.context * flops_per_token(model_config, loop.context)
        scale = work / (tried_rows * loop.context * flops_per_token(tried, loop.context))
        passes = loop.batch_size // rows
        model = adapt(Transformer(tried, dropout=loop.dropout), config.adapter, config.vision).to(device)
        model.activation_checkpointing = activation_checkpointing
        timer = _Timer(model, objective, config, precision, tried_rows)

        forward_backward, step = timer.update()
        step *= _step_scale(model_config, tried, config.optim.name)
        update = scale * forward_backward * passes + step + _loading_seconds(config)
        compiling = 0.0
        alike = tried.hidden_size == model_config.hidden_size  # what compiling saves depends on the width
        if alike and _would_compile(config, device, scale * forward_backward * passes):
            compiling, compiled = timer.compiled()
            update += scale * passes * (compiled - forward_backward)
        forward = timer.evaluation() * scale * tried_rows / rows  # of one row of the whole model
        per_row = objective.normalizer(objective.example_batch(1))[1]  # tokens
        evaluated = min(val_tokens, config.method.eval_tokens or val_tokens)
        evaluation = -(-evaluated // per_row) * forward
        size = count_parameters(model_config).multiplied / count_parameters(tried).multiplied
        reference = 0.0
        if objective.has_reference_pass:
            reference = -(-(train_tokens + evaluated) // per_row) * forward
        rollout = 0.0
        if (rehearsal := timer.rehearsal()) is not None:
            rollout, evaluation = size * rehearsal.policy + rehearsal.others, size * rehearsal.evaluation
        return Times(
            update=update + rollout,
            evaluation=evaluation,
            save=_saving_seconds(model_config, config.optim.name),
            sampled_token=timer.sampled_token() * size,
            compile=compiling,
            scale=scale,
            rollout=rollout,
            reference=reference,
        )


def _would_compile(config: RunConfig, device: torch.device, seconds: float) -> bool:
    """Predict what the run will decide; seconds: of an update's forward and backward passes."""
    if config.loop.compile != "auto" or not compiler_available(device):
        return config.loop.compile == "on"
    return worth_compiling(seconds * config.loop.steps, device)


# What to time --------------------------------------------------------------------------------------------------------


def _affordable(c: ModelConfig, rows: int, context: int, rate: float, device: torch.device) -> tuple[ModelConfig, int]:
    """Return the largest model and micro-batch of this kind that takes at most about `PASS_SECONDS`."""

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
        elif c.vocab_size > 32768 > (c.image_token_id or 0):
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
    """Return how much longer the optimizer's step takes: AdamW reads every number, Muon multiplies every matrix."""
    if optimizer != "muon":
        return count_parameters(whole).total / count_parameters(tried).total
    return whole.num_hidden_layers / tried.num_hidden_layers * (whole.hidden_size / tried.hidden_size) ** 3


# Timing --------------------------------------------------------------------------------------------------------------


class _Timer:
    """Times the parts of training one model with micro-batches of `rows` sequences."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective[Any],
        config: RunConfig,
        precision: ChosenPrecision,
        rows: int,
    ) -> None:
        self.config, self.model, self.rows, self.objective = config, model, rows, objective
        self.step: TrainingStep[Any] = TrainingStep.build(
            model, objective, config, precision=precision, micro_batch_size=rows
        )
        self.device = self.step.device
        self.batch = objective.example_batch(rows)
        self.count = objective.normalizer(self.batch)[0]
        self.pass_seconds = 0.0

    def _accumulate(self) -> None:
        self.step.accumulate(self.batch, self.count)

    def update(self) -> tuple[float, float]:
        """Return the seconds of a forward and backward pass, and of an optimizer step."""
        passes, steps = list[float](), list[float]()
        for _ in _repeats():
            passes.append(self._timed(self._accumulate))
            steps.append(self._timed(lambda: self.step.apply(1.0)))
        self.pass_seconds = _typical(passes)
        return self.pass_seconds, _typical(steps)

    def compiled(self) -> tuple[float, float]:
        """Return the seconds to compile the blocks, and of a forward and backward pass after that."""
        before = self._timed(self._accumulate)
        compile_blocks(self.model)
        try:
            first = self._timed(self._accumulate)
            passes = [self._timed(self._accumulate) for _ in _repeats()]
        except Exception:  # a compiler can fail in many ways; the run will go on without it, too
            undo_compile(self.model)
            return 0.0, before
        finally:
            self.step.clear_gradients()
        return max(0.0, first - _typical(passes)), _typical(passes)

    def evaluation(self) -> float:
        """Return the seconds per sequence of an evaluation."""
        rows = self.rows
        if self.pass_seconds < PASS_SECONDS / 2:  # a larger one is as fast as several of these
            rows = evaluation_rows(rows, self.config.loop.context)
        batch = self.objective.example_batch(rows)
        self.model.eval()

        def evaluate() -> None:
            with torch.no_grad():
                self.step.loss(batch)

        seconds = _typical([self._timed(evaluate) for _ in _repeats()])
        self.model.train()
        return seconds / rows

    def rehearsal(self) -> Rehearsal | None:
        """Return how long the objective takes to sample and score answers, where it does."""
        self.model.eval()
        found = self.objective.rehearse(self.step.models, TIMED_SECONDS)
        self.model.train()
        return found

    def sampled_token(self) -> float:
        """Return the seconds per generated token."""
        count, made = max(1, min(24, self.config.loop.context - 1)), 0
        engine = Engine(self.model, max_batch=1, cache_tokens=2 * self.config.loop.context + 16)
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


def _repeats() -> Iterator[int]:
    """Yield the repeats of a measurement: a few at least, and as many as there is time for."""
    began = time.perf_counter()
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() - began > TIMED_SECONDS:
            return
        yield turn


def _typical(seconds: list[float]) -> float:
    """Return the median without the first, which allocates buffers and warms up."""
    return statistics.median(seconds[1:])


def _matrix_rate(device: torch.device, precision: ChosenPrecision) -> float:
    """Return a rough guess of the FLOP/s of training: half the rate of a matrix product."""
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


def _loading_seconds(config: RunConfig) -> float:
    """Return the seconds it takes to make a batch."""
    split = TokenSplit.from_array(np.zeros(1 << 20, np.uint16) if config.loop.context < 1 << 19 else np.zeros(4 << 20))
    rows = min(config.loop.batch_size, max(1, (1 << 20) // config.loop.context))
    loader = TokenLoader(split, batch_size=rows, seq_len=config.loop.context, seed=0)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        next(loader)
        seconds.append(time.perf_counter() - began)
    return min(seconds) * config.loop.batch_size / rows


def _saving_seconds(model_config: ModelConfig, optimizer: str) -> float:
    """Return the seconds to write, sync and hash the weights and the optimizer state, estimated from a small file."""
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


FILES_SECONDS = 0.05  # for a checkpoint's dozen small files
