"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum SGD with orthogonalized updates.

Axis letters: N matrices of one shape · R rows · C columns (R ≤ C).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Coefficients of the quintic polynomial whose iteration drives singular values towards 1 fastest (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1, by Newton–Schulz iteration.

    matrices: (N, R, C) with R ≤ C; all N are iterated together, in their own dtype.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Owners(Protocol):
    """Who has the whole of parameters of which each process has a part or a copy."""

    def collect(self, parameters: Sequence[Any], parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the whole tensors that this process owns, by index. parts: what it has of each."""

    def spread(self, parameters: Sequence[Any], wholes: dict[int, Tensor]) -> list[Tensor]:
        """Return this process's part of each. wholes: those that it owns."""


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum in which the update of each matrix is replaced by the nearest orthogonal matrix.

    params: matrices, stacks of matrices (a stack counts as one matrix of all its rows), or groups of those. A group can
        have `"split_sizes"`, a list with a tuple of row counts (or None) per parameter: a fused projection (q, k and v
        in one) or a stack of experts is orthogonalized part by part.
    lr: the spectral norm of the update of a square matrix; a tall one's is sqrt(rows / columns) times that.
    weight_decay: decoupled, as in AdamW.
    owners: where processes share the matrices, who orthogonalizes which. Split sizes are those of whole matrices.
    Raises ValueError for a parameter that is not a matrix, or split sizes that do not add up to its rows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        owners: Owners | None = None,
    ) -> None:
        self.owners = owners
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            given = group.get("split_sizes", [None] * len(group["params"]))
            group["split_sizes"] = []
            for p, sizes in zip(group["params"], given, strict=True):
                shape = tuple(p.shape)
                if p.ndim < 2:
                    raise ValueError(f"Muon optimizes matrices, not a parameter of shape {shape}")
                rows = p.numel() // p.shape[-1]
                if sizes is not None and sum(sizes) != rows and owners is None:
                    raise ValueError(f"the split sizes {sizes} do not add up to the {rows} rows of {shape}")
                group["split_sizes"].append(sizes or (None if owners else (rows,)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            pairs = zip(group["params"], group["split_sizes"], strict=True)
            with_gradient = [(p, sizes) for p, sizes in pairs if p.grad is not None]
            if not with_gradient:
                continue
            params = [p for p, _ in with_gradient]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov momentum
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            sizes = [each for _, each in with_gradient]
            if self.owners is None:
                _add_orthogonalized(params, updates, sizes, lr=group["lr"], steps=group["steps"])
                continue
            mine = self.owners.collect(params, updates)
            wholes = {i: torch.zeros_like(update) for i, update in mine.items()}
            own = [sizes[i] for i in mine]
            _add_orthogonalized([*wholes.values()], [*mine.values()], own, lr=group["lr"], steps=group["steps"])
            torch._foreach_add_(params, self.owners.spread(params, wholes))


def _add_orthogonalized(
    targets: Sequence[Tensor],
    updates: Sequence[Tensor],
    split_sizes: Sequence[tuple[int, ...] | None],
    *,
    lr: float,
    steps: int,
) -> None:
    """Subtract from each target lr times its orthogonalized update, part by part."""
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for p, update, sizes in zip(targets, updates, split_sizes, strict=True):
        rows_of = list(sizes or (p.numel() // p.shape[-1],))
        for target, part in zip(*(torch.split(x.flatten(0, -2), rows_of) for x in (p, update)), strict=True):
            rows, columns = part.shape
            if rows > columns:
                target, part = target.mT, part.mT
            by_shape[rows, columns].append((target, part))
    for (rows, columns), same in by_shape.items():
        stacked = torch.stack([part for _, part in same])
        # bfloat16 is precise enough, since the iteration only ends near 1 anyway, and twice as fast on a GPU.
        stacked = orthogonalize(stacked.bfloat16() if stacked.is_cuda else stacked, steps)
        stacked = stacked.to(same[0][0].dtype)
        scale = -lr * math.sqrt(max(1.0, rows / columns))
        torch._foreach_add_([target for target, _ in same], list(stacked.unbind()), alpha=scale)
