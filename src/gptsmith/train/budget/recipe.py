"""From a budget to a run: the size, the context, the batch, the rates and the steps.

Every rule here stands in docs/recipes.md with the sweep that it comes from. What the user has settled stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from gptsmith.errors import UsageError
from gptsmith.log import duration
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import DIALLED, by_depth
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.train.budget.parse import Budget
from gptsmith.train.config import TrainConfig

SHALLOWEST, DEEPEST = 2, 35  # the ends of the dial: 0.4M and 8B parameters
FEWEST_STEPS = 30  # with fewer, nothing is learned


@dataclass(frozen=True)
class Text:
    """What the rules need to know of the prepared data."""

    train_tokens: int
    val_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Machine:
    """What the rules need to know of the machine, for a budget of time."""

    seconds_per_update: Callable[[TrainConfig, ModelConfig], float]
    """Times a few real updates."""
    compile_seconds: float
    """What `torch.compile` costs here once; infinite where it does not work."""
    compile_saves: float
    """The share of an update's time that it saves."""
    usual_rate: float
    """FLOP/s of updates on such machines: where the measuring begins. Rather too high: what is small is no faster on a
    GPU than what is not, and would be taken for all that it can do."""
    name: str
    """What to call it: `2 cores`."""


@dataclass(frozen=True)
class Choice:
    """A whole configuration, and why it is that."""

    config: TrainConfig
    reasons: tuple[str, ...]
    pause: float = 0.0
    """Expected seconds of one evaluation, with its checkpoint and preview."""
    ending: float = 0.0
    """Expected seconds after the last step."""


# -- the rules ---------------------------------------------------------------------------------------------------------

TOKENS_PER_PARAMETER = 5.0
MOST_PASSES = 60.0


MOST_CHARACTERS = 256
LONG_TEXT = 4_000_000  # characters, from which on byte pairs are better than these


def tokenizer_for(characters: int, alphabet: int, budget: Budget, rate: float) -> tuple[str, int]:
    """Which tokenizer and of how many tokens: characters for a short text of few different ones, else byte pairs. Their
    number grows with the budget, doubling with every 23-fold (Tao et al. 2024, 2407.13623), and is bounded by the text.

    characters: the text's length, as far as it has been looked at. rate: FLOP/s to expect, for a budget of time.
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
    """Tokens that attend to one another: longer for larger models, of whose work attention is a smaller part."""
    for context, least in ((2048, 5e8), (1024, 5e7), (512, 8e6), (256, 1e6)):
        if parameters >= least:
            return context
    return 128


def tied_for(vocab_size: int, hidden_size: int, parameters: int) -> bool:
    """Whether the output head shares the embedding's matrix: only where a matrix of its own would be a large part."""
    return vocab_size * hidden_size > parameters / 8


def batch_for(tokens: float) -> int:
    """Tokens per update, a power of two: about 1.2·√tokens, so that updates and their size grow alike."""
    return int(2 ** min(19, max(9, round(math.log2(1.2 * math.sqrt(tokens))))))


def rates_for(batch_tokens: float) -> tuple[float, float]:
    """Muon's and AdamW's peak rate, with the root of the batch. They do not depend on the width: a Muon update has a
    norm of its own, whatever the size of its matrix."""
    factor = min(2.0, max(0.5, math.sqrt(batch_tokens / 2048)))
    return round(0.02 * factor, 4), round(0.01 * factor, 4)


def weight_decay_for(passes: float, parameters_per_token: float) -> float:
    """The more a model can learn a text by heart, the more: 0.1 for every pass over a text of no more tokens than the
    model has parameters, and in proportion less for a longer one. Dropout beside it makes the result worse."""
    return round(min(3.0, max(0.1, 0.1 * passes * min(1.0, parameters_per_token))), 2)


# -- their application -------------------------------------------------------------------------------------------------


def choose(
    config: TrainConfig, given: Collection[str], text: Text, machine: Machine | None = None, *, spent: float = 0.0
) -> Choice:
    """Fill in what `config` leaves open under its `budget` or `depth`.

    given: names of settled options (`context`, `model.hidden_size`), which are left as they are.
    machine: needed for a budget of time. spent: seconds of it that are gone already.
    Raises UsageError for a budget in which nothing can be learned, and for options that contradict it.
    """
    if config.depth is not None:
        by_depth(config.depth)  # refuses what is no depth
        given = {*given, "depth"}
    if config.budget is None:
        return _by_depth(config, given, text)
    budget = Budget.parse(config.budget)
    if "steps" in given:
        raise UsageError("--steps and --budget both say how long to train; give one of them.")
    if budget.kind == "seconds":
        assert machine is not None
        return _by_time(config, given, text, budget, machine, spent)

    def affordable(model: ModelConfig, context: int) -> float:
        return budget.amount if budget.kind == "tokens" else budget.amount / flops_per_token(model, context)

    chosen, tokens = _best(config, given, text, affordable)
    spends = tokens * flops_per_token(_model(chosen, text), chosen.context)
    first = f"{budget}: " + (f"{tokens:.3g} tokens" if budget.kind == "flops" else f"{spends:.2g} FLOP")
    return Choice(chosen, (first, *_reasons(chosen, given, text, tokens)))


def _by_depth(config: TrainConfig, given: Collection[str], text: Text) -> Choice:
    """A size and no budget: as many tokens as suit the size, and the text."""

    def suitable(model: ModelConfig, context: int) -> float:
        return min(20 * count_parameters(model).multiplied, MOST_PASSES / 3 * max(1, text.train_tokens))

    chosen, tokens = _best(config, given, text, suitable)
    return Choice(chosen, _reasons(chosen, given, text, tokens))


def _by_time(
    config: TrainConfig, given: Collection[str], text: Text, budget: Budget, machine: Machine, spent: float
) -> Choice:
    """Measure, choose a size, measure that size, choose again: the speed of one is not quite that of another."""
    left = budget.amount - spent
    rates: dict[int, float] = {}  # FLOP/s of updates, by the number of parameters that they were measured at

    def plan(model: ModelConfig, context: int, rate: float) -> _Hours:
        forward = flops_per_token(model, context, training=False)
        looked_at = text.val_tokens
        if config.eval_tokens is not None or "eval_tokens" in given:
            looked_at = min(looked_at, config.eval_tokens or looked_at)
        else:
            looked_at = min(looked_at, max(10_000, int(EVALUATED * left * rate / forward)))
        evaluation, token = looked_at * forward / rate, SAMPLE_SECONDS * model.num_hidden_layers + forward / rate
        pause = evaluation + config.sample_tokens * token
        ending = evaluation + 6 * config.sample_tokens * token + REPORT_SECONDS
        pauses = max(0, min(MOST_PAUSES, int(0.1 * (left - ending) / pause)))
        return _Hours(left - ending - pauses * pause, pauses, pause, ending, looked_at)

    def rate_of(model: ModelConfig) -> float:
        size = count_parameters(model).multiplied
        return rates[min(rates, key=lambda known: abs(math.log(known / size)))] if rates else machine.usual_rate

    def affordable(model: ModelConfig, context: int) -> float:
        return max(1.0, plan(model, context, rate_of(model)).updates * rate_of(model) / flops_per_token(model, context))

    seen: set[TrainConfig] = set()
    while True:
        chosen, _ = _best(config, given, text, affordable)
        model = _model(chosen, text)
        key = replace(chosen, steps=1, eval_every=1, optim=config.optim)
        if key in seen:
            break
        seen.add(key)
        work = chosen.batch_size * chosen.context * flops_per_token(model, chosen.context)
        rates[count_parameters(model).multiplied] = work / machine.seconds_per_update(chosen, model)
    rate = rate_of(model)
    hours = plan(model, chosen.context, rate)
    usable = hours.updates
    compiled = usable * machine.compile_saves > 1.5 * machine.compile_seconds
    if compiled:
        rate, usable = rate / (1 - machine.compile_saves), usable - machine.compile_seconds
    per_update = chosen.batch_size * chosen.context * flops_per_token(model, chosen.context) / rate
    steps = int(usable / per_update)
    if steps < FEWEST_STEPS:
        need = budget.amount - usable + FEWEST_STEPS * per_update
        raise UsageError(
            f"--budget {config.budget} is too short to learn anything: {FEWEST_STEPS} updates take "
            f"{FEWEST_STEPS * per_update:.0f} s here, and starting, evaluating and reporting "
            f"{budget.amount - usable:.0f} s. Give at least {math.ceil(need)}s."
        )
    most = int(MOST_PASSES * text.train_tokens / (chosen.batch_size * chosen.context))
    early = ""
    if steps > most:
        steps, early = most, f"; it will end early: {MOST_PASSES:.0f} passes over this text are all that helps"
    chosen = _with_steps(chosen, given, text, steps, hours.pauses)
    if hours.looked_at < text.val_tokens:
        chosen = replace(chosen, eval_tokens=hours.looked_at)
    first = (
        f"{budget} on {machine.name}: {duration(usable)} for updates at {rate / 1e9:.0f} GFLOP/s"
        f"{' (compiled)' if compiled else ''}, {duration(budget.amount - usable)} for the rest{early}"
    )
    pause, ending = hours.pause, hours.ending
    tokens = float(steps * chosen.batch_size * chosen.context)
    return Choice(chosen, (first, *_reasons(chosen, given, text, tokens)), pause, ending)


class _Hours(NamedTuple):
    """How a budget of time divides: seconds for updates, how many evaluations before the last, and of what length."""

    updates: float
    pauses: int
    pause: float
    ending: float
    looked_at: int
    """Validation tokens of each evaluation."""


REPORT_SECONDS = 3.0
SAMPLE_SECONDS = 0.0005  # a layer of a token of a preview, besides its arithmetic
EVALUATED = 0.03  # at most so much of the time for one evaluation
MOST_PAUSES = 5


def _best(
    config: TrainConfig, given: Collection[str], text: Text, affordable: Callable[[ModelConfig, int], float]
) -> tuple[TrainConfig, float]:
    """The configuration whose size is nearest to the rule's for the tokens it can afford, and those tokens."""
    best: tuple[float, TrainConfig, float] | None = None
    depths = [config.depth] if config.depth is not None else range(SHALLOWEST, DEEPEST + 1)
    for depth in depths:
        sized = _sized(config, given, depth)
        parameters = count_parameters(_model(sized, text)).multiplied
        if "context" not in given:
            sized = replace(sized, context=context_for(parameters))
        if "model.tie_word_embeddings" not in given:
            tied = tied_for(text.vocab_size, sized.model.hidden_size, parameters)
            sized = replace(sized, model=replace(sized.model, tie_word_embeddings=tied))
        tokens = affordable(_model(sized, text), sized.context)
        misfit = abs(math.log(tokens / parameters / TOKENS_PER_PARAMETER))
        if best is None or misfit < best[0]:
            best = (misfit, sized, tokens)
    assert best is not None
    _, sized, tokens = best
    if tokens < FEWEST_STEPS * sized.context and Budget.parse(config.budget or "0s").kind != "seconds":
        raise UsageError(
            f"--budget {config.budget} is {tokens:.3g} tokens for the smallest model; {FEWEST_STEPS} updates take at "
            f"least {FEWEST_STEPS * sized.context:,}. Give more."
        )
    return _filled(sized, given, text, tokens), tokens


def _filled(config: TrainConfig, given: Collection[str], text: Text, tokens: float) -> TrainConfig:
    """Batch, rates and steps for that many tokens."""
    if "batch_size" not in given:
        config = replace(config, batch_size=max(1, batch_for(tokens) // config.context))
    if config.micro_batch_size and config.batch_size % config.micro_batch_size:
        config = replace(config, batch_size=config.micro_batch_size * -(-config.batch_size // config.micro_batch_size))
    lr, embedding_lr = rates_for(config.batch_size * config.context)
    optim: dict[str, Any] = {"lr": lr, "embedding_lr": embedding_lr}
    if config.optim.name == "adamw":
        optim = {"lr": lr / 20}
    optim = {name: value for name, value in optim.items() if f"optim.{name}" not in given}
    config = replace(config, optim=replace(config.optim, **optim))
    return _with_steps(config, given, text, max(1, round(tokens / (config.batch_size * config.context))), MOST_PAUSES)


def _with_steps(config: TrainConfig, given: Collection[str], text: Text, steps: int, pauses: int) -> TrainConfig:
    """With so many steps, and what depends on them."""
    config = config if "steps" in given else replace(config, steps=steps)
    if "optim.weight_decay" not in given:
        unique = max(1, text.train_tokens)
        parameters = count_parameters(_model(config, text)).multiplied
        tokens = config.steps * config.batch_size * config.context
        weight_decay = weight_decay_for(tokens / unique, parameters / unique)
        config = replace(config, optim=replace(config.optim, weight_decay=weight_decay))
    if "eval_every" not in given:
        config = replace(config, eval_every=max(1, -(-config.steps // (pauses + 1))))
    if "optim.warmup_steps" not in given:
        warmup = max(5, min(200, config.steps // 50))
        config = replace(config, optim=replace(config.optim, warmup_steps=warmup))
    return config


def _sized(config: TrainConfig, given: Collection[str], depth: int) -> TrainConfig:
    """`config` with the model of that depth, but for sizes that are given."""
    family = config.model.family
    size: dict[str, Any] = dict(by_depth(depth, family if family in DIALLED else "qwen3"))
    if family not in DIALLED:  # of other proportions: these follow from the width
        size["num_attention_heads"] = size["hidden_size"] // size["head_dim"]
        size |= {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    given_sizes = {name for name in size if f"model.{name}" in given}
    if "hidden_size" in given_sizes or "num_attention_heads" in given_sizes:  # the rest follows from what is given
        size |= {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    size = {name: value for name, value in size.items() if name not in given_sizes}
    return replace(config, model=replace(config.model, **size))


def _model(config: TrainConfig, text: Text) -> ModelConfig:
    return config.model.build(text.vocab_size, config.context)


def _reasons(config: TrainConfig, given: Collection[str], text: Text, tokens: float) -> tuple[str, str]:
    m, model = config.model, _model(config, text)
    parameters = count_parameters(model)
    per_parameter = tokens / parameters.multiplied
    why = "as asked" if "depth" in given or "model.hidden_size" in given else "the best size for that"
    return (
        f"depth {m.num_hidden_layers}, width {m.hidden_size}, context {config.context}: {parameters.total / 1e6:.2g}M "
        f"parameters, {per_parameter:.1f} tokens each; {why}",
        f"{config.steps:,} steps of {config.batch_size} × {config.context} tokens, "
        f"{tokens / max(1, text.train_tokens):.2g} passes over the text; learning rate {config.optim.lr:g}, "
        f"weight decay {config.optim.weight_decay:g}",
    )


def settled(config: TrainConfig) -> set[str]:
    """The names of all options but those a budget always chooses: for a preset or a file, which settle everything."""
    names = {f.name for f in fields(config)} | {f"model.{f.name}" for f in fields(config.model)}
    names |= {f"optim.{f.name}" for f in fields(config.optim)}
    return names - {"steps", "eval_every", "budget", "depth", "optim.warmup_steps"}
