"""The training loop: one for every objective.

It owns accumulation, clipping, schedules, precision, logging, evaluation, saving, resuming and signals. The order
within a step is fixed: update, log, save, evaluate. So no evaluation can cost a checkpoint, and what a step does is a
function of the state a checkpoint holds: stopping anywhere and resuming gives, bit for bit, the run that never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gptsmith.checkpoint import CheckpointStore, TrainState
from gptsmith.errors import CheckpointError, DivergedError, GptsmithError, TrainingError
from gptsmith.log import JsonLines
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers
from gptsmith.optim.schedule import learning_rate_factor
from gptsmith.runtime import ChosenPrecision, autocast_dtype, out_of_memory, synchronize
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.config import TrainConfig
from gptsmith.train.display import Display
from gptsmith.train.objectives.base import Objective

Outcome = Literal["finished", "interrupted"]


class Trainer:
    """Trains `model` on `objective` for `config.steps`, or for as many as a deadline allows."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        objective: Objective,
        optimizers: Optimizers,
        store: CheckpointStore,
        precision: ChosenPrecision,
        micro_batch_size: int,
        should_stop: Callable[[], bool],
        display: Display,
        deadline: Deadline | None = None,
        on_evaluation: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config, self.model, self.tokenizer, self.objective = config, model, tokenizer, objective
        self.optimizers, self.store, self.should_stop, self.display = optimizers, store, should_stop, display
        self.deadline, self.on_evaluation = deadline, on_evaluation
        self.metrics = JsonLines(store.run_directory / "metrics.jsonl")
        self.device = next(model.parameters()).device
        self.autocast_dtype = autocast_dtype(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.micro_batch_size = micro_batch_size  # a divisor of the batch; a smaller one when memory runs out

        self.step, self.steps = 0, config.steps
        self.targets = 0.0  # how many targets have been trained on
        self.pending: list[tuple[Tensor, Tensor]] = []  # (loss, gradient norm) of steps not yet logged
        self.extra: dict[str, list[float]] = {}  # what else an objective reports, likewise
        self.first_loss: float | None = None
        self.recent_loss = math.nan
        self.elapsed_before = 0.0  # seconds of training in earlier sessions of this run
        self.busy, self.busy_targets = 0.0, 0.0  # seconds in updates since the last log line, and their targets
        self.update_seconds = 0.0  # seconds in updates alone, over all sessions: what a speed is measured by
        self.started = time.monotonic()

    def run(self) -> Outcome:
        """Train to the end, or until `should_stop()`. DivergedError if the loss does, TrainingError if saving fails."""
        try:
            return self._run()
        except TrainingError:
            raise
        except (RuntimeError, MemoryError) as error:  # in an optimizer's step, say, which cannot be made again
            if not out_of_memory(error):
                raise
            reason = _first_line(str(error))
            raise TrainingError(self._without_memory(f"smaller micro-batches do not help here ({reason})")) from error
        except GptsmithError as error:  # no space, mostly
            steps = self.store.steps()
            kept = f" The checkpoint of step {steps[-1]} is intact." if steps else ""
            resume = f" Then go on with: gptsmith train --resume {self.store.run_directory}"
            raise TrainingError(f"stopped at step {self.step}: {error}{kept}{resume}") from error

    def _run(self) -> Outcome:
        self.model.train()
        self.started = time.monotonic()
        self._evaluate_if_due()  # a run killed between saving and evaluating does that first
        while self.step < self.steps:
            if self.should_stop():
                self._save()
                return "interrupted"
            factor = self._factor()
            self.update(factor)
            if self.step % self.config.log_every == 0 or self.step == self.steps:
                self._log(factor)
                self._plan()
            if self.step % (self.config.save_every or self.eval_every) == 0 or self._evaluation_due():
                self._save()
            self._evaluate_if_due()
        return "interrupted" if self.should_stop() else "finished"

    def elapsed(self) -> float:
        """Seconds this run has trained, over all its sessions."""
        return self.elapsed_before + time.monotonic() - self.started

    # -- one step ------------------------------------------------------------------------------------------------------

    def _factor(self) -> float:
        optim = self.config.optim
        return learning_rate_factor(
            self.step,
            steps=self.steps,
            kind=optim.schedule,
            warmup_steps=optim.warmup_steps,
            decay_fraction=optim.decay_fraction,
            final_factor=optim.final_factor,
        )

    def update(self, factor: float) -> None:
        """One optimizer update over all micro-batches; their losses are divided by their weights together."""
        began = time.perf_counter()
        batch = self.objective.next_batch()
        weight = max(1.0, self.objective.weight(batch))
        total = self._gradients(batch, weight)
        for optimizer in self.optimizers.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
        self.optimizers.set_factor(factor)
        if self.scaler.is_enabled():
            for optimizer in self.optimizers.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" or bool(torch.isfinite(norm)):  # on a GPU asking would wait for it
            self.optimizers.step()
        for p in parameters:
            p.grad = None
        self.pending.append((total, norm))
        self.targets += weight
        self.step += 1
        if self.device.type != "cuda":
            self._check(float(total), float(norm))
        seconds = time.perf_counter() - began
        self.busy += seconds
        self.update_seconds += seconds
        self.busy_targets += weight

    def _gradients(self, batch: Any, weight: float) -> Tensor:
        """Set the gradients of the loss over `batch`, and return the loss. Where memory runs out, the same batch is
        gone through again from its beginning, with the same random numbers, in smaller micro-batches."""
        while True:
            random = self.random_state() if self.model.dropout else {}
            try:
                return self._accumulate(batch, weight)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error)
            # Out of the handler: the error held on to every tensor of the failed pass.
            for p in self.model.parameters():
                p.grad = None
            self.set_random_state(random)
            self.shrink(reason)

    def _accumulate(self, batch: Any, weight: float) -> Tensor:
        total = torch.zeros((), device=self.device)
        extra: list[dict[str, float]] = []
        for start in range(0, self.config.batch_size, self.micro_batch_size):
            with self.autocast():
                part = self.objective.slice(batch, start, start + self.micro_batch_size)
                result = self.objective.loss(self.model, part)
                loss = result.sum / weight
            extra.append(result.metrics)
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        for metrics in extra:
            for name, value in metrics.items():
                self.extra.setdefault(name, []).append(value)
        return total

    def shrink(self, reason: str) -> None:
        """Go on with the largest divisor of the batch that is at most half the micro-batch. TrainingError if it is 1.

        reason: the error that memory ran out with.
        """
        if self.micro_batch_size == 1:
            raise TrainingError(
                self._without_memory(f"even one sequence at a time is too much ({_first_line(reason)})")
            )
        before = self.micro_batch_size
        self.micro_batch_size = max(size for size in range(1, before // 2 + 1) if self.config.batch_size % size == 0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.display.print(
            f"memory ran out at step {self.step + 1}: going on with micro-batches of {self.micro_batch_size} instead "
            f"of {before}, from the beginning of the step"
        )

    def _without_memory(self, what: str) -> str:
        return (
            f"memory ran out at step {self.step + 1}: {what}.{self._kept()} "
            "Free some memory and resume, or start a smaller model or a shorter --context; "
            "`gptsmith plan` shows what takes how much."
        )

    def _kept(self) -> str:
        steps = self.store.steps()
        return f" The checkpoint {self.store.path(steps[-1])} is intact." if steps else " There is no checkpoint yet."

    def random_state(self) -> dict[str, Tensor]:
        state = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        if "rng/cpu" in state:
            torch.set_rng_state(state["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in state:
            torch.cuda.set_rng_state(state["rng/cuda"], self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which losses are computed."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _check(self, loss: float, norm: float) -> None:
        """TrainingError if the loss is no number or has risen far above where it began."""
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if self.first_loss is None:
            self.first_loss = loss
            self.recent_loss = loss
        self.recent_loss += (loss - self.recent_loss) / 20
        if finite and self.recent_loss <= self.first_loss + 1.0:
            return
        what = "is not a number" if not finite else f"has risen to {self.recent_loss:.2f}, from {self.first_loss:.2f}"
        self.metrics.append(step=self.step, time=round(self.elapsed(), 3), loss=loss, grad_norm=norm)
        steps = self.store.steps()
        kept = (
            f"The last good checkpoint is {self.store.path(steps[-1])}."
            if steps
            else "There is no checkpoint before it."
        )
        raise DivergedError(
            f"training diverged at step {self.step}: the loss {what}. {kept} "
            f"Try a lower learning rate (--optim.lr {self.config.optim.lr / 3:.2g}) in a new run."
        )

    # -- between steps -------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """With a deadline: as many steps as end on time, by the speed of late. The rate falls along the new plan."""
        if self.deadline is None or self.step == self.steps:
            return
        self.steps = self.deadline.plan(self.step, self.steps, self.update_seconds, self.elapsed(), self.eval_every)
        self.display.steps = self.steps

    @property
    def eval_every(self) -> int:
        """Steps between evaluations. Where a deadline has become that of many more steps than were planned at first,
        there are more steps between them, not more evaluations."""
        every, most = self.config.eval_every, 2 * max(1.0, self.config.steps / self.config.eval_every)
        while self.deadline is not None and self.steps > most * every:
            every *= 2
        return every

    def _wait(self) -> None:
        """Let a GPU finish. The time is that of updates: so far it had only been told of them."""
        began = time.perf_counter()
        synchronize(self.device)
        waited = time.perf_counter() - began
        self.busy += waited
        self.update_seconds += waited

    def _log(self, factor: float) -> None:
        self._wait()
        losses = [float(loss) for loss, _ in self.pending]
        norms = [float(norm) for _, norm in self.pending]
        if self.device.type == "cuda":
            for loss, norm in zip(losses, norms, strict=True):
                self._check(loss, norm)
        self.pending.clear()
        extra = {name: sum(values) / len(values) for name, values in self.extra.items()}
        self.extra.clear()
        row = {
            "step": self.step,
            "time": round(self.elapsed(), 3),
            "loss": sum(losses) / len(losses),
            "lr": self.config.optim.lr * factor,
            "grad_norm": sum(norms) / len(norms),
            "tokens": int(self.targets),
            "tokens_per_second": round(self.busy_targets / max(1e-9, self.busy), 1),
            **extra,
        }
        self.busy = self.busy_targets = 0.0
        self.metrics.append(**row)
        self.display.step(self.step, row)

    def _evaluation_due(self) -> bool:
        if self.step == self.steps:
            return self.step > 0
        left = self.steps - self.step
        if self.deadline is not None and left < self.eval_every / 3:  # the last is near
            return False
        return self.step > 0 and self.step % self.eval_every == 0

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_due() or self.should_stop():
            return
        if any(row["step"] == self.step and "val_loss" in row for row in self.metrics.read()):
            return
        began = time.monotonic()
        self.display.say("evaluating")
        with self.autocast():
            values = self.objective.evaluate(self.model, self.micro_batch_size)
        if values is not None:
            row = {
                "step": self.step,
                "time": round(self.elapsed(), 3),
                "update_time": round(self.update_seconds, 3),
                "tokens": int(self.targets),
                **values,
            }
            self.metrics.append(**row)
            self.display.evaluation(self.step, row)
        self.store.update_links()
        if not self.should_stop():
            self.on_evaluation(self.step)
        if self.deadline is not None:
            self.deadline.paused(time.monotonic() - began)

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.step in self.store.steps():
            return
        self._wait()
        losses = [(float(loss), float(norm)) for loss, norm in self.pending]
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            self._check(math.nan, math.nan)
        values = {
            "step": self.step,
            "steps": self.steps,
            "micro_batch_size": self.micro_batch_size,
            "targets": self.targets,
            "elapsed": self.elapsed(),
            "update_seconds": self.update_seconds,
            "pending": losses,
            "extra": self.extra,
            "first_loss": self.first_loss,
            "recent_loss": self.recent_loss,
            "objective": self.objective.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        tensors = {f"optimizer/{name}": tensor for name, tensor in self.optimizers.state_tensors().items()}
        tensors |= self.random_state()
        state = TrainState(values, tensors)
        self.store.save(self.step, self.model, self.tokenizer, state, keep=self.config.keep_checkpoints)

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint's state (the model's weights are loaded already)."""
        values, tensors = state.values, state.tensors
        try:
            self.objective.load_state_dict(values["objective"])
            self.scaler.load_state_dict(values["scaler"])
            prefix = "optimizer/"
            self.optimizers.load_state_tensors(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
            self.set_random_state(tensors)
            self.step, self.steps, self.targets = int(values["step"]), int(values["steps"]), float(values["targets"])
            self.micro_batch_size = min(self.micro_batch_size, int(values["micro_batch_size"]))
            self.pending = [(torch.tensor(loss), torch.tensor(norm)) for loss, norm in values["pending"]]
            self.extra = {name: list(numbers) for name, numbers in values["extra"].items()}
            self.first_loss, self.recent_loss = values["first_loss"], values["recent_loss"]
            self.elapsed_before = float(values["elapsed"])
            self.update_seconds = float(values["update_seconds"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint's train/ folder lacks {error}; it is of another version.") from None


def _first_line(text: str) -> str:
    return (text.strip() or "no more memory").splitlines()[0]
