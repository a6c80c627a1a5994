"""Matrix products and attention for a CPU, compiled by numba when first used (LLVM comes with it: no compiler needed).

Decoding reads every weight once a token, so weights lie as they are read: packed matrices (`model.quantized`) hold
sixteen rows side by side, four columns of each at a time, in 4 or 8 bits, with a scale (and, in 4 bits, a least value)
for each row and group of 32 columns. Inputs are rounded to 8 bits in groups of 32, too, and multiplied by `vpdpbusd`:
64 products an instruction. The instructions are written out in LLVM's own language, since no loop in Python makes LLVM
choose them.

All threads run the same program over their own share of the rows and meet at barriers (a counter they spin on), some
six a layer: a parallel loop each would cost as much as the work.

Addresses are passed as integers; whoever calls keeps the arrays alive.

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
ROWS = 16  # rows of a block

_i8, _i32, _i64, _f32, _f16 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType()
_BYTES, _INTS = ir.VectorType(_i8, 64), ir.VectorType(_i32, 16)
_FLOATS, _HALVES = ir.VectorType(_f32, 16), ir.VectorType(_f16, 16)


def available() -> bool:
    """Whether this machine has the instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni")) and bool(features.get("avx512bw"))


# the instructions -----------------------------------------------------------------------------------------------------


def _load(b: Any, address: Any, type_: Any) -> Any:
    value = b.load(b.inttoptr(address, type_.as_pointer()))
    value.align = 1
    return value


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


def _spread(b: Any, value: Any, type_: Any) -> Any:
    """A vector of sixteen times the value."""
    nothing = ir.Constant(type_, ir.Undefined)
    one = b.insert_element(nothing, value, ir.Constant(_i32, 0))
    return b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_i32, 16), [0] * 16))


def _at(b: Any, base: Any, *terms: Any) -> Any:
    """base + terms; each a number, an IR value, or a pair whose product counts."""
    for term in terms:
        if isinstance(term, tuple):
            term = b.mul(*(ir.Constant(_i64, t) if isinstance(t, int) else t for t in term))
        base = b.add(base, ir.Constant(_i64, term) if isinstance(term, int) else term)
    return base


def _packed_product(T: int, bits: int) -> Any:
    """T tokens times one block of sixteen rows: a function of addresses.

    w, s, m: the block's weights, scales and least values. x, xs, xsum: inputs in 8 bits (ldx apart), their scales and
    the sums of what they stand for (ldg apart, float32). out: (T, 16) float32, ldo apart.
    """

    @intrinsic
    def product(ctx, w, s, m, x, xs, xsum, G, ldx, ldg, out, ldo):
        def codegen(context, b, signature, args):
            w, s, m, x, xs, xsum, G, ldx, ldg, out, ldo = args
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
                for j in range(bits):  # a load of 64 bytes: four columns of sixteen rows, in 4 bits eight
                    loaded = _load(b, _at(b, w, (g, 64 * bits), 64 * j), _BYTES)
                    if bits == 4:
                        low = b.and_(loaded, ir.Constant(_BYTES, [15] * 64))
                        parts = [(8 * j, low), (8 * j + 4, b.lshr(loaded, ir.Constant(_BYTES, [4] * 64)))]
                    else:
                        parts = [(4 * j, loaded)]
                    for column, weights in parts:
                        weights = b.bitcast(weights, _INTS)
                        for t in range(T):
                            inputs = _load(b, _at(b, x, (t, ldx), (g, GROUP), column), _i32)
                            ints[t] = b.call(dot, [ints[t], weights, _spread(b, inputs, _INTS)])
                scale = b.fpext(_load(b, _at(b, s, (g, 32)), _HALVES), _FLOATS)
                least = b.fpext(_load(b, _at(b, m, (g, 32)), _HALVES), _FLOATS) if bits == 4 else None
                for t in range(T):
                    place = b.mul(_at(b, b.mul(ir.Constant(_i64, t), ldg), g), ir.Constant(_i64, 4))
                    own = _spread(b, _load(b, b.add(xs, place), _f32), _FLOATS)
                    inputs = _spread(b, _load(b, b.add(xsum, place), _f32), _FLOATS)
                    product_ = b.fmul(b.sitofp(ints[t], _FLOATS), own)
                    total = b.load(sums[t])
                    if bits == 4:
                        total = b.call(fma, [inputs, least, b.call(fma, [product_, scale, total])])
                    else:  # stored as 128 more than they are
                        product_ = b.call(fma, [inputs, ir.Constant(_FLOATS, [-128.0] * 16), product_])
                        total = b.call(fma, [product_, scale, total])
                    b.store(total, sums[t])
            for t in range(T):
                _store(b, b.load(sums[t]), _at(b, out, (b.mul(ldo, ir.Constant(_i64, 4)), t)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return product


def _plain_product(T: int, rows: int) -> Any:
    """T tokens times `rows` rows of a float32 matrix that lies row by row: a function of addresses.

    w: the first row. x: (T, K), ldx apart. out: (T, rows), ldo apart. K: a multiple of 16.
    """

    @intrinsic
    def product(ctx, w, x, K, ldx, out, ldo):
        def codegen(context, b, signature, args):
            w, x, K, ldx, out, ldo = args
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
            add = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(_f32, [_f32, _FLOATS]), "llvm.vector.reduce.fadd.v16f32"
            )
            sums = [[cgutils.alloca_once(b, _FLOATS) for _ in range(rows)] for _ in range(T)]
            for total in (each for row in sums for each in row):
                b.store(ir.Constant(_FLOATS, [0.0] * 16), total)
            with cgutils.for_range(b, b.udiv(K, ir.Constant(_i64, 16))) as loop:
                row = b.mul(K, ir.Constant(_i64, 4))
                weights = [_load(b, _at(b, w, (row, r), (loop.index, 64)), _FLOATS) for r in range(rows)]
                for t in range(T):
                    inputs = _load(b, _at(b, x, (b.mul(ldx, ir.Constant(_i64, 4)), t), (loop.index, 64)), _FLOATS)
                    for r in range(rows):
                        b.store(b.call(fma, [weights[r], inputs, b.load(sums[t][r])]), sums[t][r])
            for t in range(T):
                for r in range(rows):
                    total = b.call(add, [ir.Constant(_f32, -0.0), b.load(sums[t][r])], fastmath=("reassoc",))
                    _store(b, total, _at(b, out, (b.mul(ldo, ir.Constant(_i64, 4)), t), 4 * r))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return product


_q4_1, _q4_2, _q4_4, _q4_8 = (_packed_product(T, 4) for T in (1, 2, 4, 8))
_q8_1, _q8_2, _q8_4, _q8_8 = (_packed_product(T, 8) for T in (1, 2, 4, 8))
_f_1_4, _f_2_4, _f_4_4, _f_1_1 = _plain_product(1, 4), _plain_product(2, 4), _plain_product(4, 4), _plain_product(1, 1)


@intrinsic
def _floats(ctx, address):
    """The address as a pointer to float32."""

    def codegen(context, b, signature, args):
        return b.inttoptr(args[0], _f32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def _two_to(ctx, power):
    """2 to an int32 power, as float32, by its bits."""

    def codegen(context, b, signature, args):
        return b.bitcast(b.shl(b.add(args[0], ir.Constant(_i32, 127)), ir.Constant(_i32, 23)), _f32)

    return types.float32(types.int32), codegen


@intrinsic
def _arrive(ctx, counter):
    """Count one more at the address, for all to see."""

    def codegen(context, b, signature, args):
        b.atomic_rmw("add", b.inttoptr(args[0], _i64.as_pointer()), ir.Constant(_i64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _reached(ctx, counter, target):
    """Whether the count at the address is `target` or more; a short pause for who asks again and again."""

    def codegen(context, b, signature, args):
        pause = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
        b.call(pause, [])
        count = b.load_atomic(b.inttoptr(args[0], _i64.as_pointer()), "seq_cst", 8)
        return b.zext(b.icmp_signed(">=", count, args[1]), _i64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _give_way(ctx):
    """Let another thread have the processor."""

    def codegen(context, b, signature, args):
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(_i32, []), "sched_yield")
        return b.sext(b.call(function, []), _i64)

    return types.int64(), codegen


_inline: Any = njit(nogil=True, inline="never", fastmath={"contract", "reassoc", "nsz"})


@_inline
def _meet(counter: int, target: int) -> None:
    """A barrier: wait until `target` arrivals have been counted."""
    _arrive(counter)
    tries = 0
    while _reached(counter, target) == 0:
        tries += 1
        if tries > 3000:  # someone has lost its processor: do not keep it from getting one
            _give_way()


# a layer's parts ------------------------------------------------------------------------------------------------------


@_inline
def _round(x: Any, xq: Any, xs: Any, xsum: Any) -> None:
    """x (K,) to 8 bits: xq (K,) int8; scales and sums of what is left of it, (K / GROUP,)."""
    for g in range(len(x) // GROUP):
        part = x[g * GROUP : (g + 1) * GROUP]
        most = np.float32(0.0)
        for i in range(GROUP):
            most = max(most, abs(part[i]))
        scale = most / np.float32(127.0)
        inverse = np.float32(0.0) if most == 0 else np.float32(127.0) / most
        total = np.int32(0)
        for i in range(GROUP):
            q = np.int32(np.rint(part[i] * inverse))
            xq[g * GROUP + i] = q
            total += q
        xs[g] = scale
        xsum[g] = scale * np.float32(total)


@_inline
def _multiply(
    kind: int, w: int, s: int, m: int, K: int, first: int, last: int, x: Any, xq: Any, xs: Any, xsum: Any, out: int,
    ldo: int,
) -> None:  # fmt: skip
    """Rows first ... last (multiples of 16, but for the end) of a matrix times N tokens: out (N, R), ldo apart.

    kind: 4 or 8 (bits), or 32.
    """
    N = x.shape[0]
    G = K // GROUP
    if kind == 32:
        r = first
        while r < last:
            n = 0
            target = out + 4 * r
            row = w + 4 * r * K
            if r + 4 <= last:
                while n + 4 <= N:
                    _f_4_4(row, x.ctypes.data + 4 * n * K, K, K, target + 4 * n * ldo, ldo)
                    n += 4
                while n + 2 <= N:
                    _f_2_4(row, x.ctypes.data + 4 * n * K, K, K, target + 4 * n * ldo, ldo)
                    n += 2
                if n < N:
                    _f_1_4(row, x.ctypes.data + 4 * n * K, K, K, target + 4 * n * ldo, ldo)
                r += 4
            else:
                while n < N:
                    _f_1_1(row, x.ctypes.data + 4 * n * K, K, K, target + 4 * n * ldo, ldo)
                    n += 1
                r += 1
        return
    a, b, c = xq.ctypes.data, xs.ctypes.data, xsum.ctypes.data
    for block in range(first // ROWS, -(-last // ROWS)):
        wb, sb, mb = w + block * G * 64 * kind, s + block * G * 32, m + block * G * 32
        target = out + 4 * block * ROWS
        n = 0
        if kind == 4:
            while n + 8 <= N:
                _q4_8(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 8
            while n + 4 <= N:
                _q4_4(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 4
            while n + 2 <= N:
                _q4_2(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 2
            if n < N:
                _q4_1(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
        else:
            while n + 8 <= N:
                _q8_8(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 8
            while n + 4 <= N:
                _q8_4(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 4
            while n + 2 <= N:
                _q8_2(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)
                n += 2
            if n < N:
                _q8_1(wb, sb, mb, a + n * K, b + 4 * n * G, c + 4 * n * G, G, K, G, target + 4 * n * ldo, ldo)


@njit(nogil=True, cache=True)
def linear(
    tid: int, threads: int, counter: int, kind: int, w: int, s: int, m: int, R: int, x: Any, xq: Any, xs: Any,
    xsum: Any, out: int, ldo: int,
) -> None:  # fmt: skip
    """One thread's share of x (N, K) float32 times a packed matrix of R rows: out (N, ldo ≥ R rounded up to 16)."""
    N, K = x.shape
    for n in range(tid, N, threads):
        _round(x[n], xq[n], xs[n], xsum[n])
    _meet(counter, threads)
    first, last = _share(tid, threads, R)
    _multiply(kind, w, s, m, K, first, last, x, xq, xs, xsum, out, ldo)


@_inline
def _share(tid: int, threads: int, R: int) -> Any:
    """Which of R rows are a thread's: whole blocks."""
    blocks = -(-R // ROWS)
    return blocks * tid // threads * ROWS, min(blocks * (tid + 1) // threads * ROWS, R)


@_inline
def _exp(x: Any) -> Any:
    """e to the power x ≤ 0 to within 2 units of float32's last place or so: 2 to the power of whole and rest apart."""
    x = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
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
def _norm(x: Any, weight: int, bias: int, eps: float, centred: bool, out: Any) -> None:
    """x (C,), normalised: RMSNorm, or LayerNorm if centred. bias: 0 if there is none."""
    C = len(x)
    mean = np.float32(0.0)
    if centred:
        for i in range(C):
            mean += x[i]
        mean /= np.float32(C)
    square = np.float32(0.0)
    for i in range(C):
        square += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1.0) / np.sqrt(square / np.float32(C) + np.float32(eps))
    w = numba.carray(_floats(weight), (C,))
    if bias:
        add = numba.carray(_floats(bias), (C,))
        for i in range(C):
            out[i] = (x[i] - mean) * scale * w[i] + add[i]
    else:
        for i in range(C):
            out[i] = (x[i] - mean) * scale * w[i]


@_inline
def _head(q: Any, D: int, norm: int, eps: float, rotary: bool, cos: Any, sin: Any) -> None:
    """One head's query or key (D,), in place: normalised if `norm` (an address) is given, turned if rotary."""
    if norm:
        square = np.float32(0.0)
        for d in range(D):
            square += q[d] * q[d]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(D) + np.float32(eps))
        w = numba.carray(_floats(norm), (D,))
        for d in range(D):
            q[d] = q[d] * scale * w[d]
    if rotary:
        half = D // 2
        for d in range(half):
            a, b = q[d], q[d + half]
            q[d] = a * cos[d] - b * sin[d]
            q[d + half] = b * cos[d] + a * sin[d]


@_inline
def _attend(
    q: Any, D: int, scale: float, keys: Any, values: Any, j: int, table: Any, Z: int, first: int, last: int,
    scores: Any, out: Any,
) -> None:  # fmt: skip
    """One head's attention over the tokens first ... last of a sequence: q (D,) -> out (D,). scale: of the scores.

    keys, values: (blocks, Z, J, D). scores: room for as many numbers.
    """
    most = np.float32(-3e38)
    root = np.float32(scale)
    for p in range(first, last):
        k = keys[table[p // Z], p % Z, j]
        total = np.float32(0.0)
        for d in range(D):
            total += q[d] * k[d]
        total *= root
        scores[p - first] = total
        most = max(most, total)
    weight = np.float32(0.0)
    for i in range(last - first):
        scores[i] = _exp(scores[i] - most)
        weight += scores[i]
    for d in range(D):
        out[d] = np.float32(0.0)
    for p in range(first, last):
        v = values[table[p // Z], p % Z, j]
        share = scores[p - first] / weight
        for d in range(D):
            out[d] += share * v[d]


@_inline
def _activate(gate: Any, up: Any, kind: int) -> Any:
    """0: SwiGLU's silu(gate) · up. 1: gelu, by tanh. 2: gelu, exact."""
    if kind == 0:
        e = _exp(-abs(gate))
        return gate * up * (np.float32(1.0) if gate >= 0 else e) / (np.float32(1.0) + e)
    if kind == 1:
        u = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
        e = _exp(np.float32(-2.0) * abs(u))
        t = (np.float32(1.0) - e) / (np.float32(1.0) + e)
        return np.float32(0.5) * gate * (np.float32(1.0) + (t if u >= 0 else -t))
    return np.float32(0.5) * gate * np.float32(1.0 + math.erf(gate * 0.7071067811865476))


# rows of the table of addresses that `forward` reads
(
    A_NORM, A_NORM_BIAS, QKV, QKV_BIAS, Q_NORM, K_NORM, OUT, OUT_BIAS, M_NORM, M_NORM_BIAS, UP, UP_BIAS, DOWN,
    DOWN_BIAS, KEYS, VALUES, WINDOW, TABLES,
) = (0, 1, 2, 6, 7, 8, 9, 13, 14, 15, 16, 20, 21, 25, 26, 27, 28, 29)  # fmt: skip
COLUMNS = 30  # a matrix takes four: kind, weights, scales, least values


@_inline
def _prepare(tid: int, threads: int, N: int) -> Any:
    """Which tokens a thread prepares: a single one each for itself, which saves a barrier."""
    return (0, 1, 1) if N == 1 else (tid, N, threads)


@_inline
def _add_product(
    a: Any, matrix: int, bias: int, tid: int, threads: int, y: Any, yq: Any, ys: Any, ysum: Any, product: Any, x: Any
) -> None:
    """x (N, C) += y (N, K) times a matrix, and its bias: a thread's share."""
    N, C = x.shape
    first, last = _share(tid, threads, C)
    _multiply(
        a[matrix], a[matrix + 1], a[matrix + 2], a[matrix + 3], y.shape[1], first, last, y, yq, ys, ysum,
        product.ctypes.data, product.shape[1],
    )  # fmt: skip
    for n in range(N):
        for r in range(first, last):
            x[n, r] += product[n, r]
    if a[bias]:
        add = numba.carray(_floats(a[bias]), (C,))
        for n in range(N):
            for r in range(first, last):
                x[n, r] += add[r]


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def forward(
    tid: int, threads: int, counter: int, layers: Any, head: Any, H: int, J: int, D: int, F: int, V: int,
    scale: float, eps: float, centred: bool, activation: int, positions: Any, cos: Any, sin: Any, tables: Any,
    pools: Any, Z: int, wanted: Any, x: Any, h: Any, xq: Any, xs: Any, xsum: Any, qkv: Any, mixed: Any, wide: Any,
    product: Any, scores: Any, logits: Any,
) -> None:  # fmt: skip
    """One thread's share of a pass of a dense pre-norm model over N tokens.

    scale: of attention's scores. layers: (L, COLUMNS) addresses and numbers. head: the last norm's weight and bias, and
    the output matrix's four.
    positions: (N,). cos, sin: (N, D/2), of no length for learned positions. tables: (groups, N, blocks) block numbers
    of each token's sequence; pools: (groups,), how many blocks each has. wanted: the tokens whose logits are asked for.
    x: (N, C), the embedded tokens. The rest is room to work: h, xq (threads, N · most columns), xs, xsum (likewise, a
    GROUP-th), qkv (N, (H + 2J)·D), mixed (N, H·D), wide (N, F), product (N, most rows), scores (threads, context).
    logits: (wanted, V rounded up), the result.
    """
    N, C = x.shape
    met = 0
    rotary = cos.shape[0] > 0
    own = tid if N == 1 else 0
    begin, end, step = _prepare(tid, threads, N)
    hc, qc = h[own, : N * C].reshape(N, C), xq[own, : N * C].reshape(N, C)
    sc, mc = xs[own, : N * C // GROUP].reshape(N, C // GROUP), xsum[own, : N * C // GROUP].reshape(N, C // GROUP)
    E = H * D
    qe = xq[own, : N * E].reshape(N, E)
    se, me = xs[own, : N * E // GROUP].reshape(N, E // GROUP), xsum[own, : N * E // GROUP].reshape(N, E // GROUP)
    qf = xq[own, : N * F].reshape(N, F)
    sf, mf = xs[own, : N * F // GROUP].reshape(N, F // GROUP), xsum[own, : N * F // GROUP].reshape(N, F // GROUP)
    R = qkv.shape[1]
    for layer in range(layers.shape[0]):
        a = layers[layer]
        # queries, keys, values
        for n in range(begin, end, step):
            _norm(x[n], a[A_NORM], a[A_NORM_BIAS], eps, centred, hc[n])
            if a[QKV] != 32:
                _round(hc[n], qc[n], sc[n], mc[n])
        if N > 1:
            met += threads
            _meet(counter, met)
        first, last = _share(tid, threads, R)
        _multiply(
            a[QKV], a[QKV + 1], a[QKV + 2], a[QKV + 3], C, first, last, hc, qc, sc, mc, qkv.ctypes.data, R
        )  # fmt: skip
        if a[QKV_BIAS]:
            bias = numba.carray(_floats(a[QKV_BIAS]), (R,))
            for n in range(N):
                for r in range(first, last):
                    qkv[n, r] += bias[r]
        met += threads
        _meet(counter, met)
        # heads are turned, keys and values stored
        group = a[TABLES]
        keys = numba.carray(_floats(a[KEYS]), (pools[group], Z, J, D))
        values = numba.carray(_floats(a[VALUES]), (pools[group], Z, J, D))
        for item in range(tid, N * (H + J), threads):
            n, i = item // (H + J), item % (H + J)
            part = qkv[n, i * D : (i + 1) * D]
            row = n if rotary else 0
            if a[Q_NORM] or rotary:
                _head(part, D, a[Q_NORM] if i < H else a[K_NORM], eps, rotary, cos[row], sin[row])
            if i >= H:
                p = positions[n]
                block = tables[group, n, p // Z]
                for d in range(D):
                    keys[block, p % Z, i - H, d] = part[d]
                    values[block, p % Z, i - H, d] = qkv[n, (i + J) * D + d]
        met += threads
        _meet(counter, met)
        for item in range(tid, N * H, threads):
            n, i = item // H, item % H
            p = positions[n]
            oldest = max(0, p + 1 - a[WINDOW]) if a[WINDOW] else 0
            _attend(
                qkv[n, i * D : (i + 1) * D], D, scale, keys, values, i // (H // J), tables[group, n], Z, oldest,
                p + 1, scores[tid], mixed[n, i * D : (i + 1) * D],
            )  # fmt: skip
        met += threads
        _meet(counter, met)
        # the output of attention, onto the residual stream
        if a[OUT] != 32:
            for n in range(begin, end, step):
                _round(mixed[n], qe[n], se[n], me[n])
            if N > 1:
                met += threads
                _meet(counter, met)
        _add_product(a, OUT, OUT_BIAS, tid, threads, mixed, qe, se, me, product, x)
        met += threads
        _meet(counter, met)
        # the feed-forward layer
        for n in range(begin, end, step):
            _norm(x[n], a[M_NORM], a[M_NORM_BIAS], eps, centred, hc[n])
            if a[UP] != 32:
                _round(hc[n], qc[n], sc[n], mc[n])
        if N > 1:
            met += threads
            _meet(counter, met)
        first, last = _share(tid, threads, F)
        for half in range(2 if activation == 0 else 1):
            _multiply(
                a[UP], a[UP + 1], a[UP + 2], a[UP + 3], C, first + half * F, last + half * F, hc, qc, sc, mc,
                product.ctypes.data, product.shape[1],
            )  # fmt: skip
        if a[UP_BIAS]:
            bias = numba.carray(_floats(a[UP_BIAS]), (2 * F if activation == 0 else F,))
            for n in range(N):
                for r in range(first, last):
                    product[n, r] += bias[r]
                    if activation == 0:
                        product[n, F + r] += bias[F + r]
        for n in range(N):
            for r in range(first, last):
                up = product[n, F + r] if activation == 0 else np.float32(0)
                wide[n, r] = _activate(product[n, r], up, activation)
        met += threads
        _meet(counter, met)
        if a[DOWN] != 32:
            for n in range(begin, end, step):
                _round(wide[n], qf[n], sf[n], mf[n])
            if N > 1:
                met += threads
                _meet(counter, met)
        _add_product(a, DOWN, DOWN_BIAS, tid, threads, wide, qf, sf, mf, product, x)
        met += threads
        _meet(counter, met)
    # logits of the tokens that they are wanted of
    M = len(wanted)
    hm, qm = h[0, : M * C].reshape(M, C), xq[0, : M * C].reshape(M, C)
    sm, mm = xs[0, : M * C // GROUP].reshape(M, C // GROUP), xsum[0, : M * C // GROUP].reshape(M, C // GROUP)
    for i in range(tid, M, threads):
        _norm(x[wanted[i]], head[0], head[1], eps, centred, hm[i])
        if head[2] != 32:
            _round(hm[i], qm[i], sm[i], mm[i])
    met += threads
    _meet(counter, met)
    first, last = _share(tid, threads, V)
    _multiply(
        head[2], head[3], head[4], head[5], C, first, last, hm, qm, sm, mm, logits.ctypes.data, logits.shape[1]
    )  # fmt: skip
