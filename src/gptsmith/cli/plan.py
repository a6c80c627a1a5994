"""`gptsmith plan`: what a run will take, before it runs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptsmith.cli.train import base_and_given
from gptsmith.errors import UsageError
from gptsmith.log import duration, note
from gptsmith.presets import describe_presets
from gptsmith.train.config import TrainConfig

if TYPE_CHECKING:
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.forecast.plan import Plan as Forecast

CHARACTERS = 100  # of an alphabet nobody has seen yet
ENDLESS = 10**15  # tokens, where there is no text to count


@dataclass(frozen=True)
class Plan:
    """Say what a run would take - parameters, memory, time, money - without running it. Takes the options of train."""

    data: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATA")] = None
    """The text to train on, if it is there: for its vocabulary, its length and the time that evaluating takes."""
    preset: str | None = None
    """Start from a named configuration (see below); other options override it."""
    config: Path | None = None
    """Start from a file: a run's run.json, or JSON/YAML with the same names as the options."""
    price_per_hour: float | None = None
    """What the machine costs an hour, in your currency."""
    json: bool = False
    """Print everything as JSON."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(arguments: list[str]) -> int:
    base, given = base_and_given(arguments)
    chosen = tyro.cli(
        Plan,
        prog="gptsmith plan",
        args=arguments,
        default=Plan(run=base),
        description=f"{Plan.__doc__}\n\npresets:\n{describe_presets()}",
    )
    if chosen.price_per_hour is not None and not chosen.price_per_hour >= 0:
        raise UsageError(f"--price-per-hour must be 0 or more, not {chosen.price_per_hour}.")
    config, began = chosen.run, time.monotonic()
    if config.budget is not None:
        from gptsmith.train.budget.parse import Budget

        Budget.parse(config.budget)

    from gptsmith.runtime import choose_device, choose_precision, keep_freed_memory
    from gptsmith.train.budget.recipe import Text, choose
    from gptsmith.train.forecast.plan import forecast
    from gptsmith.train.step import this_machine

    device = choose_device(config.device)
    keep_freed_memory()
    text = _read(chosen.data, config, given) if chosen.data else None
    vocabulary = text.vocab_size if text is not None else _vocabulary(config)
    if config.budget is not None or config.depth is not None:
        known = text or Text(ENDLESS, 0, vocabulary)
        machine = this_machine(device, choose_precision(config.precision, device), config.compile)
        choice = choose(config, given, known, machine, spent=time.monotonic() - began)
        config = choice.config
        for reason in choice.reasons:
            note(reason)
    plan = forecast(
        config, config.model.build(vocabulary, config.context), text, device, price_per_hour=chosen.price_per_hour
    )
    print(json.dumps(plan.to_dict(), indent=2) if chosen.json else describe(plan))
    return 0


def _read(data: str, config: TrainConfig, given: set[str]) -> Text:
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.run import read_text

    tokenizer, dataset = read_text(data, config, given)
    return Text(len(dataset.train), len(dataset.val), tokenizer.vocab_size)


def _vocabulary(config: TrainConfig) -> int:
    """How many tokens the tokenizer will have, as far as that is known without a text."""
    if config.tokenizer == "char":
        return CHARACTERS
    if config.tokenizer == "bpe":
        return config.vocab_size
    from gptsmith.train.run import ready_tokenizer

    return ready_tokenizer(config.tokenizer).vocab_size


# In words ------------------------------------------------------------------------------------------------------------


def describe(plan: Forecast) -> str:
    """A page for people."""
    from gptsmith.train.forecast.memory import gigabytes

    c, config = plan.model, plan.config
    accumulation = config.batch_size // plan.trained_micro_batch
    rows: list[tuple[str, str]] = []
    size = f"{_short(plan.parameters.total)} parameters"
    if c.num_experts:
        size += f", {_short(plan.parameters.multiplied)} used by a token"
    rows.append(("model", f"{config.model.family}: {size}"))
    shape = f"{c.num_hidden_layers} layers, {c.hidden_size:,} wide, {c.num_attention_heads} heads"
    source = "" if plan.text is not None else " (assumed)" if config.tokenizer == "char" else ""
    rows.append(("", f"{shape}, vocabulary {c.vocab_size:,}{source}, context {config.context:,}"))
    rows.append(
        ("arithmetic", f"{_short(plan.flops_per_token)}FLOP a token, {plan.flops_per_token * plan.tokens:.2g} in all")
    )
    passes = ""
    if plan.text is not None and plan.text.train_tokens:
        passes = f", {plan.tokens / plan.text.train_tokens:,.2g} passes over the text"
    rows.append(("training", f"{config.steps:,} steps of {config.batch_size:,} × {config.context:,} tokens{passes}"))
    rows.append(("device", f"{plan.device}, {plan.precision}{', compiled' if plan.times.compile else ''}"))

    verdict = gigabytes(plan.memory.total)
    if plan.available is not None:
        verdict += f" of {gigabytes(plan.available)} available"
    rows.append(("memory", f"{verdict}, with micro-batches of {plan.micro_batch_size}"))
    rows += [("", f"{gigabytes(size):>10}  {part}") for part, size in plan.memory.parts.items() if size]
    rows.append(("", _fit(plan, accumulation)))

    estimate = "" if plan.times.scale == 1 else f", from a pass {plan.times.scale:,.0f} times smaller"
    rows.append(
        ("speed", f"{_rate(plan.tokens_per_second)} tokens/s, {_length(plan.times.update)} an update{estimate}")
    )
    t = plan.times
    rows.append(("time", _length(plan.seconds) + ("" if plan.fits else ", if the memory were there")))
    if plan.text is None:
        rows.append(("", "without evaluations: how long they take depends on the text"))
    elif plan.text.val_tokens:
        rows.append(("", f"{_length(t.evaluation)} an evaluation, {_length(t.save)} a checkpoint"))
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f} at {plan.price_per_hour:,.2f} an hour"))
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _fit(plan: Forecast, accumulation: int) -> str:
    from gptsmith.train.forecast.memory import gigabytes

    if plan.available is None:
        return "how much is available is not known here"
    if plan.largest_micro_batch is None:
        return (
            f"does not fit: one sequence at a time takes {gigabytes(plan.smallest.total)}, "
            f"{gigabytes(plan.smallest.total - plan.available)} more than there is"
        )
    largest = f"largest micro-batch that fits: {plan.largest_micro_batch}"
    if plan.largest_micro_batch >= plan.micro_batch_size:
        return largest
    return f"does not fit; {largest}: train will use it, {accumulation} to an update"


def _short(number: float) -> str:
    """`0.82M`, `175B`."""
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:,.3g}{unit}"
    return f"{number / 1e3:,.3g}k"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _length(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    days = seconds / 86400
    if days < 3:
        return duration(seconds)
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"
