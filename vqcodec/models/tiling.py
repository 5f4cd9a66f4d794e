"""Convolutional networks over large pictures, tile by tile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE = 1536  # pixels a side: large enough for the halo to cost little, small enough to bound memory


def run_tiled(
    network: Callable[..., Sequence[Tensor]],
    sources: Sequence[Tensor | None],
    cells: tuple[int, int],
    stride: int,
    halo: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    tile: int = TILE,
) -> list[Tensor]:
    """Apply a network to tiles of a picture, each with a halo, on a device; the results gather on the CPU.

    cells: size of the picture in cells of ``stride`` pixels; sources: views of the picture at any resolution that is
    a multiple of that, (B, C, r h, r w), or None, handed on; the network returns any number of such views. halo:
    pixels, a multiple of stride. size: height and width to keep of the results, None for all: a picture that is one
    pixel high takes no memory for its padding. tile: side in pixels, a multiple of stride.
    Guarantee: equal to the untiled network up to float rounding if no output depends on an input further away than
    the halo.
    """
    step, margin = tile // stride, halo // stride
    outputs: list[Tensor] = []
    for top in range(0, cells[0], step):
        for left in range(0, cells[1], step):
            inner = (top, min(top + step, cells[0])), (left, min(left + step, cells[1]))
            outer = [(max(0, a - margin), min(end, b + margin)) for (a, b), end in zip(inner, cells, strict=True)]
            parts = [None if s is None else _cut(s, outer, s.shape[2] // cells[0]).to(device) for s in sources]
            results = network(*parts)
            ratios = [result.shape[2] // (outer[0][1] - outer[0][0]) for result in results]
            if not outputs:
                sizes = [size or (cells[0] * ratio, cells[1] * ratio) for ratio in ratios]
                outputs = [
                    x.new_empty(*x.shape[:2], *s, device="cpu") for x, s in zip(results, sizes, strict=True)
                ]
            shift = [(a - o, b - o) for (a, b), (o, _) in zip(inner, outer, strict=True)]
            for output, result, ratio in zip(outputs, results, ratios, strict=True):
                target = _cut(output, inner, ratio)
                target.copy_(_cut(result, shift, ratio)[:, :, : target.shape[2], : target.shape[3]])
    return outputs


def _cut(x: Tensor, box: Sequence[tuple[int, int]], ratio: int) -> Tensor:
    (top, bottom), (left, right) = box
    return x[:, :, top * ratio : bottom * ratio, left * ratio : right * ratio]
