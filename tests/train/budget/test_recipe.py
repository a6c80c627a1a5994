from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.errors import BudgetError, UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters, flops_per_token
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import FEWEST_STEPS, Machine, Text, choose, settled, tokenizer_for, weight_decay_for
from gptsmith.train.config import ModelOptions, RunConfig, run_config

TEXT = Text(train_tokens=1_000_000, val_tokens=110_000, vocab_size=65)
BOOKS = Text(train_tokens=10_000_000_000, val_tokens=1_000_000, vocab_size=4096)


def machine(rate: float = 5e10) -> Machine:
    """One that computes `rate` FLOP/s, whatever the model."""

    def seconds(config: RunConfig, model: ModelConfig) -> float:
        return config.loop.batch_size * config.loop.context * flops_per_token(model, config.loop.context) / rate

    return Machine(seconds, compile_seconds=18, compile_saves=0.28, default_flops=5e10, name="2 cores")


def tokens(config: RunConfig) -> int:
    return config.loop.steps * config.loop.batch_size * config.loop.context


def test_more_to_spend_makes_larger_models_that_see_more_text() -> None:
    chosen = [choose(run_config(budget=b), (), BOOKS, machine()).config for b in ("1m", "10m", "2h", "1d")]
    depths = [c.model.num_hidden_layers for c in chosen]
    assert depths == sorted(depths)
    assert depths[0] < depths[-1]
    assert [tokens(c) for c in chosen] == sorted(tokens(c) for c in chosen)
    assert [c.loop.context for c in chosen] == sorted(c.loop.context for c in chosen)


def test_a_budget_of_time_is_used_up_by_the_machine_as_measured() -> None:
    choice = choose(run_config(budget="10m"), (), BOOKS, machine(), spent=5.0)
    c = choice.config
    model = c.model.build(BOOKS.vocab_size, c.loop.context)
    rate = 5e10 / (1 - 0.28)
    used = 5 + 18 + tokens(c) * flops_per_token(model, c.loop.context) / rate + choice.teardown_seconds
    used += choice.eval_seconds * ((c.loop.steps - 1) // c.loop.eval_every)
    assert used == pytest.approx(600, rel=0.03)
    assert len(choice.reasons) == 3


def test_where_small_models_are_no_faster_than_larger_ones_the_larger_is_taken() -> None:
    """A GPU takes as long for a little work as for more; what a small model reaches there is not what it can do."""

    def seconds(config: RunConfig, model: ModelConfig) -> float:
        arithmetic = config.loop.batch_size * config.loop.context * flops_per_token(model, config.loop.context)
        return 0.002 + 0.0015 * model.num_hidden_layers + arithmetic / 3e14

    def size(usual_rate: float) -> int:
        gpu = Machine(seconds, compile_seconds=18, compile_saves=0.28, default_flops=usual_rate, name="a GPU")
        c = choose(run_config(budget="30s"), (), BOOKS, gpu).config
        return count_parameters(c.model.build(BOOKS.vocab_size, c.loop.context)).total

    assert size(5e13) > 1.5 * size(5e10)


def test_a_long_validation_text_is_not_read_whole_where_that_would_take_the_time() -> None:
    books = replace(BOOKS, val_tokens=50_000_000)
    c = choose(run_config(budget="5m"), (), books, machine()).config
    assert c.method.eval_tokens is not None
    assert 50_000 < c.method.eval_tokens < 2_000_000
    given = {"eval_tokens"}
    assert (
        choose(run_config(budget="5m", eval_tokens=70_000), given, books, machine()).config.method.eval_tokens == 70_000
    )
    assert choose(run_config(budget="5m"), (), TEXT, machine()).config.method.eval_tokens is None


@pytest.mark.parametrize("budget", ["1e14flop", "50Mtok"])
def test_budgets_of_arithmetic_and_tokens_are_met_without_a_clock(budget: str) -> None:
    c = choose(run_config(budget=budget), (), BOOKS).config
    spent = tokens(c)
    if budget.endswith("flop"):
        spent *= flops_per_token(c.model.build(BOOKS.vocab_size, c.loop.context), c.loop.context)  # type: ignore[assignment]
    assert spent == pytest.approx(1e14 if budget.endswith("flop") else 5e7, rel=0.02)


def test_depth_sets_the_size_and_the_rest_follows() -> None:
    c = choose(run_config(depth=6), (), BOOKS).config
    assert (c.model.num_hidden_layers, c.model.hidden_size) == (6, 256)
    assert c.loop.steps > 100
    both = choose(run_config(depth=6, budget="5Mtok"), (), BOOKS).config
    assert both.model == c.model
    assert tokens(both) == pytest.approx(5e6, rel=0.02)


def test_what_is_given_stays() -> None:
    config = run_config(
        budget="5Mtok", context=64, batch_size=5, dropout=0.3, model=ModelOptions(hidden_size=96, num_attention_heads=3)
    )
    given = {"context", "batch_size", "dropout", "model.hidden_size", "model.num_attention_heads"}
    c = choose(config, given, TEXT).config
    assert (c.loop.context, c.loop.batch_size, c.loop.dropout) == (64, 5, 0.3)
    assert (c.model.hidden_size, c.model.num_attention_heads) == (96, 3)
    assert tokens(c) == pytest.approx(5e6, rel=0.02)


def test_a_preset_settles_all_but_the_length() -> None:
    config = run_config(budget="3Mtok", context=96, batch_size=10)
    c = choose(config, settled(config), TEXT).config
    assert c.replace(steps=config.loop.steps, eval_every=config.loop.eval_every, optim=config.optim) == config
    assert tokens(c) == pytest.approx(3e6, rel=0.02)


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gpt3", "llama", "mistral", "qwen2", "mixtral", "qwen3_moe"])
def test_every_family_has_sizes(family: str) -> None:
    config = run_config(budget="2Mtok", model=ModelOptions(family=family))
    c = choose(config, {"model.family"}, TEXT).config
    c.model.build(TEXT.vocab_size, c.loop.context)


def test_the_more_a_text_is_repeated_the_more_weights_decay() -> None:
    few, some, many = (choose(run_config(budget=b), (), TEXT).config for b in ("1Mtok", "8Mtok", "20Mtok"))
    assert few.optim.weight_decay == 0.1
    assert 0.1 < some.optim.weight_decay < many.optim.weight_decay
    assert choose(run_config(budget="20Mtok"), (), BOOKS).config.optim.weight_decay == 0.1
    assert {c.loop.dropout for c in (few, some, many)} == {0}


@given(passes=st.floats(0.01, 1e4), ratio=st.floats(1e-6, 1e4))
def test_weight_decay_has_bounds_and_grows_with_passes_and_with_the_model(passes: float, ratio: float) -> None:
    assert 0.1 <= weight_decay_for(passes, ratio) <= 3
    assert weight_decay_for(passes, ratio) <= weight_decay_for(2 * passes, ratio)
    assert weight_decay_for(passes, ratio) <= weight_decay_for(passes, 2 * ratio)


def test_dropout_that_is_asked_for_stays() -> None:
    assert choose(run_config(budget="20Mtok", dropout=0.2), {"dropout"}, TEXT).config.loop.dropout == 0.2


@pytest.mark.parametrize("minutes", range(2, 30, 2))
def test_weight_decay_follows_the_passes_that_are_made(minutes: int) -> None:
    """Compiling makes more of them than the measurement before it would have it."""
    chosen = choose(run_config(budget=f"{minutes}m", depth=4), (), TEXT, machine()).config
    parameters = count_parameters(chosen.model.build(TEXT.vocab_size, chosen.loop.context)).multiplied
    expected = weight_decay_for(tokens(chosen) / TEXT.train_tokens, parameters / TEXT.train_tokens)
    assert chosen.optim.weight_decay == expected


@pytest.mark.parametrize("budget", ["1s", "4s"])
def test_too_little_time_says_how_much_is_needed(budget: str) -> None:
    with pytest.raises(BudgetError, match=r"too short to learn anything.*Give at least \d+s") as refused:
        choose(run_config(budget=budget), (), TEXT, machine())
    assert 0 <= refused.value.steps < FEWEST_STEPS


@pytest.mark.parametrize("budget", ["10tok", "5flop"])
def test_too_little_of_anything_else_says_so(budget: str) -> None:
    with pytest.raises(UsageError, match="Give more"):
        choose(run_config(budget=budget), (), TEXT)


def test_more_time_than_the_text_can_use_ends_early_and_says_so() -> None:
    choice = choose(run_config(budget="30d"), (), Text(50_000, 5_000, 65), machine())
    assert "will end early" in choice.reasons[0]
    assert tokens(choice.config) <= 61 * 50_000


def test_short_texts_of_few_characters_are_read_character_by_character() -> None:
    assert tokenizer_for(1_000_000, 65, Budget.parse("5m"), 5e10)[0] == "char"
    assert tokenizer_for(1_000_000, 5000, Budget.parse("5m"), 5e10)[0] == "bpe"
    assert tokenizer_for(10_000_000, 65, Budget.parse("5m"), 5e10)[0] == "bpe"


def test_vocabularies_grow_with_the_budget_and_with_the_machine() -> None:
    sizes = [tokenizer_for(10**9, 5000, Budget.parse(b), 5e10)[1] for b in ("1m", "45m", "2d", "365d")]
    assert sizes == sorted(set(sizes))
    assert all(2048 <= size <= 32768 for size in sizes)
    assert tokenizer_for(10**9, 5000, Budget.parse("45m"), 5e13)[1] > sizes[1]
    arithmetic = [tokenizer_for(10**9, 5000, Budget.parse(b), 5e10)[1] for b in ("3e12flop", "1.35e14flop")]
    assert arithmetic == sizes[:2]
    assert tokenizer_for(10**9, 5000, Budget.parse("1e30flop"), 5e10)[1] == 32768


@given(length=st.integers(0, 10**7), budget=st.floats(1, 1e30))
def test_a_short_text_has_no_more_tokens_than_it_can_teach(length: int, budget: float) -> None:
    size = tokenizer_for(length, 5000, Budget("flops", budget), 5e10)[1]
    assert 512 <= size <= 32768
    if length < 4_000_000:
        assert size == 512 or size <= length / 500


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="--steps and --budget"):
        choose(run_config(budget="5Mtok"), {"steps"}, TEXT)
    with pytest.raises(UsageError, match="depth"):
        choose(run_config(depth=0), (), TEXT)
