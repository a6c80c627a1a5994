"""gptsmith: make a GPT from your own text and use it.

    import gptsmith
    model, tokenizer = gptsmith.load("runs/bard")
    logits = model(ids)                                    # ids: (B, T) int64 -> logits: (B, T, V)
    text = gptsmith.generate(model, tokenizer, "ROMEO:", max_tokens=200, temperature=0.8)
    run = gptsmith.fit("input.txt", steps=500)             # train; gptsmith.runs("runs") lists the runs
    run = gptsmith.sft("smollm2-135m", "chats.jsonl")      # fine-tune on conversations

Importing this package is fast: torch is imported by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "add_vision",
    "bestofn",
    "classify",
    "distill",
    "dpo",
    "evaluate",
    "fit",
    "generate",
    "grpo",
    "load",
    "load_plugins",
    "merge",
    "ppo",
    "quantize",
    "reward",
    "runs",
    "sft",
]

if TYPE_CHECKING:
    from gptsmith.api import add_vision, bestofn, classify, distill, dpo, fit, grpo, merge, ppo, reward, runs, sft
    from gptsmith.engine.text import generate
    from gptsmith.loading import load_model as load
    from gptsmith.plugins import load_plugins

_EXPORTS = {  # name: module and attribute, imported on first use
    "add_vision": ("gptsmith.api", "add_vision"),
    "bestofn": ("gptsmith.api", "bestofn"),
    "classify": ("gptsmith.api", "classify"),
    "distill": ("gptsmith.api", "distill"),
    "dpo": ("gptsmith.api", "dpo"),
    "evaluate": ("gptsmith.evaluate.harness", "evaluate"),
    "fit": ("gptsmith.api", "fit"),
    "generate": ("gptsmith.engine.text", "generate"),
    "grpo": ("gptsmith.api", "grpo"),
    "load": ("gptsmith.loading", "load_model"),
    "load_plugins": ("gptsmith.plugins", "load_plugins"),
    "merge": ("gptsmith.api", "merge"),
    "ppo": ("gptsmith.api", "ppo"),
    "quantize": ("gptsmith.quantize.directory", "quantize"),
    "reward": ("gptsmith.api", "reward"),
    "runs": ("gptsmith.api", "runs"),
    "sft": ("gptsmith.api", "sft"),
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        import importlib

        module, attribute = _EXPORTS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'gptsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
