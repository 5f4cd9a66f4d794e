"""From what a file should have, a size, a rate or a PSNR, to the quality that gives it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bitstream.errors import UsageError
from vqcodec.config import DEFAULT_TUNE, Tune

TOLERANCE = 0.02  # of bytes or bits per pixel
TOLERANCE_DB = 0.1
MOST_TRIES = 10
FINEST_STEP = 1 / 256  # of quality: less does not change a file noticeably
EDGE = 0.1  # a try keeps this share of the interval away from its ends, so that the interval shrinks
NEAR = 0.5  # levels: from here on the search stays with the level it has found
# How much a level of quality changes ln(bytes) and dB, for the first steps; levels differ by 1.93 in lambda.
SLOPES = {"size": 0.3, "bpp": 0.3, "psnr": 1.0}


@dataclass(frozen=True)
class Target:
    """What a file should have: "size" in bytes, "bpp" in bits per pixel, both of the whole file, or "psnr" in dB over
    R, G and B. UsageError unless positive."""

    kind: Literal["size", "bpp", "psnr"]
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UsageError(f"a target must be positive, and {self.kind} {self.value:g} is not")

    @property
    def tune(self) -> Tune:
        """What its file is made for, unless something else is asked for: for a PSNR, that."""
        return "psnr" if self.kind == "psnr" else DEFAULT_TUNE

    def on_scale(self, value: float) -> float:
        """A value where quality is about linear: logarithm of bytes, or dB."""
        return value if self.kind == "psnr" else math.log(value)

    def met_by(self, value: float) -> bool:
        if self.kind == "psnr":
            return abs(value - self.value) <= TOLERANCE_DB or value == math.inf  # nothing is better than exact
        return abs(value / self.value - 1) <= TOLERANCE

    def describe(self, value: float) -> str:
        """A value of this kind with its unit."""
        return {"size": f"{value:,.0f} bytes", "bpp": f"{value:.3f} bpp", "psnr": f"{value:.2f} dB"}[self.kind]


class SearchResult(NamedTuple):
    """A file, the quality it was encoded with, what it has of the target's kind, and whether that is near enough."""

    data: bytes
    quality: float
    value: float
    met: bool


def reach(target: Target, attempt: Callable[[float, int], tuple[bytes, float]], levels: int) -> SearchResult:
    """The file nearest to a target among those tried, of quality 1 to ``levels``.

    attempt: a quality and the level (from 1) to code it with, to a file and its value, which should rise with the
    quality. Near the target the level stays: the networks need not run again, and sizes jump between levels.
    """
    wanted, slope = target.on_scale(target.value), SLOPES[target.kind]
    low: tuple[float, float] | None = None  # quality and value on the scale, too low
    high: tuple[float, float] | None = None
    best: SearchResult | None = None
    least = (math.inf, 0)  # how far the best one is from the target, and its bytes
    quality, level, near = (1 + levels) / 2, 0, False
    for _ in range(MOST_TRIES):
        if not near:
            level = int(quality + 0.5)
        data, value = attempt(quality, level)
        found = target.on_scale(value)
        if best is None or (abs(found - wanted), len(data)) < least:
            best, least = SearchResult(data, quality, value, target.met_by(value)), (abs(found - wanted), len(data))
        if best.met and value < math.inf:
            break
        narrow = low is not None and high is not None and high[0] - low[0] < NEAR
        if not near and (narrow or abs(wanted - found) < NEAR * slope):
            near, low, high = True, None, None  # what other levels gave does not count
        if found < wanted:
            low = quality, found
        else:
            high = quality, found
        if low and high:
            if abs(high[0] - low[0]) < FINEST_STEP:
                break
            share = (wanted - low[1]) / (high[1] - low[1])
            quality = low[0] + min(max(share, EDGE), 1 - EDGE) * (high[0] - low[0])
        else:
            following = min(max(quality + (wanted - found) / slope, 1.0), float(levels))
            if following == quality:  # the end of the range
                break
            quality = following
    assert best is not None
    return best


_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "kib": 1024, "mib": 1024**2}


def parse_size(text: str) -> float:
    """Bytes of "50kB", "1.5 MB", "64KiB" or "20000". UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size: write it like 50kB, 1.5MB, 64KiB or 20000")
    return float(match[1]) * _UNITS[match[2]]
