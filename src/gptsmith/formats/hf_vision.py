"""Hugging Face's layouts of models that read pictures: a text model, a vision tower and a projector in one directory.

    llava              any text family; SigLIP's or CLIP's tower; a projector of two layers
    idefics3, smolvlm  any text family; SigLIP's tower with a norm behind; one layer over squares of patches

`config.json` holds a `text_config` and a `vision_config`; `preprocessor_config.json` says how pictures are prepared.
Inside this package the text model keeps the names of its own layout, and those of the rest follow here. On disk all
names are those of transformers 4, which transformers 5, vLLM and llama.cpp read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf_config import ACTIVATIONS, choice
from gptsmith.formats.hf_weights import WeightMapping, weight_and_bias
from gptsmith.model.config import ModelConfig, VisionConfig

PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
_MAX_LAYERS, _MAX_SIZE, _MAX_WIDTH = 1 << 10, 1 << 13, 1 << 16  # larger numbers are mistakes or attacks


@dataclass(frozen=True)
class _Names:
    """Where the parts are on disk. text, tower, projector: prefixes. head: the output matrix."""

    text: str
    head: str
    tower: str
    projector: tuple[str, ...]
    """Modules of the projector's layers."""
    classes: tuple[str, str, str]
    """Of the model, its processor and its image processor."""


_IDEFICS = ("model.text_model.", "lm_head.weight", "model.vision_model.", ("model.connector.modality_projection.proj",))
_NAMES = {
    "llava": _Names(
        "language_model.model.",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.",
        ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        ("LlavaForConditionalGeneration", "LlavaProcessor", "CLIPImageProcessor"),
    ),
    "idefics3": _Names(*_IDEFICS, ("Idefics3ForConditionalGeneration", "Idefics3Processor", "Idefics3ImageProcessor")),
    "smolvlm": _Names(*_IDEFICS, ("SmolVLMForConditionalGeneration", "SmolVLMProcessor", "SmolVLMImageProcessor")),
}
MODEL_TYPES = tuple(_NAMES)

# Weights --------------------------------------------------------------------------------------------------------------


def vision_mappings(config: VisionConfig) -> list[WeightMapping]:
    """Return the mappings of tower and projector, whose Hugging Face names are those on disk."""
    names = _NAMES[config.model_type]
    tower = names.tower
    mappings = [
        WeightMapping("vision.patch_embedding.weight", (f"{tower}embeddings.patch_embedding.weight",)),
        WeightMapping("vision.position_embedding.weight", (f"{tower}embeddings.position_embedding.weight",)),
    ]
    if config.class_token:
        mappings.append(WeightMapping("vision.class_embedding", (f"{tower}embeddings.class_embedding",)))
        mappings += weight_and_bias("vision.pre_norm", f"{tower}pre_layrnorm")
    else:
        mappings.append(WeightMapping("vision.patch_embedding.bias", (f"{tower}embeddings.patch_embedding.bias",)))
    for i in range(config.num_hidden_layers):
        local, hf = f"vision.layers.{i}.", f"{tower}encoder.layers.{i}."
        for part in ("weight", "bias"):
            qkv = tuple(f"{hf}self_attn.{name}_proj.{part}" for name in "qkv")
            mappings.append(WeightMapping(f"{local}qkv.{part}", qkv))
        for ours, theirs in (
            ("out", "self_attn.out_proj"),
            ("norm_1", "layer_norm1"),
            ("norm_2", "layer_norm2"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
        ):
            mappings += weight_and_bias(local + ours, hf + theirs)
    if config.post_norm:
        mappings += weight_and_bias("vision.post_norm", f"{tower}post_layernorm")
    for number, hf in enumerate(names.projector, start=1):
        parts = weight_and_bias(f"projector.linear_{number}", hf)
        mappings += parts if config.projector_bias else parts[:1]
    return mappings


def ignored_tensors(config: VisionConfig) -> str:
    """Return a regular expression for tensors on disk that have no part in the logits."""
    tower = re.escape(_NAMES[config.model_type].tower)
    unused = [r"embeddings\.position_ids", r"head\..*"]
    if not config.post_norm:
        unused.append(r"post_layernorm\..*")
    # Blocks behind the one whose output is used are neither kept nor computed.
    kept = "|".join(map(str, range(config.num_hidden_layers)))
    return rf"{tower}({'|'.join(unused)})|{tower}encoder\.layers\.(?!({kept})\.)\d+\..*"


def constant_tensors(config: VisionConfig) -> dict[str, tuple[float, int]]:
    """Return tensors that transformers wants to read and does not use: value and length by their names on disk."""
    if config.post_norm:
        return {}
    name = f"{_NAMES[config.model_type].tower}post_layernorm"
    return {f"{name}.weight": (1.0, config.hidden_size), f"{name}.bias": (0.0, config.hidden_size)}


def to_disk(name: str, config: VisionConfig, text_prefix: str) -> str:
    """Return the name on disk of a tensor of the text model's own layout. text_prefix: what its names begin with."""
    names = _NAMES[config.model_type]
    if name == "lm_head.weight":
        return names.head
    if name.startswith(text_prefix) and not name.startswith((names.tower, *names.projector)):
        # Text models without a `model.` in their names are inside transformers' class without their prefix.
        plain = config.model_type == "llava" and text_prefix != "model."
        base = names.text.removesuffix("model.") if plain else names.text
        return base + name.removeprefix(text_prefix)
    return name


def from_disk(name: str, config: VisionConfig, text_prefix: str) -> str:
    """Return the name in the text model's own layout of a tensor on disk, in the spelling of any transformers."""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    if config.model_type != "llava":
        if name.startswith("model.text_model."):
            return text_prefix + name.removeprefix("model.text_model.")
        return name
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.").removeprefix(text_prefix).removeprefix("model.")
        return text_prefix + rest
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def module_name(name: str, config: VisionConfig, text_prefix: str) -> str:
    """Return the name in transformers' class, which PEFT goes by. name: as `weight_mappings` has it."""
    names = _NAMES[config.model_type]
    if name.startswith((names.tower, *names.projector)):
        return name if name.startswith("model.") else f"model.{name}"
    inner = "model.language_model." if config.model_type == "llava" else "model.text_model."
    return inner + name.removeprefix(text_prefix) if name.startswith(text_prefix) else name


# Configuration --------------------------------------------------------------------------------------------------------


def config_to_hf(config: ModelConfig, text: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json. text: those of the text model alone. ids: of special tokens."""
    vision = config.vision
    assert vision is not None
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    activations["gelu_tanh"] = "gelu_pytorch_tanh"
    tower: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": activations[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": 0.0,
    }
    values: dict[str, Any] = {
        "architectures": [_NAMES[vision.model_type].classes[0]],
        "model_type": vision.model_type,
        "text_config": dict(text),
        "vision_config": tower,
        "tie_word_embeddings": config.tie_word_embeddings,
        **ids,
    }
    if vision.model_type == "llava":
        if vision.class_token:
            tower["model_type"] = "clip_vision_model"
        else:
            tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        return values | {
            "image_token_index": config.image_token_id,
            "image_seq_length": vision.tokens,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default" if vision.drop_first else "full",
            "projector_hidden_act": activations[vision.projector_activation],
            "multimodal_projector_bias": vision.projector_bias,
        }
    tower["model_type"] = f"{vision.model_type}_vision"
    return values | {"image_token_id": config.image_token_id, "scale_factor": vision.pixel_shuffle}


_TOWERS: dict[str, dict[str, Any]] = {  # the defaults of transformers' configuration classes
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "idefics3_vision": {
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_LLAVA_TOWER = {  # of a llava configuration without a vision_config
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text model in that of the whole."""
    text = values.get("text_config")
    if text is None:
        text = {}
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json has a text_config that is not an object.")
    text = {"model_type": "llama", **text}
    if text["model_type"] == "llama" and values["model_type"] != "llava":
        text = {"rms_norm_eps": 1e-5, **text}
    if values["model_type"] != "llava":
        text["tie_word_embeddings"] = bool(values.get("tie_word_embeddings", False))
    elif values.get("tie_word_embeddings"):  # otherwise that of the text model counts
        text["tie_word_embeddings"] = True
    return text


def config_from_hf(values: Mapping[str, Any], text: ModelConfig, preprocessor: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the whole. text: that of the text model. preprocessor: see `read_preprocessor`."""
    layout = values["model_type"]
    given = values.get("vision_config")
    if given is None:
        given = _LLAVA_TOWER if layout == "llava" else {}
    if not isinstance(given, Mapping):
        raise CheckpointError("config.json has a vision_config that is not an object.")
    if layout == "llava":
        kind = given.get("model_type", "clip_vision_model")
        if kind not in ("siglip_vision_model", "clip_vision_model"):
            supported = "siglip_vision_model, clip_vision_model"
            raise CheckpointError(f"config.json has the vision tower {kind!r}, which is not supported ({supported}).")
    else:
        kind = "idefics3_vision"
    tower = {**_TOWERS[kind], **given}
    sizes = {name: _square(tower[name], name) for name in ("image_size", "patch_size")}
    for name, limit in (("num_hidden_layers", _MAX_LAYERS), ("hidden_size", _MAX_WIDTH), ("image_size", _MAX_SIZE)):
        value = sizes.get(name, tower[name])
        if not isinstance(value, int) or isinstance(value, bool) or value > limit:
            raise CheckpointError(f"config.json: vision_config.{name} = {value} is implausible.")
    if tower["num_channels"] != 3:
        raise CheckpointError(
            f"config.json has num_channels={tower['num_channels']}; only pictures of 3 are supported."
        )
    options: dict[str, Any] = {
        "hidden_size": tower["hidden_size"],
        "intermediate_size": tower["intermediate_size"],
        "num_hidden_layers": tower["num_hidden_layers"],
        "num_attention_heads": tower["num_attention_heads"],
        **sizes,
        "activation": choice(tower["hidden_act"], ACTIVATIONS, "vision_config.hidden_act"),
        "norm_eps": float(tower["layer_norm_eps"]),
        "model_type": layout,
    }
    if layout == "llava":
        options |= _llava_options(values, kind == "clip_vision_model", tower["num_hidden_layers"])
        image_token_id = values.get("image_token_id", values.get("image_token_index", 32000))
    else:
        options |= {"post_norm": True, "projector": "linear", "projector_bias": False}
        options["pixel_shuffle"] = values.get("scale_factor", 2)
        image_token_id = values.get("image_token_id", 128257)
    vision = VisionConfig(**options)
    vision = replace(vision, **_preparation(preprocessor, vision))
    return replace(text, vision=vision, image_token_id=image_token_id)


def _square(value: Any, name: str) -> Any:
    """Return the side of a size that may be written as [height, width]."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    if isinstance(value, list | tuple):
        raise CheckpointError(f"config.json has vision_config.{name}={value}; only squares are supported.")
    return value


def _llava_options(values: Mapping[str, Any], class_token: bool, layers: int) -> dict[str, Any]:
    layer = values.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise CheckpointError(f"config.json has vision_feature_layer={layer}; only a single one is supported.")
    used = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= used <= layers:
        raise CheckpointError(f"config.json has vision_feature_layer={layer}, but the tower has {layers} layers.")
    strategy = values.get("vision_feature_select_strategy", "default")
    return {
        "class_token": class_token,
        "num_hidden_layers": used,
        "drop_first": choice(strategy, {"default": True, "full": False}, "vision_feature_select_strategy"),
        "projector_activation": choice(values.get("projector_hidden_act", "gelu"), ACTIVATIONS, "projector_hidden_act"),
        "projector_bias": bool(values.get("multimodal_projector_bias", True)),
    }


# How pictures are prepared --------------------------------------------------------------------------------------------


def preprocessor_to_hf(config: VisionConfig) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json."""
    names, size = _NAMES[config.model_type].classes, config.image_size
    values: dict[str, Any] = {
        "image_processor_type": names[2],
        "processor_class": names[1],
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _RESAMPLE[config.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    if config.model_type == "llava":
        square = {"height": size, "width": size}
        return values | {
            "size": {"shortest_edge": size} if config.center_crop else square,
            "do_center_crop": True,
            "crop_size": square,
        }
    return values | {
        "size": {"longest_edge": size},
        "max_image_size": {"longest_edge": size},
        "do_image_splitting": False,
        "do_pad": False,
    }


def processor_to_hf(config: VisionConfig) -> dict[str, Any]:
    """Return the contents of processor_config.json."""
    values: dict[str, Any] = {"processor_class": _NAMES[config.model_type].classes[1]}
    if config.model_type != "llava":
        return values | {"image_seq_len": config.tokens}
    return values | {
        "patch_size": config.patch_size,
        "num_additional_image_tokens": int(config.class_token),
        "vision_feature_select_strategy": "default" if config.drop_first else "full",
        "image_token": config.image_token,
    }


def processor_files(directory: Path) -> Sequence[Path]:
    """Return the files of a model directory that say how pictures are prepared, the one that counts first."""
    return [path for name in (PREPROCESSOR_FILE, PROCESSOR_FILE) if (path := Path(directory) / name).is_file()]


def merged_preprocessor(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of preprocessor_config.json and processor_config.json, which may hold the former's."""
    merged: dict[str, Any] = {}
    for values in reversed(files):
        inner = values.get("image_processor")
        merged |= {**values, **(inner if isinstance(inner, Mapping) else {})}
    return merged


def _preparation(given: Mapping[str, Any], vision: VisionConfig) -> dict[str, Any]:
    """Return the fields of `VisionConfig` that the settings of a preprocessor decide."""
    clip = vision.class_token
    mean, std = (_CLIP_MEAN, _CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    splits = vision.model_type != "llava"
    resample: Any = given.get("resample", 1 if splits else 3)
    found: dict[str, Any] = {
        "image_mean": _three(given.get("image_mean", mean), "image_mean"),
        "image_std": _three(given.get("image_std", std), "image_std"),
        "resample": choice(resample, {number: name for name, number in _RESAMPLE.items()}, "resample"),
    }
    if given.get("do_normalize") is False:
        found |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    if given.get("do_rescale") is False or abs(given.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise CheckpointError(
            f"{PREPROCESSOR_FILE}: only pictures scaled to [0, 1] (rescale_factor 1/255) are supported."
        )
    if isinstance(given.get("image_token"), str):
        found["image_token"] = given["image_token"]
    if splits:  # each picture is one tile here, as with do_image_splitting=False
        return found
    size = given.get("size", {"shortest_edge": vision.image_size} if clip else vision.image_size)
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size if clip else None
    crops = bool(given.get("do_center_crop", clip))
    found["center_crop"] = shortest is not None and crops
    side = given.get("crop_size", vision.image_size) if crops else size
    if isinstance(side, Mapping):
        side = side.get("height", side.get("shortest_edge")), side.get("width", side.get("shortest_edge"))
    if side not in (vision.image_size, (vision.image_size,) * 2) or (
        shortest is not None and (not crops or shortest != vision.image_size)
    ):
        raise CheckpointError(
            f"{PREPROCESSOR_FILE} makes pictures of another size than the tower's {vision.image_size}×"
            f"{vision.image_size} (size={given.get('size')}, crop_size={given.get('crop_size')}): not supported."
        )
    return found


def _three(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f"{PREPROCESSOR_FILE} has {name}={value!r}; expected three numbers.")
    return tuple(float(each) for each in value)
