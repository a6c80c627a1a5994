"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import embeddings_name, module_name, read_json, weight_mappings
from gptsmith.formats.hf_weights import HEAD
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.model.lora import (
    AdaptedPart,
    Adapter,
    Lora,
    LoraPart,
    Update,
    attach,
    columns_and_rows,
    lora_parts,
    weight_of,
)
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LETTERS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector.weight": "magnitude"}
_IGNORED_IF_EMPTY = (  # options of PEFT that change what an adapter computes, and are not supported
    *("layer_replication", "lora_bias", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "megatron_config", "loftq_config", "arrow_config"),
)


def adapter_layout(model: Transformer) -> dict[str, list[AdaptedPart]]:
    """Return the linear layers of a model that can have an adapter, and what each consists of in Hugging Face.

    Only linear layers: not embeddings, output layer, routers, or stacked experts.
    """
    layout = {}
    for mapping in weight_mappings(model.config):
        if mapping.local.endswith("proj.weight"):
            module = mapping.local.removesuffix(".weight")
            sizes = model.split_sizes(mapping.local) if len(mapping.hf) > 1 else ()
            rows = sizes or (columns_and_rows(model.get_submodule(module))[1],)
            first, parts = 0, []
            for i, (name, size) in enumerate(zip(mapping.hf, rows, strict=True)):
                hf_module = module_name(model.config, name.removesuffix(".weight"))
                parts.append(AdaptedPart(hf_module, first, size, mapping.scale if i == 0 else 1.0))
                first += size
            layout[module] = parts
    return layout


def _orders(model: Transformer) -> dict[str, Tensor]:
    """Return for each module whose rows Hugging Face stores in another order the index of ours, by its name there."""
    return {
        module_name(model.config, mapping.hf[0].removesuffix(".weight")): mapping.reordered.order(
            columns_and_rows(model.get_submodule(mapping.local.removesuffix(".weight")))[1]
        )
        for mapping in weight_mappings(model.config)
        if mapping.reordered is not None and mapping.local.endswith("proj.weight")
    }


def base_of(directory: Path) -> str:
    """Return the model that the adapter in a directory belongs to. Raise CheckpointError if it does not say."""
    base = read_json(Path(directory) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{directory} is an adapter that does not name its model: load it with --adapter.")
    local = Path(directory) / base
    return str(local) if not Path(base).is_absolute() and local.exists() else base


# Writing --------------------------------------------------------------------------------------------------------------


def save_adapter(model: Transformer, directory: Path, base: str) -> None:
    """Write the adapter of a model, and modules that are trained whole, into an existing directory, for PEFT.

    base: the model that it belongs to, as PEFT and `base_of` find it.
    """
    parts = lora_parts(model)
    if not parts:
        raise CheckpointError("the model has no adapter to save.")
    tensors: dict[str, Tensor] = {}
    orders = _orders(model)
    for name, part in parts.items():
        for key, letter in _LETTERS.items():
            value = getattr(part, letter)
            if value is not None:
                if letter != "A" and name in orders:
                    value = value[orders[name].to(value.device)]
                key = key.removesuffix(".weight") if letter == "magnitude" else key
                tensors[f"{_PREFIX}{name}.{key}"] = value.detach()
    whole = {name: p for name, p in _whole_tensors(model).items() if p.requires_grad}
    for name, parameter in whole.items():
        tensors[f"{_PREFIX}{name}"] = parameter.detach()
    embeddings = whole.get(module_name(model.config, embeddings_name(model.config)))
    if embeddings is not None and model.config.tie_word_embeddings:  # PEFT ties them again, but wants to read both
        tensors[f"{_PREFIX}{HEAD}"] = embeddings.detach()
    with atomic_file(Path(directory) / ADAPTER_CONFIG, "w") as file:
        json.dump(_config(model, parts, list(whole), base), file, indent=2)
        file.write("\n")
    with atomic_file(Path(directory) / ADAPTER_WEIGHTS) as file:
        write_tensors(file, tensors)


def _whole_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return what can be trained whole beside an adapter, by the names in transformers' class: the embeddings, an
    output matrix that is not tied to them, and the projector of a model that reads pictures."""
    state = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for mapping in weight_mappings(model.config):
        whole = mapping.local in ("embed_tokens.weight", "lm_head.weight") or mapping.local.startswith("projector.")
        if whole and mapping.local in state:  # not quantized
            found[module_name(model.config, mapping.hf[0])] = state[mapping.local]
    return found


def _config(model: Transformer, parts: Mapping[str, LoraPart], whole: list[str], base: str) -> dict[str, Any]:
    """Return the contents of adapter_config.json. Ranks that differ from the most common one are patterns."""
    embeddings = module_name(model.config, embeddings_name(model.config))
    ranks = {name: len(part.A) for name, part in parts.items()}
    alphas = {name: _alpha(part, rslora=False) for name, part in parts.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    dropout = max(module.dropout for module in model.modules() if isinstance(module, Lora))
    everywhere = {part.name for each in adapter_layout(model).values() for part in each}
    leaves = sorted({part.part.leaf for part in parts.values()})
    is_all = {name for name in everywhere if name.rpartition(".")[2] in leaves} == set(parts)
    is_all = is_all and model.config.vision is None  # a vision tower has layers of the same names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": False,  # its scaling is in lora_alpha
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "bias": "none",
        "fan_in_fan_out": any(m.transposed for m in weight_mappings(model.config)),
        "target_modules": leaves if is_all else sorted(parts),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "modules_to_save": sorted({_saved_module(name) for name in whole}) or None,
        "init_lora_weights": True,
        "inference_mode": True,
        "ensure_weight_tying": embeddings in whole and model.config.tie_word_embeddings,
    }


def _saved_module(name: str) -> str:
    """Return the module that PEFT saves for a tensor: its own, or the whole projector."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] if "projector" in module else module


def _alpha(part: LoraPart, *, rslora: bool) -> float:
    rank = len(part.A)
    return part.scaling * (math.sqrt(rank) if rslora else rank)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoredPart:
    part: AdaptedPart
    scaling: float
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class _StoredAdapter:
    """An adapter's file, assigned to the modules of our model. whole: trained embeddings and output matrix."""

    rank: int
    dropout: float
    parts: dict[str, list[_StoredPart]]
    whole: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(directory: Path, model: Transformer) -> Adapter:
    """Read the adapter in a PEFT directory onto the model's device, to be applied to some sequences of a batch.

    Raises CheckpointError if there is none, if it is damaged, is not LoRA, changes embeddings, or belongs to another
    model.
    """
    stored = _read(Path(directory), model)
    if stored.whole:
        raise CheckpointError(
            f"the adapter in {directory} has embeddings of its own, so it cannot share a model with others. Load it as "
            f"a model of its own: {directory} in place of the model's name."
        )
    latent = [name for name in stored.parts if name.endswith(".kv_b_proj")]
    if latent:  # the cache holds what this matrix is applied to, of all tokens and whatever their adapter
        raise CheckpointError(
            f"the adapter in {directory} adapts {stored.parts[latent[0]][0].part.name}, so it cannot share a model "
            f"with others. Load it as a model of its own: {directory} in place of the model's name."
        )
    device = next(model.parameters()).device
    updates: dict[str, tuple[Update, ...]] = {}
    for module, parts in stored.parts.items():
        layer, found = model.get_submodule(module), []
        for each in parts:
            part, factor = each.part, each.scaling * each.part.factor
            rows = slice(part.first, part.first + part.rows)
            A, B = each.A.to(device), each.B.to(device) * factor
            gain = bias = None
            if each.magnitude is not None:
                lengths = ((weight_of(layer)[rows].float() + B @ A) / part.factor).norm(dim=1)
                gain, own_bias = each.magnitude.to(device) / lengths, getattr(layer, "bias", None)
                bias = None if own_bias is None else own_bias.detach()[rows]
            found.append(Update(part.first, A, B, gain, bias))
        updates[module] = tuple(found)
    return Adapter(stored.rank, updates)


def load_adapter(directory: Path, model: Transformer) -> None:
    """Put the adapter of a directory on a model, in place; where the model has one already, replace its values.

    The adapter can be trained further: all other weights are frozen. Embeddings of the adapter's own are copied into
    the model, whose vocabulary has their size. Raises CheckpointError as `read_adapter` does.
    """
    stored = _read(Path(directory), model)
    existing = lora_parts(model)
    if not existing:
        for p in model.parameters():
            p.requires_grad_(False)
    like = next(p for p in model.parameters() if p.is_floating_point())
    for module, parts in stored.parts.items():
        if not existing:
            made = [
                LoraPart(e.part, e.A.shape[1], len(e.A), e.scaling, dora=e.magnitude is not None, like=like)
                for e in parts
            ]
            attach(model.get_submodule(module), made, stored.dropout)
    current = lora_parts(model)
    names = {each.part.name for parts in stored.parts.values() for each in parts}
    if names != set(current):
        raise CheckpointError(
            f"the adapter in {directory} adapts other layers than the model: {_some(names ^ set(current))}."
        )
    with torch.no_grad():
        for parts in stored.parts.values():
            for each in parts:
                for letter in ("A", "B", "magnitude"):
                    target, value = getattr(current[each.part.name], letter), getattr(each, letter)
                    if (target is None) != (value is None) or (value is not None and target.shape != value.shape):
                        raise CheckpointError(
                            f"the adapter in {directory} has another rank or kind than the run at {each.part.name}."
                        )
                    if value is not None:
                        target.copy_(value)
        known = _whole_tensors(model)
        for name, value in stored.whole.items():
            weight = known.get(name)
            if weight is None or weight.shape != value.shape:
                raise CheckpointError(
                    f"the adapter in {directory} is for another model: its {name} is {list(value.shape)}."
                )
            weight.copy_(value)
            weight.requires_grad_(True)


def adapted_rows(directory: Path) -> int | None:
    """Return the vocabulary size of the embeddings in an adapter's file; None if it has none."""
    from safetensors import safe_open

    path = Path(directory) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{directory} is not an adapter: {ADAPTER_WEIGHTS} is missing.")
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(
                (".embed_tokens.weight", ".embed_in.weight", ".wte.weight", ".tokens_embed.weight", ".lm_head.weight")
            ):
                return int(file.get_slice(name).get_shape()[0])
    return None


def _read(directory: Path, model: Transformer) -> _StoredAdapter:
    """Read and check an adapter's files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} is not an adapter: {missing[0]} is missing.")
    config = read_json(directory / ADAPTER_CONFIG)
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {directory} is damaged: {error}.") from None
    where = str(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: not a LoRA adapter.")
    for option in _IGNORED_IF_EMPTY:
        if config.get(option):
            raise CheckpointError(f"{where}: {option} is not supported.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: trained biases are not supported.")
    scale = _Scaling(config, where)
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise CheckpointError(f"the adapter in {directory} is damaged: {damaged[0]} has NaN or infinite numbers.")
    return _assigned(tensors, model, scale, float(config.get("lora_dropout") or 0.0), str(directory))


class _Scaling:
    """Rank and scaling of each module, by the rules of PEFT."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.rank, self.alpha, self.rslora = config.get("r"), config.get("lora_alpha"), bool(config.get("use_rslora"))
        self.dora = bool(config.get("use_dora"))
        self.ranks, self.alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        for rank, alpha in [(self.rank, self.alpha), *((r, 1) for r in self.ranks.values())]:
            if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise CheckpointError(f"{where}: lora_alpha must be a number and r a positive integer.")

    def of(self, name: str) -> tuple[int, float]:
        """Return rank and scaling of a module of Hugging Face."""
        rank, alpha = (
            _matched(patterns, name, value) for patterns, value in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _matched(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches a module, as PEFT's `get_pattern_key` does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _assigned(
    tensors: dict[str, Tensor], model: Transformer, scale: _Scaling, dropout: float, where: str
) -> _StoredAdapter:
    """Assign PEFT's tensors, which are named after Hugging Face modules, to the modules of our model."""
    old = ".lora_magnitude_vector.weight"  # as earlier versions of PEFT call it
    tensors = {name.replace(old, old.removesuffix(".weight")): tensor for name, tensor in tensors.items()}
    unused = set(tensors)
    found: dict[str, list[_StoredPart]] = {}
    orders = _orders(model)
    for module, parts in adapter_layout(model).items():
        columns, _ = columns_and_rows(model.get_submodule(module))
        for part in parts:
            names = [f"{_PREFIX}{part.name}.{key}" for key in ("lora_A.weight", "lora_B.weight")]
            if not all(name in tensors for name in names):
                continue
            A, B = (tensors[name].float() for name in names)
            rank, scaling = scale.of(part.name)
            length = tensors.get(magnitude := f"{_PREFIX}{part.name}.lora_magnitude_vector")
            shapes = (A.shape, B.shape, None if length is None else tuple(length.shape))
            if shapes != ((rank, columns), (part.rows, rank), None if length is None else (part.rows,)):
                raise CheckpointError(f"the adapter in {where} is for another model: {names[0]} does not fit.")
            unused -= {*names, magnitude}
            if (length is not None) is not scale.dora:
                raise CheckpointError(
                    f"the adapter in {where} is damaged: use_dora is {scale.dora}, and {magnitude} is "
                    f"{'there' if length is not None else 'missing'}."
                )
            if part.name in orders:
                ours = orders[part.name].argsort()
                B, length = B[ours], None if length is None else length[ours]
            found.setdefault(module, []).append(
                _StoredPart(part, scaling, A, B, None if length is None else length.float())
            )
    whole = {}
    embeddings = module_name(model.config, embeddings_name(model.config))
    for name in dict.fromkeys([embeddings, HEAD, *_whole_tensors(model)]):
        for stored in (f"{_PREFIX}{name}", f"{_PREFIX}{name.replace('.weight', '.base_layer.weight')}"):
            if stored in tensors:
                whole[name] = tensors[stored].float()
                unused.discard(stored)
    if model.config.tie_word_embeddings and HEAD in whole:  # stored twice
        head = whole.pop(HEAD)
        if not torch.equal(whole.setdefault(embeddings, head), head):
            raise CheckpointError(
                f"the adapter in {where} has an output matrix that differs from its embeddings, which this model ties. "
                "It cannot be used with this model."
            )
    if unused:
        raise CheckpointError(
            f"the adapter in {where} cannot be used with this model: adapting {min(unused)} is not supported."
        )
    if not found:
        raise CheckpointError(f"the adapter in {where} cannot be used with this model: it adapts none of its layers.")
    return _StoredAdapter(scale.rank or 0, dropout, found, whole)


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])
