"""Rounding of a matrix such that its products change least on a calibration text.

What is minimized, for each row w of the matrix on its own, is (w - ŵ) H (w - ŵ)ᵀ, where H is the mean of x xᵀ over the
inputs x. Codes are chosen column by column, each error being made up for by the columns that follow, beginning with the
columns with the largest inputs (GPTQ with activation order; Frantar et al. 2022, 2210.17323). Then scales and zero
points are fitted to the codes by least squares, and codes are changed one column at a time as long as that helps
(coordinate descent; Behdin et al. 2023, 2309.01885), a few times over.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row. In the algorithms a matrix is stored
transposed, (K, R), so that a column of it is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptsmith.model.quantized import GROUP, Bits, Codes, concatenate, scales_of
from gptsmith.storage import explain_os_errors

DAMPING = 0.01  # of the mean of H's diagonal, added to it
ROUNDS = 3  # of fitting scales and of coordinate descent
_BLOCK = 64  # columns after which the others are brought up to date
_CHUNK = 1 << 22  # numbers of a temporary array
_CLIPPED = (0.0, 0.02, 0.04, 0.06, 0.09, 0.12)  # shares of a group's range that are tried to be cut off at either end


class _Grid:
    """The numbers that a quantized matrix can have: scales and zero points of groups, (R, G), that fit in 8 bits."""

    def __init__(self, bits: Bits, scales: Tensor, zero_points: Tensor) -> None:
        """Take the nearest such grid to any scales and zero points."""
        self.bits, self.most = bits, 2**bits - 1
        unit = _rounded_up(scales.amax(dim=1, keepdim=True) / 255)
        codes = scales / unit.float().clamp_min(1e-30)
        # In 8 bits the range of a group is never cut off.
        codes = (codes.ceil() if bits == 8 else codes.round()).clamp(0, 255).to(torch.uint8)
        middle_codes = middle_unit = None
        if bits < 8:
            middle = zero_points + scales * (self.most / 2)
            # Not so small that the rounding of zero points to 16 bits matters.
            least = scales.amax(dim=1, keepdim=True) * (self.most / 8)
            middle_unit = _rounded_up(torch.maximum(middle.abs().amax(dim=1, keepdim=True), least) / 127)
            middle_codes = (middle / middle_unit.float().clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8)
        self.stored_scales, self.stored_zero_points = scales_of(codes, middle_codes, unit, middle_unit, bits)
        self.units = torch.cat([unit, torch.zeros_like(unit) if middle_unit is None else middle_unit], dim=1)
        self.scales = self.stored_scales.float()
        if self.stored_zero_points is None:
            self.zero_points = -128 * self.scales
        else:
            self.zero_points = self.stored_zero_points.float()

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scales, their reciprocals and the zero points of each column, (K, R)."""
        scales = self.scales.T.repeat_interleave(GROUP, dim=0)
        return scales, _reciprocal(scales), self.zero_points.T.repeat_interleave(GROUP, dim=0)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest codes, float32, of a matrix (R, K)."""
        groups = weight.view(len(weight), -1, GROUP)
        codes = (groups - self.zero_points[..., None]) * _reciprocal(self.scales)[..., None]
        return codes.round_().clamp_(0 if self.bits < 8 else 1, self.most).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """Return the numbers (R, K) of codes (R, K)."""
        groups = codes.view(len(codes), -1, GROUP)
        return (groups * self.scales[..., None] + self.zero_points[..., None]).flatten(1)

    def matrix(self, codes: Tensor) -> Codes:
        return Codes(self.bits, codes.to(torch.uint8), self.stored_scales, self.stored_zero_points, self.units)

    def rows(self, chosen: Tensor, other: _Grid) -> _Grid:
        """Return a grid with the rows of `self` where `chosen`, (R,) bool, else with those of `other`."""
        made = object.__new__(_Grid)
        made.bits, made.most = self.bits, self.most
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(made, name, torch.where(chosen[:, None], tensor, getattr(other, name)))
            else:
                setattr(made, name, tensor)
        return made


def _rounded_up(x: Tensor) -> Tensor:
    """Return x ≥ 0 as bfloat16 that is not smaller."""
    return (x * (1 + 2**-7)).to(torch.bfloat16)


def _reciprocal(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, 1 / scales.clamp_min(1e-30), 0.0)


@torch.no_grad()
def round_matrix(
    weight: Tensor, hessian: Tensor | None, bits: Bits, *, rounds: int = ROUNDS, scratch: Path | None = None
) -> Codes:
    """Return a matrix (R, K), quantized; K is a multiple of 32.

    hessian: the mean of x xᵀ over the inputs, (K, K) float32; it is changed. None: round each weight to the nearest.
    scratch: a file in which H waits while its factor is needed; None: memory. Both (K, K) matrices together would take
        more than a layer.
    """
    weight = weight.float()
    if hessian is None:
        grid = _fitted_ranges(weight, None, bits)
        return grid.matrix(grid.nearest(weight))
    mean = hessian.diagonal().mean()
    if not mean > 0:  # no inputs
        return round_matrix(weight, None, bits)
    hessian.diagonal().add_(DAMPING * mean)
    diagonal = hessian.diagonal().clone()
    order = diagonal.argsort(descending=True)
    split = torch.split(weight, max(1, _CHUNK // weight.shape[1]))  # rows do not depend on each other
    grids = [_fitted_ranges(part, diagonal, bits) for part in split]
    chosen: list[Tensor] = []
    with _Parked(hessian, scratch) as parked:
        del hessian
        factor = _inverse_factor(parked.read, order, diagonal)
        for part, grid in zip(split, grids, strict=True):
            chosen.append(_gptq(part, order, factor, grid).to(torch.uint8))
        del factor
        hessian = parked.whole()
    parts = []
    for part, grid in zip(split, grids, strict=True):
        codes = chosen.pop(0).float()
        for _ in range(rounds):
            grid = _fitted_scales(part, hessian, grid, codes)
            codes = _descended(part, hessian, grid, codes)
        parts.append(grid.matrix(codes))
    return concatenate(parts)


class _Parked:
    """A matrix (K, K) that is not needed for a while: in a file if there is one, which is deleted at the end."""

    def __init__(self, matrix: Tensor, path: Path | None) -> None:
        self._matrix, self._path, self._size = matrix, path, len(matrix)
        if path is not None:
            with explain_os_errors(path):
                matrix.numpy().tofile(path)
            self._matrix = torch.empty(0)

    def __enter__(self) -> _Parked:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def read(self, rows: Tensor) -> Tensor:
        """Return some rows."""
        if self._path is None:
            return self._matrix[rows]
        found = torch.empty(len(rows), self._size)
        with explain_os_errors(self._path), open(self._path, "rb") as file:
            for at, row in enumerate(rows.tolist()):
                file.seek(4 * self._size * row)
                found[at] = torch.from_numpy(np.fromfile(file, np.float32, self._size))
        return found

    def whole(self) -> Tensor:
        if self._path is None:
            return self._matrix
        with explain_os_errors(self._path):
            return torch.from_numpy(np.fromfile(self._path, np.float32).reshape(self._size, self._size))


def _fitted_ranges(weight: Tensor, importance: Tensor | None, bits: Bits) -> _Grid:
    """Return a grid with a range for each group: of a few, the one with the smallest squared error of the nearest
    numbers. importance: weights of the columns, (K,)."""
    rows = max(1, _CHUNK // weight.shape[1])
    scales, zero_points = [], []
    weights = torch.ones(weight.shape[1]) if importance is None else importance
    for part in torch.split(weight, rows):
        groups = part.view(len(part), -1, GROUP)
        if bits == 8:
            scales.append(groups.abs().amax(dim=-1) / 127)
            zero_points.append(scales[-1])
            continue
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        best = torch.full_like(low, torch.inf)
        best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
        for clipped in _CLIPPED:
            zero = low + clipped * (high - low)
            scale = (high - low) * (1 - 2 * clipped) / (2**bits - 1)
            codes = ((groups - zero[..., None]) * _reciprocal(scale)[..., None]).round_().clamp_(0, 2**bits - 1)
            error = (codes * scale[..., None] + zero[..., None] - groups).square_()
            error = (error * weights.view(-1, GROUP)).sum(dim=-1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scales.append(best_scale)
        zero_points.append(best_zero)
    return _Grid(bits, torch.cat(scales), torch.cat(zero_points))


def _gptq(weight: Tensor, order: Tensor, factor: Tensor, grid: _Grid) -> Tensor:
    """Return codes (R, K), chosen column by column in this order. factor: as from `_inverse_factor`, in the order."""
    K = weight.shape[1]
    scales, inverses, zero_points = (each[order] for each in grid.columns())
    w = weight.T[order]  # (K, R); a copy
    codes = torch.empty_like(w)
    errors = torch.empty(_BLOCK, w.shape[1])
    for begin in range(0, K, _BLOCK):
        end = min(K, begin + _BLOCK)
        for k in range(begin, end):
            code = ((w[k] - zero_points[k]) * inverses[k]).round_().clamp_(0 if grid.bits < 8 else 1, grid.most)
            codes[k] = code
            error = torch.sub(w[k], code.mul_(scales[k]).add_(zero_points[k]), out=errors[k - begin])
            error /= factor[k, k]
            w[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors[: end - begin], alpha=-1)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return placed.T.contiguous()


def _inverse_factor(read: Callable[[Tensor], Tensor], order: Tensor, diagonal: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of H, (K, K), its rows and columns in this order.

    read: returns rows of H. diagonal: that of H, which is increased if necessary. The one matrix is computed in place.
    """
    diagonal, extra = diagonal[order], 0.0
    factor = torch.empty(len(order), len(order))
    while True:
        for rows, part in zip(torch.split(order, _BLOCK), torch.split(factor, _BLOCK), strict=True):
            torch.index_select(read(rows), 1, order, out=part)
        factor.diagonal().copy_(diagonal)
        try:
            torch.linalg.cholesky(factor, out=factor)
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky(factor, upper=True, out=factor)
            return factor
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # torch's stubs do not export it
            more = max(extra, DAMPING)
            diagonal.add_(more * diagonal.mean())
            extra = 10 * more


def _fitted_scales(weight: Tensor, hessian: Tensor, grid: _Grid, codes: Tensor) -> _Grid:
    """Return the grid with scales and zero points that fit the codes best, in the rows where that is better."""
    K = weight.shape[1]
    G = K // GROUP
    affine = grid.bits < 8
    rows = max(1, _CHUNK // (K * G))
    blocks = hessian.view(G, GROUP, G, GROUP)
    ones = blocks.sum(dim=(1, 3)) if affine else None  # (G, G)
    scales, zero_points = [], []
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        b = len(weight[part])
        residual = (weight[part] - grid.values(codes)[part]) @ hessian if b < len(weight) else None
        if residual is None:
            residual = (weight - grid.values(codes)) @ hessian
        c = codes[part].view(b, G, GROUP) - (0 if affine else 128)
        products = (c.transpose(0, 1) @ hessian.view(G, GROUP, K)).view(G, b, G, GROUP)  # of each group's codes and H
        normal = torch.einsum("gbhj,bhj->bgh", products, c)
        right = (residual.view(b, G, GROUP) * c).sum(dim=-1)
        if ones is not None:
            mixed = products.sum(dim=-1).transpose(0, 1)  # (b, G, G): of scales and zero points
            normal = torch.cat(
                [torch.cat([normal, mixed], dim=2), torch.cat([mixed.mT, ones.expand(b, G, G)], dim=2)], dim=1
            )
            right = torch.cat([right, residual.view(b, G, GROUP).sum(dim=-1)], dim=1)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-3 * diagonal + 1e-12 * diagonal.mean() + 1e-30)  # some groups have a single code
        change = torch.linalg.solve_ex(normal, right)[0].nan_to_num_(0, 0, 0)
        scales.append(grid.scales[part] + change[:, :G])
        zero_points.append(grid.zero_points[part] + (change[:, G:] if affine else 0))
    fitted = _Grid(grid.bits, torch.cat(scales).clamp_min(0), torch.cat(zero_points))
    better = _errors(weight, hessian, fitted.values(codes)) < _errors(weight, hessian, grid.values(codes))
    return fitted.rows(better, grid)


def _descended(weight: Tensor, hessian: Tensor, grid: _Grid, codes: Tensor) -> Tensor:
    """Return codes that are changed one column after the other, each to the best one, given all others."""
    K = weight.shape[1]
    scales, inverses, zero_points = grid.columns()
    codes = codes.T.contiguous()
    values = codes * scales + zero_points  # (K, R)
    gradient = hessian @ (weight.T - values)  # (K, R)
    diagonal = hessian.diagonal()
    changes = torch.empty(_BLOCK, len(weight))
    for begin in range(0, K, _BLOCK):
        end = min(K, begin + _BLOCK)
        own = gradient[begin:end].clone()
        for k in range(begin, end):
            i = k - begin
            target = torch.add(values[k], own[i], alpha=1 / float(diagonal[k]))
            code = target.sub_(zero_points[k]).mul_(inverses[k]).round_().clamp_(0 if grid.bits < 8 else 1, grid.most)
            codes[k] = code
            change = torch.sub(code.mul_(scales[k]).add_(zero_points[k]), values[k], out=changes[i])
            own.addr_(hessian[begin:end, k], change, alpha=-1)
        gradient.addmm_(hessian[:, begin:end], changes[: end - begin], alpha=-1)
    return codes.T.contiguous()


def _errors(weight: Tensor, hessian: Tensor, values: Tensor) -> Tensor:
    """Return (w - ŵ) H (w - ŵ)ᵀ of each row, (R,)."""
    difference = weight - values
    return ((difference @ hessian) * difference).sum(dim=1)
