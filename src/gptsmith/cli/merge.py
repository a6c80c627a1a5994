"""`gptsmith merge`: fold adapters into a model, or average models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse


@dataclass(frozen=True)
class Merge:
    """Fold adapters into the weights of a model, or average models that have the same architecture and vocabulary."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL...")]
    """A model and adapters to fold into it, or several models. Each is a run (its best checkpoint), the directory of a
    model or adapter, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    out: Path
    """Directory to write; must not exist."""
    method: Literal["auto", "fold", "linear", "slerp"] = "auto"
    """fold: add the updates of the adapters. linear: the mean of all as models. slerp: the point between two on an arc.
    auto: fold if all after the first are adapters, linear if none is."""
    weights: tuple[float, ...] = ()
    """A number for each adapter (fold; 1 without it) or for each model (all the same without it), in their order:
    --weights 0.7 --weights 0.3."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights to write; auto: as the models are stored."""


def main(arguments: list[str]) -> int:
    chosen = parse(Merge, "gptsmith merge", arguments)

    from gptsmith.export.merge import merge

    out = merge(chosen.models, chosen.out, method=chosen.method, weights=chosen.weights, dtype=chosen.dtype)
    print(f"model   {out}")
    return 0
