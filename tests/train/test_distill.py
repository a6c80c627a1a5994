"""Distillation: the divergences by their formulas, and a student that comes near its teacher."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.errors import UsageError
from gptsmith.train.objectives import distill
from gptsmith.train.objectives.distill import kl_sum
from tests.factories import tiny_model, tiny_run_config

QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off"}
ANIMALS = ("cat", "dog", "bird", "fish")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A teacher that answers, an untaught student of another size with the same vocabulary, and the conversations."""
    place = tmp_path_factory.mktemp("models")
    text = "".join(f"The {animal} is here. Where is the {animal}?\n" for animal in ANIMALS) * 40
    (place / "text.txt").write_text(text + (string.printable.replace("\r", "") + "\n") * 12)
    found = []
    for width, layers in ((48, 2), (32, 1)):
        model = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
        config = tiny_run_config(steps=40, eval_every=40, context=128, model=model)
        found.append(gptsmith.fit(place / "text.txt", config, out=place / f"base-{width}").directory)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Where is the {animal}?"},
                {"role": "assistant", "content": f"The {animal} is here."},
            ]
        }
        for animal in ANIMALS * 6
    ]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"lora": "off", "epochs": 40, "optim": {"name": "adamw", "lr": 0.004}, **QUIET}
    teacher = gptsmith.sft(found[0], place / "chats.jsonl", out=place / "teacher", **options)
    return teacher.directory, found[1], place / "chats.jsonl"


@pytest.mark.parametrize("reverse", [False, True])
def test_divergence_and_gradient_equal_torchs(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_model("llama"), tiny_model("gpt2", seed=1, vocab_size=40)
    ids = torch.randint(0, 30, (2, 9))
    mask = torch.rand(2, 9) < 0.6
    with torch.no_grad():
        theirs = teacher.hidden_states(ids)
    monkeypatch.setattr(distill, "MAX_LOGITS", 4 * 30 * 3)  # three tokens at a time
    kl_sum(student.lm_head, student.hidden_states(ids), teacher.lm_head, theirs, mask, 30, reverse=reverse).backward()
    found = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    q = student(ids)[mask].log_softmax(-1)
    p = teacher.lm_head(theirs)[..., :30][mask].detach().log_softmax(-1)
    one, other = (p, q) if reverse else (q, p)  # torch: the first is in the logarithm, the second is the expectation
    torch.nn.functional.kl_div(one, other, reduction="sum", log_target=True).backward()
    for name, parameter in student.named_parameters():
        expected = parameter.grad
        assert expected is not None
        actual = found[name]
        assert actual is not None
        assert torch.allclose(actual, expected, atol=1e-4), name


@pytest.mark.parametrize("on_policy", [False, True])
def test_the_student_comes_near_the_teacher(
    on_policy: bool, models: tuple[Path, Path, Path], tmp_path: Path, run_cli: Any
) -> None:
    teacher, student, chats = models
    rate = 0.0002 if on_policy else 0.004
    options = ["--lora", "off", "--optim.name", "adamw", "--optim.lr", rate, "--sample-tokens", 0, "--compile", "off"]
    if on_policy:  # from a student that can say something
        started = gptsmith.distill(
            student,
            chats,
            teacher=teacher,
            out=tmp_path / "first",
            epochs=20,
            lora="off",
            optim={"name": "adamw", "lr": 0.004},
            **QUIET,
        )
        student = started.directory
        options += ["--on-policy", "--answer-tokens", 30, "--steps", 15, "--batch-size", 4, "--eval-every", 5]
    else:
        options += ["--epochs", 40, "--eval-every", 20]
    code, _, err = run_cli("distill", student, chats, "--teacher", teacher, "--out", tmp_path / "run", *options)
    assert code == 0, err
    run = gptsmith.runs(tmp_path / "run")[0]
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    evaluations = [row["val_loss"] for row in run.metrics if "val_loss" in row]
    assert losses[-1] < losses[0]
    if on_policy:
        assert all("answer_tokens" in row for row in run.metrics if "loss" in row)
        assert evaluations[-1] < evaluations[0] + 0.2
    else:
        assert evaluations[-1] < 0.5 * evaluations[0]
    assert gptsmith.load(run)[1].fingerprint == gptsmith.load(teacher)[1].fingerprint


@pytest.mark.parametrize("on_policy", [False, True])
def test_resumed_bit_for_bit(on_policy: bool, models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, chats = models
    whole = gptsmith.distill(
        student,
        chats,
        teacher=teacher,
        out=tmp_path / "whole",
        steps=4,
        save_every=2,
        batch_size=3,
        log_every=1,
        on_policy=on_policy,
        answer_tokens=12,
        lora={"rank": 2},
        **QUIET,
    )
    out = Path(shutil.copytree(whole.directory, tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    again = gptsmith.fit(resume=out)
    assert [row.get("loss") for row in again.metrics] == [row.get("loss") for row in whole.metrics]
    name = Path("checkpoints") / "step-00000004" / "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole.directory / name).read_bytes()


def test_another_vocabulary(models: tuple[Path, Path, Path], tmp_path: Path, run_cli: Any) -> None:
    teacher, student, chats = models
    (tmp_path / "text.txt").write_text("other letters\n" * 200)
    config = tiny_run_config(steps=2, eval_every=2, context=16)
    other = gptsmith.fit(tmp_path / "text.txt", config, out=tmp_path / "other")
    with pytest.raises(UsageError, match="have different vocabularies"):
        gptsmith.distill(other, chats, teacher=teacher, out=tmp_path / "run", **QUIET)
    for arguments, message in (
        (["distill", student, chats], "No teacher given"),
        (["distill", student, chats, "--teacher", "nothing"], "there is no model at nothing"),
        (["distill", student, chats, "--teacher", teacher, "--replay", "x:0.1"], "--replay is for fine-tuning"),
    ):
        code, _, err = run_cli(*arguments, "--out", tmp_path / "run")
        assert code in (1, 2)
        assert message in err
