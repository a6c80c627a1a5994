"""Starting from an existing model: loading it, and what follows from it for the configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptsmith.checkpoint import load_train_state
from gptsmith.distributed.sharding import sharding_of
from gptsmith.errors import CheckpointError, TokenizerError, UsageError
from gptsmith.loading import load_model, resolve_model
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.resize import resize_embeddings
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers, Part
from gptsmith.run_directory import read_info
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.adapter import adapt, is_on
from gptsmith.train.budget import tuning
from gptsmith.train.config import INIT_LR_FACTOR, AdapterConfig, OptimConfig, PictureConfig, RunConfig
from gptsmith.train.variation import ModelFactory

LORA_LR_FACTOR = 10  # learning rate of an adapter, relative to that of the whole model
MOST_INIT_CONTEXT = 512  # default sequence length with --init, where the model allows more


@dataclass(frozen=True)
class Init:
    """A model to start from. Its weights are float32, on the CPU."""

    spec: str
    model: Transformer
    tokenizer: Tokenizer
    optimizer: str = "adamw"
    """What it was trained with."""
    checkpoint: Path | None = None
    """Its training state, where there is one."""
    train_fully: tuple[str, ...] = ()
    """Modules that an adapter has to train whole: embeddings of new tokens."""

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
    path = Path(spec)
    checkpoint = resolve_model(path).resolve() if path.is_dir() else None
    optimizer = None if checkpoint is None else _optimizer_of(checkpoint)
    has_state = checkpoint is not None and (checkpoint / "train").is_dir()
    return Init(spec, model, tokenizer, optimizer or "adamw", checkpoint if has_state else None)


def with_tokens(init: Init, tokenizer: Tokenizer) -> Init:
    """Return `init` with a tokenizer that may have more tokens: the model gets embeddings for them.

    New embeddings start as the mean of the others; an adapter has to train and save them whole.
    """
    known, rows = init.tokenizer.vocab_size, init.config.vocab_size
    if tokenizer.vocab_size == known:
        return replace(init, tokenizer=tokenizer)
    model = resize_embeddings(init.model, max(rows, tokenizer.vocab_size))
    tied = model.config.tie_word_embeddings
    with torch.no_grad():  # rows that the model had in reserve
        for weight in [model.embed_tokens.weight] if tied else [model.embed_tokens.weight, model.lm_head.weight]:
            weight[known:rows] = weight[:known].mean(dim=0)
    whole = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    return replace(init, model=model, tokenizer=tokenizer, train_fully=whole)


def _optimizer_of(checkpoint: Path) -> str | None:
    """Return the optimizer that trained a run's checkpoint; None where that is not known."""
    try:
        return str(read_info(checkpoint.parent.parent)["config"]["optim"]["name"])
    except (CheckpointError, KeyError, TypeError):
        return None


def refuse_options_of_new_models(config: RunConfig) -> None:
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


def refuse_adapter(config: RunConfig, overrides: Collection[str]) -> None:
    """Raise UsageError for options of an adapter in a run from new weights."""
    if _wants_adapter(config, overrides):
        raise UsageError("an adapter changes an existing model: name it with --init, or leave out the --lora options.")


def _wants_adapter(config: RunConfig, overrides: Collection[str]) -> bool:
    given = sorted(name for name in overrides if name.startswith("lora."))
    given = given or (["lora.…"] if replace(config.adapter, lora="auto") != AdapterConfig() else [])
    if config.adapter.lora == "off" and given:
        raise UsageError(f"--{given[0].replace('_', '-')} has no effect with --lora off; leave one of them out.")
    return config.adapter.lora == "on" or bool(given)


def adapted_to_init(
    config: RunConfig,
    overrides: Collection[str],
    init: Init,
    *,
    lora: bool = False,
    longest: int = MOST_INIT_CONTEXT,
) -> RunConfig:
    """Return `config` with the context, optimizer and learning rates that suit the model, where the user has not set
    them, and with the decision whether to train an adapter. Within a budget, fine-tuning has rules of its own for them
    (`gptsmith.train.budget.tuning`), whose reasons are printed.

    lora: train an adapter by default, or as the rules decide. longest: default sequence length, where the model allows
    more. An adapter is trained by AdamW, a whole model by the optimizer that pretrained it: the other one disturbs what
    the model knows (2605.10468).
    Raises UsageError for a context longer than the model's.
    """
    model, most = init.config, init.config.max_position_embeddings
    if model.vision is None and config.vision != PictureConfig():
        raise UsageError(
            f"{config.init.init} reads no pictures: leave out the --vision options, or add a vision "
            "tower first (`gptsmith vision init`)."
        )
    adapter, choice = _wants_adapter(config, overrides), "as set"
    if not adapter and config.adapter.lora == "auto":
        adapter, choice = lora, "as usual for this method"
        if lora and tuning.has_rules(config):
            adapter = tuning.prefers_adapter(init.optimizer)
            choice = f"chosen for a model that {init.optimizer} pretrained"
    config = config.replace(lora="on" if adapter else "off")
    if "optim.name" not in overrides:
        name = "adamw" if adapter else init.optimizer
        config = config.replace(optim={"name": name})
        note(f"optimizer: {name}, as {'usual for adapters' if adapter else 'the model was pretrained'} (--optim.name)")
    config = config.replace(init=str(absolute_spec(config.init.init)))
    if "context" not in overrides:
        config = config.replace(context=min(most, longest))
    if config.loop.context > most:
        why = (
            "its learned positions cannot be extended"
            if model.position == "learned"
            else f"extend it first: gptsmith export {config.init.init} --context {config.loop.context} --out DIR"
        )
        raise UsageError(f"--context {config.loop.context} is longer than the model's {most}: {why}.")
    if tuning.has_rules(config):
        config, reason = tuning.adapted(config, overrides, model, choice)
        note(reason)
        return config
    factor = INIT_LR_FACTOR / 20 if config.optim.name == "adamw" else config.method.muon_factor
    if is_on(config.adapter):
        factor *= LORA_LR_FACTOR
    usual = OptimConfig()
    optim = {"lr": usual.lr * factor, "embedding_lr": usual.embedding_lr * factor}
    return config.replace(optim={name: value for name, value in optim.items() if f"optim.{name}" not in overrides})


def absolute_spec(spec: str | None) -> str:
    """Return a path in full, so that the run can be resumed from another directory; other names as they are."""
    path = Path(spec or "")
    return str(resolve_model(path).resolve()) if path.exists() else str(spec)


def check_fits(model: ModelConfig, tokenizer: Tokenizer, config: RunConfig) -> None:
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
    return adapt(model, config.adapter, config.vision, train_fully=init.train_fully if init is not None else ())


def warm_start(optimizers: Optimizers, init: Init, config: RunConfig, part: Part = lambda p, value: value) -> None:
    """Take over the optimizer state of the model's checkpoint, for the parameters that it fits.

    part: takes what this process has of a parameter from the whole.

    Only where the whole model is trained, by the optimizer that it was trained with.
    """
    if init.checkpoint is None or is_on(config.adapter) or config.optim.name != init.optimizer:
        return
    shapes = {name: sharding_of(p).shape for p, name in optimizers.names.items()}
    state = {
        name.removeprefix("optimizer/"): tensor
        for name, tensor in load_train_state(init.checkpoint).tensors.items()
        if name.startswith("optimizer/")
    }
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if not tensor.ndim or tuple(tensor.shape) == shapes.get(name.rpartition("/")[0])
    }
    whole = {name.rpartition("/")[0] for name, tensor in fitting.items() if tensor.ndim}
    optimizers.load_state_tensors({name: t for name, t in fitting.items() if name.rpartition("/")[0] in whole}, part)
    note(f"optimizer state: from {init.checkpoint} (--no-warm-start starts without)")
