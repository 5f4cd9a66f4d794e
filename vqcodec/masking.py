"""What the eye overlooks: errors show in the flat parts of a picture, and less where texture hides them."""

import torch.nn.functional as F
from torch import Tensor

# What an error costs by SSIMULACRA 2 falls about as (variance + 60)^-0.5, measured along the errors of files. Less than
# that is taken: it costs PSNR, and Butteraugli does not agree with the whole of it.
STRENGTH = 0.2
FLOOR = 60.0  # of the variance, in squared grey levels
REFERENCE = 750.0  # where an error counts as by squared error: files are about as large as those for that
MOST = 3.0


def visibility(pixels: Tensor, cell: int) -> Tensor:
    """How much an error in each cell of a picture counts for the eye, compared with squared error.

    pixels: (1, 3, H, W), 0..255, sides multiples of cell. Returns (1, 1, H / cell, W / cell), from 1 / MOST to MOST, by
    the variance of luma within cells, its mean over 3 x 3 of them.
    """
    red, green, blue = pixels.float().split(1, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    variance = (F.avg_pool2d(luma.square(), cell) - F.avg_pool2d(luma, cell).square()).clamp(min=0)
    around = F.avg_pool2d(F.pad(variance, (1, 1, 1, 1), "replicate"), 3, 1)
    return ((REFERENCE + FLOOR) / (around + FLOOR)).pow(STRENGTH).clamp(1 / MOST, MOST)
