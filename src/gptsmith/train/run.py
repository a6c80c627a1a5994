"""A training run on disk: how it is started and resumed.

runs/bard/run.json         the resolved configuration, the model, the data, the machine, the outcome
runs/bard/tokenizer/       made before the first step
runs/bard/metrics.jsonl    losses, learning rate, speed
runs/bard/samples.jsonl    what the model wrote along the way
runs/bard/checkpoints/     model directories, each with its train/ folder
runs/bard/report.html
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import gptsmith
from gptsmith.checkpoint import CheckpointStore
from gptsmith.config import from_dict, to_dict
from gptsmith.data.sources import Spec
from gptsmith.distributed.context import ALONE, DistributedContext, launch_name, restarts
from gptsmith.errors import CheckpointError, GptsmithError, TokenizerError, TrainingError, UsageError, first_few
from gptsmith.log import JsonLines, note
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.run_directory import SCHEMA, Run, find_runs, read_run
from gptsmith.runtime import (
    ChosenPrecision,
    choose_device,
    choose_precision,
    compiler_available,
    describe_machine,
    keep_freed_memory,
)
from gptsmith.storage import explain_os_errors, remove_temporaries
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.adapter import is_on
from gptsmith.train.budget import tuning
from gptsmith.train.budget.machine import this_machine
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import Plan, choose, settled
from gptsmith.train.budget.recipe import Text as TextSize
from gptsmith.train.callbacks import Callback
from gptsmith.train.config import PictureConfig, RunConfig, with_options
from gptsmith.train.forecast.layouts import choose_layout
from gptsmith.train.init import (
    Init,
    adapted_to_init,
    check_fits,
    load_init,
    make_model,
    refuse_adapter,
    refuse_options_of_new_models,
    warm_start,
    with_tokens,
)
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.pretrain import BatchStream
from gptsmith.train.objectives.registry import (
    Method,
    ObjectiveContext,
    ObjectiveFactory,
    Prepared,
    TrainingData,
    as_configured,
    find_method,
    import_reference,
    reference_to,
)
from gptsmith.train.row_files import RowFiles
from gptsmith.train.session import RunResult, Session, now
from gptsmith.train.signals import StopSignal
from gptsmith.train.summary import summary
from gptsmith.train.variation import ModelFactory, check_saveable

# Options that can differ between a run and its resumption without changing what it computes.
CHANGEABLE = frozenset(
    {
        *("eval_every", "save_every", "log_every", "keep_checkpoints", "sample_tokens", "sample_prompt", "device"),
        *("steps", "val"),  # where the schedule allows, and where the text is the same: both are checked
        *("processes", "process_timeout", "parallel"),
        *("eval.tasks", "eval.every", "eval.shots", "eval.limit"),
    }
)


@dataclass(frozen=True)
class Extras:
    """What a run made from Python can have of its own, beyond the configuration."""

    objective: str | ObjectiveFactory | None = None
    """A registered name, `module:name`, or a function that makes an objective of an `ObjectiveContext`. Default:
    pretraining, or that of the resumed run."""
    batches: Iterable[Any] | None = None
    """Batches for pretraining instead of a text; see `BatchStream`."""
    model: ModelConfig | ModelFactory | None = None
    """The model's configuration, or a function that makes the model of a `ModelConfig` and a dropout probability."""
    tokenizer: Tokenizer | None = None
    """The tokenizer, where neither the text nor `init` brings one."""
    callbacks: Sequence[Callback] = field(default_factory=tuple)

    @property
    def factory(self) -> ModelFactory | None:
        """The function that makes the model."""
        return None if isinstance(self.model, ModelConfig) else self.model


def choose_directory(out: Path | None, name: str) -> Path:
    """Return the directory of a new run: `out`, which must be empty or absent, or the first free runs/NAME[-N].

    The latter is made at once, so that runs that are started at the same time get directories of their own.
    """
    if out is None:
        runs = Path("runs")
        with explain_os_errors(runs):
            runs.mkdir(exist_ok=True)
            for number in itertools.count(1):
                path = runs / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    break
        return path
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run. Continue it with `gptsmith train --resume {out}`, or choose another --out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory. Choose another --out.")
    return out


def start(
    data: Spec | None,
    config: RunConfig,
    out: Path | None = None,
    *,
    overrides: Collection[str] = (),
    began: float | None = None,
    on_end: Callable[[Path], object] = lambda directory: None,
    extras: Extras = Extras(),
    ranks: DistributedContext = ALONE,
) -> RunResult:
    """Prepare `data`, make a run directory and train. `on_end(directory)` is called however training ends.

    Where TorchElastic has started the processes again, because one of them had ended, the run continues instead.

    overrides: flat names of options set by the user, which a budget does not change (`gptsmith.train.budget.recipe`).
    began: when a budget of time started (`time.monotonic()`); now, by default.
    ranks: the processes that train; all call this function.
    Raises GptsmithError for anything wrong with the data, the options or the directory; nothing is left behind then.
    """
    began = time.monotonic() if began is None else began
    if config.auto.budget is not None:
        Budget.parse(config.auto.budget)  # before any work is done for an invalid one
    _check_processes(config, ranks)
    if restarts() and (directory := ranks.on_main(lambda: _run_of_this_launch(out))) is not None:
        return resume(directory, on_end=on_end, extras=extras, ranks=ranks)
    objective_name, method = find_method(extras.objective or "pretrain")
    if config.init.init is not None:
        refuse_options_of_new_models(config)
    elif method.needs_init:
        raise UsageError(f"{objective_name} starts from a model: give one.")
    else:
        refuse_adapter(config, overrides)
    opened = None if data is None else ranks.main_first(lambda: method.open_data(data, config))
    directory = ranks.on_main(lambda: choose_directory(out, _default_name(opened, objective_name)))
    try:
        return _start_in(
            directory,
            opened,
            config,
            objective_name,
            method,
            overrides,
            began,
            on_end=on_end,
            extras=extras,
            ranks=ranks,
        )
    except BaseException:
        if out is None and ranks.is_main:
            _remove_empty(directory, directory.parent)
        raise


def _run_of_this_launch(out: Path | None) -> Path | None:
    """Return the run that processes of the same torchrun have begun, if they have come so far."""
    if out is not None:
        for name in ("tokenizer", ".lock"):  # what is there before run.json
            if not (out / "run.json").exists() and (out / name).exists():
                shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        return out if (out / "run.json").exists() else None
    begun = [run for run in find_runs("runs") if run.info.get("launch") == launch_name()]
    return begun[-1].directory if begun else None


def _ended_before_restart(run: Run) -> RunResult | None:
    """Return how a run ended whose processes have been started again, if it did; raise what it failed with, if not for
    the loss of a process: it would fail again."""
    if not restarts() or run.info.get("launch") != launch_name() or run.status == "running":
        return None
    if run.status == "finished":  # and a process ended after that
        return RunResult(run, "finished", 0)
    if run.status == "interrupted":
        return RunResult(run, "interrupted", signal.SIGTERM)
    if not run.info.get("lost_process"):
        raise TrainingError(str(run.info.get("error")))
    return None


def _remove_empty(*directories: Path) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # it has content
            directory.rmdir()


def _start_in(
    directory: Path,
    opened: TrainingData | None,
    config: RunConfig,
    objective_name: str,
    method: Method,
    overrides: Collection[str],
    began: float,
    *,
    on_end: Callable[[Path], object],
    extras: Extras,
    ranks: DistributedContext,
) -> RunResult:
    """Prepare the data and train in `directory`; the arguments are as in `start`."""
    device = ranks.device(choose_device(config.loop.device))
    precision = choose_precision(config.loop.precision, device)
    if config.loop.compile == "on" and not compiler_available(device):
        raise GptsmithError("--compile on needs a C++ compiler; g++ and clang++ are missing. Use --compile auto.")
    init: Init | None = None
    if config.init.init is not None:
        asked = config  # for the closure
        init = ranks.main_first(lambda: method.adapt_init(load_init(str(asked.init.init)), asked, opened))
        config, opened = adapt_to_init(config, overrides, init, opened, method, objective_name)
        tokenizer = init.tokenizer
    elif config.vision != PictureConfig():
        raise UsageError("a new model reads no pictures: leave out the --vision options. See gptsmith vision --help.")
    elif extras.tokenizer is not None:
        tokenizer = extras.tokenizer
    elif opened is not None:
        config, tokenizer = ranks.on_main(lambda: opened.make_tokenizer(config, overrides))
    else:
        raise UsageError("a run without a text needs a tokenizer: give tokenizer=…, or a model with init=….")
    dataset = None if opened is None else ranks.main_first(lambda: opened.prepare(config, tokenizer))
    config = method.settle(config, overrides, dataset)
    keep_freed_memory()
    plan = None
    if config.auto.budget is not None or config.auto.depth is not None:
        if dataset is None:
            raise UsageError("a budget or a depth needs a text, whose length its rules depend on. Set --steps instead.")
        text, taken = dataset, config  # for the closure
        plan = ranks.on_main(
            lambda: planned(
                taken,
                overrides,
                method,
                text,
                tokenizer,
                init,
                device,
                precision,
                spent=time.monotonic() - began,
                processes=ranks.world_size,
            )
        )
        config = plan.config
        for reason in plan.reasons:
            note(reason)
        config.check_processes(planned=True)
    if isinstance(extras.model, ModelConfig):
        model_config = extras.model
        check_fits(model_config, tokenizer, config)
    elif init is not None:
        model_config = init.config
    else:
        model_config = config.model.build(tokenizer.vocab_size, config.loop.context)
    info = _describe(config, model_config, opened, dataset, objective_name, precision, extras, plan)
    session = _session(
        Run(directory, info), config, tokenizer, model_config, dataset, init, device, method, extras, ranks, began=began
    )
    if not ranks.is_main:
        return session.train(on_end)
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        tokenizer.save(directory / "tokenizer")
        session.run.update(parameters=session.model.num_parameters())
        note(summary(session, config, dataset))
        return session.train(on_end)


def adapt_to_init(
    config: RunConfig,
    overrides: Collection[str],
    init: Init,
    opened: TrainingData | None,
    method: Method,
    objective_name: str,
) -> tuple[RunConfig, TrainingData | None]:
    """Return the configuration and the data of a run that starts from a model. UsageError if it does not fit."""
    config = adapted_to_init(config, overrides, init, lora=method.trains_adapter, longest=method.longest)
    method.check_pictures(objective_name, config, init)
    return config, opened.for_model(init.config) if isinstance(opened, RowFiles) else opened


def planned(
    config: RunConfig,
    overrides: Collection[str],
    method: Method,
    dataset: Prepared,
    tokenizer: Tokenizer,
    init: Init | None,
    device: torch.device,
    precision: ChosenPrecision,
    *,
    spent: float,
    processes: int = 1,
) -> Plan:
    """Return the plan of a run within a budget, or of a depth. spent: seconds of the budget that have passed.

    processes: how many will share each batch; their speed is taken to be so many times this one's.
    """
    size = dataset.record()
    text = TextSize(size["train_tokens"], size["val_tokens"], tokenizer.vocab_size, init.config if init else None)
    if tuning.has_rules(config):
        least = 0 if {*overrides} & {"batch_size", "micro_batch_size"} else tuning.LEAST_UPDATES
        text = replace(text, most_passes=tuning.MOST_PASSES, least_updates=least)
    machine = this_machine(device, precision, config.loop.compile)
    if processes > 1:
        alone = machine.seconds_per_update
        machine = replace(machine, seconds_per_update=lambda *arguments: alone(*arguments) / processes)
    # Of a method with rules of its own (`settle`), a budget chooses the steps alone.
    fixed = overrides if method.settle is as_configured else settled(config)
    return choose(config, fixed, text, machine, spent=spent)


def _session(
    run: Run,
    config: RunConfig,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    dataset: Prepared | None,
    init: Init | None,
    device: torch.device,
    method: Method,
    extras: Extras,
    ranks: DistributedContext,
    *,
    began: float | None = None,
) -> Session:
    """Return the session of a run, new or resumed. init: where its weights come from, unless they are new or restored
    from a checkpoint. Raises UsageError for a model variation that no layout can save."""
    build = functools.partial(make_model, model_config, config, extras.factory, init)
    if extras.model is not None or (init is None and config.model.family not in FAMILIES.builtin):
        check_saveable(build())
    stop = StopSignal()
    if extras.batches is not None:
        objective: Objective[Any] = BatchStream(
            extras.batches, seq_len=config.loop.context, vocab_size=tokenizer.vocab_size
        )
    else:
        objective = method.objective(ObjectiveContext(config, tokenizer, dataset, stop, ranks, run.directory))
    share_model(config, model_config, objective, device, run.info["precision"], ranks)
    session = Session(
        run,
        config,
        tokenizer,
        model_config,
        build,
        objective,
        device,
        stop=stop,
        callbacks=extras.callbacks,
        is_new=extras.factory is None and init is None and model_config.vision is None,
        began=began,
        ranks=ranks,
    )
    if init is not None and config.init.warm_start:
        warm_start(session.training_step.optimizers, init, config, session.training_step.part_of)
    return session


def share_model(
    config: RunConfig,
    model_config: ModelConfig,
    objective: Objective[Any],
    device: torch.device,
    precision: ChosenPrecision,
    ranks: DistributedContext,
) -> None:
    """Let the processes share the model as the configuration says. UsageError where they cannot."""
    layout = config.parallel.layout(ranks.world_size)
    if layout is None:
        layout = ranks.on_main(
            lambda: choose_layout(
                config,
                model_config,
                processes=ranks.world_size,
                local=ranks.local_world_size,
                device=device,
                precision=precision,
                objective=objective,
            )
        )
    layout.check(model_config)
    if layout.divides_model:
        if not objective.can_divide:
            raise UsageError(
                f"--parallel {layout}: this method samples answers, so each process needs the whole model: dp."
            )
        if config.loop.compile == "on":
            raise UsageError(f"--compile on with --parallel {layout}: a divided model is not compiled.")
    ranks.arrange(layout, device, exact=config.parallel.exact)


def resume(
    directory: Path,
    config: RunConfig | None = None,
    *,
    data: Spec | None = None,
    on_end: Callable[[Path], object] = lambda directory: None,
    extras: Extras = Extras(),
    ranks: DistributedContext = ALONE,
) -> RunResult:
    """Continue the run in `directory` from its newest intact checkpoint, bit for bit.

    config: refused where it differs from the run's own in anything that changes what has been computed so far. More
        steps extend a run, even a finished one, if its learning rate so far would have been the same.
    data: where the text is now, if it has moved (all files of it).
    extras: as the run was started with; by default they are found by the names in run.json.
    ranks: the processes that train, as many as before or not; all call this function.
    """
    run = read_run(directory)
    if (ended := ranks.on_main(lambda: _ended_before_restart(run))) is not None:
        return ended
    saved = run_config_of(run)
    if config is not None:
        _refuse_changes(saved, config)
    config = config or saved.replace(processes=ranks.world_size)
    _check_processes(config, ranks)
    store = CheckpointStore(directory)
    if run.status == "finished" and store.steps() and config.loop.steps == saved.loop.steps:
        raise UsageError(
            f"{directory} has already finished all {saved.loop.steps} steps. {_how_to_extend(directory, saved)}"
        )
    extras = _completed(extras, run)
    if run.info.get("objective") == reference_to(BatchStream) and extras.batches is None:
        raise UsageError(
            f"{directory} was trained on batches from Python. Resume it there: "
            f"gptsmith.fit(batches, resume={str(directory)!r})."
        )
    tokenizer = Tokenizer.load(directory / "tokenizer")
    _, method = find_method(extras.objective or "pretrain")
    try:
        model_config = from_dict(ModelConfig, run.info["model"])
    except (UsageError, KeyError) as error:
        raise CheckpointError(f"{directory / 'run.json'} is damaged: its model cannot be read: {error}") from None
    dataset = ranks.main_first(lambda: _prepare_again(run, config, tokenizer, model_config, method, data))
    device = ranks.device(choose_device(config.loop.device))
    keep_freed_memory()
    with _locked(directory) if ranks.is_main else contextlib.nullcontext():
        steps = ranks.on_main(store.steps)
        init = None
        if config.init.init is not None and (not steps or is_on(config.adapter)):
            init = ranks.main_first(lambda: with_tokens(load_init(str(config.init.init)), tokenizer))
        session = _session(run, config, tokenizer, model_config, dataset, init, device, method, extras, ranks)
        step = session.restore() if steps else 0
        if config.loop.steps != saved.loop.steps:
            _check_extension(directory, saved, config, step)
        if not ranks.is_main:
            return session.train(on_end)
        store.delete_after(step)
        remove_temporaries(directory)
        for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
            if (directory / name).exists():
                JsonLines(directory / name).truncate_after(step)
        note(summary(session, config, dataset))
        note(f"resuming {directory} at step {step} of {session.trainer.steps}")
        for name in ("error", "lost_process", "launch"):
            run.info.pop(name, None)
        run.info.update({"launch": launch_name()} if launch_name() is not None else {})
        run.update(status="running", config=to_dict(config))
        return session.train(on_end)


def run_config_of(run: Run) -> RunConfig:
    """Return a run's configuration. CheckpointError where its run.json lacks what resuming needs."""
    path = run.directory / "run.json"
    try:
        for part, keys in ((run.info, ("status", "precision")), (run.info["data"], ("spec", "val", "fingerprint"))):
            for key in keys:
                _ = part[key]
        _, method = find_method(_objective_of(run))
        return with_options(RunConfig(method=method.options()), run.info["config"])
    except UsageError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from None


def _check_processes(config: RunConfig, ranks: DistributedContext) -> None:
    """Raise UsageError unless the processes that there are can share the run, and all mean the same one."""
    if config.parallel.processes != ranks.world_size:
        raise UsageError(
            f"processes={config.parallel.processes}, but {ranks.world_size} are here. In Python, start your script "
            "with torchrun --nproc-per-node N and leave processes out; `gptsmith train --processes N` starts them."
        )
    config.check_processes()
    ranks.check_same({"version of gptsmith": gptsmith.__version__, "configuration": repr(to_dict(config))})


# The data of a run ---------------------------------------------------------------------------------------------------


def _default_name(data: TrainingData | None, objective: str) -> str:
    return data.name if data is not None else objective.rpartition(":")[2].rpartition(".")[2].lower()


def _describe(
    config: RunConfig,
    model_config: ModelConfig,
    opened: TrainingData | None,
    dataset: Prepared | None,
    objective_name: str,
    precision: str,
    extras: Extras,
    plan: Plan | None,
) -> dict[str, Any]:
    """Return the record of a run that begins, for run.json."""
    info: dict[str, Any] = {
        "schema": SCHEMA,
        "version": gptsmith.__version__,
        "status": "running",
        "started": now(),
        "config": to_dict(config),
        "model": to_dict(model_config),
        "data": _describe_data(opened, dataset),
        "objective": objective_name if extras.batches is None else reference_to(BatchStream),
        "precision": precision,
        "machine": describe_machine(),
    }
    if launch_name() is not None:
        info["launch"] = launch_name()
    if extras.factory is not None:
        info["model_factory"] = reference_to(extras.factory)
    if plan is not None:
        info["plan"] = {
            "reasons": plan.reasons,
            "eval_seconds": plan.eval_seconds,
            "teardown_seconds": plan.teardown_seconds,
        }
    return info


def _describe_data(data: TrainingData | None, dataset: Prepared | None) -> dict[str, Any]:
    if data is None or dataset is None:
        return {"spec": None, "val": None, "fingerprint": None}
    return {**data.places(), "fingerprint": dataset.fingerprint, **dataset.record()}


def _prepare_again(
    run: Run, config: RunConfig, tokenizer: Tokenizer, model: ModelConfig, method: Method, moved_to: Spec | None
) -> Prepared | None:
    """Return the dataset that the run was started with. CheckpointError where the text has changed since.

    moved_to: where the text is now. The new places of texts are written into `run.info`.
    """
    data = run.info["data"]
    if data["spec"] is None:
        if moved_to is not None:
            raise UsageError(f"{run.directory} was trained without a text; leave out {_shown(moved_to)}.")
        return None
    spec = moved_to or data["spec"]
    val_spec = config.data.val if config.data.val != run_config_of(run).data.val else data["val"]
    for what, recorded, place, argument in (
        ("text", data["spec"], spec, "NEWPLACE" if isinstance(spec, str) else "NEWPLACES (all, in the same order)"),
        ("validation text", data["val"], val_spec, "--val NEWPLACE"),
    ):
        gone = [path for path in _as_list(place) if Path(path).is_absolute() and not Path(path).exists()]
        if gone and place == recorded:
            command = f"gptsmith train --resume {run.directory} {argument}"
            raise UsageError(f"no such file or folder: {first_few(gone)}. Say where the {what} is now: {command}")
    opened = method.open_data(spec, config.replace(val=val_spec, unknown=True))
    if isinstance(opened, RowFiles):
        opened = opened.for_model(model)
    try:
        dataset = opened.prepare(config.replace(unknown=True), tokenizer)
        if dataset.fingerprint == data["fingerprint"]:
            run.info["data"] = data | opened.places()
            return dataset
    except TokenizerError:  # a character that was not there before
        pass
    raise CheckpointError(
        f"the data of {run.directory} has changed since the run began ({_shown(spec)}). "
        "Put the text back as it was, or start a new run."
    )


def _as_list(spec: Spec | None) -> list[str]:
    return [str(spec)] if isinstance(spec, str | Path) else [str(each) for each in spec or ()]


def _shown(spec: Spec) -> str:
    return first_few(_as_list(spec))


def _objective_of(run: Run) -> str:
    """Return the name of the objective in run.json. Batches from Python were trained on as a text is."""
    objective = str(run.info.get("objective", "pretrain"))
    return "pretrain" if objective == reference_to(BatchStream) else objective


def _completed(extras: Extras, run: Run) -> Extras:
    """Return `extras` with the objective and the model factory that run.json names, where they are not given."""
    objective, factory = _objective_of(run), run.info.get("model_factory")
    try:
        if extras.objective is None:
            find_method(objective)
            extras = replace(extras, objective=objective)
        if extras.model is None and factory:
            extras = replace(extras, model=import_reference(factory))
    except UsageError as error:
        raise UsageError(
            f"{run.directory} was trained with code that is not in this package: {error} "
            f"Resume it from Python: gptsmith.fit(resume={str(run.directory)!r}, objective=…, model=…)."
        ) from None
    return extras


# Resuming ------------------------------------------------------------------------------------------------------------


def _refuse_changes(saved: RunConfig, asked: RunConfig) -> None:
    before, after = saved.flat(), asked.flat()
    fixed = {"eval_every"} if _by_the_clock(saved) else set()  # the plan of the steps depends on it
    differing = [name for name in before if before[name] != after[name]]
    if any(name not in CHANGEABLE - fixed for name in differing):
        changed = [name for name in differing if name not in CHANGEABLE - fixed - {"steps"}]
        what = ", ".join(f"{name} ({before[name]} → {after[name]})" for name in changed)
        raise UsageError(f"a resumed run keeps its settings; these differ: {what}. Leave them out, or start a new run.")


def _by_the_clock(config: RunConfig) -> bool:
    """Return whether a budget of time plans the steps."""
    return config.auto.budget is not None and Budget.parse(config.auto.budget).kind == "seconds"


def _how_to_extend(directory: Path, saved: RunConfig) -> str:
    steps = saved.loop.steps
    if not _by_the_clock(saved) and saved.optim.factor(steps - 1, steps) == saved.optim.factor(steps - 1, 2 * steps):
        return f"To train it further, set more steps: gptsmith train --resume {directory} --steps {2 * steps}"
    return f"To train the model further, start a new run from it: gptsmith train DATA --init {directory}"


def _check_extension(directory: Path, saved: RunConfig, config: RunConfig, step: int) -> None:
    """Raise UsageError unless the first `step` steps are the same with the new number of steps."""
    steps, optim = config.loop.steps, config.optim
    instead = f"Start a new run from its model instead: gptsmith train DATA --init {directory}"
    if _by_the_clock(saved):
        raise UsageError(f"--steps {steps}: the steps of {directory} follow from its budget of time. {instead}")
    if steps <= step:
        raise UsageError(f"--steps {steps}: {directory} has a checkpoint of step {step} already. Set more steps.")
    if step and optim.factor(step - 1, saved.loop.steps) != optim.factor(step - 1, steps):
        raise UsageError(
            f"--steps {steps}: by step {step} the learning rate of {directory} has begun to fall towards step "
            f"{saved.loop.steps}, so its steps cannot be changed. {instead}"
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the run's lock. UsageError if another process trains in `directory`."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with explain_os_errors(directory), open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process is training in {directory}. Wait for it or stop it first.") from None
        yield
