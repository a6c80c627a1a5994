"""What an optimizer or a file format needs to know about a parameter beyond its shape.

    annotate(self, "qkv_proj.weight", split_sizes=(q, kv, kv))   # in __init__ of the module that owns qkv_proj
    parameter_info(model, "layers.0.attention.qkv_proj.weight")  # ParameterInfo("matrix", split_sizes=(q, kv, kv))

A note is stored on the module that makes it, not on the parameter: torch copies modules whole, but it makes new
`nn.Parameter` objects in `copy.deepcopy` and when it moves a module off the meta device. So notes survive both, as well
as the replacement of parameters or layers (loading, fp8, quantization). They are looked up along a parameter's path in
the module tree; nothing is decided by what a parameter is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["matrix", "embedding", "head", "vector", "other"]
_NOTES = "_parameter_notes"


@dataclass(frozen=True)
class ParameterInfo:
    """kind:
        matrix: a hidden weight matrix, or a stack of them: what Muon is made for.
        embedding: a table that is looked up.
        head: the output layer of a language model, classifier or value model.
        vector: anything with fewer than two axes: norms and biases. Not subject to weight decay.
        other: anything else.
    split_sizes: how many rows each of the matrices has that are fused into this one (q, k, v; gate, up; the experts of
        a stack, one below the other); None: it is a single matrix.
    """

    kind: Kind
    split_sizes: tuple[int, ...] | None = None


def annotate(
    module: nn.Module, name: str, *, kind: Kind | None = None, split_sizes: tuple[int, ...] | None = None
) -> None:
    """Record what the parameter `name` of `module` is: one of its own ("weight") or of a submodule ("lm_head.weight").

    kind: None means the default of `parameter_info`. Where several modules describe the same parameter, the outermost
    one is right: it knows what the parameter is used for.
    """
    notes: dict[str, tuple[Kind | None, tuple[int, ...] | None]] = module.__dict__.setdefault(_NOTES, {})
    notes[name] = (kind, split_sizes)


def parameter_info(model: nn.Module, name: str) -> ParameterInfo:
    """Return what is known about the parameter `name` of `model`, as `named_parameters` names it.

    Without an annotation the kind follows from the owner and the shape: the weight of an `nn.Embedding` is an
    "embedding", a parameter with fewer than two axes a "vector", the weight of an `nn.Linear` a "matrix", and anything
    else "other". An output layer that is a plain `nn.Linear` must therefore be annotated as a "head".
    Raises AttributeError if there is no such parameter.
    """
    *path, last = name.split(".")
    owner: nn.Module = model
    note = _note(owner, name)
    for depth, part in enumerate(path, start=1):
        owner = getattr(owner, part)
        note = note or _note(owner, ".".join([*path[depth:], last]))
    parameter = getattr(owner, last)
    kind, split_sizes = note or (None, None)
    return ParameterInfo(kind or _default_kind(owner, parameter), split_sizes)


def _note(module: nn.Module, name: str) -> tuple[Kind | None, tuple[int, ...] | None] | None:
    notes: dict[str, tuple[Kind | None, tuple[int, ...] | None]] = module.__dict__.get(_NOTES, {})
    return notes.get(name)


def _default_kind(owner: nn.Module, parameter: Tensor | nn.Module) -> Kind:
    """parameter: a quantized matrix is a module."""
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(parameter, Tensor) and parameter.ndim < 2:
        return "vector"
    return "matrix" if isinstance(owner, nn.Linear) else "other"
