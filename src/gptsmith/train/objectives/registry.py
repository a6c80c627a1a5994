"""Methods of training by name, so that a run can be resumed by the command line.

A method is an objective with the options and the data that it needs. An objective of your own is registered by name, or
found again as `module:name` if its module can be imported; unless you say otherwise it trains on a text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gptsmith.data.shards import Dataset
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.errors import UsageError
from gptsmith.registry import Registry
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.chats import ChatFiles, settle, with_template
from gptsmith.train.config import (
    ClassifyConfig,
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    MethodConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    RunConfig,
    SftConfig,
)
from gptsmith.train.init import MOST_INIT_CONTEXT, Init
from gptsmith.train.labels import LabelFiles, settle_labels, with_task_tokens_of
from gptsmith.train.objectives.base import Objective
from gptsmith.train.objectives.classify import classify
from gptsmith.train.objectives.distill import adapt_to_teacher, distill, settle_with_teacher
from gptsmith.train.objectives.dpo import adapt_to_reference, dpo, settle_dpo
from gptsmith.train.objectives.grpo import grpo, settle_grpo
from gptsmith.train.objectives.policy import settle_policy
from gptsmith.train.objectives.ppo import ppo
from gptsmith.train.objectives.pretrain import Pretrain
from gptsmith.train.objectives.reward import reward, settle_reward
from gptsmith.train.objectives.sft import sft
from gptsmith.train.preferences import PreferenceFiles
from gptsmith.train.prompts import PromptFiles
from gptsmith.train.row_files import MOST_CONTEXT
from gptsmith.train.text import Text


class Prepared(Protocol):
    """Data ready for training: tokenized, split into training and validation."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data, tokenized alike."""

    def record(self) -> dict[str, Any]:
        """Return the sizes, for run.json."""

    def summary(self) -> str:
        """Return the sizes in words, for the lines that training begins with."""


class TrainingData(Protocol):
    """The data of a run, opened but not yet tokenized."""

    @property
    def name(self) -> str:
        """What a run on it is called by default."""

    def make_tokenizer(self, config: RunConfig, overrides: Collection[str]) -> tuple[RunConfig, Tokenizer]:
        """Return the tokenizer of a run that starts without a model, and the configuration with what was chosen."""

    def prepare(self, config: RunConfig, tokenizer: Tokenizer) -> Prepared: ...

    def places(self) -> dict[str, Any]:
        """Return where the data is: `spec` and `val`, paths in full."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective is made from."""

    config: RunConfig
    tokenizer: Tokenizer
    dataset: Any
    """The prepared data: a `Dataset` of a text, or what the method's `open_data` gives; None for a run without data."""
    should_stop: Callable[[], bool] = lambda: False
    """Becomes true when the run is to be saved and stopped: long work should look at it."""
    ranks: DistributedContext = ALONE
    """The processes that share the run."""
    directory: Path | None = None
    """The run's directory, for records of the objective's own."""


ObjectiveFactory = Callable[[ObjectiveContext], Objective[Any]]


def unchanged(init: Init, config: RunConfig, data: TrainingData | None) -> Init:
    return init


def as_configured(config: RunConfig, overrides: Collection[str], prepared: Prepared | None) -> RunConfig:
    return config


@dataclass(frozen=True)
class Method:
    """A kind of training.

    options: the dataclass of `RunConfig.method`. open_data: opens DATA (a name, a path, or a
    list of them) as the configuration says.
    adapt_init: changes the model that training starts from (adds tokens of a chat template). settle: sets options that
    follow from the data and are not in `overrides` (steps from epochs).
    """

    objective: ObjectiveFactory
    options: type[MethodConfig] = PretrainConfig
    open_data: Callable[[Any, RunConfig], TrainingData] = Text.open
    adapt_init: Callable[[Init, RunConfig, TrainingData | None], Init] = unchanged
    settle: Callable[[RunConfig, Collection[str], Prepared | None], RunConfig] = as_configured
    needs_init: bool = False
    """Whether it starts from an existing model only."""
    trains_adapter: bool = False
    """Whether it trains an adapter by default."""
    longest: int = MOST_INIT_CONTEXT
    """Default sequence length with an existing model, where that allows more."""
    reads_text_alone: bool = False
    """Whether models that read pictures are refused."""
    varies_pictures: bool = False
    """Whether `--vision.augment` is supported."""

    def check_pictures(self, name: str, config: RunConfig, init: Init) -> None:
        """Raise UsageError where a model that reads pictures, or an option for them, does not suit this method."""
        if init.config.vision is not None and self.reads_text_alone:
            raise UsageError(f"{init.spec} reads pictures, and {name} is for models that read text alone.")
        if config.vision.augment and not self.varies_pictures:
            raise UsageError(f"--vision.augment: {name} does not vary pictures. Leave it out.")


def pretrain(context: ObjectiveContext, kind: type[Pretrain] = Pretrain) -> Pretrain:
    """Make the pretraining objective. kind: a subclass of `Pretrain`, for another loss on the same batches."""
    config, dataset, method = context.config, context.dataset, context.config.method
    if not isinstance(dataset, Dataset):
        raise UsageError("pretraining needs a text: a file, a folder or a named corpus.")
    return kind(
        dataset,
        batch_size=config.loop.batch_size,
        seq_len=config.loop.context,
        seed=config.loop.seed,
        vocab_size=context.tokenizer.vocab_size,
        mask_documents=method.masks_documents,
        eval_tokens=method.eval_tokens,
        should_stop=context.should_stop,
        ranks=context.ranks,
    )


_POLICY: dict[str, Any] = {
    "open_data": PromptFiles.open,
    "needs_init": True,
    "trains_adapter": True,
    "longest": MOST_CONTEXT,
}

METHODS: Registry[Method] = Registry(
    "objective",
    {
        "pretrain": Method(pretrain),
        "sft": Method(
            sft,
            options=SftConfig,
            open_data=ChatFiles.open,
            adapt_init=with_template,
            settle=settle,
            needs_init=True,
            trains_adapter=True,
            varies_pictures=True,
            longest=MOST_CONTEXT,
        ),
        "distill": Method(
            distill,
            options=DistillConfig,
            open_data=ChatFiles.open,
            adapt_init=adapt_to_teacher,
            settle=settle_with_teacher,
            needs_init=True,
            varies_pictures=True,
            longest=MOST_CONTEXT,
        ),
        "dpo": Method(
            dpo,
            options=DpoConfig,
            open_data=PreferenceFiles.open,
            adapt_init=adapt_to_reference,
            settle=settle_dpo,
            needs_init=True,
            trains_adapter=True,
            longest=MOST_CONTEXT,
        ),
        "classify": Method(
            classify,
            options=ClassifyConfig,
            open_data=LabelFiles.open,
            adapt_init=with_task_tokens_of,
            settle=settle_labels,
            needs_init=True,
            reads_text_alone=True,
            longest=MOST_CONTEXT,
        ),
        "reward": Method(
            reward,
            options=RewardConfig,
            open_data=PreferenceFiles.open,
            adapt_init=with_template,
            settle=settle_reward,
            needs_init=True,
            reads_text_alone=True,
            longest=MOST_CONTEXT,
        ),
        "ppo": Method(ppo, options=PpoConfig, settle=settle_policy, **_POLICY),
        "grpo": Method(grpo, options=GrpoConfig, settle=settle_grpo, **_POLICY),
    },
)


def register_objective(name: str, factory: ObjectiveFactory | Method) -> None:
    """Make an objective known as `name`. factory: takes an `ObjectiveContext`; a class will do. Or a whole `Method`."""
    METHODS.register(name, factory if isinstance(factory, Method) else Method(factory))


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


def find_method(name: str | ObjectiveFactory) -> tuple[str, Method]:
    """Return the name and the method of an objective: a registered name, `module:name`, or a factory itself."""
    if not isinstance(name, str):
        known = [registered for registered, method in METHODS.items() if method.objective is name]
        return (known[0], METHODS[known[0]]) if known else (reference_to(name), Method(name))
    if ":" not in name:
        return name, METHODS.find(name)
    found = import_reference(name)
    return name, found if isinstance(found, Method) else Method(found)
