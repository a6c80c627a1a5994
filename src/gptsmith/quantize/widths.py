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

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.errors import GptsmithError
from gptsmith.log import progress
from gptsmith.model.quantized import BITS, GROUP, Bits, can_quantize
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import ObservedInputs, matrices_of

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


def choose_widths(model: Transformer, ids: Tensor, bits: Bits, *, budget: float | None = None) -> dict[str, Bits]:
    """Return the width of each matrix of the layers, at least 4 bits.

    ids: (N, T), a calibration text. budget: bits per weight on average, scales and zero points included; None: half a
    bit more than `bits` take. With 8 bits all matrices have 8.
    """
    matrices = quantizable(model)
    if bits == 8 and budget is None:
        return dict.fromkeys(matrices, 8)
    average = bits_per_weight(bits) + _SPARE if budget is None else budget
    losses = loss_of_rounding(model, ids)
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


def loss_of_rounding(model: Transformer, ids: Tensor) -> dict[str, float]:
    """Return how much the loss of a token would rise, in nats, if a matrix were rounded to 4 bits, by its name.

    ids: (N, T); a part of them is used. In memory are the activations of one layer for one sequence.
    """
    matrices = quantizable(model)
    rows = ids[:: max(1, len(ids) // SEQUENCES), :LENGTH][:SEQUENCES]
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    counts: dict[str, int] = {}  # of gradients
    times: dict[str, int] = {}  # inputs; some of them are seen again in the backward pass

    def seen(name: str, x: Tensor) -> None:
        times[name] = times.get(name, 0) + len(x)
        _add(inputs, name, x.square().sum(dim=0))

    def multiplied(name: str, y: Tensor) -> None:
        if not y.requires_grad:
            return

        def add(gradient: Tensor) -> None:
            flat = gradient.detach().reshape(-1, gradient.shape[-1])
            counts[name] = counts.get(name, 0) + len(flat)
            _add(gradients, name, flat.square().sum(dim=0))

        y.register_hook(add)  # type: ignore[no-untyped-call]

    before = model.activation_checkpointing, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False).eval()
    model.activation_checkpointing = True
    generator = torch.Generator().manual_seed(0)
    # The graph begins with the embeddings, since no weight needs a gradient.
    beginning = model.embed_tokens.register_forward_hook(lambda module, ids, x: x.detach().requires_grad_())
    try:
        with progress(len(rows), "Choosing widths") as bar, ObservedInputs(matrices, seen, multiplied):
            for row in rows:
                with torch.enable_grad():
                    hidden = model.hidden_states(row[None])
                    torch.autograd.backward(hidden, _gradient_of_loss(model, hidden.detach(), generator))
                bar.advance(1)
    finally:
        beginning.remove()
        model.activation_checkpointing = before[0]
        model.train(before[1])
        for parameter in trained:
            parameter.requires_grad_()
    losses = {}
    for name, weight in matrices.items():
        if counts.get(name):
            low, high = weight.view(len(weight), -1, GROUP).aminmax(dim=-1)
            errors = ((high - low) / 15).square() / 12  # (R, G), the mean squared error of a weight
            by_group = inputs[name].view(-1, GROUP).sum(dim=1) / times[name]
            losses[name] = 0.5 * float(gradients[name] @ (errors @ by_group)) / rows.numel()
    return losses


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _gradient_of_loss(model: Transformer, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient with respect to the final hidden states (1, T, C) of the summed loss of drawn labels."""
    parts = []
    for part in torch.split(hidden[0], _HEAD_TOKENS):
        part = part.requires_grad_()
        logits = model.lm_head(part).float()
        if not logits.isfinite().all():
            raise GptsmithError("the model's logits are NaN or infinite: its weights are damaged.")
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
        parts.append(torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), part)[0])
    return torch.cat(parts)[None]


def total_bits(sizes: Mapping[str, int], widths: Mapping[str, Bits]) -> float:
    """Return the bits of matrices together in a file."""
    return sum(size * bits_per_weight(widths[name]) for name, size in sizes.items())


def count_widths(widths: Iterable[Bits]) -> dict[int, int]:
    """Return how many matrices have how many bits."""
    found = list(widths)
    return {bits: found.count(bits) for bits in BITS if bits in found}
