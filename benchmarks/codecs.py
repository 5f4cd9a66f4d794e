"""The codecs that are compared. A rival is one function that returns a `Rival`, and an entry in `RIVALS`.

All encode 8-bit RGB pixels without metadata. Rivals get what serves PSNR best at a bearable speed.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from vqcodec import Codec

Bytes = NDArray[np.uint8]


class Rival(NamedTuple):
    """A codec: pixels (H, W, 3) and a quality to the bytes of a file, and back.

    what: library, version and settings; a changed text means that earlier results are not these.
    """

    name: str
    what: str
    qualities: tuple[float, ...]
    encode: Callable[[Bytes, float], bytes]
    decode: Callable[[bytes], Bytes]


class MissingError(Exception):
    """This Pillow is built without the codec."""


def jpeg() -> Rival:
    if not features.check("jpg"):
        raise MissingError("this Pillow has no JPEG")
    library = "libjpeg-turbo " if features.check("libjpeg_turbo") else "libjpeg "
    version = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    options = {"subsampling": "4:2:0", "optimize": True, "progressive": True}
    qualities = (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)
    return _pillow("jpeg", "JPEG", f"{library}{version}", qualities, options)


def webp() -> Rival:
    if not features.check("webp"):
        raise MissingError("this Pillow has no WebP")
    qualities = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95)
    return _pillow("webp", "WEBP", f"libwebp {features.version_module('webp')}", qualities, {"method": 6})


def avif_420() -> Rival:
    return _avif("4:2:0")


def avif_444() -> Rival:
    return _avif("4:4:4")


def _avif(subsampling: str) -> Rival:
    aom = None
    if features.check("avif"):
        from PIL import AvifImagePlugin

        aom = AvifImagePlugin.get_codec_version("aom")
    if aom is None:
        raise MissingError("this Pillow has no AVIF with the encoder aom")
    # libavif tunes for the eye by default, which costs up to 1 dB. One tile, one thread: reproducible.
    tuned = {"codec": "aom", "advanced": {"tune": "psnr"}, "speed": 4, "autotiling": False, "max_threads": 1}
    name = f"avif-{subsampling.replace(':', '')}"
    library = f"libavif {features.version_module('avif')} aom {aom}"
    qualities = (5, 15, 25, 35, 45, 55, 65, 75)
    return _pillow(name, "AVIF", library, qualities, {"subsampling": subsampling, **tuned})


RIVALS = {"jpeg": jpeg, "webp": webp, "avif-420": avif_420, "avif-444": avif_444}


def available(names: Sequence[str] = tuple(RIVALS)) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that this machine has, and why it has not the others."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(RIVALS[name]())
        except MissingError as error:
            missing[name] = str(error)
    return found, missing


def vq2(codec: Codec, qualities: Sequence[float] | None = None) -> Rival:
    """Ours. qualities: all levels of the model if None."""

    def decode(data: bytes) -> Bytes:
        return np.array(codec.decode(data))

    levels = range(1, codec.model.config.levels + 1)
    what = f"vqcodec, model {codec.fingerprint.hex()}"
    return Rival("vq2", what, tuple(qualities or levels), codec.encode, decode)


def _pillow(name: str, format: str, library: str, qualities: Sequence[int], options: dict[str, Any]) -> Rival:
    """A codec of Pillow with a `quality` of 0..100."""

    def encode(pixels: Bytes, quality: float) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, quality=int(quality), **options)
        return file.getvalue()

    def decode(data: bytes) -> Bytes:
        with Image.open(io.BytesIO(data), formats=[format]) as image:
            return np.array(image.convert("RGB"))

    settings = " ".join(f"{key}={value}" for key, value in options.items())
    return Rival(name, f"{library}: {settings}", tuple(qualities), encode, decode)
