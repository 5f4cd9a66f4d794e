import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcodec.config import LAMBDAS
from vqcodec.masking import MOST, smoothness, variance, visibility


def noise(deviation: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grey = 128 + deviation * torch.randn(1, 1, 64, 96, generator=generator)
    return grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([4, 8, 16]))
def test_errors_count_less_the_more_texture_there_is(seed: int, cell: int) -> None:
    variances = [variance(noise(deviation, seed), cell) for deviation in (0, 10, 40)]
    found = [visibility(x, 0.01) for x in variances]
    assert all(x.shape == (1, 1, 64 // cell, 96 // cell) for x in found)
    assert all(x.min() >= 1 / MOST and x.max() <= MOST for x in found)
    assert found[0].min() > found[1].max() and found[1].mean() > found[2].mean()
    smooth = list(map(smoothness, variances))
    assert (smooth[0] == 1).all() and smooth[0].min() > smooth[1].max() and smooth[1].mean() > smooth[2].mean() > 0


def test_texture_matters_more_the_fewer_errors_there_are() -> None:
    even, busy = (variance(noise(deviation), 8) for deviation in (0, 40))
    ratios = [visibility(even, x).mean() / visibility(busy, x).mean() for x in LAMBDAS]
    assert all(a < b for a, b in itertools.pairwise(ratios)) and ratios[0] > 1


def test_an_even_picture_counts_alike_everywhere_whatever_its_colour() -> None:
    colours = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (0, 127, 255)]
    assert all((variance(x, 8) == 0).all() for x in colours)
