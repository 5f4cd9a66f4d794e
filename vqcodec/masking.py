"""What the eye overlooks, and what it does not: errors show in the flat parts of a picture, less where texture hides
them, and most where a flat part is off as a whole."""

import torch.nn.functional as F
from torch import Tensor

# What an error costs by SSIMULACRA 2 falls about as (variance + 60)^-0.5, measured along the errors of files. Less than
# that is taken: it costs PSNR, and Butteraugli does not agree with the whole of it.
STRENGTH = 0.2
# Errors hide each other, too: the floor of the variance, in squared grey levels, is this over the root of lambda, some
# 2.4 times the squared error of a file.
FLOOR = 8.0
REFERENCE = 750.0  # where an error counts as by squared error: files are about as large as those for that
MOST = 3.0

SMOOTH = 5.0  # squared grey levels: with this variance half of what a flat cell passes on


def variance(pixels: Tensor, cell: int) -> Tensor:
    """That of luma within cells, its mean over 3 x 3 of them: (B, 3, H, W), 0..255, sides multiples of cell, to
    (B, 1, H / cell, W / cell)."""
    red, green, blue = pixels.float().split(1, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    within = (F.avg_pool2d(luma.square(), cell) - F.avg_pool2d(luma, cell).square()).clamp(min=0)
    return F.avg_pool2d(F.pad(within, (1, 1, 1, 1), "replicate"), 3, 1)


def visibility(variance: Tensor, lambda_: float | Tensor) -> Tensor:
    """How much an error in each cell counts for the eye, compared with squared error, from 1 / MOST to MOST. lambda_:
    weight of the squared error against the bits, positive; one of all pictures, or one of each, (B, 1, 1, 1)."""
    floor = FLOOR / lambda_**0.5
    return ((REFERENCE + floor) / (variance + floor)).pow(STRENGTH).clamp(1 / MOST, MOST)


def smoothness(variance: Tensor) -> Tensor:
    """How flat each cell is, from 0 to 1."""
    return SMOOTH / (variance + SMOOTH)
