"""Image files <-> `Picture`: 8-bit pixels, alpha, metadata, and a note on whatever was lost.

Kept: size, grey or colour, alpha, ICC profile, XMP, EXIF (orientation included, which is not applied).
Lost with a note: what 8 bits of grey or RGB cannot hold, such as deeper samples, CMYK and further frames.
Lost without one: other metadata, such as comments, text chunks and a resolution outside EXIF.
"""

import contextlib
import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from bitstream.container import DEFAULT_MAX_PIXELS, ColourMode, over_limit
from bitstream.errors import DamagedError, ImageError
from vqcodec.files import write_atomically

Bytes = NDArray[np.uint8]


@dataclass
class Picture:
    """An image in memory.

    pixels: (H, W, 3) RGB; three equal channels if `colour` is grey.
    colour: one of the first four modes, whether or not RGB planes are equal.
    alpha: (H, W), or None if `colour` has no alpha.
    exif: from its TIFF header ("II*" or "MM") on, without the "Exif" prefix of JPEG.
    notes: a sentence for each thing that the source had and this picture has not.
    """

    pixels: Bytes
    colour: ColourMode
    alpha: Bytes | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: list[str] = field(default_factory=list)


# --- in ---


def read(source: str | os.PathLike[str] | bytes | BinaryIO, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """The picture in a file of any format that Pillow reads: a path, the file's bytes, or an open file.

    Errors: ImageError if it is not an image, empty, truncated, damaged, or larger than `max_pixels` allow, for a
    .vq2 file and for this (bitstream/container.py, section 1; checked before anything is decoded). OSError, as it
    comes, if the file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return read(file, max_pixels)
    if isinstance(source, bytes):
        source = BytesIO(source)
    elif not source.seekable():  # a pipe
        source = BytesIO(source.read())
    if not source.seek(0, os.SEEK_END):
        raise ImageError("the file is empty: it has no image in it")
    with _decoding():
        image = _open(source)
    excess = over_limit(*image.size, max_pixels)
    if excess:
        raise ImageError(f"{excess}: raise the limit to read it")
    return from_pil(image)


# Pillow says what these are, and has no decoder for them.
_WITHOUT_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def endings() -> set[str]:
    """Endings of the formats that Pillow reads, lower case, with their dots; .vq2 is none, it is encoded already."""
    Image.init()  # knows all formats; before, only those that somebody has used
    readable = Image.OPEN.keys() - _WITHOUT_DECODER - {"VQ2"}
    return {ending for ending, format in Image.registered_extensions().items() if format in readable}


def from_pil(image: Image.Image) -> Picture:
    """A Pillow image of any mode, loaded here if it is not yet. `image` keeps its pixels and mode.

    Errors: ImageError if its data is damaged or its mode unknown.
    """
    if 0 in image.size:
        raise ImageError(f"the image has {image.width} x {image.height} pixels: there is nothing to encode")
    notes: list[str] = []
    with _decoding():
        frames = getattr(image, "n_frames", 1) if image.format != "PSD" else 1  # PSD: layers of one picture
        deep = _has_deep_colours(image)  # loading hides it
        declared = _declared_depth(image)
        image.load()
        if frames > 1:
            notes.append(f"only frame {image.tell() + 1} of {frames} was read")
        if deep or declared > 8:
            notes.append(f"{16 if deep else declared}-bit samples were reduced to 8 bits")
        icc = _bytes(image.info.get("icc_profile"))
        exif = _exif(image, notes)
        xmp = _bytes(image.info.get("xmp"))
        if image.mode == "CMYK":
            image, icc = _from_cmyk(image, icc, notes), None
        picture = _from_bands(np.array(_plain(image, deep, notes)))
    icc = _matching(icc, picture.colour, notes)
    return replace(picture, icc=icc, exif=exif, xmp=xmp, notes=notes)


def from_array(array: NDArray[Any]) -> Picture:
    """(H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, all uint8. May share memory with `array`.

    Errors: ImageError for any other shape or type.
    """
    array = np.asarray(array)
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image: "
            "it must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    return _from_bands(array)


def _from_bands(bands: Bytes) -> Picture:
    """(H, W) or (H, W, C): grey, grey and alpha, RGB, or RGB and alpha."""
    bands = bands.reshape(*bands.shape[:2], -1)
    channels = bands.shape[2]
    colour = (ColourMode.GREY, ColourMode.GREY_ALPHA, ColourMode.RGB, ColourMode.RGBA)[channels - 1]
    pixels = bands[..., :3] if _has_hue(colour) else np.repeat(bands[..., :1], 3, axis=2)
    alpha = np.ascontiguousarray(bands[..., -1]) if colour.has_alpha else None
    return Picture(np.ascontiguousarray(pixels), colour, alpha)


_pillow_limit = threading.Lock()


def _open(file: BinaryIO, formats: list[str] | None = None) -> Image.Image:
    """`Image.open` without Pillow's pixel limit, a global that is lower than ours: check the size next."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns what Pillow's decoders raise into ImageError.

    Broken data makes them raise nearly anything (SyntaxError, struct.error, IndexError...), so only what is
    surely something else passes: a full memory, and what the file system reports.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or not in a format that Pillow reads") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a bad seek
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image cannot be decoded, it is truncated or damaged ({reason})") from error


# --- modes ---


def _plain(image: Image.Image, deep: bool, notes: list[str]) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA. deep: its RGB samples had 16 bits before Pillow cut them."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _reduced(image, notes)
    if image.mode in ("YCbCr", "LAB", "HSV"):
        notes.append(f"{image.mode} was converted to RGB")
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        raise ImageError(f"colour mode {image.mode} is not supported: convert the image to RGB first")
    elif deep and image.mode == "RGB" and "transparency" in image.info:
        image = image.copy()  # the transparent colour has 16 bits still, and would match no pixel
        image.info["transparency"] = tuple(sample >> 8 for sample in image.info["transparency"])
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        mode += "A"
    return image if image.mode == mode else image.convert(mode)


def _reduced(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey of 16 or 32 bits as L, or as LA if one of its values means transparent."""
    samples = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(samples == transparent, 0, 255).astype(np.uint8)
    if samples.dtype.itemsize == 2:
        notes.append("16-bit samples were reduced to 8 bits")
    else:
        white = 65535
        if image.mode == "F":  # floats have no customary white, so the samples decide
            top = np.max(samples, initial=0, where=np.isfinite(samples))
            white = next((limit for limit in (1, 255) if top <= limit), white)
            samples = np.rint(np.nan_to_num(samples) * (65535 / white))
        notes.append(f"32-bit samples were reduced to 8 bits: 0 or less is black, {white} or more is white")
        samples = np.clip(samples, 0, 65535).astype(np.uint16)
    rounded = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # x * 255 / 65535
    grey = Image.fromarray(rounded[samples])
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _has_deep_colours(image: Image.Image) -> bool:
    """True if Pillow will cut 16-bit samples to 8 bits on loading, as it does for all but plain grey."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return False
    for decoder, _, _, args in getattr(image, "tile", []):
        for arg in args if isinstance(args, tuple) else (args,):
            over_255 = decoder.startswith("ppm") and isinstance(arg, int) and arg > 255
            if over_255 or ";16" in str(arg):  # a raw mode such as "RGB;16B"
                return True
    return False


def _declared_depth(image: Image.Image) -> int:
    """Bits per sample by the header of a file whose decoder in Pillow makes 8 of them: AVIF, and JPEG 2000 in colour.
    8 for all others, and once the image is loaded."""
    file = getattr(image, "fp", None)
    if image.format not in ("AVIF", "JPEG2000") or image.mode.startswith("I;16") or file is None:
        return 8
    place = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(place)
    if image.format == "AVIF":
        at = head.find(b"pixi") + 8  # ISO 23008-12, 6.5.6: behind version and flags the channels, then bits of each
        depths = head[at + 1 : at + 1 + head[at]] if at >= 8 and at < len(head) else b""
    else:
        at = head.find(b"\xff\x4f\xff\x51") + 42  # ISO 15444-1, A.5.1: Ssiz is bits - 1 and a sign, 3 bytes for each
        depths = bytes((size & 0x7F) + 1 for size in head[at : at + 3 * len(image.getbands()) : 3]) if at >= 42 else b""
    return max(depths, default=8)


def _from_cmyk(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    if icc:
        try:
            rgb = _to_srgb(image, icc)
            notes.append("CMYK was converted to sRGB through its ICC profile, which was then dropped")
            return rgb
        except ImageCms.PyCMSError:
            notes.append("the ICC profile cannot be used and was dropped")
    notes.append("CMYK was converted to RGB without an ICC profile: colours are approximate")
    return image.convert("RGB")


# --- metadata ---


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what undoes it


def stripped(picture: Picture) -> Picture:
    """The picture without ICC, EXIF and XMP, looking as before. May share memory with `picture`.

    What the metadata said about looks is carried out first: the orientation turns the pixels, and colours of
    another space than sRGB are converted to sRGB (with a note).
    """
    picture = _in_srgb(picture)
    turn = _UPRIGHT.get(_orientation(picture))

    def upright(array: Bytes) -> Bytes:
        return array if turn is None else np.array(Image.fromarray(array).transpose(turn))

    alpha = None if picture.alpha is None else upright(picture.alpha)
    return Picture(upright(picture.pixels), picture.colour, alpha, notes=list(picture.notes))


def _orientation(picture: Picture) -> int:
    """As EXIF says, or else XMP, or else 1: upright."""
    carrier = Image.new("1", (1, 1))
    carrier.info.update(_info(picture))
    try:
        return carrier.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly anything, and says nothing about orientation
        return 1


def _in_srgb(picture: Picture) -> Picture:
    """The picture with its ICC profile applied and dropped; the same pixels if the profile is sRGB anyway."""
    if picture.icc is None:
        return picture
    grey = not _has_hue(picture.colour)
    image = Image.fromarray(picture.pixels[..., 0] if grey else picture.pixels)
    try:
        pixels = np.array(_to_srgb(image, picture.icc))
    except ImageCms.PyCMSError:
        notes = [*picture.notes, "the ICC profile cannot be used and was dropped"]
        return replace(picture, icc=None, notes=notes)
    if grey:
        pixels = np.repeat(pixels[..., 1:2], 3, axis=2)
    if np.max(np.maximum(pixels, picture.pixels) - np.minimum(pixels, picture.pixels)) <= 1:
        return replace(picture, icc=None)
    notes = [*picture.notes, "colours were converted from the ICC profile to sRGB"]
    return replace(picture, pixels=pixels, icc=None, notes=notes)


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Mode L, RGB or CMYK -> RGB. Raises PyCMSError for a broken profile or one of another colour space."""
    converted = ImageCms.profileToProfile(
        image,
        BytesIO(icc),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # it is None only when converting in place
    return converted


def _matching(icc: bytes | None, colour: ColourMode, notes: list[str]) -> bytes | None:
    """The ICC profile, if it is one for these pixels."""
    wanted = b"RGB " if _has_hue(colour) else b"GRAY"
    if icc is None or (icc[16:20] == wanted and icc[36:40] == b"acsp"):  # colour space, signature
        return icc
    notes.append(f"the ICC profile is not one for {'RGB' if _has_hue(colour) else 'grey'} and was dropped")
    return None


def _has_hue(colour: ColourMode) -> bool:
    return colour.has_hue


def _bytes(metadata: Any) -> bytes | None:
    """None for nothing, and for what a TIFF tag of a wrong type gives."""
    if isinstance(metadata, str):
        metadata = metadata.encode()
    return metadata if metadata and isinstance(metadata, bytes) else None


EXIF_PREFIX = b"Exif\0\0"

# In a TIFF file the tags of EXIF stand among those that describe the file. These describe the picture.
_DESCRIPTIVE_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
    ExifTags.IFD.Exif,
    ExifTags.IFD.GPSInfo,
)


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """The EXIF block of a loaded image. A TIFF file has none: its descriptive tags are made into one."""
    exif = image.info.get("exif")
    try:
        if exif is None and (hasattr(image, "tag_v2") or "Raw profile type exif" in image.info):
            tags, kept = image.getexif(), Image.Exif()
            for tag in _DESCRIPTIVE_TAGS:
                if tag in tags:
                    kept[tag] = tags.get_ifd(tag) if isinstance(tag, ExifTags.IFD) else tags[tag]
            exif = kept.tobytes() if kept else None
    except Exception:
        exif = b"broken"
    if not exif:
        return None
    while exif.startswith(EXIF_PREFIX):  # some writers put it twice
        exif = exif[len(EXIF_PREFIX) :]
    if exif[:4] in (b"II*\0", b"MM\0*"):
        return exif
    notes.append("the EXIF data is damaged and was dropped")
    return None


# --- out ---


def to_pil(picture: Picture) -> Image.Image:
    """A Pillow image of mode L, LA, RGB or RGBA, with icc_profile, exif and xmp in its `info`."""
    image = Image.fromarray(picture.pixels if _has_hue(picture.colour) else picture.pixels[..., 0])
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    image.info.update(_info(picture))
    return image


def _info(picture: Picture) -> dict[str, bytes]:
    """The metadata under Pillow's names; only what is there."""
    exif = picture.exif and EXIF_PREFIX + picture.exif
    info = {"icc_profile": picture.icc, "exif": exif, "xmp": picture.xmp}
    return {key: value for key, value in info.items() if value}


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
_OPTIONS: dict[str, dict[str, Any]] = {
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True, "exact": True},
}
_WITHOUT_ALPHA = ("BMP", "JPEG", "PPM")
_WITHOUT_METADATA = ("BMP", "PPM")
_WITHOUT_GREY = ("AVIF", "WEBP")


def save(picture: Picture, target: str | os.PathLike[str] | BinaryIO, format: str | None = None) -> list[str]:
    """Write the picture to a path (atomically, replacing what is there) or an open file.

    format: png, jpeg, webp, avif, tiff, bmp or ppm; by default what the path ends in, or else png.
    Metadata goes along; if the format has no place for it, what is written is the `stripped` picture.
    Returns a sentence for each thing that the format could not hold.
    Errors: ImageError if the format is unknown, or cannot hold this picture. OSError of the file system.
    """
    if format is None:
        format = "" if not isinstance(target, (str, os.PathLike)) else Path(target).suffix[1:]
    name = _FORMATS.get(format.lower() or "png")
    if name is None:
        raise ImageError(f"cannot write images as {format!r}: choose one of {', '.join(sorted(_FORMATS))}")
    if picture.colour.has_alpha and name in _WITHOUT_ALPHA:
        raise ImageError(f"{name} cannot hold this picture's alpha channel: choose PNG or WebP")

    known = len(picture.notes)
    if name in _WITHOUT_METADATA and _info(picture):
        picture = stripped(picture)
        picture.notes.append(f"{name} cannot hold metadata: ICC, EXIF and XMP were left out")
    elif name in _WITHOUT_GREY and not _has_hue(picture.colour):
        picture = _in_srgb(picture)  # the file will have RGB pixels, for which a grey profile is none

    encoded = BytesIO()  # in memory first: from here on every OSError is the file system's
    try:
        to_pil(picture).save(encoded, name, **_OPTIONS.get(name, {}), **_metadata_options(picture, name))
    except MemoryError:
        raise
    except Exception as error:
        height, width = picture.pixels.shape[:2]
        raise ImageError(
            f"{name} cannot hold this picture of {width} x {height} pixels ({error}): choose PNG"
        ) from error
    if isinstance(target, (str, os.PathLike)):
        with write_atomically(target, force=True) as file:
            file.write(encoded.getbuffer())
    else:
        target.write(encoded.getbuffer())
    return picture.notes[known:]


def _metadata_options(picture: Picture, format: str) -> dict[str, Any]:
    """Metadata as arguments of Pillow's `save`; each of its writers has ways of its own."""
    options: dict[str, Any] = dict(_info(picture))
    if format == "PNG" and picture.xmp:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp"))
    if format == "TIFF" and (picture.exif or picture.xmp):
        tags = Image.Exif()
        tags.load(picture.exif or b"")
        if picture.xmp:
            tags[ExifTags.Base.XMLPacket] = picture.xmp
        options["exif"] = tags
    return options


# --- alpha ---


def pack_alpha(alpha: Bytes) -> bytes:
    """(H, W) as a PNG file of 8-bit grey, losslessly."""
    packed = BytesIO()
    Image.fromarray(alpha).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def unpack_alpha(data: bytes, width: int, height: int) -> Bytes:
    """The inverse of `pack_alpha`: (height, width).

    Errors: DamagedError unless `data` is a PNG file as bitstream/container.py, section 3, has it, which is checked
    before Pillow sees it: Pillow takes more for a PNG file, and with `LOAD_TRUNCATED_IMAGES` half of one.
    """
    wanted = f"a PNG file of {width} x {height} pixels in 8-bit grey"
    problem = _alpha_problem(data, width, height)
    if problem:
        raise DamagedError(f"the alpha plane is not {wanted} ({problem}): the file is damaged")
    try:
        image = _open(BytesIO(data), ["PNG"])
        if (image.size, image.mode) != ((width, height), "L"):
            raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}, not {wanted}")
        return np.array(image)
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedError(f"the alpha plane cannot be decoded ({error}): the file is damaged") from error


_PNG = b"\x89PNG\r\n\x1a\n"


def _alpha_problem(data: bytes, width: int, height: int) -> str:
    """What is wrong with an alpha plane, nothing if it is as specified. Inflates no more than such a plane has."""
    if not data.startswith(_PNG):
        return "it starts differently"
    kinds, contents, at = [], [], len(_PNG)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            return f"the CRC of its chunk at byte {at} is wrong, or cut off"
        kinds.append(data[at + 4 : at + 8])
        contents.append(data[at + 8 : end])
        at = end + 4
    if len(kinds) < 3 or kinds != [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"] or contents[-1]:
        return f"its {len(kinds)} chunks are not IHDR, IDAT and IEND alone"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    if contents[0] != header:
        return f"its header is {contents[0][:13].hex()}, not {header.hex()}"
    size, inflate = height * (width + 1), zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(contents[1:-1]), size + 1)
    except zlib.error as error:
        return str(error)
    if len(rows) != size or not inflate.eof or inflate.unused_data:
        return f"its data is not {size} bytes and nothing else"
    return "it has a filter type above 4" if max(rows[:: width + 1]) > 4 else ""
