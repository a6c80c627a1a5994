"""`gptsmith merge`: fold adapters into a model, or average models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.cli.parser import parse


@dataclass(frozen=True)
class Merge:
    """Fold adapters into a model, one after the other, and average models of the same architecture."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [ADAPTER|MODEL ...]")]
    """A model (a run with an adapter is one), then adapters of it in PEFT's format, or further models."""
    out: Path
    """Directory to write; must not exist."""
    method: Literal["linear", "slerp"] = "linear"
    """How models are averaged. linear: weighted mean. slerp: spherical interpolation between two models."""
    weights: tuple[float, ...] = ()
    """Weight of a model, in their order (default: equal)."""


def main(arguments: list[str]) -> int:
    chosen = parse(Merge, "gptsmith merge", arguments)

    from gptsmith.export.merge import merge

    out = merge(chosen.models, chosen.out, method=chosen.method, weights=chosen.weights)
    print(f"model   {out}")
    return 0
