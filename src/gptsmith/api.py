"""Training from Python: `gptsmith.fit` and `gptsmith.runs`.

run = gptsmith.fit("input.txt", steps=500, context=64, out="runs/mine")
model, tokenizer = gptsmith.load(run)
for run in gptsmith.runs("runs"):
    print(run.name, run.status, run.best)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptsmith.config import from_dict
from gptsmith.data.sources import Spec
from gptsmith.distributed.context import DistributedContext, environment_world_size, join_processes
from gptsmith.errors import UsageError
from gptsmith.evaluate.harness import evaluate
from gptsmith.export.merge import merge
from gptsmith.export.vision import add_vision
from gptsmith.log import note, quiet
from gptsmith.model.config import ModelConfig
from gptsmith.report import write_report
from gptsmith.run_directory import Run, find_runs, read_run
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.best_of_n import BestOfN, BestOfNOptions, best_of_n
from gptsmith.train.callbacks import Callback
from gptsmith.train.config import RunConfig, default_config, options_of, with_options
from gptsmith.train.objectives.registry import ObjectiveFactory, find_method, reference_to
from gptsmith.train.run import Extras, resume, start
from gptsmith.train.variation import ModelFactory

__all__ = [
    "add_vision",
    "bestofn",
    "classify",
    "distill",
    "dpo",
    "evaluate",
    "fit",
    "grpo",
    "merge",
    "ppo",
    "reward",
    "runs",
    "sft",
]

Data = str | Path | Iterable[Any]


def fit(
    data: Data | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    init: str | Path | Run | None = None,
    resume: str | Path | Run | None = None,
    callbacks: Sequence[Callback] = (),
    objective: str | ObjectiveFactory | None = None,
    model: ModelConfig | ModelFactory | Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Run:
    """Train a model and return its run, as `gptsmith train` does; nothing is printed unless `verbose`.

    data: a text file, a folder, a named corpus, or a list of these; or an iterable of batches (`TokenBatch`, or pairs
        of ids and targets, each (B, T) integers, -100 for no target), which needs `tokenizer` or `init`.
    config, options: a `RunConfig`, or options by the names of the command line (`steps=500`,
        `**{"model.hidden_size": 64}`, `model_options`); `options` win over `config`.
    out: the run directory (default: runs/NAME, numbered if taken). init: continue pretraining this model.
    resume: continue this run from its last checkpoint instead; `objective`, `model` and batches as it was started with,
        `data` only if the text has moved, `steps` to extend it.
    objective: a registered name, `module:name`, or a function that makes an `Objective` of an `ObjectiveContext`
        (default: pretraining, or that of the resumed run).
    Under torchrun, its processes share the run: every one calls `fit` with the same arguments.
    model: the model's configuration, a function `(ModelConfig, dropout) -> Transformer`, or a dictionary of options
        (`{"hidden_size": 64}`).
    tokenizer: a tokenizer, or a name as of the option `--tokenizer` ("bpe", "gpt2", a path).
    Raises GptsmithError (UsageError, DataError, DivergedError, …), or KeyboardInterrupt after saving on Ctrl-C.
    """
    settings = dict(options)
    if config is not None and not isinstance(config, RunConfig):
        settings = {**config, **settings}
    if init is not None:
        settings["init"] = os.fspath(init)
    if isinstance(model, Mapping):
        settings["model"], model = dict(model), None
    if isinstance(tokenizer, str | Path):
        settings["tokenizer"], tokenizer = str(tokenizer), None
    elif not isinstance(tokenizer, Tokenizer | None):
        raise UsageError(f"tokenizer must be a Tokenizer, or a name such as 'bpe', not {tokenizer!r}.")
    _, method = find_method(objective or "pretrain")
    base = config if isinstance(config, RunConfig) else default_config(method.options)
    text, batches = _text_or_batches(data)
    extras = Extras(objective=objective, batches=batches, model=model, tokenizer=tokenizer, callbacks=tuple(callbacks))
    began = time.monotonic()
    if "processes" not in settings and (started := environment_world_size()) is not None:
        base = base.replace(processes=started)
    timeout = float(settings.get("process_timeout", base.parallel.process_timeout))
    with quiet(not verbose), join_processes(timeout) as ranks:
        if resume is not None:
            if out is not None or init is not None:
                raise UsageError(
                    "resume takes the directory and the starting model from the run; leave out out and init."
                )
            result = _resume(Path(resume), settings, config, extras, text, ranks)
        else:
            if data is None and objective in (None, "pretrain"):
                raise UsageError("no data given: pass a text file, a folder, a named corpus, or batches.")
            overrides = options_of(settings, method.options) | ({"init"} if init is not None else set())
            if isinstance(config, RunConfig):
                from gptsmith.train.budget.recipe import settled

                overrides |= settled(base)
            result = start(
                text,
                with_options(base, settings),
                None if out is None else Path(out),
                overrides=overrides,
                began=began,
                on_end=write_report,
                extras=extras,
                ranks=ranks,
            )
        if result.outcome == "interrupted":
            note(f"Stopped; progress saved. Resume with: gptsmith.fit(resume={str(result.run.directory)!r})")
    if result.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return read_run(result.run.directory)


def sft(model: str | Path | Run, data: str | Path, **options: Any) -> Run:
    """Fine-tune a model on conversations and return the run, as `gptsmith sft MODEL DATA` does.

    options: as for `fit`, and those of the command (`lora="off"`, `epochs=2`, `**{"lora.rank": 8}`).
    """
    return fit(data, objective="sft", init=model, **options)


def classify(model: str | Path | Run, data: str | Path, **options: Any) -> Run:
    """Train a model with a task head on labeled texts and return the run, as `gptsmith classify MODEL DATA` does.

    options: as for `fit`, and those of the command (`task="entailment"`, `aux_loss=0`, `labels=("no", "yes")`).
    """
    return fit(data, objective="classify", init=model, **options)


def distill(student: str | Path | Run, data: str | Path, *, teacher: str | Path | Run, **options: Any) -> Run:
    """Train a student to predict as a teacher does and return the run, as `gptsmith distill STUDENT DATA` does."""
    return fit(data, objective="distill", init=student, teacher=os.fspath(teacher), **options)


def reward(model: str | Path | Run, preferences: str | Path, **options: Any) -> Run:
    """Train a reward model on preferences and return the run, as `gptsmith reward MODEL PREFERENCES` does."""
    return fit(preferences, objective="reward", init=model, **options)


Reward = str | Path | Callable[..., Any]


def ppo(model: str | Path | Run, prompts: str | Path, *, reward: Reward | Sequence[Reward], **options: Any) -> Run:
    """Train a model by a reward with PPO and return the run, as `gptsmith ppo MODEL PROMPTS --reward …` does.

    reward: what scores answers, or several: functions `(prompts, completions, **columns) -> scores`, `module:function`,
        `file.py:function`, directories of reward models, or `judge:URL`.
    """
    return fit(prompts, objective="ppo", init=model, reward=_reward_specs(reward), **options)


def dpo(model: str | Path | Run, preferences: str | Path, **options: Any) -> Run:
    """Train a model on preferences and return the run, as `gptsmith dpo MODEL PREFERENCES` does.

    options: as for `fit`, and those of the command (`loss="simpo"`, `beta=0.05`, `sft_weight=0.1`).
    """
    return fit(preferences, objective="dpo", init=model, **options)


def grpo(model: str | Path | Run, prompts: str | Path, *, reward: Reward | Sequence[Reward], **options: Any) -> Run:
    """Train a model by a reward with GRPO and return the run, as `gptsmith grpo MODEL PROMPTS --reward …` does.

    reward: as for `ppo`.
    """
    return fit(prompts, objective="grpo", init=model, reward=_reward_specs(reward), **options)


def bestofn(
    model: str | Path | Run,
    prompts: str | Path,
    *,
    reward: Reward | Sequence[Reward],
    out: str | Path = "best.jsonl",
    **options: Any,
) -> BestOfN:
    """Keep the best of n answers to each prompt, as `gptsmith bestofn MODEL PROMPTS --reward …` does.

    reward: as for `ppo`. options: those of the command (`n=16`, `min_reward=1`). `sft(model, out)` trains on it.
    """
    several = [reward] if callable(reward) or isinstance(reward, str | Path) else list(reward)
    functions = [each if callable(each) else os.fspath(each) for each in several]
    return best_of_n(os.fspath(model), prompts, Path(out), from_dict(BestOfNOptions, options), functions=functions)


def _reward_specs(reward: Reward | Sequence[Reward]) -> tuple[str, ...]:
    several = [reward] if callable(reward) or isinstance(reward, str | Path) else list(reward)
    return tuple(reference_to(each) if callable(each) else os.fspath(each) for each in several)


def _text_or_batches(data: Data | None) -> tuple[Spec | None, Iterable[Any] | None]:
    """Return where the text is, or the batches."""
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data), None
    if isinstance(data, Sequence) and data and all(isinstance(each, str | Path) for each in data):
        return [str(each) for each in data], None
    return None, data


def _resume(
    directory: Path,
    settings: dict[str, Any],
    config: Any,
    extras: Extras,
    moved_to: Spec | None,
    ranks: DistributedContext,
) -> Any:
    from gptsmith.train.run import run_config_of

    asked: RunConfig | None = None
    if isinstance(config, RunConfig):
        asked = with_options(config, settings)
    elif settings:
        asked = with_options(run_config_of(read_run(directory)), settings)
    if asked is not None and "processes" not in settings:
        asked = asked.replace(processes=ranks.world_size)
    return resume(directory, asked, data=moved_to, on_end=write_report, extras=extras, ranks=ranks)


def runs(directory: str | Path = "runs") -> list[Run]:
    """Return the runs in a directory and in its folders, oldest first."""
    return find_runs(directory)
