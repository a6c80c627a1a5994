"""Calibrated quantization of whole models: quality, interruption, damaged files and full disks."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.model import families
from gptsmith.model.quantized import QuantizedMatrix, bits_of, quantize, quantized_state
from gptsmith.model.transformer import Transformer
from gptsmith.quantize import layers
from gptsmith.quantize.file_matrix import FileMatrix
from gptsmith.quantize.layers import open_partial, quantize_layers, round_outer
from gptsmith.quantize.report import Reference
from tests.factories import tiny_model

WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.15,
    "num_hidden_layers": 3,
}
IDS = torch.randint(0, 30, (48, 24), generator=torch.Generator().manual_seed(0))


def quantized(model: Transformer, directory: Path, bits: Any = 4) -> Transformer:
    widths = open_partial(directory, model, IDS, bits, None)
    quantize_layers(model, IDS, widths, directory)
    round_outer(model)
    return model


def divergence(model: Transformer, other: Transformer) -> float:
    ids = torch.randint(0, 30, (16, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full, rounded = model(ids).log_softmax(dim=-1), other(ids).log_softmax(dim=-1)
    return float((full.exp() * (full - rounded)).sum(dim=-1).mean())


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_better_than_rounding_to_the_nearest(family: str, tmp_path: Path) -> None:
    """With mixed widths in every family, on another text than the calibration."""
    full = tiny_model(family, **WIDE)
    nearest = quantize(tiny_model(family, **WIDE), 4)
    calibrated = quantized(tiny_model(family, **WIDE), tmp_path / "x")
    assert divergence(full, calibrated) < 0.5 * divergence(full, nearest)
    sizes = [sum(t.nbytes for t in quantized_state(m).values()) for m in (calibrated, nearest)]
    assert sizes[0] < 1.15 * sizes[1]  # a row of 64 is short for its two units


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_quantization_ends_with_the_same_bits(
    family: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantized_state(quantized(tiny_model(family, **WIDE), tmp_path / "whole"))
    write = layers._write_layer
    calls: list[Path] = []

    def interrupted(path: Path, made: dict[str, QuantizedMatrix]) -> None:
        if len(calls) == after:
            raise _Interrupted
        calls.append(path)
        write(path, made)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_write_layer", interrupted)
        if after < 3:
            with pytest.raises(_Interrupted):
                quantized(tiny_model(family, **WIDE), tmp_path / "part")
        else:
            quantized(tiny_model(family, **WIDE), tmp_path / "part")
    found = quantized_state(quantized(tiny_model(family, **WIDE), tmp_path / "part"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unfinished_work_of_another_quantization(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    directory = tmp_path / "x"
    open_partial(directory, model, IDS, 4, None)
    for other, ids, bits in (
        (tiny_model("llama", seed=1, **WIDE), IDS, 4),
        (model, IDS, 5),
        (model, IDS[:-1], 4),
    ):
        with pytest.raises(GptsmithError, match="another model, or with other settings"):
            open_partial(directory, other, ids, bits, None)  # type: ignore[arg-type]
    (directory / "plan.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"plan.json is damaged. Delete"):
        open_partial(directory, model, IDS, 4, None)
    (tmp_path / "y").mkdir()
    open_partial(tmp_path / "y", model, IDS, 8, None)  # as after an interruption before there was a plan
    (tmp_path / "y" / "plan.json").rename(tmp_path / "y" / "letter.txt")
    with pytest.raises(GptsmithError, match="is in the way"):
        open_partial(tmp_path / "y", model, IDS, 4, None)
    (tmp_path / "z").write_text("")
    with pytest.raises(GptsmithError, match="is in the way"):
        open_partial(tmp_path / "z", model, IDS, 4, None)


def test_damaged_layers(tmp_path: Path) -> None:
    quantized(tiny_model("llama", **WIDE), tmp_path / "x")
    path = tmp_path / "x" / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"layer-00001.safetensors is damaged"):
        quantized(tiny_model("llama", **WIDE), tmp_path / "x")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_damaged_weights(bad: float, bits: int, tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.o_proj.weight")[3, 5] = bad
    with pytest.raises(GptsmithError, match=r"NaN or infinite: .* weights are damaged"):
        quantized(model, tmp_path / "x", bits)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so, and keeps what is done: the same command goes on after space was made."""

    class Full:
        def seek(self, place: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = quantized_state(quantized(tiny_model("llama", **WIDE), tmp_path / "whole"))
    made = FileMatrix.__init__

    def full(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        if self.rows == len(IDS):  # the states
            self._file = Full()

    with monkeypatch.context() as patch:
        patch.setattr(FileMatrix, "__init__", full)
        with pytest.raises(GptsmithError, match=r"no space left on the disk that holds .*x\. Free"):
            quantized(tiny_model("llama", **WIDE), tmp_path / "x")
    found = quantized_state(quantized(tiny_model("llama", **WIDE), tmp_path / "x"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_experts_without_tokens_are_rounded_too(tmp_path: Path) -> None:
    model = tiny_model("mixtral", **WIDE)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.router.weight.zero_()  # type: ignore[union-attr,operator] # all tokens use experts 0 and 1
    quantized(model, tmp_path / "x")
    names = {name for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    assert {f"layers.0.mlp.{part}.{e}" for part in ("up_proj", "down_proj") for e in range(4)} <= names
    assert bits_of(model) == 4
    plan = json.loads((tmp_path / "x" / "plan.json").read_text())
    assert plan["widths"]["layers.0.mlp.up_proj.3"] in (4, 5, 6, 8)


def test_the_comparison_is_that_of_all_logits(tmp_path: Path) -> None:
    model = tiny_model("qwen3", **WIDE)
    ids = torch.randint(0, 30, (100,)).tolist()
    reference = Reference(model, ids, prefix=[3])
    full = [model(torch.tensor([[3, *ids[i : i + 23]]])) for i in range(0, 100, 23)]
    nothing = reference.compare(model)
    assert nothing.divergence == pytest.approx(0, abs=1e-6)
    assert nothing.agreement == 1
    assert nothing.before == pytest.approx(nothing.after)
    quantized(model, tmp_path / "x")
    found = reference.compare(model)
    losses, after, divergences, same = [], [], [], []
    for i, logits in zip(range(0, 100, 23), full, strict=True):
        part = torch.tensor([[3, *ids[i : i + 23]]])
        p = logits[0, :-1].log_softmax(dim=-1)
        with torch.no_grad():
            q = model(part)[0, :-1].log_softmax(dim=-1)
        losses += (-p.gather(1, part[0, 1:, None])).flatten().tolist()
        after += (-q.gather(1, part[0, 1:, None])).flatten().tolist()
        divergences += (p.exp() * (p - q)).sum(dim=-1).tolist()
        same += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()
    assert found.tokens == len(losses) == 100
    assert found.before == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    assert found.after == pytest.approx(float(torch.tensor(after).mean().exp()), rel=2e-2)  # chunks round inputs alike
    assert found.divergence == pytest.approx(sum(divergences) / 100, rel=0.05)
    assert found.agreement == pytest.approx(sum(same) / 100, abs=0.03)
