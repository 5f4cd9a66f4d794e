"""Convolutional networks over large pictures, tile by tile."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitstream.team import Team
from vqcodec.memory import TILE, TILES_AT_ONCE, give_back
from vqcodec.models.precision import inference

SMALLEST_TILE = 256  # pixels a side; a smaller one is mostly halo

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
    progress: Callable[[float], None] | None = None,
) -> list[Tensor]:
    """Apply networks one after the other to tiles of a picture, on a device; the results gather on the CPU.

    A network gets its sources, then the results of the one before. cells: size of the picture in cells of ``stride``
    pixels. size: height and width to keep of the results, None for all: a picture that is one pixel high takes no
    memory for its padding. progress: called with 0..1, by this thread.
    Guarantee: equal to the untiled networks up to float rounding.

    On a CPU each thread has tiles of its own, because within a tile the second one gains a fifth: between convolutions
    there is much that is short or waits for memory.
    """
    outputs: list[Tensor] = []
    parts = [-(-end * stride // TILE) for end in cells]
    longer = cells.index(max(cells))
    if parts == [1, 1] and cells[longer] * stride >= 2 * SMALLEST_TILE:
        parts[longer] = 2  # for two threads; with one, too, so that results are the same
    ends = ([end * k // n for k in range(n + 1)] for end, n in zip(cells, parts, strict=True))
    tiles = [list(inner) for inner in itertools.product(*map(itertools.pairwise, ends))]
    margins = [sum(network.halo for network in networks[k:]) // stride for k in range(len(networks) + 1)]
    lock, left, done = threading.Lock(), iter(tiles), 0

    def compute(inner: Cells) -> None:
        nonlocal done
        boxes = [[(max(0, a - m), min(end, b + m)) for (a, b), end in zip(inner, cells, strict=True)] for m in margins]
        results: list[Tensor] = []
        for network, outer, box in zip(networks, boxes, boxes[1:], strict=False):
            parts = [None if s is None else _cut(s, outer, s.shape[2] // cells[0]).to(device) for s in network.sources]
            shift = [(a - o, b - o) for (a, b), (o, _) in zip(box, outer, strict=True)]
            high = outer[0][1] - outer[0][0]
            results = [_cut(x, shift, x.shape[2] // high) for x in network.forward(*parts, *results)]
        ratios = [x.shape[2] // (inner[0][1] - inner[0][0]) for x in results]
        with lock:
            if not outputs:
                sizes = [size or (cells[0] * ratio, cells[1] * ratio) for ratio in ratios]
                outputs.extend(
                    torch.empty((*x.shape[:2], *s), dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
                    for x, s in zip(results, sizes, strict=True)
                )
        for output, result, ratio in zip(outputs, results, ratios, strict=True):
            target = _cut(output, inner, ratio)
            target.copy_(result[:, :, : target.shape[2], : target.shape[3]])
        with lock:
            done += 1

    if len(tiles) > TILES_AT_ONCE:
        give_back()  # pieces that other networks have left are of the wrong sizes
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    with Team(min(threads, len(tiles), TILES_AT_ONCE)) as team:

        def work(part: int) -> None:
            if team.size > 1:
                torch.set_num_threads(threads // team.size)  # of this thread
            with inference(device):
                for inner in left:
                    if team.failed:
                        break
                    compute(inner)
                    if part == 0 and progress:
                        progress(done / len(tiles))

        try:
            team.run(work)
        finally:
            if team.size > 1:
                torch.set_num_threads(threads)
    if progress:
        progress(1.0)
    return outputs


def _cut(x: Tensor, box: Cells, ratio: int) -> Tensor:
    (top, bottom), (left, right) = box
    return x[:, :, top * ratio : bottom * ratio, left * ratio : right * ratio]
