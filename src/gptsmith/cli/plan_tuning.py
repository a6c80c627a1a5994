"""`gptsmith plan sft` and `gptsmith plan distill`: forecast a tuning run, its adapter and its teacher included."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from gptsmith.cli.distill import Distill
from gptsmith.cli.distill import check as check_distill
from gptsmith.cli.plan import check_price, describe
from gptsmith.cli.run_options import option_value, refuse_processes
from gptsmith.cli.sft import Sft
from gptsmith.cli.tune_options import TuneOptions, parse_tune
from gptsmith.errors import UsageError
from gptsmith.log import note
from gptsmith.train.config import DistillConfig, MethodConfig, SftConfig


@dataclass(frozen=True)
class PlanSft(Sft):
    """Forecast the memory, time and cost of `gptsmith sft MODEL DATA` without running it. Takes its options."""

    price_per_hour: float | None = None
    """Price of the machine per hour, in your currency."""
    json: bool = False
    """Print the forecast as JSON."""


@dataclass(frozen=True)
class PlanDistill(Distill):
    """Forecast the memory, time and cost of `gptsmith distill STUDENT DATA --teacher MODEL` without running it. Takes
    its options. The teacher counts; with --on-policy the time that the student takes to answer does not."""

    price_per_hour: float | None = None
    """Price of the machine per hour, in your currency."""
    json: bool = False
    """Print the forecast as JSON."""


COMMANDS: dict[str, tuple[type[TuneOptions], type[MethodConfig]]] = {
    "sft": (PlanSft, SftConfig),
    "distill": (PlanDistill, DistillConfig),
}


def main(name: str, arguments: list[str]) -> int:
    """Forecast a run of the command `name`. arguments: those after it."""
    command, options = COMMANDS[name]
    if option_value(arguments, "--resume") is not None:
        raise UsageError("a forecast is of a new run; leave out --resume.")
    chosen, overrides = parse_tune(command, options, f"plan {name}", arguments)
    assert isinstance(chosen, PlanSft | PlanDistill)
    if isinstance(chosen, PlanDistill):
        check_distill(chosen)
    config, began = chosen.run, time.monotonic()
    refuse_processes(config, "plan")
    check_price(chosen.price_per_hour)
    if config.auto.budget is not None:
        from gptsmith.train.budget.parse import Budget

        Budget.parse(config.auto.budget)

    from gptsmith.runtime import choose_device, choose_precision, keep_freed_memory
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.forecast.plan import forecast
    from gptsmith.train.init import adapted_to_init, load_init
    from gptsmith.train.objectives.registry import METHODS, ObjectiveContext
    from gptsmith.train.run import planned

    method, device = METHODS[name], choose_device(config.loop.device)
    keep_freed_memory()
    opened = method.open_data(chosen.data, config)
    init = method.adapt_init(load_init(str(chosen.model)), config, opened)
    config = adapted_to_init(config, overrides, init, lora=method.trains_adapter, longest=method.longest)
    dataset = opened.prepare(config, init.tokenizer)
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
    size = dataset.record()
    found = forecast(
        config,
        init.config,
        Text(size["train_tokens"], size["val_tokens"], init.tokenizer.vocab_size, init.config),
        device,
        objective=method.objective(ObjectiveContext(config, init.tokenizer, dataset)),
        price_per_hour=chosen.price_per_hour,
    )
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else describe(found))
    return 0
