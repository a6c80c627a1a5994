"""Starting from an existing model: loading it, and what follows from it for the configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.loading import load_model, resolve_model
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.budget.recipe import INIT_LR_FACTOR
from gptsmith.train.config import RunConfig
from gptsmith.train.variation import ModelFactory

MOST_INIT_CONTEXT = 512  # default sequence length with --init, where the model allows more


@dataclass(frozen=True)
class Init:
    """A model to start from. Its weights are float32, on the CPU."""

    model: Transformer
    tokenizer: Tokenizer

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
    return Init(model, tokenizer)


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


def adapted_to_init(config: RunConfig, overrides: Collection[str], model: ModelConfig) -> RunConfig:
    """Return `config` with the context and learning rates that suit the model, where the user has not set them.

    Raises UsageError for a context that is longer than the model's.
    """
    most = model.max_position_embeddings
    config = config.replace(init=str(_absolute(config.init.init)))
    if "context" not in overrides:
        config = config.replace(context=min(most, MOST_INIT_CONTEXT))
    if config.loop.context > most:
        why = (
            "its learned positions cannot be extended"
            if model.position == "learned"
            else f"extend it first: gptsmith export {config.init.init} --context {config.loop.context} --out DIR"
        )
        raise UsageError(f"--context {config.loop.context} is longer than the model's {most}: {why}.")
    factor = INIT_LR_FACTOR / 20 if config.optim.name == "adamw" else INIT_LR_FACTOR
    optim = {"lr": config.optim.lr * factor, "embedding_lr": config.optim.embedding_lr * factor}
    return config.replace(optim={name: value for name, value in optim.items() if f"optim.{name}" not in overrides})


def _absolute(spec: str | None) -> str:
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
    return model
