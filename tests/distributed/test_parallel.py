"""A model that is divided among processes makes the updates of one process that has it whole."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.data.loader import TokenBatch
from gptsmith.distributed.context import DistributedContext, join_processes
from gptsmith.distributed.layout import Layout
from gptsmith.distributed.parallel import parallelize
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError
from gptsmith.log import JsonLines
from gptsmith.model.families import FAMILIES
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import read_run
from gptsmith.train import run as run_module
from gptsmith.train.config import RunConfig
from gptsmith.train.forecast import layouts
from gptsmith.train.forecast.memory import USABLE, Forecaster
from gptsmith.train.objectives.base import LossOutput, Models
from gptsmith.train.objectives.pretrain import NextToken
from gptsmith.train.step import TrainingStep
from tests.distributed.processes import results, run_processes
from tests.distributed.test_training import assert_same_run, fit, resume, rows, stop_at_seven, weights
from tests.factories import WITHOUT_GROUPS, tiny_config, tiny_model, tiny_run_config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

CONFIG = tiny_run_config(
    steps=12, eval_every=6, save_every=3, mask_documents=True, sample_tokens=8, vocab_size=288, tokenizer="bpe"
)
SHAPE: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 4, "initializer_range": 0.1}
EXPERTS = {"model.num_experts": 4, "model.num_experts_per_tok": 2, "optim.name": "adamw", "optim.lr": 0.002}
SHARED = {"model.shared_expert_intermediate_size": 16, "model.intermediate_size": 16}
FEW = [6] * 16 + [1, 5, 3, 6]  # rows of each batch: also fewer than there are processes


class Skewed(NextToken):
    """Batches whose targets are mostly in the last row."""

    def __init__(self) -> None:
        super().__init__(seq_len=12, vocab_size=30)

    def batch(self, step: int, num_rows: int) -> TokenBatch:
        random = torch.Generator().manual_seed(step)
        ids, targets = torch.randint(30, (2, num_rows, 12), generator=random)
        targets[:-1, 2:] = -100
        return TokenBatch(ids, targets)

    def loss(self, models: Models, batch: TokenBatch) -> LossOutput:
        return super().loss(models, batch)


def updates(layout: str, optimizer: str, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """Make updates and return their losses and gradient norms, and on the first process the weights and the state of
    the optimizers."""
    with join_processes(20) as ranks:
        ranks.arrange(Layout.parse(layout, ranks.world_size), torch.device("cpu"))
        return updates_of(ranks, optimizer, family, SHAPE | options, FEW)


def updates_of(
    ranks: DistributedContext,
    optimizer: str,
    family: str,
    options: dict[str, Any],
    rows_of_batches: list[int],
    eps: float = 1e-8,
) -> dict[str, Any]:
    """eps: AdamW's: how large a gradient must be to count in full."""
    config = tiny_run_config(batch_size=4, optim={"name": optimizer, "lr": 0.01, "weight_decay": 0.1, "clip": 0.5})
    model, objective = tiny_model(family, seed=1, **options), Skewed()
    step: TrainingStep[TokenBatch] = TrainingStep.build(
        model, objective, config, precision="fp32", micro_batch_size=6, ranks=ranks
    )
    for group in (group for each in step.optimizers.optimizers for group in each.param_groups if "eps" in group):
        group["eps"] = eps
    found = []
    for number, num_rows in enumerate(rows_of_batches):
        result = step(objective.batch(number, num_rows), 1.0)
        found.append((float(result.loss), float(result.grad_norm)))
    state, policy = step.optimizers.state_tensors(step.whole_tensor), step.gather().policy
    if not ranks.is_main:
        return {"updates": found}
    return {"updates": found, "weights": {n: p.detach() for n, p in policy.named_parameters()}, "state": state}


def updates_of_families(layout: str, families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Make a few updates of each family, with options that are given for it."""
    with join_processes(20) as ranks:
        ranks.arrange(Layout.parse(layout, ranks.world_size), torch.device("cpu"))
        # Otherwise AdamW moves a weight by about the rate also where its gradient is rounding alone.
        return {name: updates_of(ranks, "adamw", name, options, [6, 1, 4], 1e-4) for name, options in families.items()}


def assert_same(layout: str, processes: int, optimizer: str, family: str, folder: Path, **options: Any) -> None:
    alone = updates("dp", optimizer, family, options)
    together = results(run_processes(processes, folder, updates, layout, optimizer, family, options))
    assert_same_updates(together, alone)


def assert_same_updates(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for mine in together:
        assert mine["updates"] == together[0]["updates"]  # all processes say the same, to the bit
        for (loss, norm), (expected_loss, expected_norm) in zip(mine["updates"], alone["updates"], strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    for kind, tolerance in (("weights", 1e-5), ("state", 1e-4)):
        found, expected = together[0][kind], alone[kind]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if kind == "weights" and name.endswith("qkv_proj.bias"):  # softmax ignores the bias of keys: AdamW of noise
                kept = [*range(16), *range(len(tensor) - (len(tensor) - 16) // 2, len(tensor))]
                tensor, found[name] = tensor[kept], found[name][kept]
            assert torch.allclose(found[name], tensor, atol=tolerance), (name, (found[name] - tensor).abs().max())


@pytest.mark.parametrize(
    ("layout", "optimizer", "family", "options"),
    [
        ("fsdp", "muon", "qwen3", {}),
        ("fsdp", "adamw", "gpt2", {"tie_word_embeddings": True}),
        ("tp=2", "muon", "qwen3", {"tie_word_embeddings": True}),
        ("tp=2", "adamw", "gpt2", {}),
        ("ep=2", "muon", "qwen3_moe", {}),
        ("ep=2", "adamw", "mixtral", {}),
        ("tp=2", "adamw", "qwen2_moe", {}),
        ("dp", "muon", "mixtral", {}),
    ],
)
def test_two_processes(layout: str, optimizer: str, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(layout, 2, optimizer, family, tmp_path, **options)


HEADS: dict[str, Any] = {"num_attention_heads": 4, "initializer_range": 0.1}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"attention_bias": True},
    "deepseek_v3": {"q_lora_rank": 6, "num_hidden_layers": 4},
}


def every_family() -> dict[str, dict[str, Any]]:
    found = {}
    for name in FAMILIES.builtin:
        key_value_heads = {"num_key_value_heads": 4 if name in WITHOUT_GROUPS else 2}
        found[name] = HEADS | key_value_heads | FAMILY_OPTIONS.get(name, {})
    return found


@pytest.mark.parametrize(("layout", "processes"), [("tp=2", 2), pytest.param("fsdp=2,tp=2", 4, marks=pytest.mark.slow)])
def test_every_family_can_be_divided_by_tp(layout: str, processes: int, tmp_path: Path) -> None:
    """Attention sinks, experts with biases, norms over the queries of all heads, latent attention, …"""
    families = every_family()
    alone = updates_of_families("dp", families)
    together = results(run_processes(processes, tmp_path, updates_of_families, layout, families, seconds=200))
    for name in families:
        try:
            assert_same_updates([each[name] for each in together], alone[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("fsdp", {"optim.name": "adamw", "optim.lr": 0.002}),
        ("tp=2", {}),
        pytest.param("tp=2", {"model.family": "deepseek_v3", **EXPERTS, **SHARED}, marks=pytest.mark.slow),
        pytest.param("tp=2", {"model.family": "gpt_oss", **EXPERTS}, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process_and_resumes_in_another_layout(
    layout: str, options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """Losses, validation losses, samples, checkpoints; stopped halfway, and continued by one process."""
    config = CONFIG.replace(**options)
    fit(str(text), config, tmp_path / "one")
    out = tmp_path / "run"
    results(run_processes(2, tmp_path, stop_at_seven, str(text), out, config.replace(parallel=layout)))
    assert rows(out, "step")[-1] == [7]
    resume(out, parallel="dp")
    assert_same_run(tmp_path / "one", out, 1e-5)
    samples = [row["text"] for row in JsonLines(out / "samples.jsonl").read()]
    assert samples == [row["text"] for row in JsonLines(tmp_path / "one" / "samples.jsonl").read()]

    resumed = tmp_path / "resumed"  # and the other way round
    stop_at_seven(str(text), resumed, config)
    results(run_processes(2, tmp_path, resume, resumed, {"parallel": layout}))
    assert_same_run(tmp_path / "one", resumed, 1e-5)


def fit_automatically(data: str, out: Path, config: RunConfig) -> list[str]:
    """Train where half of the model fits into memory, and return the layouts that were chosen."""
    chosen: list[str] = []

    def choose(*arguments: Any, **options: Any) -> Layout:
        forecast = partial(Forecaster, *arguments, activation_checkpointing=True)
        known = {name: options[name] for name in ("device", "precision", "objective")}
        forecast(**known).at(1)  # what this imports is a part of the process from now on
        whole, half = (forecast(**known, model_parts=parts).at(1).total for parts in (1, 2))
        patch.setattr(layouts, "available_memory", lambda device: round((whole + half) / USABLE))  # of two processes
        layout = layouts.choose_layout(*arguments, **options)
        chosen.append(str(layout))
        return layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "choose_layout", choose)
        fit(data, config, out)
    return chosen


def test_a_layout_that_fits_is_chosen(text: Path, tmp_path: Path) -> None:
    model = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = CONFIG.replace(steps=3, eval_every=3, model=model, optim={"name": "adamw"}, sample_tokens=0)
    fit(str(text), config, tmp_path / "one")
    found = results(
        run_processes(2, tmp_path, fit_automatically, str(text), tmp_path / "run", config.replace(parallel="auto"))
    )
    assert found == [["fsdp=2"], []]  # the main process chooses
    assert_same_run(tmp_path / "one", tmp_path / "run", 1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "notes"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(words[number * 1000 : number * 1000 + 15 + 20 * number])
    return folder


# -- what cannot be divided --------------------------------------------------------------------------------------------


def test_layouts() -> None:
    assert Layout.parse("fsdp=4,tp=2", 16) == Layout(dp=2, fsdp=4, tp=2)
    assert Layout.parse("hsdp=2x4", 8) == Layout(dp=2, fsdp=4)
    assert Layout.parse("tp=2,fsdp", 8) == Layout(fsdp=4, tp=2)
    assert Layout.parse("dp", 4) == Layout.parse("dp=4", 4) == Layout(dp=4)
    assert Layout(dp=2, fsdp=3, tp=4).coordinates(17) == {"dp": 1, "fsdp": 1, "ep": 0, "tp": 1}
    assert str(Layout.parse("fsdp=4,tp=2", 16)) == "dp=2,fsdp=4,tp=2"


@pytest.mark.parametrize(
    ("text", "processes", "message"),
    [
        ("fsdp=8,tp=2", 12, "needs a multiple of 16 processes, not 12"),
        ("dp=2,tp=2", 8, "needs 4 processes, not 8"),
        ("fsdp,tp", 8, "fsdp and tp have no size; only one axis can"),
        ("pp=2", 2, "'pp=2' is not an axis with a size"),
        ("tp=0", 2, "'tp=0' is not an axis with a size"),
        ("hsdp", 4, "'hsdp' is not an axis with a size"),
        ("tp=2,tp=2", 4, "tp is given twice"),
        ("", 4, "'' is not an axis with a size"),
    ],
)
def test_layouts_that_make_no_sense(text: str, processes: int, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Layout.parse(text, processes)


def test_models_that_cannot_be_divided() -> None:
    problems = {
        "tp=4": ("qwen3", "2 key/value heads cannot be divided by tp=4"),
        "tp=3": ("qwen3", "4 attention heads cannot be divided by tp=3"),
        "ep=2": ("qwen3", "this model has none"),
        "ep=3": ("qwen3_moe", "4 experts cannot be divided by ep=3"),
    }
    for layout, (family, message) in problems.items():
        config = tiny_config(family, num_attention_heads=4, head_dim=4)
        assert any(message in problem for problem in Layout.parse(layout).problems(config)), layout
    olmo2 = tiny_config("olmo2", num_attention_heads=4, norm="layernorm")
    assert list(Layout(tp=2).problems(olmo2)) == [
        "tp does not divide a LayerNorm over the queries of all heads. Use fsdp."
    ]
    odd = tiny_config("gpt2", vocab_size=31)
    assert list(Layout(tp=2).problems(odd)) == [
        "31 entries of the vocabulary cannot be divided by tp=2. Choose a tp that divides, or use fsdp."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("hsdp=2x2", "llama"),
        ("fsdp=2,tp=2", "qwen3"),
        ("dp=2,tp=2", "gpt2"),
        ("fsdp=4", "qwen3"),
        ("ep=2,dp=2", "qwen3_moe"),
        ("ep=2,fsdp=2", "mixtral"),
        ("ep=2,tp=2", "qwen2_moe"),
        ("fsdp=2,tp=2", "qwen2_moe"),
    ],
)
def test_four_processes(layout: str, family: str, optimizer: str, tmp_path: Path) -> None:
    assert_same(layout, 4, optimizer, family, tmp_path)


# -- the same bits -----------------------------------------------------------------------------------------------------


def exact_run(data: str, out: Path, config: Any) -> None:
    threads = torch.get_num_threads()
    try:
        fit(data, config, out)
    finally:
        torch.set_num_threads(threads)


def test_exact_runs_have_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Losses, gradient norms, validation losses and weights, with dropout and Muon."""
    config = CONFIG.replace(exact=True, dropout=0.1, batch_size=8, steps=4, eval_every=4)
    exact_run(str(text), tmp_path / "1", config)
    expected = weights(tmp_path / "1")
    for processes in (2, 4):
        out = tmp_path / str(processes)
        results(run_processes(processes, tmp_path, exact_run, str(text), out, config))
        for names in (("loss", "grad_norm"), ("val_loss",)):
            assert rows(out, *names) == rows(tmp_path / "1", *names)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())


def test_exactness_has_limits() -> None:
    for options, message in (
        ({"processes": 3, "batch_size": 24}, "--exact with 3 processes and batches of 24"),
        ({"processes": 2, "batch_size": 12}, "--exact with 2 processes and batches of 12"),
        ({"processes": 2, "parallel": "fsdp"}, "--exact with --parallel fsdp: only dp"),
    ):
        with pytest.raises(UsageError, match=message):
            CONFIG.replace(exact=True, **options).check_processes()


# -- generation --------------------------------------------------------------------------------------------------------


def generated(family: str, divided: bool) -> list[list[int]]:
    with join_processes(20) as ranks:
        model = tiny_model(family, **every_family()[family])
        if divided:
            layout = Layout(tp=ranks.world_size)
            ranks.arrange(layout, torch.device("cpu"))
            parallelize(model, ranks.mesh, layout)
        engine = Engine(model, kernels="never")
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
        return [list(each.ids) for each in engine.generate(prompts, SamplingParams(max_tokens=9, seed=7))]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "olmo2", "gpt_oss", "deepseek_v3"])
def test_the_engine_generates_what_one_process_does(family: str, tmp_path: Path) -> None:
    alone = generated(family, False)
    assert results(run_processes(2, tmp_path, generated, family, True)) == [alone, alone]


# -- failures ----------------------------------------------------------------------------------------------------------


def killed_in_the_forward_pass(data: str, out: Path, config: Any) -> None:
    hidden_states = Transformer.hidden_states

    def killed(self: Transformer, *arguments: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and os.environ["RANK"] == "1" and (out / "checkpoints" / "step-00000003").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return hidden_states(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "hidden_states", killed)
        fit(data, config, out)


def test_a_process_that_is_killed_in_a_forward_pass_is_named(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = CONFIG.replace(parallel="fsdp")
    first, second = run_processes(2, tmp_path, killed_in_the_forward_pass, str(text), out, config)
    assert second.code == -signal.SIGKILL
    assert "process 1 of 2 ended without a message" in str(first.error)
    resume(out, parallel="dp")
    assert read_run(out).status == "finished"
