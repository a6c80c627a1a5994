"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import LAYOUTS
from gptsmith.model.lora import Adapter, Update
from gptsmith.model.transformer import Transformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(directory: Path, model: Transformer) -> Adapter:
    """The adapter in a directory of PEFT's layout, on the model's device.

    Raises CheckpointError: no adapter, damaged, of another kind than plain LoRA, or for another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} is no adapter: {missing[0]} is missing.")
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {directory} is damaged: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory / CONFIG_FILE}: not a LoRA adapter.")
    for option in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication"):
        if config.get(option):
            raise CheckpointError(f"{directory / CONFIG_FILE}: {option} is not supported.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{directory / CONFIG_FILE}: trained biases are not supported.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{directory / CONFIG_FILE}: r and lora_alpha must be numbers, r at least 1.")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _sort(tensors, model, rank, scaling, str(directory))


def _sort(tensors: dict[str, Tensor], model: Transformer, rank: int, scaling: float, where: str) -> Adapter:
    """Their tensors by our modules."""
    device = next(model.parameters()).device
    left = set(tensors)
    updates: dict[str, tuple[Update, ...]] = {}
    for entry in LAYOUTS[model.config.model_type].entries(model.config):
        module = entry.ours.removesuffix(".weight")
        linear = entry.ours.endswith("proj.weight")  # not the embeddings', a router's, or (without .weight) experts'
        sizes = model.fused_rows(entry.ours) if len(entry.theirs) > 1 else (0,)
        first, found = 0, []
        for place, (name, size) in enumerate(zip(entry.theirs, sizes, strict=True)):
            names = [f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight" for letter in "AB"]
            if names[0] in tensors and names[1] in tensors and linear:
                A, B = (tensors[each].float().to(device) for each in names)
                if not bool(A.isfinite().all() & B.isfinite().all()):
                    raise CheckpointError(f"the adapter in {where} is damaged: {names[0]} or its B is not finite.")
                target = model.get_submodule(module)
                inputs, outputs = _shape(target)
                if A.shape != (rank, inputs) or B.shape != (size or outputs, rank):
                    raise CheckpointError(f"the adapter in {where} is of another model: {names[0]} does not fit.")
                found.append(Update(first, A, B * scaling * (entry.scale if place == 0 else 1.0)))
                left -= set(names)
            first += size
        if found:
            updates[module] = tuple(found)
    if left or not updates:
        what = f"it has {sorted(left)[0]}, which is not adapted here" if left else "it adapts nothing of this model"
        raise CheckpointError(f"the adapter in {where} cannot be used with this model: {what}.")
    return Adapter(rank, updates)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Columns and rows of a linear layer, quantized or not."""
    weight: Any = module.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(weight, Tensor) else (weight.columns, weight.rows)
