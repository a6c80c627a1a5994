"""The Hugging Face layouts: one table per `model_type` that maps our configuration and weights to Hugging Face's.

A model directory of this package *is* a Hugging Face model directory (`config.json`, `model.safetensors`); there is no
other format. `LAYOUTS` is the only place that knows the names and shapes under which weights are stored; its parts are
in `hf_config`, `hf_weights` and `layouts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, UsageError, first_few
from gptsmith.formats import hf_config, hf_text, hf_vision, hf_weights
from gptsmith.formats.hf_weights import HEAD, WeightMapping
from gptsmith.formats.layout import Layout
from gptsmith.formats.layouts import deepseek_v3, gemma3, gpt_neox, gpt_oss, olmo2, opt, phi3, smollm3, stablelm
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.model.config import ModelConfig
from gptsmith.model.quantized import bits_of, quantization_config, quantized_state
from gptsmith.model.transformer import Transformer
from gptsmith.storage import atomic_file

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DEFAULT_GENERATION = {"do_sample": True, "temperature": 0.8}
"""What generation_config.json says about sampling, for a model that came without one."""

_MAX_JSON_BYTES = 64 << 20  # the index of a model with hundreds of shards has about 10 MB


_MASKS, _ROTARY = r".*\.attn\.(attention\.)?(bias|masked_bias)", r".*\.rotary_emb\.inv_freq"


def _layout(model_type: str, mappings: Any, to_hf: Any, from_hf: Any, ignored: str, prefix: str) -> Layout:
    fields, aliases = hf_config.FIELDS[model_type], hf_config.ALIASES.get(model_type, {})
    return Layout(mappings, to_hf, from_hf, ignored, prefix, fields, aliases)


def _llama(model_type: str) -> Layout:
    return _layout(
        model_type,
        hf_weights.llama_mappings,
        hf_config.llama_config_to_hf,
        hf_config.llama_config_from_hf,
        _ROTARY,
        "model.",
    )


LAYOUTS: dict[str, Layout] = {
    "openai-gpt": _layout(
        "openai-gpt",
        hf_weights.openai_mappings,
        hf_config.gpt1_config_to_hf,
        hf_config.gpt1_config_from_hf,
        _MASKS + r"|transformer\.position_ids",
        "transformer.",
    ),
    "gpt2": _layout(
        "gpt2",
        hf_weights.openai_mappings,
        hf_config.gpt2_config_to_hf,
        hf_config.gpt2_config_from_hf,
        _MASKS,
        "transformer.",
    ),
    "gpt_neo": _layout(
        "gpt_neo",
        hf_weights.gpt_neo_mappings,
        hf_config.gpt_neo_config_to_hf,
        hf_config.gpt_neo_config_from_hf,
        _MASKS,
        "transformer.",
    ),
    **{kind: _llama(kind) for kind in ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")},
    "gpt_neox": gpt_neox.LAYOUT,
    "opt": opt.LAYOUT,
    "phi3": phi3.LAYOUT,
    "olmo2": olmo2.LAYOUT,
    "stablelm": stablelm.LAYOUT,
    "smollm3": smollm3.LAYOUT,
    "gemma3_text": gemma3.LAYOUT,
    "gpt_oss": gpt_oss.LAYOUT,
    "deepseek_v3": deepseek_v3.LAYOUT,
}
"""All layouts. Those of later families are in `gptsmith.formats.layouts`, a page each."""


# Configuration --------------------------------------------------------------------------------------------------------


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, end_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the contents of `config.json`. Raise CheckpointError for a configuration that the layout cannot hold."""
    if config.attention_scale is not None and config.model_type not in ("gpt_neo", "gpt2", "gemma3_text"):
        raise CheckpointError(f"the {config.model_type} layout supports no attention_scale but 1/sqrt(head_dim).")
    if config.scale_attn_by_inverse_layer_idx and config.model_type != "gpt2":
        raise CheckpointError(f"the {config.model_type} layout has no scale_attn_by_inverse_layer_idx.")
    ids = token_ids(bos_token_id, end_ids)
    values = {
        **LAYOUTS[config.model_type].config_to_hf(config),
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        **ids,
        "dtype": "float32",
    }
    _check_kept(config, values)
    if config.vision is not None:
        values = {**hf_vision.config_to_hf(config, values, ids), "dtype": "float32"}
    return values


_STRUCTURE = (
    *("num_key_value_heads", "head_dim", "qk_norm", "attention_bias"),
    *("norm", "norm_position", "parallel_residual", "shared_norm", "zero_centered_norm", "position_offset"),
    *("partial_rotary_factor", "scale_embeddings", "embedding_size", "mlp", "attention_sinks", "router_bias"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "shared_expert_gate", "first_k_dense_replace"),
    *("router_scoring", "n_group", "topk_group", "routed_scaling_factor"),
)
"""Fields that a layout either stores or has one value of."""


def _check_kept(config: ModelConfig, values: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the layout does not store what the configuration says."""
    layout = LAYOUTS[config.model_type]
    read = layout.config_from_hf(hf_config.settings(values, config.model_type, layout.fields, layout.aliases))
    layers = range(config.num_hidden_layers)
    differing = [name for name in _STRUCTURE if getattr(read, name) != getattr(config, name)]
    if read.mlp_bias != config.mlp_bias:
        differing.append("mlp_bias")
    if _output_bias(read) != _output_bias(config):
        differing.append("attention_output_bias")
    if config.qk_norm and read.qk_norm and read.qk_norm_scope != config.qk_norm_scope:
        differing.append("qk_norm_scope")
    if [config.rope_of(i) for i in layers] != [read.rope_of(i) for i in layers]:
        differing.append("rope_pattern" if config.rope_pattern != read.rope_pattern else "local_rope_theta")
    if differing:
        kept = ", ".join(f"{name} = {getattr(config, name)!r}" for name in differing)
        raise CheckpointError(f"the {config.model_type} layout has no place for {kept}.")


def _output_bias(config: ModelConfig) -> bool:
    return config.attention_bias if config.attention_output_bias is None else config.attention_output_bias


def token_ids(bos_token_id: int | None, end_ids: Sequence[int]) -> dict[str, Any]:
    """Return the ids of special tokens as config.json and generation_config.json have them.

    Several end tokens are a list. Without a bos_token_id, the first end token stands for it.
    """
    first = next(iter(end_ids), None)
    return {
        "bos_token_id": first if bos_token_id is None else bos_token_id,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else first,
    }


def config_from_hf(
    values: Mapping[str, Any], where: str, *, preprocessor: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the model configuration for the contents of a `config.json`.

    where: the file, for messages. preprocessor: the contents of preprocessor_config.json, for a model that reads
    pictures. Raises CheckpointError for an unknown `model_type`, a bad value, or a setting that is not supported.
    """
    model_type = hf_config.model_type_of(values)
    try:
        if model_type in hf_vision.MODEL_TYPES:
            text = hf_vision.text_values(values)
            if text["model_type"] in hf_vision.MODEL_TYPES:
                raise CheckpointError(f"{where}: a text_config of model_type {text['model_type']!r}.")
            return hf_vision.config_from_hf(values, config_from_hf(text, where), preprocessor or {})
        if model_type in hf_text.MODEL_TYPES:
            text = hf_text.text_values(values)
            if text["model_type"] not in LAYOUTS or LAYOUTS[text["model_type"]].prefix != "model.":
                raise CheckpointError(
                    f"{where}: the text model of this {model_type} model is of model_type {text['model_type']!r:.80}, "
                    "which is not supported."
                )
            return config_from_hf(text, where)
        if model_type not in LAYOUTS:
            supported = ", ".join(sorted([*LAYOUTS, *hf_vision.MODEL_TYPES, *hf_text.MODEL_TYPES]))
            raise CheckpointError(f"{where}: unknown model_type {model_type!r}. Supported: {supported}.")
        layout = LAYOUTS[model_type]
        return layout.config_from_hf(hf_config.settings(values, model_type, layout.fields, layout.aliases))
    except CheckpointError as error:
        message = str(error)
        if where not in message:
            message = message.replace("config.json", where, 1) if "config.json" in message else f"{where}: {message}"
        raise CheckpointError(message) from None
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error}.") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} has a value of the wrong type: {error}.") from None
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None


def read_config(directory: Path) -> ModelConfig:
    """Read the model configuration from a directory's `config.json`. Raise CheckpointError as `config_from_hf` does."""
    where = str(Path(directory) / CONFIG_FILE)
    return config_from_hf(read_config_file(directory), where, preprocessor=read_preprocessor(directory))


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """Return how a model directory says that pictures are prepared; {} where it does not."""
    return hf_vision.merged_preprocessor([read_json(path) for path in hf_vision.processor_files(directory)])


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return the contents of a directory's `config.json`. Raise CheckpointError if it is missing or damaged."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: it is not a model directory.")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise CheckpointError if it cannot be read or is implausibly large."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is implausibly large ({size:,} bytes) for a JSON file: rejected.")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it does not contain a JSON object.")
    return values


# Weights --------------------------------------------------------------------------------------------------------------


def weight_mappings(config: ModelConfig) -> list[WeightMapping]:
    """Return the mapping of every weight of a model with this configuration."""
    mappings = LAYOUTS[config.model_type].weight_mappings(config)
    if not config.tie_word_embeddings:
        mappings.append(WeightMapping("lm_head.weight", (HEAD,)))
    if config.vision is not None:
        mappings += hf_vision.vision_mappings(config.vision)
    return mappings


def module_name(config: ModelConfig, name: str) -> str:
    """Return the name in transformers' class of a tensor or module that `weight_mappings` names."""
    if config.vision is None:
        return name
    return hf_vision.module_name(name, config.vision, LAYOUTS[config.model_type].prefix)


class RenamedTensors(Mapping[str, Tensor]):
    """Tensors under other names. stored_names: their names in `tensors`, by the new ones."""

    def __init__(self, tensors: Mapping[str, Tensor], stored_names: Mapping[str, str]) -> None:
        self._tensors, self._stored_names = tensors, stored_names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._stored_names[name]]

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in the file."""
        return self._stored_names[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)


def named_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> RenamedTensors:
    """Return the tensors of a file under the names that `weight_mappings` expects, without reading them.

    As in transformers, the names may lack the layout's prefix (files of a model without output matrix), and the
    embeddings may be stored only as the output matrix that they are tied to.
    """
    prefix, head = LAYOUTS[config.model_type].prefix, LAYOUTS[config.model_type].head
    names = {HEAD if name == head else name: name for name in tensors}
    if config.vision is not None:
        names = {hf_vision.from_disk(name, config.vision, prefix): name for name in tensors}
    if not any(name.startswith(prefix) for name in names):
        names = {name if name == HEAD else prefix + name: stored for name, stored in names.items()}
    embeddings = embeddings_name(config)
    if config.tie_word_embeddings and embeddings not in names and HEAD in names:
        names[embeddings] = names.pop(HEAD)
    return RenamedTensors(tensors, names)


def select_tensors(tensors: Mapping[str, Tensor], keep: Callable[[str], bool]) -> Mapping[str, Tensor]:
    """Return the tensors whose names `keep` accepts, without reading them."""
    return RenamedTensors(tensors, {name: name for name in tensors if keep(name)})


def embeddings_name(config: ModelConfig) -> str:
    """Return the Hugging Face name of the token embeddings."""
    return next(m.hf[0] for m in weight_mappings(config) if m.local == "embed_tokens.weight")


def weights_to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return the model's weights by the names that they have on disk, contiguous, on the CPU."""
    return {name: tensor.cpu().contiguous() for name, tensor in weight_views(model).items()}


def weight_views(model: Transformer) -> Mapping[str, Tensor]:
    """Return the model's weights by the names that they have on disk: views of its parameters, where they are.

    A tensor that is stored with another scale or in another order is made on access.
    """
    state = model.state_dict()
    views: dict[str, Tensor] = {}
    converted: dict[str, WeightMapping] = {}
    for mapping in weight_mappings(model.config):
        views.update(zip(mapping.hf, _split(model, mapping, state[mapping.local].detach()), strict=True))
        if mapping.reordered is not None:
            converted[mapping.hf[0]] = mapping
        if mapping.scale != 1:
            converted[mapping.hf[0]] = mapping
    converted = {name_on_disk(name, model.config): mapping for name, mapping in converted.items()}
    views = {name_on_disk(name, model.config): view for name, view in views.items()}
    return _ConvertedTensors({**views, **constant_tensors(model.config)}, converted)


def name_on_disk(name: str, config: ModelConfig) -> str:
    """Return the name on disk of a tensor of `weight_mappings`."""
    if name == HEAD:
        name = LAYOUTS[config.model_type].head
    if config.vision is None:
        return name
    return hf_vision.to_disk(name, config.vision, LAYOUTS[config.model_type].prefix)


def constant_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return tensors that transformers wants to read and does not use, by their names on disk."""
    found = {} if config.vision is None else hf_vision.constant_tensors(config.vision)
    return {name: torch.full((size,), value) for name, (value, size) in found.items()}


class _ConvertedTensors(Mapping[str, Tensor]):
    """Tensors by name, some of them converted on access: put in the order and divided by the scale of a mapping."""

    def __init__(self, tensors: Mapping[str, Tensor], mappings: Mapping[str, WeightMapping]) -> None:
        self._tensors, self._mappings = tensors, mappings

    def __getitem__(self, name: str) -> Tensor:
        tensor, mapping = self._tensors[name], self._mappings.get(name)
        if mapping is None:
            return tensor
        if mapping.reordered is not None:
            axis = mapping.reordered.axis
            tensor = tensor.index_select(axis, mapping.reordered.order(tensor.shape[axis]).to(tensor.device))
        return tensor / mapping.scale if mapping.scale != 1 else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_weights(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors with Hugging Face names into `model`, except into matrices that it holds quantized.

    where: the source, for messages. Raises CheckpointError that lists missing, unexpected and misshapen tensors.
    """
    tensors = named_tensors(tensors, model.config)
    mappings = weight_mappings(model.config)
    expected = {name for mapping in mappings for name in mapping.hf}
    missing = sorted(expected - tensors.keys())
    ignored = re.compile(_ignored_tensors(model.config))
    unexpected = sorted(name for name in tensors.keys() - expected if not ignored.fullmatch(name))
    if model.config.tie_word_embeddings and HEAD in unexpected:
        unexpected.remove(HEAD)  # some writers store a tied head twice
    wrong_shapes = []
    state = model.state_dict()
    with torch.no_grad():
        for mapping in mappings:
            if mapping.local not in state or any(name in missing for name in mapping.hf):
                continue
            sources = [tensors[name] for name in mapping.hf]
            targets = _split(model, mapping, state[mapping.local])
            wrong = [
                f"{name} is {list(source.shape)}, expected {list(target.shape)}"
                for name, source, target in zip(mapping.hf, sources, targets, strict=True)
                if source.shape != target.shape
            ]
            wrong_shapes += wrong
            if not wrong:
                if mapping.scale != 1:
                    sources[0] = sources[0].float() * mapping.scale
                for source, target in zip(sources, targets, strict=True):
                    if mapping.reordered is not None:
                        axis = mapping.reordered.axis
                        order = mapping.reordered.order(source.shape[axis]).argsort().to(source.device)
                        source = source.index_select(axis, order)
                    target.copy_(source)
    if problems := describe_mismatch(missing, unexpected, wrong_shapes):
        raise CheckpointError(f"{where} does not fit its config.json; {problems}.")


def _ignored_tensors(config: ModelConfig) -> str:
    text = LAYOUTS[config.model_type].ignored_tensors.replace("LAYERS", str(config.num_hidden_layers))
    return text if config.vision is None else f"{text}|{hf_vision.ignored_tensors(config.vision)}"


def describe_mismatch(missing: Sequence[str], unexpected: Sequence[str], wrong_shapes: Sequence[str]) -> str:
    """List how tensors differ from the expected ones, for a message; empty if they do not."""
    problems = {"missing tensors": missing, "unexpected tensors": unexpected, "wrong shapes": wrong_shapes}
    return "; ".join(f"{problem}: {first_few(names)}" for problem, names in problems.items() if names)


def _split(model: Transformer, mapping: WeightMapping, tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of one of our parameters in the shapes of the Hugging Face tensors that it consists of.

    Transposed where the layout is; a stack of experts (E, R, K) is split as one matrix of E·R rows.
    """
    rows = tensor.mT if mapping.transposed else tensor.flatten(0, -2) if tensor.ndim == 3 else tensor
    if len(mapping.hf) == 1:
        return (rows,)
    return torch.split(rows, list(model.split_sizes(mapping.local)))


# Model directories ----------------------------------------------------------------------------------------------------


def save_model(
    model: Transformer, directory: Path, *, bos_token_id: int | None = None, end_ids: Sequence[int] = ()
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into an existing directory.

    bos_token_id, end_ids: the tokenizer's. The model's `generation_config` is kept. A quantized model is stored under
    this package's own tensor names, which `quantization_config` in its config.json announces.
    """
    save_configs(model, directory, bos_token_id=bos_token_id, end_ids=end_ids)
    with atomic_file(Path(directory) / WEIGHTS_FILE) as file:
        write_tensors(file, weight_views(model) if bits_of(model) is None else quantized_state(model))


def save_configs(
    model: Transformer, directory: Path, *, bos_token_id: int | None = None, end_ids: Sequence[int] = ()
) -> None:
    """Write what `save_model` writes, but for the weights."""
    config = config_to_hf(model.config, bos_token_id=bos_token_id, end_ids=end_ids)
    bits = bits_of(model)
    if bits is not None:
        config["quantization_config"] = quantization_config(bits)
    write_json(Path(directory) / CONFIG_FILE, config)
    save_generation_config(model, directory, bos_token_id=bos_token_id, end_ids=end_ids)
    save_preprocessor(model.config, Path(directory))


def save_generation_config(
    model: Transformer, directory: Path, *, bos_token_id: int | None = None, end_ids: Sequence[int] = ()
) -> None:
    """Write `generation_config.json` into an existing directory: the model's own, with the ids of its tokenizer."""
    generation = model.generation_config or DEFAULT_GENERATION
    ids = token_ids(bos_token_id, end_ids)
    generation = {**generation, **{key: id for key, id in ids.items() if id is not None or key not in generation}}
    write_json(Path(directory) / GENERATION_FILE, generation)


def save_preprocessor(config: ModelConfig, directory: Path) -> None:
    """Write how pictures are prepared into an existing directory, for a model that reads them."""
    if config.vision is not None:
        write_json(Path(directory) / hf_vision.PREPROCESSOR_FILE, hf_vision.preprocessor_to_hf(config.vision))
        write_json(Path(directory) / hf_vision.PROCESSOR_FILE, hf_vision.processor_to_hf(config.vision))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON file, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def load_model_weights(model: Transformer, directory: Path) -> None:
    """Read the weights and `generation_config.json` of a directory into `model`.

    Raise CheckpointError if the weights are missing or do not fit.
    """
    from gptsmith.formats.safetensors import open_weights

    load_weights(model, open_weights(Path(directory)), str(directory))
    model.generation_config = read_generation_config(directory)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Return the contents of a directory's `generation_config.json`, {} without one. Raise CheckpointError."""
    path = Path(directory) / GENERATION_FILE
    return read_json(path) if path.is_file() else {}
