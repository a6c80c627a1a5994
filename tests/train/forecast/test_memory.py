"""The forecast of memory against what tensors really take, and how a run is made to fit."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gptsmith.errors import UsageError
from gptsmith.model.flops import count_parameters
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.train.budget.machine import example_step
from gptsmith.train.compile import compile_blocks, partitioned
from gptsmith.train.config import ModelOptions, OptimConfig, RunConfig, run_config
from gptsmith.train.forecast import memory, storages
from gptsmith.train.forecast.memory import (
    Forecaster,
    available_memory,
    fit_into_memory,
    largest_micro_batch,
    run_without_storage,
)

CPU = torch.device("cpu")
CONFIG = run_config(
    model=ModelOptions(num_hidden_layers=2, hidden_size=64, num_attention_heads=2), context=64, batch_size=12
)


def model_of(config: RunConfig, vocab_size: int = 50) -> Any:
    return config.model.build(vocab_size, config.loop.context)


def peaks(config: RunConfig, rows: int = 12, partition: bool = False) -> Any:
    return run_without_storage(config, model_of(config), rows, CPU, "fp32", partition=partition)


@pytest.mark.parametrize(
    ("optimizer", "family", "per_parameter"), [("adamw", "gpt2", 8), ("muon", "qwen3", None), ("adamw", "mixtral", 8)]
)
def test_weights_gradients_and_optimizer_are_counted_exactly(
    optimizer: Any, family: Any, per_parameter: int | None
) -> None:
    config = CONFIG.replace(model=replace(CONFIG.model, family=family), optim=OptimConfig(name=optimizer))
    found, c = peaks(config), model_of(config)
    parameters = count_parameters(c).total
    tables = 0 if c.position == "learned" else 2 * 4 * c.max_position_embeddings * c.head_dim // 2
    assert found["save"]["weights"] == (3 if family == "gpt2" else 2) * (4 * parameters + tables)
    assert found["optimizer"]["gradients"] == 4 * parameters
    if per_parameter is None:  # Muon keeps a momentum, AdamW for embeddings and norms two
        model = Transformer(c)
        blocks = sum(p.numel() for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim >= 2)
        state = 4 * blocks + 8 * (parameters - blocks)
    else:
        state = per_parameter * parameters
    assert state <= found["save"]["optimizer"] <= state + 1000  # and AdamW's step counters


@pytest.mark.parametrize(
    ("family", "partition"),
    [(family, False) for family in ("gpt1", "gpt2", "gpt3", "qwen3", "qwen3_moe")] + [("gpt2", True), ("qwen3", True)],
)
def test_activations_are_those_that_autograd_keeps(family: Any, partition: bool) -> None:
    """Counted another way: by the storages that a real forward pass saves for its backward pass."""
    experts = 4 if family == "qwen3_moe" else None
    layers = 8 if partition else 2  # what comes and goes within a layer counts for less
    size = replace(CONFIG.model, family=family, num_hidden_layers=layers, num_experts=experts)
    config = CONFIG.replace(model=replace(size, num_experts_per_tok=experts and 2))
    model = Transformer(model_of(config)).train()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    if partition:
        compile_blocks(model, partitioned())
    ids = torch.randint(50, (12, config.loop.context))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_loss_sum(model, ids, ids, None)
    saved = sum(storage.nbytes() for storage in kept.values())
    found = peaks(config, partition=partition)["update"]
    assert found["activations"] + found["logits"] == pytest.approx(saved, rel=0.12)
    if partition:
        plain = peaks(config)["update"]
        assert (found["activations"] < 0.75 * plain["activations"]) == (family == "qwen3")


@pytest.mark.parametrize(("family", "layers"), [("qwen3", 9), ("gpt3", 10)])
def test_depth_follows_on_a_straight_line(family: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(model=replace(CONFIG.model, family=family, num_hidden_layers=layers))
    short = Forecaster(config, model_of(config), device=CPU, precision="fp32", process=0).at(12)
    monkeypatch.setattr(storages, "SHALLOW", layers)
    whole = Forecaster(config, model_of(config), device=CPU, precision="fp32", process=0).at(12)
    assert short.total == pytest.approx(whole.total, rel=0.01)


def test_what_makes_a_run_larger() -> None:
    def total(config: RunConfig, rows: int = 12) -> int:
        return Forecaster(config, model_of(config), device=CPU, precision="fp32", process=0).at(rows).total

    base = total(CONFIG)
    assert total(CONFIG, 6) < base
    assert total(CONFIG.replace(dropout=0.1)) > base
    assert total(CONFIG.replace(mask_documents=True)) > base
    assert total(CONFIG.replace(context=128)) > 1.1 * base
    assert total(CONFIG.replace(model=replace(CONFIG.model, num_hidden_layers=4))) > 1.05 * base


def test_accumulation_keeps_gradients_beside_activations() -> None:
    alone = peaks(CONFIG.replace(batch_size=3), rows=3)["update"]
    accumulated = peaks(CONFIG.replace(batch_size=12), rows=3)["update"]
    gradients = 4 * count_parameters(model_of(CONFIG)).total
    assert sum(accumulated.values()) == pytest.approx(sum(alone.values()) + gradients, rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_what_a_gpu_allocates(family: Any, precision: Any, compiled: bool) -> None:
    size = replace(CONFIG.model, family=family, hidden_size=512, num_hidden_layers=4, num_attention_heads=8)
    config = CONFIG.replace(context=256, batch_size=64, model=size)
    device = torch.device("cuda")
    found = Forecaster(config, model_of(config), device=device, precision=precision, compiled=compiled).at(64)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # by tests before this one
    step = example_step(config, model_of(config), device, precision)
    if compiled:
        compile_blocks(step.models.policy)
    for _ in range(3):
        step(step.objective.example_batch(64), 1.0)
    assert found.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Forecaster(CONFIG.replace(dropout=0.1), model_of(CONFIG), device=CPU, precision="fp32").at(4)
    assert torch.equal(torch.rand(3), expected)


# Fitting -------------------------------------------------------------------------------------------------------------


def forecaster(config: RunConfig = CONFIG) -> Forecaster:
    return Forecaster(config, model_of(config), device=CPU, precision="fp32", process=0)


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits() -> None:
    found, divisors = forecaster(), [1, 2, 3, 4, 6, 12]
    for size, smaller in zip(divisors, [None, *divisors], strict=False):
        enough = found.at(size).total / memory.USABLE
        assert found.largest_fitting(int(enough) + 1) == size
        assert found.largest_fitting(int(enough) - 1) == smaller


def test_a_run_that_does_not_fit_is_told_with_its_numbers() -> None:
    with pytest.raises(UsageError, match=r"one sequence of 64 tokens .* need .* MB, and 1 MB are available.*plan"):
        largest_micro_batch(forecaster(), 1_000_000)


def test_fit_lowers_the_micro_batch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "process_memory", lambda: 0)
    needed = forecaster().at(4).total
    monkeypatch.setattr(memory, "available_memory", lambda device: int(needed / memory.USABLE) + 1)
    options: Any = {"device": CPU, "precision": "fp32"}
    assert fit_into_memory(CONFIG, model_of(CONFIG), **options).micro_batch_size == 4
    said = capsys.readouterr().err
    assert "micro-batches of 12 would need" in said
    assert "training with micro-batches of 4, 3 per update" in said
    assert said.count("\n") == 1
    assert fit_into_memory(CONFIG, model_of(CONFIG), **options, micro_batch_size=3).micro_batch_size == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "compile", "expected"),
    [("cpu", "auto", False), ("cpu", "on", True), ("cuda", "auto", True), ("cuda", "off", False), ("cuda", "on", True)],
)
def test_what_fills_a_gpu_is_taken_for_compiled(
    device: str, compile: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "compiler_available", lambda device: True)
    assert memory.likely_compiled(CONFIG.replace(compile=compile), torch.device(device)) is expected


def test_fit_leaves_alone_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_into_memory(CONFIG, model_of(CONFIG), device=CPU, precision="fp32").micro_batch_size == 12
    assert capsys.readouterr().err == ""


# The machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows does not say how much memory there is")
def test_available_memory_is_between_nothing_and_all() -> None:
    total = psutil.virtual_memory().total
    found = available_memory(CPU)
    assert found is not None
    assert 0 < found <= 1.1 * total


def test_control_groups(tmp_path: Path) -> None:
    """A limit above us counts as much as our own; what is merely cached can be given back."""

    def group(path: str, **files: str) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("__", ".", 1)).write_text(text)

    group("outer", memory__max="1000000\n", memory__current="700000\n", memory__stat="anon 1\ninactive_file 50000\n")
    group("outer/inner", memory__max="max\n", memory__current="600000\n")
    assert list(memory._control_group_limits(tmp_path, "0::/outer/inner\n")) == [350_000]

    group("memory/job", memory__limit_in_bytes="5000", memory__usage_in_bytes="2000")
    assert list(memory._control_group_limits(tmp_path, "4:cpu:/x\n3:memory:/job\n")) == [3000]
    assert list(memory._control_group_limits(tmp_path, "")) == []
