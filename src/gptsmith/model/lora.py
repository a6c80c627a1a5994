"""Low-rank adapters (LoRA; Hu et al. 2021, 2106.09685): y = W x + scaling · B A x, with W unchanged.

    add_lora(model, LoraConfig(rank=16), layout)         # for training: A and B become parameters of the model
    merge_lora(model)                                    # fold them into the weights

    adapter = read_adapter(directory, model)             # for serving; from `formats.peft`
    with applied(model, [(adapter, rows)]): model(ids)   # to these token positions of the batch alone

DoRA (Liu et al. 2024, 2402.09353) also trains the length m of each row of the matrix: with V = W + scaling · B A,
y = m / ‖V‖ · V x.
For serving nothing is merged, so sequences with different adapters, or none, can share a batch.

Axis letters: T tokens of the batch · K columns (inputs) · R rows (outputs) · r rank.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import UsageError, nearest
from gptsmith.model.config import LoraConfig
from gptsmith.model.dropout import dropout
from gptsmith.model.initial import draw, draw_seed
from gptsmith.model.parameters import annotate
from gptsmith.model.quantized import QuantizedLinear, dequantize
from gptsmith.model.transformer import Transformer

# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedPart:
    """Some rows of one of our matrices, which Hugging Face stores as a matrix of its own.

    name: of its module there (`model.layers.0.self_attn.q_proj`). first, rows: where they are in our matrix. factor:
    our weights are those of Hugging Face times this.
    """

    name: str
    first: int
    rows: int
    factor: float = 1.0

    @property
    def leaf(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rpartition(".")[2]


Layout = Mapping[str, Sequence[AdaptedPart]]  # by the name of our module: `layers.0.attention.qkv_proj`


class LoraPart(nn.Module):
    """The update of one part: A (r, K), B (R, r); with DoRA the lengths of the rows, magnitude (R,).

    A is undefined until it is written.
    """

    def __init__(self, part: AdaptedPart, columns: int, rank: int, scaling: float, *, dora: bool, like: Tensor) -> None:
        super().__init__()
        self.part, self.scaling = part, scaling
        self.A = nn.Parameter(torch.empty(rank, columns, device=like.device, dtype=like.dtype))
        self.B = nn.Parameter(torch.zeros(part.rows, rank, device=like.device, dtype=like.dtype))
        self.magnitude = nn.Parameter(torch.ones(part.rows, device=like.device, dtype=like.dtype)) if dora else None
        for name in ("A", "B"):
            annotate(self, name, kind="matrix")

    @property
    def rows(self) -> slice:
        return slice(self.part.first, self.part.first + self.part.rows)

    def update(self) -> Tensor:
        """Return scaling · B A, in our units: (R, K)."""
        return self.scaling * self.part.factor * (self.B @ self.A)

    def row_lengths(self, weight: Tensor) -> Tensor:
        """Return ‖W + scaling · B A‖ of each row, in Hugging Face's units: (R,). weight: our (R, K) of this part.

        It is a constant for the gradient, as in section 4.3 of the DoRA paper.
        """
        lengths: Tensor = ((weight + self.update()) / self.part.factor).norm(dim=1)
        return lengths.detach()


class Lora(nn.Module):
    """The updates of the parts of a linear layer."""

    def __init__(self, parts: Sequence[LoraPart], dropout: float) -> None:
        super().__init__()
        self.parts, self.dropout = nn.ModuleList(parts), dropout
        self.off = False

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Return the layer's output with the updates. x: (..., K); y: (..., R), the output without them."""
        if self.off:
            return y
        dropping = self.dropout > 0 and self.training
        parts: list[Any] = list(self.parts)
        inputs = [dropout(x, self.dropout, self.training) if dropping else x for _ in parts]
        if dropping:
            hidden = [F.linear(own, part.A) for part, own in zip(parts, inputs, strict=True)]
        else:  # one product for all parts
            stacked = F.linear(x, torch.cat([part.A for part in parts]))
            hidden = list(torch.split(stacked, [len(part.A) for part in parts], dim=-1))
        pieces, end = [], 0
        for part, h, own in zip(parts, hidden, inputs, strict=True):
            if part.part.first > end:
                pieces.append(y[..., end : part.part.first])
            delta = F.linear(h, part.B) * (part.scaling * part.part.factor)
            piece = y[..., part.rows]
            if part.magnitude is None:
                pieces.append(piece + delta)
            else:
                weight = weight_of(layer)[part.rows]
                gain = (part.magnitude / part.row_lengths(weight)).to(y.dtype)
                bias: Any = layer.bias
                plain = F.linear(own, weight) if dropping else piece if bias is None else piece - bias[part.rows]
                pieces.append(piece + (gain - 1) * plain + gain * delta)
            end = part.part.first + part.part.rows
        if end < y.shape[-1]:
            pieces.append(y[..., end:])
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


class LoraLinear(nn.Linear):
    """An `nn.Linear` with an adapter. Its own parameters keep their names."""

    lora: Lora

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora(x, super().forward(x), self)
        return y


class LoraQuantizedLinear(QuantizedLinear):
    """A quantized linear layer with an adapter (QLoRA; Dettmers et al. 2023, 2305.14314)."""

    lora: Lora

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora(x, super().forward(x), self)
        return y


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight (R, K) of a linear layer, dequantized if necessary."""
    weight: Any = layer.weight
    values: Tensor = weight if isinstance(weight, Tensor) else weight.dequantized()
    return values


def columns_and_rows(layer: nn.Module) -> tuple[int, int]:
    """Return (columns, rows) of a linear layer, quantized or not."""
    weight: Any = layer.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(weight, Tensor) else (weight.columns, weight.rows)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear | LoraQuantizedLinear)}


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within, `model` computes as it did before it got its adapter, as far as that is no layer trained in full."""
    adapters = [module for module in model.modules() if isinstance(module, Lora)]
    for each in adapters:
        each.off = True
    try:
        yield
    finally:
        for each in adapters:
            each.off = False


def lora_parts(model: nn.Module) -> dict[str, LoraPart]:
    """Return the parts of a model that have an adapter, by the name of their Hugging Face module."""
    return {part.part.name: part for part in model.modules() if isinstance(part, LoraPart)}


def attach(layer: nn.Module, parts: Sequence[LoraPart], dropout: float) -> None:
    """Put an adapter on a linear layer, in place."""
    untyped: Any = layer
    untyped.lora = Lora(parts, dropout).train(layer.training)
    untyped.__class__ = LoraQuantizedLinear if isinstance(layer, QuantizedLinear) else LoraLinear


def add_lora(model: Transformer, config: LoraConfig, layout: Layout, *, train_fully: Sequence[str] = ()) -> None:
    """Put a new adapter on the linear layers of `model`, in place, and freeze all other weights.

    It changes nothing yet: B is 0 (and with DoRA the lengths are those of W). layout: from `formats.peft`.
    train_fully: modules that are trained whole (`embed_tokens`, if tokens are new). Raises UsageError for a pattern of
    `config.targets` that no layer matches.
    """
    chosen = chosen_parts(config, layout)
    for p in model.parameters():
        p.requires_grad_(False)
    like = next(p for p in model.parameters() if p.is_floating_point())
    seed = draw_seed()
    fill = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))  # as `nn.Linear` and PEFT
    for name, parts in chosen.items():
        layer = model.get_submodule(name)
        columns, rows = columns_and_rows(layer)
        made = []
        for part in parts:
            if part.rows == 0:
                part = AdaptedPart(part.name, part.first, rows, part.factor)
            made.append(LoraPart(part, columns, config.rank, config.scaling, dora=config.dora, like=like))
        for each in made:
            draw(each.A.data, f"{each.part.name}.lora_A", seed, fill)
            if each.magnitude is not None:
                each.magnitude.data.copy_(each.row_lengths(weight_of(layer)[each.rows]))
        attach(layer, made, config.dropout)
    for name in train_fully:
        for p in model.get_submodule(name).parameters():
            p.requires_grad_(True)


def chosen_parts(config: LoraConfig, layout: Layout) -> dict[str, list[AdaptedPart]]:
    """Return the parts that the patterns of `config.targets` match; all of them without patterns."""
    if not config.targets:
        return {name: list(parts) for name, parts in layout.items()}
    leaves = sorted({part.leaf for parts in layout.values() for part in parts})
    chosen: dict[str, list[AdaptedPart]] = {}
    for pattern in config.targets:
        found = {
            name: [p for p in parts if fnmatch.fnmatch(p.name, pattern) or fnmatch.fnmatch(p.name, f"*.{pattern}")]
            for name, parts in layout.items()
        }
        if not any(found.values()):
            raise UsageError(
                f"--lora.targets {pattern} matches no linear layer.{nearest(pattern, leaves)} There are "
                f"{', '.join(leaves)}; patterns such as '*.layers.0.*' match whole names."
            )
        for name, parts in found.items():
            known = chosen.setdefault(name, [])
            known += [part for part in parts if part not in known]
    return {name: sorted(parts, key=lambda part: part.first) for name, parts in chosen.items() if parts}


@torch.no_grad()
def merge_lora(model: Transformer) -> Transformer:
    """Fold the adapter into the weights, in place, and return the model. Quantized weights become float32."""
    adapters: dict[str, Lora] = {}
    for name, layer in lora_layers(model).items():
        untyped: Any = layer
        adapters[name] = untyped.lora
        del untyped.lora
        untyped.__class__ = QuantizedLinear if isinstance(layer, QuantizedLinear) else nn.Linear
    if any(isinstance(model.get_submodule(name), QuantizedLinear) for name in adapters):
        dequantize(model)
    for name, lora in adapters.items():
        weight: Any = model.get_submodule(name).weight
        for part in lora.parts:
            assert isinstance(part, LoraPart)
            rows = weight[part.rows]
            merged = rows + part.update()
            if part.magnitude is not None:
                merged *= (part.magnitude / part.row_lengths(rows))[:, None]
            rows.copy_(merged)
    for p in model.parameters():
        p.requires_grad_(True)
    return model


# Serving --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """The update of some rows of a matrix, from row `first` on: A (r, K), B (R, r), with the scaling included in B.

    gain: with DoRA, what the rows are multiplied by after that, (R,). bias: of these rows, which it does not apply to.
    """

    first: int
    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output of the rows with the update. x: (T, K); y: (T, R), the output without it."""
        updated = y + (x.to(self.A.dtype) @ self.A.T @ self.B.T).to(y.dtype)
        if self.gain is None:
            return updated
        if self.bias is None:
            return updated * self.gain
        return (updated - self.bias) * self.gain + self.bias


@dataclass(frozen=True)
class Adapter:
    """updates: by module name (`layers.0.attention.qkv_proj`), the updates of the matrices that are fused in it."""

    rank: int
    updates: dict[str, tuple[Update, ...]]


@contextlib.contextmanager
def applied(model: Transformer, routes: Sequence[tuple[Adapter, Sequence[int] | None]]) -> Iterator[None]:
    """Within the context, apply each adapter to its tokens of the input (1, T).

    routes: adapters, each with the positions of its tokens (None: all); a token has at most one adapter.
    """
    device = next(model.parameters()).device
    indices: list[tuple[Adapter, Tensor | slice]] = [
        (adapter, slice(None) if rows is None else torch.tensor(rows, device=device)) for adapter, rows in routes
    ]

    def hook_for(name: str) -> Any:
        def add_updates(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in indices:
                for update in adapter.updates.get(name, ()):
                    own = slice(update.first, update.first + len(update.B))
                    # (1, T, K), or (T, K) in a mixture of experts
                    output[..., rows, own] = update(inputs[0][..., rows, :], output[..., rows, own])
            return output

        return add_updates

    names = {name for adapter, _ in routes for name in adapter.updates}
    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
