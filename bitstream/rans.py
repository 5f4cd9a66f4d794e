"""rANS: indices and integer tables to payload bytes, and back.

The bits are specified in section 7 of `bitstream.container`; constriction computes them. A table is a row of
K >= 2 frequencies u_k >= 1 with sum 2**20, a symbol is a column of it. Of each table the encoder needs only
the interval of its symbol: cumulative = u_0 + ... + u_(k-1), and frequency = u_k.

Why no probability is ever rounded: given weights p_k, ``Categorical(perfect=False)`` puts the left edge of
column k at floor(scale * (p_0 + ... + p_(k-1))) + k, in units of 2**-24, with scale = (2**24 - K) / sum(p).
With p_k = 16 u_k - 1 the scale is exactly 1 and the edge is at 16 (u_0 + ... + u_(k-1)), our integers. All
these numbers are whole and at most 2**24, hence exact in float32.
"""

from typing import Any

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from bitstream.errors import DamagedError

TOTAL_BITS = 20

_TOTAL = 1 << TOTAL_BITS
_CODER_TOTAL = 1 << 24
_RATIO = _CODER_TOTAL // _TOTAL
_TABLES = stream.model.Categorical(perfect=False)
_BLOCK = 1 << 16  # symbols per call: bounds the memory of `Encoder.finish`, and costs no speed


class Encoder:
    """Collects symbols in coding order; the bytes come at the end, because rANS is last in, first out.

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
        low, size = cumulative.astype(np.int64), frequency.astype(np.int64)
        if not ((low >= 0) & (size >= 1) & (size < _TOTAL) & (size <= _TOTAL - low)).all():
            raise ValueError("an interval is empty, all of 0..2**20, or not within 0..2**20")
        self._intervals.append(np.stack([low, size]).astype(np.int32))

    def finish(self) -> bytes:
        """The payload of all symbols pushed so far, empty if there are none. Does not change the encoder."""
        coder = stream.stack.AnsCoder()
        for low, size in reversed(self._intervals):
            for stop in range(len(low), 0, -_BLOCK):
                block = slice(max(0, stop - _BLOCK), stop)
                symbols, tables = _three_columns(low[block], size[block])
                coder.encode_reverse(symbols, _TABLES, tables)
        return bytes(coder.get_compressed().astype("<u4").tobytes())


class Decoder:
    """The inverse of Encoder.

    Requirement: a call of `finish` at the end. A damaged payload decodes to wrong symbols without complaint:
    `finish` notices most damage, the file's checksum the rest.
    """

    def __init__(self, payload: bytes) -> None:
        """Raises DamagedError for bytes that no encoder writes: not whole words, or a last word of 0."""
        if len(payload) % 4:
            raise DamagedError(f"an index grid has {len(payload)} bytes, not whole words: damaged file")
        words = np.frombuffer(payload, "<u4").astype(np.uint32)
        if words.size and words[-1] == 0:
            raise DamagedError("an index grid ends in a zero word: the file is damaged")
        self._coder = stream.stack.AnsCoder(words)

    def pop(self, frequencies: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The next N symbols.

        frequencies: (N, K) integers, K >= 2, entries >= 1, rows sum to 2**20.  Returns (N,) int64 in 0..K-1.
        ValueError for other shapes, TypeError for floats; that entries and sums are right is the caller's duty, it
        would cost as much time as the decoding.  Never fails because of the payload.
        """
        if frequencies.dtype.kind not in "iu":
            raise TypeError(f"frequencies must be integers, not {frequencies.dtype}")
        if frequencies.ndim != 2 or frequencies.shape[1] < 2:
            raise ValueError(f"frequencies must be (N, K) with K >= 2, not {frequencies.shape}")
        # C order matters: constriction takes the memory as it lies, and would misread a transposed array.
        tables = frequencies.astype(np.float32, order="C")
        tables *= _RATIO
        tables -= 1
        return np.asarray(self._coder.decode(_TABLES, tables), np.int64)

    def finish(self) -> None:
        """Raises DamagedError unless all of the payload is used up."""
        if not self._coder.is_empty():
            left = self._coder.num_valid_bits()
            raise DamagedError(f"{left} bits are left after the last index: the file is damaged")


def bits(frequency: NDArray[np.integer[Any]]) -> float:
    """Ideal code length, in bits, of symbols with these frequencies out of 2**20."""
    return float(TOTAL_BITS * frequency.size - np.log2(frequency).sum())


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
