"""Model directories that other programs have quantized: GPTQ, AWQ, compressed-tensors, bitsandbytes and MXFP4.

    tensors = open_quantized(files, config["quantization_config"], where)

gives the weights under the names and shapes of the full-precision model, dequantized on access. `codes` gives a matrix
as `model.quantized` keeps it, where its groups are runs of whole 32 columns.

| quant_method | written by | tensors that stand for NAME.weight |
|---|---|---|
| gptq | GPTQModel, AutoGPTQ | NAME.qweight, .qzeros, .scales, .g_idx |
| awq | AutoAWQ (versions gemm, gemv) | NAME.qweight, .qzeros, .scales |
| compressed-tensors | llm-compressor (pack-quantized) | NAME.weight_packed, .weight_scale, .weight_zero_point … |
| bitsandbytes | transformers (nf4, fp4; int8) | NAME.weight, .weight.absmax, .weight.quant_state…; .SCB |
| mxfp4 | OpenAI's gpt-oss | NAME_blocks, NAME_scales, which stand for NAME |

Files are not trusted: shapes are compared before anything is read, and one matrix is dequantized at a time.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row · E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.errors import CheckpointError, first_few
from gptsmith.formats.hf import read_json
from gptsmith.formats.safetensors import SafetensorsFiles
from gptsmith.model.quantized import BITS, GROUP, Codes, encode, fits_half

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column 8 j + _AWQ_ORDER[i]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MAX_STATE_BYTES = 1 << 16  # of bitsandbytes' description of a matrix, a small JSON text


@dataclass(frozen=True)
class Grouped:
    """An (R, K) matrix of codes: (code - zero) times scale.

    codes: (R, K) uint8. scales, zeros: (R, G) float32. groups: (K,) the group of each column; None: K / G in a row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return the matrix: (R, K) float32."""
        if self.groups is not None:
            return (self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups]
        codes = self.codes.view(*self.scales.shape, -1)
        return ((codes - self.zeros[..., None]) * self.scales[..., None]).flatten(1)

    def kept(self, bits: int) -> Codes | None:
        """Return the matrix as it can be kept; None if its groups are not whole runs of 32 columns.

        bits: of its codes; they become the next of 4, 5, 6 and 8. Scales and zero points are rounded to float16, in
        which most of them are stored.
        """
        K = self.codes.shape[1]
        G = self.scales.shape[1]
        if self.groups is not None or K % GROUP or (K // G) % GROUP or not fits_half(self.scales):
            return None
        repeat = K // G // GROUP
        scales, zeros = (part.repeat_interleave(repeat, dim=1) for part in (self.scales, self.zeros))
        width = next(each for each in BITS if each >= bits)
        if width < 8:
            return Codes(width, self.codes, scales.half(), (-zeros * scales).half())
        shifted = self.codes - self.zeros.repeat_interleave(K // G, dim=1) + 128
        if not bool(((shifted >= 0) & (shifted <= 255)).all()):
            return None
        return Codes(8, shifted.to(torch.uint8), scales.half(), None)


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized tensor in a file, not yet read. shape: of the full-precision tensor. bits: of a code."""

    shape: tuple[int, ...]
    bits: int
    grouped: Callable[[], Grouped] | None = None
    plain: Callable[[], Tensor] | None = None
    """Dequantize it, for a method whose numbers are not codes of groups, and for a stack of experts."""
    expert: Callable[[int], Grouped] | None = None
    """Read the matrix of one expert of a stack, as (outputs, inputs)."""


class QuantizedTensors(Mapping[str, Tensor]):
    """Weights under the names of the full-precision model: quantized ones float32, others as they are stored.

    Raises CheckpointError on access for a tensor that is damaged.
    """

    def __init__(
        self,
        files: SafetensorsFiles,
        matrices: Mapping[str, StoredMatrix],
        used: Collection[str],
        transposed: Callable[[str], bool],
    ) -> None:
        """matrices: by the name of the full-precision tensor. used: the stored tensors that they consist of.

        transposed: whether the full-precision tensor is (K, R), as GPT-2 has them.
        """
        self._files, self._matrices, self._transposed = files, dict(matrices), transposed
        self._plain = dict.fromkeys(name for name in files if name not in used)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._plain:
            return self._files.floating(name)
        matrix = self._matrices[name]
        tensor = matrix.plain() if matrix.plain is not None else self._grouped(name).dequantized()
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self._files.where} is damaged: {name} has numbers that are not finite.")
        return tensor.mT if self._is_transposed(name) else tensor

    def _is_transposed(self, name: str) -> bool:
        """Return whether a matrix is stored as (R, K), but (K, R) in full precision. Stacks are read as they are."""
        return self._matrices[name].expert is None and self._transposed(name)

    def _grouped(self, name: str) -> Grouped:
        grouped = self._matrices[name].grouped
        assert grouped is not None
        return grouped()

    def is_quantized(self, name: str) -> bool:
        """Return whether the tensor is stored quantized."""
        return name in self._matrices

    def codes(self, name: str, expert: int | None = None) -> Codes | None:
        """Return a quantized matrix, of a stack that of one expert; None if it cannot be kept as it is."""
        matrix = self._matrices[name]
        if matrix.expert is not None and expert is not None:
            grouped = matrix.expert(expert)
            return grouped.kept(matrix.bits) or encode(grouped.dequantized(), 8)
        return None if matrix.grouped is None else self._grouped(name).kept(matrix.bits)

    def stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Return type (None: quantized) and shape of each tensor, from the files' headers."""
        stored = self._files.stored()
        plain = {name: stored[name] for name in self._plain}
        shapes = {
            name: matrix.shape[::-1] if self._is_transposed(name) else matrix.shape
            for name, matrix in self._matrices.items()
        }
        return plain | {name: (None, shape) for name, shape in shapes.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._matrices or name in self._plain

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._matrices

    def __len__(self) -> int:
        return len(self._plain) + len(self._matrices)


# Opening --------------------------------------------------------------------------------------------------------------


def quantization_settings(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a model directory is quantized, as `quantization_config` says it; None if it is not.

    config: the contents of its config.json. Older programs wrote the settings into files or fields of their own.
    Raises CheckpointError for settings that are not a JSON object.
    """
    values = config.get("quantization_config") or config.get("compression_config")
    if values:
        if not isinstance(values, dict):
            raise CheckpointError(f"{directory}/config.json: quantization_config is {values!r:.80}, not an object.")
        if "quant_method" not in values and (values.get("load_in_4bit") or values.get("load_in_8bit")):
            return {**values, "quant_method": "bitsandbytes"}
        return values
    if (directory / "quantize_config.json").is_file():
        return {"quant_method": "gptq", **read_json(directory / "quantize_config.json")}
    if (directory / "quant_config.json").is_file():
        older = read_json(directory / "quant_config.json")
        names = {"w_bit": "bits", "q_group_size": "group_size"}
        return {"quant_method": "awq", **{names.get(key, key): value for key, value in older.items()}}
    return None


def open_quantized(
    files: SafetensorsFiles, settings: Mapping[str, Any], where: str, transposed: Callable[[str], bool]
) -> QuantizedTensors:
    """Return the weights of a quantized model directory.

    files: its tensors. settings: from `quantization_settings`. where: the file they are in, for messages. transposed:
    whether the full-precision model has a matrix of this name as (inputs, outputs).
    Raises CheckpointError for a method or format that is not supported, naming it, and for tensors that are missing or
    do not fit each other.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        named = f"{method!s:.80}" if method is not None else "without a quant_method"
        raise CheckpointError(
            f"{where}: this quantization_config ({named}) is not supported; supported: {', '.join(sorted(_READERS))}. "
            "Use the model's full-precision weights, or a GGUF file of it."
        )
    reader = _READERS[method](files, settings, where)
    matrices = dict(reader.matrices())
    if not matrices:
        raise CheckpointError(f"{where} says that the weights are quantized ({method}), but no tensor is stored so.")
    return QuantizedTensors(files, matrices, reader.used, transposed)


class _Reader:
    """Finds the quantized matrices among a directory's tensors, and compares the shapes of their parts."""

    def __init__(self, files: SafetensorsFiles, settings: Mapping[str, Any], where: str) -> None:
        self.files, self.settings, self.where = files, settings, where
        self.shapes = {name: shape for name, (_, shape) in files.stored().items()}
        self.used: set[str] = set()

    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        """Yield the quantized tensors by the names of the full-precision ones."""
        raise NotImplementedError

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}.")

    def integer(self, key: str, value: Any, choices: tuple[int, ...]) -> int:
        if type(value) is not int or value not in choices:
            raise self.fail(f"{key} is {value!r:.80}; supported are {', '.join(map(str, choices))}")
        return value

    def bases(self, suffix: str) -> list[str]:
        """Return what the names of all tensors with this suffix have before it."""
        return [name.removesuffix(suffix) for name in self.shapes if name.endswith(suffix)]

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor that must exist, and mark it as used."""
        if name not in self.shapes:
            raise self.fail(f"the tensor {name} is missing")
        shape = self.shapes[name]
        if len(shape) != dimensions or 0 in shape:
            raise self.fail(f"{name} is {list(shape)}, expected {dimensions} dimensions")
        self.used.add(name)
        return shape

    def expect(self, name: str, *shape: int) -> None:
        """Check the shape of a tensor that must exist, and mark it as used."""
        if self.shape(name, len(shape)) != shape:
            raise self.fail(f"{name} is {list(self.shapes[name])}, expected {list(shape)}")

    def tensor(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """Read a tensor of one of these types."""
        tensor = self.files[name]
        if tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.fail(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, expected {kinds}")
        return tensor

    def group_size(self, name: str, columns: int, given: Any) -> int:
        """Return the number of columns of a group. given: the setting; -1 or None: all columns."""
        if given in (-1, None):
            return columns
        if type(given) is not int or given < 1:
            raise self.fail(f"group_size is {given!r:.80}, not a positive integer or -1")
        if columns % given:
            raise self.fail(f"{name} has {columns:,} columns, which groups of {given:,} do not divide")
        return given


class _GptqReader(_Reader):
    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        bits = self.integer("bits", self.settings.get("bits"), (2, 3, 4, 8))
        form = self.settings.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2") or self.settings.get("pack_dtype", "int32") != "int32":
            form = f"{form!r:.80}, packed in {self.settings.get('pack_dtype', 'int32')!r:.80}"
            raise self.fail(
                f"GPTQ weights in the format {form} are not supported; supported are gptq and gptq_v2 in int32"
            )
        for base in self.bases(".qweight"):
            qweight, qzeros, g_idx = f"{base}.qweight", f"{base}.qzeros", f"{base}.g_idx"
            words, R = self.shape(qweight, 2)
            its_bits, K = bits, words * 32 // bits
            if g_idx in self.shapes:
                (K,) = self.shape(g_idx, 1)
                if self.settings.get("dynamic"):  # settings of single modules; the shapes tell theirs
                    its_bits = self.integer(f"the number of bits of {base}", words * 32 // K, (2, 3, 4, 8))
            if words * 32 != K * its_bits:
                raise self.fail(f"{qweight} has {words:,} words for {K:,} columns, which are not {its_bits} bits each")
            size = self.settings.get("group_size")
            G = self.shape(f"{base}.scales", 2)[0]
            if self.settings.get("dynamic") and K % G == 0:
                size = K // G
            G = K // self.group_size(base, K, size)
            self.expect(f"{base}.scales", G, R)
            if R * its_bits % 32:
                raise self.fail(f"{qweight} has {R:,} columns, which do not fill words with {its_bits} bits each")
            self.expect(qzeros, G, R * its_bits // 32)
            yield f"{base}.weight", StoredMatrix((R, K), its_bits, self.reading(base, its_bits, K, form == "gptq"))

    def reading(self, base: str, bits: int, K: int, minus_one: bool) -> Callable[[], Grouped]:
        """minus_one: one less than the zero points is stored."""

        def read() -> Grouped:
            codes = _unpack_stream(self.tensor(f"{base}.qweight", torch.int32), bits)  # (K, R)
            zeros = _unpack_stream(self.tensor(f"{base}.qzeros", torch.int32).T, bits)  # (R, G)
            if minus_one:
                zeros = (zeros + 1) & ((1 << bits) - 1)
            scales = self.tensor(f"{base}.scales", *_FLOATS).T.float()
            groups = None
            if f"{base}.g_idx" in self.shapes:
                groups = self.tensor(f"{base}.g_idx", torch.int32, torch.int64).long()
                G = scales.shape[1]
                if int(groups.min()) < 0 or int(groups.max()) >= G:
                    raise self.fail(f"{base}.g_idx names groups that do not exist: there are {G:,}")
                if torch.equal(groups, torch.arange(K) // (K // G)):
                    groups = None
            return Grouped(codes.T.contiguous(), scales.contiguous(), zeros.float(), groups)

        return read


class _AwqReader(_Reader):
    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        self.integer("bits", self.settings.get("bits", 4), (4,))
        version = str(self.settings.get("version", "gemm")).lower()
        if version not in ("gemm", "gemv"):
            raise self.fail(
                f"AWQ weights of the version {version!r:.80} are not supported; supported are gemm and gemv"
            )
        if version == "gemv":
            yield from self.by_rows()
            return
        for base in self.bases(".qweight"):
            K, words = self.shape(f"{base}.qweight", 2)
            R = words * 8
            G = K // self.group_size(base, K, self.settings.get("group_size", 128))
            self.expect(f"{base}.scales", G, R)
            if self.settings.get("zero_point", True):
                self.expect(f"{base}.qzeros", G, words)
            elif f"{base}.qzeros" in self.shapes:
                self.used.add(f"{base}.qzeros")
            yield f"{base}.weight", StoredMatrix((R, K), 4, self.reading(base))

    def by_rows(self) -> Iterator[tuple[str, StoredMatrix]]:
        """Yield the matrices of the version gemv: packed along the inputs in plain order, groups padded with zeros."""
        for base in self.bases(".qweight"):
            R, words = self.shape(f"{base}.qweight", 2)
            K = words * 8
            size = self.group_size(base, K, self.settings.get("group_size", 128))
            G, multiple = K // size, {32: 32, 64: 16}.get(size, 8)
            if size < 128 and size not in (32, 64):
                raise self.fail(f"group_size is {size}; AWQ weights of the version gemv have 32, 64 or at least 128")
            padded = -(-G // multiple) * multiple
            self.expect(f"{base}.scales", R, padded)
            if self.settings.get("zero_point", True):
                self.expect(f"{base}.qzeros", R, padded // 8)
            elif f"{base}.qzeros" in self.shapes:
                self.used.add(f"{base}.qzeros")
            yield f"{base}.weight", StoredMatrix((R, K), 4, self.reading_rows(base, G))

    def reading_rows(self, base: str, G: int) -> Callable[[], Grouped]:
        def read() -> Grouped:
            codes = _unpack_words(self.tensor(f"{base}.qweight", torch.int32), 4)
            scales = self.tensor(f"{base}.scales", *_FLOATS)[:, :G].float().contiguous()
            if self.settings.get("zero_point", True):
                zeros = _unpack_words(self.tensor(f"{base}.qzeros", torch.int32), 4)[:, :G].float()
            else:
                zeros = torch.full_like(scales, 8)
            return Grouped(codes, scales, zeros)

        return read

    def reading(self, base: str) -> Callable[[], Grouped]:
        def read() -> Grouped:
            codes = _unpack_awq(self.tensor(f"{base}.qweight", torch.int32)).T.contiguous()
            scales = self.tensor(f"{base}.scales", *_FLOATS).T.float().contiguous()
            if self.settings.get("zero_point", True):
                zeros = _unpack_awq(self.tensor(f"{base}.qzeros", torch.int32)).T.float()
            else:
                zeros = torch.full_like(scales, 8)
            return Grouped(codes, scales, zeros)

        return read


class _CompressedReader(_Reader):
    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        groups = self.settings.get("config_groups")
        forms = {self.settings.get("format")}
        if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
            raise self.fail("quantization_config has no config_groups")
        forms = {each.get("format") or self.settings.get("format") for each in groups.values()}
        if forms != {"pack-quantized"}:
            named = first_few(sorted(repr(form) for form in forms))
            raise self.fail(f"compressed-tensors of the format {named} are not supported; supported is pack-quantized")
        for base in self.bases(".weight_packed"):
            arguments = self.arguments(groups, base)
            bits = self.integer("num_bits", arguments.get("num_bits"), (2, 3, 4, 5, 6, 7, 8))
            if arguments.get("type", "int") != "int":
                raise self.fail(f"weights of the type {arguments['type']!r:.80} are not supported; supported is int")
            R, words = self.shape(f"{base}.weight_packed", 2)
            self.expect(f"{base}.weight_shape", 2)
            K = self.columns(base, R, words, bits)
            strategy = arguments.get("strategy", "group" if arguments.get("group_size") else "channel")
            if strategy not in ("group", "channel", "tensor"):
                raise self.fail(f"weights with a scale by {strategy!r:.80} are not supported")
            size = self.group_size(base, K, arguments.get("group_size") if strategy == "group" else -1)
            if strategy == "tensor":
                self.expect(f"{base}.weight_scale", 1)
            else:
                self.expect(f"{base}.weight_scale", R, K // size)
            zeros, order = f"{base}.weight_zero_point", f"{base}.weight_g_idx"
            if zeros in self.shapes:
                self.used.add(zeros)
            elif not arguments.get("symmetric", True):
                raise self.fail(f"the tensor {zeros} is missing")
            if order in self.shapes:
                self.expect(order, K)
            yield f"{base}.weight", StoredMatrix((R, K), bits, self.reading(base, bits, R, K, K // size))

    def arguments(self, groups: Mapping[str, Any], base: str) -> Mapping[str, Any]:
        """Return how a module's weights are quantized: the only group, or the first whose targets name the module."""
        found = []
        for group in groups.values():
            weights = group.get("weights")
            if isinstance(weights, dict):
                found.append((group.get("targets") or [], weights))
        for targets, weights in found:
            for target in targets if isinstance(targets, list) else []:
                if target == base or (str(target).startswith("re:") and _matches(str(target)[3:], base)):
                    return weights
        for targets, weights in found:
            if "Linear" in targets or len(found) == 1:
                return weights
        raise self.fail(f"quantization_config does not tell how {base} is quantized")

    def columns(self, base: str, R: int, words: int, bits: int) -> int:
        rows, columns = self.tensor(f"{base}.weight_shape", torch.int64, torch.int32).tolist()
        if rows != R or columns < 1 or words not in (_dense_words(columns, bits), -(-columns // (32 // bits))):
            raise self.fail(
                f"{base}.weight_shape is [{rows}, {columns}], but {base}.weight_packed has {R:,} rows of {words:,} "
                f"words for codes of {bits} bits"
            )
        return int(columns)

    def reading(self, base: str, bits: int, R: int, K: int, G: int) -> Callable[[], Grouped]:
        def read() -> Grouped:
            codes = self.unpacked(self.tensor(f"{base}.weight_packed", torch.int32), K, bits)
            scales = self.tensor(f"{base}.weight_scale", *_FLOATS).float()
            scales = scales.expand(R, 1).contiguous() if scales.dim() == 1 else scales
            zeros = torch.full_like(scales, 1 << (bits - 1))
            name = f"{base}.weight_zero_point"
            if name in self.shapes:
                points = self.tensor(name, torch.int32, torch.int8)
                packed = points.dtype == torch.int32
                stored = self.unpacked(points.T, R, bits).T if packed else points.int() + (1 << (bits - 1))
                if stored.shape != scales.shape and stored.numel() != 1:
                    raise self.fail(f"{name} is {list(self.shapes[name])}, which does not fit {base}.weight_scale")
                zeros = stored.float().expand(scales.shape).contiguous()
            groups = None
            if f"{base}.weight_g_idx" in self.shapes:
                groups = self.tensor(f"{base}.weight_g_idx", torch.int32, torch.int64).long()
                if int(groups.min()) == -1:  # not set
                    groups = None
                elif int(groups.min()) < 0 or int(groups.max()) >= G:
                    raise self.fail(f"{base}.weight_g_idx names groups that do not exist: there are {G:,}")
                elif torch.equal(groups, torch.arange(K) // (K // G)):
                    groups = None
            return Grouped(codes, scales, zeros, groups)

        return read

    def unpacked(self, words: Tensor, count: int, bits: int) -> Tensor:
        """Return `count` codes of each row (N, W) of words: a dense stream, or as older versions whole codes in each
        word."""
        if words.shape[1] == _dense_words(count, bits):
            return _unpack_stream(words.T, bits)[:count].T.contiguous()
        return _unpack_words(words, bits)[:, :count].contiguous()


def _dense_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _matches(pattern: str, name: str) -> bool:
    try:
        return len(pattern) < 1000 and re.match(pattern, name) is not None
    except re.error:
        return False


class _BitsandbytesReader(_Reader):
    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        for name in list(self.shapes):
            base, dot, kind = name.partition(".quant_state.bitsandbytes__")
            if dot:
                yield base, self.four_bits(base, name, kind)
            elif name.endswith(".SCB"):
                weight = name.removesuffix("SCB") + "weight"
                R, K = self.shape(weight, 2)
                self.expect(name, R)
                self.used.add(f"{weight}_format")
                yield weight, StoredMatrix((R, K), 8, self.eight_bits(weight, name))

    def eight_bits(self, weight: str, scales: str) -> Callable[[], Grouped]:
        def read() -> Grouped:
            form = f"{weight}_format"
            if form in self.shapes and bool(self.files[form].any()):
                raise self.fail(f"{weight} is stored in an order for one kind of GPU, which is not supported")
            codes = (self.tensor(weight, torch.int8).int() + 128).to(torch.uint8)
            scale = self.tensor(scales, torch.float32)[:, None] / 127
            return Grouped(codes, scale, torch.full_like(scale, 128))

        return read

    def four_bits(self, weight: str, state_name: str, kind: str) -> StoredMatrix:
        """Return a matrix of nf4 or fp4: codes of 4 bits, the high half of a byte first, times the absolute maximum of
        their block, which can itself be quantized."""
        if kind not in ("nf4", "fp4"):
            raise self.fail(f"{weight} is of bitsandbytes' type {kind!r:.80}; supported are nf4 and fp4")
        if self.shape(state_name, 1)[0] > _MAX_STATE_BYTES:
            raise self.fail(f"{state_name} is implausibly large")
        try:
            state = json.loads(bytes(self.tensor(state_name, torch.uint8).tolist()))
            shape = tuple(state["shape"])
            size, nested_size = state["blocksize"], state.get("nested_blocksize")
            offset = float(state.get("nested_offset") or 0.0)
            whole = (*shape, size) if nested_size is None else (*shape, size, nested_size)
            if len(shape) != 2 or not all(type(number) is int and number > 0 for number in whole):
                raise ValueError(f"shape {shape!r:.80}, blocksize {size!r:.80}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.fail(f"{state_name} is damaged: {error}") from None
        numbers = math.prod(shape)
        packed = self.shapes.get(weight, ())
        if math.prod(packed) != -(-numbers // 2) or not packed:
            raise self.fail(f"{weight} is {list(packed)}, expected {-(-numbers // 2):,} bytes for {list(shape)}")
        self.used.add(weight)
        blocks = -(-numbers // size)
        self.expect(f"{weight}.absmax", blocks)
        self.expect(f"{weight}.quant_map", 16)
        if nested_size is not None:
            self.expect(f"{weight}.nested_absmax", -(-blocks // nested_size))
            self.expect(f"{weight}.nested_quant_map", 256)

        def read() -> Tensor:
            if nested_size is None:
                absmax = self.tensor(f"{weight}.absmax", *_FLOATS).float()
            else:
                codes = self.tensor(f"{weight}.absmax", torch.uint8).long()
                nested = self.tensor(f"{weight}.nested_absmax", torch.float32).repeat_interleave(nested_size)[:blocks]
                absmax = self.tensor(f"{weight}.nested_quant_map", torch.float32)[codes] * nested + offset
            values = self.tensor(f"{weight}.quant_map", torch.float32)
            stored = self.tensor(weight, torch.uint8, *_FLOATS).flatten()
            if stored.dtype != torch.uint8 or len(stored) * 2 < numbers:
                raise self.fail(f"{weight} is stored as {stored.dtype}, expected uint8")
            halves = torch.stack((stored >> 4, stored & 15), dim=1).flatten()[:numbers]
            return (values[halves.int()] * absmax.repeat_interleave(size)[:numbers]).view(shape)

        return StoredMatrix(shape, 4, plain=read)


class _Mxfp4Reader(_Reader):
    def matrices(self) -> Iterator[tuple[str, StoredMatrix]]:
        alone = sorted(set(self.bases("_scales")) - set(self.bases("_blocks")))
        if alone:
            raise self.fail(f"MXFP4 scales without blocks: {first_few(alone)}")
        for base in self.bases("_blocks"):
            if f"{base}_scales" not in self.shapes:
                raise self.fail(f"the MXFP4 blocks {base}_blocks have no scales: the tensor {base}_scales is missing")
            E, R, G, half = self.shape(f"{base}_blocks", 4)
            if half != 16:
                raise self.fail(f"{base}_blocks has blocks of {half} bytes, expected 16")
            self.expect(f"{base}_scales", E, R, G)
            yield base, StoredMatrix((E, G * 32, R), 5, plain=self.reading(base), expert=self.expert(base))

    def expert(self, base: str) -> Callable[[int], Grouped]:
        """Twice the values are whole numbers from -12 to 12, which are codes of 5 bits."""

        def read(e: int) -> Grouped:
            blocks = self.tensor(f"{base}_blocks", torch.uint8)[e]
            exponents = self.tensor(f"{base}_scales", torch.uint8)[e]
            doubled = torch.tensor([*_E2M1, *(-value for value in _E2M1)]) * 2 + 12
            codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
            scales = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 128)
            return Grouped(doubled.to(torch.uint8)[codes.int()], scales, torch.full_like(scales, 12))

        return read

    def reading(self, base: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            blocks = self.tensor(f"{base}_blocks", torch.uint8)
            exponents = self.tensor(f"{base}_scales", torch.uint8)
            values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
            E, R, G, _ = blocks.shape
            matrices = torch.empty(E, G * 32, R)
            for e in range(E):  # the numbers of one expert at a time
                codes = torch.stack((blocks[e] & 15, blocks[e] >> 4), dim=-1).int()  # (R, G, 16, 2)
                scaled = torch.ldexp(values[codes], exponents[e].int()[..., None, None] - 127)
                matrices[e] = scaled.view(R, G * 32).T
            return matrices

        return read


_READERS: dict[str, type[_Reader]] = {
    "gptq": _GptqReader,
    "awq": _AwqReader,
    "compressed-tensors": _CompressedReader,
    "bitsandbytes": _BitsandbytesReader,
    "mxfp4": _Mxfp4Reader,
}


# Packed integers ------------------------------------------------------------------------------------------------------


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Return the integers in a stream of bits along the first dimension, lowest first: (W, M) -> (32 W / bits, M).

    There are more if W words do not end with a whole integer.
    """
    period = bits // math.gcd(32, bits)  # words after which an integer begins with a word again
    unsigned = F.pad(words.long() & 0xFFFFFFFF, (0, 0, 0, -len(words) % period))
    W, M = unsigned.shape
    integers = torch.empty(W * 32 // bits, M, dtype=torch.uint8)
    for i in range(32 * period // bits):
        word, shift = divmod(i * bits, 32)
        value = unsigned[word::period] >> shift
        if shift + bits > 32:
            value = value | (unsigned[word + 1 :: period] << (32 - shift))
        integers[i :: 32 * period // bits] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return integers


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the integers in words along the last dimension, as many as fit whole, lowest first: (N, W) -> (N, n W)."""
    shifts = torch.arange(32 // bits) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)


def _unpack_awq(words: Tensor) -> Tensor:
    """Return AWQ's codes of 4 bits: (N, W) -> (N, 8 W)."""
    integers = _unpack_words(words, 4).view(*words.shape, 8)
    return integers[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(-2)
