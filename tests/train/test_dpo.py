"""Preference optimization: the reference, the gradients, and runs from the command line."""

from __future__ import annotations

import json
import math
import shutil
import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.data.conversations import Counts, Example
from gptsmith.data.packing import Examples
from gptsmith.errors import UsageError
from gptsmith.formats.hf import save_model
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer.char import train_char
from gptsmith.train.config import DpoConfig
from gptsmith.train.objectives.base import LossHistory, Models
from gptsmith.train.objectives.dpo import Answers, Dpo
from gptsmith.train.preferences import Labeled, LabeledRows, Pair, Pairs, Preferences
from tests.factories import tiny_model, tiny_run_config

QUIET: dict[str, Any] = {"sample_tokens": 0, "device": "cpu", "compile": "off", "log_every": 1}
LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto")
TOKENIZER = train_char([string.printable])
FIRST = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5}


def small_model(family: str = "llama", *, seed: int = 0) -> Transformer:
    return tiny_model(family, seed=seed, vocab_size=TOKENIZER.vocab_size)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    text = "".join(f"Q: {a}?\nA: yes {a}.\nA: no {a}.\n" for a in ("cat", "dog", "bird", "fish")) * 60
    (place / "text.txt").write_text(text + (string.printable.replace("\r", "") + "\n") * 12)
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config = tiny_run_config(steps=60, eval_every=60, context=64, model=model)
    return gptsmith.fit(place / "text.txt", config, out=place / "base").directory


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of unequal lengths: yes is chosen."""
    rows = [
        {"prompt": f"Q: {word * (1 + i % 3)}?\nA:", "chosen": f" yes {word}.", "rejected": f" no, it is no {word}."}
        for i in range(8)
        for word in ("cat", "dog", "bird", "fish")
    ]
    unique = [row | {"prompt": f"{i} {row['prompt']}"} for i, row in enumerate(rows)]
    return written(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", unique)


@pytest.fixture(scope="module")
def rated(pairs: Path) -> Path:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    flat = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    return written(pairs.parent / "rated.jsonl", flat)


# The objective -------------------------------------------------------------------------------------------------------


def examples(prompts: int, seed: int = 0) -> list[tuple[Example, Example]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        count = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(1, 30, (count,), generator=generator).tolist()

    found = []
    for _ in range(prompts):
        prompt, answers = ids(6), (ids(9), ids(9))
        found.append(
            tuple(Example(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers)
        )
    return found  # type: ignore[return-value]


def objective(loss: str, count: int = 7, *, val: int = 3, batch_size: int = 5, **options: Any) -> Dpo:
    made = [Pair(one, other, None, "here") for one, other in examples(count + val)]
    extra = {name: options.pop(name) for name in ("reference", "should_stop") if name in options}
    data = Preferences(Pairs(made[:count]), Pairs(made[count:]), Counts())
    method = DpoConfig(loss=loss, **options)  # type: ignore[arg-type]
    return Dpo(data, TOKENIZER, method, batch_size=batch_size, context=16, seed=1, **extra)


@pytest.mark.parametrize("most", [16, 24])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_answers_have_the_log_probabilities_that_the_model_gives_them_alone(family: str, most: int) -> None:
    model = small_model(family)
    every = [example for pair in examples(5) for example in pair]
    found = Answers.of(Examples(every), most).logprobs(model)
    for example, value in zip(every, found.tolist(), strict=True):
        logprobs = model(torch.tensor([example.ids])).log_softmax(-1)[0]
        start = example.trained.index(True)
        expected = sum(logprobs[t - 1, example.ids[t]].item() for t in range(start, len(example.ids)))
        assert value == pytest.approx(expected, abs=2e-5)


def gradients(dpo: Dpo, policy: Transformer, micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    models = Models(policy)
    batch = dpo.next_batch(models, 0)
    count, _ = dpo.normalizer(batch)
    policy.zero_grad()
    total = 0.0
    for start in range(0, batch.num_rows, micro):
        loss = dpo.loss(models, batch.slice(start, start + micro)).loss_sum / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_do_not_change_the_gradient(loss: str) -> None:
    """The KL estimate of KTO, too, is that of the whole batch."""
    policy = small_model()
    dpo = objective(loss, reference=lambda: small_model(seed=5)) if loss in FIRST else objective(loss)
    whole, expected = gradients(dpo, policy, 100)
    for micro in (1, 2, 3):
        dpo.loader.position = 0
        found, parts = gradients(dpo, policy, micro)
        assert found == pytest.approx(whole, rel=1e-5)
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", FIRST)
def test_the_first_loss_is_that_of_equal_models(loss: str) -> None:
    dpo, models = objective(loss), Models(small_model())
    batch = dpo.next_batch(models, 0)
    assert dpo.loss(models, batch).loss_sum.item() / batch.num_rows == pytest.approx(FIRST[loss], rel=1e-6)
    values = dpo.evaluate(models, 4)
    assert values is not None
    assert values["val_accuracy"] == 0.5  # exactly: all rewards are equal
    assert values["val_loss"] == pytest.approx(FIRST[loss], rel=1e-6)


def test_the_reference_is_computed_once_and_a_stop_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptsmith.train.objectives import dpo as module

    monkeypatch.setattr(module, "EVAL_TOKENS_AT_ONCE", 30)
    made: list[int] = []
    stops = iter([False, False, True])

    def reference() -> Transformer:
        made.append(1)
        return small_model(seed=5)

    models = Models(small_model())
    dpo = objective("sigmoid", reference=reference, should_stop=lambda: next(stops, False))
    assert dpo.next_batch(models, 0).num_rows == 0
    assert dpo.loader.position == 0
    known = ~dpo.train.reference.isnan()
    assert 0 < int(known.sum()) < len(known)
    kept = dpo.train.reference.clone()
    again = objective("sigmoid", reference=reference)
    again.load_state(dpo.state())
    assert again.next_batch(models, 0).num_rows == 5
    assert torch.equal(again.train.reference[known], kept[known])
    again.next_batch(models, 1)
    again.evaluate(models, 4)
    assert len(made) == 2
    third = objective("sigmoid", reference=lambda: pytest.fail("computed again"))
    third.load_state(again.state())
    third.next_batch(models, 0)
    third.evaluate(models, 4)


def test_kto_mismatches_prompts_with_answers_to_other_prompts() -> None:
    dpo = objective("kto")
    part = dpo.train
    assert part.desirable is not None
    assert part.desirable.tolist() == [True, False] * 7
    for row in range(14):
        own, other = part.examples[row], part.examples[part.mismatched + row]
        prompt = own.ids[: own.trained.index(True)]
        assert other.ids[: len(prompt)] == prompt
        assert len(other.ids) <= 16
        partner = part.examples[(row + 2 - row % 2) % 14]  # of a pair, both have the prompt
        answer = partner.ids[partner.trained.index(True) :]
        assert other.ids[len(prompt) :] == answer[: len(other.ids) - len(prompt)]


def test_one_sided_batches_and_a_part_of_the_validation_data() -> None:
    rows = [Labeled(one, i < 4, "here") for i, (one, _) in enumerate(examples(9))]
    data = Preferences(LabeledRows(rows[:6]), LabeledRows(rows[6:]), Counts())
    method = DpoConfig(loss="kto", eval_tokens=1)
    dpo = Dpo(data, TOKENIZER, method, batch_size=2, context=16, seed=1)
    models = Models(small_model())
    for step in range(8):  # some batches are one-sided
        assert dpo.loss(models, dpo.next_batch(models, step)).loss_sum.isfinite()
    with pytest.raises(UsageError, match="--batch-size of 2"):
        Dpo(data, TOKENIZER, method, batch_size=1, context=16, seed=1)


def test_divergence_is_relative_to_the_first_loss() -> None:
    dpo = objective("ipo")
    assert dpo.diverged(LossHistory(25.0, 40.0)) is None
    assert "51.00" in str(dpo.diverged(LossHistory(25.0, 51.0)))
    assert "1.80" in str(dpo.diverged(LossHistory(math.log(2), 1.8)))


# Runs ----------------------------------------------------------------------------------------------------------------

LEARN: dict[str, Any] = {"lora": "off", "optim": {"name": "adamw", "lr": 0.003}, **QUIET}


@pytest.mark.report
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_the_preference(loss: str, base: Path, pairs: Path, tmp_path: Path, run_cli: Any) -> None:
    options = ["--lora", "off", "--optim.name", "adamw", "--optim.lr", 0.003, "--sample-tokens", 0, "--compile", "off"]
    options += ["--epochs", 6, "--log-every", 1, "--eval-every", 10]
    code, out, err = run_cli("dpo", base, pairs, "--out", tmp_path / "run", "--loss", loss, *options)
    assert code == 0, err
    assert "best val_accuracy" in out
    run = gptsmith.runs(tmp_path / "run")[0]
    training = [row for row in run.metrics if "loss" in row]
    evaluations = [row for row in run.metrics if "val_loss" in row]
    if loss in FIRST:
        assert training[0]["loss"] == pytest.approx(FIRST[loss], rel=1e-5)
        assert evaluations[0]["val_accuracy"] == 0.5
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert evaluations[-1]["val_accuracy"] == 1.0
    for name in ("chosen_logprob", "rejected_logprob", "chosen_reward", "rejected_reward", "reward_accuracy"):
        assert math.isfinite(training[-1][name])
    assert run.best is not None
    assert "text_bits_per_byte" in run.best
    report = (run.directory / "report.html").read_text()
    for part in (
        "Log-probability of the answers",
        "The loss asks for a difference only",
        "--sft-weight 0.1",
        "Reward margin",
    ):
        assert part in report or (part, loss) == ("Reward margin", "kto")
    assert ("per answer, as last logged" if loss == "kto" else "per pair, as last logged") in report
    assert "nats per token" not in report


def test_rated_answers_train_kto(base: Path, rated: Path, tmp_path: Path) -> None:
    run = gptsmith.dpo(base, rated, loss="kto", out=tmp_path / "run", epochs=4, **LEARN)
    assert run.best is not None
    assert run.best["val_accuracy"] > 0.8
    assert any(row.get("kl", 0) > 0 for row in run.metrics)
    with pytest.raises(UsageError, match="--loss kto"):
        gptsmith.dpo(base, rated, out=tmp_path / "other", **QUIET)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {"lora": "off"}),
        ("sigmoid", {"lora": {"rank": 2, "dora": True}}),
        ("kto", {"lora": {"rank": 2}}),
    ],
)
def test_resumed_bit_for_bit_without_the_reference(
    loss: str, options: dict[str, Any], base: Path, pairs: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(base, tmp_path / "start", symlinks=True))
    whole = gptsmith.dpo(
        start,
        pairs,
        loss=loss,
        out=tmp_path / "whole",
        steps=4,
        save_every=2,
        eval_every=2,
        batch_size=6,
        micro_batch_size=3,
        **options,
        **QUIET,
    )
    first = next(row["loss"] for row in whole.metrics if "loss" in row)
    assert first == pytest.approx(FIRST[loss], rel=1e-5)  # the reference is the model without the adapter
    out = Path(shutil.copytree(whole.directory, tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "run.json").write_text(json.dumps({**whole.info, "status": "running"}))
    if options["lora"] == "off":
        shutil.rmtree(start)
    again = gptsmith.fit(resume=out)
    losses = ("loss", "val_loss", "val_accuracy", "chosen_logprob")
    assert [[row.get(key) for key in losses] for row in again.metrics] == [
        [row.get(key) for key in losses] for row in whole.metrics
    ]
    name = "model.safetensors" if options["lora"] == "off" else "adapter_model.safetensors"
    path = Path("checkpoints") / "step-00000004" / name
    assert (out / path).read_bytes() == (whole.directory / path).read_bytes()


def test_another_reference(base: Path, pairs: Path, tmp_path: Path, run_cli: Any) -> None:
    """Any model with the same vocabulary will do: its probabilities alone count."""
    options: dict[str, Any] = {"steps": 1, "lora": "off", **QUIET}
    config = tiny_run_config(steps=2, eval_every=2, context=64, model={"family": "gpt2", "num_hidden_layers": 1})
    other = gptsmith.fit(base.parent / "text.txt", config, out=tmp_path / "other")
    run = gptsmith.dpo(base, pairs, reference=str(other.directory), out=tmp_path / "run", **options)
    assert run.metrics[0]["val_loss"] != pytest.approx(math.log(2), abs=1e-4)
    (tmp_path / "text.txt").write_text("other letters\n" * 200)
    strange = gptsmith.fit(tmp_path / "text.txt", tiny_run_config(steps=2, context=16), out=tmp_path / "strange")
    short = gptsmith.fit(base.parent / "text.txt", config.replace(context=16), out=tmp_path / "short")
    for reference, message in (
        (strange.directory, "have different vocabularies"),
        (short.directory, "is longer than the reference's 16"),
        ("nothing", "there is no model at nothing"),
    ):
        code, _, err = run_cli("dpo", base, pairs, "--reference", reference, "--out", tmp_path / "no")
        assert code in (1, 2)
        assert message in err
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dropout", 0.1), "--dropout 0.1: with dropout"),
        (("--lora.dropout", 0.1), "--lora.dropout 0.1: with dropout"),
        (("--loss", "orpo", "--reference", "x"), "--reference has no effect with --loss orpo"),
        (("--loss", "ipo", "--label-smoothing", 0.1), "--label-smoothing has no effect with --loss ipo"),
        (("--target-margin", 0.5), "--target-margin has no effect with --loss sigmoid"),
        (("--desirable-weight", 2), "--desirable-weight has no effect with --loss sigmoid"),
        (("--beta", 0), "--beta must be above 0"),
        (("--label-smoothing", 0.5), "below 0.5"),
        (("--score-margins",), "--score-margins is for reward models"),
        (("--loss", "kto", "--batch-size", 1), "--batch-size of 2"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[Any, ...], message: str, base: Path, pairs: Path, tmp_path: Path, run_cli: Any
) -> None:
    code, _, err = run_cli("dpo", base, pairs, "--out", tmp_path / "run", *options)
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({}, {"loss": loss}) for loss in LOSSES[1:]),
    *(({"loss": loss}, {"beta": 0.3}) for loss in LOSSES),
    ({}, {"label_smoothing": 0.2}),
    ({"loss": "simpo"}, {"label_smoothing": 0.2}),
    ({"loss": "simpo"}, {"target_margin": 0.2}),
    ({"loss": "kto"}, {"desirable_weight": 2.0}),
    ({"loss": "kto"}, {"undesirable_weight": 2.0}),
    *(({"loss": loss}, {"sft_weight": 0.5}) for loss in LOSSES),
]


@pytest.mark.parametrize(("options", "change"), CHANGES)
def test_every_option_changes_the_gradient(options: dict[str, Any], change: dict[str, Any]) -> None:
    def gradient(method: dict[str, Any]) -> torch.Tensor:
        loss = method.pop("loss", "sigmoid")
        reference: dict[str, Any] = {"reference": lambda: small_model(seed=5)} if loss in FIRST else {}
        _, parts = gradients(objective(loss, **method, **reference), small_model(), 100)
        return torch.cat([part.flatten() for part in parts.values()])

    assert not torch.allclose(gradient(dict(options)), gradient({**options, **change}), rtol=1e-3, atol=1e-6)


# The same as TRL -----------------------------------------------------------------------------------------------------


def saved(model: Transformer, directory: Path) -> Path:
    directory.mkdir()
    save_model(model, directory)
    TOKENIZER.save(directory)
    return directory


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "kto"])
def test_losses_and_gradients_equal_trls(loss: str, tmp_path: Path) -> None:
    """`DPOTrainer` and `KTOTrainer` themselves, on the same rows with unequal lengths and another reference."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    warnings.simplefilter("ignore")
    policy, reference = small_model(), small_model(seed=5)
    dpo = objective(loss, count=6, batch_size=12 if loss == "kto" else 6, beta=0.3, reference=lambda: reference)
    ours, gradient = gradients(dpo, policy, 4)

    def load(name: str, model: Transformer) -> Any:
        place = saved(model, tmp_path / name)
        return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    theirs, kind = load("policy", policy), "KTO" if loss == "kto" else "DPO"
    rows: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    for i in range(0, 12, 1 if loss == "kto" else 2):
        one = dpo.train.examples[i]
        start = one.trained.index(True)
        if dpo.train.desirable is None:
            given.append({"prompt": "a", "chosen": "b", "rejected": "c"})
            both: dict[str, Any] = {
                "chosen_ids": one.ids[start:],
                "rejected_ids": dpo.train.examples[i + 1].ids[start:],
            }
            rows.append({"prompt_ids": one.ids[:start], **both})
        else:
            label, other = bool(dpo.train.desirable[i]), dpo.train.examples[dpo.train.mismatched + i].ids[start:]
            given.append({"prompt": "a", "completion": "b", "label": label})
            rated = {"completion_ids": one.ids[start:], "KL_completion_ids": other, "label": label}
            rows.append({"prompt_ids": one.ids[:start], **rated})
    options = {} if loss == "kto" else {"loss_type": loss}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=theirs,
        ref_model=load("reference", reference),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            per_device_train_batch_size=12,
            use_cpu=True,
            report_to=[],
            bf16=False,
            fp16=False,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "policy"),
    )
    found = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    found.backward()
    assert ours == pytest.approx(found.item(), rel=1e-5)
    with torch.no_grad():  # gradients under the names of transformers
        for name, p in policy.named_parameters():
            p.copy_(gradient[name])
    expected = load("gradient", policy).state_dict()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
