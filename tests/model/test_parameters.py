"""Parameter metadata, and the optimizer groups that follow from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gptsmith.errors import UsageError
from gptsmith.model import families
from gptsmith.model.config import ModelConfig
from gptsmith.model.parameters import annotate, parameter_info
from gptsmith.model.quantized import dequantize, quantize
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers, build_optimizers
from gptsmith.optim.muon import Muon
from tests.factories import WITHOUT_GROUPS


def config(family: str, **overrides: object) -> ModelConfig:
    options = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family not in WITHOUT_GROUPS else None,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        **({"num_experts": 4, "num_experts_per_tok": 2} if families.FAMILIES[family]().num_experts else {}),
        **({"shared_expert_intermediate_size": 96} if family == "qwen2_moe" else {}),
        **overrides,
    }
    return families.FAMILIES[family](**options)


def optimizers(model: nn.Module, name: str = "muon", **options: Any) -> Optimizers:
    return build_optimizers(
        model, name=name, lr=0.02, embedding_lr=0.003, weight_decay=0.1, momentum=0.9, betas=(0.9, 0.95), **options
    )


def described(model: nn.Module) -> dict[str, object]:
    return {name: parameter_info(model, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_kinds_of_every_family(family: str, tied: bool) -> None:
    """Hidden matrices are those of the blocks; split sizes add up to their rows."""
    model = Transformer(config(family, tie_word_embeddings=tied))
    for name, p in model.named_parameters():
        info = parameter_info(model, name)
        outside = {"embed_tokens.weight": "embedding", "embed_positions.weight": "embedding", "lm_head.weight": "head"}
        is_matrix = p.ndim >= 2 and not name.endswith("_bias")
        assert info.kind == outside.get(name, "matrix" if is_matrix else "vector"), name
        if info.split_sizes is not None:
            assert sum(info.split_sizes) == p.numel() // (p.shape[-1] if p.ndim > 1 else 1), name
    if family == "deepseek_v3":
        return  # its attention has other matrices
    kv_rows = 8 * model.config.num_key_value_heads
    assert model.split_sizes("layers.1.attention.qkv_proj.weight") == (32, kv_rows, kv_rows)
    fused_up = "mlp.up_proj" if model.config.num_experts else "mlp.up_proj.weight"
    expected = (64,) * (2 * max(1, model.config.num_experts)) if model.config.gated_mlp else (64,)
    assert model.split_sizes(f"layers.0.{fused_up}") == expected
    if model.config.num_experts:
        assert model.split_sizes("layers.0.mlp.down_proj") == (32,) * 4
        assert model.split_sizes("layers.0.mlp.router.weight") == (4,)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "qwen2_moe"])
def test_metadata_survives_copying_moving_and_replacing(family: str) -> None:
    model = Transformer(config(family, tie_word_embeddings=False))
    expected = described(model)
    assert described(copy.deepcopy(model)) == expected
    assert described(copy.deepcopy(model).bfloat16()) == expected
    with torch.device("meta"):
        skeleton = Transformer(config(family, tie_word_embeddings=False), initialize=False)
    assert described(skeleton) == expected
    assert described(skeleton.to_empty(device="cpu")) == expected  # new parameters
    for block in skeleton.layers:
        for module in block.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(p)))
    assert described(skeleton) == expected


def test_split_sizes_are_known_of_a_quantized_model() -> None:
    model = Transformer(config("qwen3", tie_word_embeddings=True))
    expected, name = described(model), "layers.0.attention.qkv_proj.weight"
    quantize(model, 8)
    assert model.split_sizes(name) == (32, 16, 16)
    assert described(dequantize(model)) == expected


def test_defaults_of_modules_without_annotations() -> None:
    """By owner and shape; a name means nothing."""
    model = nn.ModuleDict({"layers": nn.Embedding(5, 4), "bias": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model.register_parameter("lm_head", nn.Parameter(torch.zeros(4, 4)))
    kinds = {name: parameter_info(model, name).kind for name, _ in model.named_parameters()}
    assert kinds == {
        "lm_head": "other", "layers.weight": "embedding", "bias.weight": "matrix", "bias.bias": "vector",
        "norm.weight": "vector", "norm.bias": "vector",
    }  # fmt: skip
    annotate(model, "bias.weight", kind="head")
    assert parameter_info(nn.ModuleDict({"model": model}), "model.bias.weight").kind == "head"
    with pytest.raises(AttributeError):
        parameter_info(model, "missing.weight")


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_frozen_parameters_are_in_no_group(name: str) -> None:
    model = Transformer(config("llama"))
    total = model.num_parameters()
    model.layers[0].requires_grad_(False)
    model.embed_tokens.requires_grad_(False)
    built = optimizers(model, name)
    grouped = [p for group in built.groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})
    assert model.num_parameters() == sum(p.numel() for p in grouped) < total
    assert model.num_parameters(trainable_only=False) == total
    frozen = model.get_parameter("layers.0.mlp.up_proj.weight").detach().clone()
    torch.autograd.backward(model(torch.randint(0, 40, (2, 8))).square().mean())
    built.step()
    assert torch.equal(model.get_parameter("layers.0.mlp.up_proj.weight"), frozen)
    assert all(not key.startswith(("layers.0.", "embed_tokens")) for key in built.state_tensors())
    with pytest.raises(UsageError, match="all parameters are frozen"):
        optimizers(model.requires_grad_(False), name)


def test_only_what_is_trainable_needs_an_optimizer() -> None:
    model = Transformer(config("llama")).requires_grad_(False)
    model.norm.requires_grad_(True)
    (only,) = optimizers(model).optimizers
    assert isinstance(only, torch.optim.AdamW)
    model.norm.requires_grad_(False)
    model.get_submodule("layers.1.mlp.down_proj").requires_grad_(True)
    (only,) = optimizers(model).optimizers
    assert isinstance(only, Muon)


def test_extra_modules_are_trained_and_named_by_their_prefix() -> None:
    model, head = Transformer(config("gpt2")), nn.Linear(32, 1)
    annotate(head, "weight", kind="head")
    built = optimizers(model, extra={"value_head": head})
    muon, adamw = built.optimizers
    assert all(p is not head.weight for group in muon.param_groups for p in group["params"])
    assert any(p is head.weight for group in adamw.param_groups for p in group["params"])
    head(model.hidden_states(torch.zeros(1, 4, dtype=torch.int64))).sum().backward()
    built.step()
    state = built.state_tensors()
    assert {"value_head.weight/exp_avg", "layers.0.mlp.up_proj.weight/momentum"} <= state.keys()
    again = optimizers(model, extra={"value_head": head})
    again.load_state_tensors(state)
    for key, value in again.state_tensors().items():
        assert torch.equal(value, state[key])


def test_a_parameter_shared_between_modules_is_trained_once() -> None:
    model = Transformer(config("gpt2"))
    built = optimizers(model, extra={"value": nn.ModuleDict({"trunk": model, "head": nn.Linear(32, 1)})})
    grouped = [id(p) for group in built.groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters())) + 2
