"""Initial weights follow from a seed and a name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gptsmith.model.config import LoraConfig
from gptsmith.model.families import FAMILIES
from gptsmith.model.heads import HeadConfig, SequenceClassifier
from gptsmith.model.initial import WithoutDefaultDraws
from gptsmith.model.transformer import Transformer
from tests.factories import tiny_config


def new_model(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(tiny_config("qwen3", **changes))


def test_other_parameters_change_nothing() -> None:
    """A layer more, or an output matrix of its own, leaves the weights of all other parameters as they are."""
    small = dict(new_model(num_hidden_layers=1).named_parameters())
    large = dict(new_model(num_hidden_layers=3, tie_word_embeddings=False).named_parameters())
    drawn = [name for name, p in small.items() if p.std() > 0]
    assert len(drawn) > 4
    assert all(torch.equal(small[name], large[name]) for name in drawn if "o_proj" not in name and "down" not in name)


def test_seeds_and_names_differ() -> None:
    model, other = new_model(1), new_model(2)
    weights = {name: p for name, p in model.named_parameters() if p.std() > 0}
    assert not any(torch.equal(p, dict(other.named_parameters())[name]) for name, p in weights.items())
    first, second = (weights[f"layers.{i}.attention.o_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    correlation = torch.corrcoef(torch.stack((first.detach().flatten(), second.detach().flatten())))[0, 1]
    assert abs(float(correlation)) < 5 / first.numel() ** 0.5


@pytest.mark.parametrize("family", sorted(FAMILIES.builtin))
def test_distribution(family: str) -> None:
    """Matrices have the standard deviation that the configuration says; nothing is left undefined."""
    config = replace(tiny_config(family), initializer_range=0.1)
    torch.manual_seed(0)
    for name, p in Transformer(config).named_parameters():
        values = p.detach()
        assert torch.isfinite(values).all(), name
        if name.endswith("bias"):
            assert not values.any(), name
        elif values.ndim == 1:
            assert set(values.tolist()) <= {0.0, 1.0}, name
        else:
            scaled = config.residual_init == "scaled" and name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
            std = 0.1 / (2 * config.num_hidden_layers) ** 0.5 if scaled else 0.1
            assert float(values.std()) == pytest.approx(std, rel=6 / values.numel() ** 0.5), name
            assert abs(float(values.mean())) < 6 * std / values.numel() ** 0.5, name


def test_one_number_of_the_global_generator_is_used() -> None:
    """Whatever the size: what is drawn after it (dropout, samples) does not depend on the model."""
    new_model(num_hidden_layers=1)
    after = torch.rand(())
    new_model(num_hidden_layers=3)
    assert torch.equal(torch.rand(()), after)


def test_scores_and_adapters() -> None:
    from gptsmith.formats.peft import adapter_layout
    from gptsmith.model.lora import add_lora, lora_parts

    def classifier(layers: int) -> SequenceClassifier:
        model = new_model(num_hidden_layers=layers)
        torch.manual_seed(0)
        return SequenceClassifier(model, HeadConfig(("a", "b"), "single_label_classification"))

    assert torch.equal(classifier(1).score.weight, classifier(2).score.weight)

    def adapter(targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
        model = new_model()
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=2, targets=targets), adapter_layout(model))
        return {name: part.A for name, part in lora_parts(model).items()}

    few, many = adapter(("o_proj",)), adapter(("q_proj", "o_proj"))
    assert 0 < len(few) < len(many)
    assert all(torch.equal(few[name], many[name]) for name in few)


def test_default_draws_are_skipped_only_inside() -> None:
    state = torch.get_rng_state()
    with WithoutDefaultDraws():
        layer = nn.Linear(4, 4)
        nn.Embedding(4, 4)
        nn.Conv2d(3, 4, 2)
        norm = nn.LayerNorm(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(norm.weight, torch.ones(4))
    layer.reset_parameters()
    assert not torch.equal(torch.get_rng_state(), state)
