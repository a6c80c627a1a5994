"""Models that read pictures: logits and gradients equal transformers', in both directions, for many layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.data.image_processor import ImageProcessor
from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import config_from_hf, config_to_hf, save_model
from gptsmith.formats.hf_vision import preprocessor_to_hf
from gptsmith.formats.source import open_model
from gptsmith.model.config import ModelConfig, VisionConfig
from gptsmith.model.families import FAMILIES
from gptsmith.model.flops import count_parameters
from gptsmith.model.transformer import Transformer
from gptsmith.model.vision import shuffle_pixels

IMAGE = 37  # the image token
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 8,
}


def seeing_config(family: str = "llama", vision: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    tower = VisionConfig(**{**TOWER, **(vision or {})})
    groups: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
    if family.startswith("gpt"):  # whose embeddings transformers does not find, so it cannot tie them
        groups = {"tie_word_embeddings": False, "intermediate_size": 128}
    return FAMILIES[family](**{**SIZES, **groups, **changes}, vision=tower, image_token_id=IMAGE)


def made(config: ModelConfig) -> Transformer:
    """A model with random weights in which every part matters."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def inputs(config: ModelConfig, images: tuple[int, ...] = (2, 1)) -> tuple[Tensor, Tensor]:
    """Ids of one row for each number of pictures, and the pictures."""
    assert config.vision is not None
    generator = torch.Generator().manual_seed(1)
    per_image, rows = config.vision.tokens, []
    longest = max(images) * per_image + 8
    for count in images:
        row = torch.randint(30, (longest,), generator=generator)
        for i in range(count):
            start = 2 + i * (per_image + 1)
            row[start : start + per_image] = IMAGE
        rows.append(row)
    size = config.vision.image_size
    return torch.stack(rows), torch.randn(sum(images), 3, size, size, generator=generator)


def theirs(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    read: Any = AutoModelForImageTextToText.from_pretrained
    model, info = read(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "siglip without its first patch": {"drop_first": True, "projector_activation": "gelu"},
    "clip": {"class_token": True, "drop_first": True, "activation": "quick_gelu", "norm_eps": 1e-5},
    "clip with its class token": {"class_token": True, "projector_bias": False},
    "another shape": {"image_size": 20, "patch_size": 6},  # pixels that no patch has
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral", "gpt2", "gpt3"])
def test_logits_and_gradients_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    config = seeing_config(family)
    model = made(config)
    save_model(model, tmp_path)
    reference = theirs(tmp_path)
    ids, pixels = inputs(config)
    expected = reference(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    found = model(ids, pixels=pixels)
    assert (found - expected).abs().max() < 1e-4
    assert found.std() > 0.1

    expected.square().mean().backward()
    found.square().mean().backward()
    pairs = {
        "vision.patch_embedding.weight": "model.vision_tower.embeddings.patch_embedding.weight",
        "vision.layers.0.fc1.bias": "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        "projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
    }
    names = dict(reference.named_parameters())
    for ours, their in pairs.items():
        assert torch.allclose(model.get_parameter(ours).grad, names[their].grad, atol=1e-4)  # type: ignore[arg-type]
        assert model.get_parameter(ours).grad.abs().max() > 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS)
def test_towers_of_llava_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    config = seeing_config("llama", VARIANTS[variant])
    model = made(config)
    save_model(model, tmp_path)
    ids, pixels = inputs(config)
    with torch.no_grad():
        expected = theirs(tmp_path)(input_ids=ids, pixel_values=pixels).logits
        assert (model(ids, pixels=pixels) - expected).abs().max() < 1e-4
    source = open_model(tmp_path)
    assert source.config == config
    with torch.no_grad():
        assert torch.equal(source.model()(ids, pixels=pixels), model(ids, pixels=pixels))


@pytest.mark.parametrize("layout", ["idefics3", "smolvlm"])
def test_idefics_and_smolvlm_equal_transformers(layout: str, tmp_path: Path) -> None:
    vision = {"image_size": 32, "post_norm": True, "pixel_shuffle": 2, "projector": "linear", "projector_bias": False}
    config = seeing_config("llama", {**vision, "resample": "lanczos", "model_type": layout})
    model = made(config)
    save_model(model, tmp_path)
    ids, pixels = inputs(config, (2, 2))
    with torch.no_grad():
        expected = theirs(tmp_path)(input_ids=ids, pixel_values=pixels.view(2, 2, 3, 32, 32)).logits
        assert (model(ids, pixels=pixels) - expected).abs().max() < 1e-4
    source = open_model(tmp_path)
    assert source.config == config
    with torch.no_grad():
        assert torch.equal(source.model()(ids, pixels=pixels), model(ids, pixels=pixels))


def test_the_features_are_those_before_the_last_norm(tmp_path: Path) -> None:
    config = seeing_config()
    model = made(config)
    save_model(model, tmp_path)
    reference = theirs(tmp_path)
    _, pixels = inputs(config)
    with torch.no_grad():
        reference.model.vision_tower.post_layernorm.weight.normal_()  # which nothing may depend on
        states = reference.model.vision_tower(pixels, output_hidden_states=True)
        assert torch.allclose(model.vision(pixels), states.hidden_states[-1], atol=1e-5)
        assert not torch.allclose(model.vision(pixels), states.last_hidden_state, atol=1e-2)
        expected = torch.stack(list(reference.get_image_features(pixels).pooler_output))
        assert torch.allclose(model.image_features(pixels), expected, atol=1e-4)


def made_by_transformers(kind: str, **options: Any) -> Any:
    """A random model of transformers."""
    import transformers as hf

    torch.manual_seed(0)
    text = hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2}, pad_token_id=0)
    small: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    }
    if kind in ("siglip", "clip"):
        tower = (hf.SiglipVisionConfig if kind == "siglip" else hf.CLIPVisionConfig)(
            **small, image_size=24, patch_size=8
        )
        config = hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, **options)
        model = hf.LlavaForConditionalGeneration(config)
    else:
        classes: Any = {
            "idefics3": (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration),
            "smolvlm": (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration),
        }
        tower_values = {**small, "image_size": 32, "patch_size": 8}
        config = classes[kind][0](
            vision_config=tower_values, text_config=text.to_dict(), image_token_id=IMAGE, scale_factor=2
        )
        model = classes[kind][1](config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("siglip", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
        (
            "siglip",
            {"vision_feature_layer": -3, "vision_feature_select_strategy": "full", "projector_hidden_act": "relu"},
        ),
        ("siglip", {"vision_feature_layer": 2, "vision_feature_select_strategy": "full"}),
        ("clip", {}),  # LLaVA-1.5's
        ("clip", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
        ("idefics3", {}),
        ("smolvlm", {}),
    ],
)
def test_directories_that_transformers_wrote_are_read(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    reference = made_by_transformers(kind, **options)
    reference.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    model = source.model()
    ids, pixels = inputs(source.config, (2, 2))
    shaped = pixels if kind in ("siglip", "clip") else pixels.unflatten(0, (2, 2))
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=shaped).logits
        assert (model(ids, pixels=pixels) - expected).abs().max() < 1e-4
        again = tmp_path / "again"
        again.mkdir()
        save_model(model, again)  # and what is written from it is the same model
        assert (theirs(again)(input_ids=ids, pixel_values=shaped).logits - expected).abs().max() < 1e-4


def test_names_of_newer_directories_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = seeing_config("qwen3")
    model = made(config)
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        name = name.replace("vision_tower.vision_model.", "model.vision_tower.")
        renamed[name.replace("multi_modal_projector", "model.multi_modal_projector", 1)] = tensor
    save_file(renamed, path)
    ids, pixels = inputs(config)
    with torch.no_grad():
        assert torch.equal(open_model(tmp_path).model()(ids, pixels=pixels), model(ids, pixels=pixels))


def test_how_pictures_are_prepared_is_stored_and_read(tmp_path: Path) -> None:
    vision = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "resample": "bilinear", "center_crop": True}
    config = seeing_config("llama", vision)
    save_model(made(config), tmp_path)
    assert open_model(tmp_path).config == config
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["size"] == {"shortest_edge": 24}
    # Transformers 5 nests the settings in the other file.
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
    assert open_model(tmp_path).config == config


def test_the_processor_of_transformers_makes_the_same_inputs(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from gptsmith.data.images import DecodedImage

    config = seeing_config()
    save_model(made(config), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert config.vision is not None
    assert torch.allclose(ImageProcessor.of(config.vision)(DecodedImage(pixels)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [1, 2]}, "only a single one"),
        ({"vision_feature_layer": -9}, "the tower has 3 layers"),
        ({"vision_feature_layer": 0}, "the tower has 3 layers"),
        ({"vision_feature_select_strategy": "middle"}, "select_strategy"),
        ({"projector_hidden_act": "swiglu"}, "projector_hidden_act"),
        ({"image_token_index": 4800}, "below vocab_size"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"vision_config": 7}, "not an object"),
        ({"text_config": []}, "not an object"),
        ({"text_config": {"model_type": "llava"}}, "text_config"),
        ({"text_config": {"model_type": "mamba"}}, "mamba"),
        ({"vision_config": {"model_type": "siglip_vision_model", "image_size": 10**9}}, "implausible"),
        ({"vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 10**9}}, "implausible"),
        ({"vision_config": {"model_type": "siglip_vision_model", "image_size": [24, 48]}}, "only squares"),
        ({"vision_config": {"model_type": "siglip_vision_model", "num_channels": 1}}, "num_channels"),
        ({"vision_config": {"model_type": "siglip_vision_model", "hidden_act": "xielu"}}, "hidden_act"),
        ({"vision_config": {"model_type": "siglip_vision_model", "patch_size": 0}}, "at least 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    values = config_to_hf(seeing_config())
    assert config_from_hf(values, "config.json") == seeing_config()
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**values, **change}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 48, "width": 48}}, "another size"),
        ({"size": {"shortest_edge": 48}}, "another size"),
        ({"size": {"shortest_edge": 24}, "do_center_crop": False}, "another size"),
        ({"resample": 0}, "resample"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_preparations_that_are_not_supported_are_refused(change: dict[str, Any], message: str) -> None:
    config = seeing_config()
    assert config.vision is not None
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(config_to_hf(config), "x", preprocessor={**preprocessor_to_hf(config.vision), **change})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted(variant: str) -> None:
    config = seeing_config("llama", VARIANTS[variant])
    assert count_parameters(config).total == Transformer(config).num_parameters()


def test_pixel_shuffle_joins_neighbors() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)  # of a 4×4 grid
    assert shuffle_pixels(patches, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_the_number_of_image_tokens_must_fit() -> None:
    config = seeing_config()
    model = made(config)
    ids, pixels = inputs(config)
    for wrong in (pixels[:2], torch.cat((pixels, pixels[:1]))):
        with pytest.raises(ValueError, match=r"27 image tokens for . pictures of 9 features"):
            model(ids, pixels=wrong)
    with pytest.raises(ValueError, match="must be"):
        model(ids, pixels=pixels[..., :16])
    with pytest.raises(ValueError, match="reads pictures"):
        Transformer(FAMILIES["llama"](**SIZES))(ids, pixels=pixels)


def test_a_picture_changes_only_what_comes_after_it() -> None:
    config = seeing_config()
    model = made(config)
    ids, pixels = inputs(config, (2,))
    other = pixels.clone()
    other[1] += 1
    with torch.no_grad():
        one, two = model(ids, pixels=pixels)[0], model(ids, pixels=other)[0]
    second = 2 + config.vision.tokens + 1  # type: ignore[union-attr]
    assert torch.equal(one[:second], two[:second])
    assert (one[second:] != two[second:]).any(dim=-1).all()


def test_the_parser_of_vllm_reads_the_directory(tmp_path: Path) -> None:
    configs = pytest.importorskip("vllm.transformers_utils.config", reason="the optional package vllm is not installed")
    from vllm.model_executor.models.registry import ModelRegistry  # type: ignore[import-not-found, unused-ignore]

    known = set(ModelRegistry.get_supported_archs())
    for family, expected in (("qwen3", "Qwen3ForCausalLM"), ("llama", "LlamaForCausalLM")):
        directory = tmp_path / family
        save_model(made(seeing_config(family)), directory)
        read = configs.get_config(str(directory), trust_remote_code=False)
        assert read.architectures == ["LlavaForConditionalGeneration"]
        text = configs.get_hf_text_config(read)
        assert text.architectures == [expected]
        assert known.issuperset({*read.architectures, *text.architectures})
        assert (read.image_token_index, read.vision_config.model_type) == (IMAGE, "siglip_vision_model")
        assert read.vision_feature_layer == -1
