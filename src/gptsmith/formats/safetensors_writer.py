"""Writing safetensors files as a stream, so that a checkpoint takes the memory of one tensor and not of all."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_TYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""In the order of the safetensors library, which writes the last of them first."""
_ALIGNMENT = 8


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write what `safetensors.torch.save` returns, byte for byte, with one tensor at a time in memory.

    tensors: each is looked up twice, first for its type and shape, so it may be made on access. They may be views, of
        any strides, and on a GPU.
    """
    layout = layout_of({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    file.write(layout.header)
    for name in layout.begins:
        file.write(little_endian(tensors[name]))


@dataclass(frozen=True)
class FileLayout:
    """Where things are in a safetensors file."""

    header: bytes
    """What the file begins with."""
    begins: dict[str, int]
    """Where the numbers of each tensor begin, in order."""
    size: int
    """Bytes of the whole file."""


def layout_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> FileLayout:
    """Return the layout of a file with tensors of these types and shapes, as the safetensors library orders them."""
    rank = {dtype: -place for place, dtype in enumerate(_TYPE_NAMES)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0])):
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    written = struct.pack("<Q", len(text)) + text
    return FileLayout(written, {name: len(written) + begin for name, begin in begins.items()}, len(written) + end)


def little_endian(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers in row-major order: its own memory if it has that order, else a copy.

    Copied by one thread, beside those that compute.
    """
    tensor = tensor.detach().cpu()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    numbers: Any = np.ascontiguousarray(tensor.view(whole).numpy())  # NumPy has no bf16
    return memoryview(numbers.reshape(-1)).cast("B") if numbers.size else memoryview(b"")
