"""The name `gptsmith` for the command `lm_eval`: `lm_eval --model gptsmith --model_args pretrained=runs/bard …`.

The lm-evaluation-harness has no plug-ins, but it imports torch before it looks for a model, and torch calls the entry
points of the group `torch.backends` when it is imported. This is one of them. It does nothing in other programs.
"""

from __future__ import annotations

import sys
from contextlib import suppress


def register() -> None:
    """Make the model `gptsmith` known to the harness, if that is what imports torch. Its class is imported on use."""
    if "lm_eval" not in sys.modules:
        return
    with suppress(ImportError):  # another version of the harness: `python -m gptsmith.evaluate.lm_eval` still works
        import lm_eval.models  # noqa: F401  # the harness looks for its own models only while it knows none
        from lm_eval.api.registry import model_registry

        model_registry.register("gptsmith", target="gptsmith.evaluate.lm_eval:GptsmithLM")
