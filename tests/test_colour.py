import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from vqcodec.colour import ADOBE_GAMMA, ADOBE_RGB, BT709, SRGB_CURVE, Space, coded, profile


def seen(icc: bytes, image: Image.Image) -> np.ndarray:
    """The pixels in sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(
        image, io.BytesIO(icc), srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
    )
    return np.asarray(converted).astype(int)


def test_the_profile_of_srgb_changes_no_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.abs(seen(profile(Space(), grey=False), Image.fromarray(pixels)) - pixels).max() <= 1
    table = [[round(65535 * (level / 255) ** 2.2) for level in range(256)]] * 3
    by_table, by_gamma = (seen(profile(Space(BT709, curve), False), Image.fromarray(pixels)) for curve in (table, 2.2))
    assert np.abs(by_table - by_gamma).max() <= 1


def test_colours_are_where_the_definition_says() -> None:
    def linear(values: np.ndarray, gamma: float) -> np.ndarray:
        return (values / 255) ** gamma

    # The matrix of Adobe RGB (1998), 4.3.6.1, and sRGB's inverse.
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_srgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    pixels = np.random.default_rng(1).integers(90, 160, (8, 8, 3), dtype=np.uint8)  # within sRGB
    light = linear(pixels, ADOBE_GAMMA) @ (to_srgb @ to_xyz).T
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)
    found = seen(profile(Space(ADOBE_RGB, ADOBE_GAMMA), False), Image.fromarray(pixels))
    assert np.abs(found - expected).max() < 1.5


def test_white_stays_white_under_every_white_point() -> None:
    for white in ((0.3127, 0.3290), (0.314, 0.351), (0.3457, 0.3585)):
        icc = profile(Space((*white, *BT709[2:]), SRGB_CURVE), False)
        np.testing.assert_allclose(seen(icc, Image.new("RGB", (1, 1), "white"))[0, 0], 255, atol=1)


def test_the_same_space_gives_the_same_bytes() -> None:
    assert profile(Space(ADOBE_RGB, 2.2), False) == profile(Space(ADOBE_RGB, 2.2), False)
    assert len(profile(Space(ADOBE_RGB, 2.2), False)) < 600


def test_code_points_are_known_or_refused() -> None:
    assert coded(1, 13) == coded(2, 2) == coded(1, 1) == Space()
    assert coded(12, 13) not in (None, Space()) and coded(9, 16) is None and coded(200, 13) is None


@pytest.mark.parametrize(
    "space", [Space((0.3, 0, *BT709[2:])), Space((*BT709[:2], *[0.3, 0.3] * 3)), Space(BT709, 0.0), Space(BT709, 99.0)]
)
def test_impossible_spaces_are_value_errors(space: Space) -> None:
    with pytest.raises(ValueError):
        profile(space, False)
