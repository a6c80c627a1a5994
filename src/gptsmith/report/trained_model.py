"""The trained model of a run, as far as it can be loaded: its size, tokenizer and attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptsmith.errors import GptsmithError, TokenizerError
from gptsmith.report.samples import sample_opening
from gptsmith.run_directory import Run

if TYPE_CHECKING:
    from gptsmith.tokenizer import Tokenizer

MAX_ATTENTION_TOKENS = 20  # more cannot be labeled legibly
FALLBACK_TEXT = "the king and the crown"


@dataclass(frozen=True)
class Attention:
    """The trained model's attention over T tokens: weights of L layers, (H, T, T) each."""

    weights: list[Any]
    tokens: list[str]


@dataclass(frozen=True)
class TrainedModel:
    """What is known about the run's model. `attention_missing` says why there is no attention."""

    attention: Attention | None = None
    attention_missing: str = ""
    parameters: int | None = None
    tokenizer_kind: str = ""


def inspect_trained_model(run: Run, text: str | None) -> TrainedModel:
    """Load the best checkpoint and compute its attention over `text`, by default over the start of a sample."""
    if not any((run.directory / "checkpoints").glob("step-*")):
        return TrainedModel(attention_missing="No checkpoint had been saved when this report was written.")
    from gptsmith.loading import load_model  # imports torch
    from gptsmith.model.inspect import inspect

    try:
        model, tokenizer = load_model(run.directory)
    except (GptsmithError, OSError, RuntimeError, ValueError) as error:
        return TrainedModel(attention_missing=f"The trained model could not be loaded: {error}")
    trained = TrainedModel(parameters=model.num_parameters(), tokenizer_kind=tokenizer.kind)
    if text is not None:
        ids = tokenizer.encode(text)
        if len(ids) < 2:
            raise TokenizerError(f"attention requires a text of at least two tokens; {text!r} has {len(ids)}.")
    else:
        ids = _default_ids(run, tokenizer)
    ids = ids[: min(MAX_ATTENTION_TOKENS, model.config.max_position_embeddings)]
    if len(ids) < 2:
        return replace(trained, attention_missing="There is no text yet over which attention could be shown.")
    try:
        weights = inspect(model, ids, attention=True).attention
    except (RuntimeError, ValueError, IndexError) as error:  # mostly out of memory
        return replace(trained, attention_missing=f"Attention could not be computed: {error}")
    return replace(trained, attention=Attention(weights, [tokenizer.token_text(id) for id in ids]))


def _default_ids(run: Run, tokenizer: Tokenizer) -> list[int]:
    """Encode the start of a sample; without one, as much of FALLBACK_TEXT as the tokenizer can encode."""

    def encode(text: str) -> list[int]:
        try:
            return tokenizer.encode(text)
        except TokenizerError:
            return []

    ids = encode(sample_opening(run))
    return ids if len(ids) > 1 else encode(FALLBACK_TEXT) or encode("".join(filter(encode, FALLBACK_TEXT)))
