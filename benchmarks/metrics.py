"""What a decoded image is worth, and how two rate-distortion curves compare.

A metric is a function of two 8-bit RGB images (H, W, 3), original and decoded, and an entry in `METRICS`.
"""

import functools
import importlib
import importlib.util
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqcodec import metrics

Bytes = NDArray[np.uint8]
Metric = Callable[[Bytes, Bytes], float | None]

MAX_PSNR = 100.0
BD_METHOD = "pchip"  # monotone, and that of the video standards' spreadsheets (JCTVC-L1100, JVET-T2010)
MIN_POINTS = 4  # of each curve, for a BD-rate
MIN_OVERLAP = 0.5  # of the tested curve's range


def psnr(original: Bytes, decoded: Bytes) -> float:
    """PSNR-RGB in dB: one mean over pixels and channels. At most MAX_PSNR, so that means stay finite."""
    if original.shape != decoded.shape:
        raise ValueError(f"images of different shapes, {original.shape} and {decoded.shape}")
    return min(MAX_PSNR, metrics.psnr(original, decoded))


def ms_ssim(original: Bytes, decoded: Bytes) -> float | None:
    """MS-SSIM (Wang et al., 2003), mean over R, G and B. None if a side has 160 pixels or less."""
    import torch

    if min(original.shape[:2]) <= 160:
        return None
    package = importlib.import_module("pytorch_msssim")
    a, b = (torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None] for x in (original, decoded))
    return float(package.ms_ssim(a, b, data_range=255))


def cvvdp(original: Bytes, decoded: Bytes) -> float | None:
    """ColorVideoVDP (Mantiuk et al., 2024) in JOD: 10 for equal images; of two that differ by 1, three people in four
    prefer the better one. None if a side has less than 8 pixels.

    On a desktop screen, full HD of 24 inches at 0.6 m, whose pixels are larger for the eye than those of its default.
    """
    if min(original.shape[:2]) < metrics.MIN_SIDE:
        return None
    return float(_cvvdp().predict(decoded, original, dim_order="HWC")[0])


@functools.cache
def _cvvdp() -> Any:
    import torch

    package: Any = importlib.import_module("pycvvdp")
    return package.cvvdp(display_name="standard_fhd", quiet=True, device=torch.device("cpu"))


METRICS: dict[str, Metric] = {"psnr": psnr}
SKIPPED: dict[str, str] = {}

for name, metric, there, wanted in (
    ("ms_ssim", ms_ssim, importlib.util.find_spec("pytorch_msssim"), "package pytorch-msssim"),
    ("ssimulacra2", metrics.ssimulacra2, shutil.which("ssimulacra2"), "program ssimulacra2 of libjxl"),
    ("butteraugli", metrics.butteraugli, shutil.which("butteraugli_main"), "program butteraugli_main of libjxl"),
    ("cvvdp", cvvdp, importlib.util.find_spec("pycvvdp"), "package cvvdp"),
):
    if there:
        METRICS[name] = metric
    else:
        SKIPPED[name] = f"there is no {wanted} here"


class Scale(NamedTuple):
    """How a metric is shown and compared. format: of its values; on: its values where equal steps look alike and more
    is better; unit: of that; least: shorter intervals of that give no BD-rate; step: length of the ranges that get one
    each."""

    title: str
    format: str
    on: Callable[[float], float]
    unit: str
    least: float
    step: float


SCALES = {
    "psnr": Scale("PSNR-RGB", ".2f", float, "dB", 2.0, 2.0),
    "ms_ssim": Scale("MS-SSIM", ".4f", lambda x: -10 * math.log10(max(1e-10, 1 - x)), "dB", 2.0, 2.0),
    "ssimulacra2": Scale("SSIMULACRA 2", ".1f", float, "points", 10.0, 20.0),
    "butteraugli": Scale("Butteraugli", ".3f", lambda x: -x, "negated", 0.5, 1.0),
    "cvvdp": Scale("CVVDP", ".3f", float, "JOD", 0.5, 1.0),
}


def bits_per_pixel(size: int, pixels: int) -> float:
    """size: bytes of the whole file."""
    return 8 * size / pixels


class Curve(NamedTuple):
    """Mean bits per pixel and mean score at each setting of a codec, ascending."""

    bpp: tuple[float, ...]
    score: tuple[float, ...]


class BDRate(NamedTuple):
    """percent: None, with the reason, if there is no honest number. low, high: what both curves cover, on the metric's
    scale. ranges: the same over parts, such as "26 to 28", between multiples of the scale's step, if at least half of
    a part is covered."""

    percent: float | None
    low: float
    high: float
    reason: str
    ranges: dict[str, float]


def bd_rate(anchor: Curve, test: Curve, metric: str = "psnr") -> BDRate:
    """How much more bits than `anchor` `test` needs for the same score: negative is better.

    Bjontegaard, VCEG-M33 (2001): mean difference in log rate over the scores that both curves cover.
    """
    scale = SCALES[metric]
    anchor, test = (Curve(bpp, tuple(map(scale.on, score))) for bpp, score in (anchor, test))
    low, high = max(min(anchor.score), min(test.score)), min(max(anchor.score), max(test.score))
    points = min(len(anchor.score), len(test.score))
    if points < MIN_POINTS:
        return BDRate(None, low, high, f"a curve has {points} points, {MIN_POINTS} are needed", {})
    if any(np.diff(rising).min() <= 0 for curve in (anchor, test) for rising in curve):
        return BDRate(None, low, high, "a curve does not rise from setting to setting", {})
    needed = max(scale.least, MIN_OVERLAP * (max(test.score) - min(test.score)))
    if high - low < needed:
        shared = max(0, high - low)
        return BDRate(None, low, high, f"the curves share {shared:.2f} {scale.unit}, {needed:.2f} are needed", {})
    import bjontegaard

    options = {"method": BD_METHOD, "require_matching_points": False, "min_overlap": 0, "interpolators": True}
    percent, anchor_log10, test_log10 = bjontegaard.bd_rate(*anchor, *test, **options)
    ranges = {}
    for start in np.arange(low // scale.step, high // scale.step + 1) * scale.step:
        a, b = max(low, start), min(high, start + scale.step)
        if b - a >= scale.step / 2:
            log10 = (test_log10.integrate(a, b) - anchor_log10.integrate(a, b)) / (b - a)
            ranges[f"{start:g} to {start + scale.step:g}"] = float(100 * (10**log10 - 1))
    return BDRate(float(percent), low, high, "", ranges)


def relative_size(bpp: float, score: float, anchor: Curve) -> float | None:
    """Bits in percent of what `anchor` needs for the same score, linear in log bpp; None outside its range."""
    if not min(anchor.score) <= score <= max(anchor.score) or min(np.diff(anchor.score), default=1) <= 0:
        return None
    return float(100 * bpp / np.exp(np.interp(score, anchor.score, np.log(anchor.bpp))))
