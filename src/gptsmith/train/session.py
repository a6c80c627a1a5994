"""Everything that one process needs to train a run: model, optimizers, trainer, signals, display."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gptsmith.checkpoint import CheckpointStore, load_train_state
from gptsmith.config import to_dict
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.errors import (
    CheckpointError,
    DivergedError,
    GptsmithError,
    LostProcessError,
    ProcessError,
    TrainingError,
    UsageError,
)
from gptsmith.formats.hf import load_model_weights, read_config
from gptsmith.formats.peft import load_adapter
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.initial import draw_seed
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.runtime import compiler_available, out_of_memory, return_freed_memory, synchronize
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.adapter import is_on
from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.budget.parse import Budget
from gptsmith.train.callbacks import Callback
from gptsmith.train.compile import compile_blocks, undo_compile, worth_compiling
from gptsmith.train.config import EXACT_PARTS, PolicyConfig, RunConfig
from gptsmith.train.display import Display
from gptsmith.train.forecast.memory import fit_into_memory
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.pretrain import BatchStream, Pretrain
from gptsmith.train.samples import Samples
from gptsmith.train.signals import StopSignal
from gptsmith.train.step import OutOfMemoryError, TrainingStep
from gptsmith.train.task_evaluation import TaskEvaluation
from gptsmith.train.trainer import Outcome, Trainer


class RunResult(NamedTuple):
    """How training ended; `signal` is the number of the signal that interrupted it, or 0."""

    run: Run
    outcome: Outcome
    signal: int


class Session:
    """One process's share of a run.

    make_model: builds the policy for the seed that is set. is_new: whether that is a `Transformer` with new weights, of
    which a process that has a part of the model makes its part alone. began: when a budget of time started
    (`time.monotonic()`); None for a resumed run, whose clock starts now.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        make_model: Callable[[], Transformer],
        objective: Objective[Any],
        device: torch.device,
        *,
        stop: StopSignal | None = None,
        callbacks: Sequence[Callback] = (),
        is_new: bool = False,
        began: float | None = None,
        ranks: DistributedContext = ALONE,
    ) -> None:
        self.run, self.config, self.tokenizer, self.ranks = run, config, tokenizer, ranks
        self.objective = objective
        self.stop = StopSignal() if stop is None else stop
        if config.loop.compile == "on" and not objective.fixed_shapes:
            raise UsageError("--compile on: the rows of this method vary in length, so nothing can be compiled.")
        self.stop.announces = ranks.world_size == 1
        ranks.check_same({"model": repr(to_dict(model_config)), "data": str(run.part("data").get("fingerprint"))})
        # As the run has trained so far, if it has; smaller where that does not fit into memory here and now.
        precision = run.info["precision"]
        share, micro = config.loop.batch_size // ranks.data_size, run.info.get("micro_batch_size")
        rows = min(share, micro or config.loop.micro_batch_size or share)
        if ranks.exact:
            rows = min(rows, config.loop.batch_size // EXACT_PARTS)
            torch.set_num_threads(1)  # how products are divided among threads changes their bits
        fit = ranks.broadcast(
            fit_into_memory(
                config if ranks.data_size == 1 else config.replace(batch_size=share, micro_batch_size=None),
                model_config,
                device=device,
                precision=precision,
                objective=objective,
                micro_batch_size=rows,
                activation_checkpointing=run.info.get("activation_checkpointing"),
                processes=ranks.local_world_size,
                model_parts=ranks.layout.fsdp * ranks.layout.tp,
            )
        )
        run.info["micro_batch_size"] = fit.micro_batch_size
        run.info["activation_checkpointing"] = fit.activation_checkpointing
        run.info["selection"] = objective.selection._asdict()
        torch.manual_seed(config.loop.seed)
        divided = ranks.layout.divides_model
        # The main process samples and evaluates with the whole model, on its CPU.
        in_parts = divided and is_new and not ranks.is_main and isinstance(objective, Pretrain | BatchStream)
        self.make_model = make_model
        if in_parts:
            self.model = Transformer(model_config, dropout=config.loop.dropout, initialize=False)
            initial_seed = draw_seed()
        else:
            self.model = make_model()
        if divided and not is_new:
            ranks.check_same({"initial weights": fingerprint(self.model)})
        if not divided:
            self.model.to(device)
        self.model.activation_checkpointing = fit.activation_checkpointing
        self.store = CheckpointStore(run.directory, base=config.init.init if self._saves_adapter() else None)
        self.display = Display(config.loop.steps)
        self.training_step: TrainingStep[Any] = TrainingStep.build(
            self.model, objective, config, precision=precision, micro_batch_size=fit.micro_batch_size, ranks=ranks
        )
        if in_parts:
            from gptsmith.distributed.initial import initialize_shards

            initialize_shards(self.model, ranks.layout.coordinates(ranks.rank), initial_seed)
        if divided and is_new:
            ranks.check_same({"random numbers": str(zlib.crc32(torch.get_rng_state().numpy().tobytes()))})
        self.whole = self.training_step.whole.policy
        prompts = objective.sample_prompts(self.training_step.models)
        texts = config.method.stop if isinstance(config.method, PolicyConfig) else ()
        self.samples = Samples(config.loop, self.whole, tokenizer, self.display, self.stop, prompts, texts)
        self.callbacks = [self.samples, *callbacks] if ranks.is_main else []
        self.trainer = Trainer(
            config=config,
            run=run,
            training_step=self.training_step,
            tokenizer=tokenizer,
            store=self.store,
            should_stop=self.stop,
            display=self.display,
            deadline=self._deadline(began),
            callbacks=self.callbacks,
            task_evaluation=self._task_evaluation(),
        )

    def _task_evaluation(self) -> TaskEvaluation | None:
        """Return what measures the tasks of the configuration, in the main process."""
        if self.config.eval.tasks is None:
            return None
        if self.config.eval.every is not None and self.config.auto.budget is not None:
            raise UsageError("--eval.every: a --budget plans the evaluations, at each of which tasks are measured.")
        made: list[TaskEvaluation] = []
        self.ranks.on_main(lambda: made.append(TaskEvaluation(self.config, self.whole, self.tokenizer)))
        return made[0] if made else None

    def _saves_adapter(self) -> bool:
        return is_on(self.config.adapter) and not self.objective.restores_policy

    def _deadline(self, began: float | None) -> Deadline | None:
        """Return the deadline of a budget of time."""
        text = self.config.auto.budget
        budget = None if text is None else Budget.parse(text)
        if budget is None or budget.kind != "seconds":
            return None
        plan = self.run.part("plan")
        return Deadline(
            budget.amount,
            before=0.0 if began is None else time.monotonic() - began,
            eval_seconds=plan["eval_seconds"],
            teardown_seconds=plan["teardown_seconds"],
        )

    def restore(self) -> int:
        """Load the newest intact checkpoint and return its step."""
        directory = self.ranks.on_main(self.store.newest_intact)
        if self.trainer.parts is not None:
            self._check_architecture(directory)
            self.trainer.parts.load_weights(directory)
            return self._restore_state(directory)
        model = self.make_model() if self.ranks.layout.divides_model else self.model
        if self.training_step.objective.restores_policy:
            pass  # by the trainer
        elif is_on(self.config.adapter):
            load_adapter(directory, model)
        else:
            self._check_architecture(directory)
            load_model_weights(model, directory)
        if model is not self.model:
            from gptsmith.distributed.parallel import load_full_state

            load_full_state(self.model, dict(model.named_parameters()), self.ranks.mesh)
            buffers = dict(model.named_buffers())  # a router's, which is not trained
            for target in (self.model, self.whole):
                for key, buffer in target.named_buffers():
                    buffer.copy_(buffers[key])
        return self._restore_state(directory)

    def _check_architecture(self, directory: Path) -> None:
        if read_config(directory) != self.model.config:
            raise CheckpointError(
                f"{directory} has another architecture than {self.run.directory / 'run.json'} describes. "
                "Start a new run to change the model."
            )

    def _restore_state(self, directory: Path) -> int:
        self.trainer.restore(load_train_state(directory))
        self.display.first_step, self.display.steps = self.trainer.step, self.trainer.steps
        return self.trainer.step

    def train(self, on_end: Callable[[Path], object]) -> RunResult:
        """Train to the end or until a stop, and record the outcome. `on_end(directory)` is called either way."""
        # Where one of several processes has ended, TorchElastic sends SIGTERM to the others: they say why first.
        with self.stop if self.ranks.world_size > 1 else contextlib.nullcontext():
            return self._train(on_end)

    def _train(self, on_end: Callable[[Path], object]) -> RunResult:
        try:
            if "compile" not in self.run.info:  # decided once: a resumed run computes as the run did before
                self._record(compile=self.ranks.on_main(self._should_compile))
            with self.stop, self.display:
                if self.run.info["compile"]:
                    self._compile()
                self._begin_together()
                if self.ranks.exact and self.trainer.step < self.trainer.steps:
                    self._show_cost_of_exactness()
                outcome = self.trainer.run()
                self._record(status=outcome, ended=now(), seconds=round(self.trainer.elapsed(), 1))
                if outcome == "finished":
                    if self.config.loop.sample_tokens:
                        self.training_step.gather()
                    self.ranks.on_main(lambda: self.samples.write_final(self.run, self.trainer.step))
        except BaseException as error:
            self.ranks.fail(error)
            status = "diverged" if isinstance(error, DivergedError) else "failed"
            with contextlib.suppress(Exception):  # the disk or the memory may be full: what matters is the message
                self._record(status=status, ended=now(), error=_first_line(error))
                if isinstance(error, LostProcessError) or (isinstance(error, ProcessError) and error.lost):
                    self._record(lost_process=True)  # so that it can go on if the processes are started again
                if isinstance(error, TrainingError) and self.ranks.is_main:
                    on_end(self.run.directory)
            for callback in self.callbacks:
                with contextlib.suppress(Exception):
                    callback.on_end(self.run, status)
            raise
        self.ranks.on_main(lambda: self._end(on_end))
        for callback in self.callbacks:
            callback.on_end(self.run, outcome)
        return RunResult(self.run, outcome, max(self.ranks.gather(self.stop.number)))

    def _end(self, on_end: Callable[[Path], object]) -> None:
        return_freed_memory()  # the report loads the model once more
        try:
            on_end(self.run.directory)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            note(
                "not enough memory to write the report; the run itself is complete. "
                f"Write it with: gptsmith report {self.run.directory}"
            )

    def _record(self, **values: Any) -> None:
        """Change entries of run.json, which the main process writes."""
        if self.ranks.is_main:
            self.run.update(**values)
        else:
            self.run.info.update(values)

    def _begin_together(self) -> None:
        """Give all processes the main one's weights and random numbers, and the smallest micro-batch of any."""
        self.ranks.barrier()  # compiling takes longer on one than on another
        step = self.training_step
        step.micro_batch_size = min(self.ranks.gather(step.micro_batch_size))
        if self.ranks.world_size == 1:
            return
        step.set_random_state(self.ranks.broadcast(step.random_state()))
        if self.ranks.layout.divides_model:  # all began with the same weights, and have read the same files
            return
        with torch.no_grad():
            if not self.ranks.is_main:
                for p in step.parameters:
                    p.zero_()
            self.ranks.sum(*step.parameters)

    def _compile(self) -> None:
        """Compile the blocks; without them if that fails."""
        self.display.say("compiling")
        began = time.monotonic()
        compile_blocks(self.model)
        try:
            self._probe()
        except TrainingError:
            raise
        except Exception as error:  # a compiler, its headers or its runtime can fail in many ways
            undo_compile(self.model)
            if self.config.loop.compile == "on":
                raise GptsmithError(f"--compile on failed: {_first_line(error)} Use --compile auto or off.") from error
            self.display.print(f"note: compiling failed, continuing without: {_first_line(error)}")
            self._record(compile=False)
        self.trainer.elapsed_before += time.monotonic() - began

    def _should_compile(self) -> bool:
        """Return whether to compile: where it is possible and saves clearly more time than it costs."""
        device = self.training_step.device
        if self.ranks.layout.divides_model:
            return False
        if self.config.loop.compile != "auto":
            return self.config.loop.compile == "on"
        if not compiler_available(device) or not self.training_step.objective.fixed_shapes:
            return False
        seconds = min(self._probe() for _ in range(3))
        seconds *= self.training_step.batch_size // self.training_step.micro_batch_size
        return worth_compiling(seconds * (self.trainer.steps - self.trainer.step), device)

    def _show_cost_of_exactness(self) -> None:
        """Say how much longer a share of a batch takes in parts of a fixed size than at once."""
        step = self.training_step
        rows, parts = step.micro_batch_size, step.batch_size // step.micro_batch_size
        in_parts = parts * min(self._probe() for _ in range(2))
        step.micro_batch_size = step.batch_size
        at_once = min(self._probe() for _ in range(2))
        step.micro_batch_size = rows
        self.display.print(
            f"--exact: {parts} parts of {rows} sequences in each process take {in_parts:.3g} s for an update, at once "
            f"{at_once:.3g} s; sums are gathered, {self.ranks.world_size} times the bytes"
        )

    def _probe(self) -> float:
        """Return the seconds of one micro-batch's forward and backward pass.

        Leaves no trace in gradients and random numbers; micro-batches become smaller where memory runs out.
        """
        step, objective = self.training_step, self.training_step.objective
        while True:
            with step.probe():
                batch = objective.example_batch(step.micro_batch_size)
                count = objective.normalizer(batch)[0]
                began = time.perf_counter()
                try:
                    step.accumulate(batch, count)
                    synchronize(step.device)
                    return time.perf_counter() - began
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    reason = str(error)
            try:
                step.shrink(reason)
            except OutOfMemoryError as error:
                raise TrainingError(self.trainer.out_of_memory_message(error)) from error


def fingerprint(model: nn.Module) -> str:
    """Return what is equal for equal weights."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().flatten().view(torch.uint8).numpy().tobytes() if p.numel() else b"")
    return digest.hexdigest()


def now() -> str:
    """Return the present time in ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
