"""The Pillow plugin, in the manner of Pillow's own tests of its formats."""

import dataclasses
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError
from tiny_model import GOLDEN, WEIGHTS

import vqcodec
from bitstream import container
from vqcodec.codec import Codec
from vqcodec.image import MOST_ICC

FILES = GOLDEN / "decode"
PHOTO = Path(__file__).parent / "images" / "photo.png"


@pytest.fixture(scope="module", autouse=True)
def codec(pillow_plugin: None) -> Iterator[Codec]:
    """The plugin with the small model."""
    importlib.import_module("vqcodec.pillow")
    small = Codec.load(WEIGHTS, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vqcodec._default, "auto", small)
        yield small


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "VQ2", **{"quality": 2, **options})
    return file.getvalue()


OPENED = [("grey", "L"), ("photo-level-1", "RGB"), ("grey-alpha", "LA"), ("rgba", "RGBA")]


@pytest.mark.parametrize("name, mode", OPENED)
def test_open_and_load(codec: Codec, name: str, mode: str) -> None:
    path = FILES / f"{name}.vq2"
    header = container.unpack(path.read_bytes()).header
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("VQ2", mode, (header.width, header.height))
        assert image.get_format_mimetype() == "image/x-vq2"
        assert image.load() is not None
        assert image.tobytes() == codec.decode(path.read_bytes()).tobytes()


def test_metadata_is_there_before_the_pixels_and_without_torch() -> None:
    code = f"""
import sys, vqcodec.pillow
from PIL import Image
with Image.open({str(FILES / "metadata.vq2")!r}) as image:
    assert image.mode == "RGB" and image.size and {{"exif", "icc_profile", "xmp"}} <= set(image.info)
assert "torch" not in sys.modules and "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_save_round_trip(codec: Codec, tmp_path: Path) -> None:
    original = Image.open(PHOTO).convert("RGB")
    original.save(tmp_path / "x.vq2", quality=3)
    assert (tmp_path / "x.vq2").read_bytes() == codec.encode(original, 3)
    with Image.open(tmp_path / "x.vq2") as image:
        error = np.abs(np.asarray(image, int) - np.asarray(original, int)).mean()
    assert error < 15
    assert saved(original, effort=2) == codec.encode(original, 2, effort=2) != saved(original, effort=0)
    assert saved(original, tune="visual") == codec.encode(original, 2, tune="visual")
    assert len(saved(original, quality=1)) < len(saved(original, quality=3))


@pytest.mark.parametrize("mode, back", [("1", "L"), ("L", "L"), ("P", "RGB"), ("LA", "LA"), ("RGBA", "RGBA")])
def test_modes(mode: str, back: str) -> None:
    image = Image.open(PHOTO).resize((40, 30)).convert(mode)
    if "A" in mode:
        image.putalpha(100)
    with Image.open(io.BytesIO(saved(image))) as again:
        assert (again.mode, again.size) == (back, (40, 30))


def test_metadata_is_kept_replaced_or_left_out() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    old, new = Image.Exif(), Image.Exif()
    old[0x010E], new[0x010E] = "old description", "new description"
    data = saved(Image.open(PHOTO).resize((40, 30)), icc_profile=icc, exif=old, xmp=b"<x:xmpmeta/>")
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x010E] == "old description"
        kept, stripped = container.unpack(saved(image)), container.unpack(saved(image, strip=True))
        changed = container.unpack(saved(image, exif=new, icc_profile=None))
        assert image.info["icc_profile"] == icc == kept.icc
    assert kept.icc and kept.exif and kept.xmp
    assert not (stripped.icc or stripped.exif or stripped.xmp)
    assert changed.icc is None and changed.xmp == kept.xmp
    assert changed.exif is not None and b"new description" in changed.exif


def with_text_exif() -> Image.Image:
    """A PNG file whose EXIF is text, as ImageMagick writes it."""
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    text, file = PngImagePlugin.PngInfo(), io.BytesIO()
    block = exif.tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    Image.new("RGB", (20, 30)).save(file, "PNG", pnginfo=text)
    return Image.open(file)


def test_metadata_that_is_given_is_all_that_changes() -> None:
    assert b"a secret" in saved(with_text_exif())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = container.unpack(saved(with_text_exif(), exif=None, icc_profile=None))
    assert none.exif is None and none.icc is None


def test_what_a_file_has_lost_is_told_once() -> None:
    parts = container.unpack((FILES / "metadata.vq2").read_bytes())
    forged = container.pack(dataclasses.replace(parts, exif=b"no EXIF", icc=bytes(MOST_ICC + 1)))
    with pytest.warns(UserWarning) as caught, Image.open(io.BytesIO(forged)) as image:
        assert "icc_profile" not in image.info
        image.load()
    assert sorted(str(one.message)[:8] for one in caught) == ["the EXIF", "the ICC "]


def test_exif_that_is_none_is_dropped_with_a_warning() -> None:
    parts = container.unpack((FILES / "metadata.vq2").read_bytes())
    forged = container.pack(dataclasses.replace(parts, exif=b"no EXIF"))
    with pytest.warns(UserWarning, match="EXIF data is damaged") as caught, Image.open(io.BytesIO(forged)) as image:
        assert "exif" not in image.info and image.info["xmp"] == parts.xmp
    assert caught[0].filename == __file__


def test_what_cannot_be_kept_is_a_warning() -> None:
    deep = Image.fromarray(np.zeros((20, 30), np.uint16))
    with pytest.warns(UserWarning, match="16-bit samples were reduced"):
        saved(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(deep.convert("L"))


def test_a_quality_out_of_range_and_an_impossible_mode_leave_no_file(tmp_path: Path) -> None:
    image = Image.open(PHOTO)
    with pytest.raises(ValueError, match=r"not in 1\.\.3"):
        image.save(tmp_path / "x.vq2", quality=4)
    with pytest.raises(ValueError, match="nothing to encode"):
        Image.new("RGB", (0, 4)).save(tmp_path / "x.vq2", quality=2)
    assert not list(tmp_path.iterdir())


def test_draft_is_the_preview_at_a_quarter(codec: Codec) -> None:
    data = saved(Image.open(PHOTO).convert("RGB"))
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        assert image.draft(None, (width, height)) is None
        assert image.draft(None, (width // 4, height // 4)) == ("RGB", (0, 0, width / 4, height / 4))
        assert image.draft(None, (1, 1)) is None  # once is enough
        assert image.size == (-(-width // 4), -(-height // 4))
        assert image.tobytes() == codec.decode(data, preview=True).reduce(4).tobytes()
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((16, 16))
        assert max(image.size) == 16


def test_a_parser_that_is_fed_in_pieces_waits_for_the_whole_file(codec: Codec) -> None:
    data, parser = (FILES / "photo-level-1.vq2").read_bytes(), ImageFile.Parser()
    for at in range(0, len(data), 50):
        parser.feed(data[at : at + 50])
    assert parser.close().tobytes() == codec.decode(data).tobytes()


def test_an_image_from_another_process_is_as_it_was() -> None:
    with Image.open(io.BytesIO((FILES / "photo-level-1.vq2").read_bytes())) as opened:
        again = pickle.loads(pickle.dumps(opened))
        again.thumbnail((5, 5))
        opened.thumbnail((5, 5))
        assert again.size == opened.size


def test_a_file_that_is_not_one_is_left_to_others() -> None:
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"\xf6VQ3" + bytes(100)))


@pytest.mark.filterwarnings("ignore:only a preview")
def test_truncated_and_damaged_files_are_os_errors(monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    data = saved(Image.open(PHOTO).convert("RGBA"))
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(data[:-5]))
    wrong = data[:21] + bytes(4) + data[25:]
    with Image.open(io.BytesIO(wrong)) as image, pytest.raises(OSError, match="do not match the file's checksum"):
        image.load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(io.BytesIO(data[:-5])) as image:
        assert image.mode == "RGB"
        assert image.tobytes() == codec.decode(data, preview=True).convert("RGB").tobytes()
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(data[:40]))


def test_a_decompression_bomb_is_refused() -> None:
    data = saved(Image.new("RGB", (16, 16)))
    bomb = (data[:7] + b"\xff\xff\0" * 2 + data[13:]).ljust(2**22, b"\0")  # padded as its size asks for
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb))


def test_imageio_reads_and_writes_through_pillow(tmp_path: Path) -> None:
    iio = pytest.importorskip("imageio.v3")
    pixels = np.asarray(Image.open(PHOTO).convert("RGB"))
    iio.imwrite(tmp_path / "x.vq2", pixels, plugin="pillow", quality=2)
    assert iio.imread(tmp_path / "x.vq2", plugin="pillow").shape == pixels.shape
