"""Calibrated quantization of a model, layer by layer.

    ids = calibration_ids(model, tokenizer, text)
    quantize_layers(model, ids, choose_widths(model, ids, 4), Path("out.partial"))

Each layer is rounded for the inputs that the quantized layers before it produce. Within a layer, the matrices are
rounded in the order in which they are computed, each with the ones before it already rounded.

Beside the model, no more is in memory than a layer has in float32, or half of that and the activations of one sequence
in one layer, if that is more. The states of the sequences and the second moments of the inputs lie in files. If the
moments of a matrix do not fit into half a layer, the sequences are computed once more for each part of them.

Finished layers are kept in a directory, so that an interrupted quantization continues with the next layer and ends with
the same bits.

Axis letters: N sequences · T tokens of each · C hidden · K columns of a matrix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.formats.safetensors_writer import write_tensors
from gptsmith.log import note, progress
from gptsmith.model.quantized import ROWS, Bits, QuantizedMatrix, replace_matrices
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import LayerArguments, ObservedInputs, first_states, layer_arguments
from gptsmith.quantize.file_matrix import FileMatrix
from gptsmith.quantize.rounding import DAMPING, ROUNDS, round_matrix
from gptsmith.quantize.widths import choose_widths, quantizable
from gptsmith.storage import TEMPORARY_PREFIX, atomic_file, explain_os_errors, remove_temporaries, write_text

PLAN = "plan.json"
FORMAT = 2  # of the directory; changes with what is computed
_ROWS = 256  # of second moments that are added up together, and of a matrix that are converted at once


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def open_partial(directory: Path, model: Transformer, ids: Tensor, bits: Bits, budget: float | None) -> dict[str, Bits]:
    """Open the directory of an interrupted quantization, or make it, and return the widths of the matrices.

    Raises GptsmithError if it belongs to another one.
    """
    key = _key(model, ids, bits, budget)
    plan = directory / PLAN
    if plan.exists():
        try:
            values = json.loads(plan.read_text(encoding="utf-8"))
            same = values["key"] == key
            widths: dict[str, Bits] = values["widths"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{plan} is damaged. Delete {directory} to begin again.") from None
        if not same:
            raise GptsmithError(
                f"{directory} belongs to an interrupted quantization of another model, or with other settings. Run "
                "that command again, or delete the directory to begin again."
            )
        remove_temporaries(directory)
        done = len(_finished(directory))
        note(f"Continuing an interrupted quantization: {done} of {len(model.layers)} layers are done.")
        return widths
    if directory.exists() and not (directory.is_dir() and all(map(_is_temporary, directory.iterdir()))):
        raise GptsmithError(f"{directory} is in the way: it is where unfinished work would be kept.")
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    widths = choose_widths(model, ids, bits, budget=budget, directory=directory)
    write_text(plan, json.dumps({"key": key, "widths": widths}, indent=1) + "\n")
    return widths


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY_PREFIX)


def _key(model: Transformer, ids: Tensor, bits: Bits, budget: float | None) -> str:
    """Return a hash of everything that the result depends on; of the weights, a sample."""
    digest = hashlib.sha256(repr((FORMAT, DAMPING, ROUNDS, model.config, bits, budget, ids.shape)).encode())
    digest.update(ids.numpy().tobytes())
    for name, tensor in model.state_dict().items():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 4096)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _finished(directory: Path) -> list[int]:
    """Return the layers that are done, without a gap."""
    count = 0
    while (directory / _layer_file(count)).exists():
        count += 1
    return list(range(count))


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


@torch.no_grad()
def quantize_layers(model: Transformer, ids: Tensor, widths: Mapping[str, Bits], directory: Path) -> Transformer:
    """Quantize the matrices of the layers to `widths`, in place, for the inputs that a calibration text produces.

    ids: (N, T). directory: from `open_partial`; finished layers are read from it. Raises GptsmithError if the disk is
    full, and CheckpointError for a damaged file.
    """
    model.eval()
    blocks: Any = model.layers
    arguments = layer_arguments(model, ids[:1])
    states = FileMatrix(len(ids), ids.shape[1] * model.config.hidden_size, directory)
    finished = _finished(directory)
    for row, tokens in enumerate(ids):
        states.write(row, first_states(model, tokens[None]).flatten())
    for layer in finished:
        _read_layer(model, directory / _layer_file(layer), widths)
        if layer < len(blocks) - 1:
            _Calibrated(blocks[layer], states, ids.shape[1], arguments[layer]).advance()
    with progress(len(blocks) - len(finished), "Quantizing") as bar:
        for layer in range(len(finished), len(blocks)):
            calibrated = _Calibrated(blocks[layer], states, ids.shape[1], arguments[layer])
            mine = {name: w for name, w in quantizable(model).items() if name.startswith(f"layers.{layer}.")}
            made = _rounded(calibrated, mine, widths, bar.advance)
            del mine  # else the layer's weights in full precision would stay
            _write_layer(directory / _layer_file(layer), made)
            replace_matrices(model, lambda name, _, made=made: made.get(name))  # type: ignore[misc]
            if layer < len(blocks) - 1:
                calibrated.advance()
    return model


@dataclass(frozen=True)
class _Calibrated:
    """A layer and its inputs. states: (N, T·C), of which each row is a sequence of T tokens. arguments: the others."""

    block: nn.Module
    states: FileMatrix
    tokens: int
    arguments: LayerArguments

    def output(self, row: int) -> Tensor:
        """Compute a sequence: (1, T, C)."""
        positional, named = self.arguments
        states = self.states.read(row, row + 1).view(1, self.tokens, -1)
        output: Tensor = self.block(states, *positional, **named)
        return output

    def advance(self) -> None:
        """Replace the states by the outputs of the layer."""
        for row in range(self.states.rows):
            self.states.write(row, self.output(row).flatten())


def _rounded(
    layer: _Calibrated, matrices: Mapping[str, Tensor], widths: Mapping[str, Bits], advance: Callable[[float], None]
) -> dict[str, QuantizedMatrix]:
    """Return the matrices of a layer, quantized; each is also rounded in place. advance: shows progress, up to 1."""
    made: dict[str, QuantizedMatrix] = {}
    size = sum(4 * parameter.numel() for parameter in layer.block.parameters())
    for stage in _stages(layer, matrices):
        used = sum(buffer.nbytes for matrix in made.values() for buffer in matrix.buffers())
        for name, hessian in _second_moments(layer, stage, size // 2 - used):
            codes = round_matrix(stage[name], hessian, widths[name], memory=size - used)
            made[name] = QuantizedMatrix.of(codes)
            for rows in torch.split(torch.arange(len(codes.codes)), _ROWS):
                stage[name][rows] = codes.values(rows)
            del codes, hessian  # else they would stay while the next one is computed
            advance(1 / len(matrices))
    return made


def _stages(layer: _Calibrated, matrices: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the matrices of a layer in the order in which they are used; those of all experts together."""
    stages: dict[str, dict[str, Tensor]] = {}

    def seen(name: str, _: Tensor) -> None:
        stages.setdefault(_stage_of(name), {})

    with ObservedInputs(matrices, seen):
        layer.output(0)
    for name, weight in matrices.items():
        stages.setdefault(_stage_of(name), {})[name] = weight
    return list(stages.values())


def _stage_of(name: str) -> str:
    """Return the name without the number of an expert."""
    return re.sub(r"\.\d+$", "", name)


def _second_moments(
    layer: _Calibrated, stage: Mapping[str, Tensor], memory: int
) -> Iterator[tuple[str, FileMatrix | None]]:
    """Yield the name of each matrix and the mean of x xᵀ over its inputs, (K, K); None for an expert without tokens.

    memory: bytes that sums may take. Raises GptsmithError for inputs that are not numbers.
    """
    waiting = [(name, begin) for name, weight in stage.items() for begin in range(0, weight.shape[1], _ROWS)]
    found: dict[str, FileMatrix] = {}
    while waiting:
        parts: list[tuple[str, int]] = []
        left = memory
        while waiting and (not parts or _part_bytes(stage, waiting[0]) <= left):
            parts.append(waiting.pop(0))
            left -= _part_bytes(stage, parts[-1])
        means = _partial_means(layer, stage, parts)
        for name, begin in parts:
            mean = means.pop((name, begin), None)
            if mean is not None:
                K = stage[name].shape[1]
                matrix = found.setdefault(name, FileMatrix(K, K, layer.states.directory))
                matrix.write(begin, mean)
                matrix.write(0, mean[:, :begin].T, column=begin)
        del mean
        unfinished = {name for name, _ in waiting}
        for name in dict(parts):
            if name not in unfinished:
                yield name, found.pop(name, None)


def _part_bytes(stage: Mapping[str, Tensor], part: tuple[str, int]) -> int:
    name, begin = part
    end = min(begin + _ROWS, stage[name].shape[1])
    return 4 * (end - begin) * end


def _partial_means(
    layer: _Calibrated, stage: Mapping[str, Tensor], parts: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """Return means of x xᵀ: of each part some rows, (n, K), up to the diagonal. parts: matrix and first row."""
    sums: dict[tuple[str, int], Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str, x: Tensor) -> None:
        if len(x):
            for begin in (begin for other, begin in parts if other == name):
                end = min(begin + _ROWS, x.shape[1])
                if (name, begin) not in sums:
                    sums[name, begin] = torch.zeros(end - begin, end)
                sums[name, begin].addmm_(x[:, begin:end].T, x[:, :end])
            counts[name] = counts.get(name, 0) + len(x)
        if len(stage) == 1:
            raise _Stop

    with ObservedInputs({name: stage[name] for name, _ in parts}, seen):
        for row in range(layer.states.rows):
            with contextlib.suppress(_Stop):
                layer.output(row)
    for (name, _), total in sums.items():
        if not total.isfinite().all():
            raise GptsmithError(f"the inputs of {name} are NaN or infinite: the model's weights are damaged.")
        total.div_(counts[name])
    return sums


def _write_layer(path: Path, made: Mapping[str, QuantizedMatrix]) -> None:
    tensors = {f"{name}.{part}": tensor for name, matrix in made.items() for part, tensor in matrix.stored().items()}
    with atomic_file(path) as file:
        write_tensors(file, tensors)


def _read_layer(model: Transformer, path: Path, widths: Mapping[str, Bits]) -> None:
    """Put the quantized matrices of a file into the model."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118

            def stored(name: str, weight: Tensor) -> QuantizedMatrix | None:
                if name not in names:
                    return None
                matrix = QuantizedMatrix(weight.shape[0], weight.shape[1], widths[name])
                matrix.load({part: file.get_tensor(f"{name}.{part}") for part, _ in matrix.named_buffers()})
                return matrix

            replace_matrices(model, stored)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Delete {path.parent} to begin again.") from None


def round_outer(model: Transformer, bits: Bits = 8) -> None:
    """Quantize embeddings and output layer, in place, a few rows at a time."""

    def rounded(name: str, weight: Tensor) -> QuantizedMatrix | None:
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            return None
        parts = torch.split(weight.detach(), _ROWS * ROWS)
        return QuantizedMatrix.stacked(len(weight), (round_matrix(part, None, bits) for part in parts))

    replace_matrices(model, rounded)
