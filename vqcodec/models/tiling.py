"""Convolutional networks over large pictures, tile by tile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE = 2048  # pixels a side: large enough for the halo to cost little, small enough to bound memory


def run_tiled(
    network: Callable[..., Tensor | None],
    sources: Sequence[Tensor | None],
    cells: tuple[int, int],
    stride: int,
    halo: int,
    device: torch.device,
) -> Tensor:
    """Apply a network to tiles of a picture, each with a halo, on a device; the result gathers on the CPU.

    cells: size of the picture in cells of ``stride`` pixels; sources: views of the picture at any resolution that is
    a multiple of that, (B, C, r h, r w), or None, handed on; the network returns one such view. halo: pixels, a
    multiple of stride.
    Guarantee: equal to the untiled network up to float rounding if no output depends on an input further away than
    the halo.
    """
    step, margin = TILE // stride, halo // stride
    output: Tensor | None = None
    for top in range(0, cells[0], step):
        for left in range(0, cells[1], step):
            inner = (top, min(top + step, cells[0])), (left, min(left + step, cells[1]))
            outer = [(max(0, a - margin), min(size, b + margin)) for (a, b), size in zip(inner, cells, strict=True)]
            parts = [None if s is None else _cut(s, outer, s.shape[2] // cells[0]).to(device) for s in sources]
            result = network(*parts)
            assert result is not None
            ratio = result.shape[2] // (outer[0][1] - outer[0][0])
            shift = [(a - o, b - o) for (a, b), (o, _) in zip(inner, outer, strict=True)]
            result = _cut(result, shift, ratio).cpu()
            if output is None:
                shape = *result.shape[:2], cells[0] * ratio, cells[1] * ratio
                output = result if result.shape == shape else result.new_empty(shape)
            _cut(output, inner, ratio).copy_(result)
    assert output is not None
    return output


def _cut(x: Tensor, box: Sequence[tuple[int, int]], ratio: int) -> Tensor:
    (top, bottom), (left, right) = box
    return x[:, :, top * ratio : bottom * ratio, left * ratio : right * ratio]
