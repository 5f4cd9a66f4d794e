"""Convolutional networks over large pictures, tile by tile."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqcodec.memory import TILE

Cells = Sequence[tuple[int, int]]  # first and last row, first and last column


class TiledNetwork(NamedTuple):
    """A network, its inputs and its halo: how far, in pixels, an output can depend on an input; a multiple of the
    stride.

    sources: views of the picture at any resolution that is a multiple of the cells', (B, C, r h, r w), or None, handed
    on; the network returns any number of such views.
    """

    forward: Callable[..., Sequence[Tensor]]
    sources: Sequence[Tensor | None]
    halo: int


def run_tiled(
    networks: Sequence[TiledNetwork],
    cells: tuple[int, int],
    stride: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Tensor]:
    """Apply networks one after the other to tiles of a picture, on a device; the results gather on the CPU.

    A network gets its sources, then the results of the one before. cells: size of the picture in cells of ``stride``
    pixels. size: height and width to keep of the results, None for all: a picture that is one pixel high takes no
    memory for its padding. tile: side in pixels, a multiple of stride; None: ``TILE``. progress: called with 0..1.
    Guarantee: equal to the untiled networks up to float rounding.
    """
    outputs: list[Tensor] = []
    span = (tile or TILE) // stride
    rows, columns = range(0, cells[0], span), range(0, cells[1], span)
    for down, top in enumerate(rows):
        for right, left in enumerate(columns):
            inner = [(a, min(a + span, end)) for a, end in zip((top, left), cells, strict=True)]
            margins = [sum(network.halo for network in networks[k:]) // stride for k in range(len(networks) + 1)]
            boxes = [
                [(max(0, a - m), min(end, b + m)) for (a, b), end in zip(inner, cells, strict=True)] for m in margins
            ]
            results: list[Tensor] = []
            for network, outer, box in zip(networks, boxes, boxes[1:], strict=False):
                parts = [
                    None if s is None else _cut(s, outer, s.shape[2] // cells[0]).to(device) for s in network.sources
                ]
                shift = [(a - o, b - o) for (a, b), (o, _) in zip(box, outer, strict=True)]
                high = outer[0][1] - outer[0][0]
                results = [_cut(x, shift, x.shape[2] // high) for x in network.forward(*parts, *results)]
            ratios = [x.shape[2] // (inner[0][1] - inner[0][0]) for x in results]
            if not outputs:
                sizes = [size or (cells[0] * ratio, cells[1] * ratio) for ratio in ratios]
                outputs = [
                    torch.empty((*x.shape[:2], *s), dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
                    for x, s in zip(results, sizes, strict=True)
                ]
            for output, result, ratio in zip(outputs, results, ratios, strict=True):
                target = _cut(output, inner, ratio)
                target.copy_(result[:, :, : target.shape[2], : target.shape[3]])
            if progress:
                progress((down * len(columns) + right + 1) / (len(rows) * len(columns)))
    return outputs


def _cut(x: Tensor, box: Cells, ratio: int) -> Tensor:
    (top, bottom), (left, right) = box
    return x[:, :, top * ratio : bottom * ratio, left * ratio : right * ratio]
