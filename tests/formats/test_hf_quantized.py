"""Model directories that other programs have quantized: packed here by their published formulas, and by their packages
where these are installed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptsmith.cli import main
from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import save_model, weights_to_hf
from gptsmith.formats.hf_quantized import open_quantized
from gptsmith.formats.safetensors import SafetensorsFiles
from gptsmith.formats.source import open_model
from gptsmith.model import families
from gptsmith.model.config import ModelConfig
from gptsmith.model.quantized import QuantizedMatrix
from gptsmith.model.quantized import dequantize as make_plain
from gptsmith.model.transformer import Transformer

Packed = tuple[
    dict[str, Tensor], Tensor
]  # what is stored, by the end of its name, and the numbers (R, K) it stands for
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
LINEAR = re.compile(r".*_proj\.weight")


def rounded(weight: Tensor, bits: int, size: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (R, K), zeros (R, G) and float16 scales (R, G) of plain rounding."""
    R, K = weight.shape
    groups = weight.view(R, K // size, size)
    highest = 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) / (highest // 2)).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / highest).half().float()
        zeros = (-low / scales).round().clamp(0, highest)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, highest)
    return codes.int().view(R, K), zeros.int(), scales


def numbers(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return (codes - zeros[:, groups]).float() * scales[:, groups]


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers along the first dimension, packed as a stream of bits, lowest first: a row of bits for each column."""
    each = (codes.astype(np.uint8)[:, :, None] >> np.arange(bits)) & 1  # (n, M, bits)
    flat = each.transpose(1, 0, 2).reshape(codes.shape[1], -1)  # (M, n · bits)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view("<i4").T.copy()


def gptq(weight: Tensor, bits: int, size: int, *, order: bool, symmetric: bool, minus_one: bool = True) -> Packed:
    """As AutoGPTQ's QuantLinear.pack. order: groups of columns by importance, as desc_act makes them."""
    K = weight.shape[1]
    columns = torch.randperm(K, generator=torch.Generator().manual_seed(1)) if order else torch.arange(K)
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[columns] = (torch.arange(K) // size).int()
    codes, zeros, scales = rounded(weight[:, columns], bits, size, symmetric=symmetric)
    codes = codes[:, columns.argsort()]
    stored = (zeros - 1) & (2**bits - 1) if minus_one else zeros
    return {
        "qweight": torch.from_numpy(stream(codes.T.numpy(), bits)),
        "qzeros": torch.from_numpy(stream(stored.numpy(), bits).T.copy()),
        "scales": scales.T.half().contiguous(),
        "g_idx": g_idx,
    }, numbers(codes, zeros, scales, g_idx.long())


def awq(weight: Tensor, size: int) -> Packed:
    """As AutoAWQ's WQLinear_GEMM.from_linear."""
    codes, zeros, scales = rounded(weight, 4, size, symmetric=False)

    def packed(integers: np.ndarray) -> Tensor:  # (N, R) -> (N, R / 8)
        words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.int64)
        for column in range(words.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= integers[:, column * 8 + place].astype(np.int64) << (4 * i)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32))

    return {
        "qweight": packed(codes.T.numpy()),
        "qzeros": packed(zeros.T.numpy()),
        "scales": scales.T.half().contiguous(),
    }, numbers(codes, zeros, scales, torch.arange(weight.shape[1]) // size)


def awq_gemv(weight: Tensor, size: int) -> Packed:
    """As AutoAWQ's WQLinear_GEMV.from_linear: rows in plain order, groups padded for its kernel."""
    codes, zeros, scales = rounded(weight, 4, size, symmetric=False)
    R, G = scales.shape
    words = -(-G // 8)
    multiplier = {32: 4, 64: 2}.get(size, 1)
    words = -(-words // multiplier) * multiplier

    def packed(integers: np.ndarray, words: int) -> Tensor:  # (R, n) -> (R, words)
        found = np.zeros((R, words), np.int64)
        for column in range(integers.shape[1]):
            found[:, column // 8] |= integers[:, column].astype(np.int64) << (4 * (column % 8))
        return torch.from_numpy(found.astype(np.uint32).view(np.int32))

    padded = torch.zeros(R, words * 8, dtype=torch.float16)
    padded[:, :G] = scales
    return {
        "qweight": packed(codes.numpy(), weight.shape[1] // 8),
        "qzeros": packed(zeros.numpy(), words),
        "scales": padded,
    }, numbers(codes, zeros, scales, torch.arange(weight.shape[1]) // size)


def compressed(weight: Tensor, bits: int, size: int, *, symmetric: bool) -> Packed:
    """As compressed-tensors' PackedQuantizationCompressor."""
    codes, zeros, scales = rounded(weight, bits, size, symmetric=symmetric)
    stored = {
        "weight_packed": torch.from_numpy(stream(codes.T.numpy(), bits).T.copy()),
        "weight_scale": scales.bfloat16() if size == 48 else scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = torch.from_numpy(stream(zeros.numpy(), bits))
    groups = torch.arange(weight.shape[1]) // size
    return stored, numbers(codes, zeros, stored["weight_scale"].float(), groups)


def nf4(weight: Tensor, *, nested: bool) -> Packed:
    """As bitsandbytes' quantize_4bit stores them: any 16 values, two codes a byte, a largest number per 64."""
    table = torch.linspace(-1, 1, 16) ** 3
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored: dict[str, Tensor] = {}
    if nested:
        offset = float(absmax.mean())
        map256, largest = torch.linspace(-1, 1, 256), (absmax - offset).abs().max()
        codes = ((absmax - offset) / largest * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        stored = {"absmax": codes, "nested_absmax": largest.reshape(1), "nested_quant_map": map256}
        absmax = map256[codes.long()] * largest + offset
    else:
        stored = {"absmax": absmax}
    indices = (blocks / absmax[:, None]).reshape(-1, 1).sub(table).abs().argmin(dim=1)
    packed = (indices[::2] << 4 | indices[1::2]).to(torch.uint8)[:, None]
    text = json.dumps(state).encode()
    return {
        "weight": packed,
        **{f"weight.{name}": tensor for name, tensor in stored.items()},
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }, (table[indices].view(-1, 64) * absmax[:, None]).view(weight.shape)


def int8(weight: Tensor) -> Packed:
    """As bitsandbytes' Linear8bitLt."""
    scales = weight.abs().amax(dim=1)
    codes = (weight / scales[:, None] * 127).round().to(torch.int8)
    return {"weight": codes, "SCB": scales, "weight_format": torch.zeros(1, dtype=torch.uint8)}, codes * (
        scales[:, None] / 127
    )


def ct_settings(bits: int, size: int, *, symmetric: bool, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changes}},
    }


METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        lambda w: gptq(w, 4, 32, order=False, symmetric=True),
    ),
    "gptq-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False},
        lambda w: gptq(w, 4, 16, order=True, symmetric=False),
    ),
    "gptq-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False},
        lambda w: gptq(w, 8, w.shape[1], order=False, symmetric=False),
    ),
    "gptq-3": (
        {"quant_method": "gptq", "bits": 3, "group_size": 32},
        lambda w: gptq(w, 3, 32, order=False, symmetric=False),
    ),
    "gptq_v2-2": (
        {"quant_method": "gptq", "bits": 2, "group_size": 32, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, 2, 32, order=False, symmetric=False, minus_one=False),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda w: awq(w, 32),
    ),
    "awq-gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMV"},
        lambda w: awq_gemv(w, 32),
    ),
    "compressed": (ct_settings(4, 32, symmetric=True), lambda w: compressed(w, 4, 32, symmetric=True)),
    "compressed-asymmetric": (
        ct_settings(4, 16, symmetric=False),
        lambda w: compressed(w, 4, 16, symmetric=False),
    ),
    "compressed-8": (
        ct_settings(8, 0, symmetric=True, strategy="channel", group_size=None),
        lambda w: compressed(w, 8, w.shape[1], symmetric=True),
    ),
    "compressed-6": (ct_settings(6, 32, symmetric=False), lambda w: compressed(w, 6, 32, symmetric=False)),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: nf4(w, nested=False)),
    "nf4-nested": ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, lambda w: nf4(w, nested=True)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
}
KEPT = {  # bits of the matrices that stay as they are stored; others are rounded to 8 bits again
    "gptq": 4,
    "gptq-3": 4,
    "gptq_v2-2": 4,
    "awq": 4,
    "awq-gemv": 4,
    "compressed": 4,
    "compressed-8": 8,
    "compressed-6": 6,
    "int8": 8,
}


def make(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval()


def write(directory: Path, name: str, model: Transformer | None = None) -> dict[str, Tensor]:
    """Write a model that is quantized by one of METHODS; return the full-precision tensors that it stands for."""
    settings, pack = METHODS[name]
    model = make(families.llama(**LLAMA)) if model is None else model
    directory.mkdir(exist_ok=True)
    save_model(model, directory)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for key, tensor in weights_to_hf(model).items():
        if LINEAR.fullmatch(key):
            stored, expected[key] = pack(tensor.detach())
            tensors |= {key.removesuffix("weight") + end: part.contiguous() for end, part in stored.items()}
        else:
            tensors[key] = expected[key] = tensor.detach()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change(directory, quantization_config=settings)
    return expected


def change(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(directory: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the first layer's q_proj, or remove them. A double underscore stands for a dot."""
    path = directory / "model.safetensors"
    kept = load_file(path)
    for end, tensor in tensors.items():
        name = f"model.layers.0.self_attn.q_proj.{end if end == STATE else end.replace('__', '.')}"
        kept.pop(name, None)
        if tensor is not None:
            kept[name] = tensor
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_read_exactly(name: str, tmp_path: Path) -> None:
    expected = write(tmp_path, name)
    found = weights_to_hf(open_model(tmp_path).model())
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6 * float(tensor.abs().max()), rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_matrices_stay_quantized_where_their_groups_allow_it(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    source = open_model(tmp_path)
    assert source.stored_dtype() == torch.float32
    packed, plain = source.model(packed=True), source.model()
    matrices = [module for module in packed.modules() if isinstance(module, QuantizedMatrix)]
    assert len(matrices) == 8
    assert {matrix.bits for matrix in matrices} == {KEPT.get(name, 8)}
    # scales and zero points are rounded to float16; what cannot be kept is rounded to 8 bits again
    allowed = 1e-3 if name in KEPT else 1 / 200
    for actual, expected in zip(make_plain(packed).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=allowed * float(expected.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["gptq", "awq", "nf4-nested"])
def test_commands_take_quantized_directories(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write(tmp_path / "model", name)
    assert main(["import", str(tmp_path / "model"), "--out", str(tmp_path / "imported")]) == 0
    assert "fp32" in capsys.readouterr().out
    found = weights_to_hf(open_model(tmp_path / "imported").model())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6 * float(tensor.abs().max()), rtol=0)
    assert "quantization_config" not in (tmp_path / "imported" / "config.json").read_text()


@pytest.mark.parametrize(("size", "setting"), [(64, 64), (128, 128), (128, -1)])
def test_awq_by_rows_has_other_padding_for_other_groups(size: int, setting: int, tmp_path: Path) -> None:
    model = make(families.llama(**LLAMA | {"hidden_size": 128, "intermediate_size": 128 if setting == -1 else 1280}))
    save_model(model, tmp_path)
    stored: dict[str, Tensor] = {}
    expected = weights_to_hf(model)
    for key, tensor in weights_to_hf(model).items():
        stored[key] = tensor
        if key.endswith(("down_proj.weight", "o_proj.weight")):  # 20, 10 or one group
            parts, expected[key] = awq_gemv(stored.pop(key), size)
            stored |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(stored, tmp_path / "model.safetensors")
    change(tmp_path, quantization_config=METHODS["awq-gemv"][0] | {"group_size": setting})
    for key, tensor in weights_to_hf(open_model(tmp_path).model()).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0)


def test_experts_and_transposed_matrices(tmp_path: Path) -> None:
    """GPT-2's matrices are (inputs, outputs), but quantized like those of a linear layer."""
    model = make(families.mixtral(**LLAMA, num_experts=3, num_experts_per_tok=2))
    tensors = weights_to_hf(model)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        expected[key] = tensor
        if ".experts." in key:
            parts, expected[key] = gptq(tensor, 4, 32, order=False, symmetric=True)
            stored |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            stored[key] = tensor
    save_model(model, tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    change(tmp_path, quantization_config=METHODS["gptq"][0])
    source = open_model(tmp_path)
    for key, tensor in weights_to_hf(source.model()).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0)
    packed = source.model(packed=True)
    assert {m.bits for m in packed.modules() if isinstance(m, QuantizedMatrix)} == {4}

    model = make(families.gpt2(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    directory = tmp_path / "gpt2"
    directory.mkdir()
    save_model(model, directory)
    stored, expected = {}, {}
    for key, tensor in weights_to_hf(model).items():
        expected[key] = tensor
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            parts, wide = nf4(tensor.T.contiguous(), nested=False)
            expected[key] = wide.T
            stored |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            stored[key] = tensor
    for bare in (False, True):  # files of a model without output matrix lack the prefix
        named = {key.removeprefix("transformer.") if bare else key: tensor for key, tensor in stored.items()}
        save_file(named, directory / "model.safetensors")
        change(directory, quantization_config=METHODS["nf4"][0])
        for key, tensor in weights_to_hf(open_model(directory).model()).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0)
        open_model(directory).model(packed=True)


@pytest.mark.parametrize("family", [families.gpt3, families.gpt_neox])
def test_matrices_that_are_stored_in_another_form(family: Any, tmp_path: Path) -> None:
    """GPT-Neo's queries include the scale of the scores; GPT-NeoX stores the rows of each head together."""
    model = make(family(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for key, tensor in weights_to_hf(model).items():
        expected[key] = tensor
        if tensor.dim() == 2 and re.search(r"(proj|fc|query_key_value|dense|4h|_h)\.weight$", key):
            parts, expected[key] = gptq(tensor, 4, 32, order=False, symmetric=True)
            stored |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            stored[key] = tensor.contiguous()
    save_model(model, tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    change(tmp_path, quantization_config=METHODS["gptq"][0])
    plain, packed = open_model(tmp_path).model(), open_model(tmp_path).model(packed=True)
    for key, tensor in weights_to_hf(plain).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-5)
    assert len([module for module in packed.modules() if isinstance(module, QuantizedMatrix)]) == 8
    for actual, wide in zip(make_plain(packed).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, wide, atol=1e-3 * float(wide.detach().abs().max()), rtol=0)


def test_experts_of_gpt_oss_stay_in_mxfp4(tmp_path: Path) -> None:
    config = families.gpt_oss(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = make(config)
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    expected = {}
    for key, tensor in weights_to_hf(model).items():
        expected[key] = tensor.contiguous()
        if key.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3:
            E, K, R = tensor.shape
            blocks = torch.randint(256, (E, R, K // 32, 16), generator=generator, dtype=torch.uint8)
            exponents = torch.randint(120, 126, (E, R, K // 32), generator=generator, dtype=torch.uint8)
            stored |= {f"{key}_blocks": blocks, f"{key}_scales": exponents}
            values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
            numbers = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1).flatten(-2)
            expected[key] = (numbers * 2.0 ** (exponents.float() - 127)[..., None]).reshape(E, R, K).mT
        else:
            stored[key] = expected[key]
    save_model(model, tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    change(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    source = open_model(tmp_path)
    plain, packed = source.model(), source.model(packed=True)
    for key, tensor in weights_to_hf(plain).items():
        torch.testing.assert_close(tensor, expected[key], atol=0, rtol=0)
    assert {m.bits for m in packed.modules() if isinstance(m, QuantizedMatrix)} == {5}
    rebuilt = make_plain(packed).state_dict()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(rebuilt[key], tensor, atol=0, rtol=0)
    stored.pop(next(key for key in stored if key.endswith("down_proj_scales")))
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="have no scales: the tensor .*down_proj_scales is missing"):
        open_model(tmp_path)


def test_settings_in_files_of_their_own(tmp_path: Path) -> None:
    expected = write(tmp_path / "gptq", "gptq")
    change(tmp_path / "gptq", quantization_config=None)
    settings: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(settings))
    write(tmp_path / "awq", "awq")
    change(tmp_path / "awq", quantization_config=None)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "awq" / "quant_config.json").write_text(json.dumps(settings))
    for name in ("gptq", "awq"):
        found = weights_to_hf(open_model(tmp_path / name).model())
        assert found.keys() == expected.keys()


def mxfp4(directory: Path, **changes: Tensor | None) -> Any:
    """The tensors of two experts, opened: gate_up_proj of 6 rows and 96 columns."""
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor | None] = {
        "norm.weight": torch.ones(3),
        "gate_up_proj_blocks": torch.randint(256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8),
        "gate_up_proj_scales": torch.randint(100, 140, (2, 6, 3), generator=generator, dtype=torch.uint8),
    }
    stored |= changes
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, directory / "model.safetensors")
    files = SafetensorsFiles([directory / "model.safetensors"], quantized=True)
    return open_quantized(files, {"quant_method": "mxfp4"}, str(directory / "config.json"), lambda name: False)


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    expected = convert_moe_packed_tensors(
        stored["gate_up_proj_blocks"], stored["gate_up_proj_scales"], dtype=torch.float32
    )
    assert torch.equal(tensors["gate_up_proj"], expected)
    assert set(tensors) == {"norm.weight", "gate_up_proj"}
    assert tensors.stored() == {"norm.weight": (torch.float32, (3,)), "gate_up_proj": (None, (2, 96, 6))}
    assert tensors.is_quantized("gate_up_proj")
    assert not tensors.is_quantized("norm.weight")


def test_bad_mxfp4_is_rejected(tmp_path: Path) -> None:
    for changes, message in (
        ({"gate_up_proj_scales": None}, "blocks gate_up_proj_blocks have no scales: the tensor gate_up_proj_scales is"),
        ({"gate_up_proj_blocks": None}, "MXFP4 scales without blocks: gate_up_proj"),
        ({"gate_up_proj_scales": torch.zeros(2, 6, 4, dtype=torch.uint8)}, r"\[2, 6, 4\], expected \[2, 6, 3\]"),
        ({"gate_up_proj_blocks": torch.zeros(2, 6, 3, 8, dtype=torch.uint8)}, "blocks of 8 bytes, expected 16"),
        ({"gate_up_proj_blocks": torch.zeros(2, 6, 48, dtype=torch.uint8)}, "expected 4 dimensions"),
        ({"gate_up_proj_scales": torch.ones(2, 6, 3)}, "stored as float32, expected uint8"),
        ({"gate_up_proj_scales": torch.full((2, 6, 3), 255, dtype=torch.uint8)}, "not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            mxfp4(tmp_path, **changes)["gate_up_proj"]


# Other packages as references


def test_compressed_tensors_of_their_package(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    for bits in (4, 8, 3, 5):
        weight = torch.randn(32, 64)
        codes, zeros, _ = rounded(weight, bits, 32, symmetric=False)
        stored, _ = compressed(weight, bits, 32, symmetric=False)
        offset = 2 ** (bits - 1)
        assert torch.equal(pack_to_int32((codes - offset).to(torch.int8), bits), stored["weight_packed"])
        packed = pack_to_int32((zeros - offset).to(torch.int8), bits, packed_dim=0)
        assert torch.equal(packed, stored["weight_zero_point"])
        assert torch.equal(unpack_from_int32(packed, bits, zeros.shape, packed_dim=0).int() + offset, zeros)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_of_its_package(kind: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")

    def pack(weight: Tensor) -> Packed:
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=kind
        )
        stored = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": packed, **stored}, bitsandbytes.functional.dequantize_4bit(packed, state)

    monkeypatch.setitem(METHODS, "package", ({"quant_method": "bitsandbytes", "load_in_4bit": True}, pack))
    # not 96 inputs: its kernel for CPUs dequantizes rows that are not whole blocks of 64 wrongly
    expected = write(tmp_path, "package", make(families.llama(**LLAMA | {"intermediate_size": 128})))
    for key, tensor in weights_to_hf(open_model(tmp_path).model()).items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-6)


# What is rejected

STATE = "weight.quant_state.bitsandbytes__nf4"
WIDE = torch.zeros(8, 65, dtype=torch.int32)
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "method": (
        "gptq",
        lambda d: change(d, quantization_config={"quant_method": "hqq"}),
        r"quantization_config \(hqq\) is not supported; supported: awq, bitsandbytes",
    ),
    "no method": (
        "gptq",
        lambda d: change(d, quantization_config={"bits": 4}),
        r"\(without a quant_method\) is not supported",
    ),
    "no object": ("gptq", lambda d: change(d, quantization_config=[4]), "not an object"),
    "bits": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"bits": 5}),
        "bits is 5; supported are 2, 3, 4, 8",
    ),
    "other bits": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"bits": 8}),
        "which are not 8 bits each",
    ),
    "format": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"checkpoint_format": "marlin"}),
        "format 'marlin'.* not supported",
    ),
    "group size": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"group_size": 56}),
        "columns, which groups of 56 do not divide",
    ),
    "group size of AWQ": (
        "awq",
        lambda d: change(d, quantization_config=METHODS["awq"][0] | {"group_size": 40}),
        "which groups of 40 do not divide",
    ),
    "group size of compressed-tensors": (
        "compressed",
        lambda d: change(d, quantization_config=ct_settings(4, 20, symmetric=True)),
        "which groups of 20 do not divide",
    ),
    "group size 0": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"group_size": 0}),
        "group_size is 0, not a positive integer",
    ),
    "another group size": (
        "gptq",
        lambda d: change(d, quantization_config=METHODS["gptq"][0] | {"group_size": 16}),
        r"scales is \[3, 64\], expected \[6, 64\]",
    ),
    "no scales": ("gptq", lambda d: change_tensors(d, scales=None), "q_proj.scales is missing"),
    "zero points": ("gptq", lambda d: change_tensors(d, qzeros=WIDE), "qzeros is .*, expected"),
    "type": ("gptq", lambda d: change_tensors(d, qweight=torch.zeros(8, 64)), "stored as float32, expected int32"),
    "group index": (
        "gptq",
        lambda d: change_tensors(d, g_idx=torch.full((64,), 7, dtype=torch.int32)),
        "groups that do not exist",
    ),
    "not finite": (
        "gptq",
        lambda d: change_tensors(d, scales=torch.full((2, 64), torch.inf).half()),
        "q_proj.weight has numbers that are not finite",
    ),
    "AWQ's version": (
        "awq",
        lambda d: change(d, quantization_config=METHODS["awq"][0] | {"version": "gemv_fast"}),
        "version 'gemv_fast' are not supported; supported are gemm and gemv",
    ),
    "AWQ's other version": (
        "awq",
        lambda d: change(d, quantization_config=METHODS["awq"][0] | {"version": "gemv"}),
        r"scales is \[\d, 64\], expected \[\d+, 32\]",
    ),
    "groups of AWQ by rows": (
        "awq-gemv",
        lambda d: change(d, quantization_config=METHODS["awq-gemv"][0] | {"group_size": 16}),
        "group_size is 16; AWQ weights of the version gemv have 32, 64 or at least 128",
    ),
    "padding of AWQ by rows": (
        "awq-gemv",
        lambda d: change_tensors(d, qzeros=WIDE),
        r"qzeros is .*, expected \[64, 4\]",
    ),
    "format of compressed-tensors": (
        "compressed",
        lambda d: change(d, quantization_config=ct_settings(4, 32, symmetric=True) | {"format": "float-quantized"}),
        "format 'float-quantized' are not supported; supported is pack-quantized",
    ),
    "no groups": (
        "compressed",
        lambda d: change(d, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        "no config_groups",
    ),
    "another shape": (
        "compressed",
        lambda d: change_tensors(d, weight_shape=torch.tensor([64, 1 << 40])),
        r"weight_shape is \[64, 1099511627776\], but",
    ),
    "no zero points": (
        "compressed-asymmetric",
        lambda d: change_tensors(d, weight_zero_point=None),
        "weight_zero_point is missing",
    ),
    "state": (
        "nf4",
        lambda d: change_tensors(d, **{STATE: torch.tensor(list(b'{"shape": [1e30]}'), dtype=torch.uint8)}),
        "bitsandbytes__nf4 is damaged",
    ),
    "huge shape": (
        "nf4",
        lambda d: change_tensors(
            d,
            **{STATE: torch.tensor(list(b'{"shape": [1048576, 1048576], "blocksize": 64}'), dtype=torch.uint8)},
        ),
        "expected 549,755,813,888 bytes",
    ),
    "largest numbers": ("nf4", lambda d: change_tensors(d, weight__absmax=torch.ones(3)), "absmax is .*, expected"),
    "no table": ("nf4", lambda d: change_tensors(d, weight__quant_map=None), "quant_map is missing"),
    "order of a GPU": (
        "int8",
        lambda d: change_tensors(d, weight_format=torch.ones(1, dtype=torch.uint8)),
        "stored in an order for one kind of GPU",
    ),
    "truncated": (
        "gptq",
        lambda d: os.truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 100),
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_give_one_error_that_names_them(name: str, tmp_path: Path) -> None:
    method, damage, message = BAD[name]
    write(tmp_path, method)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(tmp_path).model()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
