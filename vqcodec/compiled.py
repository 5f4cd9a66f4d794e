"""The small operations around the networks and of the metric on a CPU, compiled: one pass over rows that stay in a
cache, where torch takes a dozen passes over all of them. The same in torch, for GPUs, is where these are called.

Tensors come as they are, on the CPU and contiguous. torch itself is not needed to compile this.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic
from numpy.typing import NDArray

from bitstream.exact import (
    ACTIVATION_BITS,
    ACTIVATION_MAX,
    ESCAPE_BITS,
    ESCAPE_SIDE,
    ESCAPE_STEP,
    EXPONENT_MAX,
    EXPONENT_MIN,
    GATE_MAX,
    STREAM_BITS,
    STREAM_MAX,
    WEIGHT_MAX,
)
from bitstream.kernels import kernel
from bitstream.products import LEAN, njit

if TYPE_CHECKING:
    from torch import Tensor

# Sums may be taken in any order, so that they are vectors; infinities keep their meaning.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_function = njit(nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)

_TAYLOR = [np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7)]  # of 2^x
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = _TAYLOR
_LEAST = np.float32(-126)  # of an exponent
_LOG2E = np.float32(1 / math.log(2))
# A root divides the exponent, bits 23 to 30; 127 stands for 0, and less 0.05 the error is least.
_THIRD, _FIFTH = np.float32(1 / 3), np.float32(1 / 5)
_THIRD_OF_ONE, _FIFTH_OF_ONE = (np.float32((1 - share) * (127 - 0.05) * 2**23) for share in (1 / 3, 1 / 5))
_ACTIVATION, _STREAM = np.float32(2**ACTIVATION_BITS), np.float32(2**STREAM_BITS)
_ACTIVATION_LAST, _STREAM_LAST = np.float32(ACTIVATION_MAX), np.float32(STREAM_MAX)
_GATE = _GATE_LAST = np.float32(GATE_MAX)  # a gate of 1 is open
_QUARTER, _HALF_STEP, _ZERO, _ONE = np.float32(0.25), np.float32(0.5), np.float32(0), np.float32(1)
_WEIGHT_LAST = np.float32(WEIGHT_MAX)
_HALF = np.float32(ESCAPE_SIDE // 2)
_STEP = np.float32(ESCAPE_STEP)
_CELLS = 64  # whose vectors stay in the nearest cache
_RUN = 4096  # numbers that are added in float32

_AHEAD: list[tuple[Any, str]] = []


def _kernel(*signatures: str) -> Callable[[Any], Any]:
    """signatures: of the arguments, as numba writes them, for what encoding and decoding need from the start."""

    def compiled(function: Any) -> Any:
        # They allocate nothing: one that did would make numba import what compiling needs, 0.7 s of a program's start.
        made = kernel(function, fastmath=_FAST, **LEAN)
        _AHEAD.extend((made, signature) for signature in signatures)
        return made

    return compiled


def compile_ahead() -> None:
    """Compile what encoding and decoding need, and keep it where there is a place for it, as the first call would."""
    for made, signature in _AHEAD:
        made.compile(normalize_signature(f"({signature})")[0])


def rows_of(x: "Tensor") -> NDArray[Any]:
    """A tensor (..., C) as rows (n, C), numbers where they lie if it is contiguous; bfloat16 as uint16."""
    return plain(x.detach().contiguous().flatten(0, -2))


def plain(x: "Tensor") -> NDArray[Any]:
    """A tensor as an array where it lies; bfloat16 as uint16."""
    import torch

    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@_function
def _exp2(x):  # type: ignore[no-untyped-def]
    """2^x for float32 x below 128, to 3e-7; at least 2^-126."""
    x = max(x, _LEAST)
    whole = np.rint(x)
    f = x - whole
    power = _T0 + f * (_T1 + f * (_T2 + f * (_T3 + f * (_T4 + f * (_T5 + f * _T6)))))
    return power * np.int32((np.int32(whole) + 127) << 23).view(np.float32)


@_function
def _cube_root(x):  # type: ignore[no-untyped-def]
    """Of a positive float32, to 2e-7: two steps of Halley's from a third of its exponent."""
    y = np.int32(np.float32(np.float32(x).view(np.int32)) * _THIRD + _THIRD_OF_ONE).view(np.float32)
    for _ in range(2):
        cube = y * y * y
        y *= (cube + 2 * x) / (2 * cube + x)
    return y


@_function
def _fifth_root(x):  # type: ignore[no-untyped-def]
    """Of a positive float32, to 2e-7: two steps of Halley's from a fifth of its exponent."""
    y = np.int32(np.float32(np.float32(x).view(np.int32)) * _FIFTH + _FIFTH_OF_ONE).view(np.float32)
    for _ in range(2):
        fifth = y * y * y * y * y
        y *= (2 * fifth + 3 * x) / (3 * fifth + 2 * x)
    return y


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


@_kernel("f4[:,:,::1], f4[:,::1], f4[:,::1], f4[::1], i8[::1], i4[::1]")
def likely(z, null, active, weights, place, ends):  # type: ignore[no-untyped-def]
    """The rows in which null is not sure to win: their places among the first of place (M * cells,) int64, and in ends
    (M,) int32 where those of each group end; otherwise as ``choose``, by (group, cell)."""
    groups, cells, dim = z.shape
    n = 0
    for g in range(groups):
        for p in range(cells):
            square = np.float32(0)
            for j in range(dim):
                square += z[g, p, j] ** 2
            place[n] = g * cells + p
            n += square + weights[p] * null[g, p] > weights[p] * active[g, p]
        ends[g] = n


@_kernel(
    "f4[:,::1], f4[::1], f4[::1], i8[::1], f4[:,::1], i8[::1], f4[:,:,::1], f4[:,::1], f4[::1], b1, b1, f4[:,::1], "
    "i8[::1], f4[:,::1], f4[:,::1]"
)
def choose(  # type: ignore[no-untyped-def]
    z, null, active, place, logits, source, vectors, norm, weights, escape, gradient, scratch, index, chosen, rate
):
    """The choice of ``Codebook.choose`` for some rows, in their places.

    z: (places, d) float32; null, active: (places,) float32; place: (n,) int64, the rows; logits: (m, N) float32, of
    which a row's are at source (n,) int64; vectors: (M, d, K) float32, and norm, (M, K), their squares' sums; weights:
    (cells,) float32; scratch: (3, max(N, d)) float32. Filled at the places: index (places,) int64 and chosen
    (places, d), where it is not null, and with gradient rate (places, d).
    """
    groups, dim, codes = vectors.shape
    cells, outcomes = len(z) // groups, logits.shape[1]
    merit, bits, point = scratch[0, :outcomes], scratch[1, :outcomes], scratch[2, :dim]
    for r in range(len(place)):
        p = place[r]
        g, weight = p // cells, weights[p % cells]
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


@_kernel("f4[:,::1], i8[::1], f4[::1], f4[:,::1]")
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


@_function
def _snap(x, low, high):  # type: ignore[no-untyped-def]
    """A number in steps, rounded and clipped."""
    return min(max(np.floor(x + _HALF_STEP), low), high)


@_function
def _largest(row):  # type: ignore[no-untyped-def]
    most = np.float32(0)
    for c in range(len(row)):
        most = _larger(most, abs(row[c]))
    return most


@_kernel("f4[:,::1], f4[:,::1], i4[:,::1]")
def snap_weight(weight, out, exponent):  # type: ignore[no-untyped-def]
    """out (n, in) float32: weights on their grid; exponent (n, 1) int32: that of ``dyadic.weight_exponent``."""
    for r in range(len(weight)):
        row, target = weight[r], out[r]
        # What frexp gives, less 7, and one more if the largest weight would be rounded to 128.
        e = (np.int64(np.float32(_largest(row)).view(np.int32)) + (1 << 16) >> 23) - 133
        e = min(max(e, EXPONENT_MIN), EXPONENT_MAX)
        step, steps = np.float32(2.0**e), np.float32(2.0**-e)
        for c in range(len(row)):
            target[c] = _snap(row[c] * steps, -_WEIGHT_LAST, _WEIGHT_LAST) * step
        exponent[r, 0] = e if _largest(target) > 0 else -7  # as frexp has it for 0


# --- layers of the priors in training and in the fit: sums, gradients and activations are bfloat16, held as uint16 ---


@_function
def _wide(x):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@_function
def _narrow(x):  # type: ignore[no-untyped-def]
    """float32 to bfloat16, to the nearest, halves to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_function
def _inside(x, low, high):  # type: ignore[no-untyped-def]
    """1 where gradients pass, 0 at the limits."""
    return np.float32((x > low) & (x < high))


@_kernel("u2[:,::1], f4[:,::1], u2[:,::1]")
def relu(sums, bias, out):  # type: ignore[no-untyped-def]
    """out (n, C) = the sums (n, C) with the biases (B, C) of their samples, as activations from 0 up."""
    n, width = sums.shape
    for r in range(n):
        at = r * len(bias) // n
        for c in range(width):
            steps = _snap((_wide(sums[r, c]) + bias[at, c]) * _ACTIVATION, _ZERO, _ACTIVATION_LAST)
            out[r, c] = _narrow(steps / _ACTIVATION)


@_kernel("u2[:,::1], u2[:,::1], u2[:,::1], f4[:,::1]")
def relu_backward(out, gradient, to_sums, to_bias):  # type: ignore[no-untyped-def]
    n, width = out.shape
    for r in range(n):
        at = r * len(to_bias) // n
        for c in range(width):
            g = _wide(gradient[r, c]) * _inside(_wide(out[r, c]) * _ACTIVATION, _ZERO, _ACTIVATION_LAST)
            to_sums[r, c] = _narrow(g)
            to_bias[at, c] += g


@_kernel("f4[:,::1], u2[:,::1], f4[:,::1], b1, i8, i8[:,::1], f4[:,::1], u2[:,::1]")
def add(stream, sums, bias, gated, height, offsets, out, taps):  # type: ignore[no-untyped-def]
    """out (n, C) float32 = stream + what the sums say, n = B * height * width cells; taps (n, T * C): activations of
    out in the cells at T offsets, zeros outside of the grid. gated: the sums, (n, 2 C), are values and gates; otherwise
    stream values, (n, C)."""
    n, channels = stream.shape
    cells = n // len(bias)
    width = cells // height
    for b in range(len(bias)):
        for r in range(b * cells, (b + 1) * cells):
            for c in range(channels):
                x = _wide(sums[r, c]) + bias[b, c]
                if gated:
                    value = _snap(x * _ACTIVATION, -_ACTIVATION_LAST, _ACTIVATION_LAST) / _ACTIVATION
                    x = _wide(sums[r, channels + c]) + bias[b, channels + c]
                    x = value * _snap((x * _QUARTER + _HALF_STEP) * _GATE, _ZERO, _GATE_LAST) / _GATE
                else:
                    x = _snap(x * _STREAM, -_STREAM_LAST, _STREAM_LAST) / _STREAM
                out[r, c] = _snap((stream[r, c] + x) * _STREAM, -_STREAM_LAST, _STREAM_LAST) / _STREAM
        for i in range(height):
            for j in range(width):
                r = (b * height + i) * width + j
                for t in range(len(offsets)):
                    y, x = i + offsets[t, 0], j + offsets[t, 1]
                    target = taps[r, t * channels : (t + 1) * channels]
                    if 0 <= y < height and 0 <= x < width:
                        source = out[(b * height + y) * width + x]
                        for c in range(channels):
                            steps = _snap(source[c] * _ACTIVATION, -_ACTIVATION_LAST, _ACTIVATION_LAST)
                            target[c] = _narrow(steps / _ACTIVATION)
                    else:
                        target[:] = 0


@_kernel(
    "u2[:,::1], f4[:,::1], b1, i8, i8[:,::1], f4[::1], f4[:,::1], f4[:,::1], u2[:,::1], f4[:,::1], u2[:,::1], f4[:,::1]"
)
def add_backward(  # type: ignore[no-untyped-def]
    sums, bias, gated, height, offsets, total, out, to_out, to_taps, to_stream, to_sums, to_bias
):
    n, channels = out.shape
    cells = n // len(bias)
    width = cells // height
    for b in range(len(bias)):
        for i in range(height):
            for j in range(width):
                r = (b * height + i) * width + j
                total[:] = 0
                for t in range(len(offsets)):
                    y, x = i - offsets[t, 0], j - offsets[t, 1]
                    if 0 <= y < height and 0 <= x < width:
                        source = to_taps[(b * height + y) * width + x, t * channels : (t + 1) * channels]
                        for c in range(channels):
                            total[c] += _wide(source[c])
                for c in range(channels):
                    steps = np.floor(out[r, c] * _ACTIVATION + _HALF_STEP)
                    g = to_out[r, c] + total[c] * _inside(steps, -_ACTIVATION_LAST, _ACTIVATION_LAST)
                    total[c] = g * _inside(out[r, c] * _STREAM, -_STREAM_LAST, _STREAM_LAST)
                    to_stream[r, c] = total[c]
                if gated:
                    for c in range(channels):
                        x = _wide(sums[r, c]) + bias[b, c]
                        value = _snap(x * _ACTIVATION, -_ACTIVATION_LAST, _ACTIVATION_LAST)
                        x = _wide(sums[r, channels + c]) + bias[b, channels + c]
                        gate = _snap((x * _QUARTER + _HALF_STEP) * _GATE, _ZERO, _GATE_LAST)
                        g = total[c] * gate / _GATE * _inside(value, -_ACTIVATION_LAST, _ACTIVATION_LAST)
                        to_sums[r, c] = _narrow(g)
                        to_bias[b, c] += g
                        g = total[c] * value / _ACTIVATION * _QUARTER * _inside(gate, _ZERO, _GATE_LAST)
                        to_sums[r, channels + c] = _narrow(g)
                        to_bias[b, channels + c] += g
                else:
                    for c in range(channels):
                        x = _wide(sums[r, c]) + bias[b, c]
                        g = total[c] * _inside(np.floor(x * _STREAM + _HALF_STEP), -_STREAM_LAST, _STREAM_LAST)
                        to_sums[r, c] = _narrow(g)
                        to_bias[b, c] += g


@_kernel("u2[:,::1], f4[:,::1], i8[::1], f4[:,::1]")
def heads(sums, bias, place, out):  # type: ignore[no-untyped-def]
    """out (n, H) float32 = activations from 0 up of some rows: those at place (n,) in (M, cells), of sums
    (cells, M * H) and the biases (B, M * H) of their samples."""
    cells, width = len(sums), out.shape[1]
    for r in range(len(place)):
        first, cell = place[r] // cells * width, place[r] % cells
        at = cell * len(bias) // cells
        for c in range(width):
            steps = (_wide(sums[cell, first + c]) + bias[at, first + c]) * _ACTIVATION
            out[r, c] = _snap(steps, _ZERO, _ACTIVATION_LAST) / _ACTIVATION


@_kernel("f4[:,::1], f4[:,::1], i8[::1], u2[:,::1], f4[:,::1]")
def heads_backward(out, gradient, place, to_sums, to_bias):  # type: ignore[no-untyped-def]
    cells, width = len(to_sums), out.shape[1]
    for r in range(len(place)):
        first, cell = place[r] // cells * width, place[r] % cells
        at = cell * len(to_bias) // cells
        for c in range(width):
            g = gradient[r, c] * _inside(out[r, c] * _ACTIVATION, _ZERO, _ACTIVATION_LAST)
            to_sums[cell, first + c] = _narrow(g)
            to_bias[at, first + c] += g


# --- pictures ---


@_kernel("u1[:,:,::1], i8, u2[::1], u2[:,:,::1]", "u1[:,:,::1], i8, f4[::1], f4[:,:,::1]")
def to_blocks(pixels, size, table, out):  # type: ignore[no-untyped-def]
    """out (h, w, 3 size**2): what a table (256,) has for pixels (h size, w size, 3) uint8."""
    h, w, _ = out.shape
    for i in range(h):
        for j in range(w):
            at = 0
            for c in range(3):
                for y in range(i * size, (i + 1) * size):
                    for x in range(j * size, (j + 1) * size):
                        out[i, j, at] = table[pixels[y, x, c]]
                        at += 1


@_kernel("f4[:,:,::1], f4[:,:,::1], u1[:,:,::1]")
def paint(details, linear, out):  # type: ignore[no-untyped-def]
    """out (H, W, 3) uint8 = the sum of two pictures in blocks, (h, w, C) float32, and a half; the first has the smaller
    blocks."""
    size, fine = len(out) // len(linear), len(out) // len(details)
    for row in range(details.shape[0]):
        i, y0 = row * fine // size, row * fine % size
        for column in range(details.shape[1]):
            j, x0 = column * fine // size, column * fine % size
            detail, block = details[row, column], linear[i, j]
            for c in range(3):
                for y in range(fine):
                    here, there = (c * fine + y) * fine, (c * size + y0 + y) * size + x0
                    target = out[row * fine + y, column * fine : (column + 1) * fine]
                    for x in range(fine):
                        value = np.rint((detail[here + x] + block[there + x] + _HALF_STEP) * np.float32(255))
                        target[x, c] = np.uint8(min(max(value, _ZERO), np.float32(255)))


@_kernel("f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], u1[:,:,::1]")
def error_gradient(details, linear, to_details, to_linear, pixels):  # type: ignore[no-untyped-def]
    """That of the squared error between what ``paint`` would draw, unrounded, and pixels (H, W, 3) uint8. What is
    beyond black or white counts as these: on a white page an overshoot is no error."""
    size, fine = len(pixels) // len(linear), len(pixels) // len(details)
    for row in range(details.shape[0]):
        i, y0 = row * fine // size, row * fine % size
        for column in range(details.shape[1]):
            j, x0 = column * fine // size, column * fine % size
            detail, block, to_detail, to_block = (
                details[row, column],
                linear[i, j],
                to_details[row, column],
                to_linear[i, j],
            )
            for c in range(3):
                for y in range(fine):
                    here, there = (c * fine + y) * fine, (c * size + y0 + y) * size + x0
                    samples = pixels[row * fine + y, column * fine : (column + 1) * fine]
                    for x in range(fine):
                        value = min(max(detail[here + x] + block[there + x] + _HALF_STEP, _ZERO), _ONE)
                        twice = 2 * (value - np.float32(samples[x, c]) * np.float32(1 / 255))
                        to_detail[here + x] = to_block[there + x] = twice


@_kernel("i4[:,::1], f4[:,:,::1], f4[:,:,::1]")
def lookup(index, vectors, out):  # type: ignore[no-untyped-def]
    """out (cells, M, d) float32: the vectors of indices (M, cells) int32; vectors: (M, K, d). See ``Codebook``."""
    groups, codes, dim = vectors.shape
    for first in range(0, len(out), _CELLS):
        for g in range(groups):
            for p in range(first, min(first + _CELLS, len(out))):
                k = index[g, p] - 1
                if 0 <= k < codes:
                    for j in range(dim):
                        out[p, g, j] = vectors[g, k, j]
                else:
                    number = max(k - codes, 0)
                    for j in range(dim - 1, -1, -1):
                        out[p, g, j] = _STEP * (np.float32(number % ESCAPE_SIDE) - _HALF) if k >= 0 else _ZERO
                        number //= ESCAPE_SIDE


# --- SSIMULACRA 2: see its module ---

_TOE, _TOE_SLOPE = np.float32(0.04045), np.float32(1 / 12.92)
_SHIFT, _SCALE = np.float32(0.055), np.float32(1 / 1.055)


@_kernel("f4[::1], f4[::1]")
def linear_light(x, out):  # type: ignore[no-untyped-def]
    """sRGB, clipped to 0..1, to linear light."""
    for k in range(len(x)):
        value = min(max(x[k], _ZERO), _ONE)
        t = (max(value, _TOE) + _SHIFT) * _SCALE
        root = _fifth_root(t)
        power = t * t * root * root
        out[k] = value * _TOE_SLOPE if value <= _TOE else power


@_kernel("f4[::1], f4[::1], f4[::1]")
def linear_light_backward(x, gradient, out):  # type: ignore[no-untyped-def]
    """What is beyond black and white has no gradient."""
    for k in range(len(x)):
        t = (max(min(x[k], _ONE), _TOE) + _SHIFT) * _SCALE
        root = _fifth_root(t)
        slope = np.float32(2.4) * _SCALE * t * root * root
        slope = _TOE_SLOPE if x[k] <= _TOE else slope
        out[k] = gradient[k] * _inside(x[k], _ZERO, _ONE) * slope


@_kernel("f4[:,::1], f4[:,::1], f4, f4[:,::1], f4[::1], i8[::1], f4[:,::1]")
def opponents(rgb, absorbance, bias, mixture, offsets, channels, out):  # type: ignore[no-untyped-def]
    """out (C, n): channels of XYB, given by number, of linear light (3, n): the mixture (3, 3) of the cube roots of
    what each cone absorbs, plus the offsets."""
    red, green, blue = rgb[0], rgb[1], rgb[2]
    floor = _cube_root(bias)
    for c in range(len(channels)):
        out[c] = offsets[channels[c]]
    for cone in range(3):
        r, g, b = absorbance[cone, 0], absorbance[cone, 1], absorbance[cone, 2]
        for c in range(len(channels)):
            share, target = mixture[channels[c], cone], out[c]
            if share != 0:
                for k in range(rgb.shape[1]):
                    target[k] += share * (_cube_root(r * red[k] + g * green[k] + b * blue[k] + bias) - floor)


@_kernel("f4[:,::1], f4[:,::1], f4, f4[:,::1], i8[::1], f4[:,::1], f4[:,::1]")
def opponents_backward(rgb, absorbance, bias, mixture, channels, gradient, out):  # type: ignore[no-untyped-def]
    """out (3, n), zeros before, of the gradient (C, n) with respect to what ``opponents`` returns."""
    red, green, blue = rgb[0], rgb[1], rgb[2]
    for cone in range(3):
        r, g, b = absorbance[cone, 0], absorbance[cone, 1], absorbance[cone, 2]
        for c in range(len(channels)):
            share, towards = mixture[channels[c], cone] / 3, gradient[c]
            if share != 0:
                for k in range(rgb.shape[1]):
                    root = _cube_root(r * red[k] + g * green[k] + b * blue[k] + bias)
                    slope = share * towards[k] / (root * root)
                    out[0, k] += r * slope
                    out[1, k] += g * slope
                    out[2, k] += b * slope


@_kernel("f4[:,:,::1], f4[::1], f4[:,::1], f4[:,:,::1]")
def blur(planes, taps, rows, out):  # type: ignore[no-untyped-def]
    """out (n, H, W) float32: planes under an even filter along rows and columns, taps (5,) from its middle outwards;
    beyond them is zero. rows: (2, 8 + W), scratch."""
    n, height, width = planes.shape
    t0, t1, t2, t3, t4 = taps[0], taps[1], taps[2], taps[3], taps[4]
    rows[:] = 0
    nothing, middle = rows[0, :width], rows[1]
    for p in range(n):
        plane = planes[p]
        for i in range(height):
            here, target = plane[i], out[p, i]
            u1, d1 = plane[i - 1] if i >= 1 else nothing, plane[i + 1] if i + 1 < height else nothing
            u2, d2 = plane[i - 2] if i >= 2 else nothing, plane[i + 2] if i + 2 < height else nothing
            u3, d3 = plane[i - 3] if i >= 3 else nothing, plane[i + 3] if i + 3 < height else nothing
            u4, d4 = plane[i - 4] if i >= 4 else nothing, plane[i + 4] if i + 4 < height else nothing
            for j in range(width):
                near = t0 * here[j] + t1 * (u1[j] + d1[j]) + t2 * (u2[j] + d2[j])
                middle[j + 4] = near + t3 * (u3[j] + d3[j]) + t4 * (u4[j] + d4[j])
            for j in range(width):
                near = t0 * middle[j + 4] + t1 * (middle[j + 3] + middle[j + 5]) + t2 * (middle[j + 2] + middle[j + 6])
                target[j] = near + t3 * (middle[j + 1] + middle[j + 7]) + t4 * (middle[j] + middle[j + 8])


@_kernel("f4[:,::1], f4[:,::1], f4[:,:,::1]")
def powers(x, y, out):  # type: ignore[no-untyped-def]
    """out (3, n, pixels), of two sets of planes (n, pixels): the difference y - x, x^2 + y^2, and (y - x)^2."""
    for p in range(len(x)):
        original, decoded = x[p], y[p]
        difference, energy, power = out[0, p], out[1, p], out[2, p]
        for k in range(x.shape[1]):
            d = decoded[k] - original[k]
            difference[k] = d
            energy[k] = original[k] * original[k] + decoded[k] * decoded[k]
            power[k] = d * d


@_kernel("f4[:,::1], f4[:,::1], f4[:,:,::1], f4[:,::1]")
def powers_backward(x, y, towards, out):  # type: ignore[no-untyped-def]
    """To out (n, pixels), what is there, is added what the gradient (3, n, pixels) of ``powers`` is in y."""
    for p in range(len(x)):
        original, decoded, target = x[p], y[p], out[p]
        difference, energy, power = towards[0, p], towards[1, p], towards[2, p]
        for k in range(x.shape[1]):
            squares = decoded[k] * energy[k] + (decoded[k] - original[k]) * power[k]
            target[k] += difference[k] + 2 * squares


@_function
def _structure(shift, energy, power, mean, c2):  # type: ignore[no-untyped-def]
    """1 - SSIM as ``Ssimulacra2.norms`` has it, its change, the decoded picture's mean and 1 / (s11 + s22 + C2)."""
    there, square = mean + shift, shift * shift
    inverse = 1 / (energy - mean * mean - there * there + c2)
    change = (power - square) * inverse
    return square + (1 - square) * change, change, there, inverse


@_kernel("f4[:,::1], f4[:,::1], f4[:,::1], f4[:,:,::1], f4, f8[:,::1]")
def maps(y, mean, edge, blurred, c2, out):  # type: ignore[no-untyped-def]
    """out (n, 6): sums of the three maps of each plane (n, pixels), and of their fourth powers."""
    for p in range(len(y)):
        decoded, middle, edges = y[p], mean[p], edge[p]
        difference, energy, power = blurred[0, p], blurred[1, p], blurred[2, p]
        out[p] = 0
        for first in range(0, y.shape[1], _RUN):
            a = b = c = a4 = b4 = c4 = _ZERO
            for k in range(first, min(first + _RUN, y.shape[1])):
                structure, _, there, _ = _structure(difference[k], energy[k], power[k], middle[k], c2)
                structure = max(structure, _ZERO)
                contrast = (abs(decoded[k] - there) - edges[k]) / (1 + edges[k])
                ringing, blurring = max(contrast, _ZERO), max(-contrast, _ZERO)
                a += structure
                b += ringing
                c += blurring
                a4 += structure * structure * structure * structure
                b4 += ringing * ringing * ringing * ringing
                c4 += blurring * blurring * blurring * blurring
            out[p, 0] += a
            out[p, 1] += b
            out[p, 2] += c
            out[p, 3] += a4
            out[p, 4] += b4
            out[p, 5] += c4


@_kernel("f4[:,::1], f4[:,::1], f4[:,::1], f4[:,:,::1], f4, f4[:,::1], f4[:,:,::1], f4[:,::1]")
def maps_backward(y, mean, edge, blurred, c2, towards, to_blurred, to_y):  # type: ignore[no-untyped-def]
    """towards (n, 6): the gradient with respect to the sums of ``maps``. to_blurred (3, n, pixels), to_y (n, pixels):
    what it is in their arguments."""
    for p in range(len(y)):
        decoded, middle, edges = y[p], mean[p], edge[p]
        difference, energy, power = blurred[0, p], blurred[1, p], blurred[2, p]
        to_difference, to_energy, to_power, direct = to_blurred[0, p], to_blurred[1, p], to_blurred[2, p], to_y[p]
        a, b, c = towards[p, 0], towards[p, 1], towards[p, 2]
        a4, b4, c4 = 4 * towards[p, 3], 4 * towards[p, 4], 4 * towards[p, 5]
        for k in range(y.shape[1]):
            shift = difference[k]
            structure, change, there, inverse = _structure(shift, energy[k], power[k], middle[k], c2)
            slope = a + a4 * structure * structure * structure if structure > 0 else _ZERO
            rest = slope * (1 - shift * shift)
            away = decoded[k] - there
            contrast = (abs(away) - edges[k]) / (1 + edges[k])
            cube = contrast * contrast * contrast
            steep = b + b4 * cube if contrast > 0 else c4 * cube - c
            direct[k] = (steep if away > 0 else -steep) / (1 + edges[k])
            to_power[k] = rest * inverse
            to_energy[k] = -rest * change * inverse
            to_difference[k] = (
                2 * shift * slope * (1 - change) + 2 * rest * inverse * (there * change - shift) - direct[k]
            )
