"""Changes to a finished model on its way out: a longer context, a mixture of experts. Plain data; torch only to apply.

ModelTransform(context=32768, rope_scaling="yarn").apply(model)
ModelTransform(upcycle=8).apply(model)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptsmith.errors import UsageError

if TYPE_CHECKING:
    from gptsmith.model.transformer import Transformer

LONGEST_CONTEXT = 1 << 21  # what is read again


@dataclass(frozen=True)
class ModelTransform:
    """What is changed; by default nothing."""

    context: int | None = None
    """Make it read this many tokens, more than it was trained on; rotary positions only."""
    rope_scaling: Literal["yarn", "linear", "ntk", "llama3"] | None = None
    """How --context stretches the rotary positions (default: yarn)."""
    upcycle: int | None = None
    """Make every feed-forward layer this many experts, at first copies of it (llama, mistral, qwen3)."""
    experts_per_tok: int | None = None
    """How many of the experts of --upcycle a token uses (default: 2)."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None and self.context is None:
            raise UsageError("--rope-scaling says how --context is reached; give both.")
        if self.experts_per_tok is not None and self.upcycle is None:
            raise UsageError("--experts-per-tok is of --upcycle; give both.")
        if self.context is not None and self.context > LONGEST_CONTEXT:
            raise UsageError(f"--context {self.context} is more than {LONGEST_CONTEXT:,} tokens.")
        if self.upcycle is not None and self.upcycle < 1:
            raise UsageError(f"--upcycle {self.upcycle}: at least 1 expert.")

    def apply(self, model: Transformer) -> Transformer:
        """The changed model (the same one, if only its context is). UsageError where it cannot be changed so."""
        import torch

        from gptsmith.model.upcycle import upcycle

        if self.context is not None:
            model.extend_context(self.context, self.rope_scaling or "yarn")
        if self.upcycle is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # of the routers: the same command writes the same file
                model = upcycle(model, self.upcycle, self.experts_per_tok or 2).eval()
        return model

    def describe(self) -> str:
        """What was changed, for the model card; empty if nothing."""
        done = []
        if self.context is not None:
            done.append(f"The context was extended to {self.context:,} tokens ({self.rope_scaling or 'yarn'}).")
        if self.upcycle is not None:
            done.append(
                f"Each feed-forward layer was upcycled to {self.upcycle} experts, {self.experts_per_tok or 2} a token."
            )
        return " ".join(done)
