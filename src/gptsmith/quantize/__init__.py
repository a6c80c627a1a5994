"""Calibrated quantization: the text, the rounding of a matrix, the layers of a model one by one, and the report.

The package is also the function `gptsmith.quantize(model, tokenizer, out, bits=4)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Importing a module of this package makes the package itself what `gptsmith.quantize` is, so it can be called."""

    def __call__(self, model: Any, tokenizer: Any, out: Any, **options: Any) -> Any:
        """Quantize a model and write it; see `directory.quantize`."""
        from gptsmith.quantize.directory import quantize

        return quantize(model, tokenizer, out, **options)


sys.modules[__name__].__class__ = _CallablePackage
