"""A few real updates of a model nobody keeps: how fast this machine trains it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gptsmith.errors import GptsmithError
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers, build_optimizers
from gptsmith.runtime import (
    ChosenPrecision,
    autocast_dtype,
    available_cores,
    compiler_available,
    out_of_memory,
    synchronize,
)
from gptsmith.train.budget.recipe import Machine
from gptsmith.train.compile import compile_blocks, costs
from gptsmith.train.config import OptimConfig, TrainConfig
from gptsmith.train.fp8 import use_fp8

TRIES, LONGEST = 4, 3.0  # updates to time, and the seconds after which no further one is begun
MOST_TOKENS = 1 << 15  # in one pass: more are no faster
USUAL_RATE, USUAL_GPU_RATE = 5e10, 5e13  # FLOP/s of updates, until something has been measured


def optimizers_for(model: Transformer, optim: OptimConfig) -> Optimizers:
    """The optimizers that a run's options ask for."""
    return build_optimizers(
        model,
        name=optim.name,
        lr=optim.lr,
        embedding_lr=optim.embedding_lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        betas=(optim.beta1, optim.beta2),
        newton_schulz_steps=optim.newton_schulz_steps,
    )


class Update:
    """A training update as the trainer makes it, without its books: `update(ids)`, ids: (B, T) int64.

    precision: what losses are computed in. compiled: compile the blocks first.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        precision: ChosenPrecision = "fp32",
        *,
        compiled: bool = False,
    ) -> None:
        self.model, self.config, self.precision = model.train(), config, precision
        self.device = next(model.parameters()).device
        if precision == "fp8":
            use_fp8(model)
        self.optimizers = optimizers_for(model, config.optim)
        self.parameters = list(model.parameters())
        if compiled:
            compile_blocks(model)

    def __call__(self, ids: Tensor) -> None:
        self.accumulate(ids)
        self.apply()

    def accumulate(self, ids: Tensor, document_ids: Tensor | None = None) -> None:
        """One forward and backward pass."""
        with self.autocast():
            loss = token_loss_sum(self.model, ids, ids, document_ids) / ids.numel()
        torch.autograd.backward(loss)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = autocast_dtype(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()

    def apply(self) -> None:
        """Clip the gradients and step the optimizers."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip or float("inf"), norm)
        self.optimizers.step()
        for p in self.parameters:
            p.grad = None


def seconds_per_update(
    config: TrainConfig, model_config: ModelConfig, device: torch.device, precision: ChosenPrecision
) -> float:
    """The fastest of a few updates, uncompiled, on tokens that mean nothing. Random numbers are left as they were.

    Of a large batch a part is timed, as large as memory allows; GptsmithError where that is not even one sequence.
    """
    rows = min(config.micro_batch_size or config.batch_size, max(1, MOST_TOKENS // config.context))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while True:
            try:
                forward_backward, step = _fastest(config, model_config, device, precision, rows)
                return forward_backward * config.batch_size / rows + step
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if rows == 1:
                size = count_parameters(model_config).total / 1e6
                raise GptsmithError(
                    f"there is no memory to try out the {size:,.0f}M parameters that suit this budget. "
                    "Give a smaller --depth."
                )
            rows //= 2


def _fastest(
    config: TrainConfig, model_config: ModelConfig, device: torch.device, precision: ChosenPrecision, rows: int
) -> tuple[float, float]:
    """Seconds of a forward and backward pass over so many sequences, and of an optimizer step."""
    update = Update(Transformer(model_config, dropout=config.dropout).to(device), config, precision)
    ids = torch.randint(model_config.vocab_size, (rows, config.context), device=device)

    def timed(part: Callable[[], None]) -> float:
        began = time.perf_counter()
        part()
        synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    passes: list[float] = []
    steps: list[float] = []
    while len(passes) < TRIES and (not passes or time.perf_counter() - began < LONGEST):
        passes.append(timed(lambda: update.accumulate(ids)))
        steps.append(timed(update.apply))
    # The first makes buffers and warms up: it counts only where there was no time for another.
    return min(passes[1:] or passes), min(steps[1:] or steps)


def this_machine(device: torch.device, precision: ChosenPrecision, compile: str) -> Machine:
    """What the rules of a budget need to know of this machine. compile: the option of that name."""
    cores = available_cores()
    able = compile != "off" and compiler_available(device)
    name = f"{cores} core{'s' if cores > 1 else ''}"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    seconds, saves = costs(device)
    return Machine(
        lambda config, model_config: seconds_per_update(config, model_config, device, precision),
        seconds if able else math.inf,
        saves,
        usual_rate(device),
        name,
    )


def usual_rate(device: torch.device) -> float:
    """FLOP/s to expect of updates, before any has been made."""
    return USUAL_RATE if device.type == "cpu" else USUAL_GPU_RATE
