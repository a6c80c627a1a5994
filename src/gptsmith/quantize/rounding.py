"""Rounding of a matrix such that its products change least on a calibration text.

What is minimized, for each row w of the matrix on its own, is (w - ŵ) H (w - ŵ)ᵀ, where H is the mean of x xᵀ over the
inputs x. Codes are chosen column by column, each error being made up for by the columns that follow, beginning with the
columns with the largest inputs (GPTQ with activation order; Frantar et al. 2022, 2210.17323). Then scales and zero
points are fitted to the codes by least squares, and codes are changed one column at a time as long as that helps
(coordinate descent; Behdin et al. 2023, 2309.01885), a few times over.

H and what is computed from it are in files, of which a few rows at a time are read. In memory are a few copies of some
rows of the matrix.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row. In the algorithms a matrix is stored
transposed, (K, R), so that a column of it is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptsmith.model.quantized import GROUP, Bits, Codes, concatenate, scales_of
from gptsmith.quantize.file_matrix import FileMatrix

DAMPING = 0.01  # of the mean of H's diagonal, added to it
ROUNDS = 3  # of fitting scales and of coordinate descent
MEMORY = 1 << 28  # bytes
_BLOCK = 64  # columns after which the others are brought up to date, and rows of H that are in memory
_CHUNK = 1 << 22  # the most weights that are rounded at once
_COPIES = 4  # float32 copies of these weights in memory
_PIECE = 1 << 18  # weights whose range is searched at once
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

    def groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scales, their reciprocals and the zero points, each (G, R)."""
        scales = self.scales.T.contiguous()
        return scales, _reciprocal(scales), self.zero_points.T.contiguous()

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest codes, uint8, of a matrix (R, K)."""
        codes = weight.view(len(weight), -1, GROUP) - self.zero_points[..., None]
        codes.mul_(_reciprocal(self.scales)[..., None]).round_().clamp_(0 if self.bits < 8 else 1, self.most)
        return codes.to(torch.uint8).flatten(1)

    def values(self, codes: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the numbers (r, K) of codes (r, K), of these rows of the matrix."""
        groups = codes.view(len(codes), -1, GROUP).float()
        return groups.mul_(self.scales[rows, :, None]).add_(self.zero_points[rows, :, None]).flatten(1)

    def matrix(self, codes: Tensor) -> Codes:
        return Codes(self.bits, codes, self.stored_scales, self.stored_zero_points, self.units)

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
    weight: Tensor, hessian: FileMatrix | None, bits: Bits, *, rounds: int = ROUNDS, memory: int = MEMORY
) -> Codes:
    """Return a matrix (R, K), quantized; K is a multiple of 32.

    hessian: the mean of x xᵀ over the inputs, (K, K). None: round each weight to the nearest. memory: how many bytes to
    take beside both, as far as that is possible: rows are rounded a few at a time. The result is among them.
    """
    R, K = weight.shape
    numbers = max(0, memory // 4 - weight.numel() // 2)  # without codes, which are copied once
    parts = torch.split(weight, _evenly(R, min(_CHUNK, numbers // _COPIES) // K))  # rows do not depend on each other
    if hessian is None:
        return concatenate([_nearest(part, bits) for part in parts])
    diagonal = torch.cat([hessian.read(i, j).diagonal(offset=i).clone() for i, j in _blocks(K)])
    mean = diagonal.mean()
    if not mean > 0:  # no inputs
        return round_matrix(weight, None, bits, memory=memory)
    diagonal += DAMPING * mean
    damped = _Damped(hessian, diagonal)
    order = diagonal.argsort(descending=True).flip(0)  # beginning with the last
    factor = _factor(hessian, order, diagonal)
    rounded = []
    for part in parts:
        part = part.float()
        grid = _fitted_ranges(part, diagonal, bits)
        codes = _gptq(part, order, factor, grid)
        for _ in range(rounds):
            grid = _fitted_scales(part, damped, grid, codes)
            codes = _descended(part, damped, grid, codes)
        rounded.append(grid.matrix(codes))
    return concatenate(rounded)


def _evenly(rows: int, most: int) -> int:
    """Return how many rows a part has if there are as few parts as possible, of at most so many rows, or one."""
    return -(-rows // -(-rows // max(1, most)))


def _blocks(count: int) -> list[tuple[int, int]]:
    """Return where blocks of _BLOCK rows begin and end."""
    return [(i, min(count, i + _BLOCK)) for i in range(0, count, _BLOCK)]


def _nearest(weight: Tensor, bits: Bits) -> Codes:
    weight = weight.float()
    grid = _fitted_ranges(weight, None, bits)
    return grid.matrix(grid.nearest(weight))


class _Damped:
    """A symmetric matrix in a file with another diagonal, (K,)."""

    def __init__(self, matrix: FileMatrix, diagonal: Tensor) -> None:
        self._matrix, self.diagonal = matrix, diagonal

    def read(self, begin: int, end: int) -> Tensor:
        """Return some rows, (n, K)."""
        rows = self._matrix.read(begin, end)
        rows.diagonal(offset=begin).copy_(self.diagonal[begin:end])
        return rows


def _fitted_ranges(weight: Tensor, importance: Tensor | None, bits: Bits) -> _Grid:
    """Return a grid with a range for each group: of a few, the one with the smallest squared error of the nearest
    numbers. importance: weights of the columns, (K,)."""
    rows = max(1, _PIECE // weight.shape[1])
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


def _gptq(weight: Tensor, order: Tensor, factor: FileMatrix, grid: _Grid) -> Tensor:
    """Return codes (R, K) uint8, chosen column by column, from the last one in this order to the first.

    factor: as from `_factor`, in the order. With H = L Lᵀ, the error (w - ŵ) H (w - ŵ)ᵀ is the squared length of
    (w - ŵ) L. The last of its numbers depends on the last column alone, the one before on two, and so on. Each code is
    the one that makes its number smallest, given the codes after it. Those are GPTQ's codes (Chen et al. 2025,
    2507.18553), without the inverse of H.
    """
    R, K = weight.shape
    scales, inverses, zero_points = grid.groups()
    least, places = 0 if grid.bits < 8 else 1, order.tolist()
    codes = torch.empty(K, R, dtype=torch.uint8)
    lengths = torch.zeros(K, R)  # (w - ŵ) L, of the columns that are done
    for begin, end in _blocks(K)[::-1]:
        panel = factor.read(begin, end)  # rows of L
        errors = weight.T[order[begin:end]]  # a copy, of the weights at first
        own, diagonal = lengths[begin:end], panel.diagonal(offset=begin).tolist()
        for i in reversed(range(end - begin)):
            place = places[begin + i]
            group = place // GROUP
            target = torch.add(errors[i], own[i], alpha=1 / diagonal[i])
            code = target.sub_(zero_points[group]).mul_(inverses[group]).round_().clamp_(least, grid.most)
            codes[place] = code
            errors[i] -= code.mul_(scales[group]).add_(zero_points[group])
            own[:i].addr_(panel[i, begin : begin + i], errors[i])
        lengths[:begin].addmm_(panel[:, :begin].T, errors)
    return codes.T.contiguous()


def _factor(hessian: FileMatrix, order: Tensor, diagonal: Tensor) -> FileMatrix:
    """Return L of the Cholesky factorization H = L Lᵀ, (K, K) lower triangular, rows and columns of H in this order.

    diagonal: that of H, which is increased if necessary. Two blocks of rows are in memory.
    """
    K = len(order)
    diagonal, extra = diagonal[order], 0.0
    factor = FileMatrix(K, K, hessian.directory)
    while not _factorized(hessian, order, diagonal, factor):
        more = max(extra, DAMPING)
        diagonal += more * diagonal.mean()
        extra = 10 * more
    return factor


def _factorized(hessian: FileMatrix, order: Tensor, diagonal: Tensor, factor: FileMatrix) -> bool:
    """Write the factor; return whether H is positive definite, up to rounding."""
    blocks = _blocks(len(order))
    for begin, end in blocks:
        rows = hessian.gather(order[begin:end])[:, order]
        rows.diagonal(offset=begin).copy_(diagonal[begin:end])
        for first, last in blocks[: begin // _BLOCK]:
            done = factor.read(first, last)
            part = rows[:, first:last].addmm_(rows[:, :first], done[:, :first].T, alpha=-1)
            part.copy_(torch.linalg.solve_triangular(done[:, first:last], part.T, upper=False).T)
        own = rows[:, begin:end].addmm_(rows[:, :begin], rows[:, :begin].T, alpha=-1)
        triangle, failed = torch.linalg.cholesky_ex(own)
        if failed or not triangle.isfinite().all():
            return False
        own.copy_(triangle)
        rows[:, end:] = 0
        factor.write(begin, rows)
    return True


def _fitted_scales(weight: Tensor, hessian: _Damped, grid: _Grid, codes: Tensor) -> _Grid:
    """Return the grid with scales and zero points that fit the codes best, in the rows where that is better."""
    R, K = weight.shape
    G = K // GROUP
    unknowns = (2 if grid.bits < 8 else 1) * G
    step = _evenly(R, 2 * weight.numel() // (5 * K + 3 * unknowns**2))
    scales, zero_points, errors = [], [], []
    for rows in (slice(i, i + step) for i in range(0, R, step)):
        difference = weight[rows] - grid.values(codes[rows], rows)  # (r, K)
        change, error = _best_changes(difference, codes[rows], hessian, grid.bits)
        errors.append(error)
        scales.append(grid.scales[rows] + change[:, :G])
        zero_points.append(grid.zero_points[rows] + (change[:, G:] if grid.bits < 8 else 0))
    fitted = _Grid(grid.bits, torch.cat(scales).clamp_min(0), torch.cat(zero_points))
    return fitted.rows(_errors(weight, hessian, fitted, codes) < torch.cat(errors), grid)


def _best_changes(difference: Tensor, codes: Tensor, hessian: _Damped, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return the changes of the scales, and below 8 bits of the zero points, (r, G or 2G), that make the error of each
    row smallest, by least squares; and the error before, (r,). difference: (r, K), of the weights and their values."""
    R, K = codes.shape
    G, affine = K // GROUP, bits < 8
    c = (codes.float() - (0 if affine else 128)).view(R, G, GROUP)
    normal = torch.empty(R, 2 * G if affine else G, 2 * G if affine else G)
    right = torch.empty(R, len(normal[0]))
    error = torch.zeros(R)
    for begin, end in _blocks(K):
        panel = hessian.read(begin, end)  # (n, K)
        residual = difference @ panel.T  # (r, n)
        error += (residual * difference[:, begin:end]).sum(dim=1)
        for g in range(begin // GROUP, end // GROUP):
            mine = slice(g * GROUP - begin, (g + 1) * GROUP - begin)
            products = (c[:, g] @ panel[mine]).view(R, G, GROUP)  # of the group's codes and H
            right[:, g] = (residual[:, mine] * c[:, g]).sum(dim=-1)
            if affine:
                normal[:, g, G:] = products.sum(dim=-1)
                normal[:, G:, g] = normal[:, g, G:]
                normal[:, G + g, G:] = panel[mine].sum(dim=0).view(G, GROUP).sum(dim=-1)
                right[:, G + g] = residual[:, mine].sum(dim=-1)
            normal[:, g, :G] = products.mul_(c).sum(dim=-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-3 * diagonal + 1e-12 * diagonal.mean() + 1e-30)  # some groups have a single code
    return torch.linalg.solve_ex(normal, right)[0].nan_to_num_(0, 0, 0), error


def _errors(weight: Tensor, hessian: _Damped, grid: _Grid, codes: Tensor) -> Tensor:
    """Return (w - ŵ) H (w - ŵ)ᵀ of each row, (R,)."""
    difference = weight - grid.values(codes)
    found = torch.zeros(len(weight))
    for begin, end in _blocks(weight.shape[1]):
        found += ((difference @ hessian.read(begin, end).T) * difference[:, begin:end]).sum(dim=1)
    return found


def _descended(weight: Tensor, hessian: _Damped, grid: _Grid, codes: Tensor) -> Tensor:
    """Return codes that are changed one column after the other, each to the best one, given all others."""
    R, K = weight.shape
    scales, inverses, zero_points = grid.groups()
    least = 0 if grid.bits < 8 else 1
    gradient = torch.empty(K, R)  # H (w - ŵ)ᵀ
    difference = weight - grid.values(codes)
    for begin, end in _blocks(K):
        torch.mm(hessian.read(begin, end), difference.T, out=gradient[begin:end])
    del difference
    codes = codes.T.contiguous()
    changes = torch.empty(_BLOCK, R)
    for begin, end in _blocks(K):
        panel, own = hessian.read(begin, end), gradient[begin:end]
        diagonal = panel.diagonal(offset=begin).tolist()
        for k in range(begin, end):
            i, group = k - begin, k // GROUP
            value = codes[k].float().mul_(scales[group]).add_(zero_points[group])
            target = torch.add(value, own[i], alpha=1 / diagonal[i])
            code = target.sub_(zero_points[group]).mul_(inverses[group]).round_().clamp_(least, grid.most)
            codes[k] = code
            change = torch.sub(code.mul_(scales[group]).add_(zero_points[group]), value, out=changes[i])
            own[i + 1 :].addr_(panel[i + 1 :, k], change, alpha=-1)
        gradient[end:].addmm_(panel[:, end:].T, changes[: end - begin], alpha=-1)
    return codes.T.contiguous()
