"""What all of a decoded picture is off by: a whole number of grey levels for each plane.

Where a picture takes hardly any bits, as smooth slopes and faint noise do, codes are coarse: the nearest ones may be
off by some grey levels, to the same side everywhere. The content of an offset chunk is specified in
bitstream/container.py, section 3.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

NUMBERS = np.array(sorted(range(-128, 128), key=abs))  # of those that are as good the first is found
# (numbers, 256): what each value becomes with each number.
MOVED = np.clip(np.arange(256) + NUMBERS[:, None], 0, 255)


def find(drawn: Bytes, pixels: Bytes, counts: NDArray[np.bool_]) -> bytes | None:
    """The content of an offset chunk with the least squared error; None if it is all zeros.

    drawn, pixels: (H, W, C), what the network gives and what it should be, C planes coded; counts: (H, W), which pixels
    count. Not simply the mean error, because what is clipped moves no further.
    """
    planes = drawn.shape[2]
    firsts = 256 * np.arange(planes)
    number, total = np.zeros(256 * planes), np.zeros(256 * planes)  # of pixels drawn with a value; of their originals
    for row, original, counted in zip(drawn, pixels, counts, strict=True):  # in rows for the sake of memory
        values = (row[counted] + firsts).ravel()
        number += np.bincount(values, minlength=256 * planes)
        total += np.bincount(values, original[counted].ravel(), 256 * planes)
    number, total = number.reshape(planes, 1, 256), total.reshape(planes, 1, 256)
    errors = (number * MOVED**2 - 2 * total * MOVED).sum(2)  # but for the squares of the originals
    found = NUMBERS[errors.argmin(1)]
    return found.astype(np.int8).tobytes() if found.any() else None


def add(pixels: Bytes, content: bytes) -> None:
    """Add an offset chunk to a picture (H, W, C), C planes coded."""
    for k, number in enumerate(np.frombuffer(content, np.int8)):
        moved = np.clip(np.arange(256) + number, 0, 255).astype(np.uint8)
        pixels[..., k] = moved[pixels[..., k]]
