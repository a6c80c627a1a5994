"""Open a model in a Hugging Face directory or a GGUF file, whatever it is stored in.

    source = open_model(path)          # reads the configuration; no weights yet
    model, tokenizer = source.model(), source.tokenizer()

Weights are memory-mapped and copied tensor by tensor into a model that is built without initializing its memory. Names
and shapes are compared with the configuration before that memory is allocated, so a configuration that claims more than
the file contains costs nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.errors import CheckpointError, TokenizerError, UsageError
from gptsmith.formats import hf_text
from gptsmith.formats.hf import (
    CONFIG_FILE,
    LAYOUTS,
    WEIGHTS_FILE,
    config_from_hf,
    embeddings_name,
    load_weights,
    named_tensors,
    read_config_file,
    read_generation_config,
    read_preprocessor,
    weight_mappings,
)
from gptsmith.formats.hf_config import model_type_of
from gptsmith.formats.hf_quantized import QuantizedTensors, open_quantized, quantization_settings
from gptsmith.formats.hf_weights import HEAD, WeightMapping
from gptsmith.formats.peft import adapted_rows, load_adapter
from gptsmith.formats.safetensors import Rename, SafetensorsFiles, open_weights
from gptsmith.log import note
from gptsmith.model.config import ModelConfig
from gptsmith.model.lora import lora_parts, merge_lora
from gptsmith.model.quantized import (
    Bits,
    Codes,
    QuantizedMatrix,
    bits_of,
    bits_of_config,
    concatenate,
    dequantize,
    encode,
    load_quantized_state,
    quantize_skeleton,
    replace_matrices,
)
from gptsmith.model.resize import resize_embeddings
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.ids import IdTokenizer
from gptsmith.tokenizer.pretrained import has_tokenizer, read_tokenizer
from gptsmith.tokenizer.tokenizer import model_end_ids

_LIMITS = {  # a larger value is a mistake or an attack: tables and lists of that length would be built
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
    "dense_intermediate_size": 1 << 22,
    "embedding_size": 1 << 20,
    "position_offset": 1 << 12,
    "kv_lora_rank": 1 << 20,
    "q_lora_rank": 1 << 20,
    "qk_rope_head_dim": 1 << 12,
    "v_head_dim": 1 << 12,
    "first_k_dense_replace": 1 << 12,
    "n_group": 1 << 13,
    "topk_group": 1 << 13,
}
_MAX_ROPE_TABLE = 1 << 28  # numbers: 2^20 positions of heads of 256


@dataclass(frozen=True)
class ModelSource:
    """An opened model: its configuration has been read and checked, its tensors are read on access."""

    path: Path
    config: ModelConfig
    hf_config: Mapping[str, Any]
    """The contents of config.json; for a GGUF file the equivalent, made from its metadata."""
    tensors: Mapping[str, Tensor]
    """Weights by their Hugging Face names; of a model quantized by this package, by our names."""
    tokenizer: Callable[[], Tokenizer]
    """Read the tokenizer, its chat template included. Raises TokenizerError."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """The contents of generation_config.json, {} without one; for a GGUF file the equivalent."""
    bits: Bits | None = None
    """Bits per weight of a model quantized by this package; None for any other."""

    def model(self, *, dtype: torch.dtype = torch.float32, packed: bool = False) -> Transformer:
        """Build the model and load its weights, on the CPU in `dtype`, in eval mode.

        packed: keep matrices quantized that are stored so, by this package, in a GGUF file or by another program; all
        other weights are then float32. Those that `Codes` cannot represent are requantized to 8 bits.
        Raises CheckpointError that lists missing and unexpected tensors and wrong shapes.
        """
        shapes = {name: shape for name, (_, shape) in self._stored().items()}
        stacked = LAYOUTS[self.config.model_type].stacked_experts or self.bits is not None  # ours, or a tensor each
        parts = self.config.num_hidden_layers * (1 if stacked else max(1, self.config.num_experts or 0))
        if parts > len(shapes):  # building so many takes long, even without their weights
            raise CheckpointError(
                f"{self.path} has only {len(shapes):,} tensors, but its configuration claims {parts:,} layers or "
                "experts."
            )
        try:
            with _MetaSkeleton():
                model = Transformer(self.config, initialize=False)
            model.generation_config = dict(self.generation_config)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"{self.path}: no model can be built from its configuration: {error}.") from None
        where = str(self.path)
        if self.bits is not None:
            quantize_skeleton(model, shapes, where)
            _allocate(model, torch.float32)
            load_quantized_state(model, self.tensors, where)
            if not packed:
                for parameter in dequantize(model).parameters():
                    parameter.data = parameter.data.to(dtype)
            return model.eval()
        # Loading tensors without memory into the skeleton checks names and shapes before anything is allocated.
        load_weights(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, where)
        if packed and hasattr(self.tensors, "codes"):
            replace_matrices(model, self._packed_matrix)
        _allocate(model, dtype if bits_of(model) is None else torch.float32)
        load_weights(model, self.tensors, where)
        return model.eval()

    @property
    def origin(self) -> Path:
        """Where the whole model is: for a model with an adapter, the place of the model without it."""
        return self.path

    def checked_tokenizer(self) -> Tokenizer:
        """Read the tokenizer, and check that it fits the model.

        It may have tokens that the model has no embeddings for, which were added to it later, or a single one.
        Raises TokenizerError if the tokenizer is damaged, or is that of another model.
        """
        tokenizer, rows = self.tokenizer(), self.config.vocab_size
        further = set(range(rows, tokenizer.vocab_size))
        if len(further) > 1 and not further <= tokenizer.added_ids:
            raise TokenizerError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model only {rows:,}."
            )
        return tokenizer

    def stored_dtype(self) -> torch.dtype:
        """Return bfloat16 or float16 if all matrices are stored in it, else float32."""
        stored = {dtype for dtype, shape in self._stored().values() if len(shape) > 1}
        return next((half for half in (torch.bfloat16, torch.float16) if stored == {half}), torch.float32)

    def _stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Return type (None: unknown) and shape of each tensor, without reading it where that is possible."""
        if isinstance(self.tensors, SafetensorsFiles | QuantizedTensors):
            return self.tensors.stored()
        if hasattr(self.tensors, "shapes"):  # of a GGUF file
            return {name: (None, shape) for name, shape in self.tensors.shapes().items()}
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    @functools.cached_property
    def _mappings(self) -> dict[str, WeightMapping]:
        return {mapping.local: mapping for mapping in weight_mappings(self.config)}

    def _packed_matrix(self, name: str, weight: Tensor) -> QuantizedMatrix | None:
        """Return the quantized matrix for our parameter `name`; None if it is not stored quantized.

        An expert's matrix is named after the stack of experts: `layers.0.mlp.up_proj.3`.
        """
        tensors: Any = self.tensors
        stack, _, expert = name.rpartition(".")
        if expert != "weight" and LAYOUTS[self.config.model_type].stacked_experts:
            return self._packed_expert(self._mappings[stack].hf[0], int(expert))
        mapping = self._mappings[name if expert == "weight" else stack]
        hf_names = mapping.hf
        if expert != "weight":
            per_expert = len(hf_names) // self.config.num_experts
            hf_names = hf_names[int(expert) * per_expert :][:per_expert]
        named = named_tensors(tensors, self.config)
        hf_names = tuple(named.stored_name(hf_name) for hf_name in hf_names)
        if not all(tensors.is_quantized(hf_name) for hf_name in hf_names):
            return None

        def plain(i: int) -> Tensor:
            matrix: Tensor = tensors[hf_names[i]]
            return matrix.mT if mapping.transposed else matrix

        parts = _of_one_width([tensors.codes(hf_name) for hf_name in hf_names], plain)
        whole = concatenate([parts[0].scaled(mapping.scale), *parts[1:]])
        if mapping.reordered is not None:
            whole = whole.rows(mapping.reordered.order(len(whole.codes)).argsort())
        return QuantizedMatrix.of(whole)

    def _packed_expert(self, hf_name: str, expert: int) -> QuantizedMatrix | None:
        """Return an expert's quantized matrix where the Hugging Face tensor is that of all experts."""
        tensors: Any = self.tensors
        if not tensors.is_quantized(hf_name):
            return None
        if hasattr(tensors, "expert_matrices"):  # of a GGUF file
            found = tensors.expert_matrices(hf_name, expert)
            return QuantizedMatrix.of(concatenate(_of_one_width([codes for _, codes in found], lambda i: found[i][0])))
        codes: Codes = tensors.codes(hf_name, expert)
        if hf_name.endswith("gate_up_proj"):
            codes = codes.rows(torch.arange(len(codes.codes)).view(-1, 2).T.flatten())
        return QuantizedMatrix.of(codes)


def _of_one_width(parts: list[Codes | None], plain: Callable[[int], Tensor]) -> list[Codes]:
    """Return the parts of a matrix with the same number of bits.

    Codes of 4 and 5 bits are codes of more. A part of 8 bits is rounded to 6 if others have fewer. If a part cannot be
    kept as it is (None), all are rounded to 8. plain: part i in full precision, (outputs, inputs).
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return [encode(plain(i), 8) for i in range(len(parts))]
    widths = {part.bits for part in known}
    if len(widths) == 1:
        return known
    bits = min(6, max(widths))
    return [
        replace(part, bits=bits, units=None) if part.bits < 8 else encode(plain(i), bits)
        for i, part in enumerate(known)
    ]


def open_model(path: Path) -> ModelSource:
    """Open the model in a Hugging Face directory or a .gguf file.

    Raises CheckpointError if it is not a model, of an unknown architecture, damaged, or lacks a shard.
    """
    path = Path(path)
    if path.is_file():
        return _open_gguf(path)
    values = read_config_file(path)
    config = _checked_config(values, str(path / CONFIG_FILE), read_preprocessor(path))
    rename: Rename = str
    if model_type_of(values) in hf_text.MODEL_TYPES:
        note(f"note: only the text model of {path} is read; images are left out.")
        values, rename = hf_text.text_values(values), hf_text.text_name
    if config.max_position_embeddings < values.get("max_position_embeddings", 0):
        note(
            f"note: {path} has other rotary positions for more than {config.max_position_embeddings:,} tokens. Its "
            "context ends there; `gptsmith import --context` makes a model with those for more."
        )
    generation = read_generation_config(path)
    bits = bits_of_config(values.get("quantization_config"))
    settings = quantization_settings(path, values)
    if bits is not None:
        weights: Mapping[str, Tensor] = SafetensorsFiles([path / WEIGHTS_FILE], quantized=True)
    else:
        if settings is None:
            weights = open_weights(path, rename=rename)
        else:
            weights = _open_quantized(path, config, settings, rename)
        config = _untied(config, weights, path)
    if config.model_type == "deepseek_v3" and any(f"layers.{config.num_hidden_layers}." in name for name in weights):
        note(f"note: {path} has a layer that predicts further tokens (multi-token prediction). It is left out.")
    return ModelSource(path, config, values, weights, lambda: _read_tokenizer(path, config), generation, bits)


def _open_quantized(path: Path, config: ModelConfig, settings: Mapping[str, Any], rename: Rename) -> QuantizedTensors:
    """Open the weights of a directory that another program has quantized."""
    files = open_weights(path, quantized=True, rename=rename)
    assert isinstance(files, SafetensorsFiles)
    prefix = LAYOUTS[config.model_type].prefix
    transposed = {name for mapping in weight_mappings(config) if mapping.transposed for name in mapping.hf}
    return open_quantized(
        files, settings, str(path / CONFIG_FILE), lambda name: name in transposed or prefix + name in transposed
    )


@dataclass(frozen=True)
class AdaptedSource(ModelSource):
    """A model with an adapter, which is folded into its weights, or stays beside quantized ones.

    weight: what the adapter's update is multiplied by.
    """

    adapter: Path = Path()
    base: ModelSource | None = None
    weight: float = 1.0

    @property
    def origin(self) -> Path:
        return self.path if self.base is None else self.base.origin

    def model(self, *, dtype: torch.dtype = torch.float32, packed: bool = False) -> Transformer:
        assert self.base is not None
        model = self.base.model(packed=packed)
        resize_embeddings(model, self.config.vocab_size)
        model.generation_config = dict(self.generation_config)
        load_adapter(self.adapter, model)
        for part in lora_parts(model).values() if self.weight != 1 else ():
            if part.magnitude is not None:
                raise UsageError(
                    f"{self.adapter} is a DoRA adapter: it can only have the weight 1, not {self.weight:g}."
                )
            part.scaling *= self.weight
        if bits_of(model) is None:
            merge_lora(model)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        return model.eval()


def adapted(base: ModelSource, adapter: Path, *, weight: float = 1.0) -> ModelSource:
    """Return a model together with the adapter in a directory, whose tokenizer comes first if it has one.

    weight: what the update of the adapter is multiplied by.
    Raises CheckpointError for an adapter that needs more tokens than the model can get.
    """
    rows = adapted_rows(adapter) or base.config.vocab_size
    config = replace(base.config, vocab_size=rows)
    tokenizer, hf_config = base.tokenizer, dict(base.hf_config)
    if has_tokenizer(adapter):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # they follow from the tokenizer
            hf_config.pop(key, None)
        tokenizer = lambda: read_tokenizer(adapter)  # noqa: E731
    generation = read_generation_config(adapter) or base.generation_config
    return AdaptedSource(
        adapter,
        config,
        hf_config,
        base.tensors,
        tokenizer,
        generation,
        base.bits,
        adapter=adapter,
        base=base,
        weight=weight,
    )


def _untied(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Return the configuration, untied if the file has an output matrix that differs from the embeddings.

    The weights decide, as in transformers, whatever config.json says.
    """
    named, embeddings = named_tensors(tensors, config), embeddings_name(config)
    if not config.tie_word_embeddings or HEAD not in named or embeddings not in named:
        return config
    head, embedded = named[HEAD], named[embeddings]
    if head.shape == embedded.shape and torch.equal(head.float(), embedded.float()):
        return config
    note(
        f"note: {path} has an output matrix of its own, although its config.json ties it to the embeddings. It is used."
    )
    return replace(config, tie_word_embeddings=False)


def _read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    if has_tokenizer(path):
        return read_tokenizer(path)
    return _id_tokenizer(path, config, model_end_ids(path))


def _id_tokenizer(path: Path, config: ModelConfig, end_ids: Iterable[int]) -> Tokenizer:
    note(f"note: {path} has no tokenizer. Prompts and texts are token ids, such as 5 17 3.")
    return IdTokenizer.of(config.vocab_size, end_ids)


def _read_gguf_tokenizer(path: Path, config: ModelConfig, metadata: Mapping[str, Any]) -> Tokenizer:
    from gptsmith.formats.gguf_tokenizer import tokenizer_from_gguf

    if metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        return _id_tokenizer(path, config, [id for id in [metadata.get("tokenizer.ggml.eos_token_id")] if id])
    return tokenizer_from_gguf(metadata, str(path))


def _open_gguf(path: Path) -> ModelSource:
    from gptsmith.formats.gguf import read_gguf
    from gptsmith.formats.gguf_config import sampling_from_metadata

    file = read_gguf(path)
    config = _checked_config(file.hf_config, str(path))
    return ModelSource(
        path,
        config,
        file.hf_config,
        file.tensors,
        lambda: _read_gguf_tokenizer(path, config, file.metadata),
        sampling_from_metadata(file.metadata),
    )


def _checked_config(
    values: Mapping[str, Any], where: str, preprocessor: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the configuration. Raise CheckpointError for implausible values."""
    config = config_from_hf(values, where, preprocessor=preprocessor)
    for name, limit in _LIMITS.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value > limit):
            raise CheckpointError(f"{where}: {name} = {value} is implausible: expected an integer up to {limit:,}.")
    context, head_dim = config.max_position_embeddings, config.head_dim
    if config.position == "rope" and context * head_dim > _MAX_ROPE_TABLE:
        raise CheckpointError(
            f"{where}: a context of {context:,} tokens with a head_dim of {head_dim:,} is implausible: rejected."
        )
    for name in (
        *("norm_eps", "rope_theta", "initializer_range", "local_rope_theta", "attention_scale"),
        *("swiglu_alpha", "swiglu_limit", "routed_scaling_factor", "partial_rotary_factor"),
    ):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise CheckpointError(f"{where}: {name} = {value} is not a finite number.")
    return config


class _MetaSkeleton(TorchFunctionMode):
    """A context in which a model is built as a skeleton: parameters on the meta device, without memory or values.

    Tensors that are not parameters, such as RoPE tables, are computed as usual. (Building everything under
    `torch.device("meta")` would lose these tables, and loads torch's compiler, which takes a second.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.empty, torch.ones, torch.zeros):  # the functions that create parameters
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _allocate(model: Transformer, dtype: torch.dtype) -> None:
    """Give a skeleton's parameters and buffers memory on the CPU; their values are undefined until they are loaded."""
    allocated = {id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype)) for p in model.parameters()}
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, allocated.get(id(p), p))  # tied weights stay tied
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and not isinstance(module, QuantizedMatrix):  # whose buffers are replaced
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
