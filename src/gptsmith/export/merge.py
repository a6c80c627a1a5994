"""Merge models into one: fold adapters into the weights, or average models that have the same architecture.

    merge(["runs/base", "runs/chat"], "chat")                       # fold the adapter that runs/chat trained
    merge(["runs/a", "runs/b"], "mean", weights=[0.7, 0.3])         # average two models

Averages of models that were fine-tuned from one another are often better than each (Wortsman et al. 2022, 2203.05482).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.export.export import CARD_FILE, DTYPES, dtype_name, read_verified, reject_existing, write_directory
from gptsmith.export.model_card import About, license_of, model_card
from gptsmith.formats.hf import CONFIG_FILE, load_weights, weights_to_hf
from gptsmith.formats.named import NAMED_MODELS
from gptsmith.formats.peft import ADAPTER_CONFIG, adapted_rows, base_of
from gptsmith.formats.source import AdaptedSource, ModelSource, adapted
from gptsmith.loading import resolve_adapter, resolve_model, source_of
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import Run
from gptsmith.tokenizer import Tokenizer

Average = Literal["linear", "slerp"]
MergeMethod = Literal["auto", "fold", "linear", "slerp"]
_TRAINING_ONLY = ("initializer_range", "residual_init", "router_aux_loss_coef", "router_z_loss_coef")
_MIN_SINE = 1e-6  # below it, tensors point in (nearly) the same or opposite directions, and a line joins them


def merge(
    models: Sequence[str | Path | Run],
    out: str | Path,
    *,
    method: MergeMethod = "auto",
    weights: Sequence[float] = (),
    dtype: str = "auto",
) -> Path:
    """Merge models and adapters, write the result as a Hugging Face directory with a model card, and return its path.

    models: each is what `resolve_model` understands; a run that trained an adapter is an adapter.
    method:
        fold: add the updates of the adapters after the first of `models` to that model, in this order.
        linear: the weighted mean of all as models, an adapter together with the model that it names.
        slerp: of two models, the point between them on an arc (spherical linear interpolation), tensor by tensor.
        auto: fold if all but the first are adapters, linear if none is.
    weights: of each adapter (default 1, the update as it was trained) or of each model (default: all the same), by
        which the models are averaged; slerp goes the share of the second weight of the way. dtype: fp32, bf16, fp16, or
        auto for the type in which all models are stored, else fp32.
    The tokenizer, chat template and generation settings are those of the first model, or of the last folded adapter
    that has its own.
    Raises UsageError for what cannot be merged, and as `read_verified` and `write_directory` do.
    """
    out, specs = Path(out), [os.fspath(each) for each in models]
    reject_existing(out)
    method = _chosen_method(specs, method)
    if method == "fold":
        sources = [_folded(specs, _checked_weights(weights, len(specs) - 1, "adapter", method))]
    else:
        shares = _checked_weights(weights, len(specs), "model", method)
        if method == "slerp" and len(specs) != 2:
            raise UsageError(f"slerp lies between two models, not {len(specs)}. Use --method linear.")
        sources = [source_of(spec) for spec in specs]
        _check_same_kind(specs, sources)
    for source in sources:
        if _is_quantized(source):
            note(f"note: {source.origin} is quantized. Its rounded weights are merged in full precision.")
    read = (read_verified(source)[0] for source in sources)
    model = next(read) if method == "fold" else merge_models(read, shares, method)
    stored = {source.stored_dtype() for source in sources}
    written = DTYPES[dtype] if dtype != "auto" else stored.pop() if len(stored) == 1 else torch.float32
    card = _card(specs, sources, model, out.name, dtype_name(written), method, weights)
    write_directory(out, model, sources[0].checked_tokenizer(), dtype=written, source=sources[0], card=card)
    return out


@torch.no_grad()
def merge_models(models: Iterable[Transformer], weights: Sequence[float], method: Average = "linear") -> Transformer:
    """Return the weighted mean of models with the same configuration, or the point between two on an arc (slerp).

    weights: one per model; they are divided by their sum. models: read one after another, so that two at
    a time are in memory; the first one is changed and returned.

    slerp: each tensor of the Hugging Face layout is a vector. Their direction turns at a constant rate from that of the
    first to that of the second (Shoemake 1985), as mergekit does it. Tensors in the same direction, in opposite ones
    and zeros are joined by a line.
    Raises UsageError for models with another configuration, or a number of models that does not fit.
    """
    total = math.fsum(weights)
    merged: Transformer | None = None
    tensors: dict[str, Tensor] = {}
    count = 0
    for count, model in enumerate(models, start=1):
        if count > len(weights) or (method == "slerp" and count > 2):
            raise UsageError(f"there are more models than weights ({len(weights)}).")
        share = weights[count - 1] / total
        own = weights_to_hf(model)
        if merged is None:
            merged = model
            tensors = {name: t.float() * (share if method == "linear" else 1) for name, t in own.items()}
            continue
        if differences := config_differences(merged.config, model.config):
            raise UsageError(f"models of different architectures cannot be merged {differences}.")
        for name, tensor in own.items():
            if method == "linear":
                tensors[name].add_(tensor.float(), alpha=share)
            else:
                tensors[name] = slerp(tensors[name], tensor.float(), share)
    if merged is None or count != len(weights):
        raise UsageError(f"there are {len(weights)} weights for {count} models.")
    load_weights(merged, tensors, "the merged model")
    return merged


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Return the tensor at `share` (0: start, 1: end) of the arc from `start` to `end`, both as vectors."""
    u, v = start.double().flatten(), end.double().flatten()
    lengths = float(u.norm()), float(v.norm())
    if min(lengths) == 0:
        return torch.lerp(start, end, share)
    u, v = u / lengths[0], v / lengths[1]
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))  # precise for small angles, unlike acos
    if math.sin(angle) < _MIN_SINE:
        return torch.lerp(start, end, share)
    factors = math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    return (factors[0] * start.double() + factors[1] * end.double()).to(start.dtype)


def config_differences(first: ModelConfig, other: ModelConfig) -> str:
    """Return what two models compute differently: `(hidden_size): hidden_size is 64 and 128`; empty if nothing."""
    pairs = {f.name: (getattr(first, f.name), getattr(other, f.name)) for f in fields(first)}
    found = [name for name, (a, b) in pairs.items() if a != b and name not in _TRAINING_ONLY]
    details = "; ".join(f"{name} is {pairs[name][0]} and {pairs[name][1]}" for name in found[:3])
    return f"({', '.join(found)}): {details}" if found else ""


def _is_adapter(spec: str | Path) -> bool:
    """Return whether `spec` refers to an adapter, not to a whole model."""
    path = resolve_model(spec)
    return (path / ADAPTER_CONFIG).exists() and not (path / CONFIG_FILE).exists()


def _chosen_method(specs: Sequence[str | Path], method: MergeMethod) -> Literal["fold", "linear", "slerp"]:
    if not specs:
        raise UsageError("there is nothing to merge: give a model and its adapters, or several models.")
    adapters = [_is_adapter(spec) for spec in specs]
    if len(specs) == 1 and (not adapters[0] or method in ("linear", "slerp")):
        raise UsageError(f"there is nothing to merge: {specs[0]} is alone. Add its adapters, or other models.")
    whole = [str(spec) for spec, is_adapter in zip(specs[1:], adapters[1:], strict=True) if not is_adapter]
    if method == "auto" and whole and len(whole) < len(specs) - 1:
        raise UsageError(
            f"{whole[0]} is a whole model, and others are adapters. With --method linear or slerp all are averaged as "
            "models; to fold adapters, give them without other models."
        )
    if method == "fold" and whole:
        raise UsageError(f"{whole[0]} is a whole model, not an adapter, so it cannot be folded into {specs[0]}.")
    if method != "auto":
        return method
    return "linear" if whole else "fold"


def _checked_weights(
    weights: Sequence[float], count: int, kind: Literal["adapter", "model"], method: str
) -> list[float]:
    """Return one weight for each adapter or model. Raise UsageError for another number of them, and wrong ones."""
    if not weights:
        return [1.0] * count
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} {kind}s. Give one for each.")
    total = math.fsum(weights)
    if not math.isfinite(total) or (kind == "model" and total == 0):
        raise UsageError("--weights must be finite numbers" + (" whose sum is not 0." if kind == "model" else "."))
    if method == "slerp" and min(weights) < 0:
        raise UsageError(f"--weights must be 0 or more with --method slerp, not {min(weights):g}.")
    return list(weights)


def _folded(specs: Sequence[str | Path], weights: Sequence[float]) -> ModelSource:
    """Return the first model with the adapters. Raise UsageError for adapters that cannot be added up."""
    source = source_of(specs[0])
    known = {_place(specs[0])} | ({_place(base_of(source.adapter))} if isinstance(source, AdaptedSource) else set())
    embedded = specs[0] if isinstance(source, AdaptedSource) and adapted_rows(source.adapter) else None
    for spec, weight in zip(specs[1:], weights, strict=True):
        directory = resolve_adapter(spec)
        if adapted_rows(directory) is not None:
            if embedded is not None:
                raise UsageError(
                    f"{embedded} and {spec} both have embeddings of their own, and only one can be kept. If {spec} was "
                    f"trained on top of the other, merge the other first, and then {spec} into the result. Else "
                    "average them with --method linear."
                )
            if weight != 1:
                raise UsageError(f"{spec} has embeddings of its own: it can only have the weight 1, not {weight:g}.")
            embedded = spec
        try:
            base = base_of(directory)
        except CheckpointError:  # it does not say
            base = None
        if base is not None and _place(base) not in known:
            note(f"note: {spec} was trained on {base}. The merged model is only good if {specs[0]} is that model.")
        source = adapted(source, directory, weight=weight)
        known.add(_place(spec))
    return source


def _place(spec: str | Path) -> str:
    """Return what is the same for two names of one model: where it is, or the name of one to download."""
    return str(resolve_model(spec).resolve()) if Path(spec).exists() else str(spec)


def _check_same_kind(specs: Sequence[str | Path], sources: Sequence[ModelSource]) -> None:
    """Raise UsageError unless all models compute the same function of their weights, of the same tokens."""
    tokenizers = [source.checked_tokenizer() for source in sources]
    tokens = [_tokens(tokenizer) for tokenizer in tokenizers]
    for spec, source, tokenizer, own in zip(specs[1:], sources[1:], tokenizers[1:], tokens[1:], strict=True):
        shared = tokens[0].keys() & own.keys()
        wrong = min((id for id in shared if tokens[0][id] != own[id]), default=None)
        if wrong is not None:
            raise UsageError(
                f"{specs[0]} and {spec} have different tokenizers: token {wrong} is {tokens[0][wrong]!r} and "
                f"{own[wrong]!r}. Only models with the same tokens can be merged."
            )
        if differences := config_differences(sources[0].config, source.config):
            raise UsageError(
                f"{specs[0]} and {spec} have different architectures {differences}. Only equal ones can be averaged."
            )
        if own.keys() - tokens[0].keys() or tokenizer.config().get("chat_template") != tokenizers[0].config().get(
            "chat_template"
        ):
            note(f"note: {spec} has other added tokens or another chat template. Those of {specs[0]} are kept.")


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {id: token for token, id in tokenizer.vocabulary().items()}


def _is_quantized(source: ModelSource) -> bool:
    is_quantized = getattr(source.tensors, "is_quantized", None)  # of a GGUF file
    return source.bits is not None or (is_quantized is not None and any(map(is_quantized, source.tensors)))


def _card(
    specs: Sequence[str | Path],
    sources: Sequence[ModelSource],
    model: Transformer,
    title: str,
    dtype: str,
    method: str,
    weights: Sequence[float],
) -> str:
    names = [Path(spec).name if Path(spec).exists() else str(spec) for spec in specs]
    how = {
        "fold": "The updates of adapters are folded into the weights.",
        "linear": "The weights are a weighted mean of the models'.",
        "slerp": "The weights lie on the arc between the two models' (SLERP).",
    }[method]
    if weights:
        how += f" Weights: {', '.join(f'{weight:g}' for weight in weights)}."
    licenses = {_license(spec, source) for spec, source in zip(specs, sources, strict=False)}
    license = licenses.pop() if len(licenses) == 1 else "unknown"
    about = About(title, license, dtype, f"merged from {', '.join(names)}", how)
    return model_card(about, model.config, model.num_parameters(trainable_only=False))


def _license(spec: str | Path, source: ModelSource) -> str:
    named = NAMED_MODELS.get(str(base_of(resolve_model(spec)) if _is_adapter(spec) else spec))
    if named is not None:
        return named.license
    card = source.origin / CARD_FILE
    return (card.is_file() and license_of(card.read_text(encoding="utf-8", errors="replace"))) or "unknown"
