"""The options of the commands that train an existing model: sft and its relatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.cli.run_options import FLAT, ParsedRun, adapter_parts, base_config, explicit_options, option_value
from gptsmith.cli.train import train_or_resume
from gptsmith.errors import UsageError
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
    OptimConfig,
    ParallelConfig,
    PictureConfig,
    PolicyConfig,
    RunConfig,
)


@dataclass(frozen=True)
class TuneData:
    """The data besides the argument itself."""

    val: str | None = None
    """Validation data, in the same form (default: cut from the end of the data)."""
    val_fraction: float = 0.1
    """Fraction of the data, at its end, held out for validation."""


@dataclass(frozen=True)
class TuneOptim(OptimConfig):
    """The optimizer, where defaults follow from the model."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices, AdamW for the rest. adamw: AdamW for everything (default: adamw for an adapter,
    otherwise that which pretrained the model, as far as it is known)."""
    lr: float = 1e-3
    """Peak learning rate; with muon, that of the matrices (default: 0.001 for an adapter; otherwise 0.0001 with adamw,
    0.002 with muon)."""
    embedding_lr: float = 1e-3
    """With muon: peak learning rate of AdamW, for embeddings, head and norms (default: 0.001)."""


@dataclass(frozen=True)
class TuneLoop(LoopConfig):
    """The loop, where defaults follow from the data."""

    context: int = 512
    """Sequence length in training, in tokens (default: what the longest conversation needs, up to 1024 and the model's
    own)."""
    steps: int = 1000
    """Number of optimizer updates (default: as many as --epochs or --budget take)."""


@dataclass(frozen=True)
class TuneOptions:
    """Base of the commands."""

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """The model to start from: a run, a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATA")] = None
    """The data: .jsonl, .json, .parquet or .csv, a folder of them, or a named set (`gptsmith data list`)."""
    out: Path | None = None
    """Run directory (default: runs/NAME, numbered if taken)."""
    resume: Path | None = None
    """Continue this run from its last checkpoint, without MODEL. DATA says where the data is now, if it has moved."""
    config: Path | None = None
    """Start from a file: run.json of a run, or JSON or YAML with the names of the options."""
    budget: str | None = None
    """Time (5m, 2h), compute (1e15flop) or tokens (2Mtok) to spend, instead of --steps and --epochs."""
    text: Annotated[TuneData, FLAT] = field(default_factory=TuneData)
    """data"""
    method: Annotated[MethodConfig, FLAT] = field(default_factory=MethodConfig)
    """method"""
    lora: Literal["auto", "on", "off"] = "auto"
    """Train a low-rank adapter (LoRA) and leave the model's weights unchanged; off: train all weights. auto: on for sft
    and if another --lora option is set; off for distill and
    classify."""
    adapter: Annotated[LoraOptions, tyro.conf.arg(name="lora")] = field(default_factory=LoraOptions)
    """low-rank adapter"""
    warm_start: bool = True
    """With --lora off: take over the optimizer's momentum from MODEL's checkpoint, if it has one and the optimizer is
    the same."""
    optim: TuneOptim = field(default_factory=TuneOptim)
    """optimizer"""
    loop: Annotated[TuneLoop, FLAT] = field(default_factory=TuneLoop)
    """training loop"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """tasks during training"""
    vision: PictureConfig = field(default_factory=PictureConfig)
    """pictures"""
    parallel: Annotated[ParallelConfig, FLAT] = field(default_factory=ParallelConfig)
    """processes"""

    @property
    def needs_data(self) -> bool:
        """Whether the command, with these options, takes DATA."""
        return True

    def check(self, command: str) -> None:
        """Raise UsageError where a new run lacks something besides MODEL and DATA. command: its name."""

    @property
    def run(self) -> RunConfig:
        return RunConfig(
            auto=AutoConfig(budget=self.budget),
            data=DataConfig(val=self.text.val, val_fraction=self.text.val_fraction),
            init=InitConfig(init=self.model, warm_start=self.warm_start),
            adapter=AdapterConfig(**vars(self.adapter), lora=self.lora),
            method=self.method,
            optim=OptimConfig(**vars(self.optim)),
            loop=LoopConfig(**vars(self.loop)),
            eval=self.eval,
            vision=self.vision,
            parallel=self.parallel,
        )


@dataclass(frozen=True)
class RewardedOptions(TuneOptions):
    """Base of the commands that train by a reward."""

    def check(self, command: str) -> None:
        assert isinstance(self.method, PolicyConfig)
        if not self.method.reward:
            raise UsageError(f"No reward given. Use: gptsmith {command} MODEL PROMPTS --reward module:function")


def parse_tune(
    command: type[TuneOptions], method: type[MethodConfig], name: str, arguments: Sequence[str]
) -> ParsedRun:
    """Parse the arguments of a command over its base configuration: a run's own, a file, or the default."""
    base, whole = base_config(arguments, method)
    if type(base.method) is not method:
        directory = option_value(arguments, "--resume")
        raise UsageError(
            f"{directory} is not a run of gptsmith {name}. Continue it with: gptsmith train --resume {directory}"
        )
    defaults: dict[str, Any] = {
        "budget": base.auto.budget,
        "text": TuneData(base.data.val, base.data.val_fraction),
        "method": base.method,
        **adapter_parts(base.adapter),
        "warm_start": base.init.warm_start,
        "optim": TuneOptim(**vars(base.optim)) if whole else TuneOptim(),
        "loop": TuneLoop(**vars(base.loop)),
        "eval": base.eval,
        "vision": base.vision,
        "parallel": base.parallel,
    }
    options = parse(command, f"gptsmith {name}", arguments, default=command(**defaults))
    if options.resume is not None:
        if options.out is not None:
            raise UsageError("--resume takes the directory from the run; omit --out.")
        if options.data is not None:
            raise UsageError("--resume takes the model from the run; give no more than the new place of the data.")
        options = dataclasses.replace(options, model=base.init.init, data=options.model)
    elif options.model is None or (options.data is None and options.needs_data):
        missing = "model and no data" if options.model is None else "data"
        raise UsageError(f"No {missing} given. Use: gptsmith {name} MODEL DATA")
    else:
        options.check(name)
    return ParsedRun(options, explicit_options(arguments) | (settled(base) if whole else set()))


def run_tuning(
    command: type[TuneOptions], method: type[MethodConfig], name: str, arguments: Sequence[str], *, began: float
) -> int:
    """Parse the arguments of the command `name` and run it. Return the exit code."""
    chosen, overrides = parse_tune(command, method, name, arguments)
    return train_or_resume(chosen, overrides, [name, *arguments], began=began, objective=name)
