from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.families import FAMILIES
from gptsmith.model.flops import flops_per_token
from gptsmith.tokenizer import train_char
from gptsmith.train.budget import tuning
from gptsmith.train.budget.recipe import Machine, Text, choose, settled
from gptsmith.train.config import DistillConfig, PretrainConfig, RunConfig, SftConfig, default_config
from gptsmith.train.init import Init, adapted_to_init
from tests.factories import tiny_model

SMALL = FAMILIES["llama"](vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
LARGE = FAMILIES["llama"](  # SmolLM2-135M
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    tie_word_embeddings=True,
)


def tuned(**options: object) -> RunConfig:
    return default_config(SftConfig).replace(budget="10m", **options)


def machine(rate: float) -> Machine:
    def seconds(config: RunConfig, model: ModelConfig) -> float:
        return config.loop.batch_size * config.loop.context * flops_per_token(model, config.loop.context) / rate

    return Machine(seconds, compile_seconds=18, compile_saves=0.28, default_flops=rate, name="2 cores")


def test_the_rules_are_for_fine_tuning_and_distillation_within_a_budget() -> None:
    assert tuning.has_rules(tuned())
    assert tuning.has_rules(RunConfig(method=DistillConfig(teacher="x")).replace(budget="1Mtok"))
    assert not tuning.has_rules(default_config(SftConfig))
    assert not tuning.has_rules(RunConfig(method=PretrainConfig()).replace(budget="10m"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_with_the_width_and_are_larger_for_an_adapter(optimizer: str) -> None:
    def rate(width: int, adapter: bool) -> float:
        return tuning.rates_for(width, optimizer, adapter=adapter)[0]

    assert rate(64, False) >= rate(128, False) >= rate(576, False) > 0
    if optimizer == "adamw":
        assert rate(128, False) > rate(576, False)
        assert rate(576, True) > 2 * rate(576, False)


def test_options_that_the_user_has_set_are_kept_and_the_reason_says_so() -> None:
    config, reason = tuning.adapted(tuned(lora="on", optim={"name": "adamw"}), (), LARGE, "as usual")
    assert config.adapter.rank == tuning.RANK
    assert config.optim.lr == tuning.rates_for(576, "adamw", adapter=True)[0]
    assert f"rank {tuning.RANK}" in reason
    assert "as usual" in reason

    mine = tuned(lora="on", **{"lora.rank": 3}, optim={"name": "adamw", "lr": 0.5})
    config, reason = tuning.adapted(mine, {"lora", "lora.rank", "optim.lr"}, LARGE, "as set")
    assert (config.adapter.rank, config.optim.lr) == (3, 0.5)
    assert "rank 3, as set" in reason

    config, reason = tuning.adapted(tuned(lora="off", optim={"name": "muon"}), (), SMALL, "as set")
    assert (config.optim.lr, config.optim.embedding_lr) == tuning.rates_for(128, "muon", adapter=False)
    assert "all weights" in reason


def test_batches_are_powers_of_two_that_leave_updates_in_a_pass() -> None:
    assert [tuning.batch_for(rows) for rows in (1, 15, 40, 200, 100_000)] == [1, 1, 2, 8, 8]


def test_a_budget_ends_before_conversations_are_learned_by_heart() -> None:
    text = Text(200_000, 20_000, 4096, SMALL, most_passes=tuning.MOST_PASSES)
    config = tuned(context=512)
    fixed = settled(config)
    chosen = choose(config, fixed, text, machine(1e12))
    tokens = chosen.config.loop.steps * chosen.config.loop.batch_size * 512
    assert tokens <= tuning.MOST_PASSES * 200_000
    assert "it will end early" in chosen.reasons[0]


def test_on_a_slow_machine_the_batch_becomes_smaller_rather_than_the_updates_few() -> None:
    text = Text(200_000, 20_000, 49152, LARGE, least_updates=tuning.LEAST_UPDATES)
    config = tuned(context=512)
    slow = choose(config, settled(config), text, machine(5e10)).config
    assert slow.loop.batch_size < 8
    assert slow.loop.steps >= tuning.LEAST_UPDATES
    with pytest.raises(UsageError, match="too short to learn anything"):  # a batch that the user has set stays
        choose(config, settled(config), replace(text, least_updates=0), machine(5e10))


@pytest.mark.parametrize(
    ("pretrained_by", "options", "expected"),
    [
        ("adamw", {}, ("on", "adamw", "an adapter of rank 16, chosen for a model that adamw pretrained")),
        ("muon", {}, ("off", "muon", "all weights, chosen for a model that muon pretrained")),
        ("muon", {"lora": "on"}, ("on", "adamw", "an adapter of rank 16, as set")),
        ("muon", {"lora.rank": 3}, ("on", "adamw", "an adapter of rank 3, as set")),
        ("adamw", {"lora": "off"}, ("off", "adamw", "all weights, as set")),
    ],
)
def test_the_budget_chooses_adapter_or_all_weights_unless_the_user_has(
    pretrained_by: str, options: dict[str, Any], expected: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    init = Init("org/model", tiny_model(), train_char("abc"), pretrained_by)
    config = tuned(init="org/model", **options)
    chosen = adapted_to_init(config, {"init", "budget", *options}, init, lora=True)
    lora, optimizer, words = expected
    assert (chosen.adapter.lora, chosen.optim.name) == (lora, optimizer)
    assert f"trains {words};" in capsys.readouterr().err


@pytest.mark.parametrize("pretrained_by", ["adamw", "muon"])
def test_without_a_budget_or_an_adapter_by_default_nothing_is_chosen(pretrained_by: str) -> None:
    init = Init("org/model", tiny_model(), train_char("abc"), pretrained_by)
    fixed = default_config(SftConfig).replace(init="org/model")
    assert adapted_to_init(fixed, {"init"}, init, lora=True).adapter.lora == "on"
    assert adapted_to_init(tuned(init="org/model"), {"init", "budget"}, init, lora=False).adapter.lora == "off"
