"""Which known traps of fine-tuning and alignment do gptsmith, TRL and PEFT avoid?

    python benchmarks/traps.py             # writes docs/traps.md and benchmarks/results/traps.json
    python benchmarks/traps.py --only B1 C1

gptsmith is tested by `tests/traps`, whose tests are named after the traps. TRL and PEFT are tested where they have the
feature: they *pass* if the result is right or the input is refused, *warn* if the result is wrong and a warning says
so, and *fail* otherwise. Everything runs on a CPU, with a model of two layers and each program's defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]

TRAPS = {
    "A1": "the gradient does not depend on the micro-batch",
    "A2": "the gradient of the policy does not depend on how answers are split into micro-batches",
    "A3": "truncated answers are excluded from the loss and from its denominator",
    "A4": "rows without a trained token are refused, or skipped and counted",
    "A5": "IPO averages over the tokens of each answer",
    "A6": "every selectable loss computes a different loss",
    "B1": "the end token is trained even if it is also the padding token",
    "B2": "a sequence has one beginning-of-sequence token",
    "B3": "chat templates without generation tags get a loss mask",
    "B4": "the loss mask is not found by string search",
    "B5": "no preprocessing step loses the loss mask",
    "B6": "no token spans prompt and completion",
    "B7": "the chat template of training is exported",
    "B8": "generation stops at any of several end tokens",
    "C1": "documents packed into a row do not attend to each other",
    "C2": "long conversations do not fill the packing buffer",
    "C3": "packing works without FlashAttention",
    "D1": "an adapter includes the embeddings of new tokens",
    "D2": "merging leaves tied embeddings unchanged",
    "D3": "the task head is trained and saved with an adapter",
    "D4": "merging an adapter into quantized weights changes little",
    "D5": "adapters get ten times the learning rate, and all linear layers",
    "D6": "generation during training uses the adapter",
    "E1": "sampling has the probabilities that are trained",
    "E2": "the KL penalty has the gradient of the KL divergence",
    "E3": "sampled tokens are not encoded again from text",
    "E4": "prompts that are too long are skipped and counted, not truncated",
    "E5": "tokens after the end of an answer have no effect",
    "E6": "groups of answers with equal rewards are reported",
    "E7": "a failing reward is not a reward of zero; a reward that pays for empty answers is reported",
    "E8": "the same seed gives the same run",
    "E9": "a warning names the step at which the reward rises and quality falls",
    "F1": "the score is read at the last token",
    "F2": "the first loss of DPO is ln 2 even if the model has dropout",
    "F3": "the log-probabilities of chosen and rejected answers are both logged",
    "F4": "KTO never pairs an answer with its own prompt as a mismatch",
    "F5": "rewards use the scale that is stored with the reward model",
    "F6": "a reward model with another tokenizer than the policy's is refused",
    "G1": "resuming a run that does not exist is an error",
    "G2": "a misspelled option is an error",
    "G4": "forgetting is measured",
}
"""What is right, by id. The letters: A loss, B tokens and masks, C packing, D adapters, E reinforcement learning,
F preferences and reward models, G running."""

Verdict = tuple[bool, str]
"""Whether it passes, and what was seen."""

CASES: dict[str, dict[str, tuple[Callable[[Path], Verdict], str]]] = {"TRL": {}, "PEFT": {}}


def case(program: str, trap: str, *, warning: str = "") -> Callable[[Callable[[Path], Verdict]], None]:
    """Add a case. warning: a regular expression for what tells the user about a wrong result."""

    def register(function: Callable[[Path], Verdict]) -> None:
        CASES[program][trap] = function, warning

    return register


@functools.cache
def trl() -> Any:
    return importlib.import_module("trl")


# What the cases share -------------------------------------------------------------------------------------------------

LETTERS = "".join(map(chr, range(32, 127))) + "\n"
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "gradient_checkpointing": False,
}


def model_directory(place: Path, **options: Any) -> Path:
    """Write a model of characters with a chat template, and return its directory."""
    from gptsmith.checkpoint import save_checkpoint
    from gptsmith.model.families import FAMILIES
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import train_char
    from gptsmith.tokenizer.chatml import with_chat_template

    tokenizer, _ = with_chat_template(train_char([LETTERS]))
    config = FAMILIES["llama"](
        **{
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "head_dim": None,
        }
        | options
    )
    torch.manual_seed(0)
    directory = place / "model"
    save_checkpoint(directory, Transformer(config), tokenizer)
    return directory


def load(directory: Path, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token  # as is usual where a model has none
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options), tokenizer


def rows(count: int = 4) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": f"Say {i} " * (1 + i % 2), "completion": f"it is {i}. " * (1 + 3 * (i % 3))} for i in range(count)]
    )


def chats(count: int = 4) -> Any:
    from datasets import Dataset

    turns = [("user", "Say {}"), ("assistant", "It is {}.")]
    return Dataset.from_list(
        [{"messages": [{"role": role, "content": text.format(i)} for role, text in turns]} for i in range(count)]
    )


def pairs(count: int = 4) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": f"Say {i}", "chosen": f" it is {i}" * (1 + i % 3), "rejected": " no" * (1 + i)}
            for i in range(count)
        ]
    )


def sft(place: Path, data: Any, *, directory: Path | None = None, peft_config: Any = None, **options: Any) -> Any:

    model, tokenizer = load(directory or model_directory(place))
    defaults = {**QUIET, "output_dir": str(place / "out"), "per_device_train_batch_size": 4}
    return trl().SFTTrainer(
        model,
        trl().SFTConfig(**{**defaults, **options}),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def dpo(place: Path, *, directory: Path | None = None, reference: Any = None, **options: Any) -> Any:

    model, tokenizer = load(directory or model_directory(place))
    defaults = {**QUIET, "output_dir": str(place / "out"), "per_device_train_batch_size": 4}
    return trl().DPOTrainer(
        model, reference, trl().DPOConfig(**{**defaults, **options}), train_dataset=pairs(), processing_class=tokenizer
    )


def grpo(place: Path, reward: Any, *, peft_config: Any = None, **options: Any) -> Any:
    from datasets import Dataset

    model, tokenizer = load(model_directory(place))
    data = Dataset.from_list([{"prompt": f"Say {i}"} for i in range(4)])
    defaults = {**QUIET, "output_dir": str(place / "out"), "per_device_train_batch_size": 4, "num_generations": 4}
    arguments = trl().GRPOConfig(**{**defaults, "max_completion_length": 8, **options})
    return trl().GRPOTrainer(
        model, reward, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def refusal(function: Callable[[], object], *, because: str = "") -> Verdict:
    """Return that a program refuses what it is given, as it should."""
    try:
        function()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return because in reason, f"refused: {shortened(reason)}"
    return False, "accepted without a word"


# TRL ------------------------------------------------------------------------------------------------------------------


@case("TRL", "A1")
def _(place: Path) -> Verdict:
    found = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = sft(
            place / str(size),
            rows(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before)
    error = float((found[0] - found[1]).norm() / found[0].norm())
    return error < 1e-3, f"the updates differ by {error:.1e}"


@case("TRL", "A4", warning="truncat|masked")
def _(place: Path) -> Verdict:
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "Say " * 40, "completion": "yes"}, {"prompt": "Say", "completion": "yes"}])
    trainer = sft(place, data, max_length=64, per_device_train_batch_size=1)
    empty = sum(bool((batch["labels"] == -100).all()) for batch in trainer.get_train_dataloader())
    left = len(trainer.train_dataset)
    return not empty, f"{left} of 2 rows are left, {empty} of them without a trained token"


@case("TRL", "A5")
def _(place: Path) -> Verdict:
    directory = model_directory(place)
    reference, tokenizer = load(directory)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    trainer = dpo(place, directory=directory, reference=reference, loss_type="ipo", beta=0.5)
    trainer.train()
    model, _ = load(directory)
    ratios = []
    for row in pairs():
        start = tokenizer(row["prompt"]).input_ids
        for answer in (row["chosen"], row["rejected"]):
            ids = torch.tensor([[*start, *tokenizer(answer).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                each = [
                    m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(start) - 1 :, 0]
                    for m in (model, reference)
                ]
            ratios.append(float((each[0] - each[1]).mean()))
    expected = sum((c - r - 1) ** 2 for c, r in zip(ratios[::2], ratios[1::2], strict=True)) / (len(ratios) / 2)
    return math.isclose(
        logged(trainer, "loss")[0], expected, rel_tol=1e-2
    ), f"{logged(trainer, 'loss')[0]:.4f}, the formula {expected:.4f}"


@case("TRL", "A6")
def _(place: Path) -> Verdict:
    directory = model_directory(place)
    reference, _ = load(directory)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    losses = {}
    for kind in ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "sppo_hard"):
        extra = {"label_smoothing": 0.1} if kind == "robust" else {}
        trainer = dpo(place / kind, directory=directory, reference=reference, loss_type=kind, **extra)
        trainer.train()
        losses[kind] = round(logged(trainer, "loss")[0], 5)
    return len(set(losses.values())) == len(losses), ", ".join(f"{kind} {loss}" for kind, loss in losses.items())


@case("TRL", "B1")
def _(place: Path) -> Verdict:
    trainer = sft(place, chats())
    batch = next(iter(trainer.get_train_dataloader()))
    end = trainer.processing_class.eos_token_id
    trained = (batch["labels"] == end).any(dim=1)
    return bool(trained.all()), f"the end token is trained in {int(trained.sum())} of {len(trained)} rows"


@case("TRL", "B2")
def _(place: Path) -> Verdict:
    from gptsmith.tokenizer import Tokenizer
    from gptsmith.tokenizer.tokenizer import with_added_tokens

    directory = model_directory(place)
    own = Tokenizer.load(directory)
    start, ids = "<|im_start|>", {text: id for id, text in own.special_tokens().items()}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    text = with_added_tokens(own.to_json(), {start: ids[start]}, {})
    Tokenizer(text, {**own.config(), "bos_token": start, "chat_template": template}).save(directory)
    trainer = sft(place, chats(), directory=directory)
    counts = {list(row["input_ids"]).count(ids[start]) for row in trainer.train_dataset}
    return counts == {1}, f"{sorted(counts)} beginning-of-sequence tokens in a conversation"


@case("TRL", "B3")
def _(place: Path) -> Verdict:
    try:
        trainer = sft(place, chats(), assistant_only_loss=True)
        batch = next(iter(trainer.get_train_dataloader()))
    except Exception as error:
        return True, f"refused: {shortened(error)}"
    trained = int((batch["labels"] != -100).sum())
    return trained > 0, f"{trained} tokens are trained"


@case("TRL", "B5")
def _(place: Path) -> Verdict:
    counts = []
    for packing in (False, True):
        trainer = sft(place / str(packing), rows(12), packing=packing, max_length=256)
        counts.append(sum(int((batch["labels"] != -100).sum()) for batch in trainer.get_train_dataloader()))
    return counts[0] == counts[1], f"{counts[0]} trained tokens without packing, {counts[1]} with it"


@case("TRL", "B6", warning="(?i)mismatch")
def _(place: Path) -> Verdict:
    from datasets import Dataset

    from gptsmith.tokenizer import train_bpe

    directory = model_directory(place, vocab_size=400)
    text = "The weather in Rome is sunny. "
    train_bpe([text * 20 + LETTERS], 300).save(directory)
    cuts = [(text[:i], text[i:-1]) for i in range(4, 20)]
    data = Dataset.from_list([{"prompt": a, "completion": b} for a, b in cuts])
    trainer = sft(place, data, directory=directory)
    wrong = 0
    for (prompt, _), row in zip(cuts, trainer.train_dataset, strict=True):
        start = trainer.processing_class(prompt).input_ids
        wrong += list(row["input_ids"])[: len(start)] != start
    return wrong == 0, f"{wrong} of {len(cuts)} prompts have other tokens in training than when they are served"


@case("TRL", "B7")
def _(place: Path) -> Verdict:
    from transformers import AutoTokenizer

    trainer = sft(place, chats())
    trainer.save_model(str(place / "saved"))
    messages = [{"role": "user", "content": "Say 3"}]
    again = AutoTokenizer.from_pretrained(place / "saved")
    same = again.apply_chat_template(messages, return_dict=False) == trainer.processing_class.apply_chat_template(
        messages, return_dict=False
    )
    return same, "the saved tokenizer renders the same ids" if same else "the saved tokenizer renders other ids"


def _leak(trainer: Any) -> float:
    """Return how much the logits of the last document of a packed row change with the first one."""
    batch = next(iter(trainer.get_train_dataloader()))
    positions = batch["position_ids"][0]
    starts = (positions == 0).nonzero().flatten().tolist()
    assert len(starts) > 1, "nothing is packed"
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "position_ids", "attention_mask")}
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, : starts[1]] = (changed["input_ids"][0, : starts[1]] + 1) % 90
    model = trainer.model.eval()
    with torch.no_grad():
        one, two = (model(**each).logits[0, starts[1] :] for each in (inputs, changed))
    return float((one - two).abs().max())


@case("TRL", "C1", warning="(?i)flash|contaminat")
def _(place: Path) -> Verdict:
    leak = _leak(sft(place, rows(8), packing=True, max_length=128))
    return leak == 0, f"logits change by {leak:.3g} with another document"


@case("TRL", "C2")
def _(place: Path) -> Verdict:
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "Say", "completion": " yes" * (5 if i % 2 else 60)} for i in range(16)])
    trainer = sft(place, data, packing=True, max_length=64, per_device_train_batch_size=1)
    counts = [int((batch["labels"] != -100).sum()) for batch in trainer.get_train_dataloader()]
    return min(counts) > 0, f"{sum(count == 0 for count in counts)} of {len(counts)} batches have no trained token"


@case("TRL", "C3", warning="(?i)flash|contaminat")
def _(place: Path) -> Verdict:
    try:
        leak = _leak(sft(place, rows(8), padding_free=True, max_length=None))
    except Exception as error:
        return False, f"{type(error).__name__}: {shortened(error)}"
    return leak == 0, f"logits change by {leak:.3g} with another document"


@case("TRL", "D5")
def _(place: Path) -> Verdict:
    from peft import LoraConfig

    trainer = sft(place, chats(), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    layers = {name.split(".")[-4] for name, _ in trainer.model.named_parameters() if "lora_A" in name}
    rate = trainer.args.learning_rate / sft(place / "full", chats()).args.learning_rate
    return len(layers) == 7 and rate >= 5, f"adapts {', '.join(sorted(layers))}, with {rate:g} times the rate"


@case("TRL", "D6")
def _(place: Path) -> Verdict:
    from peft import LoraConfig

    seen: list[list[int]] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(i) for i in range(len(completions))]

    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    trainer = grpo(place, reward, peft_config=adapter, temperature=1e-4, learning_rate=0.0)
    trainer.train()
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    expected = {}
    for i in range(4):
        ids = tokenizer(f"Say {i}", return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        expected[i] = out[0, ids.shape[1] :].tolist()
    hits = sum(any(ids == each[: len(ids)] for each in expected.values()) for ids in seen)
    return hits == len(seen), f"{hits} of {len(seen)} answers are those of the model with its adapter"


@case("TRL", "E1")
def _(place: Path) -> Verdict:
    """With top_k, what is sampled has another distribution than the model's; is it that whose gradient is taken?"""
    seen: list[tuple[str, list[int]]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completion_ids, strict=True))
        return [float(i) for i in range(len(prompts))]

    trainer = grpo(place, reward, top_k=3, learning_rate=0.0, disable_dropout=True)
    trainer.train()
    model, tokenizer, gap = trainer.model.eval(), trainer.processing_class, 0.0
    for prompt, ids in seen:
        whole = torch.tensor([[*tokenizer(prompt).input_ids, *ids]])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, -len(ids) - 1 : -1]
            trained = trainer._get_per_token_logps_and_entropies(model, whole, torch.ones_like(whole), len(ids))[0][0]
        kept = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf).log_softmax(-1)
        sampled = kept[torch.arange(len(ids)), ids]
        gap = max(gap, float((trained - sampled).abs().max()))
    return gap < 1e-3, f"top_k=3 is accepted, and log-probabilities differ by up to {gap:.3g} from those of the sampler"


@case("TRL", "E6")
def _(place: Path) -> Verdict:
    trainer = grpo(place, lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    share = logged(trainer, "frac_reward_zero_std")
    return share == [1.0], f"logs frac_reward_zero_std {share}"


@case("TRL", "E7", warning="returned `?None")
def _(place: Path) -> Verdict:
    found = {}
    for name, value in {"None": None, "NaN": math.nan}.items():
        trainer = grpo(place / name, lambda completions, value=value, **_: [1.0, *[value] * (len(completions) - 1)])
        try:
            trainer.train()
        except Exception as error:
            found[name] = f"refused ({type(error).__name__})"
        else:
            found[name] = (
                f"trained, with a loss of {logged(trainer, 'loss')} and a reward of {logged(trainer, 'reward')}"
            )
    return all(text.startswith("refused") for text in found.values()), "; ".join(f"{k}: {v}" for k, v in found.items())


@case("TRL", "E8")
def _(place: Path) -> Verdict:
    losses = []
    for i in range(2):
        trainer = grpo(place / str(i), lambda completions, **_: [float(len(text)) for text in completions], max_steps=3)
        trainer.train()
        losses.append([torch.cat([p.detach().flatten() for p in trainer.model.parameters()])])
    same = torch.equal(losses[0][0], losses[1][0])
    return same, "two runs end in the same weights" if same else "two runs end in other weights"


@case("TRL", "F1")
def _(place: Path) -> Verdict:
    from transformers import AutoModelForSequenceClassification

    directory = model_directory(place)
    _, tokenizer = load(directory)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = trl().RewardConfig(**QUIET, output_dir=str(place / "out"), per_device_train_batch_size=4)
    trainer = trl().RewardTrainer(model, arguments, train_dataset=pairs(), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten()
        true = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = model.model(input_ids=ids[mask.bool()][None]).last_hidden_state
            true.append(model.score(hidden[0, -1]))
    error = float((scores - torch.cat(true)).abs().max())
    return error < 1e-4, f"scores differ by {error:.3g} from those of the last token (the end token, as padding is)"


@case("TRL", "F2")
def _(place: Path) -> Verdict:
    directory = model_directory(place)
    config = json.loads((directory / "config.json").read_text()) | {"attention_dropout": 0.5}
    (directory / "config.json").write_text(json.dumps(config))
    trainer = dpo(place, directory=directory)
    trainer.train()
    loss = logged(trainer, "loss")[0]
    return abs(loss - math.log(2)) < 1e-4, f"the first loss is {loss:.5f} with an attention_dropout of 0.5"


@case("TRL", "F3")
def _(place: Path) -> Verdict:
    trainer = dpo(place)
    trainer.train()
    keys = {key for row in trainer.state.log_history for key in row if "logps" in key}
    return any("chosen" in key for key in keys) and any(
        "rejected" in key for key in keys
    ), f"logs {', '.join(sorted(keys))}"


@case("TRL", "F4")
def _(place: Path) -> Verdict:
    from datasets import Dataset

    model, tokenizer = load(model_directory(place))
    data = Dataset.from_list([{"prompt": f"Say {i}", "completion": f" {i}", "label": bool(i % 2)} for i in range(4)])

    def train() -> None:
        arguments = trl().KTOConfig(**QUIET, output_dir=str(place / "out"), per_device_train_batch_size=1)
        trl().KTOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer).train()

    return refusal(train)


@case("TRL", "G1")
def _(place: Path) -> Verdict:
    trainer = sft(place, chats())
    return refusal(lambda: trainer.train(resume_from_checkpoint=str(place / "missspelled")))


@case("TRL", "G2")
def _(place: Path) -> Verdict:
    return refusal(lambda: sft(place, chats(), num_train_epoch=3), because="num_train_epoch")


# PEFT -----------------------------------------------------------------------------------------------------------------


def adapted(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})
    ).eval()


IDS = torch.arange(3, 33).view(2, 15)


@case("PEFT", "D1")
def _(place: Path) -> Verdict:
    from peft import PeftModel

    directory = model_directory(place)
    model, tokenizer = load(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    model.resize_token_embeddings(len(tokenizer))
    live = adapted(model)
    with torch.no_grad():
        expected = live(torch.tensor([[5, len(tokenizer) - 1]])).logits
    live.save_pretrained(place / "adapter")
    base, _ = load(directory)
    try:
        again = PeftModel.from_pretrained(base, place / "adapter").eval()
    except Exception as error:
        return False, f"the adapter does not load on its model: {shortened(error)}"
    with torch.no_grad():
        gap = float((again(torch.tensor([[5, len(tokenizer) - 1]])).logits - expected).abs().max())
    return gap < 1e-4, f"logits differ by {gap:.3g} after loading"


@case("PEFT", "D2", warning="tie")
def _(place: Path) -> Verdict:
    model, _ = load(model_directory(place))
    live = adapted(model, target_modules=["q_proj", "embed_tokens"])
    with torch.no_grad():
        expected = live(IDS).logits
        merged = live.merge_and_unload().eval()
        gap = float((merged(IDS).logits - expected).abs().max())
    return gap < 1e-3, f"logits of the merged model differ by {gap:.3g}"


@case("PEFT", "D3")
def _(place: Path) -> Verdict:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    directory = model_directory(place)

    def fresh() -> Any:
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = 0
        return model

    live = adapted(fresh(), task_type="SEQ_CLS", target_modules="all-linear")
    with torch.no_grad():
        expected = live(IDS).logits
    trains = any("score" in name and "lora" not in name and p.requires_grad for name, p in live.named_parameters())
    live.save_pretrained(place / "adapter")
    again = PeftModel.from_pretrained(fresh(), place / "adapter").eval()
    with torch.no_grad():
        error = float((again(IDS).logits - expected).abs().max())
    return trains and error < 1e-4, f"the head is {'' if trains else 'not '}trained; scores differ by {error:.3g}"


@case("PEFT", "D5")
def _(place: Path) -> Verdict:
    model, _ = load(model_directory(place))
    layers = {name.split(".")[-4] for name, _ in adapted(model).named_parameters() if "lora_A" in name}
    return len(layers) == 7, f"adapts {', '.join(sorted(layers))} by default"


# The scoreboard -------------------------------------------------------------------------------------------------------


def ours() -> dict[str, tuple[str, str]]:
    """Return what the tests of each trap say of gptsmith."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", f"--junitxml={report}", "tests/traps"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        found: dict[str, list[bool]] = {}
        for test in ElementTree.parse(report).getroot().iter("testcase"):
            trap = re.match(r"test_([A-G]\d)_", test.get("name", ""))
            if trap and test.find("skipped") is None:
                found.setdefault(trap[1], []).append(test.find("failure") is None and test.find("error") is None)
    return {
        trap: ("passes" if all(results) else "fails", f"{sum(results)} of {len(results)} tests")
        for trap, results in found.items()
    }


class Heard(logging.Handler):
    """Collects what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def ask(program: str, trap: str) -> tuple[str, str]:
    """Return whether the program passes, warns or fails, and what was seen."""
    function, warning = CASES[program][trap]
    heard = Heard()
    loggers = [logging.getLogger(name) for name in ("", "transformers", "trl", "peft")]
    for logger in loggers:
        logger.addHandler(heard)
    try:
        with (
            tempfile.TemporaryDirectory() as place,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            passes, seen = function(Path(place))
    finally:
        for logger in loggers:
            logger.removeHandler(heard)
    texts = [*heard.texts, *(str(each.message) for each in warned)]
    said = (" ".join(text.split()) for text in texts)
    told = [text for text in said if warning and re.search(warning, text)]
    if told and not passes:
        return "warns", f"{seen}; it says: {shortened(told[0])}"
    return ("passes" if passes else "fails"), seen


def shortened(text: object) -> str:
    """Return a message in one line, without what varies."""
    line = re.sub(r"/tmp/\S+|\{'prompt.*?\}", "…", " ".join(str(text).split()))
    return line if len(line) <= 110 else f"{line[:110].rsplit(' ', 1)[0]} …"


def page(result: dict[str, Any]) -> str:
    """Return docs/traps.md."""
    programs = {"gptsmith": "gptsmith"} | {name: f"{name} {result['versions'][name]}" for name in CASES}
    lines = [
        "# Traps",
        "",
        "Users of public tools have reported these defects of fine-tuning and alignment; here they are reproduced",
        "with a model of two layers. gptsmith is tested by `tests/traps`, whose tests name the reports. TRL and PEFT",
        "are tested with their defaults, where they have the feature: they pass if the result is right or the input",
        "is refused, warn if the result is wrong and a warning says so, and fail otherwise.",
        "`python benchmarks/traps.py` writes this page.",
        "",
        "| | correct behavior | " + " | ".join(programs.values()) + " |",
        "|---|---|" + "---|" * len(programs),
    ]
    words = {"passes": "passes", "warns": "warns", "fails": "**fails**", "": "–"}
    for trap, right in TRAPS.items():
        cells = [words[result["verdicts"][program].get(trap, ("",))[0]] for program in programs]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {trap} | {right} | " + " | ".join(cells) + " |")
    lines += ["", "–: not applicable, or not tested.", "", "## Observations", ""]
    for program in CASES:
        for trap, (verdict, seen) in result["verdicts"][program].items():
            lines.append(f"- {trap}, {program} {verdict}: {seen.rstrip('.')}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], help="ask these of TRL and PEFT, and print what was seen")
    arguments = parser.parse_args()
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    verdicts: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in CASES}
    for program, cases in CASES.items():
        for trap in sorted(cases):
            if arguments.only and trap not in arguments.only:
                continue
            verdicts[program][trap] = ask(program, trap)
            print(trap, program, ": ".join(verdicts[program][trap]), flush=True)
    if arguments.only:
        return
    from machine import save

    versions = {name: version(name.lower()) for name in CASES}
    result: dict[str, Any] = {"versions": versions, "verdicts": {"gptsmith": ours(), **verdicts}}
    (ROOT / "docs" / "traps.md").write_text(page(result))
    print(save("traps", result))


if __name__ == "__main__":
    main()
