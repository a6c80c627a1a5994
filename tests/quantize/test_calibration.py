"""The calibration text and what the matrices of a model multiply on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.model import families
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.quantize.calibration import LEAST, calibration_ids, matrices_of, mean_squared_inputs
from gptsmith.tokenizer import Tokenizer, train_char
from tests.factories import tiny_model


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_mean_squared_inputs_of_every_matrix(family: str) -> None:
    """As forward hooks see them, for linear layers; and for all experts."""
    model = tiny_model(family)
    ids = torch.randint(0, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    found = mean_squared_inputs(model, ids)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0].detach())
            )
    with torch.no_grad():
        model(ids)
    for name, inputs in seen.items():
        expected = torch.cat([x.flatten(0, -2) for x in inputs]).square().mean(dim=0)
        torch.testing.assert_close(found[name], expected)
    experts = [name for name in matrices_of(model) if name not in seen]
    assert bool(experts) == bool(model.config.num_experts)
    used = [name for name in experts if name in found]
    assert 2 * len(used) >= len(experts)
    assert all(found[name].shape == matrices_of(model)[name].shape[1:] for name in used)


def test_an_expert_sees_only_its_own_tokens() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    layer = model.layers[0].mlp
    assert isinstance(layer, MixtureOfExperts)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1e-3  # ties go to experts 0 and 1 but for the tokens that this favors
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().flatten(0, 1)))
    found = mean_squared_inputs(model, torch.randint(0, 30, (1, 24)))
    x = inputs[0]
    chosen = x[x.sum(dim=1) > 0]
    torch.testing.assert_close(found["layers.0.mlp.up_proj.2"], chosen.square().mean(dim=0))


def test_a_text_of_the_user(bpe: Tokenizer, words: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=64)
    path = tmp_path / "text.txt"
    path.write_text(words, encoding="utf-8")
    ids = calibration_ids(model, bpe, path, tokens=2048)
    assert ids.shape == (32, 64)
    whole = " ".join(map(str, bpe.encode(words)))
    assert all(" ".join(map(str, row.tolist())) in whole for row in (ids[0], ids[-1]))
    assert len({tuple(row.tolist()) for row in ids}) == 32
    assert len(calibration_ids(model, bpe, path, tokens=10**6).flatten()) > 0.95 * len(bpe.encode(words))


def test_texts_that_cannot_be_used(bpe: Tokenizer, words: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    path = tmp_path / "text.txt"
    path.write_text(words[:500])
    with pytest.raises(UsageError, match=r"text.txt is too short: \d+ tokens. At least 1,024"):
        calibration_ids(model, bpe, path)
    with pytest.raises(UsageError, match=r"none.txt cannot be read"):
        calibration_ids(model, bpe, tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\x00" * 1000)
    with pytest.raises(UsageError, match=r"text.txt cannot be read"):
        calibration_ids(model, bpe, path)
    with pytest.raises(UsageError, match=r"at least 1,024, not 7"):
        calibration_ids(model, bpe, tokens=7)
    path.write_text("Ж" * 3000)
    with pytest.raises(TokenizerError, match=r"--calibration .*text.txt: .*Ж"):
        calibration_ids(model, train_char([words]), path)
    with pytest.raises(UsageError, match=r"text.txt: the tokenizer has no tokens for 100% of the text"):
        calibration_ids(model, train_char([words], unknown=True), path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_built_in_text_and_what_the_model_writes(family: str, bpe: Tokenizer, words: str) -> None:
    model = tiny_model(family, vocab_size=300)
    ids = calibration_ids(model, bpe, tokens=4096)
    assert ids.shape == (4096 // 24, 24)
    small = train_char([words])  # without the characters of the built-in text
    model = tiny_model(family, vocab_size=small.vocab_size)
    ids = calibration_ids(model, small, tokens=4096)
    assert ids.shape[1] == 24
    assert ids.numel() >= LEAST
    assert int(ids.max()) < small.vocab_size
    assert torch.equal(ids, calibration_ids(model, small, tokens=4096))  # the same again
