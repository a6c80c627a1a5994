"""The forward pass of a model on a CPU, for decoding. Compiled by numba when first used (numba includes LLVM, so
no compiler has to be installed).

Decoding reads every weight once per token, so weights are stored in the order in which they are read: quantized
matrices (`model.quantized`) interleave sixteen rows, four columns of each at a time, in 4, 5, 6 or 8 bits, with a scale
(and, below 8 bits, a zero point) for each row and group of 32 columns. Inputs are also rounded to 8 bits, in groups of
32, and multiplied by `vpdpbusd`, which computes 64 products per instruction. It is written in LLVM IR, since LLVM does
not choose it for any loop in Python. For matrices of 8 bits, what this rounding leaves is rounded to 8 bits, too, and
multiplied: otherwise the rounding of inputs would cost more than that of the weights.

All threads run the same program, each for its share of the rows, and meet at about six barriers per layer (a counter on
which they spin): a parallel loop for each step would cost as much as the work itself.

Addresses are passed as integers; the caller keeps the arrays alive.

Axis letters: N tokens · C, K columns (inputs) · R rows (outputs) · H heads · J key/value heads · D head_dim · G groups.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP = 32  # columns that share a scale
ROWS = 16  # rows per block
REST = 254  # what the first 8 bits of an input leave is rounded to so many parts of their unit: from -127 to 127

_i8, _i32, _i64, _f32, _f16 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType()
_BYTES, _INTS = ir.VectorType(_i8, 64), ir.VectorType(_i32, 16)
_FLOATS, _HALVES = ir.VectorType(_f32, 16), ir.VectorType(_f16, 16)
_MASK = ir.VectorType(ir.IntType(1), 64)


def available() -> bool:
    """Return whether this processor has the instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni")) and bool(features.get("avx512bw"))


# LLVM IR
# ----------------------------------------------------------------------------------------------------------------


def _load(b: Any, address: Any, type_: Any) -> Any:
    value = b.load(b.inttoptr(address, type_.as_pointer()))
    value.align = 1
    return value


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


def _broadcast(b: Any, value: Any, type_: Any) -> Any:
    """Return a vector of sixteen times the value."""
    undefined = ir.Constant(type_, ir.Undefined)
    one = b.insert_element(undefined, value, ir.Constant(_i32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_i32, 16), [0] * 16))


def _at(b: Any, base: Any, *terms: Any) -> Any:
    """Return base + terms. A term is a number, an IR value, or a pair of these that is multiplied."""
    for term in terms:
        if isinstance(term, tuple):
            term = b.mul(*(ir.Constant(_i64, t) if isinstance(t, int) else t for t in term))
        base = b.add(base, ir.Constant(_i64, term) if isinstance(term, int) else term)
    return base


def _prefetch(b: Any, address: Any) -> None:
    """Prefetch the 64 bytes at an address."""
    pointer = b.inttoptr(address, _i8.as_pointer())
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32]), "llvm.prefetch.p0"
    )
    b.call(function, [pointer, *(ir.Constant(_i32, value) for value in (0, 3, 1))])


def _horizontal_sums(b: Any, vectors: list[Any]) -> Any:
    """Return a vector of the sums over each of up to sixteen vectors of sixteen floats."""
    vectors = vectors + [ir.Constant(_FLOATS, [0.0] * 16)] * (16 - len(vectors))
    halves = [ir.Constant(_INTS, list(range(first, 32, 2))) for first in (0, 1)]
    while len(vectors) > 1:  # two vectors become one: the sums of neighboring elements
        vectors = [
            b.fadd(*(b.shuffle_vector(vectors[i], vectors[i + 1], half) for half in halves))
            for i in range(0, len(vectors), 2)
        ]
    return vectors[0]


def _packed_product(T: int, bits: int) -> Any:
    """Return a function that multiplies T tokens with one block of sixteen rows. Its arguments are addresses.

    w, s, m: codes, scales and zero points of the block. x, xs, xsum: inputs in 8 bits, (G, T, 32), for a matrix of 8
    bits (G, T, 64); their scales, and the sums of the rounded inputs, (G, T) float32: see `_round`. out: (T, 16)
    float32, rows ldo apart.
    """
    width = 2 * GROUP if bits == 8 else GROUP

    @intrinsic
    def product(ctx, w, s, m, x, xs, xsum, G, out, ldo):
        def codegen(context, b, signature, args):
            w, s, m, x, xs, xsum, G, out, ldo = args
            dot = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(_INTS, [_INTS] * 3), "llvm.x86.avx512.vpdpbusd.512"
            )
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
            sums = [cgutils.alloca_once(b, _FLOATS) for _ in range(T)]
            for total in sums:
                b.store(ir.Constant(_FLOATS, [0.0] * 16), total)
            with cgutils.for_range(b, G) as loop:
                g = loop.index
                ints = [ir.Constant(_INTS, [0] * 16)] * T
                rest = [ir.Constant(_INTS, [0] * 16)] * T  # of inputs: what the first 8 bits leave
                for j in range(bits if T == 8 else 0):  # prefetch the next block
                    _prefetch(b, _at(b, w, (b.add(G, g), 64 * bits), 64 * j))
                for j in range(8 if bits == 8 else 4):  # 64 bytes: four columns of sixteen rows, below 8 bits eight
                    loaded = _load(b, _at(b, w, (g, 64 * bits), 64 * j), _BYTES)
                    if bits == 8:
                        parts = [(4 * j, loaded)]
                    else:
                        low = b.and_(loaded, ir.Constant(_BYTES, [15] * 64))
                        parts = [(8 * j, low), (8 * j + 4, b.lshr(loaded, ir.Constant(_BYTES, [4] * 64)))]
                    for column, weights in parts:
                        for plane in range(bits - 4 if bits < 8 else 0):  # a mask of the codes that have this bit
                            place = _at(b, w, (g, 64 * bits), 256 + 64 * plane + 2 * column)
                            mask = b.bitcast(_load(b, place, _i64), _MASK)
                            bit = ir.Constant(_BYTES, [16 << plane] * 64)
                            weights = b.or_(weights, b.select(mask, bit, ir.Constant(_BYTES, [0] * 64)))
                        weights = b.bitcast(weights, _INTS)
                        for t in range(T):
                            place = _at(b, x, (g, width * T), width * t + column)
                            ints[t] = b.call(dot, [ints[t], weights, _broadcast(b, _load(b, place, _i32), _INTS)])
                            if bits == 8:
                                inputs = _load(b, _at(b, place, GROUP), _i32)
                                rest[t] = b.call(dot, [rest[t], weights, _broadcast(b, inputs, _INTS)])
                scale = b.fpext(_load(b, _at(b, s, (g, 32)), _HALVES), _FLOATS)
                zero_point = b.fpext(_load(b, _at(b, m, (g, 32)), _HALVES), _FLOATS) if bits < 8 else None
                for t in range(T):
                    input_scale = _broadcast(b, _load(b, _at(b, xs, (g, 4 * T), 4 * t), _f32), _FLOATS)
                    inputs = _broadcast(b, _load(b, _at(b, xsum, (g, 4 * T), 4 * t), _f32), _FLOATS)
                    product_ = b.sitofp(ints[t], _FLOATS)
                    if bits == 8:
                        unit = ir.Constant(_FLOATS, [1 / REST] * 16)
                        product_ = b.call(fma, [b.sitofp(rest[t], _FLOATS), unit, product_])
                    product_ = b.fmul(product_, input_scale)
                    total = b.load(sums[t])
                    if bits < 8:
                        total = b.call(fma, [inputs, zero_point, b.call(fma, [product_, scale, total])])
                    else:  # codes are stored with an offset of 128
                        product_ = b.call(fma, [inputs, ir.Constant(_FLOATS, [-128.0] * 16), product_])
                        total = b.call(fma, [product_, scale, total])
                    b.store(total, sums[t])
            for t in range(T):
                _store(b, b.load(sums[t]), _at(b, out, (b.mul(ldo, ir.Constant(_i64, 4)), t)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return product


def _plain_product(T: int, rows: int) -> Any:
    """Return a function that multiplies T vectors with `rows` rows of a float32 matrix. Its arguments are addresses.

    w: the first row; rows are ldw apart. x: (T, K), ldx apart. out: (T, rows), ldo apart; added to unless `more` is 0.
    K: a multiple of 16. next: a row to prefetch, together with the second row after it; `w` if there is none.
    """

    @intrinsic
    def product(ctx, w, ldw, x, ldx, K, out, ldo, more, next):
        def codegen(context, b, signature, args):
            w, ldw, x, ldx, K, out, ldo, more, next = args
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
            sums = [[cgutils.alloca_once(b, _FLOATS) for _ in range(rows)] for _ in range(T)]
            for total in (each for row in sums for each in row):
                b.store(ir.Constant(_FLOATS, [0.0] * 16), total)
            with cgutils.for_range(b, b.udiv(K, ir.Constant(_i64, 16))) as loop:
                if T == 4:
                    _prefetch(b, _at(b, next, (loop.index, 64)))
                    _prefetch(b, _at(b, next, (loop.index, 64), (8, ldw)))
                row = b.mul(ldw, ir.Constant(_i64, 4))
                weights = [_load(b, _at(b, w, (row, r), (loop.index, 64)), _FLOATS) for r in range(rows)]
                for t in range(T):
                    inputs = _load(b, _at(b, x, (b.mul(ldx, ir.Constant(_i64, 4)), t), (loop.index, 64)), _FLOATS)
                    for r in range(rows):
                        b.store(b.call(fma, [weights[r], inputs, b.load(sums[t][r])]), sums[t][r])
            totals = _horizontal_sums(b, [b.load(total) for row in sums for total in row])
            for t in range(T):
                part = b.shuffle_vector(
                    totals, totals, ir.Constant(ir.VectorType(_i32, rows), list(range(t * rows, (t + 1) * rows)))
                )
                place = _at(b, out, (b.mul(ldo, ir.Constant(_i64, 4)), t))
                zeros = ir.Constant(part.type, [0.0] * rows)
                before = b.select(b.icmp_signed("!=", more, ir.Constant(_i64, 0)), _load(b, place, part.type), zeros)
                _store(b, b.fadd(part, before), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return product


def _weighted_sum(T: int, width: int) -> Any:
    """Return a function that adds T weighted sums of n rows of 16 · width floats. Its arguments are addresses.

    w: weights (T, n), ldw apart. x: the first row; rows are ldx apart. out: (T, 16 · width), ldo apart; added to.
    """

    @intrinsic
    def product(ctx, w, ldw, x, ldx, n, out, ldo):
        def codegen(context, b, signature, args):
            w, ldw, x, ldx, n, out, ldo = args
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
            places = [
                [_at(b, out, (b.mul(ldo, ir.Constant(_i64, 4)), t), 64 * c) for c in range(width)] for t in range(T)
            ]
            sums = [[cgutils.alloca_once(b, _FLOATS) for _ in range(width)] for _ in range(T)]
            for t in range(T):
                for c in range(width):
                    b.store(_load(b, places[t][c], _FLOATS), sums[t][c])
            with cgutils.for_range(b, n) as loop:
                row = _at(b, x, (b.mul(ldx, ir.Constant(_i64, 4)), loop.index))
                parts = [_load(b, _at(b, row, 64 * c), _FLOATS) for c in range(width)]
                for t in range(T):
                    place = _at(b, w, (b.mul(ldw, ir.Constant(_i64, 4)), t), (loop.index, 4))
                    weight = _broadcast(b, _load(b, place, _f32), _FLOATS)
                    for c in range(width):
                        b.store(b.call(fma, [weight, parts[c], b.load(sums[t][c])]), sums[t][c])
            for t in range(T):
                for c in range(width):
                    _store(b, b.load(sums[t][c]), places[t][c])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return product


_f_1_4, _f_2_4, _f_3_4, _f_4_4 = (_plain_product(T, 4) for T in (1, 2, 3, 4))
_f_1_1 = _plain_product(1, 1)
_s_1_4, _s_2_4, _s_3_4, _s_4_4 = (_weighted_sum(T, 4) for T in (1, 2, 3, 4))
_s_1_1, _s_2_1, _s_3_1, _s_4_1 = (_weighted_sum(T, 1) for T in (1, 2, 3, 4))


@intrinsic
def _longs(ctx, address):
    """Return the address as a pointer to int64."""

    def codegen(context, b, signature, args):
        return b.inttoptr(args[0], _i64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def _floats(ctx, address):
    """Return the address as a pointer to float32."""

    def codegen(context, b, signature, args):
        return b.inttoptr(args[0], _f32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


def _function(b: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _exp_of(b: Any, x: Any) -> Any:
    """Return exp(x) of a vector x ≤ 0, computed as in `_exp`."""

    def constant(value: float) -> Any:
        return ir.Constant(_FLOATS, [value] * 16)

    fma = _function(b, "llvm.fma.v16f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
    x = b.call(_function(b, "llvm.maxnum.v16f32", _FLOATS, _FLOATS, _FLOATS), [x, constant(-87.0)])
    x = b.fmul(x, constant(1.4426950408889634))
    whole = b.call(_function(b, "llvm.floor.v16f32", _FLOATS, _FLOATS), [x])
    r = b.fmul(b.fsub(x, whole), constant(0.6931471805599453))
    p = constant(1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        p = b.call(fma, [p, r, constant(1 / factorial)])
    power = b.add(b.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * 16))
    return b.fmul(p, b.bitcast(b.shl(power, ir.Constant(_INTS, [23] * 16)), _FLOATS))


def _gate(kind: int) -> Any:
    """Return a function that applies an activation to n floats, a multiple of 16. Its arguments are addresses.

    kind: one of those of `forward`, but for 2 and 4. alpha, limit: of the clamped SwiGLU.
    """

    @intrinsic
    def activate(ctx, x, up, n, out, alpha, limit):
        def codegen(context, b, signature, args):
            x, up, n, out, alpha, limit = args
            one, zero = (ir.Constant(_FLOATS, [value] * 16) for value in (1.0, 0.0))
            smaller = _function(b, "llvm.minnum.v16f32", _FLOATS, _FLOATS, _FLOATS)
            larger = _function(b, "llvm.maxnum.v16f32", _FLOATS, _FLOATS, _FLOATS)
            most, gain = _broadcast(b, limit, _FLOATS), _broadcast(b, alpha, _FLOATS)
            with cgutils.for_range(b, b.lshr(n, ir.Constant(_i64, 4))) as loop:
                value = _load(b, _at(b, x, (loop.index, 64)), _FLOATS)
                if kind == 5:
                    over = b.fcmp_ordered(">", value, most)  # NaN stays NaN
                    value = b.select(over, most, value)
                slope = b.fmul(value, gain) if kind == 5 else value
                if kind in (1, 3):  # gelu(x) = x · sigmoid(1.6 (x + 0.045 x³))
                    inner = b.fmul(b.fmul(value, value), ir.Constant(_FLOATS, [2 * 0.7978845608028654 * 0.044715] * 16))
                    slope = b.fmul(value, b.fadd(inner, ir.Constant(_FLOATS, [2 * 0.7978845608028654] * 16)))
                e = b.call(_function(b, "llvm.fabs.v16f32", _FLOATS, _FLOATS), [slope])
                e = _exp_of(b, b.fsub(zero, e))
                above = b.select(b.fcmp_ordered(">=", slope, zero), one, e)
                result = b.fmul(value, b.fdiv(above, b.fadd(one, e)))
                if kind != 1:
                    factor = _load(b, _at(b, up, (loop.index, 64)), _FLOATS)
                    if kind == 5:
                        clamped = b.call(larger, [b.call(smaller, [factor, most]), b.fsub(zero, most)])
                        clamped = b.select(b.fcmp_unordered("uno", factor, factor), factor, clamped)
                        factor = b.fadd(clamped, one)
                    result = b.fmul(result, factor)
                _store(b, result, _at(b, out, (loop.index, 64)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, types.float32), codegen

    return activate


_swiglu, _gelu, _geglu, _clamped_swiglu = _gate(0), _gate(1), _gate(3), _gate(5)


@intrinsic
def _largest(ctx, x, n):
    """Return the largest of n ≥ 0 floats at an address; -3e38 if n is 0."""

    def codegen(context, b, signature, args):
        x, n = args
        larger = _function(b, "llvm.maxnum.v16f32", _FLOATS, _FLOATS, _FLOATS)
        largest = _function(b, "llvm.vector.reduce.fmax.v16f32", _f32, _FLOATS)
        one = _function(b, "llvm.maxnum.f32", _f32, _f32, _f32)
        most, rest = cgutils.alloca_once(b, _FLOATS), cgutils.alloca_once(b, _f32)
        b.store(ir.Constant(_FLOATS, [-3e38] * 16), most)
        whole = b.lshr(n, ir.Constant(_i64, 4))
        with cgutils.for_range(b, whole) as loop:
            b.store(b.call(larger, [b.load(most), _load(b, _at(b, x, (loop.index, 64)), _FLOATS)]), most)
        b.store(b.call(largest, [b.load(most)]), rest)
        done = b.shl(whole, ir.Constant(_i64, 4))
        with cgutils.for_range(b, b.sub(n, done)) as loop:
            value = _load(b, _at(b, x, (b.add(done, loop.index), 4)), _f32)
            b.store(b.call(one, [b.load(rest), value]), rest)
        return b.load(rest)

    return types.float32(types.int64, types.int64), codegen


def _rounded_group(wide: bool) -> Any:
    """Return a function that rounds 32 floats to 8 bits: it stores codes, their scale, and the sum of the rounded
    values. Arguments are addresses.

    wide: also store, after the codes, those of what they leave, in units of 1/254. NaN or infinity makes the scale NaN,
    so that it is not lost.
    """

    @intrinsic
    def round_group(ctx, x, xq, xs, xsum):
        def codegen(context, b, signature, args):
            x, xq, xs, xsum = args
            absolute = _function(b, "llvm.fabs.v16f32", _FLOATS, _FLOATS)
            larger = _function(b, "llvm.maxnum.v16f32", _FLOATS, _FLOATS, _FLOATS)
            largest = _function(b, "llvm.vector.reduce.fmax.v16f32", _f32, _FLOATS)
            nearest = _function(b, "llvm.rint.v16f32", _FLOATS, _FLOATS)
            add = _function(b, "llvm.vector.reduce.add.v16i32", _i32, _INTS)
            low, high = _load(b, x, _FLOATS), _load(b, b.add(x, ir.Constant(_i64, 64)), _FLOATS)
            most = b.call(largest, [b.call(larger, [b.call(absolute, [low]), b.call(absolute, [high])])])
            scale = b.fmul(most, ir.Constant(_f32, 1 / 127))
            is_nan = b.or_(*(b.fcmp_unordered("uno", part, part) for part in (low, high)))  # the maximum ignores NaN
            is_nan = b.icmp_signed("!=", b.bitcast(is_nan, ir.IntType(16)), ir.Constant(ir.IntType(16), 0))
            scale = b.select(is_nan, ir.Constant(_f32, math.nan), scale)
            none = b.fcmp_ordered("==", most, ir.Constant(_f32, 0.0))
            inverse = b.select(none, ir.Constant(_f32, 0.0), b.fdiv(ir.Constant(_f32, 127.0), most))
            totals = [ir.Constant(_i32, 0)] * 2
            for i, part in enumerate((low, high)):
                exact = b.fmul(part, _broadcast(b, inverse, _FLOATS))
                rounded = b.call(nearest, [exact])
                parts = [rounded]
                if wide:
                    left = b.fmul(b.fsub(exact, rounded), ir.Constant(_FLOATS, [float(REST)] * 16))
                    parts.append(b.call(nearest, [left]))
                for j, each in enumerate(parts):
                    q = b.fptosi(each, _INTS)
                    _store(b, b.trunc(q, ir.VectorType(_i8, 16)), b.add(xq, ir.Constant(_i64, GROUP * j + 16 * i)))
                    totals[j] = b.add(totals[j], b.call(add, [q]))
            total = b.sitofp(totals[0], _f32)
            if wide:
                total = b.fadd(total, b.fmul(b.sitofp(totals[1], _f32), ir.Constant(_f32, 1 / REST)))
            _store(b, scale, xs)
            _store(b, b.fmul(scale, total), xsum)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return round_group


_round_group, _round_group_wide = _rounded_group(False), _rounded_group(True)


@intrinsic
def _two_to(ctx, power):
    """Return 2 to the power of an int32, as float32, built from its bits."""

    def codegen(context, b, signature, args):
        return b.bitcast(b.shl(b.add(args[0], ir.Constant(_i32, 127)), ir.Constant(_i32, 23)), _f32)

    return types.float32(types.int32), codegen


@intrinsic
def _arrive(ctx, counter):
    """Atomically increment the counter at the address."""

    def codegen(context, b, signature, args):
        b.atomic_rmw("add", b.inttoptr(args[0], _i64.as_pointer()), ir.Constant(_i64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _reached(ctx, counter, target):
    """Return whether the counter at the address has reached `target`, after a short pause (for spin loops)."""

    def codegen(context, b, signature, args):
        pause = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
        b.call(pause, [])
        count = b.load_atomic(b.inttoptr(args[0], _i64.as_pointer()), "seq_cst", 8)
        return b.zext(b.icmp_signed(">=", count, args[1]), _i64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _yield(ctx):
    """Let another thread run on this core."""

    def codegen(context, b, signature, args):
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(_i32, []), "sched_yield")
        return b.sext(b.call(function, []), _i64)

    return types.int64(), codegen


_inline: Any = njit(nogil=True, inline="never", fastmath={"contract", "reassoc", "nsz"})


@_inline
def _meet(counter: int, target: int) -> None:
    """Wait at a barrier until `target` arrivals have been counted."""
    _arrive(counter)
    tries = 0
    while _reached(counter, target) == 0:
        tries += 1
        if tries > 3000:  # a thread has been descheduled: do not keep it from running
            _yield()


# parts of a layer -----------------------------------------------------------------------------------------------------


@_inline
def _tile(n: int, N: int) -> Any:
    """Return first token and size of the tile of token n of N. Tiles have 8 tokens, the last ones 4, 2 and 1."""
    first = N // 8 * 8
    if n < first:
        return n // 8 * 8, 8
    for width in (4, 2, 1):
        if N - first >= width:
            if n < first + width:
                return first, width
            first += width
    return n, 1


@_inline
def _round(x: Any, n: int, kind: int, xq: Any, xs: Any, xsum: Any) -> None:
    """Round token n of x (N, K) to 8 bits: codes xq (N · K,) int8; scales and sums of the rounded values, (N · G,).

    kind: bits of the matrix that x is multiplied by; for 8 there are twice as many codes. A tile of W tokens is stored
    as (G, W, 32) or (G, W, 64), and (G, W), in the order in which it is read.
    """
    N, K = x.shape
    _round_row(x.ctypes.data + 4 * n * K, n, N, K, kind, xq.ctypes.data, xs.ctypes.data, xsum.ctypes.data)


@_inline
def _round_row(row: int, n: int, N: int, K: int, kind: int, xq: int, xs: int, xsum: int) -> None:
    """Round token n of N, at the address `row`, as `_round` does. Arguments are addresses."""
    G = K // GROUP
    begin, W = _tile(n, N)
    place = begin * G + n - begin
    for g in range(G):
        source, scale, total = row + 4 * g * GROUP, xs + 4 * place, xsum + 4 * place
        if kind == 8:
            _round_group_wide(source, xq + 2 * place * GROUP, scale, total)
        else:
            _round_group(source, xq + place * GROUP, scale, total)
        place += W


@_inline
def _multiply_plain(
    w: int, ldw: int, K: int, first: int, last: int, x: int, N: int, out: int, ldo: int, more: int
) -> None:
    """Multiply rows first ... last of a float32 matrix with N tokens: K columns of both. See `_plain_product`."""
    r = first
    while r < last:
        row, target, n = w + 4 * r * ldw, out + 4 * r, 0
        if r + 4 <= last:
            soon = row if r + 8 > last else row + 16 * ldw  # each tile prefetches two of the next four rows
            while n + 4 <= N:
                _f_4_4(row, ldw, x + 4 * n * ldw, ldw, K, target + 4 * n * ldo, ldo, more, soon + n % 8 * ldw)
                n += 4
            if n + 2 <= N:
                _f_2_4(row, ldw, x + 4 * n * ldw, ldw, K, target + 4 * n * ldo, ldo, more, row)
                n += 2
            if n < N:
                _f_1_4(row, ldw, x + 4 * n * ldw, ldw, K, target + 4 * n * ldo, ldo, more, row)
            r += 4
        else:
            while n < N:
                _f_1_1(row, ldw, x + 4 * n * ldw, ldw, K, target + 4 * n * ldo, ldo, more, row)
                n += 1
            r += 1


def _block_product(bits: int) -> Any:
    """Return a function that multiplies N tokens with one block of sixteen rows; see `_packed_product`."""
    product_1, product_2, product_4, product_8 = (_packed_product(T, bits) for T in (1, 2, 4, 8))
    width = 2 * GROUP if bits == 8 else GROUP

    @_inline
    def multiply(w: int, s: int, m: int, x: int, xs: int, xsum: int, N: int, G: int, out: int, ldo: int) -> None:
        n = 0
        while n + 8 <= N:
            product_8(w, s, m, x + n * G * width, xs + 4 * n * G, xsum + 4 * n * G, G, out + 4 * n * ldo, ldo)
            n += 8
        if n + 4 <= N:
            product_4(w, s, m, x + n * G * width, xs + 4 * n * G, xsum + 4 * n * G, G, out + 4 * n * ldo, ldo)
            n += 4
        if n + 2 <= N:
            product_2(w, s, m, x + n * G * width, xs + 4 * n * G, xsum + 4 * n * G, G, out + 4 * n * ldo, ldo)
            n += 2
        if n < N:
            product_1(w, s, m, x + n * G * width, xs + 4 * n * G, xsum + 4 * n * G, G, out + 4 * n * ldo, ldo)

    return multiply


_block_4, _block_5, _block_6, _block_8 = (_block_product(bits) for bits in (4, 5, 6, 8))


@_inline
def _multiply(
    kind: int, w: int, s: int, m: int, K: int, first: int, last: int, x: Any, xq: Any, xs: Any, xsum: Any, out: int,
    ldo: int,
) -> None:  # fmt: skip
    """Multiply rows first ... last (multiples of 16, or the end) of a matrix with N tokens: out (N, R), ldo apart.

    kind: 4, 5, 6 or 8 (bits, quantized), or 32 (float32).
    """
    N = x.shape[0]
    G = K // GROUP
    if kind == 32:
        # Cache blocking: 64 rows stay in the L2 cache, a piece of the tokens in the L1 cache.
        for begin in range(first, last, 64):
            for n in range(0, N, 16):
                tokens = min(16, N - n)
                pieces = -(-K * tokens // 8192)
                piece = -(-K // (16 * pieces)) * 16
                for k in range(0, K, piece):
                    _multiply_plain(
                        w + 4 * k, K, min(piece, K - k), begin, min(last, begin + 64), x.ctypes.data + 4 * (n * K + k),
                        tokens, out + 4 * n * ldo, ldo, k,
                    )  # fmt: skip
        return
    a, b, c = xq.ctypes.data, xs.ctypes.data, xsum.ctypes.data
    for block in range(first // ROWS, -(-last // ROWS)):
        wb, sb, mb = w + block * G * 64 * kind, s + block * G * 32, m + block * G * 32
        target = out + 4 * block * ROWS
        if kind == 4:
            _block_4(wb, sb, mb, a, b, c, N, G, target, ldo)
        elif kind == 5:
            _block_5(wb, sb, mb, a, b, c, N, G, target, ldo)
        elif kind == 6:
            _block_6(wb, sb, mb, a, b, c, N, G, target, ldo)
        else:
            _block_8(wb, sb, mb, a, b, c, N, G, target, ldo)


@njit(nogil=True, cache=True)
def linear(
    tid: int, threads: int, counter: int, kind: int, w: int, s: int, m: int, R: int, x: Any, xq: Any, xs: Any,
    xsum: Any, out: int, ldo: int,
) -> None:  # fmt: skip
    """Compute a thread's share of x (N, K) float32 times a quantized matrix of R rows: out (N, R), ldo apart.

    w, s, m: codes, scales and zero points. xq, xs, xsum: work space, see `_round`. ldo: at least R rounded up to 16.
    """
    N, K = x.shape
    for n in range(tid, N, threads):
        _round(x, n, kind, xq, xs, xsum)
    _meet(counter, threads)
    first, last = _share(tid, threads, R)
    _multiply(kind, w, s, m, K, first, last, x, xq, xs, xsum, out, ldo)


@_inline
def _share(tid: int, threads: int, R: int) -> Any:
    """Return the range of rows, out of R, that a thread computes: whole blocks."""
    blocks = -(-R // ROWS)
    return blocks * tid // threads * ROWS, min(blocks * (tid + 1) // threads * ROWS, R)


@_inline
def _exp(x: Any) -> Any:
    """Return exp(x) for x ≤ 0, to about 2 units in the last place, as 2^(integer part) · 2^(fractional part)."""
    x = (x if x > np.float32(-87.0) else np.float32(-87.0)) * np.float32(1.4426950408889634)
    whole = np.floor(x)
    r = (x - whole) * np.float32(0.6931471805599453)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _two_to(np.int32(whole))


@_inline
def _norm(x: Any, weight: int, bias: int, eps: Any, centered: bool, unit: Any, out: Any) -> None:
    """Normalize x (C,) into out: RMSNorm, or LayerNorm if centered. weight, bias: addresses; 0 for no bias.

    unit: added to the weights. Without a weight (0), copy x.
    """
    C = len(x)
    if weight == 0:
        for i in range(C):
            out[i] = x[i]
        return
    mean = np.float32(0.0)
    if centered:
        for i in range(C):
            mean += x[i]
        mean /= np.float32(C)
    square = np.float32(0.0)
    for i in range(C):
        square += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1.0) / np.sqrt(square / np.float32(C) + eps)
    w = numba.carray(_floats(weight), (C,))
    if bias:
        add = numba.carray(_floats(bias), (C,))
        for i in range(C):
            out[i] = (x[i] - mean) * scale * (w[i] + unit) + add[i]
    else:
        for i in range(C):
            out[i] = (x[i] - mean) * scale * (w[i] + unit)


@_inline
def _rotate(q: Any, R: int, cos: Any, sin: Any) -> None:
    """Rotate the first R numbers of a head's query or key (D,) in place."""
    half = R // 2
    for d in range(half):
        a, b = q[d], q[d + half]
        q[d] = a * cos[d] - b * sin[d]
        q[d + half] = b * cos[d] + a * sin[d]


@_inline
def _attend(
    q: int, ldq: int, T: int, step: int, p: int, window: int, D: int, scale: float, keys: int, values: int, row: int,
    table: Any, Z: int, scores: Any, out: int, ldo: int, sinks: int, next_sink: int,
) -> None:  # fmt: skip
    """Compute the attention of up to four queries with the same keys: q (T, D), ldq apart -> out (T, D), ldo apart.

    Query t is at position p + t · step and sees up to `window` tokens that end there (0: all). keys, values: the
    address of a head's first token in block 0; tokens are `row` floats apart, and blocks have Z. scores: (4, more than
    the tokens seen), work space. sinks: the address of the first query's sink, 0 without; those of the next queries are
    `next_sink` floats further each.
    """
    oldest = max(0, p + 1 - window) if window else 0
    newest = p + (T - 1) * step
    base = oldest // Z * Z
    width = scores.shape[1]
    place = scores.ctypes.data
    for block in range(oldest // Z, newest // Z + 1):
        k = keys + 4 * table[block] * Z * row
        target = place + 4 * (block * Z - base)
        z = 0
        while z + 4 <= Z:
            if T == 1:
                _f_1_4(k, row, q, ldq, D, target, width, 0, k)
            elif T == 2:
                _f_2_4(k, row, q, ldq, D, target, width, 0, k)
            elif T == 3:
                _f_3_4(k, row, q, ldq, D, target, width, 0, k)
            else:
                _f_4_4(k, row, q, ldq, D, target, width, 0, k)
            z += 4
            k += 16 * row
            target += 16
        while z < Z:
            for t in range(T):
                _f_1_1(k, row, q + 4 * t * ldq, ldq, D, target + 4 * t * width, width, 0, k)
            z += 1
            k += 4 * row
            target += 4
    for t in range(T):
        last = p + t * step + 1
        first = max(0, last - window) if window else 0
        part = scores[t, first - base : last - base]
        sink = np.float32(-3e38)
        if sinks:
            sink = numba.carray(_floats(sinks + 4 * t * next_sink), (1,))[0]
        _softmax(part, np.float32(scale), sink)
        scores[t, oldest - base : first - base] = np.float32(0.0)
        scores[t, last - base : newest + 1 - base] = np.float32(0.0)
        whole = numba.carray(_floats(out + 4 * t * ldo), (D,))
        for d in range(D):
            whole[d] = np.float32(0.0)
    for block in range(oldest // Z, newest // Z + 1):
        begin = max(oldest, block * Z)
        n = min(newest + 1, (block + 1) * Z) - begin
        v = values + 4 * (table[block] * Z + begin - block * Z) * row
        w = place + 4 * (begin - base)
        d = 0
        while d + 64 <= D:
            if T == 1:
                _s_1_4(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            elif T == 2:
                _s_2_4(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            elif T == 3:
                _s_3_4(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            else:
                _s_4_4(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            d += 64
        while d < D:
            if T == 1:
                _s_1_1(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            elif T == 2:
                _s_2_1(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            elif T == 3:
                _s_3_1(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            else:
                _s_4_1(w, width, v + 4 * d, row, n, out + 4 * d, ldo)
            d += 16


@_inline
def _softmax(x: Any, scale: Any, sink: Any) -> None:
    """Replace x by softmax(scale · x) with one more score, `sink`, that is left out; -3e38: without."""
    most = _largest(x.ctypes.data, len(x)) * scale
    weight = np.float32(0.0)
    if sink > np.float32(-3e38):
        most = most if most > sink else sink
        weight = _exp(sink - most)
    for i in range(len(x)):
        e = _exp(x[i] * scale - most)
        x[i] = e
        weight += e
    inverse = np.float32(1.0) / weight
    for i in range(len(x)):
        x[i] *= inverse


# Columns of the table of addresses that `forward` reads, which has a row per layer. A matrix has four: kind, weights,
# scales, zero points.
(
    A_NORM, A_NORM_BIAS, QKV, QKV_BIAS, Q_NORM, K_NORM, OUT, OUT_BIAS, M_NORM, M_NORM_BIAS, UP, UP_BIAS, DOWN,
    DOWN_BIAS, KEYS, VALUES, WINDOW, TABLES, ROPE, SINKS, A_OUT_NORM, A_OUT_NORM_BIAS, M_OUT_NORM, M_OUT_NORM_BIAS,
    EXPERTS, ROUTER, ROUTER_BIAS, SHARED_GATE,
) = (
    0, 1, 2, 6, 7, 8, 9, 13, 14, 15, 16, 20, 21, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39,
)  # fmt: skip
COLUMNS = 40
# Columns of a layer's table of experts, which has a row per expert; the shared expert, if there is one, is the last.
X_UP, X_DOWN, X_UP_BIAS, X_DOWN_BIAS, X_WIDTH, EXPERT_COLUMNS = 0, 4, 8, 9, 10, 11
# The model's settings, as `forward` takes them.
(
    HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, CENTERED, POSITION, PARALLEL, ACTIVATION, QK_SCOPE, ROTARY,
    TOP_K, NORMALIZE,
) = range(13)  # fmt: skip
EPS, UNIT, ALPHA, LIMIT = range(4)
# Columns of an update of some rows of a matrix by an adapter: B A x, then with `gain` (y - bias) · gain + bias.
U_FIRST, U_ROWS, U_RANK, U_A, U_B, U_GAIN, U_BIAS, UPDATE_COLUMNS = range(8)


@_inline
def _prepare(tid: int, threads: int, N: int) -> Any:
    """Return which tokens a thread normalizes and rounds. Every thread prepares a single one, to save a barrier."""
    return (0, 1, 1) if N == 1 else (tid, N, threads)


@_inline
def _adapt(updates: Any, x: int, K: int, y: Any, begin: int, end: int) -> None:
    """Add an adapter's updates of a matrix to the rows begin ... end of a token's output y. x: its input's address."""
    for i in range(len(updates)):
        u = updates[i]
        first, last = max(begin, u[U_FIRST]), min(end, u[U_FIRST] + u[U_ROWS])
        if first >= last:
            continue
        rank = u[U_RANK]
        z = np.empty(rank, np.float32)
        row = numba.carray(_floats(x), (K,))
        A = numba.carray(_floats(u[U_A]), (rank, K))
        for j in range(rank):
            total = np.float32(0.0)
            for k in range(K):
                total += A[j, k] * row[k]
            z[j] = total
        B = numba.carray(_floats(u[U_B]), (u[U_ROWS], rank))
        for r in range(first, last):
            total = np.float32(0.0)
            own = r - u[U_FIRST]
            for j in range(rank):
                total += B[own, j] * z[j]
            y[r] += total
            if u[U_GAIN]:
                bias = np.float32(0.0)
                if u[U_BIAS]:
                    bias = numba.carray(_floats(u[U_BIAS]), (u[U_ROWS],))[own]
                gain = numba.carray(_floats(u[U_GAIN]), (u[U_ROWS],))[own]
                y[r] = (y[r] - bias) * gain + bias


@_inline
def _product(
    a: Any, matrix: int, bias: int, tid: int, threads: int, y: Any, yq: Any, ys: Any, ysum: Any, product: Any, R: int,
    routes: Any, updates: Any, kind: int,
) -> None:  # fmt: skip
    """Compute y (N, K) times a matrix of R rows, with its bias and adapters, into product (N, R): a thread's share.

    updates: (adapters, 4, parts, UPDATE_COLUMNS) of the layer; kind: which of the four matrices this is.
    """
    N, K = y.shape
    first, last = _share(tid, threads, R)
    _multiply(
        a[matrix], a[matrix + 1], a[matrix + 2], a[matrix + 3], K, first, last, y, yq, ys, ysum, product.ctypes.data,
        product.shape[1],
    )  # fmt: skip
    if a[bias]:
        add = numba.carray(_floats(a[bias]), (R,))
        for n in range(N):
            for r in range(first, last):
                product[n, r] += add[r]
    if len(updates):
        for n in range(N):
            if routes[n] >= 0:
                _adapt(updates[routes[n], kind], y.ctypes.data + 4 * n * K, K, product[n], first, last)


@_inline
def _activate(kind: int, at: int, up: int, n: int, to: int, alpha: Any, limit: Any) -> None:
    """Apply an activation of `forward` to n floats at an address; `up`: what a gate multiplies."""
    if kind == 0:
        _swiglu(at, up, n, to, alpha, limit)
    elif kind == 1:
        _gelu(at, up, n, to, alpha, limit)
    elif kind == 3:
        _geglu(at, up, n, to, alpha, limit)
    elif kind == 5:
        _clamped_swiglu(at, up, n, to, alpha, limit)
    else:
        x, y = numba.carray(_floats(at), (n,)), numba.carray(_floats(to), (n,))
        if kind == 2:
            for i in range(n):
                y[i] = np.float32(0.5) * x[i] * np.float32(1.0 + math.erf(x[i] * 0.7071067811865476))
        else:
            for i in range(n):
                y[i] = np.float32(0.0) if x[i] < np.float32(0.0) else x[i]  # NaN stays NaN


@_inline
def _into_residual(
    tid: int, threads: int, counter: int, met: int, mode: int, result: Any, side: Any, x: Any, norm: int, bias: int,
    eps: Any, centered: bool, unit: Any, h: Any,
) -> Any:  # fmt: skip
    """Add result (N, C) to the residual stream x (N, C); a thread has computed its share of the columns. Return `met`.

    mode: 0: x + result. 1: keep it in `side` until the other part of a parallel block is there. 2: x + side + result.
        3: x + norm(result). 4: norm(x + result). h: (N, C), work space.
    """
    N, C = x.shape
    first, last = _share(tid, threads, C)
    if mode <= 2:
        for n in range(N):
            if mode == 0:
                for r in range(first, last):
                    x[n, r] += result[n, r]
            elif mode == 1:
                for r in range(first, last):
                    side[n, r] = result[n, r]
            else:
                for r in range(first, last):
                    x[n, r] += side[n, r] + result[n, r]
    else:
        met += threads
        _meet(counter, met)
        for n in range(tid, N, threads):
            if mode == 3:
                _norm(result[n, :C], norm, bias, eps, centered, unit, h[n])
                for r in range(C):
                    x[n, r] += h[n, r]
            else:
                for r in range(C):
                    x[n, r] += result[n, r]
                _norm(x[n], norm, bias, eps, centered, unit, h[n])
                for r in range(C):
                    x[n, r] = h[n, r]
    met += threads
    _meet(counter, met)
    return met


@_inline
def _choose(logits: Any, k: int, normalize: bool, experts: Any, weights: Any) -> None:
    """Choose the k experts with the largest logits (E,), which are overwritten, and their weights."""
    E = len(logits)
    most = logits[0]
    for e in range(1, E):
        most = logits[e] if logits[e] > most else most
    total = np.float32(0.0)
    for e in range(E):
        logits[e] = _exp(logits[e] - most)
        total += logits[e]
    used = np.float32(0.0)
    for j in range(k):
        best = 0
        for e in range(1, E):
            if logits[e] > logits[best]:
                best = e
        experts[j], weights[j] = best, logits[best]
        used += logits[best]
        logits[best] = np.float32(-1.0)
    inverse = np.float32(1.0) / (used if normalize else total)
    for j in range(k):
        weights[j] *= inverse


@_inline
def _mixture(
    tid: int, threads: int, counter: int, met: int, a: Any, options: Any, numbers: Any, hc: Any, routing: Any,
    experts: Any, weights: Any, order: Any, starts: Any, xg: Any, gq: Any, gs: Any, gsum: Any, wide: Any, hidden: Any,
    result: Any,
) -> Any:  # fmt: skip
    """Compute a mixture of experts of hc (N, C) into a thread's share of the columns of result (N, C). Return `met`.

    Work space for P = N · k pairs of a token and an expert, which are sorted by expert: routing (N, E rounded up);
        experts, weights: (N, k); order: (threads, P); starts: (threads, E + 2); xg: (P, C); gq, gs, gsum: rounded
        inputs of P tokens; wide: (P, two of the largest widths); hidden: (P · largest width,).
    """
    N, C = hc.shape
    k = experts.shape[1]
    E = starts.shape[1] - 2 if a[SHARED_GATE] else starts.shape[1] - 1
    table = numba.carray(_longs(a[EXPERTS]), (starts.shape[1] - 1, EXPERT_COLUMNS))
    first, last = _share(tid, threads, E)
    _multiply(32, a[ROUTER], 0, 0, C, first, last, hc, gq, gs, gsum, routing.ctypes.data, routing.shape[1])
    met += threads
    _meet(counter, met)
    chosen = k - 1 if a[SHARED_GATE] else k
    for n in range(tid, N, threads):
        if a[ROUTER_BIAS]:
            bias = numba.carray(_floats(a[ROUTER_BIAS]), (E,))
            for e in range(E):
                routing[n, e] += bias[e]
        _choose(routing[n, :E], chosen, options[NORMALIZE] != 0, experts[n], weights[n])
        if a[SHARED_GATE]:
            gate, total = numba.carray(_floats(a[SHARED_GATE]), (C,)), np.float32(0.0)
            for i in range(C):
                total += gate[i] * hc[n, i]
            e_ = _exp(-abs(total))
            experts[n, chosen] = E
            weights[n, chosen] = (np.float32(1.0) if total >= 0 else e_) / (np.float32(1.0) + e_)
    met += threads
    _meet(counter, met)
    # sort the pairs by expert, in each thread for itself
    begins, mine = starts[tid], order[tid]
    begins[:] = 0
    for n in range(N):
        for j in range(k):
            begins[experts[n, j] + 1] += 1
    for e in range(1, len(begins)):
        begins[e] += begins[e - 1]
    for n in range(N):
        for j in range(k):
            e = experts[n, j]
            mine[begins[e]] = n * k + j
            begins[e] += 1
    for e in range(len(begins) - 1, 0, -1):
        begins[e] = begins[e - 1]
    begins[0] = 0
    q, s, m = gq.ctypes.data, gs.ctypes.data, gsum.ctypes.data
    for e in range(len(table)):
        o, count = begins[e], begins[e + 1] - begins[e]
        for i in range(count):
            if (o + i) % threads != tid:
                continue
            source = hc[mine[o + i] // k]
            for c in range(C):
                xg[o + i, c] = source[c]
            if table[e, X_UP] != 32:
                place = o * C
                _round_row(
                    xg.ctypes.data + 4 * (o + i) * C, i, count, C, table[e, X_UP], q + 2 * place,
                    s + 4 * (place // GROUP), m + 4 * (place // GROUP),
                )  # fmt: skip
    met += threads
    _meet(counter, met)
    alpha, limit = numbers[ALPHA], numbers[LIMIT]
    widest = wide.shape[1]
    for e in range(len(table)):
        o, count = begins[e], begins[e + 1] - begins[e]
        if count == 0:
            continue
        t, F = table[e], table[e, X_WIDTH]
        first, last = _share(tid, threads, F)
        place = o * C
        for half in range(2):
            _multiply(
                t[X_UP], t[X_UP + 1], t[X_UP + 2], t[X_UP + 3], C, first + half * F, last + half * F, xg[o : o + count],
                gq[2 * place :], gs[place // GROUP :], gsum[place // GROUP :], wide.ctypes.data + 4 * o * widest,
                widest,
            )  # fmt: skip
        for i in range(o, o + count):
            if t[X_UP_BIAS]:
                bias = numba.carray(_floats(t[X_UP_BIAS]), (2 * F,))
                for r in range(first, last):
                    wide[i, r] += bias[r]
                    wide[i, F + r] += bias[F + r]
            at = wide.ctypes.data + 4 * (i * widest + first)
            to = hidden.ctypes.data + 4 * (i * (widest // 2) + first)
            _activate(options[ACTIVATION], at, at + 4 * F, last - first, to, alpha, limit)
    met += threads
    _meet(counter, met)
    # Rows of `hidden` are half of `widest` apart; those of an expert are packed together, as it multiplies them.
    for e in range(len(table)):
        o, count, F = begins[e], begins[e + 1] - begins[e], table[e, X_WIDTH]
        for i in range(count):
            if (o + i) % threads != tid:
                continue
            row = hidden.ctypes.data + 4 * (o + i) * (widest // 2)
            if table[e, X_DOWN] != 32:
                place = o * (widest // 2)
                _round_row(
                    row, i, count, F, table[e, X_DOWN], q + 2 * place, s + 4 * (place // GROUP),
                    m + 4 * (place // GROUP),
                )  # fmt: skip
            else:
                packed = numba.carray(_floats(wide.ctypes.data + 4 * (o * widest + i * F)), (F,))
                source = numba.carray(_floats(row), (F,))
                for r in range(F):
                    packed[r] = source[r]
    met += threads
    _meet(counter, met)
    first, last = _share(tid, threads, C)
    for n in range(N):
        for r in range(first, last):
            result[n, r] = np.float32(0.0)
    for e in range(len(table)):
        o, count = begins[e], begins[e + 1] - begins[e]
        if count == 0:
            continue
        t, F = table[e], table[e, X_WIDTH]
        place = o * (widest // 2)
        inputs = numba.carray(_floats(wide.ctypes.data + 4 * o * widest), (count, F))
        _multiply(
            t[X_DOWN], t[X_DOWN + 1], t[X_DOWN + 2], t[X_DOWN + 3], F, first, last, inputs, gq[2 * place :],
            gs[place // GROUP :], gsum[place // GROUP :], xg.ctypes.data + 4 * o * C, C,
        )  # fmt: skip
        for i in range(o, o + count):
            pair = mine[i]
            n, weight = pair // k, weights[pair // k, pair % k]
            if t[X_DOWN_BIAS]:
                bias = numba.carray(_floats(t[X_DOWN_BIAS]), (C,))
                for r in range(first, last):
                    result[n, r] += weight * (xg[i, r] + bias[r])
            else:
                for r in range(first, last):
                    result[n, r] += weight * xg[i, r]
    return met


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def forward(
    tid: int, threads: int, counter: int, layers: Any, head: Any, options: Any, numbers: Any, layer_scales: Any,
    positions: Any, units: Any, cos: Any, sin: Any, tables: Any, pools: Any, Z: int, wanted: Any, routes: Any,
    updates: Any, x: Any, h: Any, xq: Any, xs: Any, xsum: Any, qkv: Any, mixed: Any, wide: Any, product: Any,
    scores: Any, side: Any, routing: Any, experts: Any, weights: Any, order: Any, starts: Any, xg: Any, gq: Any,
    gs: Any, gsum: Any, expert_wide: Any, expert_hidden: Any, logits: Any,
) -> None:  # fmt: skip
    """Compute a thread's share of the forward pass of a model over N tokens.

    layers: (L, COLUMNS), addresses and numbers. head: addresses of weight and bias of the final norm, and the four
        entries of the output matrix.
    options, numbers: the model's settings. POSITION of norms: 0: before, 1: after the residual, 2: after each part,
        3: before and after each part. ACTIVATION: 0: SwiGLU, 1: GELU (tanh), 2: GELU (exact), 3: GELU (tanh) with a
        gate, 4: ReLU, 5: clamped SwiGLU. QK_SCOPE: 0: norms of each head with the same weights, 1: with its own, 2: of
        all heads together. layer_scales: (L,), of attention scores.
    positions: (N,). units: (any, 2), which tokens attend together: the first one and how many, up to four, consecutive
        tokens of its sequence. cos, sin: (2, N, R/2), of all layers and of those with their own; empty for learned
        positions.
    tables: (groups, N, blocks), the blocks of each token's sequence. pools: (groups,), the number of blocks of a pool.
    wanted: the tokens whose logits are to be computed.
    routes: (N,), each token's adapter; -1: none. updates: (L, adapters, 4, parts, UPDATE_COLUMNS), of each layer's
        four matrices.
    x: (N, C), the embedded tokens.
    Work space: h: (threads, N · largest number of columns); xq: twice that; xs, xsum: the same divided by GROUP;
        qkv: (N, (H + 2J)·D); mixed: (N, H·D); wide: (N, F); product: (N, largest number of rows);
        scores: (threads, 4, context + two blocks); side: (N, C), of parallel blocks; the others: see `_mixture`.
    logits: (wanted, V rounded up), the result.
    """
    N, C = x.shape
    H, J, D, F, V = (options[HEADS], options[KV_HEADS], options[HEAD_DIM], options[INTERMEDIATE], options[VOCABULARY])
    centered, place, parallel = options[CENTERED] != 0, options[POSITION], options[PARALLEL] != 0
    eps, unit, activation = numbers[EPS], numbers[UNIT], options[ACTIVATION]
    gated = activation == 0 or activation == 3 or activation == 5
    met = 0
    rotary = cos.shape[1] > 0
    space = tid if N == 1 else 0
    begin, end, step = _prepare(tid, threads, N)
    hc, q8, s8, m8 = h[space, : N * C].reshape(N, C), xq[space], xs[space], xsum[space]
    hs = h[0, : N * C].reshape(N, C)
    R = qkv.shape[1]
    for layer in range(layers.shape[0]):
        a, own_updates = layers[layer], updates[layer]
        # queries, keys, values
        for n in range(begin, end, step):
            _norm(x[n], a[A_NORM], a[A_NORM_BIAS], eps, centered, unit, hc[n])
            if a[QKV] != 32:
                _round(hc, n, a[QKV], q8, s8, m8)
        if N > 1:
            met += threads
            _meet(counter, met)
        _product(a, QKV, QKV_BIAS, tid, threads, hc, q8, s8, m8, qkv, R, routes, own_updates, 0)
        met += threads
        _meet(counter, met)
        # normalize and rotate queries and keys; store keys and values
        if a[Q_NORM] and options[QK_SCOPE] == 2:
            for item in range(tid, 2 * N, threads):
                n = item // 2
                row = qkv[n, : H * D] if item % 2 == 0 else qkv[n, H * D : (H + J) * D]
                _norm(row, a[Q_NORM] if item % 2 == 0 else a[K_NORM], 0, eps, centered, unit, row)
            met += threads
            _meet(counter, met)
        group = a[TABLES]
        keys = numba.carray(_floats(a[KEYS]), (pools[group], Z, J, D))
        values = numba.carray(_floats(a[VALUES]), (pools[group], Z, J, D))
        for item in range(tid, N * (H + J), threads):
            n, i = item // (H + J), item % (H + J)
            part = qkv[n, i * D : (i + 1) * D]
            if a[Q_NORM] and options[QK_SCOPE] < 2:
                weight = a[Q_NORM] if i < H else a[K_NORM]
                if options[QK_SCOPE] == 1:
                    weight += 4 * D * (i if i < H else i - H)
                _norm(part, weight, 0, eps, centered, unit, part)
            if rotary and a[ROPE] > 0:
                _rotate(part, options[ROTARY], cos[a[ROPE] - 1, n], sin[a[ROPE] - 1, n])
            if i >= H:
                p = positions[n]
                block = tables[group, n, p // Z]
                for d in range(D):
                    keys[block, p % Z, i - H, d] = part[d]
                    values[block, p % Z, i - H, d] = qkv[n, (i + J) * D + d]
        met += threads
        _meet(counter, met)
        queries, results, item = qkv.ctypes.data, mixed.ctypes.data, 0
        shared, scale, sinks = H // J, layer_scales[layer], a[SINKS]
        for u in range(len(units)):
            n, T = units[u]
            p = positions[n]
            if T > 1:  # consecutive tokens: one head at a time
                for i in range((tid - item) % threads, H, threads):
                    _attend(
                        queries + 4 * (n * R + i * D), R, T, 1, p, a[WINDOW], D, scale, a[KEYS] + 4 * D * (i // shared),
                        a[VALUES] + 4 * D * (i // shared), J * D, tables[group, n], Z, scores[tid],
                        results + 4 * (n * H + i) * D, H * D, sinks + 4 * i if sinks else 0, 0,
                    )  # fmt: skip
                item += H
                continue
            for j in range(J):  # a single token: the heads that share a key head together
                if (item + j) % threads == tid:
                    for i in range(j * shared, (j + 1) * shared, 4):
                        _attend(
                            queries + 4 * (n * R + i * D), D, min(4, (j + 1) * shared - i), 0, p, a[WINDOW], D, scale,
                            a[KEYS] + 4 * D * j, a[VALUES] + 4 * D * j, J * D, tables[group, n], Z, scores[tid],
                            results + 4 * (n * H + i) * D, D, sinks + 4 * i if sinks else 0, 1,
                        )  # fmt: skip
            item += J
        met += threads
        _meet(counter, met)
        # output projection
        if a[OUT] != 32:
            for n in range(begin, end, step):
                _round(mixed, n, a[OUT], q8, s8, m8)
            if N > 1:
                met += threads
                _meet(counter, met)
        _product(a, OUT, OUT_BIAS, tid, threads, mixed, q8, s8, m8, product, C, routes, own_updates, 1)
        mode = 4 if place == 1 else 3 if place > 1 else 1 if parallel else 0
        met = _into_residual(
            tid, threads, counter, met, mode, product, side, x, a[A_OUT_NORM], a[A_OUT_NORM_BIAS], eps, centered, unit,
            hs,
        )  # fmt: skip
        # feed-forward layer
        for n in range(begin, end, step):
            _norm(x[n], a[M_NORM], a[M_NORM_BIAS], eps, centered, unit, hc[n])
            if a[UP] != 32 and a[EXPERTS] == 0:
                _round(hc, n, a[UP], q8, s8, m8)
        if N > 1:
            met += threads
            _meet(counter, met)
        if a[EXPERTS]:
            met = _mixture(
                tid, threads, counter, met, a, options, numbers, hc, routing, experts, weights, order, starts, xg, gq,
                gs, gsum, expert_wide, expert_hidden, product,
            )  # fmt: skip
        else:
            first, last = _share(tid, threads, F)
            for half in range(2 if gated else 1):
                _multiply(
                    a[UP], a[UP + 1], a[UP + 2], a[UP + 3], C, first + half * F, last + half * F, hc, q8, s8, m8,
                    product.ctypes.data, product.shape[1],
                )  # fmt: skip
            if a[UP_BIAS]:
                bias = numba.carray(_floats(a[UP_BIAS]), (2 * F if gated else F,))
                for n in range(N):
                    for r in range(first, last):
                        product[n, r] += bias[r]
                        if gated:
                            product[n, F + r] += bias[F + r]
            for n in range(N):
                if len(own_updates) and routes[n] >= 0:
                    changes, row = own_updates[routes[n], 2], hc.ctypes.data + 4 * n * C
                    _adapt(changes, row, C, product[n], first, last)
                    if gated:
                        _adapt(changes, row, C, product[n], F + first, F + last)
                at = product.ctypes.data + 4 * (n * product.shape[1] + first)
                to = wide.ctypes.data + 4 * (n * F + first)
                _activate(activation, at, at + 4 * F, last - first, to, numbers[ALPHA], numbers[LIMIT])
            met += threads
            _meet(counter, met)
            if a[DOWN] != 32:
                for n in range(begin, end, step):
                    _round(wide, n, a[DOWN], q8, s8, m8)
                if N > 1:
                    met += threads
                    _meet(counter, met)
            _product(a, DOWN, DOWN_BIAS, tid, threads, wide, q8, s8, m8, product, C, routes, own_updates, 3)
        mode = 4 if place == 1 else 3 if place > 1 else 2 if parallel else 0
        met = _into_residual(
            tid, threads, counter, met, mode, product, side, x, a[M_OUT_NORM], a[M_OUT_NORM_BIAS], eps, centered, unit,
            hs,
        )  # fmt: skip
    # logits
    M = len(wanted)
    hm = h[0, : M * C].reshape(M, C)
    for i in range(tid, M, threads):
        _norm(x[wanted[i]], head[0], head[1], eps, centered, unit, hm[i])
        if head[2] != 32:
            _round(hm, i, head[2], xq[0], xs[0], xsum[0])
    met += threads
    _meet(counter, met)
    first, last = _share(tid, threads, V)
    _multiply(
        head[2], head[3], head[4], head[5], C, first, last, hm, xq[0], xs[0], xsum[0], logits.ctypes.data,
        logits.shape[1],
    )  # fmt: skip
