"""Mixed widths: more bits for the matrices whose rounding would cost most.

Rounding a matrix changes its outputs by E x, where E is the error of the weights, and the model's loss by half of
(g · E x)² on average, where g is the gradient of the loss with respect to the outputs, for labels drawn from the model
itself (the Fisher information). With the squares of g and x averaged over a text, that is a sum over the weights. Each
further bit divides it by four.

Axis letters: N sequences · T tokens of each · R rows · K columns · G groups of a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.errors import GptsmithError
from gptsmith.log import progress
from gptsmith.model.quantized import BITS, GROUP, Bits, can_quantize
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import LayerArguments, ObservedInputs, first_states, layer_arguments, matrices_of
from gptsmith.quantize.file_matrix import FileMatrix

SEQUENCES, LENGTH = 8, 256  # of the text on which gradients are computed
_SPARE = 0.5  # bits per weight for wider matrices
_HEAD_TOKENS = 64  # whose logits are in memory at once


def bits_per_weight(bits: Bits, *, in_memory: bool = False) -> float:
    """Return the bits that a weight takes in a file, or in memory, with its share of the scales and zero points."""
    each = 16 if in_memory else 8
    return bits + each * (1 if bits == 8 else 2) / GROUP


def kept_wide(name: str) -> bool:
    """Return whether a matrix of the layers stays in full precision: routers and gates of shared experts."""
    return name.split(".")[-2] in ("router", "shared_gate")


def quantizable(model: Transformer) -> dict[str, Tensor]:
    """Return the matrices of the layers that can be quantized, by name: those whose width is a multiple of 32.

    Of a mixture's experts it is all or none.
    """
    found = {name: weight for name, weight in matrices_of(model).items() if name.startswith("layers.")}
    narrow = {_mixture(name) for name, weight in found.items() if _mixture(name) and not can_quantize(weight)}
    return {
        name: weight
        for name, weight in found.items()
        if not kept_wide(name) and can_quantize(weight) and _mixture(name) not in narrow
    }


def left_wide(model: Transformer) -> list[str]:
    """Return the matrices of the layers that stay in full precision since their width is not a multiple of 32."""
    chosen = quantizable(model)
    return [n for n in matrices_of(model) if n.startswith("layers.") and not kept_wide(n) and n not in chosen]


def _mixture(name: str) -> str | None:
    """Return the module that an expert's matrix belongs to; None for any other matrix."""
    module, _, last = name.rpartition(".")
    return module.rpartition(".")[0] if last.isdigit() else None


def choose_widths(
    model: Transformer, ids: Tensor, bits: Bits, *, budget: float | None = None, directory: Path | None = None
) -> dict[str, Bits]:
    """Return the width of each matrix of the layers, at least 4 bits.

    ids: (N, T), a calibration text. budget: bits per weight on average, scales and zero points included; None: half a
    bit more than `bits` take. With 8 bits all matrices have 8. directory: as for `loss_of_rounding`.
    """
    matrices = quantizable(model)
    if bits == 8 and budget is None:
        return dict.fromkeys(matrices, 8)
    average = bits_per_weight(bits) + _SPARE if budget is None else budget
    losses = loss_of_rounding(model, ids, directory)
    return allocate(losses, {name: weight.numel() for name, weight in matrices.items()}, average)


def allocate(losses: Mapping[str, float], sizes: Mapping[str, int], average: float) -> dict[str, Bits]:
    """Return widths with the least sum of losses that take at most `average` bits per weight, or 4 bits everywhere.

    losses: of each matrix in 4 bits. sizes: numbers of weights.
    """
    widths: dict[str, Bits] = dict.fromkeys(sizes, 4)
    left = average * sum(sizes.values()) - total_bits(sizes, widths)

    def step(name: str) -> tuple[float, str] | None:
        """Return the gain per bit, negated, of the next width."""
        place = BITS.index(widths[name])
        if place + 1 == len(BITS):
            return None
        now, then = BITS[place], BITS[place + 1]
        gain = losses.get(name, 0.0) * (_error(now) - _error(then))
        return -gain / (sizes[name] * (bits_per_weight(then) - bits_per_weight(now))), name

    steps = [found for name in sizes if (found := step(name))]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        now, then = widths[name], BITS[BITS.index(widths[name]) + 1]
        cost = sizes[name] * (bits_per_weight(then) - bits_per_weight(now))
        if cost > left:
            continue  # a smaller matrix may still fit
        left -= cost
        widths[name] = then
        if (found := step(name)) is not None:
            heapq.heappush(steps, found)
    return widths


def _error(bits: Bits) -> float:
    """Return the mean squared error of rounding, relative to that in 4 bits. 8 bits are symmetric about 0."""
    return 4.0 ** (4 - bits) * (1.4 if bits == 8 else 1.0)


def loss_of_rounding(model: Transformer, ids: Tensor, directory: Path | None = None) -> dict[str, float]:
    """Return how much the loss of a token would rise, in nats, if a matrix were rounded to 4 bits, by its name.

    ids: (N, T); a part of them is used. In memory are the activations of one layer for one sequence. directory: on a
    disk with room for its hidden states before each layer.
    """
    matrices = quantizable(model)
    rows = ids[:: max(1, len(ids) // SEQUENCES), :LENGTH][:SEQUENCES]
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # of inputs

    def seen(name: str, x: Tensor) -> None:
        counts[name] = counts.get(name, 0) + len(x)
        _add(inputs, name, x.square().sum(dim=0))

    def multiplied(name: str, y: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            _add(gradients, name, gradient.detach().flatten(0, -2).square().sum(dim=0))

        y.register_hook(add)  # type: ignore[no-untyped-call]

    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False).eval()  # of the hidden states alone is a gradient computed
    generator = torch.Generator().manual_seed(0)
    arguments = layer_arguments(model, rows[:1])
    before = FileMatrix(len(model.layers), rows.shape[1] * model.config.hidden_size, directory)
    try:
        observed = ObservedInputs(matrices, seen, multiplied)
        with progress(len(rows), "Choosing widths") as bar:
            for row in rows:
                _backward(model, row, arguments, before, generator, observed)
                bar.advance(1)
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_()
    losses = {}
    for name, weight in matrices.items():
        if name in gradients:
            low, high = weight.view(len(weight), -1, GROUP).aminmax(dim=-1)
            errors = ((high - low) / 15).square() / 12  # (R, G), the mean squared error of a weight
            by_group = inputs[name].view(-1, GROUP).sum(dim=1) / counts[name]
            losses[name] = 0.5 * float(gradients[name] @ (errors @ by_group)) / rows.numel()
    return losses


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _backward(
    model: Transformer,
    ids: Tensor,
    arguments: list[LayerArguments],
    before: FileMatrix,
    generator: torch.Generator,
    observed: ObservedInputs,
) -> None:
    """Compute a sequence, and the gradient of its loss back to the first layer.

    before: gets the inputs of each layer. observed: sees each layer once, when its gradient is computed.
    """
    blocks: Any = model.layers
    with torch.no_grad():
        x = first_states(model, ids[None])
        for i, (block, (positional, named)) in enumerate(zip(blocks, arguments, strict=True)):
            before.write(i, x.flatten())
            if i < len(blocks) - 1:
                x = block(x, *positional, **named)
    shape, gradient = x.shape, None
    for i, (block, (positional, named)) in reversed(list(enumerate(zip(blocks, arguments, strict=True)))):
        with torch.enable_grad():
            x = before.read(i, i + 1).view(shape).requires_grad_()
            with observed:
                y = block(x, *positional, **named)
            if gradient is None:
                y = model.final_states(y)
                gradient = _gradient_of_loss(model, y.detach(), generator)
            torch.autograd.backward(y, gradient)
        gradient = x.grad


@torch.no_grad()
def _gradient_of_loss(model: Transformer, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient with respect to the final hidden states (1, T, C) of the summed loss of drawn labels."""
    layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    step = max(1, min(_HEAD_TOKENS, layer // (4 * model.config.vocab_size)))  # of which less than a layer is computed
    draws = torch.rand(hidden.shape[1], 1, generator=generator)
    parts = []
    for part, drawn in zip(torch.split(hidden[0], step), torch.split(draws, step), strict=True):
        logits = model.lm_head(part).float()
        if not logits.isfinite().all():
            raise GptsmithError("the model's logits are NaN or infinite: its weights are damaged.")
        probabilities = torch.softmax(logits, dim=-1, out=logits)
        sums = probabilities.cumsum(dim=-1)
        labels = torch.searchsorted(sums, drawn * sums[:, -1:]).clamp_max(sums.shape[1] - 1)
        del sums
        probabilities.scatter_add_(1, labels, torch.full_like(drawn, -1.0))
        parts.append(probabilities @ model.lm_head.weight.float())
    return torch.cat(parts)[None]


def total_bits(sizes: Mapping[str, int], widths: Mapping[str, Bits]) -> float:
    """Return the bits of matrices together in a file."""
    return sum(size * bits_per_weight(widths[name]) for name, size in sizes.items())


def count_widths(widths: Iterable[Bits]) -> dict[int, int]:
    """Return how many matrices have how many bits."""
    found = list(widths)
    return {bits: found.count(bits) for bits in BITS if bits in found}
