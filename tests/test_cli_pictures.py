"""Pictures on their way through API and command line: where they come from, what is not seen, options of outputs."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_cli import refused, run, succeeded
from tiny_model import GOLDEN, WEIGHTS

import vqcodec
from bitstream import container
from vqcodec.codec import Codec
from vqcodec.metrics import psnr
from vqcodec.targets import Target

PHOTO = Path(__file__).parent / "images" / "photo.png"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> Path:
    """The working folder, with the model in memory, an upright photograph with metadata and a transparent logo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Codec, "load", lambda *_: codec)
    monkeypatch.setattr(vqcodec, "_default", {"auto": codec})
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    tags[0x8825] = {1: "N", 2: (52.0, 31.0, 12.3)}
    small = Image.open(PHOTO).convert("RGB").resize((40, 32))
    small.save("photo.jpg", quality=95, exif=tags, icc_profile=SRGB)
    small.putalpha(Image.linear_gradient("L").resize((40, 32)))
    small.save("logo.png")
    return tmp_path


def encode(*args: object) -> list[str]:
    """The chunks of the file that is made, but for grids and an offset: whether there is one, networks say."""
    succeeded(run("encode", "-q", 2, "-f", *args, "-o", "x.vq2"))
    chunks = json.loads(run("info", "--json", "x.vq2").stdout)["chunks"]
    return [name for name in chunks if name != "offset"][2:]


# --- the API ---


def test_a_path_bytes_and_an_open_file_are_encoded_alike(codec: Codec) -> None:
    data = Path("logo.png").read_bytes()
    expected = codec.encode(Image.open("logo.png"), 2)
    for source in ("logo.png", Path("logo.png"), data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert vqcodec.encode(source, 2) == expected
    with open("logo.png", "rb") as file:
        assert vqcodec.encode(file, 2) == expected
    assert vqcodec.encode_to("logo.png", Target("size", len(expected))).value > 0


def test_a_path_bytes_and_an_open_file_are_decoded_alike(codec: Codec) -> None:
    data = codec.encode("logo.png", 2)
    Path("x.vq2").write_bytes(data)
    expected = vqcodec.decode(data).tobytes()
    for source in ("x.vq2", Path("x.vq2"), bytearray(data), memoryview(data), io.BytesIO(data)):
        assert vqcodec.decode(source).tobytes() == expected


def test_exif_that_is_none_and_an_endless_profile_are_dropped_on_decoding(codec: Codec) -> None:
    parts = container.unpack((GOLDEN / "decode" / "metadata.vq2").read_bytes())
    forged = container.pack(replace(parts, exif=b"no EXIF", icc=SRGB + bytes(20_000_000)))
    picture = codec.decode_picture(forged)
    assert (picture.icc, picture.exif) == (None, None) and picture.xmp == parts.xmp
    assert ["ICC profile has 20,000,588 bytes" in note or "EXIF data is damaged" in note for note in picture.notes] == [
        True,
        True,
    ]


# --- what is not seen ---


def hidden(noise: bool) -> Image.Image:
    """A disc of a photograph; under its surroundings noise, or the photograph itself."""
    pixels = np.array(Image.open(PHOTO).convert("RGBA").resize((96, 96)))
    y, x = np.mgrid[:96, :96]
    outside = (x - 48) ** 2 + (y - 48) ** 2 > 32**2
    pixels[..., 3] = np.where(outside, 0, 255)
    if noise:
        pixels[outside, :3] = np.random.default_rng(0).integers(0, 256, (outside.sum(), 3))
    return Image.fromarray(pixels)


def test_invisible_pixels_cost_nothing_and_are_not_kept(codec: Codec) -> None:
    noisy, plain = (codec.encode(hidden(noise), 3) for noise in (True, False))
    assert noisy == plain


def test_invisible_pixels_do_not_count_for_a_psnr(codec: Codec) -> None:
    image = hidden(noise=True)
    rgba = np.asarray(image)
    reached = codec.encode_to(image, Target("psnr", 26))
    decoded = np.asarray(codec.decode(reached.data))
    assert reached.value == pytest.approx(psnr(rgba[..., :3], decoded[..., :3], rgba[..., 3]))
    seen = rgba[..., 3] > 0
    error = np.square(rgba[seen, :3].astype(float) - decoded[seen, :3]).mean()
    assert reached.value == pytest.approx(10 * np.log10(255**2 / error))


def test_an_alpha_that_hides_nothing_does_not_stand_in_the_way_of_jpeg() -> None:
    image = Image.open("photo.jpg")
    image.putalpha(255)
    image.save("opaque.png")
    assert "alpha" not in encode("opaque.png")
    succeeded(run("decode", "x.vq2", "-o", "x.jpg"))


# --- options of encode ---


def test_stripping_takes_what_it_says() -> None:
    assert encode("photo.jpg") == ["icc", "exif"]
    assert b"\x25\x88" in Path("x.vq2").read_bytes() or b"\x88\x25" in Path("x.vq2").read_bytes()
    assert encode("photo.jpg", "--strip") == []
    assert encode("photo.jpg", "--strip", "--keep-icc") == ["icc"]
    assert encode("photo.jpg", "--strip-gps") == ["icc", "exif"]
    tags = vqcodec.decode("x.vq2").getexif()
    assert tags[0x010F] == "a camera" and not tags.get_ifd(0x8825)
    for command in ("encode", "decode"):
        wrong = run(command, "photo.jpg", "--keep-icc")
        assert wrong.exit_code == 2 and "--keep-icc goes with --strip" in wrong.stderr


def test_a_truncated_picture_is_coded_on_request_with_a_warning() -> None:
    data = Path("photo.jpg").read_bytes()
    Path("half.jpg").write_bytes(data[: len(data) * 3 // 4])
    refused(run("encode", "-q", 2, "half.jpg"), "half.jpg: the image cannot be decoded, it is truncated", "--lenient")
    result = run("encode", "-q", 2, "half.jpg", "--lenient")
    assert result.exit_code == 0
    assert result.stderr.startswith("vqcodec: half.jpg: warning: the file is truncated or damaged")
    assert vqcodec.decode("half.vq2").size == (40, 32)


# --- options of decode ---


def test_stripping_while_decoding() -> None:
    encode("photo.jpg")
    succeeded(run("decode", "x.vq2", "-o", "kept.jpg"))
    succeeded(run("decode", "x.vq2", "-o", "bare.jpg", "--strip"))
    succeeded(run("decode", "x.vq2", "-o", "profile.jpg", "--strip", "--keep-icc"))
    succeeded(run("decode", "x.vq2", "-o", "nowhere.jpg", "--strip-gps"))
    kept, bare, profile, nowhere = map(Image.open, ("kept.jpg", "bare.jpg", "profile.jpg", "nowhere.jpg"))
    assert {"exif", "icc_profile"} <= set(kept.info) and kept.size == (40, 32)
    assert not {"exif", "icc_profile"} & set(bare.info) and bare.size == (32, 40)
    assert "exif" not in profile.info and profile.info["icc_profile"] == SRGB
    assert nowhere.getexif()[0x010F] == "a camera" and not nowhere.getexif().get_ifd(0x8825)


def test_a_background_makes_a_jpeg_of_a_transparent_picture() -> None:
    encode("logo.png")
    refused(run("decode", "x.vq2", "-o", "x.jpg"), "x.vq2: JPEG cannot hold this picture's alpha", "--background")
    succeeded(run("decode", "x.vq2", "-o", "x.jpg", "--background", "#ff0000"))
    red, green, blue = Image.open("x.jpg").getpixel((20, 0))
    assert red > 230 and green < 40 and blue < 40, "the upper edge is transparent"
    wrong = run("decode", "x.vq2", "-o", "y.jpg", "--background", "no colour")
    assert wrong.exit_code == 2 and "'no colour' is not a colour: write it like white" in wrong.stderr


def test_a_folder_is_decoded_to_the_format_asked_for(here: Path) -> None:
    (here / "small").mkdir()
    for name in ("a", "b"):
        succeeded(run("encode", "-q", 2, "photo.jpg", "-o", f"small/{name}.vq2"))
    result = run("decode", "small", "-o", "back", "--format", "JPG", "-q", 30, "--subsampling", "4:2:0")
    assert result.exit_code == 0 and "2 done" in result.stdout
    assert sorted(path.name for path in (here / "back").iterdir()) == ["a.jpg", "b.jpg"]
    assert Image.open("back/a.jpg").format == "JPEG"
    succeeded(run("decode", "small/a.vq2", "--format", "webp"))
    assert Image.open("small/a.webp").format == "WEBP"
    succeeded(run("decode", "small/a.vq2", "-o", "picture.dat", "--format", "png"))
    assert Image.open("picture.dat").format == "PNG"
    sizes = [
        len(Path(f"{q}.jpg").read_bytes())
        for q in (20, 95)
        if succeeded(run("decode", "small/a.vq2", "-o", f"{q}.jpg", "-q", q))
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "xyz"], "cannot write images as 'xyz'"),
        (["--format", "png", "-q", "80"], "PNG has no quality to set"),
        (["-o", "x.webp", "--subsampling", "4:2:0"], "WEBP has no subsampling to set"),
    ],
)
def test_options_that_do_not_fit_the_format_are_refused_before_the_work(args: list[str], words: str) -> None:
    encode("photo.jpg")
    refused(run("decode", "x.vq2", *args), words)
