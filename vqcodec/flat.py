"""Blocks of one exact colour: margins, pages, screens. What the networks only come near to, a few bytes make exact.

The content of a flat chunk is specified in bitstream/container.py, section 3. `find` and `paste` are inverse.
"""

import zlib

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bitstream.errors import DamagedError

Bytes = NDArray[np.uint8]

BLOCK = 8
MAX_COLOURS = 255
# What is worth it: a block costs 0.5 to 3 bits in pages and screens, but 5 bits and more where colours are many and
# scattered, and in photographs, where a few blocks are clipped or flat by chance.
LEAST_BLOCKS = 4  # of a colour
FIRST_BYTES, MOST_BITS = 8, 4  # what a picture of one colour takes at least, and then for each block
FADE = 4  # pixels from a flat block to where nothing of its correction is left
STRIP = 16 * BLOCK
# Blocks, from a flat one to others, so that what the networks make of it does not matter to these: 1 and 2 made pages
# and screens larger by up to 1.7 %.
DEEP = 3


def find(pixels: Bytes) -> bytes | None:
    """The content of a flat chunk for a picture (H, W, C), C planes coded; None if there is none worth its bytes.

    The most frequent colours, as many as are worth it: half of them again and again are left out.
    """
    firsts = pixels[::BLOCK, ::BLOCK]  # no block lacks its first pixel
    height, width, planes = pixels.shape
    equal = (pixels == _spread(firsts, height, width)).all(2)
    for axis, size in enumerate((height, width)):
        equal = np.logical_and.reduceat(equal, np.arange(0, size, BLOCK), axis)
    packed = firsts.astype(np.int32) @ (256 ** np.arange(planes, dtype=np.int32))
    found, which, counts = np.unique(packed[equal], return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_COLOURS]
    kept = order[counts[order] >= LEAST_BLOCKS]
    while len(kept):
        number_of = np.zeros(len(found), np.uint8)
        number_of[kept] = np.arange(1, len(kept) + 1)
        numbers = np.zeros(equal.shape, np.uint8)
        numbers[equal] = number_of[which]
        colours = found[kept].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :planes]
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
        stream = deflate.compress(numbers.tobytes()) + deflate.flush()
        content = bytes([len(kept)]) + colours.tobytes() + stream
        if 8 * (len(content) - FIRST_BYTES) <= MOST_BITS * counts[kept].sum():
            return content
        kept = kept[: len(kept) // 2]
    return None


def deep(content: bytes, height: int, width: int, planes: int) -> NDArray[np.bool_]:
    """Which blocks (rows, columns) of a picture have but flat ones around them, as far as ``DEEP`` blocks away."""
    _, numbers = _parsed(content, height, width, planes)
    found = np.pad(numbers > 0, DEEP, constant_values=True)  # nothing is behind the edges
    for axis in (0, 1):
        found = np.logical_and.reduce(sliding_window_view(found, 2 * DEEP + 1, axis), -1)
    return found


def covered(content: bytes, height: int, width: int, planes: int) -> NDArray[np.bool_]:
    """Which pixels (H, W) of a picture are in flat blocks."""
    return _spread(_parsed(content, height, width, planes)[1], height, width) > 0


def paste(pixels: Bytes, content: bytes) -> None:
    """Set the blocks of a flat chunk in a picture (H, W, C), C planes coded. Raises DamagedError."""
    height, width, planes = pixels.shape
    colours, numbers = _parsed(content, height, width, planes)
    source = pixels.copy()
    for top in range(0, height, STRIP):  # in strips, because differences take several times the memory of pixels
        inner, outer = slice(top, top + STRIP), slice(max(0, top - BLOCK), top + STRIP + BLOCK)
        part = source[outer].astype(np.int16)
        which = _spread(numbers[outer.start // BLOCK : outer.stop // BLOCK], *part.shape[:2])
        known = which > 0
        error = np.zeros_like(part)
        error[known] = colours[which[known] - 1] - part[known]
        faded = part + _faded(error, known)
        pixels[inner] = faded.clip(0, 255)[top - outer.start :][:STRIP]


def _parsed(content: bytes, height: int, width: int, planes: int) -> tuple[Bytes, Bytes]:
    """Colours (n, planes) and numbers (rows, columns) of a flat chunk. Raises DamagedError."""
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    count = content[0] if content else 0
    start = 1 + planes * count
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        stream = inflate.decompress(content[start:], rows * columns + 1)
    except zlib.error:
        stream = b""
    whole = len(stream) == rows * columns and inflate.eof and not inflate.unused_data
    if count == 0 or not whole or max(stream) > count:
        raise DamagedError(
            f"the flat blocks are not {rows} x {columns} numbers of 1 to 255 colours ({count} found): damaged file"
        )
    colours = np.frombuffer(content, np.uint8, planes * count, 1).reshape(count, planes)
    return colours, np.frombuffer(stream, np.uint8).reshape(rows, columns)


def _faded(error: NDArray[np.int16], known: NDArray[np.bool_]) -> NDArray[np.int16]:
    """The errors (H, W, C) at known pixels (H, W), and around them those of the nearest, less with every step.

    Blocks set in place alone would have edges where the picture has none: the network's error ends there.
    """
    share = np.where(known, FADE, 0).astype(np.int16)
    for left in range(FADE - 1, 0, -1):
        front = share > left
        for axis in (0, 1):
            e, s, f = (np.swapaxes(array, 0, axis) for array in (error, share, front))
            for here, there in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
                reached = f[there] & (s[here] == 0)
                e[here][reached] = e[there][reached]
                s[here][reached] = left
    return (error * share[..., None] + FADE // 2) // FADE


def _spread(blocks: Bytes, height: int, width: int) -> Bytes:
    """A value of each block for each of its pixels."""
    return np.repeat(np.repeat(blocks, BLOCK, 0)[:height], BLOCK, 1)[:, :width]
