"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import weight_mappings
from gptsmith.model.lora import Adapter, Update
from gptsmith.model.transformer import Transformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def read_adapter(directory: Path, model: Transformer) -> Adapter:
    """Read the adapter in a PEFT directory onto the model's device.

    Raises CheckpointError if there is none, if it is damaged, is not plain LoRA, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} is not an adapter: {missing[0]} is missing.")
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
        raise CheckpointError(f"{directory / CONFIG_FILE}: lora_alpha must be a number and r a positive integer.")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(rank, _updates_by_module(tensors, model, rank, scaling, str(directory)))


def _updates_by_module(
    tensors: dict[str, Tensor], model: Transformer, rank: int, scaling: float, where: str
) -> dict[str, tuple[Update, ...]]:
    """Assign PEFT's tensors, which are named after Hugging Face modules, to the modules of our model."""
    device = next(model.parameters()).device
    unused = set(tensors)
    updates: dict[str, tuple[Update, ...]] = {}
    for mapping in weight_mappings(model.config):
        module = mapping.local.removesuffix(".weight")
        # Only linear layers are adapted: not embeddings, routers, or stacked experts (which lack the `.weight`).
        is_linear = mapping.local.endswith("proj.weight")
        sizes = model.split_sizes(mapping.local) if len(mapping.hf) > 1 else (0,)
        first_row, found = 0, []
        for i, (name, size) in enumerate(zip(mapping.hf, sizes, strict=True)):
            names = [f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight" for letter in "AB"]
            if names[0] in tensors and names[1] in tensors and is_linear:
                A, B = (tensors[each].float().to(device) for each in names)
                if not bool(A.isfinite().all() & B.isfinite().all()):
                    raise CheckpointError(
                        f"the adapter in {where} is damaged: {names[0]} or its lora_B has NaN or infinite numbers."
                    )
                columns, rows = _shape(model.get_submodule(module))
                if A.shape != (rank, columns) or B.shape != (size or rows, rank):
                    raise CheckpointError(f"the adapter in {where} is for another model: {names[0]} does not fit.")
                found.append(Update(first_row, A, B * scaling * (mapping.scale if i == 0 else 1.0)))
                unused -= set(names)
            first_row += size
        if found:
            updates[module] = tuple(found)
    if unused:
        raise CheckpointError(
            f"the adapter in {where} cannot be used with this model: adapting {min(unused)} is not supported."
        )
    if not updates:
        raise CheckpointError(f"the adapter in {where} cannot be used with this model: it adapts none of its layers.")
    return updates


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (columns, rows) of a linear layer, quantized or not."""
    weight: Any = module.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(weight, Tensor) else (weight.columns, weight.rows)
