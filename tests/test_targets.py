import math

import numpy as np
import pytest

from vqcodec.metrics import psnr
from vqcodec.targets import MOST_TRIES, TOLERANCE, TOLERANCE_DB, SearchResult, Target, parse_size, reach

LEVELS = 8


def search(target: Target, curve: object) -> tuple[SearchResult, list[tuple[float, int]]]:
    """What is found on a curve (quality, level) -> value, and what was tried."""
    tried: list[tuple[float, int]] = []

    def attempt(quality: float, level: int) -> tuple[bytes, float]:
        tried.append((quality, level))
        return b"", curve(quality, level)  # type: ignore[operator]

    return reach(target, attempt, LEVELS), tried


def steady(quality: float, level: int) -> float:
    return 3000 * 1.4**quality


def jumping(quality: float, level: int) -> float:
    """Levels overlap: at one quality a higher level gives a larger file."""
    return 3000 * 1.25**quality * 1.12**level


@pytest.mark.parametrize("curve", [steady, jumping])
@pytest.mark.parametrize("quality", np.linspace(1.2, 7.8, 23))
def test_every_size_within_the_range_is_met_in_few_tries(curve: object, quality: float) -> None:
    wanted = curve(quality, round(quality))  # type: ignore[operator]
    reached, tried = search(Target("size", wanted), curve)
    assert reached.met and abs(reached.value / wanted - 1) <= TOLERANCE
    assert len(tried) <= 6
    assert all(1 <= quality <= LEVELS and 1 <= level <= LEVELS for quality, level in tried)


@pytest.mark.parametrize("wanted", np.linspace(28, 34, 9))
def test_a_psnr_is_met(wanted: float) -> None:
    def curve(quality: float, level: int) -> float:
        return 24 + 3.8 * math.sqrt(quality) - 0.3 * (level % 2)

    reached, _ = search(Target("psnr", wanted), curve)
    assert reached.met and abs(reached.value - wanted) <= TOLERANCE_DB


@pytest.mark.parametrize("wanted, quality", [(1, 1), (10**9, 8)])
def test_what_is_out_of_range_gives_the_end_of_the_range_after_few_tries(wanted: float, quality: float) -> None:
    reached, tried = search(Target("size", wanted), steady)
    assert (reached.met, reached.quality) == (False, quality)
    assert len(tried) == 2


def test_of_exact_pictures_the_smallest_file_is_taken() -> None:
    """As of flat colours, which are exact at every quality."""
    tried: list[float] = []

    def attempt(quality: float, level: int) -> tuple[bytes, float]:
        tried.append(quality)
        return bytes(int(100 * quality)), math.inf

    reached = reach(Target("psnr", 40), attempt, LEVELS)
    assert (reached.met, reached.quality, len(reached.data)) == (True, 1.0, 100)
    assert len(tried) == 2


def test_sizes_that_move_in_steps_end_with_the_nearest() -> None:
    reached, tried = search(Target("size", 150), lambda quality, level: 100 if quality < 3 else 190)
    assert (reached.met, reached.value) == (False, 190)  # nearer than 100 on a logarithmic scale
    assert len(tried) <= MOST_TRIES


def test_a_lossless_file_has_infinite_psnr_and_is_searched_below() -> None:
    reached, _ = search(Target("psnr", 40), lambda quality, level: math.inf if quality > 4 else 30 + 2 * quality)
    assert not reached.met and reached.value < math.inf


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_targets_are_positive(value: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Target("size", value)


SIZES = {"20000": 20000, "50kB": 50000, "50 KB": 50000, "1.5MB": 1.5e6, ".5k": 500, "64KiB": 65536, "2MiB": 2**21}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_with_their_units(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "kB", "-5", "1e3", "5 parsecs", "1.2.3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size: write it like 50kB"):
        parse_size(text)


def test_psnr_is_that_of_one_mean_over_everything() -> None:
    a = np.zeros((4, 5, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0] = 255
    assert psnr(a, b) == pytest.approx(10 * math.log10(60))
    assert psnr(a, a) == math.inf
