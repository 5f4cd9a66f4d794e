"""The walk over a grid and the condition, compiled by numba: whole numbers only, but for the encoder's choice.

Vectors of channels lie in multiples of 16 (``products.UNIT``), zeros where there are no more. An activation a is the
byte a + 128: so it is what ``add_product`` takes, biases are made to fit, and 128 stands for zero. ``t`` is a wave,
``i`` a row of the grid, and cell (i, t - 2 i) belongs to the wave. Rings keep the last ``WAVES`` waves, a row i at i
modulo their size.

What bounds the indices, as numba checks none (but with NUMBA_BOUNDSCHECK=1, as in ``.ci/run``):

- Cells: ``run`` takes rows top .. bottom of a wave, all of whose cells are in the grid; neighbours are compared with
  the grid before they are read; everything in a ring is taken modulo its size. Rows of a ``Room`` are less than CHUNK.
- Channels: ``prior.Prior`` lays out layers and codes, ``walk`` makes ``Walk``, ``Room`` and the condition from the same
  ``Model``, so that each layer's outputs and each loop over channels fit what they are written to. ``weights.Weights``
  has compared every tensor with the configuration before. ``add_product``, ``copy`` and ``fill`` check themselves.
- Tables: logits and scores are clipped last, so that distances in POWERS are 0 .. 2 LOGIT_MAX, and flags, with
  LOGIT_MAX added, are in their tables.
- Symbols: ``symbol`` gives outcomes 0 .. N - 1 whatever the payload, ``_choose`` indices 0 .. K + 1, the last with
  escape alone; entries of escapes have 7 bits, or are clipped. A row of codes has K + 1.
- Words and intervals: their numbers are compared with what there is.
"""

import contextlib
import functools
import hashlib
import zlib
from pathlib import Path
from pickle import dumps, loads
from typing import Annotated, Any, NamedTuple

import numpy as np
from numba import types
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, InTreeCacheLocator

from bitstream.exact import (
    ACTIVATION_MAX,
    AROUND,
    ATTENTION_ROWS,
    ATTENTION_WAVES,
    CAUSAL,
    CONDITION_BLOCKS,
    ESCAPE_BITS,
    ESCAPE_SIDE,
    ESCAPE_STEP,
    GATE_MAX,
    LOGIT_MAX,
    POWERS,
    STREAM_MAX,
    TABLE_BITS,
    TABLE_TOTAL,
)
from bitstream.products import (
    INTERPRETED,
    LEAN,
    add_product,
    clip,
    copy,
    fill,
    function,
    inlined,
    njit,
    publish,
    published,
)
from bitstream.records import type_of

ZERO = 128  # the byte of an activation of zero
WAVES = 4  # in a ring: this one and three back
CHUNK = 32  # rows whose features are computed together: enough for the products, little enough for a cache
BLOCK = 128  # cells a side of what the condition computes at once: enough for the margin to cost little
CONDITION_COLUMNS = 3 * BLOCK  # of each row that are kept: at any time the walk is in no more than three blocks of it
SPINS = 4000  # looks at the other threads, some 20 microseconds, before the walk goes back to Python to sleep
_NEIGHBOURS = np.array([(i, j, -2 * i - j) for i, j in CAUSAL])  # rows, columns, and waves back
_AROUND = np.array(AROUND)
_SIDES = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
_LATTICE = ESCAPE_STEP * 4  # one step of an escape's entry, as an activation

_U24, _U32, _MASK24 = np.uint64(24), np.uint64(32), np.uint64(2**24 - 1)
_START, _LOW_WORD = np.uint64(0), np.uint64(2**32)
_ESCAPE_SIZE, _ESCAPE_SHIFT = np.int64(1 << TABLE_BITS - ESCAPE_BITS), np.uint64(24 - ESCAPE_BITS)


def _flag_table() -> "tuple[np.ndarray, np.ndarray]":
    """Frequency of outcome 0, null, and bits of both outcomes, by a flag's logit + LOGIT_MAX."""
    s = np.arange(-LOGIT_MAX, LOGIT_MAX + 1)
    w = np.stack([POWERS[np.maximum(s, 0)], POWERS[np.maximum(-s, 0)]]).astype(np.int64)
    one = 1 + (TABLE_TOTAL - 2) * w[1] // w.sum(0)
    null = TABLE_TOTAL - one  # its own share, and what the sum lacks
    bits = TABLE_BITS - np.log2(np.stack([null, one], 1))
    return null.astype(np.int32), bits.astype(np.float32)


_NULL, _FLAG_BITS = _flag_table()


# --- compiling, and keeping what is compiled ---


class _BesideSource(InTreeCacheLocator):
    """The last resort, where no folder may be written to: what lies there can still be read."""

    @classmethod
    def from_function(cls, function: Any, file: str) -> "_BesideSource":
        return cls(function, file)


class _CheckedImpl(CompileResultCacheImpl):
    """Compiled code with a checksum: damaged code would crash, or worse, decode something else.

    sources: a hash of what was compiled, with which the checksum begins. numba writes the index first, then the code,
    under a number that older code may have had: if it is stopped in between, that would pass for the new one.
    """

    _locator_classes = [*CompileResultCacheImpl._locator_classes, _BesideSource]
    sources = b""

    def reduce(self, compiled: Any) -> Any:
        data = dumps(super().reduce(compiled))
        return zlib.crc32(data, zlib.crc32(self.sources)), data

    def rebuild(self, context: Any, payload: Any) -> Any:
        checksum, data = payload
        if zlib.crc32(data, zlib.crc32(self.sources)) != checksum:
            raise ValueError("damaged, or of other sources")
        return super().rebuild(context, loads(data))


class _Cache(FunctionCache):
    """numba's cache of compiled code, but nothing that is wrong with it is an error: then it compiles.

    What was compiled at installation lies beside the source. It is found there even if numba, which may not write
    there, has the user's folder for its own.
    """

    _impl_class = _CheckedImpl

    def __init__(self, function: Any, lean: bool) -> None:
        """lean: compiled with ``LEAN``."""
        super().__init__(function)
        self._lean = lean
        # numba looks at this file's time alone, which says little after an update, and nothing of the files below.
        file, base = function.__code__.co_filename, self._impl.filename_base
        self._cache_file = IndexDataCacheFile(self._cache_path, base, _sources(file))
        self._installed = IndexDataCacheFile(str(Path(file).with_name("__pycache__")), base, _sources(file))
        self._impl.sources = _sources(file).encode()

    def load_overload(self, signature: Any, context: Any) -> Any:
        for file in (self._cache_file, self._installed):
            try:
                if not self._lean:
                    context.refresh()  # imports all that compiling needs: ten times as long as loading
                data = file.load(self._index_key(signature, context.codegen()))
                if data is not None:
                    return self._impl.rebuild(context, data)
            except Exception:
                continue
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        for attempt in range(2):
            try:
                return super().save_overload(signature, compiled)
            except Exception:  # a damaged index, perhaps: start a new one
                if attempt == 0:
                    self._forget()

    def _forget(self) -> None:
        try:
            self.flush()
        except Exception:
            self.disable()

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return (*super()._index_key(signature, codegen), getattr(config, "BOUNDSCHECK", None))


@functools.cache  # of what is imported, whatever happens to the files
def _sources(file: str) -> str:
    """Of a file with kernels and of the files below."""
    below = (Path(__file__).with_name(name) for name in ("exact.py", "products.py", "records.py", "kernels.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (Path(file), *below))).hexdigest()


# Places of layers in a ``Network``. Not plain numbers: numba would compile a function for each of them.
_EMBED, _QUERY, _KEY_VALUE, _ATTENTION_GATE, _BLOCKS = map(np.int64, range(5))
_NONE, _ONE = np.int64(0), np.int64(1)


def kernel(function: Any, **options: Any) -> Any:
    """Compiled when first called, and kept on disk where there is a place for it. options: more of numba's."""
    compiled = njit(function, nogil=True, error_model="numpy", **options)
    if not INTERPRETED:
        # With a numba that keeps things in another way: compile each time.
        with contextlib.suppress(Exception):
            compiled._cache = _Cache(function, lean=LEAN.items() <= options.items())
    return compiled


# To save seconds of compiling, integers that functions take are of one type: they are compiled once for all callers.
def _kernel(function: Any) -> Any:
    return kernel(function, **LEAN)


# --- what the kernels are given: records, see ``records.pack`` ---


class Network(NamedTuple):
    """A prior's layers at one quality level. Layer k has ``layers[k]``: where its weights begin, where its biases and
    shifts begin, its inputs, its outputs (all padded). A sum with its bias, shifted right, is rounded to its unit."""

    weight: Annotated[Any, np.int8, 1]  # (bytes,)
    bias: Annotated[Any, np.int32, 1]  # (outputs of all layers,)
    shift: Annotated[Any, np.int32, 1]  # the same
    layers: Annotated[Any, np.int64, 2]  # (layers, 4)


class Model(NamedTuple):
    """The rest of a prior. Widths of one vector: channels, codes (of a cell), attention, flags, hidden, outcomes; and
    their sizes in memory. Positions of layers in ``Network``."""

    groups: int
    dim: int
    outcomes: int
    escape: bool
    blocks: int
    attention_after: int  # blocks, or -1
    heads: int
    head_channels: int
    head_layers: int  # the first layer of the heads: flag_hidden, then flag_out, then three for each group
    channels: int  # from here on sizes in memory
    codes: int
    attention: int
    flags: int  # of one group
    hidden: int
    position: Annotated[Any, np.int32, 3]  # (heads, ATTENTION_ROWS, ATTENTION_WAVES)
    activations: Annotated[Any, np.int8, 3]  # (M, K + 1, d), of null first
    vectors: Annotated[Any, np.float32, 3]  # (M, d, K), of the codes alone


class Walk(NamedTuple):
    """A walk over one grid, shared by its threads."""

    height: int
    width: int
    published: Annotated[Any, np.int64, 2]  # (parts, 8): each part's next wave; apart in memory for the cache
    condition: Annotated[Any, np.int16, 3]  # (h, columns, C) stream units, or of no rows
    code_ring: Annotated[Any, np.uint8, 3]  # (WAVES, rows, codes)
    rings: Annotated[Any, np.uint8, 4]  # (blocks, WAVES, rows, channels)
    keys: Annotated[Any, np.int8, 3]  # (rows, ATTENTION_WAVES and this one, attention)
    values: Annotated[Any, np.int8, 3]  # the same
    grid: Annotated[Any, np.uint16, 3]  # (M, h, w), zeros where nothing is decoded yet
    bits: Annotated[Any, np.float32, 3]  # (M, h, w): gets the bits of each index; or of no groups


class Room(NamedTuple):
    """Memory of one thread: CHUNK rows of each for the features, then one row of each for a cell."""

    taps: Annotated[Any, np.uint8, 2]
    narrow: Annotated[Any, np.uint8, 2]
    known: Annotated[Any, np.uint8, 2]  # features, then the codes of the cell so far
    seen: Annotated[Any, np.uint8, 2]  # what attention reads, then the codes
    sums: Annotated[Any, np.int32, 2]
    units: Annotated[Any, np.int32, 2]  # sums of the flags' hidden units
    stream: Annotated[Any, np.int32, 2]
    query: Annotated[Any, np.int8, 2]
    score: Annotated[Any, np.int32, 1]  # (window,)
    place: Annotated[Any, np.int32, 2]  # (window, 2)
    weighted: Annotated[Any, np.int64, 1]  # (head_channels,)
    flag: Annotated[Any, np.int32, 2]  # (1, M): sums of the flags
    unit: Annotated[Any, np.uint8, 2]  # (1, flags)
    hidden: Annotated[Any, np.uint8, 2]  # (1, hidden)
    hidden_sums: Annotated[Any, np.int32, 2]  # (1, hidden)
    logits: Annotated[Any, np.int32, 2]  # (1, outcomes)
    frequencies: Annotated[Any, np.int32, 1]  # (outcomes,)
    distance: Annotated[Any, np.float32, 1]  # (K,)
    code: Annotated[Any, np.uint8, 2]  # (1, 2 d): activations of a code, and zeros
    entry: Annotated[Any, np.int64, 1]  # (d,): of an escape


class ConditionRoom(NamedTuple):
    """Memory of one thread for the condition: rows and columns of a block with what it reaches, and a margin of 1."""

    cells: Annotated[Any, np.uint8, 3]  # (rows + 2, columns + 2, depth)
    read: Annotated[Any, np.uint8, 3]  # (rows + 2, columns + 2, width)
    stream: Annotated[Any, np.int32, 3]  # (rows, columns, width)
    taps: Annotated[Any, np.uint8, 2]
    narrow: Annotated[Any, np.uint8, 2]
    sums: Annotated[Any, np.int32, 2]


class Coder(NamedTuple):
    """Lanes: words that are read, and intervals that are to be written; ``state`` and ``place`` have 64 bytes each."""

    encode: bool
    state: Annotated[Any, np.uint64, 2]  # (lanes, 8): x
    place: Annotated[Any, np.int64, 2]  # (lanes, 8): word behind the next, first word, count of intervals
    words: Annotated[Any, np.uint32, 1]  # (words,)
    intervals: Annotated[Any, np.int32, 3]  # (lanes, 2, room): cumulative frequency and frequency
    latents: Annotated[Any, np.float32, 3]  # (h, w, M d)
    rate_weights: Annotated[Any, np.float64, 2]  # (h, w)
    channels: Annotated[Any, np.float32, 1]  # (M d,), see walk.Diffusion
    cells: Annotated[Any, np.float32, 2]  # (h, w), or of no rows
    temperature: float


# --- layers ---


@function
def _layer(net, k, x, n, sums):  # type: ignore[no-untyped-def]
    """sums[:n] = the sums of layer k of x[:n], biases included."""
    at, first, inputs, outputs = net.layers[k]
    bias = net.bias[first : first + outputs]
    for r in range(n):
        row = sums[r]
        for o in range(outputs):
            row[o] = bias[o]
    add_product(x, n, inputs, net.weight, at, outputs, sums, _NONE)


@function
def _activate(net, k, sums, n, low, out):  # type: ignore[no-untyped-def]
    """Sums of layer k, rounded, as activations from low up."""
    first, outputs = net.layers[k, 1], net.layers[k, 3]
    shift = net.shift[first : first + outputs]
    least = np.int32(low)
    for r in range(n):
        row, target = sums[r], out[r]
        for o in range(outputs):
            # The mask tells LLVM that 32 bits are enough for the shift.
            x = np.int32(row[o] >> (np.uint32(shift[o]) & np.uint32(31)))
            target[o] = np.uint8(clip(x, least, ACTIVATION_MAX) + np.int32(ZERO))


@function
def _round(net, k, sums, n, out):  # type: ignore[no-untyped-def]
    """Sums of layer k, rounded and clipped to the stream's range, which is that of the logits too."""
    first, outputs = net.layers[k, 1], net.layers[k, 3]
    shift = net.shift[first : first + outputs]
    for r in range(n):
        row, target = sums[r], out[r]
        for o in range(outputs):
            x = np.int32(row[o] >> (np.uint32(shift[o]) & np.uint32(31)))
            target[o] = clip(x, -STREAM_MAX, STREAM_MAX)


@function
def _add_gated(net, k, sums, n, stream):  # type: ignore[no-untyped-def]
    """Layer k's sums: values, then gates; their products are in units of 2^-11, a quarter of the stream's."""
    first, width = net.layers[k, 1], net.layers[k, 3] // 2
    shift = net.shift[first : first + 2 * width]
    for r in range(n):
        row, target = sums[r], stream[r]
        for o in range(width):
            value = np.int32(row[o] >> (np.uint32(shift[o]) & np.uint32(31)))
            value = clip(value, -ACTIVATION_MAX, ACTIVATION_MAX)
            gate = np.int32(row[width + o] >> (np.uint32(shift[width + o]) & np.uint32(31)))
            gate = clip(gate, 0, GATE_MAX)
            x = np.int32(np.int32(np.int32(4) * target[o] + np.int32(value * gate) + np.int32(2)) >> np.uint32(2))
            target[o] = clip(x, -STREAM_MAX, STREAM_MAX)


@function
def _read(stream, n, out):  # type: ignore[no-untyped-def]
    """Stream values as activations, in the first columns of out."""
    for r in range(n):
        row, target = stream[r], out[r]
        for c in range(len(row)):
            x = np.int32(np.int32(row[c] + np.int32(8)) >> np.uint32(4))
            x = clip(x, -ACTIVATION_MAX, ACTIVATION_MAX)
            target[c] = np.uint8(x + np.int32(ZERO))


# --- features ---


@function
def _gather(ring, t, i, step, n, width, out, column):  # type: ignore[no-untyped-def]
    """Neighbours side by side, of rows i, i + step, ...: ring (WAVES, rows, C) -> out[:n, column : column + 4 C].

    Rows of the ring: as many as a wave can have, or more, so that each has a place of its own.
    """
    rows, channels = ring.shape[1], ring.shape[2]
    for r in range(n):
        target, at = out[r], column
        for k in range(len(_NEIGHBOURS)):
            above, beside = i + _NEIGHBOURS[k, 0], t - 2 * i + _NEIGHBOURS[k, 1]
            if above < 0 or beside < 0 or beside >= width:
                fill(target, at, channels, ZERO)
            else:
                copy(target, at, ring[(t - _NEIGHBOURS[k, 2]) % WAVES, above % rows], _NONE, channels)
            at += channels
        i += step


@function
def _keep(ring, t, i, step, n, values, column):  # type: ignore[no-untyped-def]
    """values[:n, column : column + C] become this wave's entries of the ring."""
    for r in range(n):
        target = ring[t % WAVES, (i + r * step) % ring.shape[1]]
        copy(target, _NONE, values[r], column, len(target))


@function
def _features(net, model, walk, room, t, i, step, n):  # type: ignore[no-untyped-def]
    """Of rows i, i + step, ...: ``room.known`` gets the features, and no codes yet; ``room.units`` their share of the
    flags' hidden units."""
    channels, stream = model.channels, room.stream
    _gather(walk.code_ring, t, i, step, n, walk.width, room.taps, _NONE)
    _layer(net, _EMBED, room.taps, n, room.sums)
    _round(net, _EMBED, room.sums, n, stream)
    if len(walk.condition):
        columns = walk.condition.shape[1]
        for r in range(n):
            row, target = i + r * step, stream[r]
            given = walk.condition[row, (t - 2 * row) % columns]
            for c in range(channels):
                x = np.int32(target[c] + given[c])
                target[c] = clip(x, -STREAM_MAX, STREAM_MAX)
    for b in range(model.blocks):
        if b == model.attention_after:
            _attend(net, model, walk, room, t, i, step, n)
        _read(stream, n, room.taps)
        _gather(walk.rings[b], t, i, step, n, walk.width, room.taps, channels)
        _keep(walk.rings[b], t, i, step, n, room.taps, _NONE)
        _layer(net, _BLOCKS + 2 * b, room.taps, n, room.sums)
        _activate(net, _BLOCKS + 2 * b, room.sums, n, _NONE, room.narrow)
        _layer(net, _BLOCKS + 2 * b + 1, room.narrow, n, room.sums)
        _add_gated(net, _BLOCKS + 2 * b + 1, room.sums, n, stream)
    _read(stream, n, room.known)
    for r in range(n):
        fill(room.known[r], channels, model.codes, ZERO)
    _layer(net, model.head_layers, room.known, n, room.units)


@function
def _attend(net, model, walk, room, t, i, step, n):  # type: ignore[no-untyped-def]
    """Exact softmax attention, base 2, of each row's cell to the cells of its window, with a silent key of score 0."""
    size = model.head_channels
    _read(room.stream, n, room.seen)
    _layer(net, _QUERY, room.seen, n, room.sums)
    _activate(net, _QUERY, room.sums, n, -ACTIVATION_MAX, room.narrow)
    score, place, weighted, query = room.score, room.place, room.weighted, room.query
    for r in range(n):
        row = i + r * step
        source, target = room.narrow[r], query[r]
        for c in range(model.attention):
            target[c] = np.int8(np.int32(source[c]) - np.int32(ZERO))
        for head in range(model.heads):
            start, count, top = head * size, 0, 0
            for up in range(min(ATTENTION_ROWS, row + 1)):
                for age in range(1, ATTENTION_WAVES + 1):
                    column = t - age - 2 * (row - up)
                    if column < 0 or column >= walk.width:
                        continue
                    ring, slot = (row - up) % walk.keys.shape[0], (t - age) % walk.keys.shape[1]
                    key, dot = walk.keys[ring, slot], np.int32(0)
                    for c in range(start, start + size):
                        dot = np.int32(dot + np.int32(target[c]) * np.int32(key[c]))
                    # Products are in units of 2^-10; half of them, as logits, in units of 2^-5.
                    s = ((dot + 32) >> 6) + model.position[head, up, age - 1]
                    s = clip(s, -LOGIT_MAX, LOGIT_MAX)
                    score[count], place[count, 0], place[count, 1] = (
                        s,
                        ring,
                        slot,
                    )  # count: less than the window's cells
                    top = max(top, s)
                    count += 1
            total = np.int64(POWERS[top])
            for c in range(size):
                weighted[c] = 0
            for k in range(count):
                weight = np.int64(POWERS[top - score[k]])
                if weight:
                    total += weight
                    value = walk.values[place[k, 0], place[k, 1]]
                    for c in range(size):
                        weighted[c] += weight * np.int64(value[start + c])
            out = room.narrow[r]
            for c in range(size):
                out[start + c] = np.uint8((2 * weighted[c] + total) // (2 * total) + ZERO)
    _layer(net, _ATTENTION_GATE, room.narrow, n, room.sums)
    _add_gated(net, _ATTENTION_GATE, room.sums, n, room.stream)


@function
def _keep_attention(net, model, walk, room, t, i, step, n):  # type: ignore[no-untyped-def]
    """When all groups are known: keys and values of this wave's cells."""
    channels, width = model.channels, model.attention
    for r in range(n):
        copy(room.seen[r], channels, room.known[r], channels, model.codes)
    _layer(net, _KEY_VALUE, room.seen, n, room.sums)
    _activate(net, _KEY_VALUE, room.sums, n, -ACTIVATION_MAX, room.taps)
    for r in range(n):
        row, slot, known = (i + r * step) % walk.keys.shape[0], t % walk.keys.shape[1], room.taps[r]
        for c in range(width):
            walk.keys[row, slot, c] = np.int8(np.int32(known[c]) - np.int32(ZERO))
            walk.values[row, slot, c] = np.int8(np.int32(known[width + c]) - np.int32(ZERO))


# --- symbols ---


@function
def table(logits, n, frequencies):  # type: ignore[no-untyped-def]
    """Section 6: frequencies[:n] (int32) of logits[:n] in units, each >= 1, their sum 2^20."""
    top = logits[0]
    for k in range(n):
        top = max(top, logits[k])
    total = np.int64(0)
    for k in range(n):
        weight = POWERS[top - logits[k]]
        frequencies[k] = weight
        total += weight
    # The quotient factor * weight / total is whole, or at least 1 / total below the next whole number. Computed from a
    # rounded factor / total it is off by less than 2^-11 / total, as factor * weight is below 2^40: with 2^-6 / total
    # added it falls on the right side of every whole number.
    quotient, nudge = np.float64(TABLE_TOTAL - n) / np.float64(total), np.float64(2.0**-6) / np.float64(total)
    given = np.int32(0)
    for k in range(n):
        u = np.int32(np.int32(np.float64(frequencies[k]) * quotient + nudge) + np.int32(1))
        frequencies[k] = u
        given = np.int32(given + u)
    frequencies[0] += np.int32(TABLE_TOTAL - given)


@inlined
def refill(x, words, place):  # type: ignore[no-untyped-def]
    """Section 7: words of the lane, from its end, until the state is large enough or there are no more.

    place: the word behind the next, the first word; both from ``rans.split``, which has compared them with the words.
    """
    while x < _LOW_WORD and place[0] > place[1]:
        place[0] -= 1
        x = (x << _U32) | np.uint64(words[place[0]])
    return x


@inlined
def narrowed(x, low, size):  # type: ignore[no-untyped-def]
    """The state after a symbol of this interval, in units of 2^-24 (uint64)."""
    return size * (x >> _U24) + (x & _MASK24) - low


@inlined
def symbol(x, frequencies, n):  # type: ignore[no-untyped-def]
    """Section 7: the symbol in state x, and its cumulative frequency."""
    s = np.int64(x & _MASK24) >> 4
    k, low = 0, np.int64(0)
    while k < n - 1 and s >= low + frequencies[k]:
        low += frequencies[k]
        k += 1
    return k, low


@inlined
def _warmed(logit, temperature):  # type: ignore[no-untyped-def]
    """A logit at a temperature, clipped last."""
    return np.int32(min(max(np.rint(np.float64(logit) / temperature), -LOGIT_MAX), LOGIT_MAX))


@inlined
def _note(intervals, place, low, size):  # type: ignore[no-untyped-def]
    """An interval that the encoder is to write to a lane. There is room: ``run`` has made sure before the wave."""
    count = place[2]
    intervals[0, count], intervals[1, count] = low, size
    place[2] = count + 1


@function
def _outcomes(net, first, known, sums, hidden, logits, outcomes, temperature, frequencies):  # type: ignore[no-untyped-def]
    """Logits and frequencies of a group that is not null; its layers are first + 1 and first + 2."""
    _layer(net, first + 1, known, _ONE, sums)
    _activate(net, first + 1, sums, _ONE, _NONE, hidden)
    _layer(net, first + 2, hidden, _ONE, logits)
    _round(net, first + 2, logits, _ONE, logits)
    if temperature != 1.0:
        for k in range(outcomes):
            logits[0, k] = _warmed(logits[0, k], temperature)
    table(logits[0], outcomes, frequencies)


@inlined
def _lattice(z):  # type: ignore[no-untyped-def]
    """The nearest entry of an escape, 0 .. ESCAPE_SIDE - 1; of two the smaller."""
    near = np.ceil(np.float64(z) / ESCAPE_STEP - 0.5) + ESCAPE_SIDE // 2
    return np.int64(min(max(near, 0.0), np.float64(ESCAPE_SIDE - 1)))


@inlined
def _escape_value(a):  # type: ignore[no-untyped-def]
    """The entry's activation."""
    return clip((a - ESCAPE_SIDE // 2) * _LATTICE, -ACTIVATION_MAX, ACTIVATION_MAX)


@function
def _distances(z, vectors, out):  # type: ignore[no-untyped-def]
    """Squared distances of z (d,) from vectors (d, K): out[:K], and the least of them."""
    codes = vectors.shape[1]
    for k in range(codes):
        out[k] = 0
    for c in range(len(z)):
        x, row = z[c], vectors[c]
        for k in range(codes):
            out[k] += (x - row[k]) * (x - row[k])
    least = out[0]
    for k in range(codes):
        least = min(least, out[k])
    return least


@function
def _cell(net, model, walk, room, coder, r, i, j):  # type: ignore[no-untyped-def]
    """All groups of cell (i, j), whose features are in row r. ``index`` is in its row of codes wherever it is used for
    one: an escape's number comes last, and goes to the grid alone."""
    lane = i % len(coder.place)
    place, intervals, x = coder.place[lane], coder.intervals[lane], coder.state[lane, 0]
    known, units = room.known[r : r + 1], room.units[r : r + 1]
    groups, dim, flags, outcomes = model.groups, model.dim, model.flags, model.outcomes
    codes = model.activations.shape[1] - 1
    base = model.head_layers
    out_at, out_bias, _, out_width = net.layers[base + 1]
    unit_shift = net.shift[net.layers[base, 1] : net.layers[base, 1] + groups * flags]
    flag, unit, code, entry = room.flag, room.unit, room.code, room.entry
    sums, hidden, logits = room.hidden_sums, room.hidden, room.logits[0]
    frequencies, distance = room.frequencies, room.distance
    temperature = coder.temperature
    for o in range(out_width):
        flag[0, o] = net.bias[out_bias + o]
    for g in range(groups):
        first = base + 2 + 3 * g  # the group's layers: its codes' share of the units, hidden, out
        for f in range(flags):
            value = np.int32(units[0, g * flags + f] >> (np.uint32(unit_shift[g * flags + f]) & np.uint32(31)))
            unit[0, f] = np.uint8(clip(value, 0, ACTIVATION_MAX) + np.int32(ZERO))
        # Flags of earlier groups are read already: only what lies from here on counts.
        at = out_at + g * flags * out_width
        add_product(unit, _ONE, flags, net.weight, at, out_width, flag, g // 16 * 16)
        s = clip(flag[0, g] >> net.shift[out_bias + g], -LOGIT_MAX, LOGIT_MAX)
        if temperature != 1.0:
            s = _warmed(np.int32(s), temperature)
        null = np.int64(_NULL[s + LOGIT_MAX])
        index, outcome = 0, 0
        if coder.encode:
            z = coder.latents[i, j, g * dim : g * dim + dim]
            weight = coder.rate_weights[i, j]
            if len(coder.cells):
                for c in range(dim):
                    share = coder.channels[g * dim + c] * coder.cells[i, j]
                    if i:
                        z[c] += share * coder.latents[i - 1, j, g * dim + c]
                    if j:
                        z[c] += share * coder.latents[i, j - 1, g * dim + c]
            best, escaped = np.float64(0), np.float64(0)
            for c in range(dim):
                best += np.float64(z[c]) * np.float64(z[c])
            best += weight * _FLAG_BITS[s + LOGIT_MAX, 0]
            active = weight * _FLAG_BITS[s + LOGIT_MAX, 1]
            if best > active:
                least_cost = np.float64(_distances(z, model.vectors[g], distance))
                if model.escape:
                    for c in range(dim):
                        entry[c] = _lattice(z[c])
                        gap = np.float64(z[c]) - np.float64(ESCAPE_STEP * (entry[c] - ESCAPE_SIDE // 2))
                        escaped += gap * gap
                    escaped += weight * ESCAPE_BITS * dim
                    least_cost = min(least_cost, escaped)
                if best > active + least_cost:
                    _outcomes(net, first, known, sums, hidden, room.logits, outcomes, temperature, frequencies)
                    index = _choose(best - active, weight, distance, escaped, model.escape, codes, logits)
                    outcome = index - 1
                    for c in range(dim):  # what is left of the latents
                        if index > codes:
                            z[c] -= np.float32(ESCAPE_STEP * (entry[c] - ESCAPE_SIDE // 2))
                        elif index:
                            z[c] -= model.vectors[g, c, outcome]
            if index == 0:
                _note(intervals, place, _NONE, null)
            else:
                _note(intervals, place, null, TABLE_TOTAL - null)
                before = _NONE
                for k in range(outcome):
                    before += frequencies[k]
                _note(intervals, place, before, np.int64(frequencies[outcome]))
                if outcome == codes:
                    for c in range(dim):
                        _note(intervals, place, entry[c] * _ESCAPE_SIZE, _ESCAPE_SIZE)
        else:
            x = refill(x, coder.words, place)
            size = np.uint64(null) << np.uint64(4)
            if (x & _MASK24) < size:
                x = narrowed(x, _START, size)
            else:
                x = narrowed(x, size, np.uint64(2**24) - size)
                _outcomes(net, first, known, sums, hidden, room.logits, outcomes, temperature, frequencies)
                x = refill(x, coder.words, place)
                outcome, low = symbol(x, frequencies, outcomes)
                x = narrowed(x, np.uint64(low) << np.uint64(4), np.uint64(frequencies[outcome]) << np.uint64(4))
                index = outcome + 1
                if outcome == codes:
                    for c in range(dim):
                        x = refill(x, coder.words, place)
                        entry[c] = np.int64((x & _MASK24) >> _ESCAPE_SHIFT)
                        x = narrowed(x, np.uint64(entry[c]) << _ESCAPE_SHIFT, np.uint64(1) << _ESCAPE_SHIFT)
        if len(walk.bits):
            bits = np.float64(_FLAG_BITS[s + LOGIT_MAX, min(index, 1)])
            if index:
                bits += TABLE_BITS - np.log2(np.float64(frequencies[outcome]))
                if outcome == codes:
                    bits += dim * ESCAPE_BITS
            walk.bits[g, i, j] = bits
        if index:
            if outcome == codes:
                index = codes + 1
                scale = 1
                for c in range(dim - 1, -1, -1):
                    index += scale * entry[c]
                    scale *= ESCAPE_SIDE
            walk.grid[g, i, j] = index
            for c in range(dim):
                a = _escape_value(entry[c]) if outcome == codes else np.int64(model.activations[g, index, c])
                code[0, c] = a + ZERO
                known[0, model.channels + g * dim + c] = a + ZERO
            at, _, inputs, width = net.layers[first]
            add_product(code, _ONE, inputs, net.weight, at, width, units, (g + 1) * flags)
    coder.state[lane, 0] = x


@function
def _choose(null, weight, distance, escaped, escape, codes, logits):  # type: ignore[no-untyped-def]
    """The index of least cost, codes + 1 for an escape; null: the cost of index 0, less that of a flag that is not."""
    outcomes = codes + 1 if escape else codes
    top = logits[0]
    for k in range(outcomes):
        top = max(top, logits[k])
    total = np.int64(0)
    for k in range(outcomes):
        total += POWERS[top - logits[k]]
    # Bits of outcome k: log2 of the table's weights, and no more than the table's least frequency costs.
    share = np.log2(np.float64(total)) - TABLE_BITS
    index, best = 0, null
    for k in range(codes):
        cost = distance[k] + weight * min(share + (top - logits[k]) / 32.0, 20.0)
        if cost < best:
            index, best = k + 1, cost
    if escape:
        cost = escaped + weight * min(share + (top - logits[codes]) / 32.0, 20.0)
        if cost < best:
            index = codes + 1
    return index


# --- the condition ---


@function
def _around(cells, y, x, n, out):  # type: ignore[no-untyped-def]
    """Neighbours side by side: cells (h + 2, w + 2, C), a margin around -> out[:n] of cells (y, x), (y, x + 1), ..."""
    channels = cells.shape[2]
    for r in range(n):
        target, at = out[r], 0
        for k in range(len(_AROUND)):
            copy(target, at, cells[y + 1 + _AROUND[k, 0], x + r + 1 + _AROUND[k, 1]], _NONE, channels)
            at += channels


@_kernel
def condition(net, room, grid, activations, down, right, out):  # type: ignore[no-untyped-def]
    """The condition of a block of BLOCK x BLOCK cells from the next coarser grid (M, h, w) uint16 -> into out.

    out: (2 h, columns, C) int16 stream units; cell (i, j) at column j modulo their number. grid: of a walk, or checked:
    no more than the group's codes, or a number of an escape, of which any will do.
    """
    groups, h, w = grid.shape
    codes, dim = activations.shape[1] - 1, activations.shape[2]
    reach, side = 1 + CONDITION_BLOCKS, BLOCK // 2
    top, bottom = down * side, min(h, (down + 1) * side)
    left, end = right * side, min(w, (right + 1) * side)
    y0, y1, x0, x1 = max(0, top - reach), min(h, bottom + reach), max(0, left - reach), min(w, end + reach)
    rows, columns = y1 - y0, x1 - x0
    depth, width = net.layers[0, 2] // len(_AROUND), net.layers[0, 3]
    cells, read, stream, taps, narrow, sums = room.cells, room.read, room.stream, room.taps, room.narrow, room.sums
    for y in range(rows + 2):
        for x in range(columns + 2):
            fill(cells[y, x], _NONE, depth, ZERO)
            fill(read[y, x], _NONE, width, ZERO)
    for y in range(rows):
        for x in range(columns):
            for g in range(groups):
                index = np.int64(grid[g, y0 + y, x0 + x])
                for c in range(dim - 1, -1, -1):
                    if index <= codes:
                        a = np.int64(activations[g, index, c])
                    else:
                        a = _escape_value((index - codes - 1) // ESCAPE_SIDE ** (dim - 1 - c) % ESCAPE_SIDE)
                    cells[y + 1, x + 1, g * dim + c] = a + ZERO
    last = _ONE + 2 * CONDITION_BLOCKS
    channels = net.layers[last, 3] // len(_SIDES)
    for y in range(rows):
        for x in range(0, columns, CHUNK):
            n = min(CHUNK, columns - x)
            _around(cells, y, x, n, taps)
            _layer(net, _EMBED, taps, n, sums)
            _round(net, _EMBED, sums, n, stream[y, x : x + n])
    for b in range(CONDITION_BLOCKS):
        for y in range(rows):
            _read(stream[y], columns, read[y + 1, 1:])
        for y in range(rows):
            for x in range(0, columns, CHUNK):
                n = min(CHUNK, columns - x)
                _around(read, y, x, n, taps)
                _layer(net, 1 + 2 * b, taps, n, sums)
                _activate(net, 1 + 2 * b, sums, n, _NONE, narrow)
                _layer(net, 2 + 2 * b, narrow, n, sums)
                _add_gated(net, 2 + 2 * b, sums, n, stream[y, x : x + n])
    for y in range(top, bottom):
        for x in range(left, end, CHUNK):
            n = min(CHUNK, end - x)
            _read(stream[y - y0, x - x0 : x - x0 + n], n, narrow)
            _layer(net, last, narrow, n, sums)
            _round(net, last, sums, n, sums)
            for r in range(n):
                for k in range(len(_SIDES)):
                    target = out[2 * y + _SIDES[k, 0], (2 * (x + r) + _SIDES[k, 1]) % out.shape[1]]
                    for c in range(channels):
                        target[c] = sums[r, k * channels + c]


# --- the walk ---


@_kernel
def run(net, model, walk, coder, room, part, t, last):  # type: ignore[no-untyped-def]
    """Waves t to last - 1 of the rows i with i mod parts = part, as far as one gets without waiting long.

    Returns the next wave: the caller makes room for intervals, sleeps a little, and calls again. A wave needs what all
    parts have found in the waves before it. Lanes are a multiple of parts, so that a lane has one part.
    """
    h, w, parts = walk.height, walk.width, len(walk.published)
    most = model.groups * (2 + model.dim)  # intervals of a cell
    while t < last:
        for other in range(parts):
            spins = 0
            while published(walk.published[other]) < t:
                spins += 1
                if spins > SPINS:
                    return t
        top, bottom = max(0, (t - w + 2) // 2), min(h - 1, t // 2)
        i = top + (part - top) % parts
        if coder.encode:
            cells = (bottom - i) // len(coder.place) + 1  # at most, of any lane; ``walk.encode`` has room for these
            for lane in range(part, len(coder.place), parts):
                if coder.place[lane, 2] + cells * most > coder.intervals.shape[2]:
                    return t
        while i <= bottom:
            n = min(CHUNK, (bottom - i) // parts + 1)
            _features(net, model, walk, room, t, i, parts, n)
            for r in range(n):
                _cell(net, model, walk, room, coder, r, i + r * parts, t - 2 * (i + r * parts))
            _keep(walk.code_ring, t, i, parts, n, room.known, model.channels)
            if model.heads:
                _keep_attention(net, model, walk, room, t, i, parts, n)
            i += CHUNK * parts
        t += 1
        publish(walk.published[part], t)
    return t


def compile_ahead() -> None:
    """Compile all of this, and keep it where there is a place for it, as the first call would."""
    position = types.int64
    run.compile((*map(type_of, (Network, Model, Walk, Coder, Room)), position, position, position))
    grid, activations, out = (types.Array(kind, 3, "C") for kind in (types.uint16, types.int8, types.int16))
    condition.compile((*map(type_of, (Network, ConditionRoom)), grid, activations, position, position, out))
