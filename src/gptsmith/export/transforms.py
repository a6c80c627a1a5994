"""Changes to a finished model before it is exported: a longer context, a mixture of experts.

    ModelTransform(context=32768, rope_scaling="yarn").apply(model)
    ModelTransform(upcycle=8).apply(model)

The description is plain data; only `apply` imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.model.config import ModelConfig
    from gptsmith.model.transformer import Transformer

MAX_CONTEXT = 1 << 21  # tokens; a longer one would be rejected when the model is loaded


@dataclass(frozen=True)
class ModelTransform:
    """The changes to make; by default none."""

    context: int | None = None
    """Extend the context to this many tokens, beyond what the model was trained on (RoPE models only)."""
    rope_scaling: Literal["yarn", "linear", "ntk", "llama3"] | None = None
    """How --context scales the rotary positions (default: yarn; longrope in a model that has it)."""
    upcycle: int | None = None
    """Turn every feed-forward layer into this many experts, initially copies of it (llama, mistral, qwen3)."""
    experts_per_tok: int | None = None
    """How many of the --upcycle experts each token uses (default: 2)."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None and self.context is None:
            raise UsageError("--rope-scaling requires --context.")
        if self.experts_per_tok is not None and self.upcycle is None:
            raise UsageError("--experts-per-tok requires --upcycle.")
        if self.context is not None and self.context > MAX_CONTEXT:
            raise UsageError(f"--context {self.context} exceeds the limit of {MAX_CONTEXT:,} tokens.")
        if self.upcycle is not None and self.upcycle < 1:
            raise UsageError(f"--upcycle {self.upcycle}: must be at least 1.")

    def apply(self, model: Transformer) -> Transformer:
        """Return the changed model; it is the same object if only its context changes.

        Raises UsageError for a model that does not support the change.
        """
        import torch

        from gptsmith.model.upcycle import upcycle

        if self.context is not None:
            model.extend_context(self.context, self.rope_scaling)
        if self.upcycle is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # initialize the routers the same way each time
                model = upcycle(model, self.upcycle, self.experts_per_tok or 2).eval()
        return model

    def describe(self, config: ModelConfig) -> str:
        """Return sentences for the model card that describe the changes; empty if there are none.

        config: of the changed model.
        """
        changes = []
        if self.context is not None:
            method = self.rope_scaling or (config.rope_scaling.kind if config.rope_scaling is not None else "yarn")
            changes.append(f"The context was extended to {self.context:,} tokens ({method}).")
        if self.upcycle is not None:
            used = self.experts_per_tok or 2
            changes.append(f"Each feed-forward layer was upcycled to {self.upcycle} experts, {used} per token.")
        return " ".join(changes)
