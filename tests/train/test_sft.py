"""Supervised fine-tuning, from rows of conversations to a model that answers and is served."""

from __future__ import annotations

import json
import shutil
import string
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.data.conversations import Renderer, as_conversation
from gptsmith.data.packing import packed_batch
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import DataError, UsageError
from gptsmith.formats.hf import save_model
from gptsmith.model.loss import token_loss_sum
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.train.chats import ChatFiles
from gptsmith.train.config import SftConfig, default_config
from tests.factories import tiny_run_config
from tests.forked import Forked, command

ANIMALS = ("cat", "dog", "bird", "fish")
QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off"}


def rows(count: int = 48) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Where is the {ANIMALS[i % 4]}?"},
                {"role": "assistant", "content": f"The {ANIMALS[i % 4]} is here."},
            ]
        }
        for i in range(count)
    ]


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, values)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of characters without a chat template."""
    place = tmp_path_factory.mktemp("base")
    text = "".join(f"The {animal} is here. Where is the {animal}?\n" for animal in ANIMALS) * 40
    (place / "text.txt").write_text(text + (string.printable.replace("\r", "") + "\n") * 12)
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=60, eval_every=60, context=256, model=model)
    return gptsmith.fit(place / "text.txt", config, out=place / "run").directory


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", rows())


@pytest.mark.report
def test_it_learns_to_answer_and_to_stop(base: Path, chats: Path, tmp_path: Path, run_cli: Any) -> None:
    code, _, err = run_cli(
        *("sft", base, chats, "--out", tmp_path / "run", "--lora", "off", "--optim.name", "adamw", "--optim.lr", 0.004),
        *("--epochs", 60, "--sample-tokens", 20, "--compile", "off", "--eval-every", 20),
    )
    assert code == 0, err
    assert "chat template: the model has none and gets ChatML" in err
    assert "48 conversations (messages 48), 4 of them held out" in err
    run = gptsmith.runs(tmp_path / "run")[0]
    start, *_, end = [row for row in run.metrics if "val_loss" in row]
    assert start["step"] == 0
    assert end["val_loss"] < 0.1 < 1 < start["val_loss"]
    assert start["text_bits_per_byte"] != end["text_bits_per_byte"]
    report = (run.directory / "report.html").read_text()
    assert "Validation loss before" in report
    assert (
        f"{start['text_bits_per_byte']:.3f}<small>bits per byte: forgetting; {end['text_bits_per_byte']:.3f}" in report
    )
    samples = run.samples
    assert {sample["step"] for sample in samples} >= {0, end["step"]}
    assert samples[-1]["text"].startswith("The ")

    model, tokenizer = gptsmith.load(run)
    assert tokenizer.token_text(int(tokenizer.eos_id or 0)) == "<|im_end|>"
    prompt = ChatTemplate(tokenizer).encode([{"role": "user", "content": "Where is the fish?"}])
    params = SamplingParams(max_tokens=40, temperature=0.0, stop_ids=tokenizer.end_ids)
    completion = Engine(model).generate([prompt], params)[0].completions[0]
    assert tokenizer.decode(completion.ids) == "The fish is here."
    assert completion.finish_reason == "stop"

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run.directory / "best", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(torch.tensor([prompt])).logits, model(torch.tensor([prompt])), atol=1e-3)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(run.directory / "best")
    messages = [{"role": "user", "content": "Where is the fish?"}]
    assert theirs_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt


def test_the_loss_is_that_of_transformers(base: Path, chats: Path, tmp_path: Path) -> None:
    """Mean cross-entropy over the trained tokens, and its gradient, for conversations packed into rows."""
    transformers = pytest.importorskip("transformers")
    run = gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", steps=1, lora="off", **QUIET)
    model, tokenizer = gptsmith.load(run)
    config = default_config(SftConfig)
    prepared = ChatFiles.open(str(chats), config).prepare(config, tokenizer)
    batch = packed_batch(prepared.train, [[0, 1, 2], [3]], 256)
    loss = token_loss_sum(model, *batch) / batch.num_targets
    loss.backward()
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for ids, trained, _ in (prepared.train[i] for i in range(4)):
        labels = torch.tensor([[id if t else -100 for id, t in zip(ids, trained, strict=True)]])
        n = int((labels[:, 1:] != -100).sum())
        total = total + theirs(torch.tensor([ids]), labels=labels).loss * n
        count += n
    (total / count).backward()
    assert count == batch.num_targets
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    ours, their = model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad
    assert ours is not None
    assert torch.allclose(ours, their, atol=1e-5)


def test_trl_trains_on_the_same_tokens(base: Path, chats: Path, tmp_path: Path) -> None:
    """TRL's SFTTrainer has the same loss on the same ids and masks."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    warnings.simplefilter("ignore")
    run = gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", steps=1, lora="off", **QUIET)
    model, tokenizer = gptsmith.load(run)
    config = default_config(SftConfig)
    prepared = ChatFiles.open(str(chats), config).prepare(config, tokenizer)
    examples = [prepared.train[i] for i in range(4)]
    data = datasets.Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(t) for t in trained]} for ids, trained, *_ in examples]
    )
    trainer = trl.SFTTrainer(
        model=str(run.directory / "best"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            bf16=False,
            fp16=False,
            completion_only_loss=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=data,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch).item()
    ours = packed_batch(prepared.train, [[0, 1, 2, 3]], 256)
    loss = token_loss_sum(model, *ours) / ours.num_targets
    assert int((batch["labels"][:, 1:] != -100).sum()) == ours.num_targets
    assert loss.item() == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("lora", ["on", "off"])
def test_any_micro_batch_gives_the_same_gradient(lora: str, base: Path, tmp_path: Path) -> None:
    """Rows with very different numbers of trained tokens (transformers#34191, nanochat `chat_sft.py`)."""
    values = rows(7)
    values[3]["messages"][1]["content"] *= 9
    chats = write(tmp_path / "chats.jsonl", values)
    run = gptsmith.fit(
        chats,
        objective="sft",
        init=base,
        out=tmp_path / "run",
        steps=1,
        lora=lora,
        packing=False,
        batch_size=6,
        **QUIET,
    )
    gradients = []
    for size in (6, 3, 1):
        again = gptsmith.fit(
            chats,
            objective="sft",
            init=base,
            out=tmp_path / f"run-{size}",
            steps=1,
            lora=lora,
            packing=False,
            batch_size=6,
            micro_batch_size=size,
            **QUIET,
        )
        gradients.append(next(row["grad_norm"] for row in again.metrics if "grad_norm" in row))
    assert gradients == pytest.approx([gradients[0]] * 3, rel=1e-4)
    assert run.metrics[1]["grad_norm"] == pytest.approx(gradients[0], rel=1e-6)


def start_process(base: Path, chats: Path, out: Path, *more: str) -> Forked:
    return command(
        *("sft", base, chats, "--out", out, "--steps", 40, "--save-every", 1, "--eval-every", 10),
        *("--sample-tokens", 0, "--compile", "off", "--keep-checkpoints", 3, *more),
    )


@pytest.mark.parametrize("options", [(), ("--lora", "off", "--replay", "TEXT:0.2")], ids=["lora", "full-replay"])
def test_killed_and_resumed(options: tuple[str, ...], base: Path, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat is here.\n" * 100)
    more = [option.replace("TEXT", str(tmp_path / "text.txt")) for option in options]
    whole = start_process(base, chats, tmp_path / "whole", *more)
    killed = start_process(base, chats, tmp_path / "killed", *more)
    for limit in (8, 20):
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            steps = [int(p.name[5:]) for p in (tmp_path / "killed" / "checkpoints").glob("step-*")]
            if killed.poll() is not None or (steps and max(steps) >= limit):
                break
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        killed = command("train", "--resume", tmp_path / "killed")
    assert killed.wait(timeout=120) == 0
    assert whole.wait(timeout=120) == 0
    name = "model.safetensors" if "off" in options else "adapter_model.safetensors"
    last = Path("checkpoints") / "step-00000040" / name
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    one, other = (gptsmith.runs(tmp_path / each)[0] for each in ("whole", "killed"))
    assert [row.get("loss") for row in one.metrics] == [row.get("loss") for row in other.metrics]


def test_replay_and_validation_data(base: Path, chats: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The dog is here.\n" * 200)
    val = write(tmp_path / "val.jsonl", rows(8))
    run = gptsmith.fit(
        chats,
        objective="sft",
        init=base,
        out=tmp_path / "run",
        steps=3,
        val=str(val),
        replay=f"{text}:0.25",
        batch_size=4,
        **QUIET,
    )
    assert run.part("data")["val_rows"] == 8
    assert run.part("data")["train_rows"] == 48


def test_prompts_with_completions_need_no_template(base: Path, tmp_path: Path) -> None:
    values = [{"prompt": f"Where is the {a}?", "completion": f" The {a} is here."} for a in ANIMALS * 6]
    chats = write(tmp_path / "pairs.jsonl", values)
    run = gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", steps=2, lora="off", **QUIET)
    _, tokenizer = gptsmith.load(run)
    assert ChatTemplate(tokenizer).plain
    assert tokenizer.vocab_size == gptsmith.load(base)[1].vocab_size
    assert as_conversation(values[0]).is_text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {}, r"chats.jsonl, line 3: the conversation has no turn"),
        ({"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "a"}]}, {}, "line 3: .*'é'"),
        (None, {"context": 16}, "every conversation is longer than --context 16; the shortest has"),
        (None, {"too_long": "error", "context": 64}, "are longer than --context 64"),
        (None, {"replay": "nothing"}, "--replay nothing: write CORPUS:SHARE"),
        (None, {"epochs": 0.0}, "--epochs must be above 0"),
        (None, {"context": 1000}, "--context 1000 is longer than the model's 256"),
    ],
)
def test_bad_input(change: Any, options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    values = rows(8)
    values[1]["messages"][1]["content"] *= 2
    if change is not None:
        values[2] = change
    chats = write(tmp_path / "chats.jsonl", values)
    with pytest.raises((DataError, UsageError), match=message):
        gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", **{"steps": 2, **QUIET, **options})
    assert not (tmp_path / "run").exists()


def test_rows_left_out_are_counted(base: Path, tmp_path: Path, run_cli: Any) -> None:
    values = rows(10)
    values[2] = {"messages": [{"role": "user", "content": "a"}]}
    values[5]["messages"][1]["content"] *= 20
    chats = write(tmp_path / "chats.jsonl", values)
    code, _, err = run_cli(
        *("sft", base, chats, "--out", tmp_path / "run", "--steps", 1, "--bad-rows", "skip", "--context", 80),
        *("--sample-tokens", 0, "--compile", "off"),
    )
    assert code == 0, err
    assert "left out 1 rows: 1: the conversation has no turn of the assistant" in err
    assert "1 conversations are longer than the context of 80 and are left out: " in err


def test_needs_a_model(chats: Path, tmp_path: Path, run_cli: Any) -> None:
    for arguments, message in (
        (["sft"], "No model and no data given. Use: gptsmith sft MODEL DATA"),
        (["sft", "nothing"], "No data given"),
        (["sft", "nothing", chats], "there is no model at nothing"),
        (["sft", chats, "nothing"], "no such file, folder or named data set: 'nothing'"),
    ):
        code, _, err = run_cli(*arguments)
        assert code in (1, 2)
        assert message in err
    with pytest.raises(UsageError, match="sft starts from a model"):
        gptsmith.fit(chats, objective="sft", out=tmp_path / "run")


def test_ids_of_training_are_those_of_serving(base: Path, chats: Path, tmp_path: Path) -> None:
    """A served model sees the prompt that it was trained on (Soup#781: trained with one BOS, served with two)."""
    run = gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", steps=1, **QUIET)
    _, tokenizer = gptsmith.load(run)
    conversation = as_conversation(rows(1)[0])
    ids = Renderer(tokenizer).render(conversation).ids
    prompt = ChatTemplate(tokenizer).encode([dict(conversation.messages[0])])
    assert ids[: len(prompt)] == prompt == Renderer(tokenizer).prompt(conversation)


def test_resumed_where_the_data_has_moved(base: Path, chats: Path, tmp_path: Path, run_cli: Any) -> None:
    run = gptsmith.fit(chats, objective="sft", init=base, out=tmp_path / "run", steps=4, save_every=2, **QUIET)
    shutil.rmtree(run.directory / "checkpoints" / "step-00000004")
    (run.directory / "run.json").write_text(json.dumps({**run.info, "status": "running"}))
    moved = chats.rename(tmp_path / "moved.jsonl")
    code, _, err = run_cli("sft", "--resume", run.directory)
    assert code == 2
    assert "Say where the text is now" in err
    code, _, err = run_cli("sft", moved, "--resume", run.directory)
    assert code == 0, err
    assert gptsmith.runs(run.directory)[0].status == "finished"


def test_the_validation_split_of_a_data_set(base: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", rows(20))
    write(tmp_path / "set" / "validation.jsonl", rows(6))
    write(tmp_path / "set" / "test.jsonl", rows(3))
    config = default_config(SftConfig)
    tokenizer = gptsmith.load(base)[1]
    files = ChatFiles.open(str(tmp_path / "set"), config)
    prepared = files.prepare(config, tokenizer)
    assert (len(prepared.train), len(prepared.val)) == (20, 6)
    assert files.places() == {"spec": str(tmp_path / "set"), "val": None}
    other = write(tmp_path / "other.jsonl", rows(4))
    files = ChatFiles.open(str(tmp_path / "set"), config.replace(val=str(other)))
    assert len(files.prepare(config, tokenizer).val) == 4
    assert files.places()["val"] == str(other)
    files = ChatFiles.open(str(other), config.replace(val=str(tmp_path / "set")))
    assert (len(files.prepare(config, tokenizer).train), len(files.prepare(config, tokenizer).val)) == (4, 6)
