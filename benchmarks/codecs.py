"""The codecs that are compared. A rival is one function that returns a `Rival`, and an entry in `RIVALS`.

All encode 8-bit RGB pixels without metadata. Of what Pillow offers, rivals get what serves them best at a bearable
speed; one that can be tuned for PSNR or for the eye is there for each, and its name says for which.
"""

import importlib
import io
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from vqcodec.config import DEFAULT_EFFORT, DEFAULT_TUNE, Tune

if TYPE_CHECKING:  # the memory that a rival takes is measured without torch
    from vqcodec import Codec

Bytes = NDArray[np.uint8]


class Rival(NamedTuple):
    """A codec: pixels (H, W, 3) and a quality to the bytes of a file, and back.

    what: library, version and settings; a changed text means that earlier results are not these. settings: every
    quality that makes sense, and qualities: those that are measured for a curve; from small files to large ones.
    """

    name: str
    what: str
    settings: Sequence[float]
    qualities: tuple[float, ...]
    encode: Callable[[Bytes, float], bytes]
    decode: Callable[[bytes], Bytes]


class MissingError(Exception):
    """This Pillow has not the codec."""


def jpeg_420() -> Rival:
    return _jpeg("jpeg", "4:2:0")


def jpeg_444() -> Rival:
    return _jpeg("jpeg-444", "4:4:4")


def _jpeg(name: str, subsampling: str) -> Rival:
    if not features.check("jpg"):
        raise MissingError("this Pillow has no JPEG")
    library = "libjpeg-turbo " if features.check("libjpeg_turbo") else "libjpeg "
    version = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    options = {"subsampling": subsampling, "optimize": True, "progressive": True}
    qualities = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)
    return _pillow(name, "JPEG", f"{library}{version}", qualities, options)


def webp() -> Rival:
    if not features.check("webp"):
        raise MissingError("this Pillow has no WebP")
    qualities = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)
    # The format knows 4:2:0 only.
    return _pillow("webp", "WEBP", f"libwebp {features.version_module('webp')}", qualities, {"method": 6})


def avif_420_psnr() -> Rival:
    return _avif("4:2:0", "psnr")


def avif_444_psnr() -> Rival:
    return _avif("4:4:4", "psnr")


def avif_444_iq() -> Rival:
    return _avif("4:4:4", "iq")


def _avif(subsampling: str, tune: str) -> Rival:
    aom = None
    if features.check("avif"):
        from PIL import AvifImagePlugin

        aom = AvifImagePlugin.get_codec_version("aom")
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # in decoding too: times are of one thread
    if aom is None:
        raise MissingError("this Pillow has no AVIF with the encoder aom")
    # One tile, one thread: reproducible.
    tuned = {"codec": "aom", "advanced": {"tune": tune}, "speed": 4, "autotiling": False, "max_threads": 1}
    name = f"avif-{subsampling.replace(':', '')}-{tune}"
    library = f"libavif {features.version_module('avif')} aom {aom}"
    qualities = (5, 15, 25, 35, 45, 55, 65, 75)
    rival = _pillow(name, "AVIF", library, qualities, {"subsampling": subsampling, **tuned})
    try:
        rival.encode(np.zeros((8, 8, 3), np.uint8), qualities[0])
    except ValueError:  # "iq" came with aom 3.12
        raise MissingError(f"aom {aom} has no tune={tune}") from None
    return rival


def jxl() -> Rival:
    try:
        plugin: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
    except ImportError:
        raise MissingError("there is no package pillow-jxl-plugin here") from None
    plugin.DECODE_THREADS = 0  # none but the caller's, in decoding too: times are of one thread
    library = f"pillow-jxl-plugin {metadata.version('pillow-jxl-plugin')}"
    # Effort 9 takes four to six times as long, and on three photographs needed 1 % more by PSNR, 4 % by SSIMULACRA 2.
    options = {"effort": 7, "num_threads": 0}
    qualities = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)
    return _pillow("jxl", "JXL", library, qualities, options)


def jpeg2000() -> Rival:
    """Its quality is minus the ratio of compression, because OpenJPEG is asked for a size."""
    if not features.check("jpg_2000"):
        raise MissingError("this Pillow has no JPEG 2000")
    library = f"openjpeg {features.version_codec('jpg_2000')}"
    options = {"irreversible": True, "mct": 1, "no_jp2": True}
    qualities = (-300, -200, -120, -80, -50, -35, -25, -17, -12, -9, -6)
    settings = [-round(ratio, 2) for ratio in np.geomspace(1000, 2, 500).tolist()]

    def layers(quality: float) -> dict[str, Any]:
        return {"quality_mode": "rates", "quality_layers": [-quality]}

    return _pillow("jpeg2000", "JPEG2000", library, qualities, options, layers, settings)


# Chroma: jpeg and webp 4:2:0; jxl and jpeg2000 do not subsample.
RIVALS: dict[str, Callable[[], Rival]] = {
    "jpeg": jpeg_420,
    "jpeg-444": jpeg_444,
    "webp": webp,
    "avif-420-psnr": avif_420_psnr,
    "avif-444-psnr": avif_444_psnr,
    "avif-444-iq": avif_444_iq,
    "jxl": jxl,
    "jpeg2000": jpeg2000,
}


def available(names: Sequence[str] = tuple(RIVALS)) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that this machine has, and why it has not the others."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(RIVALS[name]())
        except MissingError as error:
            missing[name] = str(error)
    return found, missing


def vq2(codec: "Codec", qualities: Sequence[float] | None = None, tune: Tune = DEFAULT_TUNE) -> Rival:
    """Ours. qualities: all levels of the model if None."""

    def decode(data: bytes) -> Bytes:
        return np.array(codec.decode(data))

    def encode(pixels: Bytes, quality: float) -> bytes:
        return codec.encode(pixels, quality, tune=tune)

    levels = range(1, codec.model.config.levels + 1)
    what = f"vqcodec, model {codec.fingerprint.hex()}, effort {DEFAULT_EFFORT}, tune {tune}"
    return Rival("vq2", what, levels, tuple(qualities or levels), encode, decode)


def largest_within(rival: Rival, pixels: Bytes, target: int) -> tuple[float, bytes]:
    """The largest file of at most ``target`` bytes over all settings, with its setting; or the smallest there is."""
    settings = rival.settings
    best = settings[0], rival.encode(pixels, settings[0])
    low, high = 1, len(settings) - 1
    while low <= high:
        middle = (low + high) // 2
        data = rival.encode(pixels, settings[middle])
        if len(data) <= target:
            best, low = (settings[middle], data), middle + 1
        else:
            high = middle - 1
    return best


def _quality(quality: float) -> dict[str, Any]:
    return {"quality": int(quality)}


def _pillow(
    name: str,
    format: str,
    library: str,
    qualities: Sequence[int],
    options: dict[str, Any],
    chosen: Callable[[float], dict[str, Any]] = _quality,
    settings: Sequence[float] = range(101),
) -> Rival:
    """A codec of Pillow. chosen: a quality as options of Pillow."""

    def encode(pixels: Bytes, quality: float) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, **chosen(quality), **options)
        return file.getvalue()

    def decode(data: bytes) -> Bytes:
        with Image.open(io.BytesIO(data), formats=[format]) as image:
            return np.array(image.convert("RGB"))

    text = " ".join(f"{key}={value}" for key, value in options.items())
    return Rival(name, f"{library}: {text}", settings, tuple(qualities), encode, decode)
