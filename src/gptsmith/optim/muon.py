"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum SGD with orthogonalized updates.

Axis letters: N matrices of one shape · R rows · C columns (R ≤ C).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

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


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum in which the update of each matrix is replaced by the nearest orthogonal matrix.

    params: matrices, stacks of matrices (a stack counts as one matrix of all its rows), or groups of those. A group can
        have `"split_sizes"`, a list with a tuple of row counts (or None) per parameter: a fused projection (q, k and v
        in one) or a stack of experts is orthogonalized part by part.
    lr: the spectral norm of the update of a square matrix; a tall one's is sqrt(rows / columns) times that.
    weight_decay: decoupled, as in AdamW.
    Raises ValueError for a parameter that is not a matrix, or split sizes that do not add up to its rows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            given = group.get("split_sizes", [None] * len(group["params"]))
            group["split_sizes"] = []
            for p, sizes in zip(group["params"], given, strict=True):
                shape = tuple(p.shape)
                if p.ndim < 2:
                    raise ValueError(f"Muon optimizes matrices, not a parameter of shape {shape}")
                rows = p.numel() // p.shape[-1]
                if sizes is not None and sum(sizes) != rows:
                    raise ValueError(f"the split sizes {sizes} do not add up to the {rows} rows of {shape}")
                group["split_sizes"].append(sizes or (rows,))

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

            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for (p, sizes), update in zip(with_gradient, updates, strict=True):
                targets, parts = (torch.split(x.flatten(0, -2), sizes) for x in (p, update))
                for target, part in zip(targets, parts, strict=True):
                    rows, columns = part.shape
                    if rows > columns:
                        target, part = target.mT, part.mT
                    by_shape[rows, columns].append((target, part))
            for (rows, columns), same in by_shape.items():
                stacked = torch.stack([part for _, part in same])
                # bfloat16 is precise enough, since the iteration only ends near 1 anyway, and twice as fast on a GPU.
                stacked = orthogonalize(stacked.bfloat16() if stacked.is_cuda else stacked, group["steps"])
                stacked = stacked.to(same[0][0].dtype)
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_add_([target for target, _ in same], list(stacked.unbind()), alpha=scale)
