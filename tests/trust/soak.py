"""Many round trips of varied pictures in one process: `python tests/trust/soak.py [TRIPS]`, 2,000 if not told.

Every file must decode, which includes its checksum, to size, mode, alpha and metadata of the picture, and the memory of
the process must stay flat. Exits with 1 if it does not.
"""

import os
import sys
import time
from pathlib import Path

# Before torch is imported. oneDNN keeps its kernels for the last 1,024 shapes: pictures of so many sizes would fill
# that cache all through the run, and hide what else grows.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

import numpy as np  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent)]

from bitstream.container import ColourMode  # noqa: E402
from vqcodec.alpha import prepared  # noqa: E402
from vqcodec.codec import Codec  # noqa: E402
from vqcodec.image import Picture, read  # noqa: E402
from vqcodec.models import precision  # noqa: E402

# Of products in bfloat16 oneDNN keeps a kernel for each number of rows, some hundred megabytes of them in the end, and
# the capacity above is not that of theirs.
precision.fast_bfloat16 = lambda device: False

ALLOWED_GROWTH = 16  # MB, from the first half to the last eighth: until then caches fill


def memory() -> float:
    """Megabytes in use by this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def picture(rng: np.random.Generator, photo: np.ndarray) -> Picture:
    """A part of a photograph, noise, or one colour, up to 160 pixels a side, of any mode and with any metadata."""
    height, width = (int(2 ** rng.uniform(0, 7.3)) for _ in range(2))
    kind, colour = rng.integers(3), ColourMode(rng.integers(4))  # one of those that pictures have
    if kind == 0:
        top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
        pixels = photo[top : top + height, left : left + width]
    else:
        pixels = rng.integers(0, 256, (height, width, 3) if kind == 1 else (1, 1, 3), np.uint8)
        pixels = np.broadcast_to(pixels, (height, width, 3))
    if colour in (ColourMode.GREY, ColourMode.GREY_ALPHA):
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    alpha = rng.integers(0, 256, (height, width), np.uint8) if colour.has_alpha else None
    icc, exif, xmp = [rng.bytes(rng.integers(300)) if rng.integers(2) else None for _ in range(3)]
    return Picture(pixels, colour, alpha, icc, None if exif is None else b"II*\0" + exif, xmp)


def main(trips: int) -> int:
    codec = Codec.load(TESTS / "golden" / "tiny.safetensors", "cpu")
    photo, rng = read(TESTS / "images" / "otters.png").pixels, np.random.default_rng(0)
    used, wrong, size, started = [], 0, 0, time.monotonic()
    for _ in range(trips):
        original = picture(rng, photo)
        data = codec.encode(original, rng.uniform(1, codec.model.config.levels))
        back, original = codec.decode_picture(data), prepared(original)
        same = (back.pixels.shape, back.colour, back.icc, back.exif, back.xmp) == (
            (original.pixels.shape, original.colour, original.icc, original.exif, original.xmp)
        )
        wrong += not (same and np.array_equal(back.alpha, original.alpha))
        size += len(data)
        used.append(memory())
    eighths = [max(part) for part in np.array_split(used, 8)]
    print(f"{trips:,} round trips, {size:,} bytes, {time.monotonic() - started:.0f} s: {wrong} wrong")
    print(f"MB in use, in each eighth: {' '.join(f'{megabytes:.0f}' for megabytes in eighths)}")
    return int(wrong > 0 or eighths[-1] - eighths[3] > ALLOWED_GROWTH)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
