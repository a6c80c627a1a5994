"""`gptsmith plan`: forecast a run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from gptsmith.cli.run_options import RunOptions, explicit_options, parse_run, refuse_processes
from gptsmith.errors import UsageError
from gptsmith.log import duration, note
from gptsmith.train.config import RunConfig

if TYPE_CHECKING:
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.forecast.plan import Plan as Forecast

CHARACTERS = 100  # assumed vocabulary of a char tokenizer
TUNING = ("sft", "distill", "reward", "dpo", "ppo", "grpo", "classify")  # commands with forecasts of their own
GPT2_TOKENS = 50257  # vocabulary of the tokenizer of GPT-2 and GPT-3, which is fetched only to be used
ENDLESS = 10**15  # assumed tokens where there is no text


@dataclass(frozen=True)
class Plan(RunOptions):
    """Forecast the parameters, memory, time and cost of a run without running it. Takes the options of train.

    With the name of another command it forecasts that one, and takes its options: `gptsmith plan sft MODEL DATA`, and
    likewise distill, reward, dpo, ppo, grpo and classify.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[DATA ...]")] = ()
    """The text to train on, if you have it. Gives the vocabulary, the length and the time of evaluations."""
    cluster: str | None = None
    """Forecast the run on many accelerators, such as 1024xH100: layout, memory, time, failures and cost."""
    price_per_hour: float | None = None
    """Price of the machine per hour, in your currency; with --cluster, of one accelerator (default: as in its file)."""
    json: bool = False
    """Print the forecast as JSON."""


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in TUNING:
        from gptsmith.cli import plan_tuning

        return plan_tuning.main(arguments[0], arguments[1:])
    chosen, overrides = parse_run(Plan, "plan", arguments)
    refuse_processes(chosen.run, "plan")
    check_price(chosen.price_per_hour)
    config, began = chosen.run, time.monotonic()
    cluster = None
    if chosen.cluster is not None:
        from gptsmith.train.forecast.cluster_plan import Cluster

        cluster = Cluster.parse(chosen.cluster)
        if "device" in explicit_options(arguments):
            raise UsageError("--cluster is about other machines; leave out --device.")
        if config.auto.budget is not None:
            raise UsageError("a --budget is for this machine: with --cluster, give the size of the model and --steps.")
    if config.auto.budget is not None:
        from gptsmith.train.budget.parse import Budget

        Budget.parse(config.auto.budget)

    from gptsmith.runtime import choose_device, choose_precision, keep_freed_memory
    from gptsmith.train.budget.machine import this_machine
    from gptsmith.train.budget.recipe import choose
    from gptsmith.train.forecast.plan import forecast

    device = choose_device(config.loop.device)
    keep_freed_memory()
    config, text, known = _text_of(chosen.data, config, overrides)
    if config.auto.budget is not None or config.auto.depth is not None:
        machine = this_machine(device, choose_precision(config.loop.precision, device), config.loop.compile)
        plan = choose(config, overrides, known, machine, spent=time.monotonic() - began)
        config = plan.config
        for reason in plan.reasons:
            note(reason)
    model_config = known.init or config.model.build(known.vocab_size, config.loop.context)
    if cluster is not None:
        from gptsmith.cli import plan_cluster
        from gptsmith.train.forecast.cluster_plan import plan_cluster as plan_for

        given = explicit_options(arguments)
        spread = plan_for(
            config,
            model_config,
            cluster,
            price_per_hour=chosen.price_per_hour,
            micro_batch_size=config.loop.micro_batch_size if "micro_batch_size" in given else None,
            layout=config.parallel.layout(cluster.count) if "parallel" in given else None,
        )
        print(json.dumps(spread.to_dict(), indent=2) if chosen.json else plan_cluster.describe(spread, config))
        return 0
    found = forecast(config, model_config, text, device, price_per_hour=chosen.price_per_hour)
    print(json.dumps(found.to_dict(), indent=2) if chosen.json else describe(found))
    return 0


def check_price(price_per_hour: float | None) -> None:
    if price_per_hour is not None and not price_per_hour >= 0:
        raise UsageError(f"--price-per-hour must be 0 or more, not {price_per_hour}.")


def _text_of(data: tuple[str, ...], config: RunConfig, overrides: set[str]) -> tuple[RunConfig, Text | None, Text]:
    """Return the configuration adapted to --init, the text or None, and what is known or assumed about it."""
    from gptsmith.train.budget.recipe import Text
    from gptsmith.train.init import adapted_to_init, load_init
    from gptsmith.train.objectives.registry import METHODS
    from gptsmith.train.text import Text as OpenedText
    from gptsmith.train.text import read_text

    init = None
    if config.init.init is not None:
        init = load_init(config.init.init)
        config = adapted_to_init(config, overrides, init)
        METHODS["pretrain"].check_pictures("pretraining", config, init)
    if not data:
        size = vocabulary(config) if init is None else init.tokenizer.vocab_size
        return config, None, Text(ENDLESS, 0, size, init.config if init else None)
    if init is None:
        tokenizer, dataset = read_text(data, config, overrides)
    else:
        tokenizer, dataset = init.tokenizer, OpenedText.open(data, config).prepare(config, init.tokenizer)
    text = Text(len(dataset.train), len(dataset.val), tokenizer.vocab_size, init.config if init else None)
    return config, text, text


def vocabulary(config: RunConfig) -> int:
    """Return the vocabulary size of the tokenizer, as far as it is known without a text."""
    if config.init.tokenizer == "char":
        return CHARACTERS
    if config.init.tokenizer == "bpe":
        return config.init.vocab_size
    if config.init.tokenizer == "gpt2":
        return GPT2_TOKENS
    from gptsmith.train.text import ready_tokenizer

    return ready_tokenizer(config.init.tokenizer).vocab_size


# The printed forecast ------------------------------------------------------------------------------------------------


def describe(plan: Forecast) -> str:
    """Return the forecast as text."""
    from gptsmith.train.forecast.memory import gigabytes

    c, config = plan.model, plan.config
    accumulation = config.loop.batch_size // plan.trained_micro_batch
    rows: list[tuple[str, str]] = []
    size = f"{short(plan.parameters.total)} parameters"
    if c.num_experts:
        size += f", {short(plan.parameters.multiplied)} used per token"
    rows.append(("model", f"{config.init.init or config.model.family}: {size}"))
    shape = f"{c.num_hidden_layers} layers, {c.hidden_size:,} wide, {c.num_attention_heads} heads"
    source = "" if plan.text is not None else " (assumed)" if config.init.tokenizer == "char" else ""
    rows.append(("", f"{shape}, vocabulary {c.vocab_size:,}{source}, context {config.loop.context:,}"))
    rows.append(
        (
            "arithmetic",
            f"{short(plan.flops_per_token)}FLOP per token, {plan.flops_per_token * plan.tokens:.2g} in total",
        )
    )
    passes = ""
    if plan.text is not None and plan.text.train_tokens:
        passes = f", {plan.tokens / plan.text.train_tokens:,.2g} passes over the text"
    loop = config.loop
    rows.append(("training", f"{loop.steps:,} steps of {loop.batch_size:,} × {loop.context:,} tokens{passes}"))
    rows.append(("device", f"{plan.device}, {plan.precision}{', compiled' if plan.times.compile else ''}"))

    verdict = gigabytes(plan.memory.total)
    if plan.available is not None:
        verdict += f" of {gigabytes(plan.available)} available"
    rows.append(("memory", f"{verdict}, with micro-batches of {plan.micro_batch_size}"))
    rows += [("", f"{gigabytes(size):>10}  {part}") for part, size in plan.memory.parts.items() if size]
    rows.append(("", _fit(plan, accumulation)))
    if plan.activation_checkpointing:
        rows.append(("", "activations are recomputed in the backward pass"))

    estimate = "" if plan.times.scale == 1 else f", extrapolated from {plan.times.scale:,.0f} times less work"
    rows.append(("speed", f"{rate(plan.tokens_per_second)} tokens/s, {length(plan.times.update)} per update{estimate}"))
    t = plan.times
    if t.rollout:
        rows.append(("", f"{length(t.rollout)} of it to sample and score answers of full length"))
    rows.append(("time", length(plan.seconds) + ("" if plan.fits else ", if there were enough memory")))
    if plan.text is None:
        rows.append(("", "without evaluations, whose time depends on the text"))
    elif plan.text.val_tokens:
        rows.append(("", f"{length(t.evaluation)} per evaluation, {length(t.save)} per checkpoint"))
    if config.eval.tasks is not None:
        rows.append(("", "without the tasks of --eval.tasks, whose time is not forecast"))
    if t.reference:
        rows.append(("", f"{length(t.reference)} before the first update, for the reference"))
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f} at {plan.price_per_hour:,.2f} per hour"))
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _fit(plan: Forecast, accumulation: int) -> str:
    from gptsmith.train.forecast.memory import gigabytes

    if plan.available is None:
        return "the available memory is not known here"
    if plan.largest_micro_batch is None:
        return (
            f"does not fit: one sequence at a time takes {gigabytes(plan.smallest.total)}, "
            f"{gigabytes(plan.smallest.total - plan.available)} more than is available"
        )
    largest = f"largest micro-batch that fits: {plan.largest_micro_batch}"
    if plan.largest_micro_batch >= plan.micro_batch_size:
        return largest
    return f"does not fit; {largest}: train will use it, {accumulation} per update"


def short(number: float) -> str:
    """Format a number like `0.82M` or `175B`."""
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:,.3g}{unit}"
    return f"{number / 1e3:,.3g}k"


def rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def length(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    days = seconds / 86400
    if days < 3:
        return duration(seconds)
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"
