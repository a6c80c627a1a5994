"""GGUF, llama.cpp's single-file format: read a model from it as Hugging Face's names and shapes, and write one.

    gguf = read_gguf(path)      gguf.hf_config, gguf.tensors, gguf.metadata, gguf.chat_template
    write_gguf(model, tokenizer_to_gguf(tokenizer, model.config.vocab_size), path, "q8_0")

Reading gives what `formats.hf` takes: a Hugging Face configuration, and a mapping from Hugging Face names to tensors,
which are dequantized on access. The parts are in modules of their own: `gguf_file` (the container), `gguf_config`
(settings), `gguf_weights` (tensor names and layouts), `gguf_tokenizer`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.gguf_blocks import TYPES_BY_NAME, TensorType
from gptsmith.formats.gguf_config import config_to_metadata, llama3_divisors, metadata_to_config, sampling_to_metadata
from gptsmith.formats.gguf_file import GgufFile, PlannedTensor, open_gguf, write_gguf_file, write_gguf_parts
from gptsmith.formats.gguf_weights import (
    ARCHITECTURES,
    TensorMapping,
    halves_to_neighbors,
    neighbors_to_halves,
    tensor_mappings,
)
from gptsmith.formats.hf import LAYOUTS, config_to_hf, describe_mismatch, weight_mappings, weights_to_hf
from gptsmith.model.config import ModelConfig
from gptsmith.model.quantized import Codes
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

GgufType = Literal["f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "mxfp4"]
GGUF_TYPES: dict[GgufType, int] = {  # values: llama.cpp's `general.file_type`
    "f32": 0,
    "f16": 1,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q4_k_m": 15,
    "q4_0": 2,
    "mxfp4": 38,
}


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are settings of rotary positions."""


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufModel:
    """The model in a GGUF file."""

    path: Path
    hf_config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    """float32, by Hugging Face name."""
    metadata: Mapping[str, Any]
    """The file's key-value pairs, which include the tokenizer."""

    @property
    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


def read_gguf(path: Path) -> GgufModel:
    """Open the model in a GGUF file. Names and shapes of all tensors are checked; the tensors are read on access.

    Raises CheckpointError, naming the file, if it is damaged, of an unknown architecture, or lacks tensors, and on
    access if a tensor has numbers that are not finite.
    """
    file = open_gguf(path)
    config = metadata_to_config(file)
    mappings = list(tensor_mappings(config, joined_kv="blk.0.attn_kv_b.weight" in file.tensors))
    expected = {mapping.gguf for mapping in mappings}
    present = file.tensors
    stacked = Counter(mapping.gguf for mapping in mappings)
    wrong_shapes = []
    for mapping in mappings:
        if mapping.gguf in present and not mapping.expert:  # of the experts, which share a tensor, only the first
            shape = mapping.stored_shape if mapping.expert is None else (stacked[mapping.gguf], *mapping.stored_shape)
            if present[mapping.gguf].shape != shape:
                wrong_shapes.append(f"{mapping.gguf} is {list(present[mapping.gguf].shape)}, expected {list(shape)}")
    missing = sorted(expected - present.keys())
    unexpected = sorted(present.keys() - expected - {*ROPE_TENSORS, "output.weight"})
    if problems := describe_mismatch(missing, unexpected, wrong_shapes):
        raise CheckpointError(f"{path} does not fit its architecture; {problems}.")
    return GgufModel(file.path, config, _LazyTensors(file, mappings), file.metadata)


class _LazyTensors(Mapping[str, Tensor]):
    """A file's tensors by Hugging Face name, read and dequantized to float32 at each access."""

    def __init__(self, file: GgufFile, mappings: Sequence[TensorMapping]) -> None:
        self._file = file
        self._parts: dict[str, list[TensorMapping]] = {}  # several for a tensor that is stored in parts
        for mapping in mappings:
            self._parts.setdefault(mapping.hf, []).append(mapping)

    def __contains__(self, name: object) -> bool:  # Mapping's own would dequantize the tensor
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        mapping = self._parts[name][0]
        if mapping.head_rows is not None:
            return self._of_heads(self._parts[name])
        numbers = self._file.read(mapping.gguf, mapping.expert)
        if mapping.part is not None:  # rows alternate between the two
            both = np.stack((numbers, self._file.read(self._parts[name][1].gguf)), axis=2)
            numbers = both.reshape(len(both), -1, *both.shape[3:])
        if mapping.permuted_heads:
            numbers = neighbors_to_halves(numbers, mapping.permuted_heads)
        if mapping.offset:
            numbers = numbers - np.float32(mapping.offset)
        tensor = torch.from_numpy(numbers)
        if mapping.reordered is not None:
            tensor = tensor[mapping.reordered.order(len(tensor))]
        return tensor.mT if mapping.transposed else tensor.view(mapping.shape)

    def _of_heads(self, parts: Sequence[TensorMapping]) -> Tensor:
        """Return a matrix of which each part has some rows of each head."""
        rows = [torch.from_numpy(self._file.read(part.gguf)) for part in parts]  # each (H, rows, K), or (H, K, rows)
        rows = [each.mT if part.transposed else each for each, part in zip(rows, parts, strict=True)]
        return torch.cat(rows, dim=1).view(parts[0].shape)

    def is_quantized(self, name: str) -> bool:
        """Return whether the file stores the tensor quantized, in blocks of any type."""
        return all(self._file.tensors[part.gguf].type.block_size > 1 for part in self._parts[name])

    def codes(self, name: str) -> Codes | None:
        """Return a quantized matrix, in the file's orientation; None if it is not quantized, or not as one matrix."""
        mapping = self._parts[name][0]
        if mapping.head_rows is not None:
            return None
        codes = self._file.codes(mapping.gguf, mapping.expert)
        if codes is None or not (mapping.permuted_heads or mapping.reordered):
            return codes
        if mapping.reordered is not None:
            order = mapping.reordered.order(len(codes.codes))
        else:
            order = torch.from_numpy(neighbors_to_halves(np.arange(len(codes.codes)), mapping.permuted_heads))
        return codes.rows(order)

    def expert_matrices(self, name: str, expert: int) -> list[tuple[Tensor, Codes | None]]:
        """Return the matrices of one expert in a tensor of all: gate and up, or a single one; codes as in `codes`."""
        return [
            (torch.from_numpy(self._file.read(each.gguf, expert)), self._file.codes(each.gguf, expert))
            for each in self._parts[name]
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, without reading it."""
        return {name: parts[0].shape for name, parts in self._parts.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


# Writing --------------------------------------------------------------------------------------------------------------


def check_exportable(model: Transformer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the Hugging Face configuration and llama.cpp's settings of a model.

    Raises UsageError for a model that llama.cpp would compute differently.
    """
    if model.config.model_type not in ARCHITECTURES:
        raise UsageError(
            f"GGUF has no architecture for a {model.config.model_type} model. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    config = config_to_hf(model.config)
    return config, config_to_metadata(config)


def write_gguf(
    model: Transformer,
    vocabulary: Mapping[str, Any],
    path: Path,
    dtype: GgufType = "f16",
    *,
    importance: Mapping[str, Tensor] | None = None,
    part_bytes: int | None = None,
) -> list[Path]:
    """Write `model` as a GGUF file that llama.cpp loads, atomically. Return the paths of what was written.

    vocabulary: `gptsmith.formats.gguf_tokenizer.tokenizer_to_gguf(tokenizer, model.config.vocab_size)`.
    dtype: of the matrices (see `stored_type`). Norms, biases, routers, position embeddings, and matrices whose rows are
    not a multiple of 32 are stored as float32.
    importance: of the inputs of each layer, (K,), by the name of our parameter (of an expert's matrix:
    `layers.0.mlp.up_proj.3`), by which errors are weighted when a matrix is quantized.
    part_bytes: split the file into parts with at most so many bytes of tensors; None: one file.
    Raises UsageError for a model that llama.cpp would compute differently.
    """
    if dtype not in GGUF_TYPES:
        raise UsageError(f"GGUF type {dtype!r} cannot be written. Choose from {', '.join(GGUF_TYPES)}.")
    config, settings = check_exportable(model)  # before the weights are converted
    weights = weights_to_hf(model)
    mappings: dict[str, list[TensorMapping]] = {}  # by GGUF tensor; several for a tensor of all experts
    for mapping in tensor_mappings(config):
        mappings.setdefault(mapping.gguf, []).append(mapping)
    of_columns = _importance_by_hf_name(model.config, importance or {})
    tensors = []
    for name, group in mappings.items():
        shape = group[0].stored_shape if group[0].expert is None else (len(group), *group[0].stored_shape)
        numbers = partial(_gguf_numbers, group, weights)
        type = stored_type(name, shape, dtype, config, has_output="output.weight" in mappings)
        tensors.append(PlannedTensor(name, shape, type, numbers, _stacked(group, of_columns)))
    if ARCHITECTURES[config["model_type"]].requires_output and config["tie_word_embeddings"]:
        embeddings = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(replace(embeddings, name="output.weight"))
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        divisors = llama3_divisors(rope["rope_theta"], config["head_dim"], rope)
        tensors.append(PlannedTensor("rope_freqs.weight", divisors.shape, TYPES_BY_NAME["F32"], lambda: divisors))
    if rope.get("rope_type") == "longrope":
        for name, key in (("rope_factors_long", "long_factor"), ("rope_factors_short", "short_factor")):
            factors = np.array(rope[key], np.float32)
            read = functools.partial(np.asarray, factors)
            tensors.append(PlannedTensor(f"{name}.weight", factors.shape, TYPES_BY_NAME["F32"], read))
    header = {
        "general.architecture": ARCHITECTURES[config["model_type"]].gguf,
        "general.type": "model",
        "general.name": Path(path).stem,
        "general.file_type": GGUF_TYPES[dtype],
        "general.quantization_version": 2,
        **sampling_to_metadata(model.generation_config),
        **settings,
        **vocabulary,
    }
    path = Path(path)
    if part_bytes is not None:
        return write_gguf_parts(path, header, tensors, part_bytes)
    with atomic_file(path) as file:
        write_gguf_file(file, header, tensors)
    return [path]


def _importance_by_hf_name(config: ModelConfig, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the importance of columns by the Hugging Face names of the matrices: (K,), of stacked experts (E, K)."""
    found = {}
    stacked = config.num_experts if LAYOUTS[config.model_type].stacked_experts else 0
    for mapping in weight_mappings(config):
        local = mapping.local
        known = [numbers for e in range(stacked) if (numbers := importance.get(f"{local}.{e}")) is not None]
        if known:
            each = [importance.get(f"{local}.{e}", torch.ones_like(known[0])) for e in range(stacked)]
            found[mapping.hf[0]] = torch.stack(each).float().cpu()
            continue
        if local == "embed_tokens.weight" and config.tie_word_embeddings:
            local = "lm_head.weight"  # a table of embeddings has no inputs; an output matrix does
        per_expert = max(1, len(mapping.hf) // max(1, config.num_experts or 0))
        for i, name in enumerate(mapping.hf):
            numbers = importance.get(local, importance.get(f"{local}.{i // per_expert}"))
            if numbers is not None:
                found[name] = numbers.float().cpu()
    return found


def _stacked(group: list[TensorMapping], importance: Mapping[str, Tensor]) -> Tensor | None:
    """Return the importance of the columns of one GGUF tensor; None if it is not known.

    An expert that no token of the calibration text used is left out there; its columns count alike. The columns of a
    transposed part of a matrix are its outputs.
    """
    if group[0].head_rows is not None and group[0].transposed:
        return None
    known = [importance[mapping.hf] for mapping in group if mapping.hf in importance]
    if not known:
        return None
    parts = [importance.get(mapping.hf, torch.ones_like(known[0])) for mapping in group]
    return parts[0] if group[0].expert is None else torch.stack(parts)


def _gguf_numbers(group: list[TensorMapping], weights: Mapping[str, Tensor]) -> np.ndarray:
    """Return the numbers of one GGUF tensor, from the Hugging Face tensors that it consists of."""
    parts = []
    for mapping in group:
        numbers = weights[mapping.hf].float().numpy()
        if mapping.part is not None:
            numbers = numbers[..., mapping.part :: 2]
        if mapping.head_rows is not None:
            numbers = mapping.head_rows.of(numbers)
        if mapping.reordered is not None:
            numbers = numbers[mapping.reordered.order(len(numbers)).argsort().numpy()]
        numbers = numbers.swapaxes(-1, -2) if mapping.transposed else numbers.reshape(mapping.stored_shape)
        if mapping.offset:
            numbers = numbers + np.float32(mapping.offset)
        parts.append(halves_to_neighbors(numbers, mapping.permuted_heads) if mapping.permuted_heads else numbers)
    return parts[0] if group[0].expert is None else np.stack(parts)


def stored_type(
    name: str, shape: tuple[int, ...], dtype: GgufType, config: Mapping[str, Any], *, has_output: bool
) -> TensorType:
    """Return the type of a tensor in a file of this type, as llama.cpp's `llama_tensor_get_type` chooses it.

    The output matrix, or the embeddings that stand for it, get more bits, as do a part of the values' and the
    feed-forward layers' matrices in files of mixed types (`_m`). MXFP4 is for the experts if there are any, otherwise
    for all matrices; the rest gets 8 bits. Rows that are not whole blocks of 256 get a type with blocks of 32.
    config: Hugging Face's. has_output: there is an output matrix.
    """
    kept = ("ffn_gate_inp.weight", "_norm.weight", ".bias", "attn_sinks.weight")
    if len(shape) == 1 or name == "position_embd.weight" or name.endswith(kept):
        return TYPES_BY_NAME["F32"]
    if shape[-1] % 32:  # some of llama.cpp's kernels read float16 rows in blocks of 32, too
        return TYPES_BY_NAME["F32"]
    chosen = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}.get(dtype, dtype.upper())
    is_output = name == "output.weight" or (name == "token_embd.weight" and not has_output)
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0
    if dtype == "q4_0":
        chosen = "Q8_0" if name in ("token_embd.weight", "output.weight") else chosen
    elif dtype == "mxfp4":
        in_mxfp4 = "_exps." in name if experts else name.startswith("blk.")
        chosen = "MXFP4" if in_mxfp4 else "Q8_0"
    elif dtype in ("q4_k_m", "q5_k_m", "q6_k"):
        chosen = "Q6_K" if is_output else _mixed_type(name, chosen, dtype, config, experts)
    if shape[-1] % TYPES_BY_NAME[chosen].block_size:
        chosen = "Q8_0" if is_output else {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[chosen]
    return TYPES_BY_NAME[chosen]


def _mixed_type(name: str, chosen: str, dtype: GgufType, config: Mapping[str, Any], experts: int) -> str:
    """Return the K-type of a matrix within a layer; chosen: that of most matrices in a file of this type."""
    part = re.sub(r"blk\.\d+\.|\.weight", "", name)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if experts == 8 and part in ("attn_v", "attn_k"):
        return "Q8_0"
    if experts == 8 and part == "attn_output" and chosen == "Q4_K":
        return "Q5_K"
    finer = ("attn_v", "attn_qkv", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
    return "Q6_K" if dtype != "q6_k" and more_bits and part in finer else chosen
