"""Where a model comes from: a model directory, a GGUF file, a named model, the hub. All end in a `ModelSource`.

    source = open_model(path)          # a Hugging Face directory or a .gguf file; nothing large is read yet
    model, tokenizer = source.model(), source.tokenizer()

Weights are memory-mapped and copied tensor by tensor into a model whose memory is not initialised first. Names and
shapes are compared with the configuration before any of that memory is asked for, so a configuration that claims more
than the file holds costs nothing. What comes from elsewhere is not trusted: names of shards are plain file names, JSON
files have a largest size, and a legacy `pytorch_model.bin` is read with `weights_only=True`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import CONFIG_FILE, WEIGHTS_FILE, Entry, config_from_hf, entries_of, load_weights
from gptsmith.formats.safetensors import SafetensorsFiles, open_weights, read_json
from gptsmith.model.config import ModelConfig
from gptsmith.model.quantized import (
    Bits,
    Packed,
    bits_of,
    dequantize,
    described_bits,
    encode,
    joined,
    load_state,
    outline,
    replace_matrices,
)
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.pretrained import read_tokenizer

INDEX_FILE = WEIGHTS_FILE + ".index.json"
LEGACY_FILE = "pytorch_model.bin"
GENERATION_FILE = "generation_config.json"

_LARGEST = {  # beyond these a configuration is a mistake or an attack: tables and lists of that length would be built
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 21,
    "sliding_window": 1 << 21,
    "shared_expert_intermediate_size": 1 << 22,
    "num_experts": 1 << 13,
    "num_experts_per_tok": 1 << 13,
}
_LARGEST_ROPE_TABLE = 1 << 28  # numbers: a million positions of heads of 256


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: its configuration is known and understood, its tensors are read when asked for.

    hf_config: the contents of its config.json (of a GGUF file: the same, made from its metadata). tensors: weights by
    their Hugging Face names. generation_config: the contents of generation_config.json, None if there is none.
    """

    path: Path
    config: ModelConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Callable[[], Tokenizer]
    """Read the tokenizer, its chat template included. Raises TokenizerError."""
    generation_config: Mapping[str, Any] | None = None
    bits: Bits | None = None
    """The weights are quantized, by this package."""

    def model(self, *, dtype: torch.dtype = torch.float32, packed: bool = False) -> Transformer:
        """The model with its weights, on the CPU in `dtype`, in eval mode.

        packed: leave in few bits what is stored so, by this package or in a GGUF file; the rest is float32 then. Blocks
        of a GGUF file other than Q4_0, Q4_1 and Q8_0 are rounded to 8 bits.
        Raises CheckpointError that lists missing and unexpected tensors and wrong shapes.
        """
        shapes = self._shapes()
        parts = self.config.num_hidden_layers * max(1, self.config.num_experts or 0)
        if parts > len(shapes):  # building so many takes long, even without their weights
            raise CheckpointError(
                f"{self.path} holds {len(shapes):,} tensors: too few for the {parts:,} layers or experts that its "
                "configuration tells of."
            )
        try:
            with _Outline():
                model = Transformer(self.config, initialize=False)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"{self.path}: no model can be built from its configuration: {error}.") from None
        where = str(self.path)
        if self.bits is not None:
            outline(model, shapes, where)
            _allocate(model, torch.float32)
            load_state(model, self.tensors, where)
            if not packed:
                for parameter in dequantize(model).parameters():
                    parameter.data = parameter.data.to(dtype)
            return model.eval()
        load_weights(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, where)
        if packed and hasattr(self.tensors, "codes"):
            replace_matrices(model, self._packed)
        _allocate(model, dtype if bits_of(model) is None else torch.float32)
        load_weights(model, self.tensors, where)
        return model.eval()

    @functools.cached_property
    def _sources(self) -> dict[str, Entry]:
        return {entry.ours: entry for entry in entries_of(self.config)}

    def _packed(self, name: str, weight: Tensor) -> Packed | None:
        """A GGUF file's matrix for the weight of this name, if it is there in few bits."""
        tensors: Any = self.tensors
        whole, _, expert = name.rpartition(".")
        entry = self._sources[name if expert == "weight" else whole]
        theirs = entry.theirs
        if expert != "weight":
            each = len(theirs) // self.config.num_experts
            theirs = theirs[int(expert) * each :][:each]
        if not all(tensors.is_quantized(part) for part in theirs):
            return None
        parts = [tensors.codes(part) for part in theirs]
        bits = {part.bits if part is not None else None for part in parts}
        if len(bits) > 1 or None in bits:
            rows = [tensors[part] for part in theirs]
            parts = [encode(part.mT if entry.transposed else part, 8) for part in rows]
        return Packed.of(joined(parts))

    def stored_dtype(self) -> torch.dtype:
        """bfloat16 or float16 if all matrices are stored so, else float32."""
        stored = {dtype for dtype, shape in self._stored().values() if len(shape) > 1}
        return next((half for half in (torch.bfloat16, torch.float16) if stored == {half}), torch.float32)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._stored().items()}

    def _stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type (None: unknown) and shape of each tensor, without reading it where that is possible."""
        if isinstance(self.tensors, SafetensorsFiles):
            return self.tensors.stored()
        if hasattr(self.tensors, "shapes"):  # of a GGUF file
            return {name: (None, shape) for name, shape in self.tensors.shapes().items()}
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}


def open_model(path: Path) -> ModelSource:
    """The model in a Hugging Face directory or a .gguf file.

    Raises CheckpointError: not a model, unknown architecture, damaged files, missing shards.
    """
    path = Path(path)
    if path.is_file():
        return _open_gguf(path)
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_FILE}: it is not a model directory.")
    values = read_json(config_path)
    config = _understand(values, str(config_path))
    generation = read_json(path / GENERATION_FILE) if (path / GENERATION_FILE).is_file() else None
    bits = described_bits(values.get("quantization_config"))
    weights = open_weights(path) if bits is None else SafetensorsFiles([path / WEIGHTS_FILE], codes=True)
    return ModelSource(path, config, values, weights, lambda: read_tokenizer(path), generation, bits)


def _open_gguf(path: Path) -> ModelSource:
    from gptsmith.formats.gguf import read_gguf
    from gptsmith.formats.gguf_tokenizer import tokenizer_from_gguf

    file = read_gguf(path)
    config = _understand(file.hf_config, str(path))
    return ModelSource(
        path, config, file.hf_config, file.tensors, lambda: tokenizer_from_gguf(file.metadata, str(path))
    )


def _understand(values: Mapping[str, Any], where: str) -> ModelConfig:
    quantized = values.get("quantization_config")
    if quantized and described_bits(quantized) is None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{where}: the weights are quantized ({method or 'quantization_config'}), which is not read. "
            "Take the model's full-precision weights, or a GGUF file of it."
        )
    config = config_from_hf(values, where)
    for name, largest in _LARGEST.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value > largest):
            raise CheckpointError(f"{where}: {name} = {value} is absurd: it must be a whole number up to {largest:,}.")
    if config.position == "rope" and config.max_position_embeddings * config.head_dim > _LARGEST_ROPE_TABLE:
        context, width = config.max_position_embeddings, config.head_dim
        raise CheckpointError(f"{where}: a context of {context:,} with heads of {width:,} numbers is absurd.")
    for name in ("norm_eps", "rope_theta", "initializer_range"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise CheckpointError(f"{where}: {name} = {value} is no number.")
    return config


class _Outline(TorchFunctionMode):
    """Modules built under it have parameters with a shape but no memory, which nobody fills with random numbers.

    They are on the meta device; other tensors, such as the tables of rotary positions, are made as ever. (To build all
    under `torch.device("meta")` would lose the tables, and load torch's compiler to compute them: a second's work.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.empty, torch.ones, torch.zeros):  # what parameters are made with
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _allocate(model: Transformer, dtype: torch.dtype) -> None:
    """Give the parameters of an outline memory on the CPU; their numbers are undefined until they are loaded."""
    made = {id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype)) for p in model.parameters()}
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, made.get(id(p), p))  # a tied weight is one afterwards too
