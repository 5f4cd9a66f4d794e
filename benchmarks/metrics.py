"""What a decoded image is worth, and how two rate-distortion curves compare.

A metric is a function of two 8-bit RGB images (H, W, 3), original and decoded, and an entry in `METRICS`.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MAX_PSNR = 100.0
BD_METHOD = "pchip"  # monotone, and that of the video standards' spreadsheets (JCTVC-L1100, JVET-T2010)
MIN_POINTS = 4  # of each curve, for a BD-rate
MIN_OVERLAP_DB = 2.0
MIN_OVERLAP = 0.5  # of the tested curve's PSNR range


def psnr(original: Bytes, decoded: Bytes) -> float:
    """PSNR-RGB in dB: one mean over pixels and channels. At most MAX_PSNR, so that means stay finite."""
    if original.shape != decoded.shape:
        raise ValueError(f"images of different shapes, {original.shape} and {decoded.shape}")
    mse = np.mean((original.astype(np.int32) - decoded.astype(np.int32)) ** 2)
    return min(MAX_PSNR, 10 * math.log10(255**2 / mse)) if mse else MAX_PSNR


def ms_ssim(original: Bytes, decoded: Bytes) -> float | None:
    """MS-SSIM (Wang et al., 2003), mean over R, G and B. None if a side has 160 pixels or less."""
    import torch

    if min(original.shape[:2]) <= 160:
        return None
    package = importlib.import_module("pytorch_msssim")
    a, b = (torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None] for x in (original, decoded))
    return float(package.ms_ssim(a, b, data_range=255))


METRICS: dict[str, Callable[[Bytes, Bytes], float | None]] = {"psnr": psnr}
SKIPPED: dict[str, str] = {}

if importlib.util.find_spec("pytorch_msssim"):
    METRICS["ms_ssim"] = ms_ssim
else:
    SKIPPED["ms_ssim"] = "there is no package pytorch-msssim here"


def bits_per_pixel(size: int, pixels: int) -> float:
    """size: bytes of the whole file."""
    return 8 * size / pixels


class Curve(NamedTuple):
    """Mean bits per pixel and mean PSNR at each setting of a codec, ascending."""

    bpp: tuple[float, ...]
    psnr: tuple[float, ...]


class BDRate(NamedTuple):
    """percent: None, with the reason, if there is no honest number. low, high: dB, what both curves cover."""

    percent: float | None
    low: float
    high: float
    reason: str = ""


def bd_rate(anchor: Curve, test: Curve) -> BDRate:
    """How much more bits than `anchor` `test` needs for the same PSNR: negative is better.

    Bjontegaard, VCEG-M33 (2001): mean difference in log rate over the PSNR that both curves cover.
    """
    low, high = max(min(anchor.psnr), min(test.psnr)), min(max(anchor.psnr), max(test.psnr))
    points = min(len(anchor.psnr), len(test.psnr))
    if points < MIN_POINTS:
        return BDRate(None, low, high, f"a curve has {points} points, {MIN_POINTS} are needed")
    if any(np.diff(rising).min() <= 0 for curve in (anchor, test) for rising in curve):
        return BDRate(None, low, high, "a curve does not rise from setting to setting")
    needed = max(MIN_OVERLAP_DB, MIN_OVERLAP * (max(test.psnr) - min(test.psnr)))
    if high - low < needed:
        shared = max(0, high - low)
        return BDRate(None, low, high, f"the curves share {shared:.2f} dB, {needed:.2f} are needed")
    import bjontegaard

    options = {"method": BD_METHOD, "require_matching_points": False, "min_overlap": 0}
    return BDRate(float(bjontegaard.bd_rate(*anchor, *test, **options)), low, high)


def relative_size(bpp: float, psnr: float, anchor: Curve) -> float | None:
    """Bits in percent of what `anchor` needs for the same PSNR, linear in log bpp; None outside its range."""
    if not min(anchor.psnr) <= psnr <= max(anchor.psnr) or min(np.diff(anchor.psnr), default=1) <= 0:
        return None
    return float(100 * bpp / np.exp(np.interp(psnr, anchor.psnr, np.log(anchor.bpp))))
