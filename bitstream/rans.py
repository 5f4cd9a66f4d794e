"""rANS: symbols, given by their intervals, to the words of a lane; lanes to a payload, and back.

The bits are specified in section 7 of `bitstream.container`; constriction computes them, `kernels` reads them. Of each
table the encoder needs only the interval of its symbol: cumulative = u_0 + ... + u_(k-1), and frequency = u_k, of a sum
of 2**20.

Why no probability is ever rounded: given weights p_k, ``Categorical(perfect=False)`` puts the left edge of
column k at floor(scale * (p_0 + ... + p_(k-1))) + k, in units of 2**-24, with scale = (2**24 - K) / sum(p).
With p_k = 16 u_k - 1 the scale is exactly 1 and the edge is at 16 (u_0 + ... + u_(k-1)), our integers. All
these numbers are whole and at most 2**24, hence exact in float32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from bitstream.container import parse_varint, varint
from bitstream.errors import DamagedError
from bitstream.exact import TABLE_TOTAL

_CODER_TOTAL = 1 << 24
_RATIO = _CODER_TOTAL // TABLE_TOTAL
_TABLES = stream.model.Categorical(perfect=False)
_BLOCK = 1 << 16  # symbols per call: bounds the memory of `Encoder.finish`, and costs no speed


class Encoder:
    """Collects a lane's symbols in coding order; the bytes come at the end, because rANS is last in, first out.

    Memory: 8 bytes per symbol.
    """

    def __init__(self) -> None:
        self._intervals: list[NDArray[np.int32]] = []

    def push(self, cumulative: NDArray[np.integer[Any]], frequency: NDArray[np.integer[Any]]) -> None:
        """Append symbols by their intervals.

        cumulative, frequency: (N,) integers, cumulative >= 0, frequency in 1..2**20 - 1, their sum <= 2**20.
        ValueError for other intervals, TypeError for floats.
        """
        cumulative, frequency = np.asarray(cumulative), np.asarray(frequency)
        if cumulative.dtype.kind not in "iu" or frequency.dtype.kind not in "iu":
            raise TypeError(f"intervals must be integers, not {cumulative.dtype} and {frequency.dtype}")
        if cumulative.ndim != 1 or cumulative.shape != frequency.shape:
            raise ValueError(f"intervals must be (N,) and (N,), not {cumulative.shape} and {frequency.shape}")
        fits = (cumulative >= 0) & (frequency >= 1) & (frequency < TABLE_TOTAL)
        if not (fits & (cumulative <= TABLE_TOTAL - frequency.astype(np.int64))).all():
            raise ValueError("an interval is empty, all of 0..2**20, or not within 0..2**20")
        self._intervals.append(np.stack([cumulative, frequency]).astype(np.int32))

    def finish(self) -> bytes:
        """The words of all symbols pushed so far, none if there are none. Does not change the encoder."""
        coder = stream.stack.AnsCoder()
        for low, size in reversed(self._intervals):
            for stop in range(len(low), 0, -_BLOCK):
                block = slice(max(0, stop - _BLOCK), stop)
                symbols, tables = _three_columns(low[block], size[block])
                coder.encode_reverse(symbols, _TABLES, tables)
        return bytes(coder.get_compressed().astype("<u4").tobytes())


def join(lanes: Sequence[bytes]) -> bytes:
    """The payload of a grid from the words of its lanes."""
    return b"".join([*(varint(len(lane) // 4) for lane in lanes[:-1]), *lanes])


def split(payload: bytes, lanes: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The inverse of ``join``: all words, those of lane n from bounds[n] to bounds[n + 1].

    Raises DamagedError for bytes that no encoder writes: lengths that do not fit, no whole words, a last word of 0.
    """
    data, at, lengths = memoryview(payload), 0, []
    for _ in range(lanes - 1):
        length, at = parse_varint(data, at)
        lengths.append(length)
    size, known = len(data) - at, 4 * sum(lengths)
    if size % 4 or size < known:
        raise DamagedError(f"an index grid has {size} bytes of words, its lanes but the last one {known}: damaged file")
    words = np.frombuffer(data[at:], "<u4").astype(np.uint32)
    bounds = np.cumsum([0, *lengths, (size - known) // 4])
    if any(end > start and words[end - 1] == 0 for start, end in zip(bounds, bounds[1:], strict=False)):
        raise DamagedError("a lane of an index grid ends in a zero word: the file is damaged")
    return words, bounds


def finish(states: Sequence[int], words: Sequence[int]) -> None:
    """Raises DamagedError unless no lane has anything left: states are 0, and so are the numbers of words left."""
    left = sum(x.bit_length() for x in states) + 32 * sum(words)
    if left or any(words):
        raise DamagedError(f"{left} bits are left after the last index: the file is damaged")


def _three_columns(low: NDArray[np.int32], size: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Symbols (N,) and tables (N, 3) that have the given intervals, so that they give the same words.

    Of a table the coder sees nothing but the symbol's interval, so all columns below it can be one, and all
    above it. A column cannot be empty: where the interval touches one end, the rest is cut into two columns,
    half a unit from the interval.
    """
    left, right = _RATIO * low, _RATIO * (low + size)
    first, last = left == 0, right == _CODER_TOTAL
    cut = np.where(first, right, np.where(last, left - _RATIO // 2, left))
    next_cut = np.where(first, right + _RATIO // 2, np.where(last, left, right))
    tables = np.stack([cut, next_cut - cut, _CODER_TOTAL - next_cut], axis=1).astype(np.float32) - 1
    return 1 - first.astype(np.int32) + last.astype(np.int32), tables
