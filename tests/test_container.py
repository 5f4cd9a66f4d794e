"""The file format: the code against its specification, and against every damage we can think of."""

import dataclasses
import re
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rans import read

from bitstream import container as spec
from bitstream import errors, rans
from bitstream.container import ColourMode, Container, Header, checksum, pack, unpack, verify
from bitstream.errors import BitstreamError, DamagedError, LimitError
from vqcodec import flat

HEADER = Header(level=3, width=96, height=64, colour=ColourMode.RGB, fingerprint=b"weights!")
GRIDS = [np.arange(24).reshape(2, 3, 4), np.arange(96).reshape(2, 6, 8) * 5]
RGB = Container(HEADER, checksum(HEADER, GRIDS), (b"top ", b"bottom  "))


# Sizes that need up to 64 bytes of padding.
sizes = st.tuples(st.integers(1, 2**14), st.integers(1, 2**14)).map(lambda s: (s[0], min(s[1], 2**18 // s[0])))


@st.composite
def containers(draw: st.DrawFn) -> Container:
    contents, fingerprints = st.binary(max_size=300), st.binary(min_size=8, max_size=8)
    colour, sides = draw(st.sampled_from(ColourMode)), draw(sizes.flatmap(st.permutations))
    planes = 1 if colour.one_plane else 3
    return Container(
        Header(draw(st.integers(1, spec.MAX_LEVEL)), *sides, colour, draw(fingerprints), draw(st.booleans())),
        draw(st.integers(0, 2**32 - 1)),
        tuple(draw(st.lists(contents, min_size=1, max_size=8))),
        offset=draw(st.binary(min_size=planes, max_size=planes).filter(any) | st.none()),
        flat=draw(contents | st.none()),
        alpha=draw(contents) if colour.has_alpha else None,
        icc=draw(contents | st.none()),
        exif=draw(contents | st.none()),
        xmp=draw(contents | st.none()),
    )


def refused(data: bytes, error: type[BitstreamError] = DamagedError) -> bool:
    with pytest.raises(error) as caught:
        unpack(data)
    return type(caught.value) is error


def with_chunks(*chunks: bytes, header: Header = HEADER, end: bytes = b"\x7f") -> bytes:
    head = pack(Container(header, 0, (b"",), alpha=b"" if header.colour.has_alpha else None))[:25]
    return b"".join([head, *chunks, end])


def sealed(kind: int, content: bytes) -> bytes:
    """An optional chunk, written without the help of the code under test."""
    body = content + zlib.crc32(bytes([kind]) + content).to_bytes(4, "little")
    return bytes([kind, len(body)]) + body


# --- the specification ---


def documented(section: str) -> Iterator[list[str]]:
    """The rows of the table in this section of the specification, cut at two or more blanks."""
    text = re.search(rf"^\d\. {section}\n(.*?)(?=^\d\. |\Z)", spec.__doc__ or "", re.DOTALL | re.MULTILINE)
    assert text is not None
    rows = text[1].split("\n")
    borders = [number for number, row in enumerate(rows) if row.startswith("==")]
    assert len(borders) == 3
    for row in rows[borders[1] + 1 : borders[2]]:
        yield re.split(r"\s{2,}", row)


def test_the_header_is_as_specified() -> None:
    header = Header(9, 0x030201 + 1, 0x060504 + 1, ColourMode.GREY, b"12345678")
    data = pack(Container(header, 0x0A0B0C0D, (b"",)))
    expected = {
        "magic": b"\xf6VQ2",
        "version": b"\2",
        "level": b"\x09",
        "colour": b"\0",
        "width": b"\1\2\3",
        "height": b"\4\5\6",
        "fingerprint": b"12345678",
        "checksum": b"\x0d\x0c\x0b\x0a",
    }
    position = 0
    for offset, size, field, meaning, *_ in documented("Header"):
        assert int(offset) == position
        assert data[position : position + int(size)] == expected.pop(field)
        if field == "magic":
            assert bytes.fromhex(meaning.split(":")[0]) == spec.MAGIC
        if field == "version":
            assert int(meaning) == spec.VERSION
        position += int(size)
    assert position == spec.HEADER_BYTES == 25
    assert not expected
    assert "A file is a header of 25 bytes" in (spec.__doc__ or "")


def test_the_tune_is_the_high_bit_of_the_level() -> None:
    visual = dataclasses.replace(HEADER, visual=True)
    data = pack(dataclasses.replace(RGB, header=visual))
    assert data[5] == 128 + HEADER.level and unpack(data).header == visual


def test_a_header_field_out_of_range_is_refused_as_specified() -> None:
    elsewhere = {"height": "LimitError", "fingerprint": "ModelMismatchError", "checksum": "DamagedError"}
    wrong = {"magic": b"\x89PNG", "version": b"\1", "level": b"\0", "colour": b"\4", "width": b"\xff" * 3}
    data = pack(dataclasses.replace(RGB, header=dataclasses.replace(HEADER, height=1)))
    data = data[:10] + b"\xff" * 3 + data[13:]
    for row, size, field, _, error in documented("Header"):
        start, end = int(row), int(row) + int(size)
        if field in wrong:
            assert refused(data[:start] + wrong.pop(field) + data[end:], getattr(errors, error))
        else:  # height is tested with the limits, the others are tested by those who hold the model
            assert error == elsewhere[field]
    assert not wrong


def test_the_colour_modes_are_as_specified() -> None:
    modes = [
        (int(value), name, coded == "1", "green" in out, alpha == "chunk")
        for value, name, coded, out, alpha in documented("Colour modes")
    ]
    assert modes == [(mode.value, mode.name, mode.one_plane, mode.has_hue, mode.has_alpha) for mode in ColourMode]
    equal = {mode.name for mode, (*_, out, _) in zip(ColourMode, documented("Colour modes"), strict=True) if "=" in out}
    assert {mode.name for mode in ColourMode if mode.has_hue and mode.one_plane} == equal


def test_the_modes_of_equal_planes_show_what_their_picture_had() -> None:
    shown = {mode: mode.shown for mode in ColourMode if mode is not mode.shown}
    assert shown == {ColourMode.EQUAL_RGB: ColourMode.RGB, ColourMode.EQUAL_RGBA: ColourMode.RGBA}
    for mode in ColourMode:
        assert mode.equal.one_plane and mode.equal.shown is mode.shown
        assert not mode.opaque.has_alpha and mode.opaque.one_plane == mode.one_plane


def test_a_colour_byte_that_is_no_mode_is_refused() -> None:
    for value in {*range(256)} - {0, 1, 2, 3, 5, 7}:
        assert refused(pack(RGB)[:6] + bytes([value]) + pack(RGB)[7:])


def test_the_chunk_types_are_as_specified() -> None:
    types = {name: kind for kind, name, _ in documented("Chunks")}
    assert types.pop("grid") == f"0x01..0x{spec.MAX_GRIDS:02X}"
    assert types.pop("end") == f"0x{spec.END:02X}"
    assert types == {name: f"0x{kind:02X}" for name, kind in spec.OPTIONAL_CHUNKS.items()}
    assert list(types) == [name for name in Container.__dataclass_fields__ if name in types]


def test_the_constants_in_the_text_are_those_of_the_code() -> None:
    text = " ".join((spec.__doc__ or "").split())
    assert f"It has at most {spec.MAX_VARINT_BYTES} bytes" in text
    assert f"2^{spec.DEFAULT_MAX_PIXELS.bit_length() - 1} pixels unless told otherwise" in text
    assert f"so 1..2^{spec.MAX_SIDE.bit_length() - 1} pixels" in text
    assert f"width or height exceed {spec.LONGEST} times the limit" in text
    assert f"the width and height in blocks of {spec.BLOCK} x {spec.BLOCK} pixels, rounded up" in text
    assert f"ceil(max(W, H) * max({spec.LEAST_SIDE}, min(W, H)) / {spec.BLOCKS_PER_BYTE})" in text
    assert f"for every {spec.BLOCKS_PER_BYTE} blocks, of which thin pictures count {spec.LEAST_SIDE} side" in text
    assert f"{flat.BLOCK} x {flat.BLOCK} pixels each" in text and f"number of colours, 1..{flat.MAX_COLOURS}" in text
    assert f"of the {spec.HEADER_BYTES - 4} header bytes before it" in text
    assert f"first {spec.FINGERPRINT_BYTES} bytes of the SHA-256" in text


def test_golden_bytes_have_not_changed() -> None:
    header = Header(2, 17, 9, ColourMode.GREY_ALPHA, bytes(range(8)))
    grids = [np.array([[[1, 2]], [[3, 255]]]), np.array([[[511]]], np.uint16)]
    golden = Container(
        header, checksum(header, grids, b"\1\xff\3"), (b"\1\2\3\4", b""), None, b"\1\xff\3", b"png", xmp=b"x" * 130
    )
    data = bytes.fromhex(
        "f6565132 02 02 02 100000 080000 0001020304050607 e69899a0"  # header
        "01 04 01020304  02 00"  # grids
        "40 07 01ff03 de41bfb1"  # flat blocks, with their CRC-32
        "41 07 706e67 c63ab57e"  # alpha, with its CRC-32
        "44 8601" + "78" * 130 + "13058ddf"  # xmp, with a length of two bytes
        "7f"
    )
    assert pack(golden) == data
    assert unpack(data) == golden


def test_the_checksum_is_the_crc_of_header_and_indices() -> None:
    data = pack(RGB)
    indices = b"".join(int(index).to_bytes(2, "little") for grid in GRIDS for index in grid.ravel())
    assert int.from_bytes(data[21:25], "little") == zlib.crc32(data[:21] + indices)
    assert checksum(HEADER, GRIDS, b"flat") == zlib.crc32(data[:21] + b"flat" + indices)
    assert checksum(HEADER, GRIDS, b"off", b"flat") == zlib.crc32(data[:21] + b"offflat" + indices)


def test_the_bytes_of_an_offset_are_as_specified() -> None:
    moved = dataclasses.replace(RGB, offset=b"\1\xfe\0")
    data = pack(moved)
    assert data == pack(RGB)[:-1] + bytes.fromhex("3f 07 01fe00 ef91f102 7f")  # with its CRC-32, before the end
    assert unpack(data) == moved


def test_an_offset_that_is_taken_out_or_exchanged_is_noticed() -> None:
    whole = dataclasses.replace(
        RGB, checksum=checksum(HEADER, GRIDS, b"\1\2\3", b"flat"), offset=b"\1\2\3", flat=b"flat"
    )
    verify(unpack(pack(whole)), GRIDS)
    for other in (None, b"\1\2\4"):
        with pytest.raises(DamagedError, match="do not match"):
            verify(unpack(pack(dataclasses.replace(whole, offset=other))), GRIDS)


@pytest.mark.parametrize("colour", ColourMode)
def test_an_offset_is_a_byte_for_each_coded_plane_and_not_all_zeros(colour: ColourMode) -> None:
    header = dataclasses.replace(HEADER, colour=colour)
    good, alpha = bytes([0, 0, 255]) if colour.name in ("RGB", "RGBA") else b"\xff", b"" if colour.has_alpha else None
    assert unpack(pack(Container(header, 0, (b"",), good, alpha=alpha))).offset == good
    for content in (b"", bytes(len(good)), good + b"\1", good[1:], bytes(2**20) + b"\1"):
        with pytest.raises(ValueError, match="offset"):
            Container(header, 0, (b"",), content, alpha=alpha)
    tail = () if alpha is None else (sealed(0x41, alpha),)
    for content in (b"", bytes(len(good)), good + b"\1"):
        assert refused(with_chunks(b"\1\0", sealed(0x3F, content), *tail, header=header))
    assert refused(with_chunks(b"\1\0", b"\x3f\3off", *tail, header=header))


def test_flat_blocks_that_are_taken_out_or_exchanged_are_noticed() -> None:
    whole = dataclasses.replace(RGB, checksum=checksum(HEADER, GRIDS, b"flat"), flat=b"flat")
    verify(unpack(pack(whole)), GRIDS)
    for other in (None, b"", b"flag"):
        with pytest.raises(DamagedError, match="do not match"):
            verify(unpack(pack(dataclasses.replace(whole, flat=other))), GRIDS)


# --- there and back ---


@given(containers())
def test_unpack_is_the_inverse_of_pack(original: Container) -> None:
    data = pack(original)
    assert unpack(data, max_pixels=2**48) == original
    assert pack(unpack(bytearray(data), max_pixels=2**48)) == data
    assert unpack(memoryview(data), max_pixels=2**48) == original


def test_a_long_chunk_round_trips() -> None:
    original = dataclasses.replace(RGB, grids=(bytes(127), bytes(128), bytes(2**21)))
    assert unpack(pack(original)) == original


def test_a_plain_colour_file_has_at_most_40_bytes_around_its_indices() -> None:
    payloads = (bytes(2**14), bytes(2**21))
    overhead = len(pack(dataclasses.replace(RGB, grids=payloads))) - sum(map(len, payloads))
    assert overhead + 2 * spec.MAX_VARINT_BYTES - 3 - 4 <= 40  # even if both lengths took all bytes they can


def test_the_checksum_accepts_any_memory_order_and_integer_type() -> None:
    grids = [np.asfortranarray(GRIDS[0].astype(np.uint8)), GRIDS[1].astype(">i4")]
    assert checksum(HEADER, grids) == RGB.checksum


@pytest.mark.parametrize("grid", [np.array([[[-1]]]), np.array([[[65536]]]), np.array([[[1.0]]])])
def test_the_checksum_takes_nothing_but_16_bit_indices(grid: Any) -> None:
    with pytest.raises(ValueError, match="indices"):
        checksum(HEADER, [grid])


# --- damage ---


@given(st.binary(max_size=80), st.sampled_from([0, 4, 5, 7, 25]))
def test_any_bytes_parse_or_raise_a_bitstream_error(tail: bytes, valid: int) -> None:
    data = pack(RGB)[:valid] + tail
    with suppress(BitstreamError):
        assert pack(unpack(data, max_pixels=2**48)) == data


@given(containers(), st.data())
def test_a_changed_byte_parses_or_raises_a_bitstream_error(original: Container, data: st.DataObject) -> None:
    damaged = bytearray(pack(original))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(BitstreamError):
        assert pack(unpack(damaged, max_pixels=2**48)) == damaged


def test_flipping_any_bit_of_a_file_is_refused() -> None:
    uniform = np.full((96, 512), 2**20 // 512)

    def payload(indices: Any) -> bytes:
        encoder = rans.Encoder()
        encoder.push(2**20 // 512 * indices, uniform[: len(indices), 0])
        return encoder.finish()

    def decode(data: bytes | bytearray) -> Container:
        container, grids = unpack(data), []
        for grid, original in zip(container.grids, GRIDS, strict=False):
            symbols, empty = read(grid, uniform[: original.size])
            if not empty:
                raise DamagedError
            grids.append(np.array(symbols).reshape(original.shape))
        verify(container, grids)
        return container

    header = dataclasses.replace(HEADER, colour=ColourMode.RGBA)
    payloads = tuple(payload(grid.ravel()) for grid in GRIDS)
    optional = {
        "offset": b"\0\1\xff",
        "flat": b"flat",
        "alpha": b"alpha",
        "icc": b"",
        "exif": b"Exif" * 40,
        "xmp": b"\x7f\x44\x01",
    }
    original = Container(header, checksum(header, GRIDS, b"\0\1\xff", b"flat"), payloads, **optional)
    data = pack(original)
    assert decode(data) == original
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            decode(damaged)


@given(containers())
def test_every_truncation_is_refused(original: Container) -> None:
    whole = pack(original)
    for length in range(len(whole)):
        with pytest.raises(BitstreamError):
            unpack(whole[:length], max_pixels=2**48)


@given(containers(), st.binary(min_size=1, max_size=40))
def test_appended_bytes_are_refused(original: Container, tail: bytes) -> None:
    with pytest.raises(DamagedError):
        unpack(pack(original) + tail, max_pixels=2**48)


@pytest.mark.parametrize("data", [b"", b"\xf6VQ", b"\x89PNG\r\n\x1a\n", b"GIF89a" * 10, bytes(100)])
def test_what_does_not_start_with_the_magic_is_not_a_vq2_file(data: bytes) -> None:
    assert refused(data, errors.NotVq2Error)


@pytest.mark.parametrize("version", [0, 1, 3, 255])
def test_another_version_is_refused_by_both_numbers(version: int) -> None:
    with pytest.raises(errors.UnsupportedVersionError, match=f"version {version}, this release reads version 2: ins"):
        unpack(b"\xf6VQ2" + bytes([version]))


@pytest.mark.parametrize(
    "varint", ["8400", "848000", "8480808000", "808080808001", "ffffffffffff7f", "ffffffff7f", "84", ""]
)
def test_a_length_that_is_not_minimal_or_too_long_is_refused(varint: str) -> None:
    assert refused(with_chunks(b"\1" + bytes.fromhex(varint) + b"word"))
    assert refused(with_chunks(b"\1" + bytes.fromhex(varint), end=b""))
    assert unpack(with_chunks(b"\1\4word")).grids == (b"word",)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [b"\2\0"],
        [b"\1\0", b"\3\0"],
        [b"\1\0", b"\1\0"],
        [b"\1\0", b"\2\0", b"\1\0"],
        [b"\0\0", b"\1\0"],
        [*(bytes([kind, 0]) for kind in range(1, 10))],
        [sealed(0x42, b"icc")],
        [sealed(0x42, b"icc"), b"\1\0"],
        [b"\1\0", sealed(0x42, b"icc"), b"\2\0"],
        [b"\1\0", sealed(0x42, b"icc"), sealed(0x42, b"icc")],
        [b"\1\0", sealed(0x43, b"exif"), sealed(0x42, b"icc")],
        [b"\1\0", sealed(0x45, b"unknown")],
        [b"\1\0", sealed(0x3E, b"unknown")],
        [sealed(0x3F, b"off"), b"\1\0"],
        [b"\1\0", sealed(0x40, b"flat"), sealed(0x3F, b"off")],
        [b"\1\0", sealed(0x3F, b"off"), sealed(0x3F, b"off")],
        [sealed(0x40, b"flat"), b"\1\0"],
        [b"\1\0", b"\x40\x08flat0000"],
        [b"\1\0", sealed(0x42, b"icc"), sealed(0x40, b"flat")],
        [b"\1\0", sealed(0xFF, b"unknown")],
        [b"\1\0", b"\x42\3icc"],
        [b"\1\0", b"\x42\7icc0000"],
    ],
)
def test_unknown_missing_repeated_unordered_and_unsealed_chunks_are_refused(chunks: list[bytes]) -> None:
    assert refused(with_chunks(*chunks))


@pytest.mark.parametrize("colour", ColourMode)
def test_alpha_comes_exactly_with_a_colour_mode_that_has_alpha(colour: ColourMode) -> None:
    header = dataclasses.replace(HEADER, colour=colour)
    without = with_chunks(b"\1\0", header=header)
    with_alpha = with_chunks(b"\1\0", sealed(0x41, b"a"), header=header)
    assert refused(without if colour.has_alpha else with_alpha)
    assert unpack(with_alpha if colour.has_alpha else without).alpha == (b"a" if colour.has_alpha else None)
    with pytest.raises(ValueError, match="colour mode"):
        Container(header, 0, (b"",), alpha=None if colour.has_alpha else b"a")


def test_an_image_over_the_limit_is_refused_before_anything_else_is_read() -> None:
    head = pack(RGB)[:7] + b"\xff" * 6 + pack(RGB)[13:25]
    assert refused(head, LimitError)
    assert refused(head + b"\1\xff\xff\xff\xff\x7f", LimitError)


def test_the_limit_is_inclusive_and_the_callers_choice() -> None:
    data = pack(RGB)
    assert unpack(data, max_pixels=96 * 64) == RGB
    with pytest.raises(LimitError, match="96 x 64 pixels, the limit is 6143"):
        unpack(data, max_pixels=96 * 64 - 1)


def test_the_limit_bounds_the_longer_side_too() -> None:
    for width, height in ((800, 1), (1, 800)):
        data = padded(width, height)
        assert unpack(data, max_pixels=100**2).grids == RGB.grids
        with pytest.raises(LimitError, match="the limit of 9999 pixels allows 799 a side: raise it"):
            unpack(data, max_pixels=100**2 - 1)
    # As long as the pictures of any other format that is in use.
    with pytest.raises(LimitError, match="1 x 92682 pixels, the limit of 134217728 pixels allows 92681 a side"):
        unpack(padded(1, 92682))
    assert unpack(padded(92681, 1)).header.width == 92681


def padded(width: int, height: int) -> bytes:
    return pack(dataclasses.replace(RGB, header=dataclasses.replace(HEADER, width=width, height=height)))


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (16, 16, 2),
        (1024, 1024, 1024),
        (1025, 1024, 1040),
        (1024, 1040, 1040),
        (1024, 128, 128),
        (1024, 1, 128),
        (2**16, 1, 2**13),
        (1, 2**16, 2**13),
    ],
)
def test_a_file_is_padded_to_a_byte_for_4_blocks(width: int, height: int, size: int) -> None:
    data, plain = padded(width, height), len(padded(1, 1))
    assert len(data) == max(size, plain)
    assert data[plain - 1] == spec.END and not any(data[plain:])
    assert unpack(data).grids == RGB.grids
    assert pack(unpack(data)) == data


def test_padding_that_is_short_or_long_or_not_zero_is_refused() -> None:
    data, plain = padded(1024, 1024), len(padded(1, 1))
    assert refused(data[:-1]) and refused(data + b"\0")
    for position in range(plain, len(data)):
        assert refused(data[:position] + b"\1" + data[position + 1 :])


@given(st.integers(1, 2**12), st.integers(1, 2**12), st.binary(max_size=64))
def test_a_file_that_claims_more_blocks_than_its_size_allows_is_refused(w: int, h: int, tail: bytes) -> None:
    data = padded(w, h)[:25] + tail
    if -(-w // 16) * -(-h // 16) > 4 * len(data):
        assert refused(data)


def test_a_chunk_length_is_checked_before_memory_is_taken_for_it() -> None:
    data = with_chunks(b"\1\0", b"\2\xff\xff\xff\xff\x7f")
    tracemalloc.start()
    try:
        assert refused(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_verify_names_both_checksums() -> None:
    verify(RGB, GRIDS)
    wrong = [GRIDS[0], GRIDS[1] + 1]
    expected = (
        "decoded indices do not match the file's checksum "
        f"(stored {RGB.checksum:08x}, computed {checksum(HEADER, wrong):08x}): the file is damaged"
    )
    with pytest.raises(DamagedError) as caught:
        verify(RGB, wrong)
    assert str(caught.value) == expected


# --- what cannot be written ---


@pytest.mark.parametrize(
    ("field", "value"),
    [("level", 0), ("level", 128), ("width", 0), ("height", 0), ("width", 2**24 + 1), ("fingerprint", b"")],
)
def test_a_header_out_of_range_cannot_be_made(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(HEADER, **{field: value})
    assert not isinstance(caught.value, BitstreamError)


@pytest.mark.parametrize(
    ("field", "value"), [("grids", ()), ("grids", (b"",) * 9), ("checksum", -1), ("checksum", 2**32)]
)
def test_a_container_out_of_range_cannot_be_made(field: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(RGB, **{field: value})
    assert not isinstance(caught.value, BitstreamError)


def test_a_payload_too_long_for_the_format_cannot_be_written() -> None:
    assert spec.varint(2**35 - 1) == b"\xff\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match="too long"):
        spec.varint(2**35)


def test_importing_bitstream_does_not_import_torch() -> None:
    modules = "bitstream, bitstream.container, bitstream.errors, bitstream.rans"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
