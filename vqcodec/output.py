"""`Picture` -> picture files of other formats: whatever is written can be read again, and what got lost is said."""

import os
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from bitstream.errors import ImageError
from vqcodec import exif as exif_block
from vqcodec.alpha import flattened, without_opaque_alpha
from vqcodec.files import write_atomically
from vqcodec.image import (
    EXIF_PREFIX,
    Picture,
    Rgb,
    from_array,
    in_srgb,
    info_of,
    open_image,
    orientation,
    stripped,
    to_pil,
)
from vqcodec.source import MOST_XMP, extended_xmp

_FORMATS = {
    "avif": "AVIF",
    "bmp": "BMP",
    "jpeg": "JPEG",
    "jpg": "JPEG",
    "png": "PNG",
    "ppm": "PPM",
    "tif": "TIFF",
    "tiff": "TIFF",
    "webp": "WEBP",
}
# A decoded picture has paid for its losses already: lossless where the format can.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True, "exact": True},
}
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_WITHOUT_ALPHA = ("BMP", "JPEG", "PPM")
_WITHOUT_METADATA = ("BMP", "PPM")
_WITHOUT_GREY = ("AVIF", "WEBP")
_WITH_RESOLUTION = ("BMP", "JPEG", "PNG")  # besides EXIF


@dataclass(frozen=True)
class Options:
    """quality: 1 to 100, of JPEG, WebP and AVIF; by default 95, and lossless for WebP. subsampling: of colour in JPEG
    and AVIF; by default 4:4:4. background: colour to put behind the alpha, which is then gone."""

    quality: int | None = None
    subsampling: str | None = None
    background: Rgb | None = None


def save(
    picture: Picture,
    target: str | os.PathLike[str] | BinaryIO,
    format: str | None = None,
    options: Options = Options(),
) -> list[str]:
    """Write the picture to a path (atomically, replacing what is there) or an open file.

    format: png, jpeg, webp, avif, tiff, bmp or ppm; by default what the path ends in, or else png.
    Metadata goes along, byte by byte; if the format has no place for any, what is written is the `stripped` picture.
    What is written can be read again: that is tried.
    Returns a sentence for each thing that the format could not hold.
    Errors: ImageError if the format is unknown, or cannot hold this picture or these options. OSError of the file
    system.
    """
    if format is None:
        format = "" if not isinstance(target, (str, os.PathLike)) else Path(target).suffix[1:]
    name = _FORMATS.get(format.lower() or "png")
    if name is None:
        raise ImageError(f"cannot write images as {format!r}: choose one of {', '.join(sorted(_FORMATS))}")
    arguments = _arguments(name, options)
    if options.background is not None:
        picture = flattened(picture, options.background)
    elif picture.colour.has_alpha and name in _WITHOUT_ALPHA:
        picture = without_opaque_alpha(picture)
        if picture.colour.has_alpha:
            raise ImageError(
                f"{name} cannot hold this picture's alpha channel: choose PNG or WebP, or give a --background"
            )

    known = len(picture.notes)
    if name in _WITH_RESOLUTION:
        arguments |= _resolution_of(picture)
    if name in _WITHOUT_METADATA and info_of(picture):
        picture = stripped(picture)
        picture.notes.append(f"{name} cannot hold metadata: ICC, EXIF and XMP were left out")
    elif name in _WITHOUT_GREY and not picture.colour.has_hue:
        picture = in_srgb(picture)  # the file will have RGB pixels, for which a grey profile is none
    picture = _fitting(picture, name)
    encoded = _encoded(picture, name, arguments)  # in memory first: from here on every OSError is the file system's
    if isinstance(target, (str, os.PathLike)):
        with write_atomically(target, force=True) as file:
            file.write(encoded)
    else:
        target.write(encoded)
    return picture.notes[known:]


def _arguments(name: str, options: Options) -> dict[str, Any]:
    """Of Pillow's `save`, as far as they do not depend on the picture."""
    quality, subsampling = options.quality, options.subsampling
    found = dict(_ARGUMENTS.get(name, {}))
    if quality is not None:
        if name not in _ARGUMENTS:
            raise ImageError(f"{name} has no quality to set: leave it out, or choose JPEG, WebP or AVIF")
        if not 1 <= quality <= 100:
            raise ImageError(f"the quality {quality} of {name} is not in 1..100")
        found |= {"quality": quality, "lossless": False} if name == "WEBP" else {"quality": quality}
    if subsampling is not None:
        if "subsampling" not in found:
            raise ImageError(f"{name} has no subsampling to set: leave it out, or choose JPEG or AVIF")
        if subsampling not in SUBSAMPLINGS:
            raise ImageError(f"the subsampling {subsampling!r} is not one of {', '.join(SUBSAMPLINGS)}")
        found["subsampling"] = subsampling
    return found


def _resolution_of(picture: Picture) -> dict[str, Any]:
    try:
        found = picture.exif and exif_block.resolution(picture.exif)
    except ValueError:
        found = None
    return {"dpi": found} if found and max(found) < 2**16 else {}


def _fitting(picture: Picture, name: str) -> Picture:
    """The picture without the metadata that the format cannot hold, with a note on each; looks stay the same."""
    fits = replace(picture, notes=list(picture.notes))
    for kind in ("icc", "exif", "xmp"):
        content: bytes | None = getattr(picture, kind)
        if content is None:
            continue
        dot = from_array(np.zeros((1, 1, 3) if picture.colour.has_hue else (1, 1), np.uint8))
        setattr(dot, kind, content)
        try:
            _encoded(dot, name, {})
        except ImageError:
            fits = in_srgb(fits) if kind == "icc" else _without(fits, kind)
            fits.notes.append(f"{name} cannot hold the {kind.upper()} data of {len(content):,} bytes: it was left out")
    return fits


def _without(picture: Picture, kind: str) -> Picture:
    """The picture without its "exif" or "xmp", turned if that said so."""
    left = replace(picture)
    setattr(left, kind, None)
    if orientation(left) == orientation(picture):
        return left
    upright = stripped(picture, "keep-icc")
    if orientation(left) == 1:  # else it would be turned once more
        upright.exif, upright.xmp = left.exif, left.xmp
    return upright


def _encoded(picture: Picture, name: str, arguments: dict[str, Any]) -> bytes:
    """A file of the picture that has been read again. Raises ImageError."""
    encoded = BytesIO()
    height, width = picture.pixels.shape[:2]
    try:
        to_pil(picture).save(encoded, name, **arguments, **_metadata_options(picture, name))
        data = encoded.getvalue()
        if name == "TIFF" and picture.exif:
            data = exif_block.into_tiff(picture.exif, data)
        again = open_image(BytesIO(data), [name])
        size = again.size
        again.load()
        if again.info.get("icc_profile") != picture.icc:  # JPEG: Pillow takes any length
            raise ValueError("the ICC profile does not come back")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(
            f"{name} cannot hold this picture of {width} x {height} pixels ({error}): choose PNG"
        ) from error
    turned = name == "TIFF" and orientation(picture) in (5, 6, 7, 8)  # Pillow turns it on opening
    if size != ((height, width) if turned else (width, height)):
        raise ImageError(
            f"the {name} file of this picture of {width} x {height} pixels says that it has {size[0]} x {size[1]}: "
            "choose PNG"
        )
    return data


class _AsItIs(Image.Exif):
    """EXIF that Pillow looks the orientation up in, and writes as it came."""

    def tobytes(self, offset: int = 8) -> bytes:
        return self.block

    def __init__(self, block: bytes) -> None:
        super().__init__()
        self.block = EXIF_PREFIX + block
        self.load(self.block)


def _metadata_options(picture: Picture, format: str) -> dict[str, Any]:
    """Metadata as arguments of Pillow's `save`; each of its writers has ways of its own."""
    options: dict[str, Any] = dict(info_of(picture))
    if format == "PNG" and picture.xmp:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp"))
    if format == "AVIF" and picture.exif:
        options["exif"] = _AsItIs(picture.exif)
    if format == "JPEG" and picture.xmp and len(picture.xmp) > MOST_XMP:
        options["xmp"], options["extra"] = extended_xmp(picture.xmp)
    if format == "TIFF":  # EXIF is put around the file
        options["exif"] = Image.Exif()
        if picture.xmp:
            options["exif"][ExifTags.Base.XMLPacket] = picture.xmp
    return options
