"""Weights of a Hugging Face model directory: safetensors, in one file or in shards, or a legacy pytorch_model.bin."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError
from gptsmith.formats.hf import WEIGHTS_FILE
from gptsmith.log import note

INDEX_FILE = WEIGHTS_FILE + ".index.json"
LEGACY_FILE = "pytorch_model.bin"

_LARGEST_JSON = 64 << 20  # bytes; the index of a model of hundreds of shards has about 10 MB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError if it is none, cannot be read, or is absurdly large."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is absurdly large ({size:,} bytes): it is not the file its name says.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: not an object.")
    return values


def open_weights(directory: Path) -> Mapping[str, Tensor]:
    """The weights of a directory: safetensors, in one file or in shards, else a legacy pytorch_model.bin."""
    if (directory / WEIGHTS_FILE).is_file():
        return SafetensorsFiles([directory / WEIGHTS_FILE])
    if (directory / INDEX_FILE).is_file():
        names, paths = _shards(directory / INDEX_FILE, ".safetensors")
        return _complete(SafetensorsFiles(paths), names, directory / INDEX_FILE)
    legacy_index = directory / (LEGACY_FILE + ".index.json")
    if legacy_index.is_file():
        names, paths = _shards(legacy_index, ".bin")
        return _complete(_read_legacy(paths), names, legacy_index)
    if (directory / LEGACY_FILE).is_file():
        return _read_legacy([directory / LEGACY_FILE])
    raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS_FILE}, {INDEX_FILE} nor {LEGACY_FILE}.")


def _shards(index: Path, suffix: str) -> tuple[set[str], list[Path]]:
    """The tensors that an index lists, and the files they are in, which are there and beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map.")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w][\w.\- ]*", shard) and shard.endswith(suffix)
        if not plain:
            raise CheckpointError(
                f"{index} names a shard {shard!r}: not a plain name of a {suffix} file beside it. It is refused."
            )
    paths = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} shards: {_enumerate(missing)}. Fetch it again."
        )
    return set(weight_map), paths


def _complete(tensors: Mapping[str, Tensor], names: set[str], index: Path) -> Mapping[str, Tensor]:
    """`tensors`, if all that the index lists are among them (what they have beyond it, the configuration judges)."""
    missing = sorted(names - tensors.keys())
    if missing:
        raise CheckpointError(f"{index} lists tensors that its shards do not hold: {_enumerate(missing)}.")
    return tensors


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors by name over one or more safetensors files: memory-mapped, each read when it is asked for.

    Raises CheckpointError for a damaged file, a name in two files, and (when it is read) a tensor that is not floating.
    """

    def __init__(self, paths: Sequence[Path], *, codes: bool = False) -> None:
        """codes: of a quantized model, whose tensors may be whole numbers."""
        from safetensors import SafetensorError, safe_open

        self._codes = codes
        self._files: dict[str, tuple[Any, Path]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}.") from None
            for name in names:
                if name in self._files:
                    raise CheckpointError(f"tensor {name} is in two files, {self._files[name][1]} and {path}.")
                self._files[name] = (file, path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        file, path = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {name}: {error}.") from None
        return tensor if self._codes else _floating(tensor, name, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # (a Mapping would read the tensor to know)

    def stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type and shape of each tensor, from the files' headers."""
        types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        slices = {name: file.get_slice(name) for name, (file, _) in self._files.items()}
        return {name: (types.get(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def _floating(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {name} is stored as {kind}; weights are read from fp32, bf16, fp16 and fp64.")
    return tensor


class _Tensors(dict[str, Tensor]):
    """Tensors of a legacy file. Each is floating when it is asked for (files hold masks that nobody asks for)."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        return _floating(super().__getitem__(name), name, self.path)


def _read_legacy(paths: Sequence[Path]) -> Mapping[str, Tensor]:
    """The tensors of pickled files, which torch reads without running what they ask to run."""
    note(
        f"warning: {paths[0].parent} has its weights in the legacy format of {LEGACY_FILE}, a pickle. It is read with "
        "weights_only=True, which runs no code; `gptsmith import` writes safetensors instead."
    )
    tensors = _Tensors()
    tensors.path = paths[0]
    for path in paths:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a stranger's pickle can fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
            raise CheckpointError(
                f"{path} cannot be read as plain tensors (weights_only=True): {reason}. It is damaged or holds more "
                "than weights; take the model in safetensors."
            ) from None
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items()
        ):
            raise CheckpointError(f"{path} holds no mapping of names to tensors.")
        for name, tensor in values.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{path}: {name} claims more numbers than are stored. It is refused.")
        tensors.update(values)
    return tensors
