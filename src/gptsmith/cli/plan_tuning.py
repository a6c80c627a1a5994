"""`gptsmith plan sft` and its relatives: forecast a tuning run with its adapter and all models that take part."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from gptsmith.cli.classify import Classify
from gptsmith.cli.distill import Distill
from gptsmith.cli.dpo import Dpo
from gptsmith.cli.grpo import Grpo
from gptsmith.cli.plan import check_price, describe
from gptsmith.cli.ppo import Ppo
from gptsmith.cli.reward import Reward
from gptsmith.cli.run_options import option_value, refuse_processes
from gptsmith.cli.sft import Sft
from gptsmith.cli.tune_options import TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.train.config import (
    ClassifyConfig,
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    MethodConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
)


@dataclass(frozen=True)
class Forecast:
    """What the commands have besides the options of the run."""

    price_per_hour: float | None = None
    """Price of the machine per hour, in your currency."""
    json: bool = False
    """Print the forecast as JSON."""


@dataclass(frozen=True)
class PlanSft(Forecast, Sft):
    """Forecast the memory, time and cost of `gptsmith sft MODEL DATA` without running it. Takes its options."""


@dataclass(frozen=True)
class PlanDistill(Forecast, Distill):
    """Forecast the memory, time and cost of `gptsmith distill STUDENT DATA --teacher MODEL` without running it. Takes
    its options. The teacher counts; with --on-policy the time that the student takes to answer does not."""


@dataclass(frozen=True)
class PlanDpo(Forecast, Dpo):
    """Forecast the memory, time and cost of `gptsmith dpo MODEL DATA` without running it. Takes its options.

    The reference counts: its memory, and the time in which it reads all answers once.
    """


@dataclass(frozen=True)
class PlanReward(Forecast, Reward):
    """Forecast the memory, time and cost of `gptsmith reward MODEL DATA` without running it. Takes its options."""


@dataclass(frozen=True)
class PlanPpo(Forecast, Ppo):
    """Forecast the memory, time and cost of `gptsmith ppo MODEL PROMPTS --reward …` without running it. Takes its
    options.

    The reference, the value model, reward models and the cache of keys and values count. Answers are taken to have
    their full length. Reward functions and judges are not called, and their time does not count.
    """


@dataclass(frozen=True)
class PlanGrpo(Forecast, Grpo):
    """Forecast the memory, time and cost of `gptsmith grpo MODEL PROMPTS --reward …` without running it. Takes its
    options.

    The reference, reward models and the cache of keys and values count. Answers are taken to have their full length.
    Reward functions and judges are not called, and their time does not count.
    """


@dataclass(frozen=True)
class PlanClassify(Forecast, Classify):
    """Forecast the memory, time and cost of `gptsmith classify MODEL DATA` without running it. Takes its options."""


COMMANDS: dict[str, tuple[type[TuneOptions], type[MethodConfig]]] = {
    "sft": (PlanSft, SftConfig),
    "distill": (PlanDistill, DistillConfig),
    "reward": (PlanReward, RewardConfig),
    "dpo": (PlanDpo, DpoConfig),
    "ppo": (PlanPpo, PpoConfig),
    "grpo": (PlanGrpo, GrpoConfig),
    "classify": (PlanClassify, ClassifyConfig),
}


def main(name: str, arguments: list[str]) -> int:
    """Forecast a run of the command `name`. arguments: those after it."""
    command, options = COMMANDS[name]
    if option_value(arguments, "--resume") is not None:
        raise UsageError("a forecast is of a new run; leave out --resume.")
    chosen, overrides = parse_tune(command, options, f"plan {name}", arguments)
    assert isinstance(chosen, PlanSft | PlanDistill | PlanReward | PlanDpo | PlanPpo | PlanGrpo | PlanClassify)
    if isinstance(chosen, PlanClassify) and chosen.predict is not None:
        raise UsageError("a forecast is of training; leave out --predict.")
    config, began = chosen.run, time.monotonic()
    refuse_processes(config, "plan")
    check_price(chosen.price_per_hour)
    if config.auto.budget is not None:
        from gptsmith.train.budget.parse import Budget

        Budget.parse(config.auto.budget)

    from gptsmith.runtime import choose_device, choose_precision, keep_freed_memory
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.forecast.memory import process_memory
    from gptsmith.train.forecast.plan import forecast
    from gptsmith.train.init import load_init
    from gptsmith.train.objectives.registry import METHODS, ObjectiveContext
    from gptsmith.train.run import adapt_to_init, planned

    method, device = METHODS[name], choose_device(config.loop.device)
    keep_freed_memory()
    opened = method.open_data(chosen.data, config)
    init = method.adapt_init(load_init(str(chosen.model)), config, opened)
    config, adapted = adapt_to_init(config, overrides, init, opened, method, name)
    assert adapted is not None
    dataset = adapted.prepare(config, init.tokenizer)
    note(dataset.summary())
    config = method.settle(config, overrides, dataset)
    if config.auto.budget is not None:
        precision = choose_precision(config.loop.precision, device)
        plan = planned(
            config,
            overrides,
            method,
            dataset,
            init.tokenizer,
            init,
            device,
            precision,
            spent=time.monotonic() - began,
        )
        config = plan.config
        for reason in plan.reasons:
            note(reason)
    size, process = dataset.record(), process_memory()  # before the objective loads its models, which are counted
    found = forecast(
        config,
        init.config,
        Text(size["train_tokens"], size["val_tokens"], init.tokenizer.vocab_size, init.config),
        device,
        objective=method.objective(ObjectiveContext(config, init.tokenizer, dataset)),
        process=process,
        price_per_hour=chosen.price_per_hour,
    )
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else describe(found))
    return 0
