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
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gptsmith
from gptsmith.checkpoint import CheckpointStore
from gptsmith.config import from_dict, to_dict
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset
from gptsmith.data.sources import Source, open_source
from gptsmith.errors import CheckpointError, GptsmithError, TokenizerError, UsageError
from gptsmith.loading import load_model, resolve_model
from gptsmith.log import JsonLines, note
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import SCHEMA, Run, read_run
from gptsmith.runtime import (
    choose_device,
    choose_precision,
    compiler_available,
    describe_machine,
    keep_freed_memory,
)
from gptsmith.storage import explain_os_errors, remove_temporaries
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.budget.machine import this_machine
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import INIT_LR_FACTOR, Text, choose
from gptsmith.train.callbacks import Callback
from gptsmith.train.config import RunConfig
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.pretrain import BatchStream
from gptsmith.train.objectives.registry import (
    ObjectiveContext,
    ObjectiveFactory,
    find_objective,
    import_reference,
    reference_to,
)
from gptsmith.train.session import RunResult, Session, now
from gptsmith.train.signals import StopSignal
from gptsmith.train.summary import summary
from gptsmith.train.text import choose_tokenizer, make_tokenizer, open_sources
from gptsmith.train.variation import ModelFactory, check_saveable

MOST_INIT_CONTEXT = 512  # default sequence length with --init, where the model allows more

# Options that can differ between a run and its resumption without changing what it computes.
CHANGEABLE = frozenset(
    {
        *("eval_every", "save_every", "log_every", "keep_checkpoints", "sample_tokens", "sample_prompt", "device"),
        *("steps", "val"),  # where the schedule allows, and where the text is the same: both are checked
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


def choose_directory(out: Path | None, name: str) -> Path:
    """Return the directory of a new run: `out`, which must be empty or absent, or the first free runs/NAME[-N]."""
    if out is None:
        number = 1
        while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return path
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run. Continue it with `gptsmith train --resume {out}`, or choose another --out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory. Choose another --out.")
    return out


def start(
    data: str | None,
    config: RunConfig,
    out: Path | None = None,
    *,
    overrides: Collection[str] = (),
    began: float | None = None,
    on_end: Callable[[Path], object] = lambda directory: None,
    extras: Extras = Extras(),
) -> RunResult:
    """Prepare `data`, make a run directory and train. `on_end(directory)` is called however training ends.

    overrides: flat names of options set by the user, which a budget does not change (`gptsmith.train.budget.recipe`).
    began: when a budget of time started (`time.monotonic()`); now, by default.
    Raises GptsmithError for anything wrong with the data, the options or the directory; nothing is left behind then.
    """
    began = time.monotonic() if began is None else began
    if config.auto.budget is not None:
        Budget.parse(config.auto.budget)  # before any work is done for an invalid one
    if config.init.init is not None:
        _refuse_options_of_new_models(config)
    objective_name, make_objective = find_objective(extras.objective or "pretrain")
    source, val = (None, None) if data is None else open_sources(data, config)
    directory = choose_directory(out, _default_name(source, objective_name))
    device = choose_device(config.loop.device)
    precision = choose_precision(config.loop.precision, device)
    if config.loop.compile == "on" and not compiler_available(device):
        raise GptsmithError("--compile on needs a C++ compiler; g++ and clang++ are missing. Use --compile auto.")
    init: Init | None = None
    if config.init.init is not None:
        init = load_init(config.init.init)
        config, tokenizer = adapted_to_init(config, overrides, init.config), init.tokenizer
    elif extras.tokenizer is not None:
        tokenizer = extras.tokenizer
    elif source is not None:
        config = choose_tokenizer(config, overrides, source)
        tokenizer = make_tokenizer(config, source, val)
    else:
        raise UsageError("a run without a text needs a tokenizer: give tokenizer=…, or a model with init=….")
    dataset = None
    if source is not None:
        dataset = prepare(
            source, tokenizer, val=val, val_fraction=config.data.val_fraction, allow_unknown=config.init.unknown
        )
    keep_freed_memory()
    plan = None
    if config.auto.budget is not None or config.auto.depth is not None:
        if dataset is None:
            raise UsageError("a budget or a depth needs a text, whose length its rules depend on. Set --steps instead.")
        text = Text(len(dataset.train), len(dataset.val), tokenizer.vocab_size, init.config if init else None)
        machine = this_machine(device, precision, config.loop.compile)
        plan = choose(config, overrides, text, machine, spent=time.monotonic() - began)
        config = plan.config
        for reason in plan.reasons:
            note(reason)
    if isinstance(extras.model, ModelConfig):
        model_config = extras.model
        _check_fits(model_config, tokenizer, config)
    elif init is not None:
        model_config = init.config
    else:
        model_config = config.model.build(tokenizer.vocab_size, config.loop.context)
    factory = None if extras.model is None or isinstance(extras.model, ModelConfig) else extras.model
    build = functools.partial(make_model, model_config, config, factory, init)
    if extras.model is not None or (init is None and config.model.family not in FAMILIES.builtin):
        check_saveable(build())
    stop = StopSignal()
    objective = _make_objective(extras, make_objective, ObjectiveContext(config, tokenizer, dataset, stop))
    info: dict[str, Any] = {
        "schema": SCHEMA,
        "version": gptsmith.__version__,
        "status": "running",
        "started": now(),
        "config": to_dict(config),
        "model": to_dict(model_config),
        "data": _describe_data(data, source, val, config, dataset),
        "objective": objective_name if extras.batches is None else reference_to(BatchStream),
        "precision": precision,
        "machine": describe_machine(),
    }
    if factory is not None:
        info["model_factory"] = reference_to(factory)
    if plan is not None:
        info["plan"] = {
            "reasons": plan.reasons,
            "eval_seconds": plan.eval_seconds,
            "teardown_seconds": plan.teardown_seconds,
        }
    run = Run(directory, info)
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
        began=began,
    )
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        tokenizer.save(directory / "tokenizer")
        run.update(parameters=session.model.num_parameters())
        note(summary(session, config, dataset))
        return session.train(on_end)


def resume(
    directory: Path,
    config: RunConfig | None = None,
    *,
    data: str | None = None,
    on_end: Callable[[Path], object] = lambda directory: None,
    extras: Extras = Extras(),
) -> RunResult:
    """Continue the run in `directory` from its newest intact checkpoint, bit for bit.

    config: refused where it differs from the run's own in anything that changes what has been computed so far. More
        steps extend a run, even a finished one, if its learning rate so far would have been the same.
    data: where the text is now, if it has moved.
    extras: as the run was started with; by default they are found by the names in run.json.
    """
    run = read_run(directory)
    saved = run_config_of(run)
    if config is not None:
        _refuse_changes(saved, config)
    config = config or saved
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
    dataset = _prepare_again(run, config, tokenizer, data)
    device = choose_device(config.loop.device)
    keep_freed_memory()
    try:
        model_config = from_dict(ModelConfig, run.info["model"])
    except (UsageError, KeyError) as error:
        raise CheckpointError(f"{directory / 'run.json'} is damaged: its model cannot be read: {error}") from None
    factory = None if extras.model is None or isinstance(extras.model, ModelConfig) else extras.model
    with _locked(directory):
        steps = store.steps()
        init = load_init(config.init.init) if config.init.init is not None and not steps else None
        build = functools.partial(make_model, model_config, config, factory, init)
        stop = StopSignal()
        _, make_objective = find_objective(extras.objective or "pretrain")
        objective = _make_objective(extras, make_objective, ObjectiveContext(config, tokenizer, dataset, stop))
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
        )
        step = session.restore() if steps else 0
        if config.loop.steps != saved.loop.steps:
            _check_extension(directory, saved, config, step)
        store.delete_after(step)
        remove_temporaries(directory)
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (directory / name).exists():
                JsonLines(directory / name).truncate_after(step)
        note(summary(session, config, dataset))
        note(f"resuming {directory} at step {step} of {session.trainer.steps}")
        run.info.pop("error", None)
        run.update(status="running", config=to_dict(config))
        return session.train(on_end)


def run_config_of(run: Run) -> RunConfig:
    """Return a run's configuration. CheckpointError where its run.json lacks what resuming needs."""
    path = run.directory / "run.json"
    try:
        for part, keys in ((run.info, ("status", "precision")), (run.info["data"], ("spec", "val", "fingerprint"))):
            for key in keys:
                _ = part[key]
        return from_dict(RunConfig, run.info["config"])
    except UsageError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from None


# The data of a run ---------------------------------------------------------------------------------------------------


def _default_name(source: Source | None, objective: str) -> str:
    return source.name if source is not None else objective.rpartition(":")[2].rpartition(".")[2].lower()


def _describe_data(
    data: str | None, source: Source | None, val: Source | None, config: RunConfig, dataset: Dataset | None
) -> dict[str, Any]:
    if source is None or dataset is None:
        return {"spec": None, "val": None, "fingerprint": None}
    return {
        **_places(data, source, config.data.val, val),
        "fingerprint": dataset.fingerprint,
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "train_bytes": dataset.bytes_train,
        "val_bytes": dataset.bytes_val,
    }


def _places(spec: str | None, source: Source, val_spec: str | None, val: Source | None) -> dict[str, str | None]:
    return {
        "spec": spec if source.path is None else str(source.path.resolve()),
        "val": None if val is None else (val_spec if val.path is None else str(val.path.resolve())),
    }


def _prepare_again(run: Run, config: RunConfig, tokenizer: Tokenizer, moved_to: str | None) -> Dataset | None:
    """Return the dataset that the run was started with. CheckpointError where the text has changed since.

    moved_to: where the text is now. The new places of texts are written into `run.info`.
    """
    data = run.info["data"]
    if data["spec"] is None:
        if moved_to is not None:
            raise UsageError(f"{run.directory} was trained without a text; leave out {moved_to}.")
        return None
    spec = moved_to or data["spec"]
    val_spec = config.data.val if config.data.val != run_config_of(run).data.val else data["val"]
    for what, place, argument in (("text", spec, "NEWPLACE"), ("validation text", val_spec, "--val NEWPLACE")):
        if place and place in (data["spec"], data["val"]) and Path(place).is_absolute() and not Path(place).exists():
            command = f"gptsmith train --resume {run.directory} {argument}"
            raise UsageError(f"no such file or folder: {place}. Say where the {what} is now: {command}")
    source = open_source(spec, field=config.data.field)
    val = open_source(val_spec, field=config.data.field) if val_spec else None
    try:
        dataset = prepare(source, tokenizer, val=val, val_fraction=config.data.val_fraction, allow_unknown=True)
        if dataset.fingerprint == data["fingerprint"]:
            run.info["data"] = data | _places(spec, source, val_spec, val)
            return dataset
    except TokenizerError:  # a character that was not there before
        pass
    raise CheckpointError(
        f"the data of {run.directory} has changed since the run began ({spec}). "
        "Put the text back as it was, or start a new run."
    )


def _make_objective(extras: Extras, make: ObjectiveFactory, context: ObjectiveContext) -> Objective[Any]:
    if extras.batches is not None:
        loop = context.config.loop
        return BatchStream(extras.batches, seq_len=loop.context, vocab_size=context.tokenizer.vocab_size)
    return make(context)


def _completed(extras: Extras, run: Run) -> Extras:
    """Return `extras` with the objective and the model factory that run.json names, where they are not given."""
    objective, factory = run.info.get("objective", "pretrain"), run.info.get("model_factory")
    if objective == reference_to(BatchStream):
        objective = "pretrain"
    try:
        if extras.objective is None:
            find_objective(objective)
            extras = replace(extras, objective=objective)
        if extras.model is None and factory:
            extras = replace(extras, model=import_reference(factory))
    except UsageError as error:
        raise UsageError(
            f"{run.directory} was trained with code that is not in this package: {error} "
            f"Resume it from Python: gptsmith.fit(resume={str(run.directory)!r}, objective=…, model=…)."
        ) from None
    return extras


# Starting from an existing model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Init:
    """A model to start from. Its weights are float32, on the CPU."""

    model: Transformer
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def load_init(spec: str) -> Init:
    """Load the model that training starts from, as `gptsmith.load` does. Quantized weights become float32.

    Raises TokenizerError if the model has no embedding for the token that separates documents.
    """
    model, tokenizer = load_model(spec, quantize="none")
    if tokenizer.eos_id is not None and tokenizer.eos_id >= model.config.vocab_size:
        raise TokenizerError(
            f"{spec}: the end-of-text token has the id {tokenizer.eos_id}, and the model has ids below "
            f"{model.config.vocab_size} only. Name another eos_token in its tokenizer_config.json."
        )
    return Init(model, tokenizer)


def _refuse_options_of_new_models(config: RunConfig) -> None:
    """Raise UsageError for options that contradict --init, since ignoring them would be a silent mistake."""
    new = RunConfig()
    changed = [
        name
        for name, value in config.flat().items()
        if (name.startswith("model.") or name in ("tokenizer", "vocab_size")) and value != new.flat()[name]
    ]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(f"with --init the model and its tokenizer are those of {config.init.init}; leave out {flags}.")


def adapted_to_init(config: RunConfig, overrides: Collection[str], model: ModelConfig) -> RunConfig:
    """Return `config` with the context and learning rates that suit the model, where the user has not set them.

    Raises UsageError for a context that is longer than the model's.
    """
    most = model.max_position_embeddings
    config = config.replace(init=str(_absolute(config.init.init)))
    if "context" not in overrides:
        config = config.replace(context=min(most, MOST_INIT_CONTEXT))
    if config.loop.context > most:
        why = (
            "its learned positions cannot be extended"
            if model.position == "learned"
            else f"extend it first: gptsmith export {config.init.init} --context {config.loop.context} --out DIR"
        )
        raise UsageError(f"--context {config.loop.context} is longer than the model's {most}: {why}.")
    factor = INIT_LR_FACTOR / 20 if config.optim.name == "adamw" else INIT_LR_FACTOR
    optim = {"lr": config.optim.lr * factor, "embedding_lr": config.optim.embedding_lr * factor}
    return config.replace(optim={name: value for name, value in optim.items() if f"optim.{name}" not in overrides})


def _absolute(spec: str | None) -> str:
    """Return a path in full, so that the run can be resumed from another directory; other names as they are."""
    path = Path(spec or "")
    return str(resolve_model(path).resolve()) if path.exists() else str(spec)


def _check_fits(model: ModelConfig, tokenizer: Tokenizer, config: RunConfig) -> None:
    if model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"the model has rows for {model.vocab_size:,} tokens, the tokenizer has {tokenizer.vocab_size:,}."
        )
    if model.max_position_embeddings < config.loop.context:
        raise UsageError(
            f"--context {config.loop.context} is longer than the model's max_position_embeddings "
            f"({model.max_position_embeddings})."
        )


def make_model(
    model_config: ModelConfig, config: RunConfig, factory: ModelFactory | None, init: Init | None
) -> Transformer:
    """Build the policy of a run: by `factory` or as a `Transformer`, with the weights of `init` or new ones."""
    if factory is not None:
        model = factory(model_config, config.loop.dropout)
    else:
        model = Transformer(model_config, dropout=config.loop.dropout, initialize=init is None)
    if init is not None:
        model.load_state_dict(init.model.state_dict())
        model.generation_config = dict(init.model.generation_config)
    return model


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
