"""Reward models: the loss, held-out measures, checkpoints that transformers reads, and resuming."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.data.conversations import Example
from gptsmith.formats.hf_heads import load_classifier, reward_scale
from gptsmith.loading import resolve_model
from gptsmith.run_directory import Run
from gptsmith.train.objectives.reward import PairBatch, measures, preference_losses
from gptsmith.train.preferences import Pair, Pairs
from tests.factories import tiny_run_config

GOOD, BAD = (
    ("a fine film", "good fun", "a good cast", "fine work"),
    ("a dull film", "bad fun", "a bad cast", "dull work"),
)
QUICK: dict[str, Any] = {"device": "cpu", "lora": "off", "optim": {"name": "adamw", "lr": 0.003}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reward")
    rng = random.Random(0)
    (place / "text.txt").write_text("a story: see it is " + ". ".join(rng.choice(GOOD + BAD) for _ in range(600)))
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=20, eval_every=20, context=64, model=model)
    for name, tied in (("base", True), ("untied", False)):
        gptsmith.fit(place / "text.txt", config.replace(model={"tie_word_embeddings": tied}), out=place / name)
    rows = [
        {"prompt": rng.choice(("it is ", "a story: ", "see ")), "chosen": rng.choice(GOOD), "rejected": rng.choice(BAD)}
        for _ in range(160)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Run:
    return gptsmith.reward(place / "base", place / "pairs.jsonl", out=place / "rm", epochs=4, **QUICK)


def test_it_learns_what_is_preferred(trained: Run) -> None:
    first, *_, last = [row for row in trained.metrics if "val_loss" in row]
    assert first["val_loss"] == pytest.approx(0.6931, abs=1e-3)  # all scores are 0
    assert last["val_accuracy"] > 0.9
    assert last["val_loss"] < 0.4
    for name in ("val_calibration", "val_length_bias", "val_accuracy_shorter", "val_accuracy_longer"):
        assert name in last


def test_default_rates(place: Path, tmp_path: Path) -> None:
    """Muon trains all weights at the rates of a new model, AdamW at those of other methods."""
    for name, rates in (("muon", (0.02, 0.01)), ("adamw", (1e-4, None))):
        run = gptsmith.reward(
            place / "base", place / "pairs.jsonl", out=tmp_path / name, steps=1, device="cpu", optim={"name": name}
        )
        optim = run.options["optim"]
        assert optim["name"] == name
        assert optim["lr"] == pytest.approx(rates[0])
        assert rates[1] is None or optim["embedding_lr"] == pytest.approx(rates[1])


def test_transformers_reads_it_with_equal_scores(trained: Run) -> None:
    transformers = pytest.importorskip("transformers")
    directory = resolve_model(trained.directory)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    ours, pad = load_classifier(directory)
    assert pad == theirs.config.pad_token_id
    assert theirs.config.num_labels == 1
    ids = torch.randint(1, 12, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-4)
    mean, std = reward_scale(directory) or (0.0, 0.0)
    assert std > 0.1
    assert abs(mean) < 5


def test_an_adapter_is_folded_in(place: Path, tmp_path: Path) -> None:
    options = {**QUICK, "lora": {"rank": 4}, "steps": 24, "optim": {"lr": 0.01}}
    run = gptsmith.reward(place / "base", place / "pairs.jsonl", out=tmp_path / "rm", **options)
    best = [row["val_loss"] for row in run.metrics if "val_loss" in row]
    assert min(best) < 0.6
    classifier, _ = load_classifier(resolve_model(run.directory))
    assert not any("lora" in name for name, _ in classifier.named_parameters())
    assert classifier.score.weight.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}], ids=["whole", "adapter"])
@pytest.mark.parametrize("base", ["base", "untied"])
def test_resumed_bit_for_bit(base: str, options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    settings = {**QUICK, **options, "steps": 6, "save_every": 3, "eval_every": 3, "log_every": 1, "batch_size": 6}
    whole = gptsmith.reward(place / base, place / "pairs.jsonl", out=tmp_path / "whole", **settings)
    out = Path(shutil.copytree(whole.directory, tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    again = gptsmith.fit(resume=out)
    assert [row.get("loss") for row in again.metrics] == [row.get("loss") for row in whole.metrics]
    for name in ("model.safetensors", "config.json", "train/state.safetensors"):
        file = Path("checkpoints") / "step-00000006" / name
        assert (out / file).read_bytes() == (whole.directory / file).read_bytes(), name


def test_the_last_token_is_found_by_length(trained: Run) -> None:
    """Neither padding nor its id changes a score, nor does an end token inside the prompt."""
    classifier, _ = load_classifier(resolve_model(trained.directory))
    texts = [[3, 0, 4, 5], [6, 7]]
    chosen, rejected = (Example(ids, [False, *[True] * (len(ids) - 1)]) for ids in texts)
    pairs = Pairs([Pair(chosen, rejected, None, "row 1")])
    batch = PairBatch.of(pairs, [0])
    with torch.no_grad():
        together = classifier(torch.cat([batch.chosen, batch.rejected]), last=batch.lengths.T.flatten() - 1)[:, 0]
        alone = torch.stack([classifier(torch.tensor([ids]))[0, 0] for ids in texts])
    torch.testing.assert_close(together, alone)


def test_what_a_template_writes_after_an_answer_is_not_scored() -> None:
    """An answer that is sampled ends with its end token, so that is where scores are read in training, too."""
    example = Example([1, 2, 3, 4, 5], [False, False, True, True, False])
    batch = PairBatch.of(Pairs([Pair(example, example, None, "row 1")]), [0])
    assert batch.chosen.tolist() == [[1, 2, 3, 4]]
    assert batch.lengths.tolist() == [[4, 4]]


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_is_trls(centering: float, with_margin: bool) -> None:
    """TRL's RewardTrainer.compute_loss on the same scores."""
    from types import SimpleNamespace

    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
    torch.manual_seed(0)
    chosen, rejected = torch.randn(5), torch.randn(5)
    margins = torch.rand(5) if with_margin else torch.zeros(5)
    logits = torch.cat([chosen, rejected])[:, None]

    class Model:
        def __call__(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=logits)

    metrics: Any = __import__("collections").defaultdict(lambda: __import__("collections").defaultdict(list))
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=centering or None, disable_dropout=True),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=metrics,
        _total_train_tokens=0,
        aux_loss_enabled=False,
        _tp_size=1,
        state=SimpleNamespace(num_input_tokens_seen=0),
    )
    inputs = {"input_ids": torch.zeros(10, 3, dtype=torch.int64), "attention_mask": torch.ones(10, 3)}
    if with_margin:
        inputs["margin"] = margins
    theirs = reward_trainer.RewardTrainer.compute_loss(trainer, Model(), dict(inputs))
    ours = preference_losses(chosen, rejected, margins, centering).mean()
    torch.testing.assert_close(ours, theirs if isinstance(theirs, torch.Tensor) else theirs[0])


def test_measures_of_known_scores() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    lengths = torch.tensor([[5, 3], [2, 2], [1, 4], [6, 2]])
    found = measures(chosen, rejected, lengths)
    assert found["val_accuracy"] == pytest.approx(2.5 / 4)
    assert found["val_accuracy_longer"] == 1.0
    assert found["val_accuracy_shorter"] == 0.0
    assert found["val_length_bias"] > 0.5
    assert found["val_calibration"] == pytest.approx(
        0.75 * abs(torch.tensor(2.0).sigmoid().item() - 2 / 3) + 0.25 * 0.5, abs=1e-6
    )


def test_it_scores_answers_in_training(trained: Run, place: Path, tmp_path: Path) -> None:
    (place / "prompts.txt").write_text("it is \nsee \na story: \n" * 4)
    run = gptsmith.grpo(
        place / "base",
        place / "prompts.txt",
        reward=trained.directory,
        out=tmp_path / "run",
        steps=3,
        batch_size=8,
        group_size=4,
        answer_tokens=6,
        eval_prompts=2,
        device="cpu",
        sample_tokens=0,
    )
    assert all(abs(row["reward"]) < 10 for row in run.metrics if "reward" in row)


def test_rated_answers_are_refused(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "it is ", "completion": text, "label": text in GOOD} for text in GOOD + BAD]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    with pytest.raises(gptsmith.errors.UsageError, match="this method learns from pairs"):
        gptsmith.reward(place / "base", tmp_path / "rated.jsonl", out=tmp_path / "rm", **QUICK)
