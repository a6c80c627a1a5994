"""Multimodal directories: their text models alone compute what the whole does without pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptsmith.cli import main
from gptsmith.errors import CheckpointError
from gptsmith.formats.gguf import write_gguf
from gptsmith.formats.hf_text import MODEL_TYPES, text_name
from gptsmith.formats.source import open_model
from gptsmith.model.quantized import bits_of
from tests.foreign import change_json

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_TOWER: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": 39,
    "video_token_id": 38,
    "vision_start_token_id": 37,
    "vision_end_token_id": 36,
}
CLIP = {**TOWER, "model_type": "clip_vision_model"}


def sections(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(numbers), **more}}


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**SIZES, "num_hidden_layers": 7, "head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 9},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=39,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={**SIZES, "model_type": "mistral", "head_dim": 6},
        vision_config={**TOWER, "model_type": "pixtral", "head_dim": 8},
        image_token_index=39,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={**SIZES, **sections(1, 2, 1)}, vision_config={**QWEN_TOWER, "embed_dim": 16}, **QWEN_IDS
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, **sections(2, 1, 1)},
        vision_config={**QWEN_TOWER, "intermediate_size": 16, "out_hidden_size": 32},
        **QWEN_IDS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={**SIZES, "head_dim": 8, **sections(2, 1, 1, mrope_interleaved=True)},
        vision_config={
            **QWEN_TOWER,
            "intermediate_size": 16,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
        **QWEN_IDS,
    ),
    "llava_next": lambda: transformers.LlavaNextConfig(
        text_config={**SIZES, "model_type": "llama"}, vision_config=CLIP, image_grid_pinpoints=[[8, 8]]
    ),
    "llava_onevision": lambda: transformers.LlavaOnevisionConfig(
        text_config={**SIZES, "model_type": "qwen2", "tie_word_embeddings": True},
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
        image_grid_pinpoints=[[8, 8]],
    ),
    "vipllava": lambda: transformers.VipLlavaConfig(text_config={**SIZES, "model_type": "llama"}, vision_config=CLIP),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={**SIZES, "model_type": "qwen3", "head_dim": 6},
        vision_config={**TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
        image_token_id=39,
    ),
}


def made(kind: str, directory: Path) -> Any:
    """Write a random model of transformers into `directory`, and return it."""
    config = CONFIGS[kind]()
    torch.manual_seed(0)
    name = f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    model.save_pretrained(directory)
    return model


def ids() -> Tensor:
    return torch.randint(0, 36, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def equal_logits(model: Any, expected: Any) -> None:
    torch.testing.assert_close(model(ids()), expected(ids()).logits, atol=1e-4, rtol=1e-4)


def test_all_kinds_are_tested() -> None:
    assert sorted(CONFIGS) == sorted(MODEL_TYPES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_model_is_that_of_the_whole(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = made(kind, tmp_path / "whole")
    capsys.readouterr()
    source = open_model(tmp_path / "whole")
    note = f"note: only the text model of {tmp_path / 'whole'} is read; images are left out.\n"
    assert capsys.readouterr().err == note
    model = source.model()
    equal_logits(model, whole)
    assert main(["import", str(tmp_path / "whole"), "--out", str(tmp_path / "text")]) == 0
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    assert type(text).__name__ != type(whole).__name__
    equal_logits(model, text)


@pytest.mark.parametrize("form", ["model.language_model.", "language_model.", "language_model.model."])
def test_names_of_several_versions(form: str, tmp_path: Path) -> None:
    whole = made("mistral3", tmp_path)
    renamed = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        text = name.replace("language_model.model.", form)
        renamed[text if text != name or form == "language_model.model." else f"model.{name}"] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    equal_logits(open_model(tmp_path).model(), whole)


def test_other_parts_are_told_from_the_text_model() -> None:
    others = ["model.visual.blocks.0.attn.qkv.weight", "vision_tower.x", "model.multi_modal_projector.y.bias"]
    assert [text_name(name) for name in (*others, "image_newline", "model.image_newline")] == [None] * 5
    names = ["language_model.lm_head.weight", "lm_head.weight", "model.norm.weight", "model.language_model.norm.weight"]
    assert [text_name(name) for name in names] == ["lm_head.weight"] * 2 + ["model.norm.weight"] * 2


def test_settings_at_the_top(tmp_path: Path) -> None:
    """Older directories of Qwen2-VL have no text_config."""
    whole = made("qwen2_vl", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values.pop("text_config")
    rope = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    old = {**values, **text, "model_type": "qwen2_vl", "rope_theta": 1e4, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(old))
    equal_logits(open_model(tmp_path).model(), whole)


@pytest.mark.parametrize("form", ["safetensors", "legacy"])
def test_shards_without_the_towers(form: str, tmp_path: Path) -> None:
    """A shard that has other parts alone is not needed."""
    whole = made("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        parts[text_name(name) is None][name] = tensor
    stem = "model" if form == "safetensors" else "pytorch_model"
    ending = "safetensors" if form == "safetensors" else "bin"
    files = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, tmp_path / file) if form == "safetensors" else torch.save(part, tmp_path / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    equal_logits(open_model(tmp_path).model(), whole)
    (tmp_path / files[1]).unlink()
    equal_logits(open_model(tmp_path).model(), whole)
    (tmp_path / files[0]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 1 shards"):
        open_model(tmp_path).model()


def test_quantized_by_another_program(tmp_path: Path) -> None:
    """bitsandbytes' 8 bits in the text model."""
    made("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = open_model(tmp_path).model().state_dict()
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    weight = tensors[name]
    scale = weight.abs().amax(dim=1)
    tensors[name] = (weight / scale[:, None] * 127).round().to(torch.int8)
    tensors[name.replace("weight", "SCB")] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    change_json(tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    found = open_model(tmp_path).model().state_dict()
    for key, value in expected.items():
        allowed = scale.max().item() / 254 + 1e-6 if key == "layers.0.mlp.down_proj.weight" else 0.0
        torch.testing.assert_close(found[key], value, atol=allowed, rtol=0)
    assert bits_of(open_model(tmp_path).model(packed=True)) is not None


def test_gguf(tmp_path: Path) -> None:
    """Gemma 3 goes to llama.cpp's architecture of its text models, and comes back."""
    made("gemma3", tmp_path)
    change_json(tmp_path / "config.json", architectures=...)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"] |= {"query_pre_attn_scalar": 6, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = open_model(tmp_path).model()
    write_gguf(model, {"tokenizer.ggml.model": "none"}, tmp_path / "model.gguf", "f32")
    with torch.no_grad():
        torch.testing.assert_close(open_model(tmp_path / "model.gguf").model()(ids()), model(ids()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["Gemma3ForSequenceClassification"]},
            r"Gemma3ForSequenceClassification.*only Gemma3ForCond",
        ),
        ({"architectures": "x"}, "architectures='x'"),
        ({"text_config": {"model_type": "gemma9_text"}}, "this gemma3 model is of model_type 'gemma9_text'"),
        ({"text_config": {"model_type": "gpt2"}}, "this gemma3 model is of model_type 'gpt2'"),
        ({"text_config": {"model_type": ["x"]}}, "value of the wrong type"),
        ({"text_config": None}, "has no text_config"),
        ({"text_config": [1]}, "has no text_config"),
        ({"model_type": "paligemma"}, "unknown model_type 'paligemma'. Supported: .*gemma3, .*mistral3"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    made("gemma3", tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
