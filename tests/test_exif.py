"""EXIF blocks and TIFF directories: what is not meant to change does not, to the byte."""

import contextlib
import io
import re
import struct

import numpy as np
import pytest
from files import Tags, directory, grey_tags, tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vqcodec import exif
from vqcodec.image import from_array, from_pil, read, stripped
from vqcodec.output import save
from vqcodec.xmp import without_gps

MAKER_NOTE = b"MN\0" + bytes(range(200))
LATITUDE = (5, [52, 1, 31, 1, 123, 10])
FACTS: Tags = {  # of another file: 5000 x 4000 pixels of four inks, tiled
    256: (4, [5000]),
    257: (4, [4000]),
    258: (3, [8, 8, 8, 8]),
    259: (3, [5]),
    262: (3, [5]),
    273: (4, [99999]),
    277: (3, [4]),
    279: (4, [7]),
    284: (3, [2]),
    322: (3, [64]),
    513: (4, [12]),
}


def block(
    e: str = "<", orientation: int = 1, gps: bool = True, thumbnail: bytes = b"\xff\xd8a thumbnail\xff\xd9"
) -> bytes:
    """As cameras and editors write them: facts of another file, a maker note, interoperability, GPS, a thumbnail, odd
    values. Nothing lies where a writer of today would put it."""
    out = (b"II*\0" if e == "<" else b"MM\0*") + bytes(4)
    note_at = len(out)
    out += MAKER_NOTE + b"\0"
    thumbnail_at = len(out)
    out += thumbnail.ljust(len(thumbnail) + len(thumbnail) % 2, b"\0")
    interop = len(out)
    out += directory({1: (2, b"R98\0"), 2: (7, b"0100")}, interop, e)
    details = len(out)
    tags: Tags = {0x9003: (2, b"2020:02:02 20:20:20\0"), 0x927C: (7, MAKER_NOTE), 0xA005: (4, [interop])}
    body = directory(tags, details, e)
    body = body.replace(MAKER_NOTE, b"x" * len(MAKER_NOTE))  # it is the one above that the tag points to
    at = body.index(struct.pack(e + "HHI", 0x927C, 7, len(MAKER_NOTE)))
    out += body[: at + 8] + struct.pack(e + "I", note_at) + body[at + 12 :]
    place = len(out)
    out += directory({1: (2, b"N\0"), 2: LATITUDE, 0x1D: (2, b"2020:02:02\0")}, place, e)
    second = len(out)
    small: Tags = {259: (3, [6]), 513: (4, [thumbnail_at]), 514: (4, [len(thumbnail)])}
    out += directory(small, second, e) if thumbnail else b""
    first = len(out)
    tags = FACTS | {
        271: (2, b"a camera\0"),
        274: (3, [orientation]),
        282: (2, b"odd\0"),
        305: (3, [1, 2]),
        0x8769: (4, [details]),
    }
    tags |= {0x8825: (4, [place])} if gps else {}
    out += directory(tags, first, e, second if thumbnail else 0)
    return out[:4] + struct.pack(e + "I", first) + out[8:]


BLOCKS = [block(e, orientation) for e in "<>" for orientation in (1, 6)]


def details_of(data: bytes, at: int) -> tuple[exif.Directory, exif.Directory, exif.Directory, exif.Directory]:
    fields, _ = exif.directory(data, at)
    details = exif.sub_directory(data, fields, exif.EXIF)
    return fields, details, exif.sub_directory(data, fields, exif.GPS), exif.sub_directory(data, details, exif.INTEROP)


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 3), (30, 40, 4)])
@pytest.mark.parametrize("data", BLOCKS)
def test_a_tiff_says_of_itself_what_is_true_whatever_exif_says(data: bytes, shape: tuple[int, ...]) -> None:
    picture = from_array(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    picture.exif, picture.xmp = data, b"<x:xmpmeta/>"
    file = io.BytesIO()
    assert save(picture, file, "tiff") == []
    made = file.getvalue()
    fields, details, gps, interop = details_of(made, exif.first(made))
    with Image.open(io.BytesIO(made)) as again:
        assert again.n_frames == 1
        again.load()
        assert again.size == (
            (30, 40) if exif.number(data, exif.directory(data, exif.first(data))[0], 274) == 6 else (40, 30)
        )
    np.testing.assert_array_equal(read(made).pixels, stripped(picture).pixels)
    assert (exif.number(made, fields, 256), exif.number(made, fields, 257)) == (40, 30)
    assert 322 not in fields and 513 not in fields
    assert fields[271].data == b"a camera\0" and fields[282].data == b"odd\0"
    assert gps[2].data == exif.sub_directory(data, exif.directory(data, exif.first(data))[0], exif.GPS)[2].data
    assert interop[1].data == b"R98\0"
    assert details[0x927C].data == MAKER_NOTE and details[0x927C].start == data.index(MAKER_NOTE), (
        "what points into it is right"
    )
    ((thumbnail, chained),) = list(exif.pages(made))[1:]
    assert not chained and exif.number(made, thumbnail, 259) == 6
    assert read(made).xmp == picture.xmp


@pytest.mark.parametrize("format", ["avif", "jpeg", "png", "webp"])
@pytest.mark.parametrize("data", BLOCKS)
def test_exif_goes_through_other_formats_to_the_byte(data: bytes, format: str) -> None:
    picture = from_array(np.full((30, 40, 3), 90, np.uint8))
    picture.exif = data
    file = io.BytesIO()
    assert save(picture, file, format) == []
    again = read(file.getvalue())
    assert again.exif == data and again.pixels.shape == (30, 40, 3)


def test_the_orientation_of_an_avif_is_in_the_file_itself() -> None:
    picture = from_array(np.full((30, 40, 3), 90, np.uint8))
    picture.exif = block(orientation=6)
    file = io.BytesIO()
    save(picture, file, "avif")
    assert b"irot" in file.getvalue()


@pytest.mark.parametrize(
    "broken", [b"II*\0\xff\xff\xff\xff", b"MM\0*" + bytes(4), b"II*\0\x08\0\0\0\xff\xff" + bytes(20)]
)
def test_broken_exif_costs_itself_and_not_the_output(broken: bytes) -> None:
    picture = from_array(np.full((30, 40, 3), 90, np.uint8))
    picture.exif, picture.xmp = broken, b"<x:xmpmeta/>"
    file = io.BytesIO()
    assert save(picture, file, "tiff") == [f"TIFF cannot hold the EXIF data of {len(broken)} bytes: it was left out"]
    again = read(file.getvalue())
    assert again.exif is None and again.xmp == picture.xmp


# --- from TIFF ---


@pytest.mark.parametrize("e", "<>")
def test_a_tiff_gives_its_exif_with_all_that_hangs_on_it(e: str) -> None:
    data = block(e)
    source = io.BytesIO()
    picture = from_array(np.full((30, 40, 3), 90, np.uint8))
    picture.exif = data
    save(picture, source, "tiff")
    found = read(source.getvalue())
    assert found.exif and found.notes == []
    fields, details, gps, interop = details_of(found.exif, exif.first(found.exif))
    assert fields[271].data == b"a camera\0" and not fields.keys() & FACTS.keys()
    assert fields[282].data == b"odd\0", "an odd value is nobody's business"
    assert details[0x927C].data == MAKER_NOTE and interop[1].data == b"R98\0" and len(gps) == 3


def test_a_tiff_that_is_loaded_already_gives_no_facts_of_its_file_either() -> None:
    with Image.open(io.BytesIO(tiff(grey_tags(4, 4) | {271: (2, b"a camera\0")}, bytes(16)))) as opened:
        opened.load()
        found = from_pil(opened).exif
    assert found and set(exif.directory(found, exif.first(found))[0]) == {271}


def test_the_exif_of_a_bigtiff_is_read() -> None:
    pixels = bytes(16)
    tags = [
        (256, 3, 1, 4),
        (257, 3, 1, 4),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (271, 2, 7, int.from_bytes(b"camera\0", "little")),
    ]
    tags += [(273, 16, 1, 16), (277, 3, 1, 1), (278, 3, 1, 4), (279, 16, 1, 16)]
    entries = b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    data = b"II+\0\x08\0\0\0" + struct.pack("<Q", 32) + pixels + struct.pack("<Q", len(tags)) + entries + bytes(8)
    found = read(data).exif
    assert found and exif.directory(found, 8)[0][271].data == b"camera\0"


# --- without the location ---


@pytest.mark.parametrize("e", "<>")
def test_without_the_location_all_else_stays_where_it_is(e: str) -> None:
    data = block(e)
    bare = exif.without_gps(data)
    assert len(bare) == len(data)
    before, details_before, gps, interop_before = details_of(data, exif.first(data))
    fields, details, none, interop = details_of(bare, exif.first(bare))
    assert none == {} and fields.keys() == before.keys() - {exif.GPS}
    assert (details, interop) == (details_before, interop_before)
    assert exif.directory(bare, exif.first(bare))[1] == exif.directory(data, exif.first(data))[1] > 0
    for tag in (2, 0x1D):
        assert gps[tag].data in data and gps[tag].data not in bare
    tags = Image.Exif()
    tags.load(bare)
    assert tags[271] == "a camera" and not tags.get_ifd(exif.GPS)
    twice = bytearray(data)
    at = data.index(struct.pack(e + "HHI", 0x1D, 2, len(gps[0x1D].data)))
    twice[at : at + 2] = struct.pack(e + "H", 2)
    assert gps[2].data not in exif.without_gps(bytes(twice))
    untouched = block(e, gps=False)
    assert exif.without_gps(untouched) == untouched


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r" xmlns:exif="e" xmlns:drone-dji="d" xmlns:xmp="x">
<rdf:Description xmp:Rating="5" exif:GPSLatitude="52,31.1N" exif:GPSLongitude='13,2E' drone-dji:GpsLongitude = "13.03">
<exif:GPSAltitude>34/1</exif:GPSAltitude><xmp:Label>red</xmp:Label><exif:GPSTimeStamp/>
<a:Latitude x="1">52.5</a:Latitude>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


def test_the_location_alone_is_stripped_from_exif_and_xmp() -> None:
    picture = from_array(np.zeros((4, 6, 3), np.uint8))
    picture.exif, picture.xmp, picture.icc = block(orientation=6), XMP, b"a profile"
    bare = stripped(picture, "gps")
    assert bare.exif == exif.without_gps(picture.exif) and bare.icc == b"a profile" and bare.notes == []
    assert bare.pixels.shape == (4, 6, 3), "the orientation is still in EXIF"
    assert bare.xmp
    for gone in (b"52", b"13", b"34/1", b"GPS", b"Gps", b"Latitude"):
        assert gone not in bare.xmp
    assert b'xmp:Rating="5"' in bare.xmp and b"<xmp:Label>red</xmp:Label>" in bare.xmp
    assert picture.xmp == XMP


# Quadratic time for a search that backtracks, or that looks for the end of each of them.
@pytest.mark.parametrize("part", [b" x:GPS", b"<a:GPS>", b"<a:GPS", b" x:GPS=", b"GPS", b":GPS"])
def test_what_is_no_property_stays_and_takes_no_time(part: bytes) -> None:
    xmp = part * 100_000
    assert without_gps(xmp) == xmp


@given(
    st.lists(st.sampled_from([b"<a:GPS>", b"</a:GPS>", b"<b:GPS/>", b"<b:Label>", b"</b:Label>", b" c:GPS='1'", b" x"]))
)
def test_properties_that_say_where_are_gone_with_what_is_in_them(parts: list[bytes]) -> None:
    xmp = b"".join(parts)
    simple = re.compile(rb"<b:GPS/>|<a:GPS>.*?</a:GPS>| c:GPS='1'")
    assert without_gps(xmp) == simple.sub(b"", xmp)


def test_the_location_of_broken_exif_does_not_stay() -> None:
    picture = from_array(np.zeros((4, 6, 3), np.uint8))
    picture.exif, picture.icc = block()[:-150], b"a profile"
    bare = stripped(picture, "gps")
    assert bare.exif is None and bare.icc == b"a profile" and len(bare.notes) == 1


# --- resolution ---


@pytest.mark.parametrize(
    ("format", "target"), [("JPEG", "png"), ("PNG", "jpeg"), ("TIFF", "png"), ("BMP", "tiff"), ("PNG", "bmp")]
)
def test_the_resolution_goes_along(format: str, target: str) -> None:
    source, file = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(source, format, dpi=(300, 200))
    picture = read(source.getvalue())
    assert picture.notes == [] and picture.exif
    assert exif.resolution(picture.exif) == pytest.approx((300, 200), rel=1e-3)
    save(picture, file, target)
    with Image.open(io.BytesIO(file.getvalue())) as again:
        assert again.info["dpi"] == pytest.approx((300, 200), rel=1e-2)


@pytest.mark.parametrize("dpi", [(72, 72), (96, 96), (1, 1)])
def test_a_resolution_that_says_nothing_costs_nothing(dpi: tuple[int, int]) -> None:
    for format in ("JPEG", "PNG", "TIFF"):
        source = io.BytesIO()
        Image.new("RGB", (8, 8)).save(source, format, dpi=dpi)
        assert read(source.getvalue()).exif is None


@pytest.mark.parametrize("e", "<>")
def test_a_resolution_is_added_to_exif_without_moving_anything(e: str) -> None:
    data = block(e)
    assert exif.with_resolution(data, 300, 300, 2) is data, "there is one, odd as it is"
    plain = data.replace(struct.pack(e + "HHI", 282, 2, 4), struct.pack(e + "HHI", 281, 2, 4))
    more = exif.with_resolution(plain, 300, 150, 2)
    assert exif.resolution(more) == (300, 150) and more[8 : len(plain)] == plain[8:]
    before, details, gps, interop = details_of(plain, exif.first(plain))
    after, *rest = details_of(more, exif.first(more))
    assert rest == [details, gps, interop] and after.keys() == before.keys() | {282, 283, 296}
    assert exif.directory(more, exif.first(more))[1] == exif.directory(plain, exif.first(plain))[1]


# --- hostile ---


def test_values_that_overlap_are_refused_before_they_are_copied() -> None:
    size = 1 << 20
    tags = b"".join(struct.pack("<HHII", 270 + number, 7, size - 8, 8) for number in range(60000))
    data = (b"II*\0" + struct.pack("<I", size)).ljust(size, b"a") + struct.pack("<H", 60000) + tags + bytes(4)
    with pytest.raises(ValueError, match="overlap"):
        exif.directory(data, size)


@pytest.mark.filterwarnings("ignore")
@given(place=st.integers(0, 2000), junk=st.binary(min_size=1, max_size=4), e=st.sampled_from("<>"))
def test_damaged_blocks_are_read_or_refused_and_nothing_else(place: int, junk: bytes, e: str) -> None:
    data = bytearray(block(e))
    place %= len(data)
    data[place : place + len(junk)] = junk
    picture = from_array(np.zeros((3, 4, 3), np.uint8))
    picture.exif = bytes(data)
    stripped(picture, "gps")
    for format in ("tiff", "avif"):
        file = io.BytesIO()
        save(picture, file, format)
        assert read(file.getvalue()).pixels.size == 36
    whole = bytearray(tiff(grey_tags(4, 3), bytes(12), e))
    whole[place % len(whole)] = junk[0]
    with contextlib.suppress(ValueError):
        exif.from_tiff(bytes(whole), exif.first(bytes(whole)))
