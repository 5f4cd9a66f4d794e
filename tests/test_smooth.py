import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import WEIGHTS

from vqcodec.codec import Codec, PictureEncoder
from vqcodec.image import from_array
from vqcodec.models import tiling
from vqcodec.smooth import HALF_WAY, LEAST, rate_share

SIDES = st.integers(1, 12)


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 6, height, width, generator=torch.Generator().manual_seed(seed))


@given(SIDES, SIDES, st.integers(0, 1000))
def test_rate_counts_for_less_the_more_cells_are_alike(height: int, width: int, seed: int) -> None:
    rough = noise(height, width, seed)
    shares = [rate_share(contrast * rough) for contrast in (0, 1, 10)]
    assert all(share.shape == (1, 1, height, width) for share in shares)
    torch.testing.assert_close(shares[0], torch.full_like(shares[0], LEAST))
    assert shares[2].max() <= 1
    if height * width > 1:
        assert (shares[0] < shares[1]).all() and (shares[1] < shares[2]).all()


@given(st.integers(0, 1000))
def test_what_all_cells_have_in_common_does_not_matter(seed: int) -> None:
    common = 50 * noise(1, 1, seed)
    torch.testing.assert_close(rate_share(noise(9, 7) + common), rate_share(noise(9, 7)), atol=1e-3, rtol=0)


def test_a_cell_matters_to_itself_and_the_eight_around_it() -> None:
    latents = torch.zeros(1, 6, 7, 9)
    latents[0, 2, 3, 4] = (81 / 8 * HALF_WAY) ** 0.5  # among eight zeros: a variance of HALF_WAY
    expected = torch.full((7, 9), LEAST)
    expected[2:5, 3:6] = (1 + LEAST) / 2
    torch.testing.assert_close(rate_share(latents)[0, 0], expected)


def test_shares_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, latents = Codec.load(WEIGHTS, "cpu"), noise(40, 56)
    encoder = PictureEncoder(codec, from_array(np.zeros((320, 448, 3), np.uint8)))
    monkeypatch.setattr(tiling, "TILE", 64)
    torch.testing.assert_close(encoder._rate_share(latents), rate_share(latents))
