"""An offset of each plane: the one of least squared error, where few bits are spent, and in the decoded picture."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_golden import IMAGES
from numpy.typing import NDArray
from tiny_model import WEIGHTS

from bitstream import container
from vqcodec import codec as codec_module
from vqcodec import offset
from vqcodec.codec import Codec, PictureEncoder
from vqcodec.config import TUNES
from vqcodec.image import Bytes, ColourMode, Picture, from_array, read
from vqcodec.metrics import psnr
from vqcodec.targets import Target


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def faint(seed: int = 0, height: int = 40, width: int = 48) -> Bytes:
    """Faint noise on a slope, of which its mean colour alone would not be enough."""
    rng, down = np.random.default_rng(seed), np.linspace(-40, 40, height)[:, None, None]
    return rng.normal(rng.integers(0, 256, 3) + down, 1.5, (height, width, 3)).clip(0, 255).astype(np.uint8)


def added(pixels: Bytes, *numbers: int) -> NDArray[np.int64]:
    pixels = pixels.copy()
    offset.add(pixels, np.array(numbers, np.int8).tobytes())
    return pixels.astype(int)


def without(encoder: PictureEncoder, quality: float) -> float:
    """PSNR of a picture whose offset is not looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureEncoder, "_find_offset", lambda *_: None)
        encoder.encode(quality)
        return psnr(encoder.picture.pixels, encoder.decoded(), encoder.picture.alpha)


# --- the chunk ---


def test_an_offset_is_added_to_each_plane_and_clipped() -> None:
    pixels = np.array([[[0, 100, 250], [9, 200, 128]]], np.uint8)
    assert added(pixels, -5, 127, 6).tolist() == [[[0, 227, 255], [4, 255, 134]]]
    assert added(pixels[..., 1:2], -128).tolist() == [[[0], [72]]]


@given(st.sampled_from([1, 3]), st.integers(0, 300), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_an_offset_has_the_least_squared_error_of_all(planes: int, middle: int, spread: int, seed: int) -> None:
    """Of what counts, with what is clipped; 0 where others are no better."""
    rng = np.random.default_rng(seed)
    drawn, pixels = rng.normal(middle, spread, (2, 5, 4, planes)).clip(0, 255).astype(np.uint8)
    counts = rng.random((5, 4)) < 0.7
    found = offset.find(drawn, pixels, counts)
    numbers = np.zeros(planes, int) if found is None else np.frombuffer(found, np.int8).astype(int)
    assert found is None or numbers.any()
    every = np.clip(drawn.astype(int) + np.arange(-128, 128)[:, None, None, None], 0, 255)
    errors = np.square(every - pixels)[:, counts].sum(1)  # (numbers, planes)
    assert (errors[numbers + 128, range(planes)] == errors.min(0)).all()
    assert ((errors[128] > errors.min(0)) | (numbers == 0)).all()


def test_there_is_no_offset_where_nothing_counts_or_nothing_is_off() -> None:
    assert offset.find(faint(0), faint(1), np.zeros((40, 48), bool)) is None
    assert offset.find(faint(), faint(), np.ones((40, 48), bool)) is None


# --- in the codec ---


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("kind", ["rgb", "grey", "equal", "half noise", "flat", "alpha", "dark"])
def test_pictures_of_few_bits_come_back_nearer_and_as_the_encoder_says(
    codec: Codec, kind: str, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = 0
    monkeypatch.setattr("vqcodec.codec.FEW_BITS", 8000)
    for seed in range(4):
        pixels, colour, alpha = faint(seed), ColourMode.RGB, None
        if kind in ("grey", "equal"):
            pixels = np.repeat(pixels[..., :1], 3, axis=2)
            colour = ColourMode.GREY if kind == "grey" else ColourMode.RGB
        elif kind == "half noise":
            pixels[:, 24:] = np.random.default_rng(seed).integers(0, 256, (40, 24, 3))
        elif kind == "flat":
            pixels[:24] = seed
        elif kind == "alpha":
            alpha, colour = np.zeros((40, 48), np.uint8), ColourMode.RGBA
            alpha[:16] = 9
            pixels[16:] = 255 - pixels[16:]
        elif kind == "dark":
            pixels = np.maximum(pixels, 200) - 200
        encoder = PictureEncoder(codec, Picture(pixels, colour, alpha), tune=tune)
        for quality in (1, 2):
            data = encoder.encode(quality)
            back = codec.decode_picture(data)
            assert (back.pixels == encoder.decoded()).all()
            with_offset = container.unpack(data).offset is not None
            reached = psnr(encoder.picture.pixels, back.pixels, alpha)
            plain = without(encoder, quality)
            assert reached > plain if with_offset else reached == plain
            found += with_offset
    assert found > 1


def test_an_offset_is_added_before_flat_blocks_are_set(codec: Codec) -> None:
    pixels = faint()
    pixels[:24] = 9
    encoder = PictureEncoder(codec, from_array(pixels))
    whole = container.unpack(encoder.encode(1))
    assert whole.offset is not None and whole.flat is not None
    assert (encoder.decoded()[:24] == 9).all()


def test_where_more_bits_are_spent_no_picture_is_drawn(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PictureEncoder, "_find_offset", lambda *_: pytest.fail("it takes time"))
    photos = np.tile(read(IMAGES / "photo.png").pixels, (2, 2, 1))  # one alone is small enough
    assert container.unpack(codec.encode(photos, 3)).offset is None


def test_a_picture_is_drawn_once_for_its_offset_and_its_psnr(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = codec_module._decode_pixels
    monkeypatch.setattr(codec_module, "_decode_pixels", lambda *args: drawn.append(1) or draw(*args))
    encoder = PictureEncoder(codec, from_array(faint()))
    encoder.encode(1)
    assert (encoder.decoded() == encoder.decoded()).all() and len(drawn) == 1


def test_a_target_counts_the_offset(codec: Codec) -> None:
    pixels = faint()
    for kind, value in (("psnr", 40), ("size", 150)):
        reached = codec.encode_to(pixels, Target(kind, value))
        measured = psnr(pixels, np.asarray(codec.decode(reached.data))) if kind == "psnr" else len(reached.data)
        assert reached.value == measured


def test_an_offset_belongs_to_one_file(codec: Codec) -> None:
    """Not to the next one of the same encoder."""
    encoder = PictureEncoder(codec, from_array(faint()))
    first = encoder.encode(1)
    assert container.unpack(first).offset is not None
    encoder.encode(3)
    assert encoder.encode(1) == first


def test_a_preview_and_a_sample_do_without_the_offset(codec: Codec) -> None:
    data = codec.encode(faint(), 1)
    whole = container.unpack(data)
    assert whole.offset is not None
    plain = container.pack(dataclasses.replace(whole, offset=None))
    assert codec.decode(data, preview=True).tobytes() == codec.decode(plain, preview=True).tobytes()
    assert codec.sample_from(data).tobytes() == codec.sample_from(plain).tobytes()
