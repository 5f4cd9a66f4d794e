"""What files say beyond what Pillow tells: kind, samples, colours, and what gets lost."""

import hashlib
import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from files import Tags, chunk, grey_tags, png, segment, tiff
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from bitstream.container import ColourMode
from bitstream.errors import ImageError
from vqcodec.alpha import prepared
from vqcodec.image import from_array, from_pil, orientation, read, stripped
from vqcodec.output import save

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RAMP = np.tile(np.linspace(0, 1, 64), (16, 1))
RGB = np.stack([np.rint(RAMP * 255), np.rint(RAMP[:, ::-1] * 255), np.full_like(RAMP, 128)], -1).astype(np.uint8)


def jpeg(pixels: np.ndarray = RGB, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


# --- what it is ---


def raw_pages(kind: int, tag: int = 262) -> tuple[Tags, bytes, list[tuple[Tags, bytes]]]:
    """A thumbnail with a full picture behind it."""
    full = grey_tags(64, 48, 16) | {254: (4, [0]), tag: (3, [kind])}
    return grey_tags(32, 24) | {254: (4, [1])}, bytes(32 * 24), [(full, bytes(64 * 48 * 2))]


RAW = {
    "colour filter array": tiff(raw_pages(32803)[0], raw_pages(32803)[1], children=raw_pages(32803)[2]),
    "linear raw": tiff(raw_pages(34892)[0], raw_pages(34892)[1], ">", children=raw_pages(34892)[2]),
    "compressed by Nikon": tiff(*raw_pages(34713, 259)[:2], children=raw_pages(34713, 259)[2]),
    "in the chain": tiff(*raw_pages(32803)[:2], children=raw_pages(32803)[2], chain=True),
    "DNG of one page": tiff(grey_tags(32, 24) | {50706: (1, b"\1\4\0\0")}, bytes(32 * 24)),
    "CR2": b"II*\0\x10\0\0\0CR\2\0" + bytes(100),
    "CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100),
    "RAF": b"FUJIFILMCCD-RAW 0201" + bytes(100),
    "ORF": b"IIRO\x08\0\0\0" + bytes(100),
    "RW2": b"IIU\0\x18\0\0\0" + bytes(100),
}


@pytest.mark.parametrize("name", RAW)
def test_a_raw_photograph_is_refused_and_not_its_thumbnail_taken(name: str) -> None:
    with pytest.raises(ImageError, match="raw photograph.*develop it first"):
        read(RAW[name])


def test_a_raw_photograph_opened_by_pillow_is_refused_as_well() -> None:
    with Image.open(io.BytesIO(RAW["colour filter array"])) as opened, pytest.raises(ImageError, match="develop it"):
        from_pil(opened)


def test_a_thumbnail_before_the_picture_is_passed_over() -> None:
    thumbnail, pixels, _ = raw_pages(1)
    full = grey_tags(64, 48) | {254: (4, [0])}
    picture = read(tiff(thumbnail, pixels, children=[(full, bytes([200]) * (64 * 48))], chain=True))
    assert picture.pixels.shape == (48, 64, 3) and np.all(picture.pixels == 200)
    assert picture.notes == []
    with pytest.raises(ImageError, match="64 x 48 pixels, the limit is 3071"):
        read(tiff(thumbnail, pixels, children=[(full, bytes(64 * 48))], chain=True), max_pixels=64 * 48 - 1)


def test_reduced_copies_behind_the_picture_are_no_lost_frames() -> None:
    full, (small, pixels, _) = grey_tags(64, 48), raw_pages(1)
    assert read(tiff(full, bytes(64 * 48), children=[(small, pixels)] * 3, chain=True)).notes == []
    pages = [(full, bytes(64 * 48)), (small, pixels)]
    assert read(tiff(full, bytes(64 * 48), children=pages, chain=True)).notes == ["only frame 1 of 2 was read"]


def test_a_picture_where_pillow_cannot_read_it_is_refused_with_both_sizes() -> None:
    thumbnail, pixels, full = raw_pages(1)
    with pytest.raises(ImageError, match="32 x 24 is a thumbnail, and the one of 64 x 48 cannot be read"):
        read(tiff(thumbnail, pixels, children=full))


def test_icons_tell_that_there_are_others() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), "red").save(file, "ICO", sizes=[(16, 16), (32, 32), (64, 64)])
    picture = read(file.getvalue())
    assert picture.pixels.shape == (64, 64, 3) and picture.notes == ["only the largest of 3 icons was read"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC needs pip install 'vqcodec[heif]'"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC needs pip install 'vqcodec[heif]'"),
        (b"\xff\x0a", "JPEG XL needs pip install 'vqcodec[jxl]'"),
    ],
)
def test_a_format_without_its_decoder_is_named(data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqcodec.source.plugged", lambda format: False)
    with pytest.raises(ImageError, match=re.escape(words)):
        read(data + bytes(100))


def test_a_file_that_begins_like_a_picture_is_called_that_and_a_few_letters_are_not() -> None:
    with pytest.raises(ImageError, match="begins like PNG and is damaged, or of a kind that cannot be read"):
        read(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(ImageError, match="not an image, or not in a format that Pillow reads"):
        read(b"bad")


def test_a_vq2_file_is_not_called_damaged_or_foreign() -> None:
    golden = next((Path(__file__).parent / "golden" / "decode").glob("*.vq2"))
    with pytest.raises(ImageError, match="is a .vq2 file already: decode it"):
        read(golden)


@pytest.mark.parametrize("loop", [8, 0])
def test_directories_in_a_loop_end(loop: int) -> None:
    data = bytearray(tiff(grey_tags(2, 2), bytes(4)))
    first = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<I", data, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], first if loop else 0)
    assert read(bytes(data)).pixels.shape == (2, 2, 3)


# --- samples ---


def packed12(samples: np.ndarray) -> bytes:
    pairs = samples.astype(int).reshape(-1, 2)
    return (
        np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        .astype("u1")
        .tobytes()
    )


S16, F32 = {"_339": (3, [2])}, {"_339": (3, [3])}
DEEP = {
    "12 bits": (grey_tags(64, 16, 12), packed12(np.rint(RAMP * 4095)), "12-bit", False),
    "16 bits, white is zero": (grey_tags(64, 16, 16, 0), np.rint(RAMP * 65535).astype("<u2").tobytes(), "16-bit", True),
    "16 bits": (grey_tags(64, 16, 16, 1), np.rint(RAMP * 65535).astype("<u2").tobytes(), "16-bit", False),
    "16 bits with a sign": (
        grey_tags(64, 16, 16, 1, **S16),
        np.rint(RAMP * 32767).astype("<i2").tobytes(),
        "16-bit",
        False,
    ),
    "8 bits, white is zero": (grey_tags(64, 16, 8, 0), np.rint(RAMP * 255).astype("u1").tobytes(), "", True),
    "4 bits, white is zero": (
        grey_tags(64, 16, 4, 0),
        np.packbits((np.rint(RAMP * 15).astype("u1")[..., None] >> np.arange(4)[::-1] & 1).ravel()).tobytes(),
        "",
        True,
    ),
    "floats": (grey_tags(64, 16, 32, 1, **F32), RAMP.astype("<f4").tobytes(), "32-bit", False),
    "floats, white is zero": (grey_tags(64, 16, 32, 0, **F32), RAMP.astype("<f4").tobytes(), "32-bit", True),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_has_the_brightness_and_polarity_that_the_header_says(name: str) -> None:
    tags, data, bits, inverted = DEEP[name]
    picture = read(tiff(tags, data))
    grey = picture.pixels[..., 0].astype(float)
    np.testing.assert_allclose(grey, 255 * (1 - RAMP if inverted else RAMP), atol=9 if "4 bits" in name else 1)
    assert [note[:6] for note in picture.notes] == [bits] * bool(bits)


def test_deflated_12_and_16_bits_are_what_the_uncompressed_are() -> None:
    for name in ("16 bits", "16 bits, white is zero"):
        tags, data, _, _ = DEEP[name]
        plain = read(tiff(tags, data))
        again = read(tiff(tags | {259: (3, [8])}, zlib.compress(data)))
        np.testing.assert_array_equal(plain.pixels, again.pixels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_is_kept_at_every_depth(bits: int) -> None:
    samples = np.tile(np.arange(64) >> (6 - min(bits, 6)), (16, 1))
    key = 1
    opened = png(samples, chunk(b"tRNS", struct.pack(">H", key)), bits=bits)
    picture = read(opened)
    assert picture.colour == ColourMode.GREY_ALPHA and picture.notes == []
    np.testing.assert_array_equal(picture.alpha, np.where(samples == key, 0, 255))
    np.testing.assert_array_equal(picture.pixels[..., 0], samples * 255 // (2**bits - 1))
    with Image.open(io.BytesIO(opened)) as lazy:
        np.testing.assert_array_equal(from_pil(lazy).alpha, picture.alpha)


def test_samples_far_below_their_white_are_noted() -> None:
    for top, noted in (4095, True), (16383, True), (16500, False), (65535, False), (0, False):
        picture = from_pil(Image.fromarray(np.rint(RAMP * top).astype(np.uint16)))
        assert [str(top) in note for note in picture.notes[1:]] == [True] * noted
    deep = np.rint(RAMP * 4095).astype(">u2")[..., None].repeat(3, 2)
    raw = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 64, 16, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert "the brightest sample is" in read(data).notes[1]
    assert "the brightest is 4095" in from_pil(Image.fromarray((RAMP * 4095).astype(np.float32))).notes[0]


def test_channels_of_no_stated_meaning_are_noted() -> None:
    tags = grey_tags(64, 16) | {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [0])}
    picture = read(tiff(tags, np.dstack([RGB, RGB[..., :1]]).tobytes()))
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.notes == ["a channel of no stated meaning was left out"]


# --- colours ---


def lit(picture: object) -> np.ndarray:
    """The pixels in sRGB."""
    return stripped(picture).pixels.astype(float)  # type: ignore[arg-type]


GAMMA = chunk(b"gAMA", struct.pack(">I", 100000))
GAMMA_SRGB = chunk(b"gAMA", struct.pack(">I", 45455))
P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
CHRM_P3 = chunk(b"cHRM", struct.pack(">8I", *P3))
CHRM_SRGB = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
CICP_P3 = chunk(b"cICP", bytes([12, 13, 0, 1]))


def test_a_png_of_linear_light_keeps_its_meaning() -> None:
    picture = read(png(np.full((4, 4), 64), GAMMA))
    assert picture.icc and picture.icc[16:20] == b"GRAY" and picture.notes == []
    assert abs(lit(picture)[0, 0, 0] - 137) <= 1, "64/255 of the light is 137 in sRGB"
    assert abs(lit(read(png(np.full((4, 4, 3), 64), GAMMA)))[0, 0, 0] - 137) <= 1


@pytest.mark.parametrize("declared", [GAMMA_SRGB + CHRM_P3, CHRM_P3, CICP_P3, CICP_P3 + chunk(b"sRGB", b"\0") + GAMMA])
def test_a_png_of_wide_colours_keeps_its_meaning(declared: bytes) -> None:
    picture = read(png(np.full((4, 4, 3), (200, 100, 100)), declared))
    assert picture.icc and picture.icc[16:20] == b"RGB " and picture.notes == []
    np.testing.assert_allclose(lit(picture)[0, 0], (214, 95, 98), atol=3)
    bare = stripped(picture)
    assert bare.notes == ["colours were converted from the ICC profile to sRGB"]


@pytest.mark.parametrize(
    "declared",
    [
        b"",
        GAMMA_SRGB,
        CHRM_SRGB,
        GAMMA_SRGB + CHRM_SRGB,
        chunk(b"sRGB", b"\0") + GAMMA,
        chunk(b"cICP", bytes([1, 13, 0, 1])),
    ],
)
def test_a_png_of_srgb_gets_no_profile(declared: bytes) -> None:
    picture = read(png(RGB, declared))
    assert picture.icc is None and picture.notes == []


def test_the_profile_of_a_png_goes_before_its_other_chunks() -> None:
    picture = read(png(RGB, chunk(b"iCCP", b"x\0\0" + zlib.compress(SRGB)) + GAMMA))
    assert picture.icc == SRGB


@pytest.mark.parametrize("declared", [chunk(b"cICP", bytes([9, 16, 0, 1])), chunk(b"cICP", bytes([9, 18, 0, 1]))])
def test_hdr_is_noted(declared: bytes) -> None:
    picture = read(png(RGB, declared))
    assert picture.icc is None and len(picture.notes) == 1 and "HDR" in picture.notes[0]


@pytest.mark.parametrize(
    "declared",
    [
        chunk(b"cHRM", struct.pack(">8I", 31270, 0, *P3[2:])),
        chunk(b"cHRM", struct.pack(">8I", *P3[:2], *[31270, 32900] * 3)),
    ],
)
def test_impossible_colours_are_noted(declared: bytes) -> None:
    picture = read(png(RGB, declared))
    assert picture.icc is None and ["impossible" in note for note in picture.notes] == [True]


@pytest.mark.parametrize(
    ("space", "interop", "icc"), [(2, None, True), (0xFFFF, "R03", True), (1, None, False), (1, "R98", False)]
)
def test_the_colour_space_of_exif_is_kept(space: int, interop: str | None, icc: bool) -> None:
    tags = Image.Exif()
    tags[0x8769] = {0xA001: space} | ({0xA005: {1: interop}} if interop else {})
    picture = read(jpeg(np.full((16, 16, 3), (60, 200, 60), np.uint8), exif=tags, quality=100))
    assert bool(picture.icc) == icc and picture.notes == []
    expected = (0, 201, 37) if icc else (60, 200, 60)  # Adobe RGB's green is out of sRGB
    np.testing.assert_allclose(lit(picture)[8, 8], expected, atol=5)


def test_exif_speaks_for_a_png_that_says_nothing_itself() -> None:
    tags = Image.Exif()
    tags[0x8769] = {0xA001: 2}
    exif = chunk(b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0"))
    assert read(png(RGB, exif)).icc
    assert read(png(RGB, exif + chunk(b"sRGB", b"\0"))).icc is None


def test_exif_that_says_only_that_it_is_not_srgb_is_noted() -> None:
    tags = Image.Exif()
    tags[0x8769] = {0xA001: 0xFFFF}
    (note,) = read(jpeg(exif=tags)).notes
    assert "not sRGB" in note
    assert read(jpeg(exif=tags, icc_profile=SRGB)).notes == []


def test_the_primaries_and_the_curve_of_a_tiff_are_kept() -> None:
    colours = {318: (5, [3127, 10000, 3290, 10000]), 319: (5, [v for p in P3[2:] for v in (p, 100000)])}
    rgb = grey_tags(4, 4) | {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}
    pixels = bytes((200, 100, 100)) * 16
    picture = read(tiff(rgb | colours, pixels))  # type: ignore[arg-type]
    np.testing.assert_allclose(lit(picture)[0, 0], (214, 95, 98), atol=3)
    linear = colours | {301: (3, [257 * level for level in range(256)])}
    picture = read(tiff(rgb | linear, pixels))  # type: ignore[arg-type]
    assert lit(picture)[0, 0, 1] > 150


@pytest.mark.parametrize(
    ("codes", "icc", "note"),
    [((12, 13), True, ""), ((1, 13), False, ""), ((1, 1), False, ""), ((2, 2), False, ""), ((9, 16), False, "HDR")],
)
def test_the_colours_that_an_avif_declares_are_kept(codes: tuple[int, int], icc: bool, note: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 100)).save(file, "AVIF", quality=100, subsampling="4:4:4")
    data = bytearray(file.getvalue())
    at = data.index(b"colrnclx") + 8
    struct.pack_into(">HH", data, at, *codes)
    picture = read(bytes(data))
    assert bool(picture.icc) == icc and [note in found for found in picture.notes] == [True] * bool(note)


def test_the_profiles_of_jpeg_2000_and_bmp_are_kept() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "JPEG2000")
    data = file.getvalue()
    at = data.index(b"colr")
    box = struct.pack(">I", 11 + len(SRGB)) + b"colr\2\0\0" + SRGB
    data = data[: at - 4] + box + data[at + 11 :]
    jp2h = data.index(b"jp2h")
    size = struct.unpack_from(">I", data, jp2h - 4)[0]
    data = data[: jp2h - 4] + struct.pack(">I", size + len(SRGB) - 4) + data[jp2h:]
    assert read(data).icc == SRGB

    rows = RGB[::-1, :, ::-1].tobytes()
    v5 = struct.pack("<IiiHHIIiiII", 124, 64, 16, 1, 24, 0, len(rows), 2835, 2835, 0, 0) + bytes(16)
    v5 += b"DEBM" + bytes(36 + 12) + struct.pack("<IIII", 4, 124 + len(rows), len(SRGB), 0)
    bmp = b"BM" + struct.pack("<IHHI", 14 + len(v5) + len(rows) + len(SRGB), 0, 0, 14 + len(v5)) + v5 + rows + SRGB
    picture = read(bmp)
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.icc == SRGB


# --- what is lost, and what is not ---


def test_what_follows_a_jpeg_is_noted_and_what_is_within_is_not() -> None:
    tags = Image.Exif()
    tags[0x010E] = "\xff\xd9 an end that is none"
    data = jpeg(exif=tags, progressive=True)
    assert read(data).notes == [] and read(data + b"\0\0\r\n").notes == []
    (note,) = read(data + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 800).notes
    assert note.startswith("204,812 bytes behind the picture's end were left out")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "MPO"])
def test_what_follows_other_pictures_is_noted(format: str) -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, format, save_all=True, append_images=[Image.fromarray(RGB)] * (format == "MPO"))
    frames = read(file.getvalue()).notes
    assert len(frames) == (format == "MPO")
    assert "1,000 bytes behind the picture's end" in read(file.getvalue() + b"a" * 1000).notes[-1]


def test_comments_text_and_iptc_are_noted() -> None:
    assert read(jpeg(comment=b"scanned by nobody")).notes == ["a comment was left out: 'scanned by nobody'"]
    text = chunk(b"tEXt", b"parameters\0a castle") + chunk(b"zTXt", b"Software\0\0" + zlib.compress(b"x"))
    assert read(png(RGB, b"", text)).notes == ["text was left out: parameters, Software"]
    iptc = b"\x1c\x02\x78\x00\x0bA test card"
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc
    data = jpeg()
    assert read(data[:2] + segment(0xED, b"Photoshop 3.0\0" + resource) + data[2:]).notes == ["IPTC data was left out"]
    rgb = grey_tags(64, 16) | {258: (3, [8] * 3), 262: (3, [2]), 277: (3, [3])}
    for tag in (33723, 34377):
        content = iptc if tag == 33723 else resource
        assert read(tiff(rgb | {tag: (7, content)}, RGB.tobytes())).notes == ["IPTC data was left out"]


def packet(inner: bytes, attributes: bytes = b"") -> bytes:
    rdf = b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        + rdf
        + b"><rdf:Description "
        + attributes
        + b">"
        + inner
        + b"</rdf:Description></rdf:RDF></x:xmpmeta>"
    )


GUID = b"0123456789ABCDEF0123456789ABCDEF"
NOTE = b'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="' + GUID + b'" rdf:about=""'


def with_xmp(main: bytes, extension: bytes, guid: bytes = GUID) -> bytes:
    segments = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + main)
    parts = range(0, len(extension), 60000)
    for at in reversed(parts):  # any order is right
        head = b"http://ns.adobe.com/xmp/extension/\0" + guid + struct.pack(">II", len(extension), at)
        segments += segment(0xE1, head + extension[at : at + 60000])
    return jpeg()[:2] + segments + jpeg()[2:]


def test_extended_xmp_is_joined() -> None:
    depth = b'<d:map xmlns:d="urn:d">' + b"A" * 90_000 + b"</d:map>"
    picture = read(with_xmp(packet(b"", NOTE + b' xmlns:tiff="urn:t" tiff:Make="a"'), packet(depth)))
    assert picture.notes == []
    assert picture.xmp and depth in picture.xmp and b'tiff:Make="a"' in picture.xmp and b"Extended" not in picture.xmp


@pytest.mark.parametrize(
    "data",
    [
        with_xmp(packet(b"", NOTE), b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + b"A" * 90_000 + b"</x:xmpmeta>"),
        with_xmp(packet(b"", NOTE), packet(b"<no:prefix/>" + b"A" * 70_000)),
        with_xmp(packet(b"", NOTE), packet(b"A" * 70_000), guid=b"F" * 32),
        with_xmp(packet(b"", b'rdf:about=""'), packet(b"A" * 70_000)),
    ],
    ids=["no RDF", "an undeclared prefix", "of another packet", "of none"],
)
def test_extended_xmp_that_does_not_fit_is_noted_and_the_other_kept(data: bytes) -> None:
    picture = read(data)
    assert picture.xmp and b"AAAA" not in picture.xmp
    assert [note.startswith("extended XMP of ") for note in picture.notes] == [True]


@pytest.mark.parametrize("turn", [1, 6])
def test_xmp_that_is_too_long_for_a_packet_is_extended_in_jpeg(turn: int) -> None:
    depth = b'<d:map xmlns:d="urn:d">' + b"A" * 150_000 + b"</d:map>"
    picture = from_array(np.full((16, 24, 3), 128, np.uint8))
    turned = b'rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"' % turn
    picture.xmp = b"<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?>" + packet(depth, turned) + b"<?xpacket end='w'?>"
    file = io.BytesIO()
    assert save(picture, file, "jpeg") == []
    data = file.getvalue()

    extension, guids, at = bytearray(), set(), 0
    while (at := data.find(b"http://ns.adobe.com/xmp/extension/\0", at) + 35) > 35:
        size = int.from_bytes(data[at - 37 : at - 35], "big")
        whole, start = struct.unpack_from(">II", data, at + 32)
        guids.add(data[at : at + 32])
        assert start == len(extension)
        extension += data[at + 40 : at - 37 + size]
    assert len(extension) == whole and guids == {hashlib.md5(extension).hexdigest().upper().encode()}
    main = Image.open(file).info["xmp"]
    assert guids.pop() in main and b"AAAA" not in main and b"xpacket" not in extension

    again = read(data)
    assert again.notes == [] and again.xmp and depth in again.xmp and turned in again.xmp
    assert orientation(again) == orientation(picture) == turn
    twice = io.BytesIO()
    assert save(again, twice, "jpeg") == [] and depth in (read(twice.getvalue()).xmp or b"")


def test_xmp_that_would_not_come_back_is_left_out_of_jpeg() -> None:
    picture = from_array(np.full((16, 24, 3), 128, np.uint8))
    picture.xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + b"<!-- mask -->" * 8000 + b"</x:xmpmeta>"
    (note,) = save(picture, io.BytesIO(), "jpeg")
    assert note == f"JPEG cannot hold the XMP data of {len(picture.xmp):,} bytes: it was left out"


# --- large chunks of PNG ---

BIG_ICC = bytearray(SRGB) + bytes(1_300_000)
BIG_ICC[:4] = struct.pack(">I", len(BIG_ICC))
BIG_XMP = packet(b"<!-- mask -->" * 100_000)


def test_compressed_chunks_of_more_than_a_megabyte_are_read() -> None:
    picture = read(png(RGB, chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(BIG_ICC)))))
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.icc == bytes(BIG_ICC) and picture.notes == []
    itxt = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG_XMP))
    for data in (png(RGB, itxt), png(RGB, b"", itxt)):
        picture = read(data)
        assert picture.xmp == BIG_XMP and picture.notes == []
    picture = read(png(RGB, chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"0" * 1_300_000))))
    assert picture.notes == ["text was left out: parameters"]


def test_compressed_chunks_of_more_than_64_megabytes_are_left_out_with_a_note() -> None:
    bomb = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(70 << 20)))
    picture = read(png(RGB, bomb))
    np.testing.assert_array_equal(picture.pixels, RGB)
    assert picture.notes[0] == "zTXt of more than 64 MB was left out: bomb"
    many = b"".join(chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(bytes(9 << 20))) for k in range(9))
    assert "more than 64 MB" in read(png(RGB, many)).notes[0]


def test_a_large_chunk_with_a_wrong_checksum_is_damage() -> None:
    data = bytearray(png(RGB, chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(BIG_ICC)))))
    data[data.index(b"iCCP") + 200] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        read(bytes(data))


def test_a_profile_over_the_limit_is_dropped_with_a_note() -> None:
    picture = from_pil(Image.fromarray(RGB))
    assert picture.icc is None
    image = Image.fromarray(RGB)
    image.info["icc_profile"] = SRGB + bytes(50_000_000)
    picture = from_pil(image)
    assert picture.icc is None and "50,000,588 bytes, the limit is 16,707,345: it was dropped" in picture.notes[0]


# --- truncated ---


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_read_on_request_with_a_note(progressive: bool) -> None:
    photo = np.asarray(Image.open(Path(__file__).parent / "images" / "photo.png").convert("RGB"))
    data = jpeg(photo, progressive=progressive)
    with pytest.raises(ImageError, match="truncated"):
        read(data[: len(data) // 2])
    picture = read(data[: len(data) // 2], lenient=True)
    assert picture.pixels.shape == photo.shape
    assert np.abs(picture.pixels[:8].astype(int) - photo[:8]).mean() < (30 if progressive else 8)
    assert picture.notes == ["the file is truncated or damaged: what is missing of the picture is grey, black or clear"]
    assert read(data, lenient=True).notes == []


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_a_truncated_png_is_read_on_request_with_a_note(mode: str, interlace: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 70, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=None)
    data = file.getvalue()
    with pytest.raises(ImageError, match="truncated"):
        read(data[: len(data) // 2])
    picture = read(data[: len(data) // 2], lenient=True)
    assert picture.pixels.shape == (60, 70, 3) and len(picture.notes) == 1
    np.testing.assert_array_equal(picture.pixels[:10], from_pil(image).pixels[:10])


def test_what_cannot_be_completed_is_refused_as_before() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "WEBP", lossless=True)
    for data in (file.getvalue()[:-100], b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", png(RGB)[:40]):
        with pytest.raises(ImageError):
            read(data, lenient=True)


# --- other threads ---


def test_reading_a_picture_over_pillows_limit_changes_no_global(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    original = PngImageFile._open

    def watched(self: PngImageFile) -> None:  # what another thread would find meanwhile
        seen.append(Image.MAX_IMAGE_PIXELS)
        original(self)

    monkeypatch.setattr(PngImageFile, "_open", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(png(RGB)).pixels.shape == (16, 64, 3)
    assert seen == [7]


# --- what is not seen ---


def test_an_alpha_that_is_opaque_everywhere_is_not_coded() -> None:
    picture = from_array(np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]))
    assert prepared(picture).colour == ColourMode.RGB and prepared(picture).alpha is None
    assert picture.colour == ColourMode.RGBA, "the caller's stays as it is"
    picture.alpha[0, 0] = 254  # type: ignore[index]
    assert prepared(picture).alpha is picture.alpha


def test_invisible_pixels_are_smooth_and_visible_ones_stay() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((33, 50), (1, 7), (64, 64), (1, 1)):
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., :3] = pixels[..., :3] // 8 + 100
        hidden = np.zeros((height, width), bool)
        hidden[height // 4 : height // 2 + 1, width // 4 :] = True
        pixels[..., 3] = np.where(hidden, 0, np.maximum(pixels[..., 3], 1))
        pixels[hidden, :3] = rng.integers(0, 256, (hidden.sum(), 3))
        before = pixels.copy()
        filled = prepared(from_array(pixels))
        np.testing.assert_array_equal(pixels, before)
        np.testing.assert_array_equal(filled.pixels[~hidden], pixels[~hidden][:, :3])
        np.testing.assert_array_equal(filled.alpha, pixels[..., 3])
        if not hidden.all():
            assert filled.pixels.min() >= 100 and filled.pixels.max() <= 131, "between those that are visible"
            assert np.ptp(filled.pixels[hidden].astype(int), axis=0).max() < 28
