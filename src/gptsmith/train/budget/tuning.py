"""Rules that turn a budget into a fine-tuning run: what is trained, at which rate, in which batches, for how long.

docs/recipes.md has the sweep behind each rule. Options that the user has set are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from gptsmith.model.config import ModelConfig
from gptsmith.train.config import RunConfig, SftConfig

RANK = 16
MOST_PASSES = 4.0  # over the same conversations; not swept
UPDATES_PER_PASS = 16  # at least, where there are as many rows
LARGEST_BATCH = 8  # rows
LEAST_UPDATES = 60  # in a budget: the batch becomes smaller for them


def has_rules(config: RunConfig) -> bool:
    """Return whether the rules of this module apply: to fine-tuning and distillation within a budget."""
    return config.auto.budget is not None and isinstance(config.method, SftConfig)


def rates_for(hidden_size: int, optimizer: str, *, adapter: bool) -> tuple[float, float]:
    """Return the peak learning rate, and Muon's second one, that of AdamW for embeddings, head and norms.

    AdamW's falls with the width, so that 576 gets 0.001 for an adapter. Muon's are those of pretraining and do not
    depend on the width.
    """
    if optimizer == "muon":
        return 0.02, 0.01
    rate = 0.01 * min(1.0, (128 if adapter else 64) / hidden_size) ** 1.5
    return float(f"{rate:.2g}"), float(f"{rate:.2g}")


def batch_for(rows: int) -> int:
    """Return rows per update: a power of two with enough updates in a pass. rows: of one pass, packed."""
    return int(2 ** max(0, min(math.log2(LARGEST_BATCH), math.floor(math.log2(max(1, rows / UPDATES_PER_PASS))))))


def prefers_adapter(optimizer: str) -> bool:
    """Return whether to train an adapter, where that is usual for the method and the user has not decided.

    optimizer: what pretrained the model. Muon on all weights learns more than an adapter and forgets less; AdamW on all
    weights learns less than an adapter.
    """
    return optimizer != "muon"


def adapted(config: RunConfig, overrides: Collection[str], model: ModelConfig, why: str) -> tuple[RunConfig, str]:
    """Fill in the rank and the learning rates, once it is settled whether an adapter is trained.

    why: the reason for an adapter or all weights. Return the whole reason, too.
    """
    adapter, optim = config.adapter.lora == "on", config.optim
    if adapter and "lora.rank" not in overrides:
        config = config.replace(**{"lora.rank": RANK})
    lr, embedding_lr = rates_for(model.hidden_size, optim.name, adapter=adapter)
    rates = {"lr": lr} | ({"embedding_lr": embedding_lr} if optim.name == "muon" else {})
    config = config.replace(optim={name: value for name, value in rates.items() if f"optim.{name}" not in overrides})
    what = f"an adapter of rank {config.adapter.rank}" if adapter else "all weights"
    reason = f"trains {what}, {why}; learning rate {config.optim.lr:g} for a width of {model.hidden_size}"
    return config, reason
