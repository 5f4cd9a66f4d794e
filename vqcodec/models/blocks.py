"""Pictures as channels of blocks and back: what the networks and the linear path read, what they write, and how far off
that is. On a CPU compiled, one pass each where torch takes a dozen over the largest tensors that there are.

A block of size x size pixels is 3 * size**2 channels, by colour, row and column, as ``F.pixel_unshuffle`` has them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqcodec import compiled


class Drawn(NamedTuple):
    """A picture less a half, as the sum of what the networks and the linear path, if there is one, draw: blocks of two
    sizes, (B, 3 size**2, H / size, W / size)."""

    details: Tensor
    linear: Tensor | None

    @property
    def image(self) -> Tensor:
        """(B, 3, H, W) float32, about 0..1; differentiable."""
        x = F.pixel_shuffle(self.details, _size(self.details)).float() + 0.5
        return x if self.linear is None else x + F.pixel_shuffle(self.linear, _size(self.linear))

    @property
    def pixels(self) -> Tensor:
        """(B, 3, H, W) uint8."""
        if self.linear is None or self.details.device.type != "cpu":
            return (self.image * 255).round_().clamp_(0, 255).to(torch.uint8)
        b, _, h, w = self.linear.shape
        size = _size(self.linear)
        out = torch.empty(b, size * h, size * w, 3, dtype=torch.uint8, device="cpu")
        for details, linear, target in zip(_rows(self.details), _rows(self.linear), out, strict=True):
            compiled.paint(details.numpy(), linear.numpy(), target.numpy())
        return out.permute(0, 3, 1, 2)

    def parts(self, gradient: Tensor) -> "Drawn":
        """A gradient in the picture, (B, 3, H, W), as one in either part."""
        to_details = F.pixel_unshuffle(gradient, _size(self.details)).to(self.details.dtype)
        return Drawn(to_details, None if self.linear is None else F.pixel_unshuffle(gradient, _size(self.linear)))

    def error_gradient(self, pixels: Tensor) -> "Drawn":
        """The gradient of the squared error against pixels (B, 3, H, W) uint8, of samples in 0..1, to which what is
        drawn is clipped; that of clipping is taken as 1."""
        if self.linear is None or self.details.device.type != "cpu":
            return self.parts(2 * (self.image.clamp(0, 1) - pixels.float() / 255))
        details, linear = _rows(self.details), _rows(self.linear)
        to_details, to_linear = torch.empty_like(details), torch.empty_like(linear)
        for *parts, target in zip(details, linear, to_details, to_linear, _samples(pixels), strict=True):
            compiled.error_gradient(*(part.numpy() for part in parts), target.numpy())
        return Drawn(to_details.permute(0, 3, 1, 2).to(self.details.dtype), to_linear.permute(0, 3, 1, 2))


def to_blocks(x: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels (B, 3, H, W), uint8 or 0..1, less a half, as blocks (B, 3 size**2, H / size, W / size); of uint8 in dtype,
    bfloat16 or float32."""
    if x.dtype != torch.uint8:
        return F.pixel_unshuffle(x - 0.5, size)
    table = (torch.arange(256, dtype=torch.float32, device=x.device) / 255 - 0.5).to(dtype)
    if x.device.type != "cpu":
        return F.pixel_unshuffle(table[x.int()], size)
    out = torch.empty(len(x), x.shape[2] // size, x.shape[3] // size, 3 * size**2, dtype=dtype, device="cpu")
    for samples, target in zip(_samples(x), out, strict=True):
        compiled.to_blocks(samples.numpy(), size, compiled.plain(table), compiled.plain(target))
    return out.permute(0, 3, 1, 2)


def _size(blocks: Tensor) -> int:
    return int((blocks.shape[1] // 3) ** 0.5)


def _rows(x: Tensor) -> Tensor:
    """Float32 in the order in which compiled code takes it, (B, h, w, C)."""
    return x.detach().permute(0, 2, 3, 1).float().contiguous()


def _samples(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
