"""Fine-tuning, preferences, reward models, PPO and GRPO by several processes: the losses of one."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith import api
from gptsmith.formats.safetensors import open_weights
from gptsmith.log import JsonLines
from gptsmith.run_directory import read_run
from tests.distributed.processes import results, run_processes
from tests.factories import tiny_run_config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

OPTIONS: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "steps": 6, "eval_every": 3, "log_every": 1}
WORDS = ("cat", "dog", "bird", "fish", "horse", "cow")
REWARD = """
def likes_e(prompts, completions):
    return [text.count("e") / max(1, len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, and data of unequal lengths for each method."""
    place = tmp_path_factory.mktemp("objectives")
    text = "".join(f"Q: {a}?\nA: yes {a}.\nA: no {a}.\n" for a in WORDS) * 60
    (place / "text.txt").write_text(text + (string.printable.replace("\r", "") + "\n") * 12)
    model: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    experts = {"family": "mixtral", "num_experts": 4, "num_experts_per_tok": 2}
    config = tiny_run_config(steps=30, eval_every=30, context=64, model=model, tokenizer="bpe", vocab_size=272)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write_report", lambda directory: None)
        gptsmith.fit(place / "text.txt", config, out=place / "base")
        gptsmith.fit(place / "text.txt", config.replace(model=model | experts), out=place / "experts")
    pairs = [
        {"prompt": f"{i} Q: {word * (1 + i % 3)}?\nA:", "chosen": f" yes {word}.", "rejected": f" no, it is no {word}."}
        for i in range(6)
        for word in WORDS
    ]
    rows = {
        "pairs": pairs,
        "chats": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "skewed": [{"prompt": row["prompt"], "completion": row["chosen"] * (1 + i % 7)} for i, row in enumerate(pairs)],
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
    }
    for name, each in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    (place / "rewards.py").write_text(REWARD)
    return place


def train(method: str, place: Path, out: Path, options: dict[str, Any]) -> None:
    data = {"sft": "chats", "dpo": "pairs", "reward": "pairs", "ppo": "prompts", "grpo": "prompts"}[method]
    more: dict[str, Any] = {}
    if method in ("ppo", "grpo"):
        more = {"reward": f"{place / 'rewards.py'}:likes_e", "answer_tokens": 6, "eval_prompts": 3}
        more |= {"group_size": 4} if method == "grpo" else {"passes": 2}
    function = getattr(gptsmith, method)
    function(place / "base", place / f"{data}.jsonl", out=out, **{**OPTIONS, "batch_size": 8, **more, **options})


def train_all(cases: list[tuple[str, str, Path, dict[str, Any]]], place: Path) -> None:
    """Several runs: method, model, directory, options."""
    for method, model, out, options in cases:
        data = {"sft": "skewed", "dpo": "pairs"}[method]
        getattr(gptsmith, method)(place / model, place / f"{data}.jsonl", out=out, **OPTIONS | options)


def rows(run: Path, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in read_run(run).metrics if all(name in row for name in names)]


def assert_same(method: str, layout: str, processes: int, place: Path, folder: Path, **options: Any) -> None:
    train(method, place, folder / "one", options)
    results(run_processes(processes, folder, train, method, place, folder / "run", {**options, "parallel": layout}))
    assert_same_run(folder / "one", folder / "run")


def assert_same_run(one: Path, other: Path) -> None:
    for names in (("step", "loss", "grad_norm"), ("step", read_run(one).selection.metric)):
        expected = rows(one, *names)
        assert expected
        assert rows(other, *names) == [pytest.approx(row, abs=1e-5, rel=1e-4) for row in expected]


@pytest.mark.parametrize(
    ("method", "layout", "options"),
    [
        ("sft", "fsdp", {"lora": "off"}),
        ("dpo", "fsdp", {}),
        ("dpo", "tp=2", {"lora": "off", "optim": {"name": "adamw"}}),
        ("grpo", "dp", {}),
        pytest.param("sft", "tp=2", {"lora": "off"}, marks=pytest.mark.slow),
        pytest.param("sft", "fsdp", {"lora": "on"}, marks=pytest.mark.slow),
        pytest.param("dpo", "fsdp", {"loss": "kto"}, marks=pytest.mark.slow),
        pytest.param("reward", "fsdp", {}, marks=pytest.mark.slow),
        pytest.param("ppo", "dp", {}, marks=pytest.mark.slow),
    ],
)
def test_two_processes(method: str, layout: str, options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    assert_same(method, layout, 2, place, tmp_path, **options)
    if method == "grpo":  # the processes sample the answers that one would
        texts = [[row["text"] for row in JsonLines(tmp_path / run / "rollouts.jsonl").read()] for run in ("one", "run")]
        assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), [("sft", "hsdp=2x2"), ("dpo", "fsdp=2,tp=2")])
def test_four_processes(method: str, layout: str, place: Path, tmp_path: Path) -> None:
    assert_same(method, layout, 4, place, tmp_path, lora="off")


CELLS = [(method, optimizer) for method in ("sft", "dpo") for optimizer in ("muon", "adamw")]


def cells(model: str, folder: Path, layout: str) -> list[tuple[str, str, Path, dict[str, Any]]]:
    """Runs of twenty steps, of each method by each optimizer."""
    options = {"steps": 20, "eval_every": 10, "batch_size": 8, "lora": "off", "parallel": layout}
    return [
        (method, model, folder / f"{method}-{optimizer}", options | {"optim": {"name": optimizer}})
        for method, optimizer in CELLS
    ]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The runs of one process, by model."""
    for model in ("base", "experts"):
        train_all(cells(model, place / "alone" / model, "dp"), place)
    return place / "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "processes"),
    [("dp", 2), ("dp", 4), ("fsdp", 2), ("hsdp=2x2", 4), ("tp=2", 2), ("fsdp=2,tp=2", 4), ("ep=2", 2)],
)
def test_twenty_steps_and_their_weights(layout: str, processes: int, place: Path, alone: Path, tmp_path: Path) -> None:
    """Fine-tuning on rows of very unequal counts, and preferences; by Muon and by AdamW."""
    model = "experts" if "ep" in layout else "base"
    results(run_processes(processes, tmp_path, train_all, cells(model, tmp_path, layout), place, seconds=300))
    for method, optimizer in CELLS:
        one, other = alone / model / f"{method}-{optimizer}", tmp_path / f"{method}-{optimizer}"
        assert_same_run(one, other)
        assert rows(other, "step", "loss")[-1][0] == 20
        expected, found = open_weights(one / "last"), open_weights(other / "last")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.allclose(tensor, found[name], atol=1e-5), (method, optimizer, name)
