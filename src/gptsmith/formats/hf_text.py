"""Model directories with a text model of a known family beside towers that are not supported: the text model alone.

    gemma3                                       Gemma 3 (4B and larger)
    mistral3                                     Mistral Small 3.1, 3.2
    qwen2_vl, qwen2_5_vl, qwen3_vl               Qwen2-VL, Qwen2.5-VL, Qwen3-VL
    llava_next, llava_onevision, vipllava        any text family with current names
    internvl                                     InternVL3

Without pictures each computes what its text model does. Qwen's positions in three dimensions are the same number then,
which is that of plain rotary positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gptsmith.errors import CheckpointError

_TYPES = {  # the model_type of the text model where text_config has none, and transformers' class
    "gemma3": ("gemma3_text", "Gemma3ForConditionalGeneration"),
    "internvl": ("qwen2", "InternVLForConditionalGeneration"),
    "llava_next": ("llama", "LlavaNextForConditionalGeneration"),
    "llava_onevision": ("qwen2", "LlavaOnevisionForConditionalGeneration"),
    "mistral3": ("mistral", "Mistral3ForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": ("qwen2_vl_text", "Qwen2VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl_text", "Qwen3VLForConditionalGeneration"),
    "vipllava": ("llama", "VipLlavaForConditionalGeneration"),
}
MODEL_TYPES = tuple(_TYPES)
_QWEN = {  # the family of a text model that has positions in three dimensions, and defaults that differ from it
    "qwen2_vl": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen2_vl_text": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen2_5_vl": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen2_5_vl_text": ("qwen2", {"rms_norm_eps": 1e-5, "rope_theta": 1e6}),
    "qwen3_vl_text": ("qwen3", {"rope_theta": 5e5}),
}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "compression_config")
_ELSEWHERE = re.compile(
    r"(model\.)?((vision_tower|vision_model|visual|multi_modal_projector)\..*|image_newline)", re.DOTALL
)


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of the text model alone. values: that of the whole, of one of MODEL_TYPES.

    Raises CheckpointError for another class of models, and for one without text model.
    """
    kind = values["model_type"]
    default, name = _TYPES[kind]
    classes = values.get("architectures") or [name]
    if classes != [name]:
        raise CheckpointError(
            f"config.json has architectures={classes!r:.200}; of model_type {kind!r} only {name} is read."
        )
    text = values.get("text_config")
    if text is None and kind in _QWEN:  # older files have the settings of the text model at the top
        text = {key: value for key, value in values.items() if key not in ("vision_config", "architectures")}
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json of model_type {kind!r} has no text_config.")
    text = {"model_type": default, **text, **{key: values[key] for key in _KEPT if values.get(key) is not None}}
    if text["model_type"] in _QWEN:
        family, defaults = _QWEN[text["model_type"]]
        text = {**defaults, **text, "model_type": family}
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(text.get(key), Mapping):
                text[key] = _plain_rope(text[key])
    ties = [each["tie_word_embeddings"] for each in (values, text) if each.get("tie_word_embeddings") is not None]
    return {**text, "tie_word_embeddings": any(ties)} if ties else dict(text)


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary positions without the sections of a head that belong to time, height and width."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return {key: "default" if value == "mrope" else value for key, value in plain.items()}


def text_name(name: str) -> str | None:
    """Return the name in the text model's layout of a tensor on disk; None if it is of another part."""
    if _ELSEWHERE.fullmatch(name):
        return None
    if head := re.fullmatch(r"(?:model\.)?(?:language_model\.)?(lm_head\..*)", name):
        return head[1]
    return re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
