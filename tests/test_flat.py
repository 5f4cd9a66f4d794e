"""Blocks of one colour: exact in the picture, as specified in the file, and nothing of them in photographs."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_golden import IMAGES
from PIL import Image
from tiny_model import WEIGHTS

from bitstream import container
from bitstream.container import ColourMode
from bitstream.errors import DamagedError
from vqcodec import flat
from vqcodec.codec import Codec, PictureEncoder
from vqcodec.image import Bytes, Picture, from_array, from_pil


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def deflated(numbers: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(numbers) + deflate.flush()


def pasted(pixels: Bytes, content: bytes) -> Bytes:
    pixels = pixels.copy()
    flat.paste(pixels, content)
    return pixels


def noise(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def page(height: int = 90, width: int = 150) -> Bytes:
    """White around a photograph."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[20:70, 30:110] = np.asarray(Image.open(IMAGES / "otters.png"))[100:150, 200:280]
    return pixels


# --- the chunk ---


def test_a_chunk_is_as_specified() -> None:
    """A picture of 3 x 2 blocks, cut off at the right and at the bottom."""
    numbers = bytes([2, 0, 1, 0, 0, 2])
    content = b"\2" + bytes([1, 2, 3]) + bytes([250, 0, 5]) + deflated(numbers)
    middle = np.full((11, 20, 3), 128, np.uint8)
    out = pasted(middle, content)
    assert (out[:8, :8] == (250, 0, 5)).all() and (out[8:, 16:] == (250, 0, 5)).all()
    assert (out[:8, 16:] == (1, 2, 3)).all()
    assert (out[8 + flat.FADE :, : 16 - flat.FADE] == 128).all()

    grey = b"\1\x07" + deflated(bytes([1, 0, 0, 0, 0, 0]))
    assert (pasted(middle[..., :1], grey)[:8, :8] == 7).all()


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 3])),
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
)
def test_blocks_that_are_named_are_exact_and_what_is_far_from_them_is_left(
    shape: tuple[int, int, int], seed: int, colours: int
) -> None:
    rng = np.random.default_rng(seed)
    height, width, planes = shape
    blocks = rng.integers(0, colours, (-(-height // 8), -(-width // 8)))
    table = rng.integers(0, 256, (colours, planes), np.uint8)
    pixels = table[np.kron(blocks, np.ones((8, 8), int))][:height, :width]
    pixels[rng.random((height, width)) < 0.01] ^= 1
    near = rng.integers(0, 256, shape, np.uint8)
    content = flat.find(pixels)
    if content is None:
        return
    out = pasted(near, content)
    numbers = np.frombuffer(zlib.decompress(content[1 + planes * content[0] :], -15), np.uint8).reshape(blocks.shape)
    known = np.kron(numbers > 0, np.ones((8, 8), bool))[:height, :width]
    assert (out[known] == pixels[known]).all()
    around = np.kron(np.pad(numbers, 1), np.ones((8, 8), bool))
    untouched = ~np.stack([np.roll(around, shift, (0, 1)) for shift in np.ndindex(17, 17)]).any(0)[16:, 16:]
    assert (out == near)[untouched[:height, :width]].all()


def test_margins_cost_a_few_bytes_and_photographs_none() -> None:
    assert len(flat.find(page()) or b"") < 40
    for name in ("otters", "photo"):
        assert flat.find(np.asarray(Image.open(IMAGES / f"{name}.png").convert("RGB"))) is None
    assert flat.find(noise(64, 64, 3)) is None


def test_blocks_here_and_there_are_not_worth_their_bytes() -> None:
    scattered = noise(256, 256, 3)
    for row, column in np.random.default_rng(1).integers(0, 32, (30, 2)):
        scattered[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    assert flat.find(scattered) is None
    few = np.kron(np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3), np.ones((8, 8, 1), np.uint8))
    assert flat.find(few) is None  # colours of one block each


def test_of_too_many_colours_the_most_frequent_are_kept() -> None:
    colours = np.repeat(np.arange(300), 20)
    colours = np.repeat(np.concatenate([colours, [299] * 20]), flat.BLOCK)
    pixels = np.zeros((flat.BLOCK, len(colours), 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = colours % 256, colours // 256
    content = flat.find(pixels)
    assert content is not None and content[0] == 255 and content[1:4] == bytes([299 % 256, 1, 0])
    out = pasted(np.full_like(pixels, 9), content)
    assert (out == pixels).all(2).sum() == 64 * (40 + 254 * 20)


def test_rare_colours_are_left_out_where_they_are_not_worth_it() -> None:
    rng = np.random.default_rng(0)
    scattered = rng.integers(0, 60, (32, 32), np.uint8)  # some 8 blocks of each of 60 colours, and as much white
    scattered[:16] = 255
    pixels = np.repeat(np.kron(scattered, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)
    content = flat.find(pixels)
    assert content is not None and 0 < content[0] < 60 and content[1] == 255
    numbers = zlib.decompress(content[1 + 3 * content[0] :], -15)
    assert len(content) <= 8 + (len(numbers) - numbers.count(0)) / 2


def test_strips_give_the_picture_that_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = page()
    content = flat.find(pixels)
    assert content is not None
    near = (pixels // 2 + noise(*pixels.shape) // 4).astype(np.uint8)
    whole = pasted(near, content)
    monkeypatch.setattr(flat, "STRIP", flat.BLOCK)
    assert (pasted(near, content) == whole).all()


def test_a_block_set_in_place_has_no_edge() -> None:
    """The network is off by 12 everywhere: the correction of the block fades away around it."""
    pixels = np.full((40, 40, 1), 100, np.uint8)
    numbers = np.zeros((5, 5), np.uint8)
    numbers[2, 2] = 1
    out = pasted(pixels, b"\1\x70" + deflated(numbers.tobytes()))[..., 0].astype(int)
    assert out[20, 12:24].tolist() == [100, 103, 106, 109] + [112] * 8
    assert out[12:24, 20].tolist() == [100, 103, 106, 109] + [112] * 8
    assert np.abs(np.diff(out, axis=0)).max() == np.abs(np.diff(out, axis=1)).max() == 3
    darker = pasted(pixels, b"\1\x58" + deflated(numbers.tobytes()))[..., 0].astype(int)
    assert (darker == 200 - out).all()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0" + deflated(bytes(6)), id="no colours"),
        pytest.param(b"\2\1\2\3", id="a colour missing"),
        pytest.param(b"\1\1\2\3", id="no numbers"),
        pytest.param(b"\1\1\2\3" + deflated(bytes(5)), id="a number missing"),
        pytest.param(b"\1\1\2\3" + deflated(bytes(7)), id="a number too many"),
        pytest.param(b"\1\1\2\3" + deflated(bytes(5) + b"\2"), id="a number above the colours"),
        pytest.param(b"\1\1\2\3" + deflated(bytes(6)) + b"\0", id="more behind the stream"),
        pytest.param(b"\1\1\2\3" + deflated(bytes(6))[:-1], id="the stream cut"),
        pytest.param(b"\1\1\2\3" + zlib.compress(bytes(6)), id="with a zlib header"),
        pytest.param(b"\1\1\2\3" + b"\xff" * 9, id="no stream"),
        pytest.param(b"\1\1" + deflated(bytes(6)), id="a grey colour"),
    ],
)
def test_anything_else_is_damage(content: bytes) -> None:
    pixels = noise(11, 20, 3)
    with pytest.raises(DamagedError, match="flat blocks .* 2 x 3 "):
        pasted(pixels, content)


def test_no_more_is_inflated_than_there_are_blocks() -> None:
    bomb = b"\1\1\2\3" + deflated(bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            pasted(noise(11, 20, 3), bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --- in the codec ---


@pytest.mark.parametrize("effort", [0, 1])
def test_margins_come_back_exactly_at_every_quality(codec: Codec, effort: int) -> None:
    for margin in (255, 0, 64):
        pixels = page()
        pixels[(pixels == 255).all(2)] = margin
        for quality in (1, 2, 3):
            out = np.asarray(codec.decode(codec.encode(pixels, quality, effort=effort)))
            assert (out[:16] == margin).all() and (out[72:] == margin).all()
            assert (out[:, :24] == margin).all() and (out[:, 112:] == margin).all()


def test_one_colour_comes_back_exactly(codec: Codec) -> None:
    for size in ((16, 16), (50, 33), (200, 7)):
        for colour in ((255, 255, 255), (0, 0, 0), (237, 28, 36), (0, 102, 204)):
            pixels = np.broadcast_to(np.array(colour, np.uint8), (*size, 3))
            assert (np.asarray(codec.decode(codec.encode(pixels, 1))) == colour).all()


def test_blocks_deep_in_flat_ones_are_coded_in_fewer_bytes(codec: Codec) -> None:
    """Nobody sees what the networks make of them; the coarse grid tells what is beside, if it is in few bytes."""
    pixels = page(150, 197)
    pixels[10, 10] = 0  # in the margin
    encoder = PictureEncoder(codec, from_array(pixels))
    data = encoder.encode(3)
    coarse, details = (grid.any(0) for grid in encoder.grids)
    unseen, encoder.unseen = encoder.unseen, None
    assert unseen is not None and len(data) < len(encoder.encode(3))
    rows, columns = np.indices(details.shape)
    photo = (rows >= 2) & (rows < 9) & (columns >= 3) & (columns < 14) | (rows == 1) & (columns == 1)
    near = np.pad(photo, 3)
    far = ~np.stack([np.roll(near, shift, (0, 1)) for shift in np.ndindex(7, 7)]).any(0)[6:, 6:]
    assert far.sum() > 100 and unseen[far].all() and not unseen[photo].any()
    assert details[photo].any() and coarse.any()
    out = np.asarray(codec.decode(data))
    white = np.kron(~photo, np.ones((8, 8), bool))[:150, :197]
    assert (out[white] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_equal_planes_come_back_equal_at_the_cost_of_grey(codec: Codec, mode: str) -> None:
    photo = Image.open(IMAGES / "photo.png").convert("L")
    image = photo.convert(mode)
    if mode == "RGBA":
        image.putalpha(photo)
    data = codec.encode(image, 2)
    back = codec.decode(data)
    assert (back.mode, back.size) == (mode, image.size)
    red, green, blue = (band.tobytes() for band in back.split()[:3])
    assert red == green == blue
    if mode == "RGBA":
        assert back.getchannel("A").tobytes() == photo.tobytes()
    else:
        assert red == codec.decode(codec.encode(photo, 2)).tobytes()
        assert len(data) == len(codec.encode(photo, 2))


def test_a_picture_has_its_own_mode_whatever_was_coded(codec: Codec) -> None:
    grey = np.repeat(noise(20, 30, 1), 3, axis=2)
    alpha = noise(20, 30)
    for mode in (ColourMode.GREY, ColourMode.RGB, ColourMode.GREY_ALPHA, ColourMode.RGBA):
        picture = Picture(grey, mode, alpha if mode.has_alpha else None)
        data = codec.encode(picture, 2)
        assert container.unpack(data).header.colour is mode.equal
        assert codec.decode_picture(data).colour is mode
    almost = grey.copy()
    almost[19, 29, 2] ^= 1
    assert container.unpack(codec.encode(almost, 2)).header.colour is ColourMode.RGB


def test_what_the_encoder_says_it_decodes_to_is_what_it_decodes_to(codec: Codec) -> None:
    for picture in (
        from_array(page()),
        from_array(page()[..., 0]),
        from_pil(Image.fromarray(page()[..., 1]).convert("RGB")),
    ):
        encoder = PictureEncoder(codec, picture)
        data = encoder.encode(2)
        assert container.unpack(data).flat is not None
        assert (encoder.decoded() == codec.decode_picture(data).pixels).all()


@pytest.mark.parametrize("effort", [0, 1])
def test_flat_blocks_are_coded_in_the_way_that_takes_less(
    codec: Codec, effort: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without what the coarse grid has to say about them; all the same where they are few."""
    red = np.full((150, 197, 3), (237, 28, 36), np.uint8)
    sizes, coarse = {}, {}
    for name, pixels in {"red": red, "page": page(150, 197), "few": page(70, 120)}.items():
        encoder = PictureEncoder(codec, from_array(pixels), effort)
        for share in (0, 0.5, 2):
            monkeypatch.setattr("vqcodec.codec.MOSTLY_FLAT", share)
            data = encoder.encode(3)
            assert (np.asarray(codec.decode(data)) == encoder.decoded()).all()
            sizes[name, share], coarse[name, share] = len(data), encoder.grids[0].any()
    assert sizes["red", 0.5] == sizes["red", 0] < sizes["red", 2]
    assert coarse["red", 2] and not coarse["red", 0]
    assert sizes["page", 0.5] == sizes["page", 0] <= sizes["page", 2]
    assert sizes["few", 0.5] == sizes["few", 2]


def test_a_preview_has_flat_blocks_if_the_file_is_whole(codec: Codec) -> None:
    """The coarse grid may say nothing about them."""
    data = codec.encode(page(), 2)
    preview = np.asarray(codec.decode(data, preview=True))
    assert (preview[:16] == 255).all() and (preview[:, :24] == 255).all() and (preview[30:60, 40:100] < 255).any()

    whole = container.unpack(data)
    without = container.Container(**{**vars(whole), "flat": None})  # nor is its checksum right
    cut = codec.decode_picture(data[: len(data) - 30], preview=True)
    assert (cut.pixels == codec.decode_picture(container.pack(without), preview=True).pixels).all()
    assert "areas of one colour" in cut.notes[0]

    red = np.full((64, 64, 3), (237, 28, 36), np.uint8)
    assert (np.asarray(codec.decode(codec.encode(red, 3), preview=True)) == red).all()


def test_damaged_flat_blocks_are_refused(codec: Codec) -> None:
    whole = container.unpack(codec.encode(page(), 2))
    for content in (b"", b"\1\1\2\3" + deflated(bytes(7))):
        parts = container.Container(**{**vars(whole), "flat": content, "checksum": 0})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(container, "verify", lambda *_: None)
            with pytest.raises(DamagedError, match="flat blocks"):
                codec.decode(container.pack(parts))
        with pytest.raises(DamagedError, match="checksum"):
            codec.decode(container.pack(parts))
