"""SSIMULACRA 2.1 as a loss: how far a picture is from the original, as the eye sees it.

The metric of Jon Sneyers (Cloudinary, 2023): an error, here called *distance*, which is a weighted sum of 108 norms,

    3 channels (X, Y, B - Y of XYB) x 6 scales (1:1 to 1:32) x 2 norms (1 and 4) x 3 maps (structure, ringing, blur),

and a score, which is a power of a polynomial of it: 100 for equal pictures. Train on the distance: the slope of the
score is infinite at equal pictures and nearly nothing at very bad ones.

What it computes is what libjxl's program ``ssimulacra2`` (0.11) computes, but for rounding:

- Its recursive Gaussian of sigma 1.5 (Charalampidis 2016: cosines cut off at the radius 5, where they are zero) is, in
  exact arithmetic, the convolution with the nine taps ``TAPS``. They are nearly those of a sampled Gaussian, which has
  a longer tail. Outside the picture there is zero, on all four sides, and nothing makes up for it.
- Sides are checked *before* a scale is made: 113 pixels are enough for six. A picture with fewer scales gets the first
  weights of the flat list, so that they are those of other channels and scales.

To mix it with squared error: 9.3e-5 times a change of the distance is worth as many bits as that change of the mean
squared error (of values in 0..1), at every level of a model trained for squared error within 6 % (slopes over bits per
pixel, 32 photographs). So a mixture in this proportion, with weights that add up to 1, keeps the rates of the levels.

Planes whose weights are all below ``NEGLIGIBLE`` are left out: no score moves by 0.001, and it takes less than half the
time, because at 1:1 luma alone counts.

The Python package of the name mirrors the picture at its left and right side, which is nearly all of the 4 points, has
a sampled Gaussian, and checks sides after making a scale. And the program rounds: its recursion and its small
differences of mean squares and squared means in single precision lower scores around 90 by 0.1 to 0.3. Here structure
is computed from blurred *differences*, which is the same by algebra, needs a blur less and loses no digits.

Source: tools/ssimulacra2.cc and tools/gauss_blur.cc of https://github.com/libjxl/libjxl, v0.11.2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqcodec import compiled

SCALES = 6
MIN_SIDE = 8
NEGLIGIBLE = 0.01  # there is no weight between 0.002 and 0.28
C2 = 0.0009  # of SSIM: (0.03 of the range) squared
TAPS = (0.26462110, 0.21292859, 0.10933537, 0.03601111, 0.00941437)  # of the Gaussian, from the middle outwards

# Linear light to the responses of the cones, libjxl's opsin_params.h.
ABSORBANCE = ((0.3, 0.622, 0.078), (0.23, 0.692, 0.078), (0.24342268924547819, 0.20476744424496821, 0.5518098665095536))
BIAS = 0.0037930732552754493
# X, Y and B - Y of the cube roots of these, scaled to about 0..1.
MIXTURE = ((7.0, -7.0, 0.0), (0.5, 0.5, 0.0), (-0.5, -0.5, 1.0))
OFFSETS = (0.42, 0.01, 0.55)
# As compiled code takes them.
_ABSORBANCE, _MIXTURE, _OFFSETS = (np.array(numbers, np.float32) for numbers in (ABSORBANCE, MIXTURE, OFFSETS))
_BIAS, _C2 = np.float32(BIAS), np.float32(C2)

# By channel and scale: the 1-norm of structure, ringing and blur, then their 4-norm.
# fmt: off
WEIGHTS: tuple[float, ...] = (
    0, 0.000737660671, 0, 0, 0.000779348168, 0,  # X, 1:1
    0, 0.000437115573, 0, 1.10417264, 0.000662848341, 0.000152316328,  # X, 1:2
    0, 0.00164064375, 0, 1.84224555, 11.4411726, 0,  # X, 1:4
    0.000798910944, 0.000176816438, 0, 1.8787595, 10.9490699, 0,  # X, 1:8
    0.000728934699, 0.967793708, 0, 0.000140034243, 0.998176698, 0.000319497559,  # X, 1:16
    0.000455099211, 0, 0, 0.00136487662, 0, 0,  # X, 1:32
    0, 0, 0, 7.46689033, 0, 17.445834,  # Y, 1:1
    0.000623560163, 0, 0, 6.68367815, 0.00037724408, 1.02788994,  # Y, 1:2
    225.205153, 0, 0, 19.2132382, 0.00114015246, 0.00123775564,  # Y, 1:4
    176.393176, 0, 0, 24.43301, 0.285208026, 0.000448543692,  # Y, 1:8
    0, 0, 0, 34.7790634, 44.8356253, 0,  # Y, 1:16
    0, 0, 0, 0, 0, 0,  # Y, 1:32
    0, 0.000868055657, 0, 0, 0, 0,  # B, 1:1
    0, 0.000531319187, 0, 0.000165338142, 0, 0,  # B, 1:2
    0, 0, 0, 0.00041791718, 0.00172908282, 0,  # B, 1:4
    0.00208270058, 0, 0, 8.82698276, 23.1924334, 0,  # B, 1:8
    95.1080499, 0.986397803, 0.983438279, 0.0012286405, 171.266726, 0.980785887,  # B, 1:16
    0, 0, 0, 0.000513006459, 0, 0.000108540579,  # B, 1:32
)
# fmt: on
WORTH = 9.3e-5  # of a distance in mean squared error, see above
TINY = 1e-24  # keeps the slope of the fourth root finite at zero, and adds less than 1e-6 to a norm


class Planes(NamedTuple):
    """Of an original at one scale, (B, C, H, W) each: those of its channels that count, their local means, and how far
    they are from these."""

    values: Tensor
    mean: Tensor
    edge: Tensor


class Ssimulacra2(nn.Module):
    """The distance of decoded pictures from the originals, differentiable in both.

    original, decoded: (B, 3, H, W), sRGB in 0..1, sides of at least 8 pixels; smaller or larger values are clipped, as
    in a picture of 8 bits, and have no gradient. Returns (B,): 0 for equal pictures, 0.45 at a score of 90,
    2.6 at 70, 6.2 at 50, 11 at 30.
    Guarantees: in the precision of the module (float32 unless converted) also under autocast, and without TF32; on a
    GPU nothing waits for the host.
    Raises ValueError for pictures of different shapes or too small ones.
    """

    weights: Tensor
    taps: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, numbers in (("weights", WEIGHTS), ("taps", TAPS)):
            values = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # whatever the caller's defaults are
            self.register_buffer(name, values, persistent=False)

    def forward(self, original: Tensor | Sequence[Planes], decoded: Tensor) -> Tensor:
        """original: may also be what ``planes`` makes of it, which many pictures are to be compared with."""
        if isinstance(original, Tensor):
            if original.shape != decoded.shape:
                raise ValueError(f"pictures of different shapes, {tuple(original.shape)} and {tuple(decoded.shape)}")
            original = self.planes(original)
        with torch.autocast(decoded.device.type, enabled=False):
            total = decoded.new_zeros(len(decoded), dtype=self.weights.dtype)
            for seen, (rows, x) in zip(original, self._scales(decoded), strict=True):
                total = total + (self.norms(seen, x) * torch.stack([self.weights[row] for row in rows])).sum((1, 2))
            return total

    def planes(self, original: Tensor) -> list[Planes]:
        """What a comparison with pictures (B, 3, H, W) looks at, of each scale that counts. ValueError for too small
        ones."""
        if min(original.shape[-2:]) < MIN_SIDE:
            raise ValueError(f"a picture of {tuple(original.shape[-2:])} has a side of less than {MIN_SIDE} pixels")
        with torch.autocast(original.device.type, enabled=False):
            return [Planes(x, mean := self.blur(x), (x - mean).abs()) for _, x in self._scales(original)]

    def _scales(self, x: Tensor) -> Iterator[tuple[list[slice], Tensor]]:
        """Of each scale that counts the weights of its channels and their planes, (B, C, H, W)."""
        x, count = linear_light(x.to(self.weights.dtype)), scale_count(*x.shape[-2:])
        for scale in range(count):
            if scale > 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)  # at an odd side, of what is there
            rows = [slice(start, start + 6) for start in range(6 * scale, 18 * count, 6 * count)]
            channels = [c for c, row in enumerate(rows) if max(WEIGHTS[row]) > NEGLIGIBLE]
            if channels:
                yield [rows[c] for c in channels], xyb(x, channels)

    def norms(self, original: Planes, decoded: Tensor) -> Tensor:
        """1-norm and 4-norm of the three maps of one scale: planes (B, C, H, W) to (B, C, 2 norms * 3 maps)."""
        x, mean, edge = original
        if _compiled(decoded) and not x.requires_grad:
            return _Norms.apply(x, mean, edge, decoded, self.taps)
        difference = decoded - x
        energy = x.square() + decoded.square()
        shift, energy, power = self.blur(torch.cat([difference, energy, difference.square()], 1)).chunk(3, 1)
        decoded_mean = mean + shift
        # With the variances and the covariance s of SSIM: 1 - (1 - shift^2) (2 s12 + C2) / (s11 + s22 + C2).
        change = (power - shift.square()) / (energy - mean.square() - decoded_mean.square() + C2)
        structure = (shift.square() + (1 - shift.square()) * change).clamp(min=0)
        contrast = ((decoded - decoded_mean).abs() - edge) / (1 + edge)
        maps = torch.stack([structure, contrast.clamp(min=0), (-contrast).clamp(min=0)], 2)
        return torch.cat([maps.mean((-2, -1)), _fourth_root(maps.square().square().mean((-2, -1)))], 2)

    def blur(self, x: Tensor) -> Tensor:
        """Every plane by itself."""
        planes = x.flatten(0, -3)
        if _compiled(x) and not x.requires_grad:
            return _blurred(planes, self.taps).view_as(x)
        # Depthwise, because such a convolution is in full precision on a GPU as well.
        reach = len(TAPS) - 1
        across = torch.cat([self.taps.flip(0)[:-1], self.taps]).expand(len(planes), 1, 1, -1)
        planes = F.conv2d(planes[None], across, padding=(0, reach), groups=len(planes))
        return F.conv2d(planes, across.mT, padding=(reach, 0), groups=planes.shape[1]).view_as(x)


def _compiled(x: Tensor) -> bool:
    """Whether compiled code takes the place of torch's."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def _fourth_root(means: Tensor) -> Tensor:
    return (means + TINY) ** 0.25 - TINY**0.25


def _blurred(planes: Tensor, taps: Tensor) -> Tensor:
    """Planes (n, H, W) under taps from the middle outwards. Such a filter is its own transpose."""
    out = torch.empty_like(planes, memory_format=torch.contiguous_format)
    rows = planes.new_empty(2, planes.shape[2] + 2 * len(taps) - 2)
    compiled.blur(planes.detach().contiguous().numpy(), taps.numpy(), rows.numpy(), out.numpy())
    return out


class _Norms(torch.autograd.Function):
    """``Ssimulacra2.norms``, differentiable in the decoded planes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, edge: Tensor, decoded: Tensor, taps: Tensor) -> Tensor:
        ctx.shape = b, c, h, w = decoded.shape
        x, mean, edge, y = (planes.detach().contiguous().view(b * c, h * w) for planes in (x, mean, edge, decoded))
        spread, sums = y.new_empty(3, b * c, h * w), y.new_empty(b * c, 6, dtype=torch.float64)
        compiled.powers(x.numpy(), y.numpy(), spread.numpy())
        blurred = _blurred(spread.view(-1, h, w), taps).view_as(spread)
        compiled.maps(y.numpy(), mean.numpy(), edge.numpy(), blurred.numpy(), _C2, sums.numpy())
        means, fourths = (sums / (h * w)).float().view(b, c, 6).chunk(2, 2)
        ctx.save_for_backward(x, mean, edge, y, blurred, fourths, taps)
        return torch.cat([means, _fourth_root(fourths)], 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, edge, y, blurred, fourths, taps = ctx.saved_tensors
        b, c, h, w = ctx.shape
        to_means, to_roots = gradient.chunk(2, 2)
        to_sums = torch.cat([to_means, to_roots * 0.25 * (fourths + TINY) ** -0.75], 2).view(b * c, 6) / (h * w)
        to_blurred, to_y = torch.empty_like(blurred), torch.empty_like(y)
        arrays = (planes.numpy() for planes in (y, mean, edge, blurred))
        compiled.maps_backward(*arrays, _C2, to_sums.numpy(), to_blurred.numpy(), to_y.numpy())
        to_spread = _blurred(to_blurred.view(-1, h, w), taps).view_as(blurred)
        compiled.powers_backward(x.numpy(), y.numpy(), to_spread.numpy(), to_y.numpy())
        return None, None, None, to_y.view(ctx.shape), None


class _LinearLight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        compiled.linear_light(x.view(-1).numpy(), out.view(-1).numpy())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        compiled.linear_light_backward(x.view(-1).numpy(), gradient.contiguous().view(-1).numpy(), out.view(-1).numpy())
        return out


class _Opponents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rgb: Tensor, channels: Sequence[int]) -> Tensor:
        rgb = rgb.detach().contiguous()
        ctx.save_for_backward(rgb)
        ctx.channels = np.array(channels, np.int64)
        out = rgb.new_empty(len(rgb), len(channels), *rgb.shape[2:])
        for source, target in zip(rgb.flatten(2), out.flatten(2), strict=True):
            compiled.opponents(source.numpy(), _ABSORBANCE, _BIAS, _MIXTURE, _OFFSETS, ctx.channels, target.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rgb,) = ctx.saved_tensors
        out = torch.zeros_like(rgb)
        for source, towards, target in zip(
            rgb.flatten(2), gradient.contiguous().flatten(2), out.flatten(2), strict=True
        ):
            compiled.opponents_backward(
                source.numpy(), _ABSORBANCE, _BIAS, _MIXTURE, ctx.channels, towards.numpy(), target.numpy()
            )
        return out, None


def scale_count(height: int, width: int) -> int:
    """How many scales the program measures: it goes on while the sides of the *last* one are not too small."""
    side, scales = min(height, width), 1
    while scales < SCALES and side >= MIN_SIDE:
        side, scales = (side + 1) // 2, scales + 1
    return scales


def linear_light(x: Tensor) -> Tensor:
    """sRGB, clipped to 0..1, to linear RGB."""
    if _compiled(x):
        return _LinearLight.apply(x)
    x = x.clamp(0, 1)
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def xyb(rgb: Tensor, channels: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Linear RGB (B, 3, H, W) to some of X, Y and B - Y, scaled to about 0..1: (B, C, H, W)."""
    if _compiled(rgb):
        return _Opponents.apply(rgb, channels)
    r, g, b = rgb.unbind(1)
    cones = [(r * row[0] + g * row[1] + b * row[2] + BIAS) ** (1 / 3) - BIAS ** (1 / 3) for row in ABSORBANCE]
    return torch.stack(
        [sum(share * cone for share, cone in zip(MIXTURE[c], cones, strict=True)) + OFFSETS[c] for c in channels], 1
    )


def score(distance: Tensor) -> Tensor:
    """SSIMULACRA 2 of a distance: 100 for equal pictures, 90 is visually lossless, 70 high quality; may be negative."""
    scaled = 0.9562382616834844 * distance
    error = 2.326765642916932 * scaled - 0.020884521182843837 * scaled**2 + 6.248496625763138e-05 * scaled**3
    return 100 - 10 * error.clamp(min=0) ** 0.6276336467831387
