"""What index grids are made of: the use of null, codes and escapes, and bits by the priors.

The priors are evaluated in their parallel form, which gives the bits that the walk spends. Index grids come coarsest
first, each (M, h, w).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.corpus import Bytes
from bitstream.exact import ESCAPE_BITS
from bitstream.walk import Grid
from vqcodec.models.quantizer import Codebook
from vqcodec.models.vqvae import VQVAE

MOST_SIDE = 768  # pixels: in its parallel form attention takes memory with the square of the image


def middle(pixels: Bytes) -> Bytes:
    """What is measured of an image (H, W, 3): at most MOST_SIDE a side."""
    top, left = (max(0, side - MOST_SIDE) // 2 for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + MOST_SIDE, left : left + MOST_SIDE])


def usage(grid: Grid, book: Codebook) -> NDArray[np.int64]:
    """How often each group is null and each of its outcomes: (M, 1 + N)."""
    outcome = book.outcome(_tensor(grid)[0].flatten(1)).numpy()
    return np.stack([np.bincount(group, minlength=1 + book.outcomes) for group in outcome])


def escape_bits(used: NDArray[np.int64], book: Codebook) -> NDArray[np.int64]:
    """Bits of the places in the lattice, (M,), for counts (M, 1 + N)."""
    return used[:, 1 + book.codes :].sum(1) * book.dim * ESCAPE_BITS


@torch.inference_mode()
def prior_bits(
    model: VQVAE, k: int, grids: Sequence[Grid], level: int, exact: bool = True
) -> NDArray[np.floating[Any]]:
    """Bits of grid k by group, of flags and of outcomes with their escapes: (2, M). exact: by the tables of files,
    otherwise by the logits."""
    book, stack, levels = model.codebooks[k], model.priors[k].condition, torch.tensor([level])
    index = _tensor(grids[k])
    seen = book.activations(book.lookup(index[0].flatten(1)), 1, *index.shape[2:])
    condition = None if stack is None else model.condition(k, _tensor(grids[k - 1]), levels)
    spent = model.bits(k, index, seen, condition, levels, exact)
    return torch.stack([bits.double().sum(1) for bits in spent]).numpy()


def _tensor(grid: Grid) -> Tensor:
    """(1, M, h, w) int64."""
    return torch.from_numpy(grid.astype(np.int64))[None]
