"""Muon: momentum, made orthogonal, for the matrices of a network.

Jordan et al. 2024, kellerjordan.github.io/posts/muon.

Axis letters: N matrices of one shape · R rows · C columns (R ≤ C).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic whose repeated use drives singular values towards 1 fastest (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz: (N, R, C) with R ≤ C -> matrices with the same singular vectors and singular values near 1.

    All N are iterated together, in the dtype given.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of each matrix is replaced by the nearest orthogonal one.

    params: matrices or stacks of them (a stack counts as one matrix of all its rows), or groups of those. A group may
    carry `"splits"`, a list with one tuple of row counts per parameter: a fused projection (q, k and v in one) or a
    stack of experts is orthogonalised part by part.
    lr: the spectral norm of an update of a square matrix. Tall ones get sqrt(rows / columns) more.
    weight_decay: decoupled, as in AdamW.
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
            group.setdefault("splits", [(p.numel() // p.shape[-1],) for p in group["params"]])
            for p, split in zip(group["params"], group["splits"], strict=True):
                if p.ndim < 2 or sum(split) != p.numel() // p.shape[-1]:
                    shape = tuple(p.shape)
                    raise ValueError(f"Muon takes matrices whose splits add up to their rows, not {shape} {split}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            pairs = zip(group["params"], group["splits"], strict=True)
            chosen = [(p, split) for p, split in pairs if p.grad is not None]
            if not chosen:
                continue
            params = [p for p, _ in chosen]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: look ahead
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for (p, split), update in zip(chosen, updates, strict=True):
                rows_of = zip(
                    torch.split(p.flatten(0, -2), split), torch.split(update.flatten(0, -2), split), strict=True
                )
                for target, part in rows_of:
                    rows, columns = part.shape
                    if rows > columns:
                        target, part = target.mT, part.mT
                    by_shape[rows, columns].append((target, part))
            for (rows, columns), same in by_shape.items():
                stacked = torch.stack([part for _, part in same])
                # Half precision is enough for an iteration that ends near 1 anyway, and twice as fast on a GPU.
                stacked = orthogonalize(stacked.bfloat16() if stacked.is_cuda else stacked, group["steps"])
                stacked = stacked.to(same[0][0].dtype)
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_add_([target for target, _ in same], list(stacked.unbind()), alpha=scale)
