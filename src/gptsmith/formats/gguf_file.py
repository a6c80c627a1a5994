"""The GGUF container: metadata and tensors in one file, read with every size checked before it is used.

Layout (ggml's docs/gguf.md, versions 2 and 3, little-endian): magic, version, number of tensors, number of metadata
entries; the entries (key, type, value); for each tensor its name, dimensions (fastest first), type and offset; padding;
the tensors' data, each at a multiple of the alignment.

Files are not trusted: counts and lengths are compared with the file's size and with fixed limits before anything is
allocated, so a damaged or hostile file leads to a CheckpointError in bounded memory.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from gptsmith.errors import CheckpointError, UsageError, first_few
from gptsmith.formats.gguf_blocks import (
    TABLES,
    TENSOR_TYPES,
    TYPES_BY_NAME,
    ZERO_CODES,
    TensorType,
    decode,
    encode,
    split,
)
from gptsmith.model.quantized import Bits, Codes, fits_half
from gptsmith.model.quantized import encode as quantize_matrix
from gptsmith.storage import atomic_file

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

_MAX_ENTRIES = 1 << 16  # metadata entries
_MAX_TENSORS = 1 << 20
_MAX_DIMENSIONS = 4
_MAX_NAME = 1 << 10  # bytes of a key or a tensor's name
_MAX_STRING = 1 << 26  # bytes of a string value, which can be a whole tokenizer.json
_MAX_ELEMENTS = 1 << 23  # in all arrays together; the largest vocabularies need about two million
_MAX_ALIGNMENT = 1 << 16
_MAX_PARTS = 10_000

_OTHER_TYPES = (  # of ggml, which are not supported
    {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
    | {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"}
)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {  # value type: struct format
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored.

    shape: slowest dimension first, as in numpy and torch. offset: bytes into the file. part: of a file that is split.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    part: int = 0

    @property
    def num_bytes(self) -> int:
        return self.type.num_bytes(math.prod(self.shape))


@dataclass(frozen=True)
class GgufFile:
    """An opened file, or all parts of one that is split.

    metadata: plain values; arrays of numbers as numpy arrays, arrays of strings as lists. tensors: by name. parts: the
    memory-mapped files.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    parts: tuple[mmap.mmap, ...]

    def bytes_of(self, name: str, count: int | None = None) -> np.ndarray:
        """Return the stored bytes of a tensor, (bytes,) uint8 without a copy; only the first `count` if given."""
        info = self.tensors[name]
        return np.frombuffer(self.parts[info.part], np.uint8, info.num_bytes if count is None else count, info.offset)

    def read(self, name: str, part: int | None = None) -> np.ndarray:
        """Return tensor `name` dequantized to float32. part: only that index of its first dimension.

        Raises CheckpointError if a number is not finite.
        """
        raw, type, shape = self._raw(name, part)
        numbers = decode(type.name, raw).reshape(shape)
        if not np.isfinite(numbers).all():
            raise self._not_finite(name)
        return numbers

    def codes(self, name: str, part: int | None = None) -> Codes | None:
        """Return a matrix as quantized codes; None for a type that is not quantized.

        They are exact, but for scales that are a product in the file (K-quants, IQ4_XS), which are rounded to float16.
        Types with a scale for 16 numbers are rounded again. part: only that index of the first dimension, for a tensor
        of several matrices. Raises CheckpointError if a scale is not finite.
        """
        raw, type, shape = self._raw(name, part)
        if type.block_size == 1:
            return None
        if type.name not in _KEPT:
            return quantize_matrix(torch.from_numpy(self.read(name, part)), _ROUNDED[type.name])
        with np.errstate(all="ignore"):
            parts = split(type.name, raw.reshape(-1, type.block_bytes))
        bits, codes = _KEPT[type.name], parts.codes
        zero = ZERO_CODES.get(type.name, 0)
        if type.name in TABLES:
            zero = 12 if bits < 8 else 128  # MXFP4's values are whole numbers from -12 to 12
            codes = (TABLES[type.name].astype(np.int16) + zero).astype(np.uint8)[codes]
        scales = torch.from_numpy(parts.scales).view(shape[0], -1)
        zero_points = None
        if parts.minima is not None:
            zero_points = torch.from_numpy(parts.minima).view(shape[0], -1)
        elif bits < 8:
            zero_points = -zero * scales
        if not all(bool(numbers.isfinite().all()) for numbers in (scales, zero_points) if numbers is not None):
            raise self._not_finite(name)
        if not all(fits_half(numbers) for numbers in (scales, zero_points) if numbers is not None):
            return quantize_matrix(torch.from_numpy(self.read(name, part)), 8)
        return Codes(
            bits,
            torch.from_numpy(codes).view(shape[0], -1),
            scales.half(),
            None if zero_points is None else zero_points.half(),
        )

    def _raw(self, name: str, part: int | None) -> tuple[np.ndarray, TensorType, tuple[int, ...]]:
        info = self.tensors[name]
        shape, start, size = info.shape, info.offset, info.num_bytes
        if part is not None:
            size //= shape[0]
            start, shape = start + part * size, shape[1:]
        return np.frombuffer(self.parts[info.part], dtype=np.uint8, count=size, offset=start), info.type, shape

    def _not_finite(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: tensor {name!r} has numbers that are not finite.")


_KEPT: dict[str, Bits] = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "MXFP4": 5}
_KEPT |= {"Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8}
"""Types whose numbers `Codes` can represent, and its bits."""
_ROUNDED: dict[str, Bits] = {"Q2_K": 5, "Q3_K": 6, "Q6_K": 6}
"""Bits with which other types are rounded again: the error is at most about that of the type itself."""


# Reading --------------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """What is wrong with a file. `open_gguf` turns it into a CheckpointError with the file's path."""


class _Cursor:
    """Reads values from a buffer in order, never past its end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.position, self.size = buffer, 0, len(buffer)
        self.elements = 0

    def unpack(self, format: str) -> Any:
        width = struct.calcsize(format)
        if self.size - self.position < width:
            raise _Damaged("it ends in the middle of its header")
        (value,) = struct.unpack_from(format, self.buffer, self.position)
        self.position += width
        return value

    def string(self, limit: int, what: str) -> str:
        length = self.unpack("<Q")
        if length > self.size - self.position:
            raise _Damaged(f"{what} claims {length:,} bytes, more than the file has")
        if length > limit:
            raise _Damaged(f"{what} is {length:,} bytes long, more than the supported {limit:,}")
        text = self.buffer[self.position : self.position + length]
        self.position += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"{what} is not UTF-8") from None

    def value(self, type: int, key: str) -> Any:
        what = f"the value of {key!r}"
        if type == _STRING:
            return self.string(_MAX_STRING, what)
        if type == _ARRAY:
            return self.array(key)
        if type not in _SCALARS:
            raise _Damaged(f"{what} has the unknown type {type}")
        value = self.unpack(_SCALARS[type])
        return bool(value) if type == _BOOL else value

    def array(self, key: str) -> Any:
        what = f"the array {key!r}"
        type, length = self.unpack("<I"), self.unpack("<Q")
        if type not in _SCALARS and type != _STRING:
            raise _Damaged(f"{what} has elements of type {type}, which is not supported")
        smallest = 8 if type == _STRING else struct.calcsize(_SCALARS[type])
        if length > (self.size - self.position) // smallest:
            raise _Damaged(f"{what} claims {length:,} elements, more than the file has")
        self.elements += length
        if self.elements > _MAX_ELEMENTS:
            raise _Damaged(f"its metadata arrays have more than {_MAX_ELEMENTS:,} elements")
        if type == _STRING:
            return self.strings(length, what)
        values = np.frombuffer(self.buffer, dtype=_SCALARS[type], count=length, offset=self.position)
        self.position += values.nbytes
        return values.astype(bool) if type == _BOOL else values.copy()

    def strings(self, count: int, what: str) -> list[str]:
        """Read strings in a fast loop: a vocabulary has hundreds of thousands."""
        buffer, position, size, unpack = self.buffer, self.position, self.size, struct.Struct("<Q").unpack_from
        texts = []
        try:
            for _ in range(count):
                (length,) = unpack(buffer, position)
                position += 8
                if length > _MAX_STRING or length > size - position:
                    raise _Damaged(f"{what} has a string of {length:,} bytes, more than the file has or is supported")
                texts.append(buffer[position : position + length].decode("utf-8"))
                position += length
        except struct.error:
            raise _Damaged(f"it ends in the middle of {what}") from None
        except UnicodeDecodeError:
            raise _Damaged(f"{what} has a string that is not UTF-8") from None
        self.position = position
        return texts


def open_gguf(path: Path) -> GgufFile:
    """Read and check a file's header and memory-map its tensors. Raise CheckpointError if it is damaged.

    path: of a file that is split (llama.cpp's gguf-split: NAME-00001-of-00003.gguf), any part; the others must be
    beside it.
    """
    path = Path(path)
    metadata, tensors, data = _open_part(path)
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 1 < count <= _MAX_PARTS:
        return GgufFile(path, metadata, tensors, (data,))
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count:,} parts of a model, and was renamed: the parts must be named "
            f"NAME-00001-of-{count:05d}.gguf and so on."
        )
    paths = [path.with_name(f"{name['stem']}-{part + 1:05d}-of-{count:05d}.gguf") for part in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of {count} parts of the model: {first_few(missing)}."
        )
    joined: dict[str, TensorInfo] = {}
    parts = [_open_part(each) for each in paths]
    for part, (its_metadata, its_tensors, _) in enumerate(parts):
        if (its_metadata.get("split.no"), its_metadata.get("split.count")) != (part, count):
            raise CheckpointError(f"{paths[part]} is not part {part + 1} of {count} of the model.")
        for key, value in its_metadata.items():
            if not key.startswith("split.") and not np.array_equal(parts[0][0].get(key, value), value):
                raise CheckpointError(
                    f"{paths[part]} is of another model than {paths[0].name}: its {key} is {value!r:.80}, not "
                    f"{parts[0][0][key]!r:.80}. Download the parts again."
                )
        for tensor in its_tensors.values():
            if tensor.name in joined:
                raise CheckpointError(f"the tensor {tensor.name!r} is in two parts of the model; one is {paths[part]}.")
            joined[tensor.name] = replace(tensor, part=part)
    metadata = parts[0][0]
    if metadata.get("split.tensors.count", len(joined)) != len(joined):
        raise CheckpointError(
            f"the parts of {paths[0]} have {len(joined):,} tensors, but {metadata['split.tensors.count']!r:.80} are "
            "expected. They may be of different models; download them again."
        )
    return GgufFile(paths[0], metadata, joined, tuple(data for _, _, data in parts))


_PART = re.compile(r"(?P<stem>.+)-(\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def _open_part(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo], mmap.mmap]:
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    try:
        return *_read_header(_Cursor(data)), data
    except _Damaged as problem:
        raise CheckpointError(f"{path} is not a readable GGUF file: {problem}.") from None


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if cursor.buffer[:4] != MAGIC:
        raise _Damaged("it does not begin with the letters GGUF")
    cursor.position = 4
    version = cursor.unpack("<I")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise _Damaged("it is big-endian, which is not supported")
        raise _Damaged(f"its format version is {version}; supported are 2 and 3")
    num_tensors, num_entries = cursor.unpack("<Q"), cursor.unpack("<Q")
    for count, limit, min_bytes, what in (
        (num_entries, _MAX_ENTRIES, 13, "metadata entries"),
        (num_tensors, _MAX_TENSORS, 24, "tensors"),
    ):
        if count > min(limit, cursor.size // min_bytes):
            raise _Damaged(f"it claims {count:,} {what}")

    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string(_MAX_NAME, "a metadata key")
        if key in metadata:
            raise _Damaged(f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.unpack("<I"), key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment!r}, not a power of two up to {_MAX_ALIGNMENT}")

    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise _Damaged(f"the tensor {info.name!r} occurs twice")
        if info.offset % alignment:
            raise _Damaged(f"the tensor {info.name!r} is at offset {info.offset:,}, not a multiple of {alignment}")
        placed = TensorInfo(info.name, info.shape, info.type, start + info.offset)
        if placed.offset + placed.num_bytes > cursor.size:
            raise _Damaged(
                f"it ends at byte {cursor.size:,}, but the tensor {info.name!r} extends to byte "
                f"{placed.offset + placed.num_bytes:,}; it may be truncated"
            )
        tensors[info.name] = placed
    end, last = 0, ""
    for info in sorted(tensors.values(), key=lambda each: each.offset):
        if info.offset < end:
            raise _Damaged(f"the tensors {last!r} and {info.name!r} overlap")
        end, last = info.offset + info.num_bytes, info.name
    return metadata, tensors


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    """Read one tensor's entry. Its offset is still relative to the start of the data."""
    name = cursor.string(_MAX_NAME, "a tensor's name")
    dimensions = cursor.unpack("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"the tensor {name!r} has {dimensions:,} dimensions")
    shape = tuple(cursor.unpack("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.unpack("<I"), cursor.unpack("<Q")
    if number not in TENSOR_TYPES:
        raise _Damaged(
            f"the tensor {name!r} is of type {_OTHER_TYPES.get(number, f'number {number}')}, which is not supported "
            f"(supported: {', '.join(TYPES_BY_NAME)})"
        )
    type = TENSOR_TYPES[number]
    if 0 in shape or type.num_bytes(math.prod(shape)) > cursor.size:
        raise _Damaged(f"the tensor {name!r} claims the size {' x '.join(map(str, shape))}, more than the file has")
    if shape[-1] % type.block_size:
        raise _Damaged(
            f"the tensor {name!r} has rows of {shape[-1]:,}, not a multiple of {type.name}'s {type.block_size}"
        )
    return TensorInfo(name, shape, type, offset)


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `numbers` is called when the file has reached it, so that only one is in memory."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    numbers: Callable[[], np.ndarray]
    importance: torch.Tensor | None = None
    """Of its columns: see `gguf_blocks.encode`."""

    @property
    def num_bytes(self) -> int:
        return self.type.num_bytes(math.prod(self.shape))


def write_gguf_file(file: IO[bytes], metadata: Mapping[str, Any], tensors: list[PlannedTensor]) -> None:
    """Write a version 3 file.

    Metadata values are str, bool, int (stored as uint32), float (float32), np.uint16, np.int32, and lists or arrays of
    these; arrays of integers are stored as int32, other numbers as float32.
    """
    header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        header += [
            _string(tensor.name),
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape)),
            struct.pack("<IQ", tensor.type.number, offset),
        ]
        offset += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
    written = file.write(b"".join(header))
    file.write(bytes(-written % ALIGNMENT))
    for tensor in tensors:
        packed = encode(tensor.type.name, tensor.numbers(), tensor.importance)
        file.write(packed.data)
        file.write(bytes(-packed.nbytes % ALIGNMENT))


def write_gguf_parts(
    path: Path, metadata: Mapping[str, Any], tensors: list[PlannedTensor], part_bytes: int
) -> list[Path]:
    """Write a model as NAME-00001-of-00003.gguf and so on, like llama.cpp's gguf-split; return the paths.

    path: NAME.gguf. part_bytes: how much of the tensors a part may have; a larger tensor gets a part of its own.
    The first part has the metadata. If a part cannot be written, none remain.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) > _MAX_PARTS:
        raise UsageError(f"the model would have {len(groups):,} parts, more than {_MAX_PARTS:,}. Make them larger.")
    common = {"split.count": np.uint16(len(groups)), "split.tensors.count": np.int32(len(tensors))}
    paths = [path.with_name(f"{path.stem}-{i:05d}-of-{len(groups):05d}.gguf") for i in range(1, len(groups) + 1)]
    try:
        for i, (part, group) in enumerate(zip(paths, groups, strict=True)):
            with atomic_file(part) as file:
                its_metadata = {**(metadata if i == 0 else {}), "split.no": np.uint16(i), **common}
                write_gguf_file(file, its_metadata, group)
    except BaseException:
        for part in paths:
            part.unlink(missing_ok=True)
        raise
    return paths


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, np.uint16):
        return struct.pack("<IH", 2, int(value))
    if isinstance(value, np.int32):
        return struct.pack("<Ii", 5, int(value))
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, list) and not value:  # ggml expects an empty array to be one of strings
        return struct.pack("<IIQ", _ARRAY, _STRING, 0)
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        return struct.pack("<IIQ", _ARRAY, 5, array.size) + array.astype("<i4").tobytes()
    return struct.pack("<IIQ", _ARRAY, 6, array.size) + array.astype("<f4").tobytes()
