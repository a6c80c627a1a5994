"""What a run is about to do, in a few lines, before its first step."""

from __future__ import annotations

from typing import Any

from gptsmith.errors import first_few
from gptsmith.model.transformer import Transformer
from gptsmith.train.config import RunConfig
from gptsmith.train.objectives.registry import Prepared
from gptsmith.train.session import Session
from gptsmith.train.step import TrainingStep


def summary(session: Session, config: RunConfig, dataset: Prepared | None) -> str:
    """Return data, vocabulary, model, device, batch, steps and directory of a run, a line each."""
    model, tokenizer, run = session.model.config, session.tokenizer, session.run
    lines = []
    if dataset is not None:
        spec = run.part("data").get("spec")
        lines.append(f"data        {first_few(spec, 3) if isinstance(spec, list) else spec}: {dataset.summary()}")
    lines += [
        f"vocabulary  {tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
        f"model       {model.model_type}: {_layers(model.num_hidden_layers)}, width {model.hidden_size}, "
        f"{_parameters(session.model)}",
        f"device      {session.training_step.device}, {run.info['precision']}",
        f"batch       {_batch(config, session.training_step)}",
        f"steps       {session.trainer.steps:,}",
        f"run         {run.directory}",
    ]
    return "\n".join(lines)


def _parameters(model: Transformer) -> str:
    total, trained = model.num_parameters(trainable_only=False), model.num_parameters()
    return f"{total:,} parameters" if trained == total else f"{total:,} parameters, {trained:,} of them trained"


def _batch(config: RunConfig, step: TrainingStep[Any]) -> str:
    loop = config.loop
    batch = f"{loop.batch_size:,} sequences of {loop.context:,} tokens"
    ranks = step.ranks
    if ranks.world_size > 1:
        batch += f", {step.batch_size:,} on each of {ranks.data_size} processes"
        if ranks.layout.divides_model:
            batch += f" ({ranks.layout})"
    return batch if step.micro_batch_size >= step.batch_size else f"{batch}, {step.micro_batch_size:,} at a time"


def _layers(number: int) -> str:
    return f"{number} layer{'' if number == 1 else 's'}"
