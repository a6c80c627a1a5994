"""Checkpoints of a model whose tensors are spread over processes, through torch.distributed.checkpoint (DCP).

    checkpoints/step-00002000/
        config.json  model-00001-of-00014.safetensors …  model.safetensors.index.json  tokenizer.json …
        train/state-00001-of-00014.safetensors …  state.safetensors.index.json  state.json
        manifest.json

This is a Hugging Face directory with one file for each layer. It does not depend on the processes that wrote it: any
number of processes reads it in any layout. DCP plans once who writes what, and notices if a process fails. Each process
writes its values to their place in the files, so nothing has to be merged afterwards, and besides the model one tensor
is in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gptsmith.checkpoint import MANIFEST, STATE_FILE, write_companions, write_state_values
from gptsmith.distributed.context import DistributedContext
from gptsmith.distributed.parallel import named_parameters
from gptsmith.distributed.sharding import Sharding, local, sharding_of
from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.formats.hf import WEIGHTS_FILE, constant_tensors, name_on_disk, weight_mappings, write_json
from gptsmith.formats.safetensors import open_weights
from gptsmith.formats.safetensors_writer import layout_of, little_endian
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers
from gptsmith.storage import TEMPORARY_PREFIX, explain_os_errors, fsync_directory, sha256_file, write_text
from gptsmith.tokenizer import Tokenizer

T = TypeVar("T")
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a block begins, and its size, by dimension."""


# What a process has of a tensor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What this process has of a tensor of `shape`: blocks that lie at these offsets. Blocks are views.

    What is stored is the numbers divided by `scale`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[tuple[tuple[int, ...], Tensor], ...]
    scale: float = 1.0

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def block(self, offsets: Sequence[int] | None) -> Tensor:
        """Return the numbers to store of the block at `offsets`."""
        found = next(tensor for begin, tensor in self.blocks if begin == tuple(offsets or ()))
        return found if self.scale == 1 else found / self.scale

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """What DCP plans with."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(begin)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(begin), block.shape), properties, self.size()
                ),
            )
            for begin, block in self.blocks
        ]


def piece_of(part: Tensor, sharding: Sharding | None = None, at: Mapping[str, int] | None = None) -> Piece:
    """Return a piece: what the process at some coordinates of the mesh has of a tensor that is divided so.

    sharding: None: all processes that have the tensor have all of it.
    """
    part = part.detach()
    shape = tuple(part.shape) if sharding is None else sharding.shape
    runs = [[(0, length)] for length in shape]  # by dimension: runs of the whole, in the order of the part
    for split in () if sharding is None else sharding.splits:
        number = (at or {})[split.axis]
        if split.parts is None:
            lengths = split.lengths(sum(length for _, length in runs[split.dim]))
            wanted = [(sum(lengths[:number]), lengths[number])]
        else:
            ends = itertools.accumulate(split.parts)
            width = [length // split.size for length in split.parts]
            wanted = [(end - length + number * n, n) for end, length, n in zip(ends, split.parts, width, strict=True)]
        runs[split.dim] = [run for begin, length in wanted for run in _cut(runs[split.dim], begin, length)]
    blocks = []
    for corner in itertools.product(*(_numbered(each) for each in runs)):
        local = part[tuple(slice(place, place + length) for _, length, place in corner)]
        blocks.append((tuple(begin for begin, _, _ in corner), local))
    return Piece(shape, part.dtype, tuple(blocks))


def _cut(runs: Sequence[tuple[int, int]], begin: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield what [begin, begin + length) of runs that are laid end to end consists of."""
    place = 0
    for first, size in runs:
        low, high = max(begin, place), min(begin + length, place + size)
        if low < high:
            yield first + low - place, high - low
        place += size


def _numbered(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return runs with where each begins when they are laid end to end."""
    ends = itertools.accumulate(length for _, length in runs)
    return [(first, length, end - length) for (first, length), end in zip(runs, ends, strict=True)]


def weight_pieces(model: Transformer, at: Mapping[str, int]) -> dict[str, Piece]:
    """Return what the process at some coordinates has of a model's weights, by their Hugging Face names."""
    parameters = dict(named_parameters(model))
    with torch.device("meta"):
        undivided = Transformer(model.config, initialize=False)
    pieces: dict[str, Piece] = {}
    for mapping in weight_mappings(model.config):
        p = parameters[mapping.local]
        whole = piece_of(local(p), sharding_of(p), at)
        if mapping.transposed and len(whole.shape) == 2:
            blocks = tuple((tuple(reversed(begin)), block.mT) for begin, block in whole.blocks)
            whole = Piece((whole.shape[1], whole.shape[0]), whole.dtype, blocks)
        if len(whole.shape) == 3:
            whole = _as_matrix(whole)
        sizes = undivided.split_sizes(mapping.local) if len(mapping.hf) > 1 else whole.shape[:1]
        for place, (name, piece) in enumerate(zip(mapping.hf, _split_rows(whole, sizes), strict=True)):
            pieces[name_on_disk(name, model.config)] = dataclasses.replace(
                piece, scale=mapping.scale if place == 0 else 1.0
            )
    return pieces | {name: piece_of(tensor) for name, tensor in constant_tensors(model.config).items()}


def _as_matrix(stack: Piece) -> Piece:
    """Return a stack of matrices (E, R, K) as one matrix of E·R rows."""
    experts, rows, columns = stack.shape
    blocks = [
        (((first + i) * rows + row, column), block[i])
        for (first, row, column), block in stack.blocks
        for i in range(len(block))
    ]
    return Piece((experts * rows, columns), stack.dtype, tuple(blocks))


def _split_rows(whole: Piece, sizes: Sequence[int]) -> list[Piece]:
    """Return the pieces of tensors of so many rows, of which `whole` is stacked."""
    pieces: list[Piece] = []
    for end in itertools.accumulate(sizes):
        first = end - sizes[len(pieces)]
        blocks = []
        for begin, block in whole.blocks:
            top, bottom = max(begin[0], first), min(begin[0] + len(block), end)
            if top < bottom:
                rows = block[top - begin[0] : bottom - begin[0]]
                blocks.append(((top - first, *begin[1:]), rows))
        pieces.append(Piece((end - first, *whole.shape[1:]), whole.dtype, tuple(blocks)))
    return pieces


def load_piece(piece: Piece, stored: Tensor, where: str) -> None:
    """Copy a stored tensor into the blocks that this process has of it. CheckpointError if it does not fit."""
    if tuple(stored.shape) != piece.shape:
        raise CheckpointError(f"{where} is {list(stored.shape)}, expected {list(piece.shape)}.")
    with torch.no_grad():
        for begin, block in piece.blocks:
            part = stored[tuple(slice(first, first + size) for first, size in zip(begin, block.shape, strict=True))]
            block.copy_(part if piece.scale == 1 else part.float() * piece.scale)


def load_weight_pieces(model: Transformer, tensors: Mapping[str, Tensor], at: Mapping[str, int], where: str) -> None:
    """Copy what the process at some coordinates needs of tensors with Hugging Face names into `model`.

    Raises CheckpointError if they are not the model's.
    """
    pieces = weight_pieces(model, at)
    if missing := sorted(pieces.keys() - tensors.keys()):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of the model, such as {missing[0]}.")
    for name, piece in pieces.items():
        load_piece(piece, tensors[name], f"{where}: {name}")


class Parts:
    """Writes this process's part of the checkpoints of a run whose model is divided. Made by all processes."""

    def __init__(
        self, model: Transformer, optimizers: Optimizers, tokenizer: Tokenizer, ranks: DistributedContext
    ) -> None:
        self.model, self.optimizers, self.tokenizer = model, optimizers, tokenizer
        self.at = ranks.layout.coordinates(ranks.rank)
        with ranks.explained():  # a group of its own: training goes on meanwhile
            self.group: dist.ProcessGroup = dist.new_group(backend="gloo")

    def write(
        self, path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Callable[[Callable[[], None]], Path]:
        """Return what writes the checkpoint of the present state, called with what is to be called after reading.

        values, tensors: the state of training beside the optimizers', the same on all processes.
        """
        weights = weight_pieces(self.model, self.at)
        parameters = {name: p for p, name in self.optimizers.names.items()}
        state = {name: piece_of(tensor) for name, tensor in tensors.items()}
        for name, value in self.optimizers.state_tensors().items():
            p = parameters[name.rpartition("/")[0]]
            state[f"optimizer/{name}"] = piece_of(value, sharding_of(p) if value.shape == p.shape else None, self.at)
        return lambda read: save_sharded(path, weights, self.model, self.tokenizer, values, state, self.group, read)

    def load_weights(self, directory: Path) -> None:
        """Read this process's part of the weights in a checkpoint. CheckpointError if they are not the model's."""
        load_weight_pieces(self.model, open_weights(directory), self.at, str(directory))


# Writing --------------------------------------------------------------------------------------------------------------


class SafetensorsWriter(HuggingFaceStorageWriter):
    """DCP's writer of Hugging Face files, but that every process writes into the files that shall be there in the end.

    DCP's own has each process write files of its own, which are then read again and put together.

    stem: the files are STEM-00001-of-0000N.safetensors. files: the number of the file of each tensor, from 1.
    """

    def __init__(self, path: Path, stem: str, files: Mapping[str, int]) -> None:
        super().__init__(str(path), fqn_to_index_mapping=dict(files), save_distributed=True)
        self.directory, self.stem = path, stem

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the files, with their headers, and tell all processes where each tensor is to be."""
        assert self.fqn_to_index_mapping is not None
        count = max(self.fqn_to_index_mapping.values())
        contents: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for item in itertools.chain.from_iterable(plan.items for plan in plans):
            name, data = item.index.fqn, item.tensor_data
            assert data is not None
            file_name = f"{self.stem}-{self.fqn_to_index_mapping[name]:05}-of-{count:05}.safetensors"
            contents.setdefault(file_name, {})[name] = (data.properties.dtype, tuple(data.size))
        places: dict[str, tuple[str, int]] = {}
        total = 0
        for file_name, tensors in sorted(contents.items()):
            layout = layout_of(tensors)
            with open(self.directory / file_name, "wb") as file:
                file.write(layout.header)
                file.truncate(layout.size)
            places.update({name: (file_name, begin) for name, begin in layout.begins.items()})
            total += layout.size - len(layout.header)
        index = {"metadata": {"total_size": total}, "weight_map": {name: places[name][0] for name in sorted(places)}}
        write_json(self.directory / f"{self.stem}.safetensors.index.json", index)
        return [dataclasses.replace(plan, storage_data=places) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's blocks, one after the other, into their places."""
        results = []
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_file.setdefault(plan.storage_data[item.index.fqn][0], []).append(item)
        for file_name, items in sorted(by_file.items()):
            with open(self.directory / file_name, "r+b") as file:
                for item in items:
                    data, begin = item.tensor_data, plan.storage_data[item.index.fqn][1]
                    assert data is not None
                    numbers = little_endian(planner.resolve_data(item))  # type: ignore[arg-type]
                    width = data.properties.dtype.itemsize
                    box = (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
                    for place, first, length in contiguous_runs(tuple(data.size), box):
                        file.seek(begin + place * width)
                        file.write(numbers[first * width : (first + length) * width])
                    results.append(WriteResult(item.index, len(numbers), file_name))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to do: the index was written with the files."""


def contiguous_runs(shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of a box of a row-major tensor: where each begins in the tensor and in the box, and its length.

    All are numbers of elements.
    """
    offsets, sizes = box
    split = len(shape)
    while split and sizes[split - 1] == shape[split - 1]:
        split -= 1  # from here on the box is as wide as the tensor
    split = max(split - 1, 0)
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    length = math.prod(sizes[split:])
    for number, position in enumerate(itertools.product(*(range(size) for size in sizes[:split]))):
        corner = [*(offset + i for offset, i in zip(offsets, position, strict=False)), *offsets[split:]]
        yield sum(i * stride for i, stride in zip(corner, strides, strict=True)), number * length, length


class _Planner(DefaultSavePlanner):
    """DCP's planner, over pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].block(index.offset)


def write_pieces(
    directory: Path, stem: str, pieces: Mapping[str, Piece], files: Mapping[str, int], group: dist.ProcessGroup
) -> None:
    """Write the tensors that the processes of `group` have in pieces. All call it; any thread may.

    A tensor may be in several processes whole, or in one alone. Raises on all what failed on one.
    """
    try:
        save(
            dict(pieces),
            storage_writer=SafetensorsWriter(directory, stem, files),
            planner=_Planner(),
            process_group=group,
        )
    except CheckpointException as error:  # no Exception; its text is tracebacks
        rank, (cause, _) = next(iter(error.failures.items()))
        raise _of_process(rank, cause) from cause


def _of_process(rank: int, error: BaseException) -> BaseException:
    """Return the error of another process as one of this."""
    if isinstance(error, GptsmithError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, f"{error.strerror} (process {rank})", error.filename)
    return GptsmithError(f"process {rank} could not save: {error or type(error).__name__}")


def file_numbers(names: Sequence[str]) -> dict[str, int]:
    """Return the number of the file of each tensor: the first has those of no layer, and each layer has one.

    A name has the number of its layer as a part: model.layers.3.mlp.up_proj.weight.
    """
    layers = {name: _layer_of(name) for name in names}
    order = sorted(set(layers.values()))
    return {name: order.index(layer) + 1 for name, layer in layers.items()}


def _layer_of(name: str) -> int:
    numbers = [int(part) for part in name.replace("/", ".").split(".") if part.isdecimal()]
    return numbers[0] if numbers else -1


def save_sharded(
    directory: Path,
    weights: Mapping[str, Piece],
    model: Transformer,
    tokenizer: Tokenizer,
    values: Mapping[str, Any],
    state: Mapping[str, Piece],
    group: dist.ProcessGroup,
    after_reading: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint, as `gptsmith.checkpoint.save_checkpoint` does, by all processes of `group`; return its path.

    weights, state: what this process has of the model's and of the state of training. values: the rest of the latter.
    Raises GptsmithError on all processes if one fails; nothing is left behind then.
    """
    rank = dist.get_rank(group)
    temporary = Path(_agreed(lambda: str(_new_temporary(directory)) if rank == 0 else "", group)[0])
    try:
        with explain_os_errors(directory):
            write_pieces(temporary, Path(WEIGHTS_FILE).stem, weights, file_numbers(_union(weights, group)), group)
            folder, stem = temporary / "train", Path(STATE_FILE).stem
            write_pieces(folder, stem, state, file_numbers(_union(state, group)), group)
            after_reading()

            def rest() -> None:
                if rank == 0:
                    write_companions(temporary, model, tokenizer)
                    write_state_values(temporary, values)

            _agreed(rest, group)
            digests = _agreed(lambda: _checksums(temporary, rank, dist.get_world_size(group)), group)

            def complete() -> None:
                if rank == 0:
                    manifest = dict(sorted(itertools.chain.from_iterable(part.items() for part in digests)))
                    write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
                    for part in (temporary / "train", temporary):
                        fsync_directory(part)
                    os.replace(temporary, directory)
                    fsync_directory(directory.parent)

            _agreed(complete, group)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return directory


def _new_temporary(directory: Path) -> Path:
    if directory.exists():  # left from before a resume from an earlier step
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, suffix="-" + directory.name, dir=directory.parent))
    temporary.chmod(0o755)
    (temporary / "train").mkdir()
    return temporary


def _checksums(directory: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Return this process's share of the manifest, of files that are on the disk then."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())[rank::world_size]
    found = {}
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        found[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return found


def _union(pieces: Mapping[str, Piece], group: dist.ProcessGroup) -> list[str]:
    """Return the names of all processes' tensors: one may have some that others do not."""
    return sorted(set(itertools.chain.from_iterable(_agreed(lambda: list(pieces), group))))


def _agreed(work: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """Return what `work` returns on each process of `group`. Raises on all the error of the first that fails."""
    result: Any = None
    error: BaseException | None = None
    try:
        result = work()
    except Exception as failed:
        error = failed
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (result, error), group=group)
    for rank, (_, failed_there) in enumerate(everyone):
        if failed_there is not None:
            raise _of_process(rank, failed_there) from error
    return [theirs for theirs, _ in everyone]
