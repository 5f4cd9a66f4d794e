"""A drawing of where a file's bits went. Needs no torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bitstream import container
from bitstream.indices import IndexCoder
from vqcodec import memory

Bytes = NDArray[np.uint8]

TILE = 240  # pixels, the longer side of a map
COLUMNS = 4
CAPTION = 18


def draw_grids(coder: IndexCoder, data: bytes, max_pixels: int) -> Image.Image:
    """A heat map of the bits in each cell, of every grid, then a map of the indices of each group. Raises
    BitstreamError."""
    parts = container.unpack(data, max_pixels=max_pixels)
    memory.require(parts.header.width, parts.header.height)
    maps: list[tuple[str, Bytes]] = []
    drawn: list[tuple[str, Bytes]] = []
    for k, (indices, bits) in enumerate(coder.examine(parts), start=1):
        cells = bits.sum(0)
        most, codes = float(cells.max()), coder.weights.grids[k - 1].codes
        maps.append((f"grid{k}: {cells.mean():.1f} bits a cell, white {most:.0f}", _heat(cells / (most or 1))))
        for m, group in enumerate(indices, start=1):
            grey = np.repeat((np.minimum(group, codes) * (255 / codes)).astype(np.uint8)[..., None], 3, axis=2)
            drawn.append((f"grid{k}, indices {m} of {len(indices)}", grey))
    maps += drawn
    h, w = maps[0][1].shape[:2]
    tile = max(1, round(TILE * w / max(h, w))), max(1, round(TILE * h / max(h, w)))
    step = max(tile[0], TILE) + 8, tile[1] + CAPTION + 8
    sheet = Image.new("RGB", (COLUMNS * step[0], -(-len(maps) // COLUMNS) * step[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (caption, pixels) in enumerate(maps):
        x, y = n % COLUMNS * step[0] + 4, n // COLUMNS * step[1] + 4
        pen.text((x, y), caption, "black")
        sheet.paste(Image.fromarray(pixels).resize(tile, Image.Resampling.NEAREST), (x, y + CAPTION))
    return sheet


def _heat(share: NDArray[np.floating[Any]]) -> Bytes:
    """0..1 as black, red, yellow, white."""
    return (255 * np.clip(3 * share[..., None] - np.arange(3), 0, 1)).astype(np.uint8)
