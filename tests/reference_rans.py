"""A second decoder, written from section 7 of the format specification: whole numbers only, no library.

It is slow on purpose. The product must agree with it on every payload and every table.
"""

import math
from collections.abc import Iterable, Sequence


def bits(frequencies: Iterable[int]) -> float:
    """Ideal length of symbols with these frequencies out of 2**20."""
    return math.fsum(20 - math.log2(frequency) for frequency in frequencies)


def decode(payload: bytes, tables: Sequence[Sequence[int]]) -> tuple[list[int], bool]:
    """One index for each table u_0 .. u_(K-1), and whether the payload is then used up."""
    words = [int.from_bytes(payload[at : at + 4], "little") for at in range(0, len(payload), 4)]
    x = 0
    indices = []
    for u in tables:
        while x < 2**32 and words:
            x = 2**32 * x + words.pop()
        s = x % 2**24
        k = c = 0
        while s >= 16 * (c + u[k]):
            c += u[k]
            k += 1
        x = 16 * u[k] * (x // 2**24) + s - 16 * c
        indices.append(k)
    return indices, x == 0 and not words
