"""Parity with transformers, in both directions, on small random models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptsmith.errors import CheckpointError
from gptsmith.model import families
from gptsmith.model.config import ModelConfig
from gptsmith.model.hf import config_to_hf, load_model_weights, load_weights, read_config, save_model, weights_to_hf
from gptsmith.model.transformer import Transformer

TOLERANCE = 1e-4


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    common = {
        "vocab_size": draw(st.integers(3, 80)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.2,
    }
    if draw(st.booleans()):
        return families.gpt2(
            hidden_size=heads * draw(st.sampled_from([4, 8, 5])),
            intermediate_size=draw(st.sampled_from([16, 37])),
            mlp=draw(st.sampled_from(["gelu", "gelu_tanh"])),
            **common,
        )
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0]))
    return families.qwen3(
        hidden_size=draw(st.sampled_from([8, 12, 20])),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 8])),
        intermediate_size=draw(st.sampled_from([16, 37])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 1e6])),
        attention_bias=draw(st.booleans()),
        **common,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random norms and biases too: as initialised they would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), seed=st.integers(0, 1000))
def test_logits_and_gradients_equal_transformers(
    config: ModelConfig, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("model")
    ours = Transformer(config)
    randomize(ours, seed)
    save_model(ours, directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()

    ids = torch.randint(0, config.vocab_size, (2, config.max_position_embeddings))
    logits, expected = ours.eval()(ids), theirs.eval()(ids).logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=1e-4)

    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    holder = Transformer(config)
    with torch.no_grad():
        for p, source in zip(holder.parameters(), ours.parameters(), strict=True):
            assert source.grad is not None
            p.copy_(source.grad)
    for name, gradient in weights_to_hf(holder).items():
        reference = gradients[name]
        assert reference is not None
        scale = reference.abs().max().clamp_min(1e-6)
        assert (gradient - reference).abs().max() / scale < 1e-3, name


@settings(max_examples=15, deadline=None)
@given(config=configs(), seed=st.integers(0, 1000))
def test_weights_survive_the_round_trip_to_the_bit(config: ModelConfig, seed: int) -> None:
    first, second = Transformer(config), Transformer(config)
    randomize(first, seed)
    load_weights(second, weights_to_hf(first), "memory")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_models_made_by_transformers_load_here(family: str, tmp_path: Path) -> None:
    import transformers

    if family == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=50, n_positions=24, n_embd=24, n_layer=2, n_head=3)
        theirs: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.Qwen3Config(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=40,
            max_position_embeddings=24,
        )
        theirs = transformers.Qwen3ForCausalLM(config)
    randomize(theirs, 1)
    theirs.save_pretrained(tmp_path)
    ours = Transformer(read_config(tmp_path))
    load_model_weights(ours, tmp_path)
    ids = torch.randint(0, 50, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids), theirs.eval()(ids).logits, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("config", [families.gpt2(), families.qwen3()], ids=lambda c: c.model_type)
def test_config_survives_the_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert read_config(tmp_path) == config


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        assert Transformer(families.gpt2()).num_parameters() == 124_439_808
        qwen = families.qwen3(rope_theta=1e6, max_position_embeddings=512)
        assert Transformer(qwen).num_parameters() == 596_049_920  # Qwen3-0.6B


def small(tmp_path: Path) -> tuple[Transformer, Path]:
    model = Transformer(
        families.qwen3(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )
    save_model(model, tmp_path)
    return model, tmp_path


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    model, directory = small(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.surprise"] = torch.zeros(2)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model_weights(model, directory)
    for part in ("model.norm.weight", "model.surprise", "down_proj.weight is [3, 3], expected [8, 8]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"model_type": "bloom"}', "unknown model_type 'bloom'"),
        ('{"model_type": "qwen3"}', "lacks 'vocab_size'"),
    ],
)
def test_broken_configurations_are_named(contents: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    model, directory = small(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model_weights(model, directory)


def test_unsupported_rope_scaling_is_refused(tmp_path: Path) -> None:
    values = config_to_hf(families.qwen3())
    values["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="yarn"):
        read_config(tmp_path)


def test_model_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        families.gpt2().vocab_size = 3  # type: ignore[misc]
