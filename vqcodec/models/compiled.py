"""Training's many small operations on a CPU, compiled: one pass over rows that stay in a cache, where torch takes a
dozen passes over all of them. The same in torch, for GPUs, is where these are called.

Tensors come as they are, on the CPU and contiguous.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bitstream.exact import ESCAPE_BITS, ESCAPE_SIDE, ESCAPE_STEP
from bitstream.kernels import kernel
from bitstream.products import njit

# Sums may be taken in any order, so that they are vectors; infinities keep their meaning.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_function = njit(nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)

_TAYLOR = [np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7)]  # of 2^x
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = _TAYLOR
_LEAST = np.float32(-126)  # of an exponent
_LOG2E = np.float32(1 / math.log(2))
_HALF = np.float32(ESCAPE_SIDE // 2)
_STEP = np.float32(ESCAPE_STEP)


def _kernel(function: Any) -> Any:
    return kernel(function, fastmath=_FAST)


@_function
def _exp2(x):  # type: ignore[no-untyped-def]
    """2^x for float32 x below 128, to 3e-7; at least 2^-126."""
    x = max(x, _LEAST)
    whole = np.rint(x)
    f = x - whole
    power = _T0 + f * (_T1 + f * (_T2 + f * (_T3 + f * (_T4 + f * (_T5 + f * _T6)))))
    return power * np.int32((np.int32(whole) + 127) << 23).view(np.float32)


@intrinsic
def _larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two float32 numbers, neither NaN: of the maximum of a row, LLVM makes vectors then."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.maxnum.f32")
        return builder.call(call, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


@_function
def _most(row):  # type: ignore[no-untyped-def]
    most = row[0]
    for k in range(len(row)):
        most = _larger(most, row[k])
    return most


@_function
def _log2_sum(row):  # type: ignore[no-untyped-def]
    """log2 of the sum of 2^x over a row."""
    top, total = _most(row), np.float32(0)
    for k in range(len(row)):
        total += _exp2(row[k] - top)
    return top + np.float32(math.log2(total))


@_kernel
def choose(  # type: ignore[no-untyped-def]
    z, null, active, place, logits, source, vectors, weight, escape, gradient, index, chosen, rate
):
    """The choice of ``Codebook.choose`` for some rows, in their places.

    z: (places, d) float32; null, active: (places,) float32; place: (n,) int64, the rows; logits: (m, N) float32, of
    which a row's are at source (n,) int64; vectors: (M, d, K) float32. Filled at the places: index (places,) int64 and
    chosen (places, d), where it is not null, and with gradient rate (places, d).
    """
    groups, dim, codes = vectors.shape
    cells, outcomes = len(z) // groups, logits.shape[1]
    weight = np.float32(weight)
    norm = np.zeros((groups, codes), np.float32)
    for g in range(groups):
        for j in range(dim):
            for k in range(codes):
                norm[g, k] += vectors[g, j, k] ** 2
    merit, bits = np.empty(outcomes, np.float32), np.empty(outcomes, np.float32)
    point = np.zeros(dim, np.float32)
    for r in range(len(place)):
        p = place[r]
        g = p // cells
        x, row = z[p], logits[source[r]]
        total = _log2_sum(row)
        for k in range(codes):
            merit[k] = -norm[g, k]
        for j in range(dim):
            twice = np.float32(2) * x[j]
            for k in range(codes):
                merit[k] += twice * vectors[g, j, k]
        for k in range(outcomes):
            bits[k] = total - row[k]
        if escape:
            merit[codes] = 0
            for j in range(dim):
                point[j] = _STEP * min(max(np.rint(x[j] / _STEP), -_HALF), _HALF - 1)
                merit[codes] += point[j] * (np.float32(2) * x[j] - point[j])
            bits[codes] += np.float32(dim * ESCAPE_BITS)
        # Minus the costs, because a softmax follows, up to a constant of each row: |z|^2 and the bits of the flag.
        for k in range(outcomes):
            merit[k] -= weight * bits[k]
        most = _most(merit)
        merit_null = weight * (active[p] - null[p])
        if most > merit_null:
            best = 0
            while best < outcomes - 1 and merit[best] != most:
                best += 1
            index[p] = best + 1
            if best < codes:
                for j in range(dim):
                    chosen[p, j] = vectors[g, j, best]
            else:
                number = 0
                for j in range(dim):
                    chosen[p, j] = point[j]
                    number = number * ESCAPE_SIDE + np.int64(point[j] / _STEP + _HALF)
                index[p] = codes + 1 + number
        if gradient:
            # q of the outcomes, if not null, and the means over it of bits, of e and of both.
            sum_q, sum_bits = np.float32(0), np.float32(0)
            for k in range(outcomes):
                q = _exp2((merit[k] - most) * _LOG2E)
                sum_q += q
                merit[k], bits[k] = q, q * bits[k]
                sum_bits += bits[k]
            share = np.float32(1 / (1 + math.exp(merit_null - most - math.log(sum_q))))  # of not null
            expected = (1 - share) * null[p] + share * (active[p] + sum_bits / sum_q)
            for j in range(dim):
                sum_e, sum_both = np.float32(0), np.float32(0)
                for k in range(codes):
                    sum_e += merit[k] * vectors[g, j, k]
                    sum_both += bits[k] * vectors[g, j, k]
                if escape:
                    sum_e += merit[codes] * point[j]
                    sum_both += bits[codes] * point[j]
                rate[p, j] = 2 * share * ((active[p] - expected) * sum_e + sum_both) / sum_q


@_kernel
def code_length(logits, index, bits, slope):  # type: ignore[no-untyped-def]
    """logits (n, K) float32, index (n,) int64 -> bits (n,), -log2 of 2**logits[index] / sum(2**logits); and slope
    (n, K), their gradient."""
    for r in range(len(logits)):
        row, target = logits[r], slope[r]
        total = _log2_sum(row)
        bits[r] = total - row[index[r]]
        for k in range(len(row)):
            target[k] = _exp2(row[k] - total)
        target[index[r]] -= 1
