"""Rules that turn a budget into a run: model size, context, batch, learning rates and steps.

docs/recipes.md has the sweep behind each rule. Options that the user has set are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptsmith.errors import BudgetError, UsageError
from gptsmith.log import duration
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import DEPTH_SCALED, by_depth
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.train.budget.parse import Budget
from gptsmith.train.config import INIT_LR_FACTOR, AdapterConfig, RunConfig, option_places

SHALLOWEST, DEEPEST = 2, 35  # range of --depth: 0.4M to 8B parameters
FEWEST_STEPS = 30  # fewer updates learn nothing
MOST_PASSES = 60.0  # more passes over the same text do not help


@dataclass(frozen=True)
class Text:
    """What the rules need to know about the prepared data."""

    train_tokens: int
    val_tokens: int
    vocab_size: int
    init: ModelConfig | None = None
    """The model that training starts from, where there is one: its size is fixed."""
    most_passes: float = MOST_PASSES
    """A budget of time ends early rather than make more passes over the data."""
    least_updates: int = 0
    """Make a chosen batch smaller where fewer updates would fit into the budget. 0: leave it."""


@dataclass(frozen=True)
class Machine:
    """What the rules need to know about the machine, for a budget of time."""

    seconds_per_update: Callable[[RunConfig, ModelConfig], float]
    """Time a few real updates."""
    compile_seconds: float
    """One-time cost of `torch.compile`; infinite where it does not work."""
    compile_saves: float
    """Fraction of an update's time that compiling saves."""
    default_flops: float
    """FLOP/s of updates to assume before the first measurement. A high guess is safer: a small model does not reach a
    GPU's rate, and measuring one first would underestimate the machine."""
    name: str
    """How to describe it: `2 cores`."""


@dataclass(frozen=True)
class Plan:
    """A complete configuration, and the reasons for it."""

    config: RunConfig
    reasons: tuple[str, ...]
    eval_seconds: float = 0.0
    """Expected duration of one evaluation, with its checkpoint and preview."""
    teardown_seconds: float = 0.0
    """Expected time after the last step: the last evaluation, samples and the report."""


# -- the rules ---------------------------------------------------------------------------------------------------------

TOKENS_PER_PARAMETER = 5.0

MOST_CHARACTERS = 256  # in the alphabet of a character-level tokenizer
LONG_TEXT = 4_000_000  # characters; for longer texts byte pairs are better than characters


def tokenizer_for(characters: int, alphabet: int, budget: Budget, rate: float) -> tuple[str, int]:
    """Return the kind of tokenizer and its vocabulary size.

    Characters for a short text with a small alphabet, else byte pairs. Their number doubles with every 23-fold increase
    of the budget (Tao et al. 2024, 2407.13623) and is bounded by the text.

    characters: length of the text, as far as it has been read. rate: FLOP/s to expect, for a budget of time.
    """
    if alphabet <= MOST_CHARACTERS and characters < LONG_TEXT:
        return "char", 0
    flops = {
        "seconds": budget.amount * rate,
        "flops": budget.amount,
        "tokens": 6 * budget.amount**2 / TOKENS_PER_PARAMETER,
    }[budget.kind]
    wanted = round(11 + 0.22 * math.log2(flops / 2.5e12))
    most = int(math.log2(max(1, characters) / 500)) if characters < LONG_TEXT else 15
    return "bpe", 2 ** max(9, min(15, most, max(11, wanted)))


def context_for(parameters: int) -> int:
    """Return the context in tokens. It is longer for larger models, where attention is a smaller part of the work."""
    for context, least in ((2048, 5e8), (1024, 5e7), (512, 8e6), (256, 1e6)):
        if parameters >= least:
            return context
    return 128


def tied_for(vocab_size: int, hidden_size: int, parameters: int) -> bool:
    """Return whether to tie the output head to the embedding: only where its own matrix would be a large part."""
    return vocab_size * hidden_size > parameters / 8


def batch_for(tokens: float) -> int:
    """Return tokens per update, a power of two near 1.2·√tokens: the number and the size of updates grow alike."""
    return int(2 ** min(19, max(9, round(math.log2(1.2 * math.sqrt(tokens))))))


def rates_for(batch_tokens: float) -> tuple[float, float]:
    """Return Muon's and AdamW's peak learning rates, in proportion to the root of the batch.

    They do not depend on the width, since the norm of a Muon update does not depend on the size of the matrix.
    """
    factor = min(2.0, max(0.5, math.sqrt(batch_tokens / 2048)))
    return round(0.02 * factor, 4), round(0.01 * factor, 4)


def weight_decay_for(passes: float, parameters_per_token: float) -> float:
    """Return the weight decay: larger the more a model can memorize the text.

    0.1 per pass over a text of at most as many tokens as the model has parameters, and proportionally less for a longer
    text. Dropout on top of it makes the result worse.
    """
    return round(min(3.0, max(0.1, 0.1 * passes * min(1.0, parameters_per_token))), 2)


# -- applying them -----------------------------------------------------------------------------------------------------


def choose(
    config: RunConfig, overrides: Collection[str], text: Text, machine: Machine | None = None, *, spent: float = 0.0
) -> Plan:
    """Fill in what `config` leaves open under its `budget` or `depth`.

    overrides: flat names of options set by the user (`context`, `model.hidden_size`); they are never changed.
    machine: needed for a budget of time. spent: seconds of it that have passed already.
    Raises UsageError for a budget too small to learn anything, and for options that contradict it.
    """
    if config.auto.depth is not None:
        if text.init is not None:
            raise UsageError("--depth sets the size of a new model; with --init the size is that of the model.")
        by_depth(config.auto.depth)  # raises for an invalid depth
        overrides = {*overrides, "depth"}
    if config.auto.budget is None:
        return _by_depth(config, overrides, text)
    budget = Budget.parse(config.auto.budget)
    if "steps" in overrides:
        raise UsageError("--steps and --budget both set the length of training; use one of them.")
    if budget.kind == "seconds":
        assert machine is not None
        return _by_time(config, overrides, text, budget, machine, spent)

    def affordable(model: ModelConfig, context: int) -> float:
        return budget.amount if budget.kind == "tokens" else budget.amount / flops_per_token(model, context)

    chosen, tokens = _best(config, overrides, text, affordable)
    flops = tokens * flops_per_token(_model(chosen, text), chosen.loop.context)
    first = f"{budget}: " + (f"{tokens:.3g} tokens" if budget.kind == "flops" else f"{flops:.2g} FLOP")
    return Plan(chosen, (first, *_reasons(chosen, overrides, text, tokens)))


def _by_depth(config: RunConfig, overrides: Collection[str], text: Text) -> Plan:
    """Plan for a size without a budget: the number of tokens follows from the size and the length of the text."""

    def suitable(model: ModelConfig, context: int) -> float:
        return min(20 * count_parameters(model).multiplied, MOST_PASSES / 3 * max(1, text.train_tokens))

    chosen, tokens = _best(config, overrides, text, suitable)
    return Plan(chosen, _reasons(chosen, overrides, text, tokens))


def _by_time(
    config: RunConfig, overrides: Collection[str], text: Text, budget: Budget, machine: Machine, spent: float
) -> Plan:
    """Choose a size for an assumed speed, measure it, and choose again until the choice does not change."""
    left = budget.amount - spent
    rates: dict[int, float] = {}  # measured FLOP/s of updates, by number of parameters

    def divide(model: ModelConfig, context: int, rate: float) -> _TimeSplit:
        forward = flops_per_token(model, context, training=False)
        eval_tokens = text.val_tokens
        if config.method.eval_tokens is not None or "eval_tokens" in overrides:
            eval_tokens = min(eval_tokens, config.method.eval_tokens or eval_tokens)
        else:
            eval_tokens = min(eval_tokens, max(10_000, int(EVAL_SHARE * left * rate / forward)))
        loss, token = eval_tokens * forward / rate, SAMPLE_SECONDS * model.num_hidden_layers + forward / rate
        evaluation = loss + config.loop.sample_tokens * token
        teardown = loss + 6 * config.loop.sample_tokens * token + REPORT_SECONDS
        evaluations = max(0, min(MOST_EVALUATIONS, int(0.1 * (left - teardown) / evaluation)))
        updates = left - teardown - evaluations * evaluation
        return _TimeSplit(updates, evaluations, evaluation, teardown, eval_tokens)

    def rate_of(model: ModelConfig) -> float:
        size = count_parameters(model).multiplied
        return rates[min(rates, key=lambda known: abs(math.log(known / size)))] if rates else machine.default_flops

    def affordable(model: ModelConfig, context: int) -> float:
        rate = rate_of(model)
        return max(1.0, divide(model, context, rate).updates * rate / flops_per_token(model, context))

    seen: set[RunConfig] = set()
    while True:
        chosen, _ = _best(config, overrides, text, affordable)
        model, loop = _model(chosen, text), chosen.loop
        key = chosen.replace(steps=1, eval_every=1, optim=config.optim)
        if key in seen:
            break
        seen.add(key)
        work = loop.batch_size * loop.context * flops_per_token(model, loop.context)
        rates[count_parameters(model).multiplied] = work / machine.seconds_per_update(chosen, model)
    rate = rate_of(model)
    split = divide(model, loop.context, rate)
    usable = split.updates
    compiled = usable * machine.compile_saves > 1.5 * machine.compile_seconds
    if compiled:
        rate, usable = rate / (1 - machine.compile_saves), usable - machine.compile_seconds
    per_update = loop.batch_size * loop.context * flops_per_token(model, loop.context) / rate
    steps = int(usable / per_update)
    if steps < FEWEST_STEPS:
        need = budget.amount - usable + FEWEST_STEPS * per_update
        raise BudgetError(
            f"--budget {config.auto.budget} is too short to learn anything: {FEWEST_STEPS} updates take "
            f"{FEWEST_STEPS * per_update:.0f} s here, and starting, evaluating and reporting "
            f"{budget.amount - usable:.0f} s. Give at least {math.ceil(need)}s.",
            steps=max(0, steps),
        )
    most = max(1, int(text.most_passes * text.train_tokens / (loop.batch_size * loop.context)))
    early = ""
    if steps > most:
        steps, early = most, f"; it will end early: more than {text.most_passes:.0f} passes over this text do not help"
    chosen = _with_steps(chosen, overrides, text, steps, split.evaluations)
    if split.eval_tokens < text.val_tokens:
        chosen = chosen.replace(eval_tokens=split.eval_tokens)
    first = (
        f"{budget} on {machine.name}: {duration(usable)} for updates at {rate / 1e9:.0f} GFLOP/s"
        f"{' (compiled)' if compiled else ''}, {duration(budget.amount - usable)} for the rest{early}"
    )
    tokens = float(steps * loop.batch_size * loop.context)
    reasons = (first, *_reasons(chosen, overrides, text, tokens))
    return Plan(chosen, reasons, split.eval_seconds, split.teardown_seconds)


class _TimeSplit(NamedTuple):
    """How a budget of time divides."""

    updates: float
    """Seconds for updates."""
    evaluations: int
    """Number of evaluations before the last."""
    eval_seconds: float
    teardown_seconds: float
    eval_tokens: int
    """Validation tokens per evaluation."""


REPORT_SECONDS = 3.0
SAMPLE_SECONDS = 0.0005  # per layer and token of a preview, besides its arithmetic
EVAL_SHARE = 0.03  # largest share of the time for one evaluation
MOST_EVALUATIONS = 5


def _best(
    config: RunConfig, overrides: Collection[str], text: Text, affordable: Callable[[ModelConfig, int], float]
) -> tuple[RunConfig, float]:
    """Return the configuration whose size is nearest to the rule's for the tokens it can afford, and those tokens."""
    best: tuple[float, RunConfig, float] | None = None
    for sized in _candidates(config, overrides, text):
        parameters = count_parameters(_model(sized, text)).multiplied
        tokens = affordable(_model(sized, text), sized.loop.context)
        misfit = abs(math.log(tokens / parameters / TOKENS_PER_PARAMETER))
        if best is None or misfit < best[0]:
            best = (misfit, sized, tokens)
    assert best is not None
    _, sized, tokens = best
    fewest = FEWEST_STEPS * sized.loop.context
    if tokens < fewest and Budget.parse(config.auto.budget or "0s").kind != "seconds":
        size = "the smallest model" if text.init is None else "this model"
        raise UsageError(
            f"--budget {config.auto.budget} is {tokens:.3g} tokens for {size}; {FEWEST_STEPS} updates take at least "
            f"{fewest:,}. Give more."
        )
    return _filled(sized, overrides, text, tokens), tokens


def _candidates(config: RunConfig, overrides: Collection[str], text: Text) -> Iterator[RunConfig]:
    """Yield `config` with each size that can be chosen: one for each depth, or the only one of an existing model."""
    if text.init is not None:
        context = min(text.init.max_position_embeddings, context_for(count_parameters(text.init).multiplied))
        yield config if "context" in overrides else config.replace(context=context)
        return
    depths = [config.auto.depth] if config.auto.depth is not None else range(SHALLOWEST, DEEPEST + 1)
    for depth in depths:
        sized = _sized(config, overrides, depth)
        parameters = count_parameters(_model(sized, text)).multiplied
        if "context" not in overrides:
            sized = sized.replace(context=context_for(parameters))
        if "model.tie_word_embeddings" not in overrides:
            tied = tied_for(text.vocab_size, sized.model.hidden_size, parameters)
            sized = sized.replace(model={"tie_word_embeddings": tied})
        yield sized


def _filled(config: RunConfig, overrides: Collection[str], text: Text, tokens: float) -> RunConfig:
    """Return `config` with the batch size, learning rates and steps for that many tokens."""
    loop, micro = config.loop, config.loop.micro_batch_size
    if "batch_size" not in overrides:
        size, unit = max(1, batch_for(tokens) // loop.context), (micro or 1) * config.parallel.processes
        config = config.replace(batch_size=unit * -(-size // unit))
    if text.least_updates:
        rows = int(tokens / (loop.context * text.least_updates))
        size = config.parallel.processes * max(1, rows // config.parallel.processes)
        config = config.replace(batch_size=min(config.loop.batch_size, size))
    lr, embedding_lr = rates_for(config.loop.batch_size * loop.context)
    if text.init is not None:
        lr, embedding_lr = lr * INIT_LR_FACTOR, embedding_lr * INIT_LR_FACTOR
    rates = {"lr": lr / 20} if config.optim.name == "adamw" else {"lr": lr, "embedding_lr": embedding_lr}
    config = config.replace(optim={name: v for name, v in rates.items() if f"optim.{name}" not in overrides})
    steps = max(1, round(tokens / (config.loop.batch_size * loop.context)))
    return _with_steps(config, overrides, text, steps, MOST_EVALUATIONS)


def _with_steps(config: RunConfig, overrides: Collection[str], text: Text, steps: int, evaluations: int) -> RunConfig:
    """Return `config` with that many steps, and the options that depend on them."""
    config = config if "steps" in overrides else config.replace(steps=steps)
    steps = config.loop.steps
    if "optim.weight_decay" not in overrides:
        unique = max(1, text.train_tokens)
        parameters = count_parameters(_model(config, text)).multiplied
        tokens = steps * config.loop.batch_size * config.loop.context
        config = config.replace(optim={"weight_decay": weight_decay_for(tokens / unique, parameters / unique)})
    if "eval_every" not in overrides:
        config = config.replace(eval_every=max(1, -(-steps // (evaluations + 1))))
    if "optim.warmup_steps" not in overrides:
        config = config.replace(optim={"warmup_steps": max(5, min(200, steps // 50))})
    return config


def _sized(config: RunConfig, overrides: Collection[str], depth: int) -> RunConfig:
    """Return `config` with the model of that depth, but for sizes set by the user."""
    family = config.model.family
    size: dict[str, Any] = dict(by_depth(depth, family if family in DEPTH_SCALED else "qwen3"))
    if family not in DEPTH_SCALED:  # of other proportions: these follow from the width
        size["num_attention_heads"] = size["hidden_size"] // size["head_dim"]
        size |= {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    overridden = {name for name in size if f"model.{name}" in overrides}
    if "hidden_size" in overridden or "num_attention_heads" in overridden:  # the rest follows from what is set
        size |= {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    return config.replace(model={name: value for name, value in size.items() if name not in overridden})


def _model(config: RunConfig, text: Text) -> ModelConfig:
    return text.init or config.model.build(text.vocab_size, config.loop.context)


def _reasons(config: RunConfig, overrides: Collection[str], text: Text, tokens: float) -> tuple[str, str]:
    model, loop = _model(config, text), config.loop
    parameters = count_parameters(model)
    per_parameter = tokens / parameters.multiplied
    why = "as set" if "depth" in overrides or "model.hidden_size" in overrides else "the best size for that"
    if text.init is not None:
        why = "the model given to --init"
    return (
        f"depth {model.num_hidden_layers}, width {model.hidden_size}, context {loop.context}: "
        f"{parameters.total / 1e6:.2g}M parameters, {per_parameter:.1f} tokens each; {why}",
        f"{loop.steps:,} steps of {loop.batch_size} × {loop.context} tokens, "
        f"{tokens / max(1, text.train_tokens):.2g} passes over the text; learning rate {config.optim.lr:g}, "
        f"weight decay {config.optim.weight_decay:g}",
    )


def settled(config: RunConfig) -> set[str]:
    """Return the flat names of the options that a preset or a file sets: all but those that a budget always chooses."""
    names = set(option_places(type(config.method))) - {"steps", "eval_every", "budget", "depth", "optim.warmup_steps"}
    if config.adapter == AdapterConfig():  # which is not there
        names -= {name for name in names if name.startswith("lora")}
    return names
