"""The training loop: one for every objective.

It owns schedules, logging, evaluation, saving, resuming and signals; `TrainingStep` makes the updates. The order within
a step is fixed: update, log, save, evaluate. So no evaluation can cost a checkpoint, and what a step does is a function
of the state that a checkpoint holds: stopping anywhere and resuming gives, bit for bit, the run that never stopped.
A checkpoint is written while the next step computes (`Saver`).

Where several processes share a run, each has a trainer, and all take the same course: what depends on a clock, a signal
or a file is agreed. The main one alone writes files, calls callbacks and shows progress.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gptsmith.checkpoint import CheckpointStore, TrainState
from gptsmith.errors import CheckpointError, DivergedError, GptsmithError, LostProcessError, ProcessError, TrainingError
from gptsmith.formats.hf import weight_mappings
from gptsmith.log import JsonLines
from gptsmith.model.lora import lora_layers
from gptsmith.run_directory import Run, evaluation_at
from gptsmith.runtime import out_of_memory, synchronize
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.callbacks import Callback
from gptsmith.train.config import RunConfig
from gptsmith.train.display import Display
from gptsmith.train.objectives.base import LossHistory, Sum
from gptsmith.train.saver import Saver
from gptsmith.train.signals import NOTICE
from gptsmith.train.step import OutOfMemoryError, TrainingStep, add_sums
from gptsmith.train.task_evaluation import TaskEvaluation

if TYPE_CHECKING:
    from gptsmith.distributed.checkpoint import Parts

Outcome = Literal["finished", "interrupted"]

STATE_SCHEMA = 2
FIRST_SAVE_SECONDS = 50.0  # until the first checkpoint, if none is due before: with its writing, within a minute
SAVE_SECONDS = 600.0  # between checkpoints, if none is due before
SETTLE_SECONDS = 30.0  # for a checkpoint that all processes write, when one of them has failed
MOST_EMPTY_BATCHES = 100  # in a row, before an objective is held to be broken


class Trainer:
    """Train by `training_step` for `config.loop.steps`, or for as many steps as a deadline allows."""

    def __init__(
        self,
        *,
        config: RunConfig,
        run: Run,
        training_step: TrainingStep[Any],
        tokenizer: Tokenizer,
        store: CheckpointStore,
        should_stop: Callable[[], bool],
        display: Display,
        deadline: Deadline | None = None,
        callbacks: Sequence[Callback] = (),
        task_evaluation: TaskEvaluation | None = None,
    ) -> None:
        self.config, self.run_files, self.training_step, self.tokenizer = config, run, training_step, tokenizer
        self.models, self.model = training_step.models, training_step.models.policy
        self.objective, self.optimizers, self.ranks = (
            training_step.objective,
            training_step.optimizers,
            training_step.ranks,
        )
        self.store, self.display, self.deadline, self.callbacks = store, display, deadline, callbacks
        self.task_evaluation = task_evaluation
        self._stop_requested, self._callback_stopped, self._said_stop = should_stop, False, False
        self.metrics = JsonLines(store.run_directory / "metrics.jsonl")
        training_step.on_shrink = self._announce_shrink
        training_step.before_update = self._before_update
        self.device = training_step.device
        self.saver, self.parts = Saver(self.device), self._parts()
        self.saved_step = -1  # of the last checkpoint that this process has begun; the same on all
        self.is_read = True  # whether all processes know that it has been read

        self.step, self.steps = 0, config.loop.steps
        self.tokens_seen = 0.0
        self.pending: list[tuple[Tensor, Tensor]] = []  # (loss, gradient norm) of steps not yet logged
        self.objective_metrics: dict[str, Sum] = {}  # of those steps
        self.history = LossHistory()
        self.elapsed_before = 0.0  # seconds of training in earlier processes of this run
        self.seconds_since_log, self.tokens_since_log = 0.0, 0.0  # of updates alone
        self.update_seconds = 0.0  # seconds in updates alone, over the whole run: what speed is measured by
        self.started = self.last_save = time.monotonic()
        self.save_seconds = FIRST_SAVE_SECONDS

    def run(self) -> Outcome:
        """Train to the end, or until asked to stop.

        Raises DivergedError if the loss diverges, TrainingError if memory runs out or a checkpoint cannot be saved.
        """
        try:
            with self._finishing():
                return self._run()
        except OutOfMemoryError as error:
            raise TrainingError(self.out_of_memory_message(error)) from error
        except LostProcessError as error:
            raise LostProcessError(self._stopped(error)) from error
        except TrainingError:
            raise
        except (RuntimeError, MemoryError) as error:  # in an optimizer's step, say, which cannot be repeated
            if (lost := self.ranks.lost_connection(error)) is not None:  # within the passes of a divided model
                if isinstance(lost, ProcessError):
                    raise lost from error
                raise LostProcessError(self._stopped(lost)) from error
            if not out_of_memory(error):
                raise
            reason = _first_line(str(error))
            raise TrainingError(self._out_of_memory(f"smaller micro-batches do not help here ({reason})")) from error
        except GptsmithError as error:  # a full disk, mostly
            raise TrainingError(self._stopped(error)) from error

    def _stopped(self, error: GptsmithError) -> str:
        steps = self.store.steps()
        kept = f" The checkpoint of step {steps[-1]} is intact." if steps else ""
        resume = f" Resume with: gptsmith train --resume {self.store.run_directory}"
        return f"stopped at step {self.step}: {error}{kept}{resume}"

    def _run(self) -> Outcome:
        self.model.train()
        self.started = self.last_save = time.monotonic()
        self.save_seconds = SAVE_SECONDS if self.store.steps() else FIRST_SAVE_SECONDS
        self._evaluate_if_due()  # a run killed between saving and evaluating does that first
        self._measure_tasks_if_due()
        while self.step < self.steps:
            self._note_saved()
            if self._stop_agreed():
                self._save()
                self._finish_save()
                return "interrupted"
            factor = self._lr_factor()
            if not self.update(factor):
                continue
            if self.step % self.config.loop.log_every == 0 or self.step == self.steps:
                self._log(factor)
                self._plan()
            if self._save_due():
                self._save()
            self._evaluate_if_due()
            self._measure_tasks_if_due()
        self._finish_save()
        return "interrupted" if self._stop_agreed() else "finished"

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """On an error in the block, let the checkpoint that is being written become complete first."""
        try:
            yield
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Finish this process's writing; its own errors are ignored then."""
        with contextlib.suppress(Exception):  # another process may be gone, and this one's writing wait for it
            self._complete_save(None if self.parts is None else SETTLE_SECONDS)

    def should_stop(self) -> bool:
        return self._callback_stopped or self._stop_requested()

    def _stop_agreed(self) -> bool:
        """Return whether any process was asked to stop."""
        stop = self.ranks.any(self.should_stop())
        if stop and self.ranks.world_size > 1 and not self._said_stop:
            self.display.print(NOTICE)
            self._said_stop = True
        return stop

    def elapsed(self) -> float:
        """Return the seconds that this run has trained, over all its processes."""
        return self.elapsed_before + time.monotonic() - self.started

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            if getattr(callback, hook)(self.run_files, *arguments):
                self._callback_stopped = True

    # -- one step ------------------------------------------------------------------------------------------------------

    def _lr_factor(self) -> float:
        return self.config.optim.factor(self.step, self.steps)

    def update(self, lr_factor: float) -> bool:
        """Make one update and keep its books. Return whether there was one: none if a stop comes before its batch."""
        began = time.perf_counter()
        batch = self._next_batch()
        if batch is None:
            return False
        result = self.training_step(batch, lr_factor)
        self.pending.append((result.loss, result.grad_norm))
        add_sums(self.objective_metrics, result.metrics)
        self.tokens_seen += result.tokens
        self.step += 1
        if self.device.type != "cuda":
            self._check(float(result.loss), float(result.grad_norm))
        seconds = time.perf_counter() - began
        self.seconds_since_log += seconds
        self.update_seconds += seconds
        self.tokens_since_log += result.tokens
        return True

    def _next_batch(self) -> Any:
        """Return the next batch that has something to learn from; None on a stop. TrainingError if there is none for
        long.

        Where the objective fails, the run is saved first.
        """
        for _ in range(MOST_EMPTY_BATCHES):
            try:
                batch = self.objective.next_batch(self.models, self.step)
            except Exception:
                if self.step and self.ranks.world_size == 1:  # others might not fail here, and not save with this one
                    self._save()
                raise
            if batch.num_rows and self.objective.normalizer(batch)[0] > 0:
                return batch
            if self._stop_agreed():
                return None
        name = type(self.objective).__name__
        raise TrainingError(
            f"stopped at step {self.step}: {name}.next_batch returned {MOST_EMPTY_BATCHES} batches in a row without "
            f"a row or with a loss count of 0.{self._kept()} Check the data and the filters of the objective."
        )

    def _announce_shrink(self, before: int, after: int) -> None:
        self.display.print(
            f"memory ran out at step {self.step + 1}: restarting the step with micro-batches of {after} instead of "
            f"{before}"
        )

    def out_of_memory_message(self, error: OutOfMemoryError) -> str:
        return self._out_of_memory(f"even one row at a time is too much ({_first_line(str(error))})")

    def _out_of_memory(self, what: str) -> str:
        return (
            f"memory ran out at step {self.step + 1}: {what}.{self._kept()} "
            "Free some memory and resume, or start a smaller model or a shorter --context; "
            "`gptsmith plan` shows what takes how much."
        )

    def _kept(self) -> str:
        self._settle()
        steps = self.store.steps()
        return f" The checkpoint {self.store.path(steps[-1])} is intact." if steps else " There is no checkpoint yet."

    def _check(self, loss: float, norm: float) -> None:
        """Raise DivergedError if the loss is not finite or the objective says that it has diverged."""
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.training_step.scaler.is_enabled())
        self.history.add(loss)
        what = self.objective.diverged(self.history) if finite else "is not a number"
        if what is None:
            return
        if self.ranks.is_main:
            self.metrics.append(step=self.step, time=round(self.elapsed(), 3), loss=loss, grad_norm=norm)
        self._settle()
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
        """Re-plan the total number of steps from recent throughput so that the run meets its deadline.

        The learning rate follows the new plan.
        """
        if self.deadline is None or self.step == self.steps:
            return
        steps = self.deadline.plan(self.step, self.steps, self.update_seconds, self.elapsed(), self.eval_every)
        self.steps = self.ranks.broadcast(steps)  # clocks differ
        self.display.steps = self.steps

    @property
    def eval_every(self) -> int:
        """Steps between evaluations. Where a deadline allows many more steps than were planned at first, the interval
        grows, and not the number of evaluations."""
        loop = self.config.loop
        every, most = loop.eval_every, 2 * max(1.0, loop.steps / loop.eval_every)
        while self.deadline is not None and self.steps > most * every:
            every *= 2
        return every

    def _wait(self) -> None:
        """Wait for a GPU to finish. The time counts as that of updates, which so far were only queued."""
        began = time.perf_counter()
        synchronize(self.device)
        waited = time.perf_counter() - began
        self.seconds_since_log += waited
        self.update_seconds += waited

    def _log(self, lr_factor: float) -> None:
        self._wait()
        losses = [float(loss) for loss, _ in self.pending]
        norms = [float(norm) for _, norm in self.pending]
        if self.device.type == "cuda":
            for loss, norm in zip(losses, norms, strict=True):
                self._check(loss, norm)
        self.pending.clear()
        metrics = {name: float(part.total) / float(part.count) for name, part in self.objective_metrics.items()}
        self.objective_metrics.clear()
        if (metric := self.objective.selection.metric) in metrics:
            name = type(self.objective).__name__
            raise TrainingError(
                f"{name}.loss returned the metric {metric!r}, by which evaluations are compared. Rename one of them."
            )
        row = {
            "step": self.step,
            "time": round(self.elapsed(), 3),
            "loss": sum(losses) / len(losses),
            "lr": self.config.optim.lr * lr_factor,
            "grad_norm": sum(norms) / len(norms),
            "tokens": int(self.tokens_seen),
            "tokens_per_second": round(self.tokens_since_log / max(1e-9, self.seconds_since_log), 1),
            **metrics,
        }
        self.seconds_since_log = self.tokens_since_log = 0.0
        if not self.ranks.is_main:
            return
        self.metrics.append(**row)
        self.display.step(self.step, row)
        self._call("on_log", row)

    def _evaluation_due(self) -> bool:
        if self.step == 0:
            return self.objective.evaluates_start
        if self.step == self.steps:
            return True
        left = self.steps - self.step
        if self.deadline is not None and left < self.eval_every / 3:  # the last is near
            return False
        return self.step % self.eval_every == 0

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_due() or self._stop_agreed():
            return
        if self.ranks.on_main(self._is_evaluated):
            return
        began = time.monotonic()
        self.display.say("evaluating")
        if self.objective.shares_evaluation or self.ranks.layout.divides_model:
            values = self._evaluate()
        else:
            random = self.training_step.random_state()
            values = self.ranks.on_main(self._evaluate)
            if self.ranks.world_size > 1:  # the others have drawn nothing
                self.training_step.set_random_state(random)
        if self.config.loop.sample_tokens:
            self._gather()
        self.ranks.on_main(lambda: self._record_evaluation(values))
        if self.deadline is not None:
            self.deadline.record_evaluation(time.monotonic() - began)

    def _is_evaluated(self) -> bool:
        return evaluation_at(self.metrics.read(), self.step, self.objective.selection) is not None

    def _evaluate(self) -> dict[str, float] | None:
        objective: Any = self.objective
        if not objective.shares_evaluation and self.ranks.layout.divides_model and hasattr(objective, "should_stop"):
            # All compute the same together, and a stop of one alone would leave the others waiting.
            stop, objective.should_stop = objective.should_stop, lambda: False
            try:
                with self.training_step.autocast():
                    return self.objective.evaluate(self.models, self.training_step.micro_batch_size)
            finally:
                objective.should_stop = stop
        with self.training_step.autocast():
            return self.objective.evaluate(self.models, self.training_step.micro_batch_size)

    def _record_evaluation(self, values: dict[str, float] | None) -> None:
        """Write the metrics of an evaluation, and do what follows one."""
        row = None
        if values is not None:
            if self.objective.selection.metric not in values:
                raise TrainingError(
                    f"{type(self.objective).__name__}.evaluate returned {', '.join(values) or 'no metric'}, without "
                    f"{self.objective.selection.metric!r}, by which the best checkpoint is chosen.{self._kept()}"
                )
            row = {
                "step": self.step,
                "time": round(self.elapsed(), 3),
                "update_time": round(self.update_seconds, 3),
                "tokens": int(self.tokens_seen),
                **values,
            }
            self.metrics.append(**row)
            self.display.evaluation(self.step, row, self.objective.selection.metric)
        self.store.update_links()
        if not self.should_stop():
            self._call("on_evaluation", row or {"step": self.step})

    def _tasks_due(self) -> bool:
        if self.config.eval.tasks is None:
            return False
        every = self.config.eval.every
        return (
            self._evaluation_due() if every is None else self.step == self.steps or self.step % every == 0 < self.step
        )

    def _measure_tasks_if_due(self) -> None:
        """Measure the tasks, by the main process alone, unless that was done before the run was stopped."""
        if not self._tasks_due() or self._stop_agreed():
            return
        began = time.monotonic()
        self._gather()
        self.ranks.on_main(self._measure_tasks)
        if self.deadline is not None:  # what takes time at each evaluation is a part of it
            self.deadline.record_evaluation(self.deadline.eval_seconds + time.monotonic() - began)

    def _measure_tasks(self) -> None:
        if self.task_evaluation is None or any(
            row.get("step") == self.step and "tasks" in row for row in self.metrics.read()
        ):
            return
        self.display.say("measuring tasks")
        rows = self.task_evaluation.measure()
        self.metrics.append(step=self.step, time=round(self.elapsed(), 3), tasks=rows)
        self.display.tasks(self.step, rows)

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save_due(self) -> bool:
        """Return whether to save after this step: by the steps, before an evaluation, or by the time since the last."""
        by_steps = self.step % (self.config.loop.save_every or self.eval_every) == 0
        late = self.ranks.any(time.monotonic() - self.last_save > self.save_seconds)
        return by_steps or self._evaluation_due() or self._tasks_due() or late

    def _parts(self) -> Parts | None:
        """Return what writes this process's part of checkpoints; None where the main process writes them alone."""
        if not self.ranks.layout.divides_model or self.objective.restores_policy or lora_layers(self.model):
            return None
        if any(mapping.reordered is not None for mapping in weight_mappings(self.model.config)):
            return None  # rows of one process would be scattered over the files
        from gptsmith.distributed.checkpoint import Parts

        return Parts(self.model, self.optimizers, self.tokenizer, self.ranks)

    def _save(self) -> None:
        """Begin to write a checkpoint, unless there is one of this step."""
        if self.saved_step == self.step or self.ranks.on_main(lambda: self.step in self.store.steps()):
            return
        self._finish_save()
        self._wait()
        finite = all(bool(torch.isfinite(p).all()) for p in self.training_step.parameters)
        if self.ranks.any(not finite):
            self._check(math.nan, math.nan)
        objective = self.objective.state()
        values = {
            "schema": STATE_SCHEMA,
            "step": self.step,
            "steps": self.steps,
            "micro_batch_size": self.training_step.micro_batch_size,
            "tokens_seen": self.tokens_seen,
            "elapsed": self.elapsed(),
            "update_seconds": self.update_seconds,
            "pending": [(float(loss), float(norm)) for loss, norm in self.pending],
            "objective_metrics": {
                name: (float(part.total), float(part.count)) for name, part in self.objective_metrics.items()
            },
            "first_loss": self.history.first,
            "recent_loss": self.history.recent,
            "objective": objective.values,
            "scaler": self.training_step.scaler.state_dict(),
        }
        values = json.loads(json.dumps(values))  # lists and dictionaries go on changing
        tensors = self.training_step.random_state()
        for name, tensor in objective.tensors.items():  # an update changes parameters, the next batch anything else
            tensors[f"objective/{name}"] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()
        if self.parts is not None:
            self.saver.start(self.step, self.parts.write(self.store.path(self.step), values, tensors))
        else:
            self._begin_on_main(values, tensors)
        self.saved_step, self.is_read = self.step, False
        self.last_save, self.save_seconds = time.monotonic(), SAVE_SECONDS

    def _begin_on_main(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Let the main process write the checkpoint: of a divided model, a copy that is put together first."""
        update, step = self.training_step, self.step
        tensors |= {f"optimizer/{n}": t for n, t in self.optimizers.state_tensors(update.whole_tensor).items()}
        if self.objective.restores_policy:
            for p in update.parameters:
                if (whole := update.whole_tensor(p, p.detach())) is not None:
                    tensors[f"models/{self.optimizers.names[p]}"] = whole
        models, state = update.gather(), TrainState(values, tensors)

        def begin() -> None:
            model = self.objective.saved(models)
            self.saver.start(step, lambda read: self.store.write(step, model, self.tokenizer, state, read))

        self.ranks.on_main(begin)

    def _before_update(self) -> None:
        """Wait until the checkpoint that is being written has been read, on all processes."""
        if not self.is_read:
            self._on_writers(self.saver.wait_until_read)
            self.is_read = True

    def _note_saved(self) -> None:
        """Do what follows a checkpoint, if one has become complete."""
        if self.saver.done:
            with self.ranks.explained():
                self._complete_save()

    def _finish_save(self) -> None:
        """Wait until the checkpoint that is being written is complete, on all processes."""
        self._on_writers(self._complete_save)
        self.is_read = True

    def _on_writers(self, work: Callable[[], None]) -> None:
        """Do `work` in the processes that write, while the others wait, however long it takes."""
        if self.parts is None:
            self.ranks.on_main(work)
            return
        with self.ranks.explained():
            work()
        self.ranks.barrier()

    def _gather(self) -> None:
        """Put a divided model together in the main process, once the copy that is being saved has been read."""
        self._before_update()
        self.training_step.gather()

    def _complete_save(self, timeout: float | None = None) -> None:
        step, path = self.saver.step, self.saver.finish(timeout)
        if path is not None and self.ranks.is_main:
            self.store.rotate(self.config.loop.keep_checkpoints)
            self._call("on_save", step, path)

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint's state (the policy's weights are loaded already)."""
        values, tensors, step = migrated(state.values), state.tensors, self.training_step

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        try:
            self.objective.load_state(TrainState(values["objective"], part("objective/")))
            if self.objective.restores_policy:
                with torch.no_grad():
                    for p in step.parameters:
                        p.copy_(step.part_of(p, tensors[f"models/{self.optimizers.names[p]}"]))
            self.training_step.scaler.load_state_dict(values["scaler"])
            self.optimizers.load_state_tensors(part("optimizer/"), step.part_of)
            self.training_step.set_random_state(tensors)
            self.step = int(values["step"])
            if self.deadline is not None:  # which has planned again; otherwise as the configuration says
                self.steps = int(values["steps"])
            self.tokens_seen = float(values["tokens_seen"])
            size = min(self.training_step.micro_batch_size, int(values["micro_batch_size"]))
            self.training_step.micro_batch_size = size
            self.pending = [(torch.tensor(loss), torch.tensor(norm)) for loss, norm in values["pending"]]
            self.objective_metrics = {
                name: Sum(torch.tensor(total, device=self.device), count)
                for name, (total, count) in values["objective_metrics"].items()
            }
            self.history = LossHistory(values["first_loss"], values["recent_loss"])
            self.elapsed_before = float(values["elapsed"])
            self.update_seconds = float(values["update_seconds"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint's train/ folder lacks {error}; it is of another version.") from None


def migrated(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a checkpoint's train/state.json in the present schema.

    Schema 1, without the key, had `targets` and `extra` (lists of values per micro-batch).
    """
    schema = values.get("schema", 1)
    if schema == STATE_SCHEMA:
        return values
    if schema != 1:
        raise CheckpointError(
            f"the checkpoint's train/state.json has schema {schema!r}; this version reads 1 and {STATE_SCHEMA}. "
            "Resume with the version of gptsmith that wrote it."
        )
    values = dict(values)
    if "targets" in values:
        values["tokens_seen"] = values.pop("targets")
    if "extra" in values:
        values["objective_metrics"] = {name: (sum(v), len(v)) for name, v in values.pop("extra").items() if v}
    return values


def _first_line(text: str) -> str:
    return (text.strip() or "out of memory").splitlines()[0]
