"""Task heads: parity with transformers' classes for sequence classification, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.hf_heads import load_classifier, reward_scale, save_classifier
from gptsmith.model.heads import HeadConfig, SequenceClassifier, last_positions
from tests.factories import tiny_model

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

PAD = 29
PUBLISHED = ["gpt1", "gpt2", "gpt3", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
IDS = torch.randint(0, PAD, (3, 9), generator=torch.Generator().manual_seed(1))
IDS[1, 5:], IDS[2, 1:] = PAD, PAD


def make(family: str, labels: tuple[str, ...] = ("no", "yes", "maybe"), problem: Any = None) -> SequenceClassifier:
    options = {"intermediate_size": 64} if family == "gpt1" else {}
    torch.manual_seed(0)
    head = HeadConfig(labels, problem or "single_label_classification")
    return SequenceClassifier(tiny_model(family, **options), head).eval()


def theirs(directory: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("family", PUBLISHED)
@torch.no_grad()
def test_transformers_computes_the_same_scores(family: str, tmp_path: Path) -> None:
    ours = make(family)
    save_classifier(ours, tmp_path, pad_token_id=PAD)
    model = theirs(tmp_path)
    assert type(model).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.problem_type == "single_label_classification"
    scores = ours(IDS, last=last_positions(IDS, PAD))
    torch.testing.assert_close(scores, model(IDS).logits, atol=1e-4, rtol=1e-4)

    again, pad_id = load_classifier(tmp_path)
    assert (again.head, pad_id) == (ours.head, PAD)
    assert torch.equal(again(IDS, last=last_positions(IDS, PAD)), scores)


@pytest.mark.parametrize("family", PUBLISHED)
@torch.no_grad()
def test_directories_of_transformers_are_read(family: str, tmp_path: Path) -> None:
    save_classifier(make(family), tmp_path, pad_token_id=PAD)
    config = AutoConfig.from_pretrained(tmp_path, num_labels=2)
    config.problem_type = None
    torch.manual_seed(3)
    model: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    ours, _ = load_classifier(tmp_path)
    assert ours.head == HeadConfig(("LABEL_0", "LABEL_1"), "single_label_classification")
    torch.testing.assert_close(ours(IDS, last=last_positions(IDS, PAD)), model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("problem", "targets"),
    [
        ("single_label_classification", torch.tensor([2, 0, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])),
        ("regression", torch.tensor([[0.1, 2, -1], [3, 0, 0], [0.5, 1, 1]])),
    ],
)
def test_losses_equal_those_of_transformers(problem: Any, targets: torch.Tensor, tmp_path: Path) -> None:
    ours = make("qwen3", problem=problem)
    save_classifier(ours, tmp_path, pad_token_id=PAD)
    loss = ours.losses(ours(IDS, last=last_positions(IDS, PAD)), targets)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.mean(), theirs(tmp_path)(IDS, labels=targets).loss, atol=1e-5, rtol=1e-4)
    loss.sum().backward()
    assert ours.score.weight.grad is not None
    assert ours.transformer.embed_tokens.weight.grad is not None


@torch.no_grad()
def test_multiple_choice_scores_each_text_alone(tmp_path: Path) -> None:
    ours = make("gpt2", ("score",), "multiple_choice")
    save_classifier(ours, tmp_path, pad_token_id=PAD)
    choices = torch.stack((IDS, IDS.flip(0)), dim=1)  # (3, 2, 9)
    scores = ours(choices, last=last_positions(choices, PAD))
    assert scores.shape == (3, 2)
    again, _ = load_classifier(tmp_path)
    assert again.head == ours.head
    assert torch.equal(again(choices, last=last_positions(choices, PAD)), scores)
    flat = theirs(tmp_path)(choices.flatten(0, 1)).logits  # transformers: one score per text
    torch.testing.assert_close(scores, flat.view(3, 2), atol=1e-4, rtol=1e-4)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 1]), reduction="none")
    torch.testing.assert_close(ours.losses(scores, torch.tensor([0, 1, 1])), expected)


@torch.no_grad()
def test_padding_to_the_left_needs_document_ids() -> None:
    ours = make("gpt2")
    padded = torch.cat((torch.full((1, 3), PAD), IDS[:1]), dim=1)
    real = (padded != PAD).long()
    torch.testing.assert_close(ours(padded, document_ids=real), ours(IDS[:1]), atol=1e-5, rtol=1e-5)


def test_bad_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 or more, not 1"):
        HeadConfig(("one",), "single_label_classification")
    with pytest.raises(UsageError, match="exactly 1 label, not 2"):
        HeadConfig(("a", "b"), "multiple_choice")
    with pytest.raises(UsageError, match="not all different"):
        HeadConfig(("a", "a"), "regression")
    save_classifier(make("qwen3"), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for changes, message in (
        ({"id2label": {"0": "a", "1": "b"}}, "id2label has 2 labels, but score.weight has 3 rows"),
        ({"id2label": ["a", "b", "c"]}, "not an object"),
        ({"problem_type": "ranking"}, "unknown problem_type 'ranking'"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=message) as error:
            load_classifier(tmp_path)
        assert str(path) in str(error.value)


def test_a_language_model_has_no_head(tmp_path: Path) -> None:
    from gptsmith.formats.hf import save_model

    save_model(tiny_model("qwen3"), tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor score\.weight"):
        load_classifier(tmp_path)


def test_the_scale_of_a_reward_model_is_kept(tmp_path: Path) -> None:
    model = make("qwen3", labels=("reward",), problem="regression")
    save_classifier(model, tmp_path)
    assert reward_scale(tmp_path) is None
    save_classifier(model, tmp_path, scale=(-0.25, 1.5))
    assert reward_scale(tmp_path) == (-0.25, 1.5)
    theirs(tmp_path)  # transformers keeps what it does not know
    for bad in ({"mean": 0, "std": 0}, {"mean": 0}, {"mean": 0, "std": float("nan")}, [0, 1]):
        config = json.loads((tmp_path / "config.json").read_text()) | {"gptsmith_reward": bad}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="gptsmith_reward must be"):
            reward_scale(tmp_path)
