"""The options of a run, shared by train, plan, find-lr and scale."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from gptsmith.cli.help import Section
from gptsmith.cli.parser import parse
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.presets import describe_own, describe_published, preset
from gptsmith.run_directory import migrated
from gptsmith.train.budget.recipe import settled
from gptsmith.train.config import (
    AdapterConfig,
    AutoConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    LoopConfig,
    LoraOptions,
    MethodConfig,
    ModelOptions,
    OptimConfig,
    ParallelConfig,
    PictureConfig,
    PretrainConfig,
    RunConfig,
    default_config,
    is_flat,
    with_options,
)

FLAT = tyro.conf.arg(name="")  # the options of the part do not carry its name


@dataclass(frozen=True)
class RunOptions:
    """Base of the commands that describe a run."""

    preset: str | None = None
    """Start from a named configuration (see below); other options override it."""
    config: Path | None = None
    """Start from a file: run.json of a run, or JSON or YAML with the names of the options."""
    auto: Annotated[AutoConfig, FLAT] = field(default_factory=AutoConfig)
    """automatic choices"""
    text: Annotated[DataConfig, FLAT] = field(default_factory=DataConfig)
    """data"""
    init: Annotated[InitConfig, FLAT] = field(default_factory=InitConfig)
    """initialization"""
    lora: Literal["auto", "on", "off"] = "auto"
    """With --init: train a low-rank adapter (LoRA) and leave the model's weights unchanged. auto: if another --lora
    option is set."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """model"""
    adapter: Annotated[LoraOptions, tyro.conf.arg(name="lora")] = field(default_factory=LoraOptions)
    """low-rank adapter"""
    method: Annotated[PretrainConfig, FLAT] = field(default_factory=PretrainConfig)
    """pretraining"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer"""
    loop: Annotated[LoopConfig, FLAT] = field(default_factory=LoopConfig)
    """training loop"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """tasks during training"""
    vision: PictureConfig = field(default_factory=PictureConfig)
    """pictures"""
    parallel: Annotated[ParallelConfig, FLAT] = field(default_factory=ParallelConfig)
    """processes"""

    @property
    def run(self) -> RunConfig:
        return RunConfig(
            auto=self.auto,
            data=self.text,
            init=self.init,
            model=self.model,
            adapter=AdapterConfig(**vars(self.adapter), lora=self.lora),
            method=self.method,
            optim=self.optim,
            loop=self.loop,
            eval=self.eval,
            vision=self.vision,
            parallel=self.parallel,
        )


class ParsedRun(NamedTuple):
    """The parsed arguments of a command that describes a run."""

    options: Any
    """An instance of the command's dataclass."""
    overrides: set[str]
    """Flat names of the options that a budget does not change: those of a preset, a file, and the command line."""


def parse_run(command: type[RunOptions], name: str, arguments: Sequence[str], **defaults: Any) -> ParsedRun:
    """Parse the arguments of a command over its base configuration: a run's own, a preset, a file, or the default.

    defaults: of the command's own required fields.
    """
    base, whole = base_config(arguments)
    explicit = explicit_options(arguments)
    parts = {"text" if part.name == "data" else part.name: getattr(base, part.name) for part in fields(base)}
    parts |= adapter_parts(base.adapter)
    presets = [
        Section("presets", describe_own()),
        Section(
            "presets of published sizes, for GPUs (*: with the training settings of the paper)", describe_published()
        ),
    ]
    options = parse(command, f"gptsmith {name}", arguments, default=command(**parts, **defaults), sections=presets)
    if options.init.init is not None:
        _refuse_with_init(options.init.init, explicit)
    return ParsedRun(options, explicit | (settled(base) if whole else set()))


def adapter_parts(adapter: AdapterConfig) -> dict[str, Any]:
    """Return the options of an adapter as commands have them: whether to train one, and the rest."""
    values = dict(vars(adapter))
    return {"lora": values.pop("lora"), "adapter": LoraOptions(**values)}


def refuse_processes(config: RunConfig, command: str) -> None:
    """Raise UsageError for several processes, in a command that is about one."""
    if config.parallel.processes > 1:
        raise UsageError(
            f"gptsmith {command} is about a run in one process: leave out --processes, or add --processes 1 to a "
            "configuration that has more."
        )
    if config.parallel.parallel != ParallelConfig.parallel or config.parallel.exact:
        raise UsageError(f"gptsmith {command} is about a run in one process: leave out --parallel and --exact.")


def explicit_options(arguments: Sequence[str]) -> set[str]:
    """Return the flat names of the options on a command line.

    `--model.no-tie-word-embeddings` sets model.tie_word_embeddings.
    """
    names = [argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    return {re.sub(r"(^|\.)no_", r"\1", name) for name in names}


def _refuse_with_init(model: str, explicit: set[str]) -> None:
    wrong = {name for name in explicit if name.startswith("model.")}
    wrong |= explicit & {"tokenizer", "vocab_size", "depth", "preset"}
    if wrong:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
        raise UsageError(f"with --init the model and its tokenizer are those of {model}; leave out {flags}.")


def base_config(arguments: Sequence[str], method: type[MethodConfig] = PretrainConfig) -> tuple[RunConfig, bool]:
    """Return the base configuration, and whether it was chosen as a whole."""
    resume, name, file = (option_value(arguments, option) for option in ("--resume", "--preset", "--config"))
    if sum(value is not None for value in (resume, name, file)) > 1:
        raise UsageError("--resume, --preset and --config each set a whole configuration; use one of them.")
    if resume is not None:
        from gptsmith.run_directory import read_run
        from gptsmith.train.run import run_config_of

        return run_config_of(read_run(Path(resume))), True
    if name is not None:
        return preset(name), True
    if file is not None:
        return read_config(Path(file), method), True
    return default_config(method), False


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option by the parser's rules: the last one counts."""
    value = None
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument == option and not following.startswith("--"):
            value = following
        elif argument.startswith(option + "="):
            value = argument.removeprefix(option + "=")
    return value


def read_config(path: Path, method: type[MethodConfig] = PretrainConfig) -> RunConfig:
    """Read a configuration from a run.json, or from JSON or YAML with the names of the options, in parts or flat.

    Raises UsageError for a file that cannot be read, an unknown name or a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path} is not UTF-8 text.") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError:
                raise UsageError(f"--config {path}: reading YAML needs `pip install pyyaml`; or use JSON.") from None
            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--config {path} is not valid JSON: {error}.") from None
    except UsageError:
        raise
    except Exception as error:  # yaml raises exceptions of its own
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    if isinstance(values, dict) and "config" in values and "version" in values:  # a run.json
        values = migrated(values, str(path))["config"]
    try:
        if not isinstance(values, dict):
            raise UsageError(f"the configuration must be a mapping, not {values!r}.")
        if is_flat(values):
            note(f"note: {path} has the flat form of older versions; run.json now groups options by part")
        return with_options(default_config(method), values)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None
