"""The one loop behind encoding, decoding and sampling: fill a grid of indices wave by wave.

Cell (i, j) belongs to step t = j + 2i. Everything its probability depends on, (i, j-1), (i-1, j-1), (i-1, j) and
(i-1, j+1), belongs to earlier steps, so all cells of a step are coded as one batch: w + 2(h-1) steps for a grid of
h x w cells.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqcodec.models.pixelsnail import LevelPrior, Walk


class Wave(NamedTuple):
    """The cells of one step: rows ``rows`` of the grid, at ``cells`` of the flattened grid (i * w + j)."""

    step: int
    rows: slice
    cells: slice


def waves(h: int, w: int) -> Iterator[Wave]:
    """Every cell of an h x w grid exactly once, in coding order."""
    for t in range(w + 2 * (h - 1)):
        first, last = max(0, (t - w + 2) // 2), min(h - 1, t // 2)
        # (i, t - 2i) lies at t + i (w - 2): the cells of a step are evenly spaced.
        start, stride = t + first * (w - 2), max(1, w - 2)
        yield Wave(t, slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride))


Choose = Callable[[Wave, int, Tensor], Tensor]


@torch.no_grad()
def fill_grid(
    prior: LevelPrior, shape: tuple[int, int, int], condition: Tensor | None, choose: Choose
) -> Tensor:
    """Fill a batch of grids, (B, h, w) = shape; returns the indices (B, M, h, w), int64.

    condition: (B, h, w, C) stream values from the coarser grid, None for the coarsest.
    choose: called in coding order, wave by wave and group by group, with the wave, the group and the logits (B, n, K)
    of its n cells in whole steps (``dyadic.tables`` makes coding tables of them); returns the indices (B, n). The
    encoder chooses and notes, the decoder pops, the sampler draws.
    """
    b, h, w = shape
    walk = Walk(prior, shape)
    grid = torch.empty(b, prior.groups, h * w, dtype=torch.long, device=prior.vectors.device)
    flat = None if condition is None else condition.reshape(b, h * w, -1)
    for wave in waves(h, w):
        if wave.rows.start == wave.rows.stop:  # one column wide: every other step is empty
            walk.skip(wave)
            continue
        walk.begin(wave, None if flat is None else flat[:, wave.cells])
        for group in range(prior.groups):
            walk.put(group, choose(wave, group, walk.logits(group)))
        grid[:, :, wave.cells] = walk.end(wave)
    return grid.reshape(b, prior.groups, h, w)
