"""Pictures to files of other formats: whatever is written can be read again, and options do what they say."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin

from bitstream.container import ColourMode
from bitstream.errors import ImageError
from vqcodec import output
from vqcodec.alpha import flattened
from vqcodec.image import Picture, from_array, read, stripped
from vqcodec.output import Options, save

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")  # red is green


def smooth(*shape: int) -> Picture:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 64))
    array = np.asarray(small)[:, :, : shape[0]] if shape else np.asarray(small)[..., 0]
    return from_array(np.ascontiguousarray(array))


def written(picture: Picture, format: str, *options: Options) -> bytes:
    file = io.BytesIO()
    assert save(picture, file, format, *options) == []
    return file.getvalue()


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_a_lower_quality_makes_a_smaller_file(format: str) -> None:
    picture = smooth(3)
    sizes = [len(written(picture, format, Options(quality))) for quality in (20, 60, None)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


@pytest.mark.parametrize(("subsampling", "code"), [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2), (None, 0)])
def test_the_subsampling_of_a_jpeg_is_the_one_asked_for(subsampling: str | None, code: int) -> None:
    with Image.open(io.BytesIO(written(smooth(3), "jpeg", Options(90, subsampling)))) as image:
        assert JpegImagePlugin.get_sampling(image) == code


def test_the_subsampling_of_an_avif_is_the_one_asked_for() -> None:
    full, half = (written(smooth(3), "avif", Options(90, subsampling)) for subsampling in ("4:4:4", "4:2:0"))
    assert len(half) < len(full)


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("png", Options(quality=80), "PNG has no quality to set: leave it out, or choose JPEG"),
        ("tiff", Options(quality=80), "TIFF has no quality"),
        ("jpeg", Options(quality=0), "the quality 0 of JPEG is not in 1..100"),
        ("webp", Options(subsampling="4:2:0"), "WEBP has no subsampling"),
        ("avif", Options(subsampling="4:1:1"), "'4:1:1' is not one of 4:4:4, 4:2:2, 4:2:0"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_does(format: str, options: Options, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        save(smooth(3), io.BytesIO(), format, options)


# --- alpha ---


@pytest.mark.parametrize("format", ["jpeg", "bmp", "ppm"])
def test_an_opaque_alpha_is_no_obstacle(format: str) -> None:
    picture = from_array(np.dstack([smooth(3).pixels, np.full((64, 96), 255, np.uint8)]))
    assert read(written(picture, format)).colour == ColourMode.RGB


def test_a_background_shows_through_as_far_as_the_alpha_lets_it() -> None:
    array = np.zeros((1, 3, 4), np.uint8)
    array[0, :, :3], array[0, :, 3] = (200, 100, 0), (0, 128, 255)
    flat = flattened(from_array(array), (0, 0, 255))
    assert (flat.colour, flat.alpha) == (ColourMode.RGB, None)
    np.testing.assert_array_equal(flat.pixels[0], [(0, 0, 255), (100, 50, 127), (200, 100, 0)])
    opaque = smooth(3)
    assert flattened(opaque, (1, 2, 3)) is opaque


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp"])
def test_grey_stays_grey_on_grey_and_becomes_rgb_on_a_colour(format: str) -> None:
    alpha = np.zeros((64, 96), np.uint8)
    picture = Picture(smooth().pixels, ColourMode.GREY_ALPHA, alpha)
    white = read(written(picture, format, Options(background=(255, 255, 255))))
    assert white.colour == ColourMode.GREY and white.pixels.min() >= 254
    blue = read(written(picture, format, Options(background=(0, 0, 255))))
    assert blue.colour == ColourMode.RGB
    np.testing.assert_allclose(blue.pixels[0, 0], (0, 0, 255), atol=2)


# --- metadata that does not fit ---


def test_colours_stay_where_the_format_cannot_hold_their_profile() -> None:
    picture = from_array(np.full((4, 4, 3), (250, 20, 20), np.uint8))
    picture.icc = SWAPPED + bytes(2_000_000)  # Pillow's programs refuse such a PNG
    file = io.BytesIO()
    notes = save(picture, file, "png")
    assert notes == [
        "colours were converted from the ICC profile to sRGB",
        "PNG cannot hold the ICC data of 2,000,588 bytes: it was left out",
    ]
    again = read(file.getvalue())
    assert again.icc is None
    np.testing.assert_array_equal(again.pixels, stripped(picture).pixels)


@pytest.mark.parametrize("xmp", [None, b"<x:xmpmeta/>", b'<x:xmpmeta tiff:Orientation="3"/>'])
def test_a_picture_is_upright_where_the_format_cannot_hold_its_exif(xmp: bytes | None) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    picture = from_array(np.asarray(smooth(3).pixels))
    picture.exif, picture.xmp = tags.tobytes().removeprefix(b"Exif\0\0") + bytes(70_000), xmp
    file = io.BytesIO()
    (note,) = save(picture, file, "jpeg")
    assert note.startswith("JPEG cannot hold the EXIF data")
    again = read(file.getvalue())
    assert again.exif is None and again.xmp == (None if xmp and b"tiff" in xmp else xmp)
    assert np.abs(again.pixels.astype(int) - np.rot90(picture.pixels, -1)).max() <= 12


def test_every_output_is_read_again_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = io.BytesIO(), output.open_image

    def other(data: io.BytesIO, formats: list[str]) -> Image.Image:
        return opened(data, formats).resize((7, 7))

    monkeypatch.setattr(output, "open_image", other)
    with pytest.raises(ImageError, match="of 96 x 64 pixels says that it has 7 x 7: choose PNG"):
        save(smooth(3), file, "tiff")
    monkeypatch.setattr(output, "open_image", lambda *_: opened(io.BytesIO(b"II*\0"), ["TIFF"]))
    with pytest.raises(ImageError, match="TIFF cannot hold this picture of 96 x 64 pixels"):
        save(smooth(3), file, "tiff")
    assert file.getvalue() == b""


# --- stripping ---


def test_stripping_can_keep_the_profile_and_the_colours_in_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = from_array(np.asarray(smooth(3).pixels))
    picture.icc, picture.exif, picture.xmp = SWAPPED, exif.tobytes().removeprefix(b"Exif\0\0"), b"<x:xmpmeta/>"
    bare = stripped(picture, "keep-icc")
    assert (bare.icc, bare.exif, bare.xmp, bare.notes) == (SWAPPED, None, None, [])
    np.testing.assert_array_equal(bare.pixels, np.rot90(picture.pixels, -1))
    assert stripped(picture, False) is picture
