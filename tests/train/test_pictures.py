"""Training on pictures with words: a model learns them, parts are frozen or have their own rates, runs resume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptsmith
from gptsmith.checkpoint import CheckpointStore
from gptsmith.cli import main
from gptsmith.data.conversations import Renderer, as_conversation
from gptsmith.data.pictures import PictureReader
from gptsmith.errors import CheckpointError, DataError, UsageError
from gptsmith.loading import load_model
from gptsmith.log import JsonLines
from gptsmith.optim.build import build_optimizers
from gptsmith.train.adapter import adapt, rate_factors
from gptsmith.train.config import AdapterConfig, PictureConfig
from gptsmith.train.run import resume
from tests.forked import Forked
from tests.pictures import captions, seer, write_rows

QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off", "log_every": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seer(tmp_path_factory.mktemp("models") / "seer")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captions(tmp_path_factory.mktemp("rows"))


def weights(run: Any) -> dict[str, torch.Tensor]:
    store = CheckpointStore(Path(run))
    path = store.path(store.steps()[-1])
    return load_file(next(path.glob("*model.safetensors")))


def test_a_tiny_model_learns_to_name_pictures(model: Path, rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": "off", "steps": 100, "batch_size": 16, "eval_every": 100, "packing": False}
    options |= {"optim.name": "muon", "optim.lr": 0.02, "optim.embedding_lr": 0.01, "vision.projector_lr": 1.0}
    options["val"] = str(rows)
    run = gptsmith.sft(model, rows, out=tmp_path / "run", **options, **QUIET)
    losses = [row["val_loss"] for row in JsonLines(tmp_path / "run" / "metrics.jsonl").read() if "val_loss" in row]
    assert losses[-1] < 0.1 < losses[0]
    trained, tokenizer = load_model(run)
    picture_reader = PictureReader.of(trained.config, tokenizer)
    assert picture_reader is not None
    renderer = Renderer(tokenizer, picture_reader=picture_reader)
    folder = rows.parent / "pictures"
    with torch.no_grad():
        for color in ("red", "green", "blue", "black"):
            row = {"image": str(folder / f"{color}-disk.png"), "caption": f"a {color} disk"}
            example = renderer.render(as_conversation(row), folder)
            pixels = picture_reader.pixels(example.images)
            guess = trained(torch.tensor([example.ids]), pixels=pixels)[0].argmax(dim=-1)
            answer = [i for i, counts in enumerate(example.trained) if counts]
            assert guess[[i - 1 for i in answer]].tolist() == [example.ids[i] for i in answer]
            blank = trained(torch.tensor([example.ids]), pixels=torch.ones_like(pixels))[0].argmax(dim=-1)
            if color != "black":
                assert not torch.equal(guess, blank)


RESUMED: dict[str, dict[str, Any]] = {
    "sft": {"lora": "off", "vision.augment": True, "packing": True},
    "lora": {"lora": "on", "vision.augment": True},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_that_is_killed_ends_with_the_same_bits(kind: str, model: Path, rows: Path, tmp_path: Path) -> None:
    options = {**RESUMED[kind], **QUIET, "steps": 24, "batch_size": 4, "eval_every": 12, "save_every": 2}

    def launch(out: Path, resumes: bool = False) -> Forked:
        return Forked(lambda: resume(out) if resumes else gptsmith.sft(model, rows, out=out, **options))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole).wait(timeout=120) == 0
    process = launch(killed)
    deadline = time.monotonic() + 120
    while not CheckpointStore(killed).steps() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert CheckpointStore(killed).steps()[-1] < 24
    assert launch(killed, resumes=True).wait(timeout=120) == 0
    one, other = weights(whole), weights(killed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_notices_that_a_picture_has_changed(model: Path, tmp_path: Path) -> None:
    data = captions(tmp_path, repeat=1)
    gptsmith.sft(model, data, out=tmp_path / "run", lora="off", steps=2, batch_size=4, **QUIET)
    picture = tmp_path / "pictures" / "red-disk.png"
    picture.write_bytes((tmp_path / "pictures" / "blue-disk.png").read_bytes())
    with pytest.raises(CheckpointError, match="has changed"):
        gptsmith.fit(resume=tmp_path / "run", steps=4)


def changed(before: Path, run: Any) -> set[str]:
    """The parts of a model whose weights differ after a run."""
    one, other = load_file(before / "model.safetensors"), weights(run)
    parts = {"vision_tower": "tower", "multi_modal_projector": "projector", "language_model": "text"}
    return {parts[name.partition(".")[0]] for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("freeze", [(), ("text",), ("tower", "projector")])
def test_frozen_parts_stay_as_they_are(freeze: tuple[str, ...], model: Path, rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": "off", "steps": 2, "batch_size": 4, "eval_every": 10, "vision.freeze": freeze}
    run = gptsmith.sft(model, rows, out=tmp_path / "run", **options, **QUIET)
    assert changed(model, run.directory) == {"text", "tower", "projector"} - set(freeze)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_an_adapter_is_saved_with_the_projector_and_peft_reads_it(model: Path, rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": "on", "steps": 4, "batch_size": 4, "eval_every": 10}
    run = gptsmith.sft(model, rows, out=tmp_path / "run", **options, **QUIET)
    stored = weights(run.directory)
    assert any("lora_A" in name for name in stored)
    assert any("multi_modal_projector.linear_1.weight" in name for name in stored)
    assert not any("vision_tower" in name for name in stored)

    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    store = CheckpointStore(run.directory)
    base = hf.AutoModelForImageTextToText.from_pretrained(model)
    theirs = peft.PeftModel.from_pretrained(base, store.path(store.steps()[-1])).eval()
    ours, tokenizer = load_model(run)
    original, _ = load_model(model)
    picture_reader = PictureReader.of(ours.config, tokenizer)
    assert picture_reader is not None
    example = Renderer(tokenizer, picture_reader=picture_reader).render(
        as_conversation({"image": "red-disk.png", "caption": "a red disk"}), rows.parent / "pictures"
    )
    ids, pixels = torch.tensor([example.ids]), picture_reader.pixels(example.images)
    with torch.no_grad():
        found = ours(ids, pixels=pixels)
        assert (theirs(input_ids=ids, pixel_values=pixels).logits - found).abs().max() < 1e-4
        assert (original(ids, pixels=pixels) - found).abs().max() > 1e-3


def test_dpo_learns_from_pictures(model: Path, rows: Path, tmp_path: Path) -> None:
    names = ("red", "green", "blue", "black")
    pairs = [
        {
            "prompt": "what is this?",
            "image": str(rows.parent / "pictures" / f"{color}-{shape}.png"),
            "chosen": f"a {color} {shape}",
            "rejected": f"a {names[(i + 1) % 4]} {shape}",
        }
        for i, color in enumerate(names)
        for shape in ("square", "disk")
    ]
    data = write_rows(tmp_path / "pairs.jsonl", pairs * 3)
    options: dict[str, Any] = {"steps": 60, "batch_size": 8, "eval_every": 60, "optim.lr": 3e-3, "optim.name": "adamw"}
    options |= {"val": str(write_rows(tmp_path / "val.jsonl", pairs)), "beta": 0.5, "vision.projector_lr": 3.0}
    gptsmith.dpo(model, data, out=tmp_path / "run", **options, **QUIET)
    metrics = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    accuracy = [row["val_accuracy"] for row in metrics if "val_accuracy" in row]
    assert accuracy[0] == 0.5
    # The prompts differ in their pictures alone, so without them no more than half could be right.
    assert accuracy[-1] == 1.0


def test_a_student_learns_what_its_teacher_sees(model: Path, rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "eval_every": 25, "packing": False, "val": str(rows)}
    options |= {"optim.name": "adamw", "optim.lr": 3e-3, "vision.projector_lr": 1.0}
    teacher = gptsmith.sft(model, rows, out=tmp_path / "teacher", lora="off", steps=25, **options, **QUIET)
    run = gptsmith.distill(model, rows, teacher=teacher, out=tmp_path / "run", steps=25, **options, **QUIET)
    losses = [row["val_loss"] for row in JsonLines(run.directory / "metrics.jsonl").read() if "val_loss" in row]
    assert losses[-1] < losses[0] - 1
    assert changed(model, run.directory) == {"text", "tower", "projector"}
    other = seer(tmp_path / "other", image_size=32)
    with pytest.raises(UsageError, match="reads none, or others"):
        gptsmith.distill(model, rows, teacher=other, out=tmp_path / "b", steps=2, **options, **QUIET)
    with pytest.raises(UsageError, match="a student answers texts alone, and the data has pictures"):
        gptsmith.distill(model, rows, teacher=teacher, out=tmp_path / "c", on_policy=True, steps=2, **options, **QUIET)


@pytest.mark.parametrize("method", ["sft", "distill"])
def test_augmentation_changes_what_is_learned(method: str, model: Path, rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "batch_size": 4, "lora": "off", **QUIET}
    if method == "distill":
        options["teacher"] = seer(tmp_path / "teacher", family="gpt2")
    plain = getattr(gptsmith, method)(model, rows, out=tmp_path / "plain", **options)
    varied = getattr(gptsmith, method)(model, rows, out=tmp_path / "varied", **{"vision.augment": True}, **options)
    one, other = weights(plain.directory), weights(varied.directory)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_augmentation_is_refused_where_pictures_do_not_vary(model: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "one", "rejected": "two"}] * 4)
    options: dict[str, Any] = {"vision.augment": True, **QUIET}
    with pytest.raises(UsageError, match=r"--vision\.augment: dpo does not vary pictures"):
        gptsmith.dpo(model, pairs, out=tmp_path / "a", **options)
    (tmp_path / "text.txt").write_text("what is this? a red square. user assistant\n" * 60)
    with pytest.raises(UsageError, match=r"--vision\.augment: pretrain does not vary pictures"):
        gptsmith.fit(tmp_path / "text.txt", init=model, out=tmp_path / "b", **options)
    with pytest.raises(UsageError, match="a new model reads no pictures"):
        gptsmith.fit(tmp_path / "text.txt", out=tmp_path / "c", **options)


def test_parts_have_rates_of_their_own(model: Path) -> None:
    seeing, _ = load_model(model)
    pictures = PictureConfig(tower_lr=0.5)
    options: dict[str, Any] = {
        "lr": 0.1,
        "embedding_lr": 0.01,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "betas": (0.9, 0.99),
    }
    for name in ("adamw", "muon"):
        factors = rate_factors(seeing, AdapterConfig(lora="off"), pictures)
        optimizers = build_optimizers(seeing, name=name, rate_factors=factors, **options)
        rates = {p: group["lr"] for group in optimizers.groups for p in group["params"]}
        assert rates.keys() == set(seeing.parameters())
        for p in seeing.parameters():
            base = 0.01 if name == "muon" and optimizers.names[p].endswith(("bias", "embedding.weight")) else None
            if base is not None and optimizers.names[p].startswith("vision"):
                assert rates[p] == pytest.approx(base * 0.5)
        made: Any = seeing
        assert rates[made.projector.linear_1.weight] == pytest.approx(1.0)
        assert rates[made.vision.layers[0].fc1.weight] == pytest.approx(0.05)
        assert rates[made.layers[0].mlp.down_proj.weight] == pytest.approx(0.1)
    beside = rate_factors(seeing, AdapterConfig(lora="on"), PictureConfig())
    assert beside == {}
    adapt(seeing, AdapterConfig(lora="on"), PictureConfig())
    trained = {name.partition(".")[0] for name, p in seeing.named_parameters() if p.requires_grad}
    assert trained == {"layers", "projector"}


def test_what_cannot_be_trained_is_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown part 'towr'"):
        PictureConfig(freeze=("towr",))
    with pytest.raises(UsageError, match=r"--vision\.tower-lr"):
        PictureConfig(tower_lr=0.0)
    freeze = ("text", "tower", "projector")
    with pytest.raises(UsageError, match="nothing to train"):
        gptsmith.sft(model, rows, out=tmp_path / "a", lora="off", **{"vision.freeze": freeze}, **QUIET)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "one", "rejected": "two"}] * 4)
    with pytest.raises(UsageError, match="reads pictures, and reward is for models that read text alone"):
        gptsmith.reward(model, pairs, out=tmp_path / "b", **QUIET)
    from tests.factories import tiny_run_config

    (tmp_path / "text.txt").write_text("what is this? a red square. user assistant\n" * 60)
    text = gptsmith.fit(tmp_path / "text.txt", tiny_run_config(steps=2, context=16), out=tmp_path / "text")
    with pytest.raises(DataError, match="gptsmith vision init"):
        gptsmith.sft(text, rows, out=tmp_path / "c", **QUIET)
    with pytest.raises(UsageError, match="reads no pictures"):
        gptsmith.sft(text, pairs, out=tmp_path / "d", **{"vision.augment": True}, **QUIET)


def test_conversations_that_do_not_fit_are_counted_and_none_is_cut(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rows.parent / "pictures"
    long = {"images": [str(folder / "red-disk.png")] * 9, "caption": "a red disk"}  # 36 tokens of pictures alone
    short = {"image": str(folder / "blue-disk.png"), "caption": "a blue disk"}
    data = write_rows(tmp_path / "rows.jsonl", [long, short] * 4)
    options: dict[str, Any] = {"lora": "off", "steps": 2, "batch_size": 2, "context": 32, "verbose": True}
    gptsmith.sft(model, data, out=tmp_path / "run", **options, **QUIET)
    assert "are longer than the context of 32 and are left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="longer than --context 32"):
        gptsmith.sft(model, data, out=tmp_path / "other", too_long="error", **options, **QUIET)


def test_a_forecast_counts_the_tower_and_the_pictures(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(directory: Path, *options: str) -> dict[str, Any]:
        arguments = ["plan", "sft", str(directory), str(rows), "--lora", "off", "--device", "cpu", "--compile", "off"]
        assert main([*arguments, "--json", *options]) == 0
        seen = capsys.readouterr()
        assert " pictures" in seen.err
        found: dict[str, Any] = json.loads(seen.out)
        return found

    small, large = planned(model), planned(seer(tmp_path / "large", tower_layers=9))
    block = 4 * 32 * 33 + 4 * 32 + 2 * 128 * 32 + 32 + 128  # parameters
    assert large["parameters"]["total"] - small["parameters"]["total"] == 8 * block
    frozen = planned(tmp_path / "large", "--vision.freeze", "tower")
    state = 4 * 2 * block  # of AdamW, in bytes
    held = [found["memory"]["weights"] + found["memory"]["optimizer"] for found in (small, large, frozen)]
    assert held[1] - held[0] >= 8 * (4 * block + state)
    assert held[1] - held[2] >= 9 * state


def test_a_budget_is_spent_on_pictures(model: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--lora", "off", "--device", "cpu", "--compile", "off", "--batch-size", "8"]
    assert main(["sft", str(model), str(rows), "--budget", "4ktok", "--out", str(tmp_path / "run"), *options]) == 0
    tokens = [row["tokens"] for row in JsonLines(tmp_path / "run" / "metrics.jsonl").read() if "tokens" in row]
    assert 2000 < tokens[-1] < 6000


@pytest.mark.parametrize("method", ["reward", "classify"])
@pytest.mark.parametrize("command", [(), ("plan",)], ids=["run", "plan"])
def test_methods_for_texts_refuse_models_with_eyes(
    method: str, command: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": "x", "chosen": "one", "rejected": "two"}, {"prompt": "y", "chosen": "one", "rejected": "two"}]
    labels = [{"text": "one", "label": "good"}, {"text": "two", "label": "bad"}]
    data = write_rows(tmp_path / "rows.jsonl", (pairs if method == "reward" else labels) * 4)
    where = [] if command else ["--out", str(tmp_path / "run")]
    assert main([*command, method, str(model), str(data), *where]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error:")
    assert f"reads pictures, and {method} is for models that read text alone" in lines[-1]


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_prompts_with_pictures_are_refused(
    method: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(rows.parent / "pictures" / "red-disk.png")
    part = {"type": "image_url", "image_url": {"url": image}}
    for row in ({"image": image, "prompt": "what?"}, {"messages": [{"role": "user", "content": [part]}]}):
        data = write_rows(tmp_path / "prompts.jsonl", [row] * 4)
        where = ["--reward", "length:8", "--out", str(tmp_path / "run")]
        assert main([method, str(model), str(data), *where]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error:")
        assert "the prompt has a picture" in error
