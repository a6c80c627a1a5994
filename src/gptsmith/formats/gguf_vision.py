"""The vision tower and projector of a model as GGUF: llama.cpp calls it mmproj and reads it beside the text model.

write_mmproj(model, Path("seer-mmproj.gguf"), "f16")

It holds the vision tower and the projector of a model in LLaVA's layout (llama.cpp's tools/mtmd, `clip.cpp`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gptsmith.errors import UsageError
from gptsmith.formats.gguf_blocks import TYPES_BY_NAME
from gptsmith.formats.gguf_file import PlannedTensor, write_gguf_file
from gptsmith.model.config import VisionConfig
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

_FILE_TYPES = {"f32": 0, "f16": 1}
_ACTIVATIONS = {"gelu_tanh": "clip.use_gelu", "gelu": "clip.use_gelu", "silu": "clip.use_silu", "quick_gelu": None}
"""What `clip.cpp` computes, and the flag that says so. Its gelu is the tanh approximation."""


def text_part(model: Transformer) -> Transformer:
    """Return the text model of a model that reads pictures, with the same weights; a text model itself as it is."""
    if model.config.vision is None:
        return model
    text = copy.copy(model)
    text.config = replace(model.config, vision=None, image_token_id=None)
    return text


def check_mmproj(vision: VisionConfig) -> None:
    """Raise UsageError for a vision tower that llama.cpp's `mlp` projector cannot express."""
    problem = None
    if vision.projector != "mlp" or vision.pixel_shuffle > 1 or vision.post_norm:
        problem = f"the layout {vision.model_type}"
    elif vision.class_token:  # it reads them, but takes the class token for a patch, and not the first patch
        problem = "a vision tower with a class token (CLIP's), of which llama.cpp computes other features"
    elif vision.drop_first:
        problem = "a vision tower that leaves out the first patch"
    elif vision.activation not in _ACTIVATIONS:
        problem = f"the activation {vision.activation} in a vision tower"
    elif vision.projector_activation not in ("gelu", "gelu_tanh"):
        problem = f"the activation {vision.projector_activation} in a projector"
    if problem is not None:
        raise UsageError(f"GGUF export does not support {problem}. Use --to hf.")


def write_mmproj(model: Transformer, path: Path, dtype: Literal["f32", "f16"] = "f16") -> None:
    """Write the vision tower and the projector. dtype: of the matrices. Raise as `check_mmproj` does."""
    vision = model.config.vision
    if vision is None:
        raise UsageError("this model reads text only: it has no vision tower.")
    check_mmproj(vision)
    flag = _ACTIVATIONS[vision.activation]
    header = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": path.stem,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        **({} if flag is None else {flag: True}),
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.norm_eps),
        "clip.vision.projection_dim": model.config.hidden_size,
        "clip.vision.feature_layer": [vision.num_hidden_layers],  # otherwise the last block is left out
        "clip.vision.image_mean": list(vision.image_mean),
        "clip.vision.image_std": list(vision.image_std),
    }
    tensors = [_planned(name, numbers, dtype) for name, numbers in _tensors(model, vision)]
    with atomic_file(path) as file:
        write_gguf_file(file, header, tensors)


def _planned(name: str, tensor: Tensor, dtype: str) -> PlannedTensor:
    in_blocks = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "embd" not in name
    kind = TYPES_BY_NAME["F16" if dtype == "f16" and in_blocks else "F32"]
    return PlannedTensor(name, tuple(tensor.shape), kind, lambda: np.ascontiguousarray(tensor.float().numpy()))


def _tensors(model: Transformer, vision: VisionConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by their names in the file. A file without `v.post_ln` gives the output of the last block."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    def layer(ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", state[f"{ours}.{part}"]

    yield from layer("vision.patch_embedding", "v.patch_embd")
    yield "v.position_embd.weight", state["vision.position_embedding.weight"]
    # Of matrices that are square, llama.cpp takes the names for the reversed ones of old files.
    up, down = ("ffn_down", "ffn_up") if vision.intermediate_size == vision.hidden_size else ("ffn_up", "ffn_down")
    for i in range(vision.num_hidden_layers):
        ours, theirs = f"vision.layers.{i}", f"v.blk.{i}"
        for part in ("weight", "bias"):
            for letter, tensor in zip("qkv", state[f"{ours}.qkv.{part}"].chunk(3), strict=True):
                yield f"{theirs}.attn_{letter}.{part}", tensor
        for name, stored in (
            *(("out", "attn_out"), ("norm_1", "ln1"), ("norm_2", "ln2")),
            *(("fc1", up), ("fc2", down)),
        ):
            yield from layer(f"{ours}.{name}", f"{theirs}.{stored}")
    for ours, theirs in (("projector.linear_1", "mm.0"), ("projector.linear_2", "mm.2")):
        weight = state[f"{ours}.weight"]
        yield f"{theirs}.weight", weight
        yield f"{theirs}.bias", state.get(f"{ours}.bias", torch.zeros(len(weight)))
