"""Weights of a Hugging Face model directory: safetensors, in one file or in shards, or a legacy pytorch_model.bin.

The files are not trusted: shards must be plain file names beside their index, and a legacy file, which is a pickle, is
read with `weights_only=True`.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import CheckpointError, first_few
from gptsmith.formats.hf import WEIGHTS_FILE, read_json
from gptsmith.log import note

INDEX_FILE = WEIGHTS_FILE + ".index.json"
LEGACY_FILE = "pytorch_model.bin"
_OPTIONAL = re.compile(r"lm_head\.weight|.*\.(attn\.(attention\.)?(masked_)?bias|rotary_emb\.inv_freq)")
"""Tensors that an index may list without there being any: a model can do without them."""


Rename = Callable[[str], str | None]
"""Gives the name of a tensor in a file another one; None: leave it out."""


def open_weights(directory: Path, *, quantized: bool = False, rename: Rename = str) -> Mapping[str, Tensor]:
    """Open the weights of a directory: safetensors, in one file or in shards, else a legacy pytorch_model.bin.

    quantized: integer tensors are allowed; then only safetensors are read.
    Raises CheckpointError if there are none, or if a file is damaged or a shard missing.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return SafetensorsFiles([directory / WEIGHTS_FILE], quantized=quantized, rename=rename)
    if (directory / INDEX_FILE).is_file():
        names, paths = _shards(directory / INDEX_FILE, ".safetensors", rename)
        tensors = SafetensorsFiles(paths, quantized=quantized, rename=rename)
        return _check_complete(tensors, names, directory / INDEX_FILE)
    if quantized:
        raise CheckpointError(f"{directory} has no quantized weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}.")
    legacy_index = directory / (LEGACY_FILE + ".index.json")
    if legacy_index.is_file():
        names, paths = _shards(legacy_index, ".bin", rename)
        return _check_complete(_read_legacy(paths, rename), names, legacy_index)
    if (directory / LEGACY_FILE).is_file():
        return _read_legacy([directory / LEGACY_FILE], rename)
    raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS_FILE}, {INDEX_FILE} nor {LEGACY_FILE}.")


def _shards(index: Path, suffix: str, rename: Rename) -> tuple[set[str], list[Path]]:
    """Return the tensor names that an index lists, and the shards that hold them: existing files beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map.")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w][\w.\- ]*", shard) and shard.endswith(suffix)
        if not plain:
            raise CheckpointError(
                f"{index} rejected: the shard {shard!r} is not the plain name of a {suffix} file beside it."
            )
    weight_map = {new: shard for name, shard in weight_map.items() if (new := rename(name)) is not None}
    paths = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    needed = {shard for name, shard in weight_map.items() if not _OPTIONAL.fullmatch(name)}
    missing = [path.name for path in paths if not path.is_file() and path.name in needed]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} shards: {first_few(missing)}. Download it again."
        )
    return set(weight_map), [path for path in paths if path.is_file()]


def _check_complete(tensors: Mapping[str, Tensor], names: set[str], index: Path) -> Mapping[str, Tensor]:
    """Return `tensors`. Raise CheckpointError unless they include all that the index lists (there may be more).

    An output matrix may be missing: it can be tied to the embeddings.
    """
    missing = sorted(name for name in names - tensors.keys() if not _OPTIONAL.fullmatch(name))
    if missing:
        raise CheckpointError(f"{index} lists tensors that its shards do not contain: {first_few(missing)}.")
    return tensors


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors of one or more safetensors files by name, memory-mapped and read on access.

    Raises CheckpointError for a damaged file, for a name that occurs in two files, and on access for a tensor that is
    not floating-point.
    """

    def __init__(self, paths: Sequence[Path], *, quantized: bool = False, rename: Rename = str) -> None:
        """quantized: the model is quantized, so integer tensors are allowed."""
        from safetensors import SafetensorError, safe_open

        self._quantized = quantized
        self.where = paths[0] if len(paths) == 1 else paths[0].parent
        self._files: dict[str, tuple[Any, Path, str]] = {}  # file, its path, and the name there
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}.") from None
            for stored in names:
                name = rename(stored)
                if name in self._files:
                    raise CheckpointError(f"tensor {name} is in two files, {self._files[name][1]} and {path}.")
                if name is not None:
                    self._files[name] = (file, path, stored)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        file, path, stored = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(stored)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {name}: {error}.") from None
        return tensor if self._quantized else _check_floating(tensor, name, path)

    def floating(self, name: str) -> Tensor:
        """Read a tensor that must be floating-point."""
        return _check_floating(self[name], name, self._files[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor

    def stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Return the type (None: not floating-point) and shape of each tensor, from the files' headers."""
        types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        slices = {name: file.get_slice(stored) for name, (file, _, stored) in self._files.items()}
        return {name: (types.get(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def _check_floating(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {name} is stored as {kind}; weights must be fp32, bf16, fp16 or fp64.")
    return tensor


class _LegacyTensors(dict[str, Tensor]):
    """Tensors of legacy files by name. The type is checked on access, since the files also contain unused masks."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        return _check_floating(super().__getitem__(name), name, self.path)


def _read_legacy(paths: Sequence[Path], rename: Rename) -> Mapping[str, Tensor]:
    """Read pickled tensors without running the code that a pickle can contain."""
    note(
        f"warning: {paths[0].parent} stores its weights in {LEGACY_FILE}, a legacy pickle format. It is read with "
        "weights_only=True, which runs no code. `gptsmith import` converts it to safetensors."
    )
    tensors = _LegacyTensors()
    tensors.path = paths[0]
    for path in paths:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # an untrusted pickle can fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
            raise CheckpointError(
                f"{path} cannot be read as plain tensors (weights_only=True): {reason}. It is damaged or contains more "
                "than weights. Use a safetensors version of the model."
            ) from None
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items()
        ):
            raise CheckpointError(f"{path} does not contain a mapping of names to tensors.")
        for name, tensor in values.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{path} rejected: {name} claims more numbers than are stored (corrupt file).")
        tensors.update({new: tensor for name, tensor in values.items() if (new := rename(name)) is not None})
    return tensors
