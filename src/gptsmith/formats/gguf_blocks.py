"""How GGUF stores numbers: types of blocks, which hold 32 or 256 numbers each, and their codes, scales and minima.

    blocks = encode("Q4_K", weights, importance)     # bytes; importance: mean squares of the inputs, (K,)
    numbers = decode("Q4_K", blocks)                 # float32

Every quantized type is a code times the scale of its group, either plus the group's minimum (Q4_1, Q2_K, Q4_K, Q5_K …),
or from a code that stands for 0 (Q4_0, Q3_K, Q6_K …), or by a table of 16 values (IQ4_NL, IQ4_XS, MXFP4). `split`
returns these parts. The K-types store the scales of their groups as small integers times a float16 of the block.

The layouts are those of ggml-common.h. Decoding computes what ggml's `dequantize_row_*` does, bit for bit. Encoding
searches more than ggml's quantizers do: the integers that stand for scales and minima are chosen together with the
codes. Each error is weighted by the importance of its column and the size of the weight, as there.

Axis letters: N blocks · S numbers of a block · G groups of a block · R rows · K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptsmith.errors import CheckpointError

_CHUNK = 1 << 17  # numbers that are converted at once: intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class TensorType:
    """How numbers are stored: `block_size` of them in `block_bytes` bytes (ggml-common.h)."""

    number: int
    name: str
    block_size: int
    block_bytes: int

    def num_bytes(self, numbers: int) -> int:
        """Return the size of so many numbers, which are whole blocks."""
        return numbers // self.block_size * self.block_bytes


TENSOR_TYPES = {
    each.number: each
    for each in (
        TensorType(0, "F32", 1, 4),
        TensorType(1, "F16", 1, 2),
        TensorType(30, "BF16", 1, 2),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(23, "IQ4_XS", 256, 136),
        TensorType(39, "MXFP4", 32, 17),
    )
}
TYPES_BY_NAME = {each.name: each for each in TENSOR_TYPES.values()}

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""The values of E2M1, doubled; the scale is halved."""
TABLES = {"IQ4_NL": _IQ4_VALUES, "IQ4_XS": _IQ4_VALUES, "MXFP4": _MXFP4_VALUES}
"""The value of each code, of types that have a table."""
ZERO_CODES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q3_K": 4, "Q6_K": 32}
"""The code that stands for 0, of types that are symmetric."""


class Parts(NamedTuple):
    """The parts of N blocks. codes: (N, S) uint8. scales: (N, G) float32. minima: (N, G) float32, None if without.

    A number is its scale times (code - ZERO_CODES) or TABLES[code], or its scale times code, plus its minimum.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None


# Decoding -------------------------------------------------------------------------------------------------------------


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """Dequantize whole blocks of a type: (bytes,) uint8 -> (numbers,) float32.

    Damaged scales give numbers that are not finite.
    """
    raw = blocks.reshape(-1)
    if name == "F32":
        return raw.view("<f4").astype(np.float32)
    if name == "F16":
        return raw.view("<f2").astype(np.float32)
    if name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    type = TYPES_BY_NAME[name]
    rows = raw.reshape(-1, type.block_bytes)
    numbers = np.empty((len(rows), type.block_size), dtype=np.float32)
    step = max(1, _CHUNK // type.block_size)
    with np.errstate(all="ignore"):  # damaged scales are detected in the result
        for start in range(0, len(rows), step):
            codes, scales, minima = split(name, rows[start : start + step])
            if name in TABLES:
                values = TABLES[name].astype(np.float32)[codes]
            else:
                values = codes.astype(np.float32)
                values -= np.float32(ZERO_CODES.get(name, 0))
            groups = values.reshape(*scales.shape, -1)
            groups *= scales[..., None]
            if minima is not None:
                groups += minima[..., None]
            numbers[start : start + step] = values
    return numbers.reshape(-1)


def split(name: str, blocks: np.ndarray) -> Parts:
    """Return the parts of N blocks of a quantized type, (N, bytes) uint8."""
    return _SPLITTERS[name](blocks)


def _spread(packed: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Return the small integers in bytes (N, B): (N, 8 B / bits) uint8.

    Of `run` bytes in a row, the lowest bits come first, then the next: ggml's order in all of its types.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _gather(codes: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Invert `_spread`: small integers (N, S) -> bytes (N, S · bits / 8)."""
    per_byte = 8 // bits
    parts = codes.astype(np.uint8).reshape(len(codes), -1, per_byte, run)
    packed = parts[:, :, 0].copy()
    for i in range(1, per_byte):
        packed |= parts[:, :, i] << np.uint8(i * bits)
    return packed.reshape(len(codes), -1)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at this byte of each block: (N, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _split_q4_0(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 2:], 16, 4), _halves(b, 0))


def _split_q4_1(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 4:], 16, 4), _halves(b, 0), _halves(b, 2))


def _split_q5_0(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 6:], 16, 4) | _spread(b[:, 2:6], 1, 1) << 4, _halves(b, 0))


def _split_q5_1(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 8:], 16, 4) | _spread(b[:, 4:8], 1, 1) << 4, _halves(b, 0), _halves(b, 2))


def _split_q8_0(b: np.ndarray) -> Parts:
    return Parts(b[:, 2:] ^ 128, _halves(b, 0))  # from two's complement to an offset of 128


def _split_q2_k(b: np.ndarray) -> Parts:
    scales, minima = b[:, :16] & 15, b[:, :16] >> 4
    return Parts(_spread(b[:, 16:80], 32, 2), _halves(b, 80) * scales, -(_halves(b, 82) * minima))


def _split_q3_k(b: np.ndarray) -> Parts:
    scales = _spread(b[:, 96:104], 8, 4) | _spread(b[:, 104:108], 4, 2) << 4
    codes = _spread(b[:, 32:96], 32, 2) | _spread(b[:, :32], 32, 1) << 2
    return Parts(codes, _halves(b, 108) * (scales.astype(np.float32) - 32))


def _split_six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and minima of eight groups, 6 bits each, from 12 bytes: both (N, 8) uint8."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((a & 63, (c & 15) | (a >> 2 & 48)), axis=1)
    minima = np.concatenate((b & 63, (c >> 4) | (b >> 2 & 48)), axis=1)
    return scales, minima


def _join_six_bit_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Invert `_split_six_bit_scales`."""
    low = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.concatenate((*low, (scales[:, 4:] & 15) | minima[:, 4:] << 4), axis=1)


def _split_q4_k(b: np.ndarray) -> Parts:
    scales, minima = _split_six_bit_scales(b[:, 4:16])
    return Parts(_spread(b[:, 16:], 32, 4), _halves(b, 0) * scales, -(_halves(b, 2) * minima))


def _split_q5_k(b: np.ndarray) -> Parts:
    scales, minima = _split_six_bit_scales(b[:, 4:16])
    codes = _spread(b[:, 48:], 32, 4) | _spread(b[:, 16:48], 32, 1) << 4
    return Parts(codes, _halves(b, 0) * scales, -(_halves(b, 2) * minima))


def _split_q6_k(b: np.ndarray) -> Parts:
    codes = _spread(b[:, :128], 64, 4) | _spread(b[:, 128:192], 32, 2) << 4
    return Parts(codes, _halves(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8))


def _split_iq4_nl(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 2:], 16, 4), _halves(b, 0))


def _split_iq4_xs(b: np.ndarray) -> Parts:
    scales = _spread(b[:, 4:8], 1, 4) | _spread(b[:, 2:4], 1, 2) << 4
    return Parts(_spread(b[:, 8:], 16, 4), _halves(b, 0) * (scales.astype(np.float32) - 32))


def _split_mxfp4(b: np.ndarray) -> Parts:
    return Parts(_spread(b[:, 1:], 16, 4), half_powers(b[:, :1]))


def half_powers(exponents: np.ndarray) -> np.ndarray:
    """Return half of the power of two that an E8M0 byte stands for, as float32: 2^(exponent - 128)."""
    wide = exponents.astype(np.uint32)
    return np.where(exponents < 2, np.uint32(1 << 21) << wide, (wide - 1) << 23).astype(np.uint32).view(np.float32)


_SPLITTERS: dict[str, Callable[[np.ndarray], Parts]] = {
    "Q4_0": _split_q4_0,
    "Q4_1": _split_q4_1,
    "Q5_0": _split_q5_0,
    "Q5_1": _split_q5_1,
    "Q8_0": _split_q8_0,
    "Q2_K": _split_q2_k,
    "Q3_K": _split_q3_k,
    "Q4_K": _split_q4_k,
    "Q5_K": _split_q5_k,
    "Q6_K": _split_q6_k,
    "IQ4_NL": _split_iq4_nl,
    "IQ4_XS": _split_iq4_xs,
    "MXFP4": _split_mxfp4,
}


# Encoding -------------------------------------------------------------------------------------------------------------


def encode(name: str, weights: np.ndarray | Tensor, importance: Tensor | None = None) -> np.ndarray:
    """Store numbers in whole blocks of a type: (..., K) of any float type -> (bytes,) uint8.

    importance: of each column, (K,) or for a stack of matrices (E, K): what its squared errors are multiplied by, such
    as the mean squared inputs of the layer. None: all columns count alike.
    Raises CheckpointError for numbers beyond the type's range.
    """
    matrix = torch.as_tensor(weights).detach().float()
    if name == "F32":
        return matrix.contiguous().numpy().astype("<f4", copy=False).reshape(-1).view(np.uint8)
    if name == "F16":
        half = matrix.half()
        if not bool(half.isfinite().all()):
            raise CheckpointError("a weight is too large for F16 (above 65,504). Use --dtype f32.")
        return half.contiguous().numpy().astype("<f2", copy=False).reshape(-1).view(np.uint8)
    type, K = TYPES_BY_NAME[name], matrix.shape[-1]
    packed = np.empty((matrix.numel() // type.block_size, type.block_bytes), np.uint8)
    at = 0
    stack = matrix.reshape(-1, *matrix.shape[-2:]) if matrix.dim() > 2 else matrix.reshape(1, -1, K)
    for i, part in enumerate(stack):
        columns = _columns(importance if importance is None or importance.dim() == 1 else importance[i], K)
        for rows in torch.split(part, max(1, _CHUNK // K)):
            x = rows.reshape(-1, type.block_size)
            w = None if columns is None else columns.expand(len(rows), K).reshape(x.shape)
            with np.errstate(over="ignore"):
                blocks = _ENCODERS[name](x, w)
            packed[at : at + len(blocks)] = blocks
            at += len(blocks)
    if name != "MXFP4" and not all(np.isfinite(_halves(packed, place)).all() for place in _HALF_PLACES[name]):
        raise CheckpointError(f"a weight is too large for {name}. Use --dtype f32.")
    return packed.reshape(-1)


_HALF_PLACES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)} | {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def _columns(importance: Tensor | None, K: int) -> Tensor | None:
    """Return the importance of each column with mean 1, none quite 0. Raise CheckpointError unless it fits."""
    if importance is None:
        return None
    if importance.shape != (K,) or not bool((importance >= 0).all()) or not bool(importance.isfinite().all()):
        raise CheckpointError(
            f"the importance of {K:,} columns is not that many finite numbers of at least 0: "
            f"{list(importance.shape)} numbers from {float(importance.min()):g} to {float(importance.max()):g}."
        )
    mean = importance.double().mean()
    return (importance.double() / mean).float().clamp_min(1e-4) if mean > 0 else torch.ones(K)


def _error_weights(x: Tensor, importance: Tensor | None) -> Tensor:
    """Return what squared errors are multiplied by, like x (N, S); ggml's formulas.

    Large weights count more: their inputs are not known to be small. importance: like x.
    """
    if importance is None:
        groups = x.view(len(x), -1, 32)
        return (groups.square().mean(dim=-1, keepdim=True).sqrt() + groups.abs()).view_as(x)
    spread = 2 * x.square().mean(dim=-1, keepdim=True)
    return importance * (spread + x.square()).sqrt()


def _fit_range(x: Tensor, w: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets (..., G) for which scale · code - offset is closest to x (..., G, S), both >= 0.

    Codes are 0 to `highest`. For a few ranges, codes are rounded and scale and offset then fitted by least squares.
    """
    low = x.amin(dim=-1).clamp_max(0)
    width = x.amax(dim=-1) - low
    sum_w, wx = w.sum(dim=-1), w * x
    sum_x = wx.sum(dim=-1)
    best_scale, best_offset = width / highest, -low
    best_gain = torch.full_like(low, -torch.inf)  # how much less the squared error is than that of zeros
    for step in range(-6, 7):
        factor = torch.where(width > 0, (highest + 0.15 * step) / width, 0)
        codes = ((x - low[..., None]) * factor[..., None]).round_().clamp_(0, highest)
        wl = w * codes
        sum_l, sum_xl, sum_ll = wl.sum(dim=-1), (wx * codes).sum(dim=-1), (wl * codes).sum(dim=-1)
        determinant = sum_w * sum_ll - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        offset = (sum_l * sum_xl - sum_ll * sum_x) / determinant
        bounded = (offset >= 0) & (determinant > 0)  # else without offset
        scale = torch.where(bounded, scale, sum_xl / sum_ll)
        offset = torch.where(bounded, offset, 0)
        gain = scale * sum_xl - offset * sum_x
        better = (gain > best_gain) & (scale > 0) & scale.isfinite()
        best_gain = torch.where(better, gain, best_gain)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _fit_symmetric(x: Tensor, w: Tensor, half: int) -> Tensor:
    """Return the scales (..., G) for which scale · code is closest to x (..., G, S).

    Codes are -half to half - 1. The largest number gets about the lowest code, so the scale has the opposite sign.
    """
    extreme = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))[..., 0]
    wx = w * x
    best_scale, best_gain = torch.zeros_like(extreme), torch.full_like(extreme, -torch.inf)
    for step in range(-8, 7):
        factor = torch.where(extreme != 0, -(half + 0.125 * step) / extreme, 0)
        codes = (x * factor[..., None]).round_().clamp_(-half, half - 1)
        sum_xl, sum_ll = (wx * codes).sum(dim=-1), (w * codes * codes).sum(dim=-1)
        scale = sum_xl / sum_ll
        gain = scale * sum_xl
        better = (gain > best_gain) & scale.isfinite()
        best_gain, best_scale = torch.where(better, gain, best_gain), torch.where(better, scale, best_scale)
    return best_scale


def _round_codes(x: Tensor, scale: Tensor, offset: Tensor | None, lowest: int, highest: int) -> Tensor:
    """Return the codes for x (..., G, S): the nearest to (x + offset) / scale."""
    shifted = x if offset is None else x + offset[..., None]
    return (shifted * torch.where(scale != 0, 1 / scale, 0)[..., None]).round_().clamp_(lowest, highest)


class _Closest:
    """Keeps, for each group, the candidate whose weighted squared error is smallest."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w = x, w
        self.error = torch.full(x.shape[:-1], torch.inf)
        self.values: list[Tensor] = []

    def offer(self, rebuilt: Tensor, values: Iterable[Tensor]) -> None:
        """rebuilt: the numbers (..., G, S) that a candidate stands for; values: what it consists of."""
        error = (rebuilt.sub_(self.x).square_().mul_(self.w)).sum(dim=-1)
        values = list(values)
        if not self.values:
            self.error, self.values = error, values
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.values = [
            torch.where(better if new.dim() == better.dim() else better[..., None], new, old)
            for new, old in zip(values, self.values, strict=True)
        ]


def _half(x: Tensor) -> Tensor:
    """Return x as it is stored in float16."""
    return x.half().float()


def _bytes_of_halves(*columns: Tensor) -> list[np.ndarray]:
    """Return numbers (N, 1) as the bytes of float16: each (N, 2)."""
    return [np.ascontiguousarray(column.half().numpy().astype("<f2")).view(np.uint8) for column in columns]


def _integers(x: Tensor) -> np.ndarray:
    return x.to(torch.int16).numpy().astype(np.uint8)


def _neighbors(center: Tensor, lowest: int, highest: int) -> Iterator[Tensor]:
    for step in (0, -1, 1):
        yield (center + step).clamp_(lowest, highest)


def _encode_k(x: Tensor, importance: Tensor | None, highest: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the first 16 bytes of Q4_K or Q5_K blocks, and their codes (N, 256). x, importance: (N, 256)."""
    w = _error_weights(x, importance).view(-1, 8, 32)
    x = x.view(-1, 8, 32)
    scale, offset = _fit_range(x, w, highest)
    d, dmin = (_half(part.amax(dim=-1, keepdim=True) / 63) for part in (scale, offset))
    scales, offsets = (
        torch.where(unit > 0, part / unit, 0).round_().clamp_(0, 63) for part, unit in ((scale, d), (offset, dmin))
    )
    closest = _Closest(x, w)
    for s in _neighbors(scales, 0, 63):
        for m in _neighbors(offsets, 0, 63):
            codes = _round_codes(x, d * s, dmin * m, 0, highest)
            closest.offer(codes * (d * s)[..., None] - (dmin * m)[..., None], (codes, s, m))
    codes, s, m = closest.values
    head = [*_bytes_of_halves(d, dmin), _join_six_bit_scales(_integers(s), _integers(m))]
    return head, _integers(codes.flatten(1))


def _encode_q4_k(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_k(x, importance, 15)
    return np.concatenate((*head, _gather(codes, 32, 4)), axis=1)


def _encode_q5_k(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_k(x, importance, 31)
    return np.concatenate((*head, _gather(codes >> 4, 32, 1), _gather(codes & 15, 32, 4)), axis=1)


def _encode_q6_k(x: Tensor, importance: Tensor | None) -> np.ndarray:
    w = _error_weights(x, importance).view(-1, 16, 16)
    x = x.view(-1, 16, 16)
    scale = _fit_symmetric(x, w, 32)
    d = _half(scale.gather(-1, scale.abs().argmax(dim=-1, keepdim=True)) / -128)
    closest = _Closest(x, w)
    for s in _neighbors(torch.where(d != 0, scale / d, 0).round_(), -128, 127):
        codes = _round_codes(x, d * s, None, -32, 31)
        closest.offer(codes * (d * s)[..., None], (codes, s))
    codes, s = closest.values
    stored = _integers(codes.flatten(1) + 32)
    parts = _gather(stored & 15, 64, 4), _gather(stored >> 4, 32, 2), _integers(s), *_bytes_of_halves(d)
    return np.concatenate(parts, axis=1)


def _encode_symmetric(x: Tensor, importance: Tensor | None, half: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the scale's bytes of Q4_0 or Q5_0 blocks, and their codes (N, 32)."""
    scale = _half(_fit_symmetric(x[:, None], _error_weights(x, importance)[:, None], half))
    codes = _round_codes(x[:, None], scale, None, -half, half - 1)
    return _bytes_of_halves(scale), _integers(codes[:, 0] + half)


def _encode_q4_0(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_symmetric(x, importance, 8)
    return np.concatenate((*head, _gather(codes, 16, 4)), axis=1)


def _encode_q5_0(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_symmetric(x, importance, 16)
    return np.concatenate((*head, _gather(codes >> 4, 1, 1), _gather(codes & 15, 16, 4)), axis=1)


def _encode_range(x: Tensor, importance: Tensor | None, highest: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the bytes of scale and minimum of Q4_1 or Q5_1 blocks, and their codes (N, 32)."""
    x, w = x[:, None], _error_weights(x, importance)[:, None]
    low = x.amin(dim=-1)
    above = x - low[..., None]  # the minimum is stored with its sign, so it may be any
    scale, offset = _fit_range(above, w, highest)
    scale, minimum = _half(scale), _half(low - offset)
    codes = _round_codes(x, scale, -minimum, 0, highest)
    return _bytes_of_halves(scale, minimum), _integers(codes[:, 0])


def _encode_q4_1(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_range(x, importance, 15)
    return np.concatenate((*head, _gather(codes, 16, 4)), axis=1)


def _encode_q5_1(x: Tensor, importance: Tensor | None) -> np.ndarray:
    head, codes = _encode_range(x, importance, 31)
    return np.concatenate((*head, _gather(codes >> 4, 1, 1), _gather(codes & 15, 16, 4)), axis=1)


def _encode_q8_0(x: Tensor, importance: Tensor | None) -> np.ndarray:
    """As ggml: symmetric, halves rounded away from 0. Nothing is gained from a search."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    scaled = x * torch.where(scale != 0, 1 / scale, 0)
    codes = scaled.abs()
    codes = codes.floor() + (2 * (codes - codes.floor())).floor()
    return np.concatenate((*_bytes_of_halves(scale), _integers(codes * scaled.sign())), axis=1)


def _encode_mxfp4(x: Tensor, importance: Tensor | None) -> np.ndarray:
    """The power of two of ggml, by which the largest number becomes 4 to 8 (6 is stored), or the next."""
    _, exponent = torch.frexp(x.abs().amax(dim=-1))  # the largest number is below 2^exponent
    exponent = (exponent - 3 + 127).float()
    limits = torch.tensor([0.5, 1.5, 2.5, 3.5, 5, 7, 10])  # between the values
    values = torch.from_numpy(_MXFP4_VALUES).float()
    closest = _Closest(x, torch.ones_like(x) if importance is None else importance)
    for step in (0, 1):
        e = (exponent + step).clamp_(0, 254)
        scale = torch.from_numpy(half_powers(_integers(e)))[:, None]
        codes = torch.bucketize((x / scale).abs(), limits)
        codes = codes + 8 * ((x < 0) & (codes > 0))
        closest.offer(values[codes] * scale, (codes, e))
    codes, e = closest.values
    e = torch.where((x == 0).all(dim=-1), 0, e)
    return np.concatenate((_integers(e)[:, None], _gather(_integers(codes), 16, 4)), axis=1)


_ENCODERS: dict[str, Callable[[Tensor, Tensor | None], np.ndarray]] = {
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q8_0": _encode_q8_0,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
    "Q6_K": _encode_q6_k,
    "MXFP4": _encode_mxfp4,
}
