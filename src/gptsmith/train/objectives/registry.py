"""Objectives by name, so that a run can be resumed by the command line.

An objective of your own is registered by name, or found again as `module:name` if its module can be imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptsmith.data.shards import Dataset
from gptsmith.errors import UsageError
from gptsmith.registry import Registry
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import RunConfig
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.pretrain import Pretrain


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective is made from."""

    config: RunConfig
    tokenizer: Tokenizer
    dataset: Dataset | None
    """The tokenized text; None for a run without one."""
    should_stop: Callable[[], bool] = lambda: False
    """Becomes true when the run is to be saved and stopped: long work should look at it."""


ObjectiveFactory = Callable[[ObjectiveContext], Objective[Any]]


def pretrain(context: ObjectiveContext, kind: type[Pretrain] = Pretrain) -> Pretrain:
    """Make the pretraining objective. kind: a subclass of `Pretrain`, for another loss on the same batches."""
    config, dataset = context.config, context.dataset
    if dataset is None:
        raise UsageError("pretraining needs a text: a file, a folder or a named corpus.")
    return kind(
        dataset,
        batch_size=config.loop.batch_size,
        seq_len=config.loop.context,
        seed=config.loop.seed,
        vocab_size=context.tokenizer.vocab_size,
        mask_documents=config.method.mask_documents,
        eval_tokens=config.method.eval_tokens,
        should_stop=context.should_stop,
    )


OBJECTIVES: Registry[ObjectiveFactory] = Registry("objective", {"pretrain": pretrain})


def register_objective(name: str, factory: ObjectiveFactory) -> None:
    """Make an objective known as `name`. factory: takes an `ObjectiveContext`; a class will do."""
    OBJECTIVES.register(name, factory)


def reference_to(thing: Any) -> str:
    """Return how `import_reference` finds a function or class again: `module:name`."""
    return f"{thing.__module__}:{thing.__qualname__}"


def import_reference(reference: str) -> Any:
    """Import what `module:name` names. UsageError where that fails."""
    module, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{reference} cannot be imported: {error}.") from None
    return found


def find_objective(name: str | ObjectiveFactory) -> tuple[str, ObjectiveFactory]:
    """Return the name and the factory of an objective: a registered name, `module:name`, or a factory itself."""
    if not isinstance(name, str):
        known = [registered for registered, factory in OBJECTIVES.items() if factory is name]
        return (known[0] if known else reference_to(name)), name
    return name, import_reference(name) if ":" in name else OBJECTIVES.find(name)
