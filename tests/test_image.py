import io
import itertools
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import png_chunk, png_header, wrong_alphas
from PIL import Image, ImageCms, ImageOps

from bitstream.container import NO_LIMIT, ColourMode
from bitstream.errors import DamagedError, ImageError
from vqcodec import image
from vqcodec.image import (
    Picture,
    endings,
    from_array,
    from_pil,
    pack_alpha,
    read,
    stripped,
    to_pil,
    unpack_alpha,
)
from vqcodec.output import save

PIL_MODE = {
    ColourMode.GREY: "L",
    ColourMode.GREY_ALPHA: "LA",
    ColourMode.RGB: "RGB",
    ColourMode.RGBA: "RGBA",
}
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/">Zoë</x:xmpmeta>'.encode()


def exif(orientation: int = 1) -> bytes:
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    tags[0x0112] = orientation
    tags[0x8769] = {0x9003: "2020:02:02 20:20:20"}
    tags[0x8825] = {1: "N"}
    return tags.tobytes().removeprefix(b"Exif\0\0")


def profile(space: bytes, pcs: bytes, tag: bytes, content: bytes) -> bytes:
    """The smallest ICC profile that lcms accepts: a header, a white point, and one tag that says it all."""
    d50 = (63190, 65536, 54061)
    white = struct.pack(">4s4x3i", b"XYZ ", *d50)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), tag, 156 + len(white), len(content))
    size = 156 + len(white) + len(content)
    fields = (size, 0x02400000, b"prtr", space, pcs, b"acsp", *d50)
    return struct.pack(">I4xI4s4s4s12x4s28x3i48x", *fields) + table + white + content


def black_ink_profile() -> bytes:
    """CMYK in which any ink at all prints black, so that its use shows."""
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    paper, black = bytes([255, 128, 128]), bytes([0, 128, 128])
    tables = bytes(range(256))
    lut = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + identity + tables * 4 + paper + black * 15 + tables * 3
    return profile(b"CMYK", b"Lab ", b"A2B0", lut)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")  # red is green
LINEAR_GREY = profile(b"GRAY", b"XYZ ", b"kTRC", struct.pack(">4s4xIH2x", b"curv", 1, 0x0100))
BLACK_INK = black_ink_profile()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def file_of(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, samples: bytes, key: bytes = b"") -> bytes:
    """A PNG file of one colour, of kinds that Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    idat = chunk(b"IDAT", zlib.compress((b"\0" + samples * width) * height))
    return b"\x89PNG\r\n\x1a\n" + ihdr + (key and chunk(b"tRNS", key)) + idat + chunk(b"IEND", b"")


# --- modes ---


def pixel(mode: str, value: Any, **info: object) -> Image.Image:
    picture = Image.new(mode, (1, 1), value)
    picture.info.update(info)
    return picture


def palette(mode: str = "P", **info: object) -> Image.Image:
    """One pixel: entry 1 of black, (10, 20, 30); with mode PA its alpha is 44."""
    picture = pixel("P", 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    if mode == "PA":
        picture = picture.convert("PA")
        picture.putpixel((0, 0), (1, 44))
    picture.info.update(info)
    return picture


GREY, GREY_ALPHA, RGB, RGBA = ColourMode.GREY, ColourMode.GREY_ALPHA, ColourMode.RGB, ColourMode.RGBA
MODES = {
    "1": (pixel("1", 1), GREY, (255,), None),
    "1 with a key": (pixel("1", 1, transparency=255), GREY_ALPHA, (255,), 0),
    "L": (pixel("L", 7), GREY, (7,), None),
    "L with a key": (pixel("L", 7, transparency=7), GREY_ALPHA, (7,), 0),
    "LA": (pixel("LA", (7, 8)), GREY_ALPHA, (7,), 8),
    "La": (pixel("La", (51, 51)), GREY_ALPHA, (255,), 51),
    "P": (palette(), RGB, (10, 20, 30), None),
    "P with a transparent entry": (palette(transparency=1), RGBA, (10, 20, 30), 0),
    "P with another transparent entry": (palette(transparency=0), RGBA, (10, 20, 30), 255),
    "P with alpha for each entry": (palette(transparency=b"\x05\x06"), RGBA, (10, 20, 30), 6),
    "PA": (palette("PA"), RGBA, (10, 20, 30), 44),
    "RGB": (pixel("RGB", (1, 2, 3)), RGB, (1, 2, 3), None),
    "RGB with a key": (pixel("RGB", (1, 2, 3), transparency=(1, 2, 3)), RGBA, (1, 2, 3), 0),
    "RGBA": (pixel("RGBA", (1, 2, 3, 0)), RGBA, (1, 2, 3), 0),
    "RGBa": (pixel("RGBa", (51, 0, 51, 51)), RGBA, (255, 0, 255), 51),
    "RGBX": (pixel("RGBX", (1, 2, 3, 4)), RGB, (1, 2, 3), None),
}
CYAN = (255, 0, 0, 0)
CONVERTED = {
    "CMYK": (pixel("CMYK", CYAN), RGB, (0, 255, 255), "CMYK was converted to RGB without an ICC profile"),
    "CMYK with ICC": (pixel("CMYK", CYAN, icc_profile=BLACK_INK), RGB, (0, 0, 0), "through its ICC profile"),
    "YCbCr": (pixel("YCbCr", (90, 128, 128)), RGB, (90, 90, 90), "YCbCr was converted to RGB"),
    "HSV": (pixel("HSV", (0, 255, 90)), RGB, (90, 0, 0), "HSV was converted to RGB"),
    "LAB": (pixel("LAB", (0, 128, 128)), RGB, (0, 0, 0), "LAB was converted to RGB"),
    "I;16": (pixel("I;16", 0x40F0), GREY, (0x41,), "16-bit samples"),
    "I;16B": (pixel("I;16B", 0x4080), GREY, (0x40,), "16-bit samples"),
    "I": (pixel("I", 70000), GREY, (255,), "65535 or more is white"),
    "F up to 1": (pixel("F", 0.2), GREY, (51,), "1 or more is white"),
    "F up to 255": (pixel("F", 50.6), GREY, (51,), "255 or more is white"),
    "F up to 65535": (pixel("F", 51 * 257), GREY, (51,), "65535 or more is white"),
    "F not a number": (pixel("F", float("nan")), GREY, (0,), "32-bit samples"),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_that_8_bits_can_hold_is_read_exactly_and_without_a_note(name: str) -> None:
    source, colour, value, alpha = MODES[name]
    picture = from_pil(source)
    assert picture.colour == colour
    assert tuple(picture.pixels[0, 0]) == (value * 3)[:3]
    assert (picture.alpha is None) if alpha is None else (picture.alpha == alpha)
    assert picture.notes == []


@pytest.mark.parametrize("name", CONVERTED)
def test_a_mode_that_must_be_converted_is_converted_with_a_note(name: str) -> None:
    source, colour, value, note = CONVERTED[name]
    picture = from_pil(source)
    assert (picture.colour, picture.alpha, picture.icc) == (colour, None, None)
    np.testing.assert_allclose(picture.pixels[0, 0], (value * 3)[:3], atol=name == "LAB")
    assert len(picture.notes) == 1 and note in picture.notes[0]


def test_16_bits_are_rounded_to_the_nearest_of_8() -> None:
    samples = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    reduced = from_pil(Image.fromarray(samples)).pixels[..., 0]
    np.testing.assert_array_equal(reduced, np.rint(samples * (255 / 65535)))


def test_the_transparent_value_of_a_16_bit_png_is_kept() -> None:
    for grey, alpha in (b"\x03\xe8", 0), (b"\x03\xe9", 255):
        picture = read(png(2, 2, 16, 0, grey, key=b"\0\0\x03\xe8"[2:]))
        assert picture.colour == GREY_ALPHA and np.all(picture.alpha == alpha)
    picture = read(png(2, 2, 16, 2, b"\x03\xe8\x07\xd0\xff\xff", key=b"\x03\xe8\x07\xd0\xff\xff"))
    assert picture.colour == RGBA and np.all(picture.alpha == 0)


def test_colours_of_16_bits_are_noted_although_pillow_hides_them() -> None:
    note = ["16-bit samples were reduced to 8 bits"]
    assert read(png(2, 2, 16, 2, b"\x03\xe8\x07\xd0\xff\xff")).notes == note
    assert read(b"P6 1 1 1023\n" + bytes(6)).notes == note
    assert read(b"P3 1 1 1023\n1023 0 0\n").notes == note
    assert read(b"P6 1 1 255\n" + bytes(3)).notes == []


@pytest.mark.parametrize(
    ("format", "field", "bits"), [("AVIF", b"pixi\0\0\0\0\3", 10), ("JPEG2000", b"\xff\x4f\xff\x51", 12)]
)
def test_the_depth_that_a_header_declares_is_noted_where_pillow_hides_it(format: str, field: bytes, bits: int) -> None:
    """Pillow writes no such files, so the header is changed once it is opened, before the pixels are decoded."""
    data = file_of(Image.new("RGB", (8, 8), "red"), format)
    assert read(data).notes == []
    opened = Image.open(io.BytesIO(data))
    at = data.index(field) + (len(field) if format == "AVIF" else 42)
    depth = bits if format == "AVIF" else bits - 1
    picture = image._from_file(opened, data[:at] + bytes([depth]) + data[at + 1 :], NO_LIMIT)
    assert picture.notes == [f"{bits}-bit samples were reduced to 8 bits"]


def test_a_cmyk_jpeg_has_the_colours_that_pillow_gives_it() -> None:
    source = Image.new("CMYK", (8, 8), (0, 200, 100, 20))
    expected = np.array(source.convert("RGB"))
    assert np.max(np.abs(read(file_of(source, "JPEG", quality=100)).pixels - expected.astype(int))) <= 4


def test_a_cmyk_picture_with_a_useless_profile_is_converted_without_it() -> None:
    picture = from_pil(pixel("CMYK", CYAN, icc_profile=SRGB))
    assert tuple(picture.pixels[0, 0]) == (0, 255, 255)
    assert picture.icc is None and len(picture.notes) == 2


@settings(deadline=None)
@given(
    data=st.data(),
    mode=st.sampled_from(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK"]),
)
def test_size_colour_alpha_and_metadata_survive_both_conversions(data: st.DataObject, mode: str) -> None:
    width, height = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    source = Image.frombytes(mode, (width, height), data.draw(st.binary(min_size=size, max_size=size)))
    if mode == "P":
        source.putpalette(data.draw(st.binary(min_size=768, max_size=768)))
    grey = mode in ("1", "L", "LA", "La")
    metadata = {"icc_profile": LINEAR_GREY if grey else SRGB, "exif": b"Exif\0\0" + exif(6), "xmp": XMP}
    source.info.update({key: value for key, value in metadata.items() if data.draw(st.booleans())})

    picture = from_pil(source)
    result = to_pil(picture)
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa")
    assert result.size == source.size
    assert result.mode == ("L" if grey else "RGB") + ("A" if alpha else "")
    assert picture.pixels.shape == (height, width, 3)
    if mode in ("1", "L", "LA", "RGB", "RGBA"):
        assert result.tobytes() == source.convert(result.mode).tobytes()
    if alpha:
        assert result.getchannel("A").tobytes() == source.getchannel(source.getbands()[-1]).tobytes()
    if mode == "CMYK":
        source.info.pop("icc_profile", None)
    assert result.info == source.info
    assert np.array_equal(from_pil(result).pixels, picture.pixels)


def test_pixels_are_writable_and_contiguous() -> None:
    for mode in ("L", "LA", "RGB", "RGBA"):
        picture = from_pil(Image.new(mode, (3, 2)))
        for array in (picture.pixels, picture.alpha):
            assert array is None or (array.flags.writeable and array.flags.c_contiguous)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        from_pil(Image.new("L", (0, 5)))


# --- arrays ---


@pytest.mark.parametrize(("shape", "colour"), [((4, 5), GREY), ((4, 5, 3), RGB), ((4, 5, 4), RGBA)])
def test_an_array_becomes_a_picture_and_comes_back(shape: tuple[int, ...], colour: ColourMode) -> None:
    array = noise(*shape)
    picture = from_array(array)
    assert picture.colour == colour
    np.testing.assert_array_equal(np.array(to_pil(picture)), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), bool),
        np.zeros((4, 5), np.uint16),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_an_array_that_is_no_image_is_refused_with_its_shape_and_type(array: np.ndarray) -> None:
    with pytest.raises(ImageError) as caught:
        from_array(array)
    assert str(array.shape) in str(caught.value) and str(array.dtype) in str(caught.value)


# --- files ---


def test_a_path_bytes_an_open_file_and_a_pipe_read_the_same(tmp_path: Path) -> None:
    data = file_of(Image.fromarray(noise(4, 5, 3)))
    path = tmp_path / "a.png"
    path.write_bytes(data)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    for source in (path, str(path), data, io.BytesIO(data), Pipe(data)):
        np.testing.assert_array_equal(read(source).pixels, noise(4, 5, 3))


def test_errors_of_the_file_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.png")
    with pytest.raises(OSError) as caught:
        read(tmp_path)
    assert not isinstance(caught.value, ImageError)


def test_an_empty_file_is_refused_as_empty() -> None:
    with pytest.raises(ImageError, match="empty"):
        read(b"")


def test_a_file_that_is_no_image_is_refused_as_such() -> None:
    with pytest.raises(ImageError, match="not an image"):
        read(b"Dear diary, today nothing happened. " * 100)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "PPM", "TGA"])
def test_a_truncated_file_is_refused_in_one_line(format: str) -> None:
    data = file_of(Image.fromarray(noise(40, 50, 3)), format)
    with pytest.raises(ImageError) as caught:
        read(data[: len(data) * 2 // 3])
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]),
    place=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_and_nothing_else(format: str, place: float, junk: bytes) -> None:
    data = bytearray(file_of(Image.fromarray(noise(9, 8, 3)), format))
    start = int(place * len(data))
    data[start : start + len(junk)] = junk
    try:
        assert isinstance(read(bytes(data), max_pixels=10**6), Picture)
    except ImageError as error:
        assert "\n" not in str(error)


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded() -> None:
    bomb = png(1, 1, 8, 2, b"abc").replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 50000))
    ihdr = bomb.index(b"IHDR")
    bomb = bomb[: ihdr + 17] + struct.pack(">I", zlib.crc32(bomb[ihdr : ihdr + 17])) + bomb[ihdr + 21 :]
    with pytest.raises(ImageError, match="60000 x 50000 pixels, the limit is 134217728"):
        read(bomb)


def test_the_limit_is_the_callers_and_pillows_own_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("L", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert read(data, max_pixels=100).pixels.shape == (10, 10, 3)
    with pytest.raises(ImageError, match="10 x 10 pixels, the limit is 99"):
        read(data, max_pixels=99)
    assert Image.MAX_IMAGE_PIXELS == 7


@pytest.mark.parametrize("format", ["TIFF", "WEBP"])
def test_where_pillow_keeps_its_own_limit_the_message_names_it(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("L", (10, 10)), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(
        ImageError, match="too large for Pillow in this format, save it as PNG .*100 pixels.* 14 pixels"
    ):
        read(data)


def test_what_is_too_long_to_be_decoded_again_is_not_read() -> None:
    for size in ((800, 1), (1, 800)):
        data = file_of(Image.new("L", size))
        assert read(data, max_pixels=100**2).pixels.size == 2400
        with pytest.raises(ImageError, match="the limit of 9999 pixels allows 799 a side"):
            read(data, max_pixels=100**2 - 1)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read_with_a_note(format: str) -> None:
    first, *others = (Image.new("L", (8, 8), 100 * number) for number in range(3))
    picture = read(file_of(first, format, save_all=True, append_images=others))
    assert np.all(picture.pixels == 0)
    assert picture.notes == ["only frame 1 of 3 was read"]


# --- metadata ---


def test_exif_orientation_is_kept_and_not_applied() -> None:
    source = Image.fromarray(noise(4, 6, 3))
    picture = read(file_of(source, "PNG", exif=exif(6)))
    np.testing.assert_array_equal(picture.pixels, np.array(source))
    assert picture.exif == exif(6)


@pytest.mark.parametrize(
    ("mode", "icc"), [("L", SRGB), ("RGB", LINEAR_GREY), ("RGB", b"not a profile"), ("L", BLACK_INK)]
)
def test_an_icc_profile_for_other_pixels_is_dropped_with_a_note(mode: str, icc: bytes) -> None:
    picture = from_pil(pixel(mode, 0, icc_profile=icc))
    assert picture.icc is None
    assert len(picture.notes) == 1 and "ICC profile" in picture.notes[0]


def test_damaged_exif_is_dropped_with_a_note() -> None:
    picture = from_pil(pixel("RGB", 0, exif=b"Exif\0\0garbage"))
    assert picture.exif is None
    assert picture.notes == ["the EXIF data is damaged and was dropped"]


def test_the_descriptive_tags_of_a_tiff_become_exif() -> None:
    tiff = file_of(Image.new("RGB", (3, 2)), "TIFF", exif=b"Exif\0\0" + exif(1))
    tags = Image.Exif()
    tags.load(read(tiff).exif or b"")
    assert tags[0x010F] == "a camera"
    assert tags.get_ifd(0x8769) == {0x9003: "2020:02:02 20:20:20"}
    assert tags.get_ifd(0x8825) == {1: "N"}
    assert not {0x0100, 0x0111} & set(tags), "size and strips describe the file, not the picture"


def test_a_tiff_without_descriptive_tags_has_no_exif() -> None:
    assert read(file_of(Image.new("RGB", (3, 2)), "TIFF")).exif is None


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("place", ["exif", "xmp"])
def test_stripping_turns_the_pixels_as_the_orientation_says(orientation: int, place: str) -> None:
    picture = from_array(noise(4, 6, 4))
    if place == "exif":
        picture.exif = exif(orientation)
    else:
        picture.xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    upright = ImageOps.exif_transpose(to_pil(picture))
    bare = stripped(picture)
    np.testing.assert_array_equal(np.array(to_pil(bare)), np.array(upright))
    assert (bare.icc, bare.exif, bare.xmp, bare.notes) == (None, None, None, [])


def test_stripping_a_picture_with_broken_exif_leaves_the_pixels_alone() -> None:
    picture = from_array(noise(4, 6, 3))
    picture.exif = b"II*\0\xff\xff"
    np.testing.assert_array_equal(stripped(picture).pixels, picture.pixels)


def test_stripping_converts_another_colour_space_to_srgb_with_a_note() -> None:
    picture = from_array(np.full((2, 2, 3), (250, 20, 20), np.uint8))
    picture.icc = SWAPPED
    bare = stripped(picture)
    red, green, _ = bare.pixels[0, 0]
    assert red < 60 and green > 200
    assert bare.icc is None
    assert bare.notes == ["colours were converted from the ICC profile to sRGB"]
    assert picture.notes == [] and picture.icc == SWAPPED, "the original stays as it is"


def test_stripping_a_grey_profile_keeps_the_picture_grey() -> None:
    picture = from_array(np.full((2, 2), 64, np.uint8))
    picture.icc = LINEAR_GREY
    bare = stripped(picture)
    assert bare.colour == GREY and np.ptp(bare.pixels) == 0
    assert abs(int(bare.pixels[0, 0, 0]) - 137) <= 2, "64/255 of the light is 137 in sRGB"


def test_stripping_an_srgb_profile_changes_no_pixel() -> None:
    picture = from_array(noise(16, 16, 3))
    picture.icc = SRGB
    bare = stripped(picture)
    np.testing.assert_array_equal(bare.pixels, picture.pixels)
    assert bare.icc is None and bare.notes == []


def test_stripping_a_useless_profile_is_noted() -> None:
    picture = from_array(noise(2, 2, 3))
    picture.icc = b"not a profile"
    assert stripped(picture).notes == ["the ICC profile cannot be used and was dropped"]


# --- saving ---


SHAPES = [(8, 12), (8, 12, 3), (8, 12, 4)]


@pytest.mark.parametrize(
    ("format", "shape"),
    [*itertools.product(["png", "webp", "avif", "tiff"], SHAPES), *itertools.product(["jpeg"], SHAPES[:2])],
)
def test_a_saved_file_has_the_size_and_all_metadata(format: str, shape: tuple[int, ...]) -> None:
    picture = from_array(np.full(shape, 128, np.uint8))
    picture.icc, picture.exif, picture.xmp = (LINEAR_GREY if len(shape) == 2 else SRGB), exif(1), XMP
    file = io.BytesIO()
    lost = save(picture, file, format)
    again = read(file.getvalue())
    assert again.pixels.shape == picture.pixels.shape
    assert again.xmp == XMP
    tags = Image.Exif()
    tags.load(again.exif or b"")
    assert tags[0x010F] == "a camera" and tags.get_ifd(0x8825) == {1: "N"}
    if format in ("webp", "avif") and len(shape) == 2:  # read back as RGB, for which a grey profile is none
        assert again.icc is None
        assert lost == ["colours were converted from the ICC profile to sRGB"]
    else:
        assert again.icc == picture.icc
        assert np.max(np.abs(again.pixels.astype(int) - 128)) <= 2
        assert lost == []


@pytest.mark.parametrize("format", ["png", "webp", "tiff"])
@pytest.mark.parametrize("shape", SHAPES)
def test_png_webp_and_tiff_are_lossless(format: str, shape: tuple[int, ...]) -> None:
    picture = from_array(noise(*shape))
    file = io.BytesIO()
    save(picture, file, format)
    again = read(file.getvalue())
    np.testing.assert_array_equal(again.pixels, picture.pixels)
    np.testing.assert_array_equal(again.alpha, picture.alpha)


def test_exif_and_xmp_survive_png_jpeg_and_webp_to_the_byte() -> None:
    picture = from_array(noise(4, 6, 3))
    picture.exif, picture.xmp = exif(6), XMP
    for format in ("png", "jpeg", "webp"):
        file = io.BytesIO()
        save(picture, file, format)
        again = read(file.getvalue())
        assert (again.exif, again.xmp) == (picture.exif, picture.xmp)


@pytest.mark.parametrize("format", ["bmp", "ppm"])
def test_a_format_without_metadata_gets_an_upright_picture_and_says_so(format: str) -> None:
    picture = from_array(noise(4, 6, 3))
    picture.exif = exif(6)
    file = io.BytesIO()
    lost = save(picture, file, format)
    np.testing.assert_array_equal(read(file.getvalue()).pixels, np.rot90(picture.pixels, -1))
    assert len(lost) == 1 and "cannot hold metadata" in lost[0]
    assert picture.notes == []


@pytest.mark.parametrize("format", ["jpg", "JPEG", "bmp", "ppm"])
def test_alpha_is_refused_by_a_format_without_it(format: str) -> None:
    with pytest.raises(ImageError, match="alpha.*choose PNG or WebP"):
        save(from_array(noise(4, 5, 4)), io.BytesIO(), format)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="'xyz'.*png"):
        save(from_array(noise(4, 5)), tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "content"), [("xmp", XMP * 2000), ("exif", exif() + bytes(70000)), ("icc", SRGB + bytes(17_000_000))]
)
def test_metadata_too_long_for_the_format_is_left_out_with_a_note(kind: str, content: bytes) -> None:
    picture, file = from_array(noise(4, 5, 3)), io.BytesIO()
    picture.icc, picture.exif, picture.xmp = SRGB, exif(6), XMP
    setattr(picture, kind, content)
    notes = save(picture, file, "jpeg")
    assert notes == [f"JPEG cannot hold the {kind.upper()} data of {len(content):,} bytes: it was left out"]
    again = read(file.getvalue())
    kept = {name: getattr(again, name) for name in ("icc", "exif", "xmp")}
    assert kept == {"icc": SRGB, "exif": exif(6), "xmp": XMP, kind: None}
    assert picture.notes == [] and getattr(picture, kind) == content, "the caller's stays as it is"


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("a.png", None, "PNG"),
        ("a.JPG", None, "JPEG"),
        ("a.tif", None, "TIFF"),
        ("a", None, "PNG"),
        ("a.png", "webp", "WEBP"),
    ],
)
def test_the_format_is_the_given_one_or_follows_from_the_name(
    tmp_path: Path, name: str, format: str | None, expected: str
) -> None:
    save(from_array(noise(4, 5, 3)), tmp_path / name, format)
    with Image.open(tmp_path / name) as again:
        assert again.format == expected


def test_an_open_file_gets_png_unless_told_otherwise() -> None:
    file = io.BytesIO()
    save(from_array(noise(4, 5, 3)), file)
    assert file.getvalue().startswith(b"\x89PNG")


# --- alpha ---


@settings(deadline=None)
@given(data=st.data(), width=st.integers(1, 16), height=st.integers(1, 16))
def test_alpha_is_packed_losslessly(data: st.DataObject, width: int, height: int) -> None:
    samples = data.draw(st.binary(min_size=width * height, max_size=width * height))
    alpha = np.frombuffer(samples, np.uint8).reshape(height, width)
    np.testing.assert_array_equal(unpack_alpha(pack_alpha(alpha), width, height), alpha)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(pack_alpha(noise(5, 4)), id="turned"),
        pytest.param(pack_alpha(noise(4, 5))[:-30], id="truncated"),
        pytest.param(pack_alpha(noise(4, 5)).replace(b"IDAT", b"IDAX"), id="no data"),
        pytest.param(file_of(Image.fromarray(noise(4, 5, 3))), id="RGB"),
        pytest.param(file_of(Image.new("1", (5, 4))), id="1 bit"),
        pytest.param(png(5, 4, 16, 0, b"ab"), id="16 bit"),
        pytest.param(file_of(Image.fromarray(noise(4, 5)), "BMP"), id="BMP"),
    ],
)
def test_alpha_that_is_not_8_bit_grey_png_of_this_size_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedError, match="alpha"):
        unpack_alpha(data, 5, 4)


@pytest.mark.parametrize("fault", wrong_alphas())
def test_any_other_png_is_refused_before_pillow_sees_it(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "open_image", lambda *_: pytest.fail("opened"))
    with pytest.raises(DamagedError, match="48 x 40 pixels in 8-bit grey"):
        unpack_alpha(wrong_alphas()[fault], 48, 40)


def test_an_alpha_may_lie_in_any_number_of_data_chunks() -> None:
    alpha = noise(40, 48)
    stream = zlib.compress(bytes(b for row in alpha for b in (0, *row)))
    for parts in (
        [stream],
        [stream[:9], stream[9:]],
        [b"", stream, b""],
        [stream[i : i + 7] for i in range(0, len(stream), 7)],
    ):
        data = [png_header(), *(png_chunk(b"IDAT", part) for part in parts), png_chunk(b"IEND")]
        assert (unpack_alpha(b"\x89PNG\r\n\x1a\n" + b"".join(data), 48, 40) == alpha).all()


def test_no_more_of_an_alpha_is_inflated_than_the_picture_has() -> None:
    bomb = png_header() + png_chunk(b"IDAT", zlib.compress(bytes(2**26))) + png_chunk(b"IEND")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="not 1960 bytes"):
            unpack_alpha(b"\x89PNG\r\n\x1a\n" + bomb, 48, 40)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("other", [Image.new("L", (2**14, 2**14)), Image.new("RGB", (5, 4))])
def test_an_alpha_that_pillow_reads_otherwise_is_refused_before_it_is_loaded(
    other: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "open_image", lambda *_: other)
    monkeypatch.setattr(other, "load", lambda: pytest.fail("loaded"))
    with pytest.raises(DamagedError, match="cannot be decoded"):
        unpack_alpha(pack_alpha(noise(4, 5)), 5, 4)


def test_the_endings_are_known_in_a_process_that_has_opened_no_picture() -> None:
    code = "from vqcodec.image import endings; print(*sorted(endings()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {".avif", ".gif", ".jpg", ".png", ".tif", ".webp"} <= set(found)


def test_the_endings_are_those_of_pictures_that_can_be_read() -> None:
    assert {".avif", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".webp"} <= endings()
    assert not endings() & {".vq2", ".mpg", ".h5", ".pdf", ".txt"}
