"""PPO and GRPO from prompts to a better model: they learn, agree with the engine, and resume bit for bit."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptsmith
from gptsmith import checkpoint
from gptsmith.checkpoint import load_train_state
from gptsmith.cli import main
from gptsmith.engine.engine import Engine
from gptsmith.errors import TrainingError, UsageError
from gptsmith.kernels.threads import kernels_available
from gptsmith.model.lora import adapter_off
from gptsmith.run_directory import Run, read_run
from gptsmith.train.forecast import memory
from gptsmith.train.rollout.rewards import Rewards
from tests.factories import tiny_run_config
from tests.forked import Forked

ROOT = Path(__file__).parents[2]
QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu"}
FEW: dict[str, Any] = {**QUIET, "steps": 6, "batch_size": 8, "answer_tokens": 6, "eval_every": 3, "eval_prompts": 3}
METHODS = {"grpo": {"group_size": 4}, "ppo": {"passes": 2}}
REWARDS = '''
import math, os, signal

def likes_e(prompts, completions):
    """The share of the letter e."""
    return [text.count("e") / max(1, len(text)) for text in completions]

def likes_a(prompts, completions):
    """How often there is an a."""
    return [text.count("a") for text in completions]

def same(prompts, completions):
    return [1.0] * len(completions)

def broken(prompts, completions):
    raise ConnectionError("no route to the judge")

def answer(prompts, completions, wanted):
    return [float(letter in text) for text, letter in zip(completions, wanted)]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, prompts, and rewards."""
    place = tmp_path_factory.mktemp("policy")
    (place / "text.txt").write_text("the cat sees the tree. a dog runs home at noon. " * 150)
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=30, eval_every=30, context=64, model=model)
    gptsmith.fit(place / "text.txt", config, out=place / "base")
    words = ("the cat", "a dog", "at noon", "sees", "home", "the tree", "runs", "a ", "the dog sees", "cat")
    rows = [{"prompt": word, "wanted": "eoat"[i % 4]} for i, word in enumerate(words * 3)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "rewards.py").write_text(REWARDS)
    return place


def train(method: str, place: Path, out: Path, reward: str = "likes_e", **options: Any) -> Run:
    function = getattr(gptsmith, method)
    spec = f"{place / 'rewards.py'}:{reward}"
    options = {**FEW, **METHODS[method], **options}
    run: Run = function(place / "base", place / "prompts.jsonl", reward=spec, out=out, **options)
    return run


def trace(run: Run) -> list[dict[str, Any]]:
    times = ("time", "update_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in run.metrics]


def logged(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.metrics if name in row]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_is_rewarded(method: str, place: Path, tmp_path: Path) -> None:
    rate = {"name": "adamw", "lr": 0.003}
    run = train(method, place, tmp_path / "run", lora="off", steps=40, batch_size=32, optim=rate, eval_every=20)
    rewards = logged(run, "val_reward")
    assert run.best is not None
    assert run.best["val_reward"] == max(rewards[1:]) > rewards[0] + 0.1
    assert run.selection == ("val_reward", "max")
    for name in ("reward", "reward_std", "entropy", "length", "ended", "clipped", "gap"):
        assert logged(run, name), name
    assert logged(run, "dead_groups" if method == "grpo" else "value_loss")
    model, tokenizer = gptsmith.load(run)
    assert gptsmith.generate(model, tokenizer, "the cat", max_tokens=12, seed=1)


@pytest.mark.parametrize("lora", ["off", "on"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_sampler_agrees_with_the_trainer(temperature: float, lora: str, place: Path, tmp_path: Path) -> None:
    """On answers of the present weights, to the rounding of float32, and no ratio is clipped."""
    run = train("grpo", place, tmp_path / "run", temperature=temperature, lora=lora, micro_batch_size=4)
    gaps, rows = logged(run, "gap"), [row for row in run.metrics if "gap" in row]
    assert len(gaps) == FEW["steps"]
    assert max(gaps) <= 1e-5
    assert all(row["clipped"] == 0 for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method: str, place: Path, tmp_path: Path) -> None:
    """The loss is a sum over the whole batch, so its split does not matter, truncated answers included."""
    losses = [
        logged(train(method, place, tmp_path / str(size), micro_batch_size=size, steps=3), "loss") for size in (8, 2, 1)
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-5)


KILLED_IN: dict[str, tuple[Any, str]] = {
    "rollout": (Engine, "step"),
    "reward": (Rewards, "score"),
    "backward": (torch.autograd, "backward"),
    "save": (checkpoint, "sha256_file"),
}


def run_until_killed(where: str, number: int, arguments: list[Any]) -> int:
    """Run a command; kill this process at the call of that number of the function in `where`."""
    calls = itertools.count(1)
    if where in KILLED_IN:
        owner, name = KILLED_IN[where]
        function = getattr(owner, name)

        def killing(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(owner, name, killing)
    return main([str(argument) for argument in arguments])


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_it_ends_in_the_same_bits(method: str, place: Path, tmp_path: Path) -> None:
    kill_and_resume(method, place, tmp_path, {"backward": 2, "reward": 2, "rollout": 9, "save": 7})


@pytest.mark.skipif(os.name == "nt" or not kernels_available(), reason="no SIGKILL, or no kernels here")
def test_killed_with_fast_rollouts_it_ends_in_the_same_bits(place: Path, tmp_path: Path) -> None:
    kill_and_resume("grpo", place, tmp_path, {"reward": 2}, lora="off", fast_rollouts=True)


def kill_and_resume(method: str, place: Path, tmp_path: Path, kills: dict[str, int], **more: Any) -> None:
    """Compare a run that is killed at these places with one that is not. kills: at which call of each."""
    options: dict[str, Any] = {**FEW, **METHODS[method], "minibatches": 2, "save_every": 1, "batch_size": 4, **more}
    whole = train(method, place, tmp_path / "whole", **options)
    out = tmp_path / "run"
    start = [method, place / "base", place / "prompts.jsonl", "--reward", f"{place / 'rewards.py'}:likes_e"]
    start += ["--out", out]
    for name, value in options.items():
        start += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    killed, errors = 0, tmp_path / "errors"
    command: list[Any] = start
    for where, number in (*kills.items(), ("none", 1)):
        process = Forked(functools.partial(run_until_killed, where, number, command), errors)
        process.wait(timeout=300)
        killed += process.returncode == -signal.SIGKILL
        assert process.returncode == (0 if where == "none" else -signal.SIGKILL), (where, errors.read_text()[-2000:])
        command = ["train", "--resume", out]
    assert killed == len(kills)
    again = read_run(out)
    assert trace(again) == trace(whole)
    weights = "model.safetensors" if more.get("lora") == "off" else "adapter_model.safetensors"
    for file in (weights, "train/state.safetensors"):
        ours, theirs = (load_file(run.directory / "last" / file) for run in (again, whole))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
    records = [(run.directory / "rollouts.jsonl").read_text() for run in (again, whole)]
    assert records[0] == records[1]


def test_rollouts_are_recorded_with_a_hash_of_the_weights(place: Path, tmp_path: Path) -> None:
    run = train("grpo", place, tmp_path / "run", passes=2)
    rows = [json.loads(line) for line in (run.directory / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 8  # two updates share a rollout
    assert {row["step"] for row in rows} == {1, 3, 5}
    hashes = {row["step"]: row["weights"] for row in rows}
    assert len(set(hashes.values())) == 3
    assert all(row["reward"] == row["reward/likes_e"] and row["text"] is not None for row in rows)


def test_the_reference_is_where_training_started(place: Path, tmp_path: Path) -> None:
    """Without its adapter a policy is its base, so at first there is no divergence, and later there is."""
    for lora in ("on", "off"):
        run = train("grpo", place, tmp_path / lora, kl=0.1, lora=lora, optim={"lr": 0.01}, steps=4)
        divergence = logged(run, "kl")
        assert abs(divergence[0]) < 1e-4 < abs(divergence[-1])
    model, _ = gptsmith.load(tmp_path / "on")
    base, _ = gptsmith.load(place / "base")
    ids = torch.arange(5)[None]
    with torch.no_grad(), adapter_off(model):
        without = model(ids)
    assert without.shape == base(ids).shape


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "dr_grpo"},
        {"variant": "dapo"},
        {"variant": "gspo", "passes": 2},
        {"variant": "cispo", "passes": 2},
        {"variant": "rloo"},
        {"kl": 0.5},
        {"temperature": 0.8},
        {"unended_penalty": 1.0},
        {"mask_unended": True, "stop": ("e",)},
        {"normalize": "sequence", "stop": ("e",)},
        {"overlong_buffer": 0.5, "stop": ("e",)},
        {"stop": ("e",)},
        {"clip_high": 0.0, "passes": 3},
    ],
    ids=lambda options: " ".join(map(str, options.items())),
)
def test_every_option_changes_what_is_learned(
    options: dict[str, Any], place: Path, tmp_path: Path, plain: dict[str, dict[str, torch.Tensor]]
) -> None:
    reference = {name: value for name, value in options.items() if name in ("passes", "stop")}
    if options == {"stop": ("e",)}:
        reference = {}
    rate: dict[str, Any] = {
        "optim": {"lr": 0.02},
        "steps": 2,
        "batch_size": 16,
        "eval_prompts": 1,
        "check_rewards": False,
        "reward": "likes_a",
    }

    def adapter(out: Path, **options: Any) -> dict[str, torch.Tensor]:
        run = train("grpo", place, out, **rate, **options)
        return load_file(run.directory / "last" / "adapter_model.safetensors")

    key = str(reference)
    if key not in plain:
        plain[key] = adapter(tmp_path / "plain", **reference)
    changed = adapter(tmp_path / "other", **options)
    assert any(not torch.equal(changed[name], plain[key][name]) for name in changed)


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    """The adapters of runs without the option, by what they have in common with it."""
    return {}


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_of_a_run_is_forecast(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where little memory is left: the reference and the value model are counted."""
    monkeypatch.setattr(memory, "certainly_fits", lambda *arguments: False)
    forecasts: list[memory.Memory] = []
    at = memory.Forecaster.at

    def recorded(self: memory.Forecaster, rows: int) -> memory.Memory:
        forecasts.append(at(self, rows))
        return forecasts[-1]

    monkeypatch.setattr(memory.Forecaster, "at", recorded)
    train(method, place, tmp_path / "run", steps=1, kl=0.1, lora="off")
    train("grpo", place, tmp_path / "small", steps=1, kl=0.0, lora="off")
    assert forecasts[0].parts["weights"] > forecasts[-1].parts["weights"]


def test_columns_reach_the_reward(place: Path, tmp_path: Path) -> None:
    run = train("grpo", place, tmp_path / "run", reward="answer")
    assert all(0 <= value <= 1 for value in logged(run, "reward"))


def test_groups_without_a_difference(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="all answers to each prompt had the same reward"):
        train("grpo", place, tmp_path / "run", reward="same")


def test_a_failing_reward_stops_the_run_and_names_itself(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"broken fails.*no route to the judge"):
        train("ppo", place, tmp_path / "run", reward="broken", eval_prompts=1)
    assert read_run(tmp_path / "run").status == "failed"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("grpo", {"group_size": 1}, "needs 2 or more"),
        ("grpo", {"batch_size": 6}, "no whole groups of 4"),
        ("grpo", {"dropout": 0.1}, "dropout would make"),
        ("grpo", {"compile": "on"}, "vary in length"),
        ("grpo", {"answer_tokens": 64, "context": 64}, "leaves no room for prompts"),
        ("grpo", {"temperature": 0.0}, "must be above 0"),
        ("grpo", {"reward_weights": "1,2"}, "2 numbers, and there are 1 rewards"),
        ("ppo", {"ptx": "wiki"}, "CORPUS:WEIGHT"),
    ],
)
def test_bad_options(method: str, options: dict[str, Any], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(method, place, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_reward_model_with_a_short_context_is_refused_at_the_start(place: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "e", "rejected": "a"}\n' * 4)
    short = gptsmith.fit(place / "text.txt", tiny_run_config(steps=1, context=12), out=tmp_path / "short")
    judge = gptsmith.reward(short, pairs, out=tmp_path / "judge", steps=1, batch_size=2, device="cpu", compile="off")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\ne\n" * 8)
    options: dict[str, Any] = {
        "device": "cpu",
        "compile": "off",
        "batch_size": 4,
        "group_size": 2,
        "steps": 1,
        "context": 20,
    }
    longer = gptsmith.fit(place / "text.txt", tiny_run_config(steps=1, context=24), out=tmp_path / "longer")
    with pytest.raises(UsageError, match=r"--context 20 is longer than a reward model can read: 12 tokens"):
        gptsmith.grpo(longer, prompts, reward=str(judge.directory), answer_tokens=8, out=tmp_path / "run", **options)


def test_an_untied_value_model_has_no_output_matrix_in_checkpoints(place: Path, tmp_path: Path) -> None:
    config = tiny_run_config(steps=1, context=48, model={"tie_word_embeddings": False})
    base = gptsmith.fit(place / "text.txt", config, out=tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a\ne\n" * 8)
    options: dict[str, Any] = {
        "device": "cpu",
        "compile": "off",
        "batch_size": 4,
        "answer_tokens": 4,
        "lora": "off",
        "eval_every": 1,
    }
    spec = f"{place / 'rewards.py'}:likes_e"
    run = gptsmith.ppo(base, tmp_path / "prompts.txt", reward=spec, out=tmp_path / "run", steps=2, **options)
    names = list(load_train_state(run.directory / "last").tensors)
    of_values = [name for name in names if "value/" in name]
    assert any("embed_tokens" in name for name in of_values), names
    assert not any("lm_head" in name for name in of_values)
    resumed = gptsmith.fit(resume=run, steps=3)
    assert resumed.status == "finished"


def test_ppo_with_plain_text_and_a_target_for_the_divergence(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ptx": f"{place / 'text.txt'}:0.5", "ptx_rows": 3, "kl_target": 0.1, "entropy": 0.01}
    run = train("ppo", place, tmp_path / "run", micro_batch_size=4, optim={"lr": 0.01}, **options)
    assert len(logged(run, "text_loss")) == FEW["steps"]
    weights = logged(run, "kl_weight")
    assert weights[0] == 0.05
    assert weights[-1] != 0.05


def test_a_reward_that_has_changed_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "prompts.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "rewards.py").write_text(REWARDS)
    run = train("grpo", tmp_path, tmp_path / "run", steps=2, eval_every=2)
    gptsmith.fit(resume=run, steps=3, verbose=True)
    assert "has changed" not in capsys.readouterr().err
    (tmp_path / "rewards.py").write_text(REWARDS + "# another comment\n")
    for name in [name for name in sys.modules if name.startswith("gptsmith_reward_")]:
        del sys.modules[name]
    gptsmith.fit(resume=run, steps=4, verbose=True)
    assert "rewards.py, the reward likes_e, has changed since the run was saved" in capsys.readouterr().err
