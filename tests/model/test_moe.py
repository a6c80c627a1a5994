from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptsmith.errors import UsageError
from gptsmith.log import JsonLines
from gptsmith.model.moe import MixtureOfExperts, expert_load, gated, load_balancing_loss, router_z_loss
from gptsmith.model.upcycle import upcycle
from gptsmith.train.config import ModelOptions, run_config
from gptsmith.train.run import start
from tests.factories import WITH_EXPERTS, tiny_config, tiny_model


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 9), chosen=st.integers(1, 4), tokens=st.integers(1, 30), normalize=st.booleans())
def test_equals_computing_every_expert_for_every_token(experts: int, chosen: int, tokens: int, normalize: bool) -> None:
    chosen = min(chosen, experts)
    layer = MixtureOfExperts(
        tiny_config(
            "qwen3_moe", hidden_size=12, num_experts=experts, num_experts_per_tok=chosen, norm_topk_prob=normalize
        )
    )
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(1, tokens, 12)
    probabilities = layer.router(x[0]).softmax(-1)
    weights, picked = probabilities.topk(chosen, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    every = torch.stack(
        [gated(x[0], *both, layer.gate) for both in zip(layer.up_proj, layer.down_proj, strict=True)], dim=1
    )  # (N, E, C)
    expected = (every.gather(1, picked[..., None].expand(-1, -1, 12)) * weights[..., None]).sum(1)
    torch.testing.assert_close(layer(x)[0], expected, atol=5e-5, rtol=5e-5)


@given(chosen=st.integers(1, 3), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_balance_loss_equals_transformers(chosen: int, seed: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(seed)
    logits = [torch.randn(11, 6) for _ in range(3)]
    theirs: Any = tuple(logits)  # annotated as a tuple of one
    expected = load_balancing_loss_func(theirs, 6, chosen)
    torch.testing.assert_close(load_balancing_loss(logits, chosen), torch.as_tensor(expected))


def test_balance_loss_is_lowest_for_an_even_load() -> None:
    even = [torch.eye(4).repeat(5, 1) * 50]
    assert load_balancing_loss(even, 1).item() == pytest.approx(1.0)
    assert expert_load(even, 1).tolist() == [0.25] * 4
    one = [torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)]
    assert load_balancing_loss(one, 1).item() == pytest.approx(4.0)
    assert router_z_loss(one).item() == pytest.approx(2500.0)


def test_upcycled_model_starts_as_the_dense_model() -> None:
    dense = tiny_model("qwen3", vocab_size=20, max_position_embeddings=16, initializer_range=0.3)
    ids = torch.randint(0, 20, (2, 16))
    sparse = upcycle(dense, 4).eval()
    assert sparse.config.model_type == "qwen3_moe"
    torch.testing.assert_close(sparse(ids), dense(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="cannot be upcycled"):
        upcycle(tiny_model("gpt2"), 4)


@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_experts_learn_and_their_load_is_logged(
    family: str, optimizer: Literal["muon", "adamw"], text_file: Path, tmp_path: Path
) -> None:
    config = run_config(
        model=ModelOptions(
            family=family,
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            router_z_loss_coef=1e-4,
        ),
        context=32,
        batch_size=8,
        steps=60,
        eval_every=60,
        sample_tokens=0,
        compile="off",
        device="cpu",
    )
    config = config.replace(optim=replace(config.optim, name=optimizer, lr=0.02 if optimizer == "muon" else 0.01))
    start(str(text_file), config, tmp_path / "run")
    rows = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    assert rows[-1]["val_loss"] < 2.2
    logged = [row for row in rows if "loss" in row]
    assert all(row["expert_load_max"] >= 1 >= row["expert_load_min"] for row in logged)
    assert all(row["balance_loss"] >= 1.9 for row in logged)  # at least top_k


@pytest.mark.parametrize("chosen", [3, 0])
def test_impossible_top_k(chosen: int) -> None:
    with pytest.raises(UsageError, match="num_experts_per_tok"):
        tiny_config("qwen3_moe", num_experts=2, num_experts_per_tok=chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ModelOptions(family="qwen3", num_experts=4),
            "--model.num-experts: a qwen3 model has none.*mixtral, qwen2_moe, qwen3_moe, gpt_oss, deepseek_v3",
        ),
        (
            ModelOptions(family="qwen3_moe", shared_expert_intermediate_size=8),
            "--model.shared-expert-intermediate-size: a qwen3_moe model has none. These have: qwen2_moe",
        ),
        (ModelOptions(family="gpt1", rope_theta=1e4), "--model.rope-theta: a gpt1 model has none.*llama"),
        (ModelOptions(family="gpt2", router_aux_loss_coef=0.1), "--model.router-aux-loss-coef: a gpt2 model"),
        (
            ModelOptions(family="llama", sliding_window=8),
            "--model.sliding-window: a llama model has none.*gpt3, mistral",
        ),
    ],
)
def test_options_that_a_family_does_not_have_are_refused(options: ModelOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.build(vocab_size=20, context=16)
