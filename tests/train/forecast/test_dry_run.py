"""Dry runs of many processes: bytes and collectives as arithmetic says, and as real processes hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptsmith.distributed.layout import Layout
from gptsmith.errors import UsageError
from gptsmith.model.config import ModelConfig
from gptsmith.model.flops import count_parameters
from gptsmith.train.config import RunConfig, run_config
from gptsmith.train.forecast import storages
from gptsmith.train.forecast.dry_run import DryRun, dry_run
from gptsmith.train.step import TrainingStep

Cli = Callable[..., tuple[int, str, str]]


def config_of(**options: Any) -> RunConfig:
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": False}
    loop = {"context": 32, "batch_size": 16, "micro_batch_size": 1, "compile": "off", "optim": {"name": "adamw"}}
    return run_config(model={**sizes, **options.pop("model", {})}, **(loop | options))


def run(text: str, processes: int, **options: Any) -> tuple[DryRun, ModelConfig]:
    config = config_of(**options)
    model = config.model.build(64, config.loop.context)
    return dry_run(config, model, Layout.parse(text, processes)), model


def test_fsdp_moves_what_the_textbook_says() -> None:
    found, model = run("fsdp", 4)
    parameters = count_parameters(model).total
    assert found.same
    assert found.micro_batches == 4
    traffic = {(each.moment, each.kind): each for each in found.traffic}
    gather, scatter = traffic["micro-batch", "all_gather"], traffic["micro-batch", "reduce_scatter"]
    # Each block, and what is outside, once forward; the blocks again backward, and all gradients once.
    assert (gather.count, scatter.count) == (7 + 6, 7)
    outside = 2 * 64 * 64 + 64
    assert gather.bytes == 4 * (2 * parameters - outside)
    assert scatter.bytes == 4 * parameters
    assert scatter.sent == pytest.approx(4 * parameters * 3 / 4, abs=1)
    assert {each.axes for each in found.traffic} == {"fsdp"}
    # Parameters, gradients and both moments are divided.
    for part, factor in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert found.memory[part] == pytest.approx(factor * parameters, rel=0.01)


def test_tp_adds_up_after_each_half_of_a_block() -> None:
    found, _ = run("fsdp=2,tp=2", 4)
    assert found.same
    [sums] = [each for each in found.traffic if each.kind == "all_reduce" and each.axes == "tp"]
    assert sums.processes == 2
    assert sums.count >= 4 * 6
    assert sums.bytes >= 4 * 6 * 32 * 64 * 2


def test_dp_adds_up_gradients_in_the_update() -> None:
    found, model = run("dp", 8)
    sums = [each for each in found.traffic if each.moment == "update"]
    assert sum(each.bytes for each in sums) >= 4 * count_parameters(model).total
    assert not [each for each in found.traffic if each.moment == "micro-batch"]
    assert found.classes == 1


def test_depth_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole model would be run."""
    short, _ = run("fsdp=2,tp=2", 4)
    monkeypatch.setattr(storages, "SHALLOW", 6)
    whole, _ = run("fsdp=2,tp=2", 4)
    assert short.traffic == whole.traffic
    assert {k: v for k, v in short.memory.items() if k != "others"} == pytest.approx(
        {k: v for k, v in whole.memory.items() if k != "others"}
    )
    assert short.memory["others"] == pytest.approx(whole.memory["others"], rel=0.05)


def test_processes_with_unequal_parts() -> None:
    found, _ = run("fsdp", 6, batch_size=12, model={"hidden_size": 60, "num_attention_heads": 3})
    assert found.classes > 1
    assert len(found.simulated) >= found.classes
    assert found.same


def test_groups_with_unequal_parts() -> None:
    """The first third of the rows is longer than the last: each group adds up parts of its own size."""
    model = {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4}
    found, _ = run("dp=2,fsdp=3", 6, batch_size=12, model=model)
    assert found.classes > 1
    assert found.same, found.difference


def test_another_sequence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingStep.apply

    def apply(self: Any, factor: float) -> torch.Tensor:
        if self.ranks.rank == 3:
            self.ranks.sum(torch.zeros(5))
        return original(self, factor)

    monkeypatch.setattr(TrainingStep, "apply", apply)
    for layout in ("fsdp", "dp=2,fsdp=2"):
        found, _ = run(layout, 4)
        assert not found.same
        assert "process 3" in str(found.difference)


@pytest.mark.parametrize("options", [{"optim": {"name": "muon"}}, {"model": {"family": "mixtral", "num_experts": 4}}])
def test_muon_and_experts(options: dict[str, Any]) -> None:
    found, _ = run("fsdp", 4, **options)
    assert found.same, found.difference
    assert sum(found.memory.values()) > 0


@pytest.mark.parametrize(("text", "processes"), [("ep=2", 2), ("ep=2,fsdp=2", 4), ("ep=2,tp=2", 4)])
def test_tokens_go_to_the_processes_of_their_experts(text: str, processes: int) -> None:
    """And come back, forward and backward: four exchanges in each layer, of all choices of the tokens."""
    experts = {"family": "mixtral", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    found, model = run(text, processes, model=experts, precision="fp32")
    assert found.same, found.difference
    exchanges = {(each.moment, each.axes): each for each in found.traffic if each.kind == "all_to_all"}
    exchange = exchanges["micro-batch", "ep"]
    layers, tokens = 6, 32
    assert (exchange.processes, exchange.count) == (2, layers * (4 + 1))  # and the numbers of tokens of each expert
    assert exchange.bytes == layers * (4 * tokens * 2 * model.hidden_size * 4 + model.num_experts * 8)
    if text == "ep=2":
        of_experts = layers * model.num_experts * 3 * model.hidden_size * 96
        assert found.memory["weights"] == 4 * (count_parameters(model).total - of_experts // 2)


def test_dense_layers_before_those_with_experts() -> None:
    """Two thirds of the layers of this model have experts, whatever the depth of those that are run."""
    sizes = {"family": "deepseek_v3", "num_hidden_layers": 9, "num_experts": 4, "num_experts_per_tok": 2}
    found, model = run("ep=2,fsdp=2", 4, model=sizes)
    assert found.same, found.difference
    assert model.first_k_dense_replace == 3
    exchange = next(each for each in found.traffic if each.kind == "all_to_all" and each.moment == "micro-batch")
    assert exchange.count == 6 * (4 + 1)


def test_a_thousand_processes_within_a_minute(run_cli: Cli) -> None:
    began = time.process_time()
    arguments = ["--ranks", "1024", "--parallel", "fsdp=128,tp=8", "--preset", "llama3.2-1b", "--batch-size", "128"]
    code, out, _ = run_cli("dry-run", *arguments, "--vocab-size", "128256", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["ranks"], found["same"]) == (1024, True)
    assert time.process_time() - began < 60
    weights = 4 * 1_235_814_400 / 1024
    assert found["memory"]["weights"] == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize(
    ("text", "processes", "options", "message"),
    [
        ("tp=8", 8, {}, "cannot be divided by tp=8"),
        ("ep=3", 6, {"model": {"family": "mixtral", "num_experts": 4}, "batch_size": 18}, "cannot be divided by ep=3"),
        ("fsdp", 32, {}, "a batch of 16 cannot be divided among 32"),
    ],
)
def test_wrong_layouts(text: str, processes: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(text, processes, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks must be at least 2"),
        (["--parallel", "auto"], "needs a layout"),
        (["--ranks", "8", "--parallel", "fsdp=3"], "a multiple of 3"),
        (["--processes", "2"], "leave out --processes"),
        (["--budget", "1h"], "leave out --budget"),
        (["--lora", "on"], "leave out --lora"),
    ],
)
def test_wrong_options(run_cli: Cli, arguments: list[str], message: str) -> None:
    code, _, err = run_cli("dry-run", *arguments)
    assert code == 2
    assert message in err
