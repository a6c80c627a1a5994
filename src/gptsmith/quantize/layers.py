"""Calibrated quantization of a model, layer by layer.

    ids = calibration_ids(model, tokenizer, text)
    quantize_layers(model, ids, choose_widths(model, ids, 4), Path("out.partial"))

Each layer is rounded for the inputs that the quantized layers before it produce. Within a layer, the matrices are
rounded in the order in which they are computed, each with the ones before it already rounded. Of all texts, only the
states of one sequence are in memory; the others lie in a file.

Finished layers are kept in a directory, so that an interrupted quantization continues with the next layer and ends with
the same bits.

Axis letters: N sequences · T tokens of each · C hidden · K columns of a matrix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, GptsmithError
from gptsmith.log import note, progress
from gptsmith.model.quantized import Bits, QuantizedMatrix, replace_matrices
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import ObservedInputs
from gptsmith.quantize.rounding import DAMPING, ROUNDS, round_matrix
from gptsmith.quantize.widths import choose_widths, quantizable
from gptsmith.storage import TEMPORARY_PREFIX, atomic_file, explain_os_errors, remove_temporaries, write_text

PLAN, STATES, SCRATCH = "plan.json", "states.f32", "hessian.f32"
FORMAT = 1  # of the directory; changes with what is computed


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class _States:
    """The hidden states of all sequences, (N, T, C) float32, in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        with explain_os_errors(path):
            self._file = open(path, "w+b", buffering=0)  # noqa: SIM115

    def write(self, row: int, states: Tensor) -> None:
        data = states.float().cpu().contiguous().numpy().tobytes()
        with explain_os_errors(self.path):
            self._file.seek(row * len(data))
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])

    def read(self, row: int) -> Tensor:
        _, T, C = self.shape
        size = 4 * T * C
        with explain_os_errors(self.path):
            self._file.seek(row * size)
            data = self._file.read(size)
        if len(data) != size:
            raise GptsmithError(f"{self.path} has been cut off meanwhile: run the command again.")
        return torch.from_numpy(np.frombuffer(data, np.float32).reshape(1, T, C).copy())

    def close(self) -> None:
        self._file.close()


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
    widths = choose_widths(model, ids, bits, budget=budget)
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
    arguments = _arguments(model, ids[:1])
    states = _States(directory / STATES, (*ids.shape, model.config.hidden_size))
    finished = _finished(directory)
    try:
        for row, tokens in enumerate(ids):
            states.write(row, _first_states(model, tokens[None]))
        for layer in finished:
            _read_layer(model, directory / _layer_file(layer))
            if layer < len(blocks) - 1:
                _advance(blocks[layer], states, arguments[layer])
        with progress(len(blocks) - len(finished), "Quantizing") as bar:
            for layer in range(len(finished), len(blocks)):
                made: dict[str, QuantizedMatrix] = {}
                mine = {name: w for name, w in quantizable(model).items() if name.startswith(f"layers.{layer}.")}
                stages = _stages(blocks[layer], mine, states, arguments[layer])
                for stage in stages:
                    hessians = _hessians(blocks[layer], stage, states, arguments[layer])
                    for name, weight in stage.items():
                        codes = round_matrix(
                            weight, hessians.pop(name, None), widths[name], scratch=directory / SCRATCH
                        )
                        made[name] = QuantizedMatrix.of(codes)
                        weight.copy_(made[name].dequantized())
                    bar.advance(1 / len(stages))
                _write_layer(directory / _layer_file(layer), made)
                replace_matrices(model, lambda name, _, made=made: made.get(name))  # type: ignore[misc]
                if layer < len(blocks) - 1:
                    _advance(blocks[layer], states, arguments[layer])
    finally:
        states.close()
    return model


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _arguments(model: Transformer, ids: Tensor) -> list[Arguments]:
    """Return the arguments of each layer but the hidden states; they are the same for all texts of one length."""
    found: list[Arguments] = []

    def remember(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((positional[1:], named))

    blocks: Any = model.layers
    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    try:
        model.hidden_states(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _first_states(model: Transformer, ids: Tensor) -> Tensor:
    """Return the input of the first layer: (1, T, C)."""
    found: list[Tensor] = []

    def stop(_: nn.Module, positional: tuple[Any, ...]) -> None:
        found.append(positional[0])
        raise _Stop

    blocks: Any = model.layers
    hook = blocks[0].register_forward_pre_hook(stop)
    try:
        model.hidden_states(ids)
    except _Stop:
        pass
    finally:
        hook.remove()
    return found[0]


def _advance(block: nn.Module, states: _States, arguments: Arguments) -> None:
    """Replace the states by the outputs of the layer."""
    positional, named = arguments
    for row in range(states.shape[0]):
        states.write(row, block(states.read(row), *positional, **named))


def _stages(
    block: nn.Module, matrices: Mapping[str, Tensor], states: _States, arguments: Arguments
) -> list[dict[str, Tensor]]:
    """Return the matrices of a layer in the order in which they are used; those of all experts together."""
    stages: dict[str, dict[str, Tensor]] = {}

    def seen(name: str, _: Tensor) -> None:
        stages.setdefault(_stage_of(name), {})

    positional, named = arguments
    with ObservedInputs(matrices, seen):
        block(states.read(0), *positional, **named)
    for name, weight in matrices.items():
        stages.setdefault(_stage_of(name), {})[name] = weight
    return list(stages.values())


def _stage_of(name: str) -> str:
    """Return the name without the number of an expert."""
    return re.sub(r"\.\d+$", "", name)


def _hessians(
    block: nn.Module, stage: Mapping[str, Tensor], states: _States, arguments: Arguments
) -> dict[str, Tensor]:
    """Return the mean of x xᵀ over the inputs of each matrix, (K, K), by name. Experts without tokens are left out.

    Raises GptsmithError for inputs that are not numbers.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str, x: Tensor) -> None:
        if len(x):
            if name not in sums:
                sums[name] = torch.zeros(x.shape[1], x.shape[1])
            sums[name].addmm_(x.T, x)
            counts[name] = counts.get(name, 0) + len(x)
        if len(stage) == 1:
            raise _Stop

    positional, named = arguments
    with ObservedInputs(stage, seen):
        for row in range(states.shape[0]):
            try:
                block(states.read(row), *positional, **named)
            except _Stop:
                continue
    for name, total in sums.items():
        if not total.isfinite().all():
            raise GptsmithError(f"the inputs of {name} are NaN or infinite: the model's weights are damaged.")
        total.div_(counts[name])
    return sums


def _write_layer(path: Path, made: Mapping[str, QuantizedMatrix]) -> None:
    tensors = {f"{name}.{part}": tensor for name, matrix in made.items() for part, tensor in matrix.stored().items()}
    shapes = {name: json.dumps([matrix.rows, matrix.columns, matrix.bits]) for name, matrix in made.items()}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata=shapes))


def _read_layer(model: Transformer, path: Path) -> None:
    """Put the quantized matrices of a file into the model."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: json.loads(shape) for name, shape in (file.metadata() or {}).items()}
            matrices = {}
            for name, (rows, columns, bits) in shapes.items():
                matrices[name] = QuantizedMatrix(rows, columns, bits)
                parts = (part for part, _ in matrices[name].named_buffers())
                matrices[name].load({part: file.get_tensor(f"{name}.{part}") for part in parts})
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Delete {path.parent} to begin again.") from None
    replace_matrices(model, lambda name, _: matrices.get(name))


def round_outer(model: Transformer, bits: Bits = 8) -> None:
    """Quantize embeddings and output layer, in place."""

    def rounded(name: str, weight: Tensor) -> QuantizedMatrix | None:
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            return None
        return QuantizedMatrix.of(round_matrix(weight.detach(), None, bits))

    replace_matrices(model, rounded)
