"""The discrete cosine transform of pixel blocks, from which the linear path of a model starts."""

import math

import torch
from torch import Tensor

# Variances of the two colour differences of photographs, relative to luma.
CHROMA = (0.1, 0.05)


def dct(size: int) -> Tensor:
    """DCT-II, orthonormal: (frequency, position)."""
    u, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * x + 1) * u / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def block_basis(size: int, groups: int, dim: int) -> Tensor:
    """The first groups * dim orthonormal functions of a block by the variance they have in photographs, as weights of
    a convolution, (groups * dim, 3, size, size); dealt out so that every group gets a like share of the bits.

    Luma and two colour differences, (R + G + B) / sqrt(3), (R - B) / sqrt(2), (R - 2G + B) / sqrt(6), each under a
    two-dimensional DCT; the variance falls about as (1 + u^2 + v^2)^-1.25. Raises ValueError if the block has fewer.
    """
    if groups * dim > 3 * size * size:
        raise ValueError(f"a block of {size} x {size} pixels has {3 * size * size} functions, not {groups * dim}")
    rows = dct(size)
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    functions = torch.einsum("nc,uy,vx->nuvcyx", colours, rows, rows).flatten(0, 2)
    u = torch.arange(size)
    falling = (1 + u[:, None] ** 2 + u**2).double() ** -1.25
    variance = torch.tensor([1.0, *CHROMA], dtype=torch.float64)[:, None, None] * falling
    order = variance.flatten().argsort(descending=True, stable=True)[: groups * dim]
    # Row by row there and back: the group with the largest of one row gets the smallest of the next.
    dealt = order.view(dim, groups)
    dealt[1::2] = dealt[1::2].flip(1)
    return functions[dealt.t().flatten()].float()
