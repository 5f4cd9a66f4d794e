"""Writes the golden files: `python tests/make_golden.py`. Their promise is that they decode forever, so an existing
file is never replaced; a new case is added by adding it here."""

from pathlib import Path

import numpy as np
from tiny_model import GOLDEN, WEIGHTS

from bitstream import container
from bitstream.container import ColourMode
from vqcodec.codec import Codec, decode_indices
from vqcodec.image import Picture, read

IMAGES = Path(__file__).parent / "images"


def pictures() -> dict[str, tuple[Picture, float]]:
    """Name -> picture and quality."""
    photo = read(IMAGES / "photo.png")
    pixels = photo.pixels
    grey = np.repeat(pixels[..., 1:2], 3, axis=2)
    alpha = np.tile(np.arange(48, dtype=np.uint8) * 5, (40, 1))
    return {
        "one-pixel": (Picture(pixels[:1, :1], ColourMode.RGB), 2),
        "one-row": (Picture(pixels[:1], ColourMode.RGB), 3),
        "one-column": (Picture(pixels[:, :1], ColourMode.RGB), 1),
        "odd-17x33": (Picture(pixels[20:53, 10:27], ColourMode.RGB), 2),
        "photo-level-1": (Picture(pixels, ColourMode.RGB), 1),
        "photo-level-2": (Picture(pixels, ColourMode.RGB), 2),
        "photo-level-3": (Picture(pixels, ColourMode.RGB), 3),
        "photo-between-levels": (Picture(pixels, ColourMode.RGB), 1.7),
        "grey": (Picture(grey[:48, :48], ColourMode.GREY), 2),
        "grey-alpha": (Picture(grey[:40, :48], ColourMode.GREY_ALPHA, alpha), 2),
        "rgba": (Picture(pixels[:40, :48], ColourMode.RGBA, alpha), 3),
        "metadata": (
            Picture(pixels[:32, :32], ColourMode.RGB, None, b"an ICC profile", b"MM\0*\0\0\0\x08\0\0", b"<x:xmpmeta/>"),
            2,
        ),
    }


def main() -> None:
    codec = Codec.load(WEIGHTS, "cpu")
    folder, lines = GOLDEN / "decode", []
    folder.mkdir(exist_ok=True)
    for name, (picture, quality) in pictures().items():
        path = folder / f"{name}.vq2"
        if not path.exists():
            path.write_bytes(codec.encode(picture, quality))
        parts = container.unpack(path.read_bytes())
        grids = [grid[0].numpy() for grid in decode_indices(codec, parts)]
        lines.append(f"{container.checksum(parts.header, grids):08x} {path.name}\n")
    (GOLDEN / "decode.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
