"""Evaluation. The package is also the function `gptsmith.evaluate(model, tokenizer, tasks=[…])`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Importing a module of this package makes the package itself what `gptsmith.evaluate` is, so it can be called."""

    def __call__(self, model: Any, tokenizer: Any, tasks: Any, **options: Any) -> Any:
        """Measure a model on tasks; see `harness.evaluate`."""
        from gptsmith.evaluate.harness import evaluate

        return evaluate(model, tokenizer, tasks, **options)


sys.modules[__name__].__class__ = _CallablePackage
