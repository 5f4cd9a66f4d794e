"""The arithmetic of the walk between its matrix products, compiled by numba.

All numbers are whole steps of the grids in dyadic.py, held in float32 where a matrix product is next; every operation
is exact. ``t`` is the step of a wave, ``first`` its first row, n its number of cells, ``width`` the width of the grid:
cell r of the wave is (i, j) = (first + r, t - 2i). Rows of rings are used again, row i has place i mod size.
Arrays are buffers for the largest wave, of which the first n rows count.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from vqcodec.models import dyadic

F = TypeVar("F", bound=Callable[..., Any])

POWERS = dyadic.POWERS.numpy().astype(np.int32)
TABLE_TOTAL = 1 << dyadic.TABLE_BITS
ACTIVATION_MAX, STREAM_MAX, LOGIT_MAX = dyadic.ACTIVATION_MAX, dyadic.STREAM_MAX, dyadic.LOGIT_MAX
STREAM_TO_ACTIVATION = 2.0 ** (dyadic.ACTIVATION_BITS - dyadic.STREAM_BITS)
STREAM_STEPS = 2**dyadic.STREAM_BITS
# The causal neighbours (0, -1), (-1, 1), (-1, 0), (-1, -1), each with the number of steps it lies back.
NEIGHBOURS = np.array([(0, -1, 1), (-1, 1, 1), (-1, 0, 2), (-1, -1, 3)])
SLOTS = 4  # steps in a ring: this one and three back


def kernel(function: F) -> F:
    """Compiled when first called, and kept on disk where there is a place for it."""
    try:
        return njit(function, cache=True, nogil=True)
    except RuntimeError:  # numba found no folder that it may write to
        return njit(function, nogil=True)


@kernel
def clip(x, low, high):  # type: ignore[no-untyped-def]
    return min(max(x, low), high)


@kernel
def gather(ring, t, first, n, width, out, column):  # type: ignore[no-untyped-def]
    """Neighbours side by side: ring (SLOTS, rows, C) int8 -> out[:n, column : column + 4 C]; 0 outside the grid."""
    rows, channels = ring.shape[1], ring.shape[2]
    for r in range(n):
        i = first + r
        j = t - 2 * i
        at = column
        for k in range(len(NEIGHBOURS)):
            above, beside = i + NEIGHBOURS[k, 0], j + NEIGHBOURS[k, 1]
            if above < 0 or beside < 0 or beside >= width:
                for c in range(channels):
                    out[r, at + c] = 0
            else:
                source = ring[(t - NEIGHBOURS[k, 2]) % SLOTS, above % rows]
                for c in range(channels):
                    out[r, at + c] = source[c]
            at += channels


@kernel
def keep(ring, t, first, n, values):  # type: ignore[no-untyped-def]
    """values (n, C) become this step's entries of the ring."""
    rows = ring.shape[1]
    for r in range(n):
        target = ring[t % SLOTS, (first + r) % rows]
        for c in range(ring.shape[2]):
            target[c] = np.int8(values[r, c])


@kernel
def begin_stream(sums, bias, condition, n, stream):  # type: ignore[no-untyped-def]
    """The stream from the sums of the embedding; condition: (n, C) int16 stream steps, or no cells for none."""
    for r in range(n):
        for c in range(stream.shape[1]):
            stream[r, c] = clip(np.floor(sums[r, c] + bias[c]), -STREAM_MAX, STREAM_MAX)
        if len(condition):
            for c in range(stream.shape[1]):
                stream[r, c] = clip(stream[r, c] + condition[r, c], -STREAM_MAX, STREAM_MAX)


@kernel
def read_stream(stream, n, out):  # type: ignore[no-untyped-def]
    """Stream steps -> activation steps in the first columns of out."""
    for r in range(n):
        for c in range(stream.shape[1]):
            x = np.floor(stream[r, c] * np.float32(STREAM_TO_ACTIVATION) + np.float32(0.5))
            out[r, c] = clip(x, -ACTIVATION_MAX, ACTIVATION_MAX)


@kernel
def activate(sums, bias, n, low, out):  # type: ignore[no-untyped-def]
    """Sums (n, C) and their biases -> activations (n, C) from low up; out may be the sums."""
    for r in range(n):
        for c in range(out.shape[1]):
            out[r, c] = clip(np.floor(sums[r, c] + bias[c]), low, ACTIVATION_MAX)


@kernel
def add_gated(sums, bias, n, stream):  # type: ignore[no-untyped-def]
    """stream + value * gate: values in steps of 2**-5, gates of 2**-6, so a quarter of the stream's step."""
    channels = stream.shape[1]
    for r in range(n):
        for c in range(channels):
            value = clip(np.floor(sums[r, c] + bias[c]), -ACTIVATION_MAX, ACTIVATION_MAX)
            gate = clip(np.floor(sums[r, channels + c] + bias[channels + c]), 0, 64)
            x = np.floor(stream[r, c] + value * gate * np.float32(0.25) + np.float32(0.5))
            stream[r, c] = clip(x, -STREAM_MAX, STREAM_MAX)


@kernel
def add_product(x, weight, sums, places):  # type: ignore[no-untyped-def]
    """sums (outputs,) + x @ weight, for weight (inputs, outputs) and the first entries of x; places: room for inputs.

    Zeros cost nothing: most codes of a photograph are, and half of a layer after a ReLU. They are sorted out first,
    because a branch that nobody can predict costs as much as the product it skips.
    """
    count = 0
    for i in range(len(weight)):
        places[count] = i
        count += x[i] != 0
    for place in range(count):
        i = places[place]
        value = x[i]
        for k in range(len(sums)):
            sums[k] += value * weight[i, k]


@kernel
def head(features, column, codes, known, hidden_bias, weight, bias, n, out):  # type: ignore[no-untyped-def]
    """A group's logits (n, K) in whole steps, from its hidden layer of H: of that, the features' share is
    features[:n, column : column + H], the codes' is codes[:n, :D] @ known (D, H); weight: (H, K)."""
    width, logits = weight.shape
    hidden, sums = np.empty(width, np.float32), np.empty(logits, np.float32)
    places = np.empty(max(width, len(known)), np.int64)
    for r in range(n):
        for h in range(width):
            hidden[h] = features[r, column + h] + hidden_bias[h]
        add_product(codes[r], known, hidden, places)
        for h in range(width):
            hidden[h] = clip(np.floor(hidden[h]), np.float32(0), np.float32(ACTIVATION_MAX))
        for k in range(logits):
            sums[k] = bias[k]
        add_product(hidden, weight, sums, places)
        for k in range(logits):
            out[r, k] = clip(np.floor(sums[k]), np.float32(-LOGIT_MAX), np.float32(LOGIT_MAX))


@kernel
def attend(queries, keys, values, position, t, first, n, width, out):  # type: ignore[no-untyped-def]
    """Exact softmax attention of each cell to the cells of its window, see ``dyadic.attend``.

    queries: (n, heads * c); keys, values: rings (rows, steps, heads * c) int8; position: (heads, window rows, steps)
    in logit steps; out: (n, heads * c) activations.
    """
    heads, window, steps = position.shape
    size = queries.shape[1] // heads
    score = np.empty(window * steps, np.int64)
    place = np.empty((window * steps, 2), np.int64)
    weighted = np.empty(size, np.int64)
    for r in range(n):
        i = first + r
        for head in range(heads):
            start, count, top = head * size, 0, 0
            for up in range(min(window, i + 1)):
                for age in range(1, steps + 1):
                    column = t - age - 2 * (i - up)
                    if column < 0 or column >= width:
                        continue
                    row, slot = (i - up) % keys.shape[0], (t - age) % steps
                    dot = np.int32(0)
                    for c in range(size):
                        dot += np.int32(queries[r, start + c]) * np.int32(keys[row, slot, start + c])
                    # Products are in steps of 2**-10; half of them, as logits, in steps of 2**-5.
                    s = clip(((dot + 32) >> 6) + position[head, up, age - 1], -LOGIT_MAX, LOGIT_MAX)
                    score[count], place[count, 0], place[count, 1] = s, row, slot
                    top = max(top, s)
                    count += 1
            total = np.int64(POWERS[top])
            weighted[:] = 0
            for k in range(count):
                weight = np.int64(POWERS[top - score[k]])
                total += weight
                for c in range(size):
                    weighted[c] += weight * values[place[k, 0], place[k, 1], start + c]
            for c in range(size):
                out[r, start + c] = (2 * weighted[c] + total) // (2 * total)


@kernel
def keep_attention(known, t, first, n, keys, values):  # type: ignore[no-untyped-def]
    """known (n, 2 * heads * c), keys then values, become this step's entries of the rings."""
    width = keys.shape[2]
    for r in range(n):
        row, slot = (first + r) % keys.shape[0], t % keys.shape[1]
        for c in range(width):
            keys[row, slot, c] = np.int8(known[r, c])
            values[row, slot, c] = np.int8(known[r, width + c])


@kernel
def tables(logits, out):  # type: ignore[no-untyped-def]
    """Coding tables of logits (n, K) in whole steps, see ``dyadic.frequencies``: out (n, K) int32."""
    codes = logits.shape[1]
    factor = np.float64(TABLE_TOTAL - codes)
    for r in range(logits.shape[0]):
        top = logits[r, 0]
        for k in range(codes):
            top = max(top, logits[r, k])
        total = np.int64(0)
        for k in range(codes):
            weight = POWERS[np.int32(top - logits[r, k])]
            out[r, k] = weight
            total += weight
        # Exact: whole numbers below 2**53, one correctly rounded division, and its quotient is further from the next
        # whole number than that rounding can move it.
        divisor, given = np.float64(total), np.int32(0)
        for k in range(codes):
            u = np.int32(np.float64(out[r, k]) * factor / divisor) + np.int32(1)
            out[r, k] = u
            given += u
        out[r, 0] += np.int32(TABLE_TOTAL) - given


@kernel
def choose(latents, vectors, norms, logits, bits_per_step, out):  # type: ignore[no-untyped-def]
    """Index of the least |z - e|^2 + bits in each row: latents (n, d), vectors (d, K), norms |e|^2 (K,), logits (n, K)
    in whole steps, out (n,)."""
    codes, weight = len(norms), np.float32(bits_per_step)
    cost = np.empty(codes, np.float32)
    for r in range(latents.shape[0]):
        for k in range(codes):
            cost[k] = norms[k] - weight * logits[r, k]
        for c in range(len(vectors)):
            twice = np.float32(2) * latents[r, c]
            for k in range(codes):
                cost[k] -= twice * vectors[c, k]
        best, least = 0, cost[0]
        for k in range(codes):
            if cost[k] < least:
                best, least = k, cost[k]
        out[r] = best


@kernel
def intervals(table, index, out):  # type: ignore[no-untyped-def]
    """Cumulative frequency and frequency of the chosen symbols: out (2, n) int32."""
    for r in range(len(index)):
        low = np.int32(0)
        for k in range(index[r]):
            low += table[r, k]
        out[0, r], out[1, r] = low, table[r, index[r]]
