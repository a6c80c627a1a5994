"""Merge models: fold adapters into their weights, and average models of the same architecture.

    merge(["runs/chat"], "merged")                               # the adapter of a run, folded in
    merge(["base", "adapter-1", "adapter-2"], "merged")          # several adapters of one model, one after the other
    merge(["runs/a", "runs/b"], "merged", method="slerp", weights=[0.3, 0.7])

Averages of models that were fine-tuned from one another are often better than each (Wortsman et al. 2022, 2203.05482).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import UsageError
from gptsmith.export.export import read_verified, reject_existing
from gptsmith.formats.hf import CONFIG_FILE
from gptsmith.formats.peft import ADAPTER_CONFIG, load_adapter
from gptsmith.loading import source_of
from gptsmith.model.lora import merge_lora
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run

MergeMethod = Literal["linear", "slerp"]


def merge(
    models: Sequence[str | Path | Run],
    out: str | Path,
    *,
    method: MergeMethod = "linear",
    weights: Sequence[float] = (),
) -> Path:
    """Merge models and write the result, a model directory with the tokenizer of the first; return its path.

    models: a model, then adapters of it (PEFT directories) or further models. A run of an adapter is a model with its
        adapter folded in. Adapters are folded into the model before them.
    method: linear: the weighted mean of all weights. slerp: spherical interpolation, tensor by tensor, of two models.
    weights: of each model, in their order (default: equal); they are divided by their sum.
    Raises UsageError for models of different architectures or vocabularies, and for weights that do not fit.
    """
    out = Path(out)
    reject_existing(out)
    if not models:
        raise UsageError("no model given.")
    found: list[Transformer] = []
    names: list[str] = []
    tokenizer = None
    for each in models:
        if found and _is_plain_adapter(each):
            load_adapter(Path(each), found[-1])
            merge_lora(found[-1])
            continue
        model, own = read_verified(source_of(each))
        if tokenizer is None:
            tokenizer = own
        elif own.fingerprint != tokenizer.fingerprint:
            raise UsageError(f"{names[0]} and {each} have different tokenizers, so their weights cannot be averaged.")
        found.append(model)
        names.append(str(each))
    if weights and len(weights) != len(found):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(found)} models (adapters have none).")
    _check_alike(found, names)
    total = sum(weights) if weights else len(found)
    if not math.isfinite(total) or total == 0:
        raise UsageError("--weights must be finite numbers whose sum is not 0.")
    shares = [weight / total for weight in weights] or [1 / len(found)] * len(found)
    if method == "slerp" and len(found) != 2:
        raise UsageError(f"--method slerp interpolates between two models, not {len(found)}.")
    merged = found[0]
    if len(found) > 1:
        _average(merged, found, shares, method)
    save_checkpoint(out, merged, tokenizer)
    return out


def _is_plain_adapter(spec: str | Path | Run) -> bool:
    """Return whether it is an adapter's directory, and not a run or a model."""
    path = Path(spec)
    return (path / ADAPTER_CONFIG).exists() and not (path / CONFIG_FILE).exists()


def _check_alike(models: Sequence[Transformer], names: Sequence[str]) -> None:
    first = dataclasses.asdict(models[0].config)
    for model, name in zip(models[1:], names[1:], strict=True):
        differing = [key for key, value in dataclasses.asdict(model.config).items() if value != first[key]]
        if differing:
            raise UsageError(
                f"{names[0]} and {name} are different architectures ({', '.join(differing)}), so their weights cannot "
                "be averaged."
            )


@torch.no_grad()
def _average(target: Transformer, models: Sequence[Transformer], shares: Sequence[float], method: MergeMethod) -> None:
    others = [dict(model.named_parameters()) for model in models]
    for name, parameter in target.named_parameters():
        values = [parameters[name].float() for parameters in others]
        if method == "slerp":
            parameter.copy_(slerp(values[0], values[1], shares[1]))
        else:
            parameter.copy_(sum((value * share for value, share in zip(values, shares, strict=True)), torch.zeros(())))


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point at `t`, 0 (a) to 1 (b), of the arc between two tensors as vectors (Shoemake 1985).

    Lengths are interpolated by the same formula. Nearly parallel vectors are interpolated linearly.
    """
    cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
